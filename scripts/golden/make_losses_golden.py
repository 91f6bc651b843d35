"""Writes tests/golden/losses.json: the losses of cleave/train/losses.h by another route.

PyTorch in float64, built from torch.nn.functional and explicit loops over tokens and subsets;
nothing is shared with the C++ side. Run from the repository root:

    python scripts/golden/make_losses_golden.py
"""

import itertools
import json
import pathlib

import torch
import torch.nn.functional as F

torch.manual_seed(0)
TOKENS, EXPERTS, WIDTH, VOCAB = 6, 4, 5, 7
ALPHA = 1.5

logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
outputs = torch.randn(TOKENS, EXPERTS, WIDTH, dtype=torch.float64)
teacher = outputs.sum(1) + 0.1 * torch.randn(TOKENS, WIDTH, dtype=torch.float64)
mask = torch.tensor([True, True, False, True, False, True])


def per_expert(k):
    rows = []
    for t in range(TOKENS):
        errors = [F.mse_loss(outputs[t, e], teacher[t] * k / EXPERTS).item() for e in range(EXPERTS)]
        best = sorted(range(EXPERTS), key=lambda e: errors[e])[:k]
        rows.append([1.0 if e in best else 0.0 for e in range(EXPERTS)])
    return rows


def exhaustive(k):
    rows = []
    for t in range(TOKENS):
        best = min(
            itertools.combinations(range(EXPERTS), k),
            key=lambda s: (ALPHA * sum(outputs[t, e] for e in s) - teacher[t]).norm().item(),
        )
        rows.append([1.0 if e in best else 0.0 for e in range(EXPERTS)])
    return rows


def with_gradient(loss):
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return {"value": loss.item(), "gradient": gradient.tolist()}


target = torch.softmax(torch.tensor(per_expert(2), dtype=torch.float64), -1)


def pa_losses(keep):
    log_p, q = F.log_softmax(logits[keep], -1), target[keep]
    return {
        # F.kl_div(log of a, b) is KL(b || a).
        "router_first": with_gradient(F.kl_div(q.log(), log_p.exp(), reduction="batchmean")),
        "target_first": with_gradient(F.kl_div(log_p, q, reduction="batchmean")),
        "cross_entropy": with_gradient(F.cross_entropy(logits[keep], q)),
    }


ids = logits.detach().topk(2, -1).indices
p = logits.softmax(-1)
switch = 0.0
for e in range(EXPERTS):
    f = sum(int(i == e) for row in ids.tolist() for i in row) / ids.numel()
    switch = switch + EXPERTS * f * p[:, e].mean()
paper = sum(p[t, e] for t in range(TOKENS) for e in ids[t].tolist()) / p.numel()

student = torch.randn(TOKENS, VOCAB, dtype=torch.float64)
dense = torch.randn(TOKENS, VOCAB, dtype=torch.float64)
targets = torch.tensor([3, -100, 0, 6, -100, 2])

golden = {
    "logits": logits.tolist(),
    "outputs": outputs.tolist(),
    "teacher": teacher.tolist(),
    "mask": mask.tolist(),
    "alpha": ALPHA,
    "per_expert": {str(k): per_expert(k) for k in (1, 2, 3)},
    "exhaustive": {str(k): exhaustive(k) for k in (1, 2, 3)},
    "target": target.tolist(),
    "pa": pa_losses(torch.ones(TOKENS, dtype=torch.bool)),
    "pa_masked": pa_losses(mask),
    "ids": ids.tolist(),
    "balance": {"switch": with_gradient(switch), "paper": with_gradient(paper)},
    "student": student.tolist(),
    "dense": dense.tolist(),
    "targets": targets.tolist(),
    "language_model_loss": F.cross_entropy(student, targets).item(),
    "logit_kl": torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=dense), torch.distributions.Categorical(logits=student)
    ).mean().item(),
}
path = pathlib.Path(__file__).parents[2] / "tests/golden/losses.json"
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps(golden, indent=1) + "\n")
print(f"{path}: {path.stat().st_size} bytes")
