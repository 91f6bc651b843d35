"""Golden values for the trainer, by an implementation of its own in plain PyTorch.

Writes tests/golden/adamw.json (ten steps of torch.optim.AdamW) and tests/golden/factorllm_tiny/:
a random dense model, its split into experts, and run.json with losses and gradient norms of ten
FactorLLM steps (three of the router alone, seven joint). Seeded; needs torch and safetensors.

    python scripts/golden/make_training.py
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
V, D, H, L, E, K = 64, 16, 32, 2, 4, 2
HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 2, 1, 8, 1e-5, 10000.0
CONTEXT, WINDOWS, BATCH, SEED = 16, 6, 2, 5
SPEC = dict(learning_rate=0.01, min_lr_ratio=0.1, warmup_steps=3, beta1=0.9, beta2=0.95, epsilon=1e-8,
            weight_decay=0.01, clip_norm=0.5, pa_weight=0.05, balance_weight=0.01, router_steps=3,
            joint_steps=7)


def mt19937_64(seed):
    """std::mt19937_64, from its published constants."""
    n, m, mask = 312, 156, (1 << 64) - 1
    state = [seed & mask]
    for i in range(1, n):
        state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & mask)
    index = n
    while True:
        if index == n:
            for i in range(n):
                x = (state[i] & 0xFFFFFFFF80000000) | (state[(i + 1) % n] & 0x7FFFFFFF)
                state[i] = state[(i + m) % n] ^ (x >> 1) ^ (0xB5026F5AA96619E9 if x & 1 else 0)
            index = 0
        x = state[index]
        index += 1
        x ^= (x >> 29) & 0x5555555555555555
        x ^= (x << 17) & 0x71D67FFFEDA60000
        x ^= (x << 37) & 0xFFF7EEE000000000
        yield (x ^ (x >> 43)) & mask


def permutation(count, seed, epoch):
    rng = mt19937_64((seed + epoch * 0x9E3779B97F4A7C15) & ((1 << 64) - 1))
    order = list(range(count))
    for i in range(count, 1, -1):
        limit = ((1 << 64) - 1) // i * i
        value = next(rng)
        while value >= limit:
            value = next(rng)
        j = value % i
        order[i - 1], order[j] = order[j], order[i - 1]
    return order


def adamw_golden():
    torch.manual_seed(0)
    start = torch.randn(5)
    spec = dict(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
    decayed, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = torch.optim.AdamW(
        [{"params": [decayed]}, {"params": [plain], "weight_decay": 0.0}], lr=1.0,
        betas=(spec["beta1"], spec["beta2"]), eps=spec["epsilon"], weight_decay=spec["weight_decay"])
    steps = []
    for i in range(10):
        gradient, rate = torch.randn(5) * 10.0 ** (i % 3 - 1), 0.01 * (i + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        decayed.grad, plain.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        steps.append(dict(gradient=gradient.tolist(), learning_rate=rate,
                          decayed=decayed.detach().tolist(), plain=plain.detach().tolist()))
    (GOLDEN / "adamw.json").write_text(json.dumps(dict(spec, start=start.tolist(), steps=steps)))


def make_models():
    g = torch.Generator().manual_seed(7)
    rand = lambda *shape, std: torch.randn(*shape, generator=g) * std
    dense = {"model.embed_tokens.weight": rand(V, D, std=1.0), "lm_head.weight": rand(V, D, std=0.5),
             "model.norm.weight": 1 + rand(D, std=0.1)}
    moe, routers = dict(dense), []
    for l in range(L):
        p = f"model.layers.{l}."
        common = {p + "input_layernorm.weight": 1 + rand(D, std=0.1),
                  p + "post_attention_layernorm.weight": 1 + rand(D, std=0.1),
                  p + "self_attn.q_proj.weight": rand(D, D, std=0.25),
                  p + "self_attn.k_proj.weight": rand(KV_HEADS * HEAD_DIM, D, std=0.25),
                  p + "self_attn.v_proj.weight": rand(KV_HEADS * HEAD_DIM, D, std=0.25),
                  p + "self_attn.o_proj.weight": rand(D, D, std=0.1)}
        gate, up, down = rand(H, D, std=0.3), rand(H, D, std=0.3), rand(D, H, std=0.3)
        dense.update(common)
        dense.update({p + "mlp.gate_proj.weight": gate, p + "mlp.up_proj.weight": up,
                      p + "mlp.down_proj.weight": down})
        moe.update(common)
        moe[p + "block_sparse_moe.gate.weight"] = rand(E, D, std=0.3)
        for e in range(E):
            rows = slice(e * H // E, (e + 1) * H // E)
            q = p + f"block_sparse_moe.experts.{e}."
            moe[q + "w1.weight"] = gate[rows].clone()
            moe[q + "w3.weight"] = up[rows].clone()
            moe[q + "w2.weight"] = (down[:, rows] * E).contiguous()
    return dense, moe


def save_models(out, dense, moe):
    config = dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=HEADS,
                  num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=128,
                  rms_norm_eps=EPS, rope_theta=THETA, hidden_act="silu", tie_word_embeddings=False)
    for name, tensors, extra in (
            ("dense", dense, dict(architectures=["LlamaForCausalLM"], model_type="llama",
                                  intermediate_size=H)),
            ("moe", moe, dict(architectures=["MixtralForCausalLM"], model_type="mixtral",
                              intermediate_size=H // E, num_local_experts=E,
                              num_experts_per_tok=K))):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(dict(config, **extra), indent=1) + "\n")
    provenance = dict(format_version=1, tool_version="golden", source="dense", source_sha256="",
                      num_experts=E, experts_per_token=K, partition="contiguous", seed=0,
                      gate="softmax", folded_scale=float(E), router_epsilon=1.0, router="random",
                      spec={}, neuron_order=[])
    (out / "moe" / "cleave.json").write_text(json.dumps(provenance, indent=1) + "\n")


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x):  # [B, heads, T, HEAD_DIM], half-split
    frequency = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angle = torch.outer(torch.arange(x.shape[2]).float(), frequency)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def attention(x, w, p):
    B, T, _ = x.shape
    split = lambda y, n: y.view(B, T, n, HEAD_DIM).transpose(1, 2)
    q = rotate(split(x @ w[p + "self_attn.q_proj.weight"].T, HEADS))
    k = rotate(split(x @ w[p + "self_attn.k_proj.weight"].T, KV_HEADS))
    v = split(x @ w[p + "self_attn.v_proj.weight"].T, KV_HEADS)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
    return y @ w[p + "self_attn.o_proj.weight"].T


def expert_outputs(x, gate, up, down):
    """Every expert on every token: [N, E, D]; the trainer's sparse path must agree with it."""
    hidden = F.silu(torch.einsum("nd,eid->nei", x, gate)) * torch.einsum("nd,eid->nei", x, up)
    return torch.einsum("nei,edi->ned", hidden, down)


def layer(x, w, l, p, learned):
    logits = x @ learned[p + "router"].T
    value, ids = logits.topk(K)
    weights = torch.zeros_like(logits).scatter(1, ids, value.softmax(-1))
    outputs = expert_outputs(x, *(learned[p + n] for n in ("gate", "up", "down")))
    y = E * torch.einsum("ne,ned->nd", weights, outputs)
    with torch.no_grad():
        q = f"model.layers.{l}.mlp."
        h = F.silu(x @ w[q + "gate_proj.weight"].T) * (x @ w[q + "up_proj.weight"].T)
        teacher = h @ w[q + "down_proj.weight"].T
        error = (outputs - teacher[:, None] / (E / K)).pow(2).mean(-1)
        labels = torch.zeros_like(error).scatter(1, error.topk(K, largest=False).indices, 1.0)
        target = labels.softmax(-1)
    log_p = logits.log_softmax(-1)
    pa = (log_p.exp() * (log_p - target.log())).sum(-1).mean()
    share = torch.zeros_like(logits).scatter(1, ids, 1.0).mean(0) / K
    balance = E * (share * log_p.exp().mean(0)).sum()
    return y, pa, balance


def forward(tokens, w, learned):
    x = w["model.embed_tokens.weight"][tokens]
    pa = balance = 0.0
    for l in range(L):
        p = f"model.layers.{l}."
        x = x + attention(norm(x, w[p + "input_layernorm.weight"]), w, p)
        inner = norm(x, w[p + "post_attention_layernorm.weight"]).reshape(-1, D)
        y, layer_pa, layer_balance = layer(inner, w, l, f"{l}.", learned)
        x = x + y.view_as(x)
        pa, balance = pa + layer_pa, balance + layer_balance
    logits = norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    lm = F.cross_entropy(logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1))
    return lm, pa, balance


def learned_tensors(dense, moe):
    learned = {}
    for l in range(L):
        stack = lambda name: torch.stack([dense[f"model.layers.{l}.mlp.{name}_proj.weight"]
                                          [e * H // E:(e + 1) * H // E] for e in range(E)])
        learned[f"{l}.router"] = moe[f"model.layers.{l}.block_sparse_moe.gate.weight"].clone()
        learned[f"{l}.gate"], learned[f"{l}.up"] = stack("gate"), stack("up")
        down = dense[f"model.layers.{l}.mlp.down_proj.weight"]
        learned[f"{l}.down"] = torch.stack([down[:, e * H // E:(e + 1) * H // E] for e in range(E)])
    return {n: torch.nn.Parameter(t.contiguous()) for n, t in learned.items()}


def rate(step, steps):
    s = SPEC
    if step < s["warmup_steps"]:
        return s["learning_rate"] * (step + 1) / s["warmup_steps"]
    done = (step - s["warmup_steps"]) / (steps - 1 - s["warmup_steps"])
    return s["learning_rate"] * (s["min_lr_ratio"] + (1 - s["min_lr_ratio"]) *
                                 0.5 * (1 + math.cos(math.pi * done)))


def training_golden():
    out = GOLDEN / "factorllm_tiny"
    dense, moe = make_models()
    save_models(out, dense, moe)
    g = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, V, (WINDOWS, CONTEXT), generator=g)
    tokens[:, 1::2] = (3 * tokens[:, 0::2] + 7) % V  # something to learn
    learned = learned_tensors(dense, moe)
    groups = [{"params": [t], "weight_decay": 0.0 if n.endswith("router") else SPEC["weight_decay"]}
              for n, t in learned.items()]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(SPEC["beta1"], SPEC["beta2"]),
                                  eps=SPEC["epsilon"])
    order = sum((permutation(WINDOWS, SEED, epoch) for epoch in range(4)), [])
    steps, total = [], SPEC["router_steps"] + SPEC["joint_steps"]
    for step in range(total):
        router_only = step < SPEC["router_steps"]
        for name, tensor in learned.items():
            tensor.requires_grad_(not router_only or name.endswith("router"))
            tensor.grad = None
        lm, pa, balance = forward(tokens[order[BATCH * step:BATCH * (step + 1)]], dense, learned)
        loss = lm + SPEC["pa_weight"] * pa + SPEC["balance_weight"] * balance
        loss.backward()
        trained = [t for t in learned.values() if t.grad is not None]
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, SPEC["clip_norm"], norm_type=2.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total)
        optimizer.step()
        steps.append(dict(loss=loss.item(), lm=lm.item(), pa=pa.item(), balance=balance.item(),
                          grad_norm=grad_norm.item()))
        print(step + 1, steps[-1])
    run = dict(SPEC, seed=SEED, batch=BATCH, context=CONTEXT, tokens=tokens.flatten().tolist(),
               permutations=[permutation(WINDOWS, SEED, epoch) for epoch in range(2)], steps=steps)
    (out / "run.json").write_text(json.dumps(run))


if __name__ == "__main__":
    rng = mt19937_64(5489)
    assert [next(rng) for _ in range(10000)][-1] == 9981545732273789042  # the C++ standard's check
    adamw_golden()
    training_golden()
