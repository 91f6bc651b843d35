#!/usr/bin/env python3
"""Compares final hidden states of an encoder with Transformers' float32.

    python tests/oracles/encoder_check.py MODEL [--cleave build/bin/cleave]

Windows of several lengths, the longest that the model has positions for among them. They must agree
within --tolerance, or, where rounding alone moves them by more, cleave must be at most 4 times as far
from a float64 run as Transformers' own float32. Exit code 1 if they do not.
"""

import argparse
import pathlib
import sys

import torch
import transformers

import oracle


@torch.no_grad()
def hidden_states(model, ids):
    """[T, D]; one window, all token types 0."""
    window = torch.tensor([ids])
    return model(input_ids=window, attention_mask=torch.ones_like(window)).last_hidden_state[0]


def windows(config):
    generator = torch.Generator().manual_seed(7)
    for length in sorted({1, 17, min(128, config.max_position_embeddings),
                          config.max_position_embeddings}):
        yield torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=pathlib.Path, help="directory to check")
    parser.add_argument("--cleave", type=pathlib.Path, default=oracle.DEFAULT_CLEAVE,
                        help="the command line (default build/bin/cleave)")
    parser.add_argument("--tolerance", type=float, default=5e-6,
                        help="largest allowed difference of a hidden value (default %(default)g)")
    options = parser.parse_args()
    model = transformers.AutoModel.from_pretrained(options.model, dtype=torch.float32,
                                                   trust_remote_code=False).eval()
    failed = False
    for ids in windows(model.config):
        output = oracle.run_cleave(options.cleave, "logits", options.model, "--tokens",
                                   ",".join(map(str, ids)))
        ours = torch.tensor(output["hidden"], dtype=torch.float64)
        theirs = hidden_states(model.float(), ids).double()
        exact = hidden_states(model.double(), ids)
        worst = (ours - theirs).abs().max().item()
        from_exact = (ours - exact).abs().max().item()
        rounding = (theirs - exact).abs().max().item()
        # NaN compares false with everything, so it fails here.
        passed = ours.shape == theirs.shape and (worst <= options.tolerance
                                                 or from_exact <= 4 * rounding)
        failed |= not passed
        print(f"{'ok    ' if passed else 'FAIL  '}{len(ids)} tokens: largest difference {worst:.3g} "
              f"(allowed {options.tolerance:g}; largest value {theirs.abs().max().item():.3g}); from "
              f"a float64 run: cleave {from_exact:.3g}, Transformers' float32 {rounding:.3g}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
