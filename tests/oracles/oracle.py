"""What the oracle checks share: running cleave, and the perplexity protocol."""

import json
import pathlib
import subprocess
import sys

import torch

DEFAULT_CLEAVE = pathlib.Path(__file__).resolve().parents[2] / "build" / "bin" / "cleave"


def run_cleave(cleave, *arguments):
    """Runs `cleave ... --json` and returns the object it prints."""
    command = [str(cleave), *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {result.returncode}\n{result.stderr}")
    try:
        return json.loads(result.stdout)
    except json.JSONDecodeError as error:
        sys.exit(f"{' '.join(command)}: not one JSON object ({error}):\n{result.stdout[:400]}")


@torch.no_grad()
def perplexity(model, ids, context, limit_tokens, progress=False):
    """exp of the mean -log p over disjoint windows of `context` tokens, without BOS.

    Every token of a window but its first is predicted; a last, shorter window is left out. This is
    the convention that `cleave eval` states, computed here by Transformers.
    """
    windows = min(len(ids), limit_tokens) // context
    if windows == 0:
        sys.exit(f"perplexity: {len(ids)} tokens are less than one window of {context}")
    total = 0.0
    for i in range(windows):
        window = torch.tensor([ids[i * context:(i + 1) * context]])
        log_p = torch.log_softmax(model(input_ids=window).logits[0, :-1].double(), dim=-1)
        total -= log_p.gather(1, window[0, 1:, None]).sum().item()
        if progress:
            print(f"  window {i + 1}/{windows}", file=sys.stderr)
    return float(torch.tensor(total / (windows * (context - 1))).exp())
