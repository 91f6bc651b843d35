#!/usr/bin/env python3
"""Opens a directory that cleave wrote with Transformers and compares what both compute.

    python tests/oracles/transformers_check.py OUT [--cleave build/bin/cleave]

Checks that Transformers opens OUT as the class that its config.json names, without remote code and
without a missing or unexpected tensor; that both tokenize alike; that the float32 logits on fixed
token ids agree within --tolerance, or, where rounding alone moves them by more, that cleave is at most
4 times as far from a float64 run as Transformers' own float32; and that both report the same
perplexity on a short text.
Exit code 1 if one of them fails.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import torch
import transformers

import oracle

TEXT = """Once upon a time there was a brave fox named Mia. She lived by the river, near the old mill.
What is seventeen plus five? Seventeen plus five is twenty-two.
Today is Monday. What day will it be in three days? It will be Thursday.
name: Golden Goose | food: Italian | price: cheap | area: riverside | stars: 4
=> The Golden Goose is a cheap Italian restaurant in the riverside. It has four stars.
"""
STRINGS = (
    TEXT, "Hello, world!", "  two  spaces\tand\ttabs\n\n\nlines ", "I'm you're WE'LL don't 'tis",
    "12345 3.14159 1e-10 0x1F", "naïve café — “quotes” … €5", "日本語のテキスト と 한국어", "👩‍👩‍👧‍👦 🇩🇪 🙂",
    "e\u0301 a\u0308\u0323 \u200b\u200d\ufeff", "x" * 300, " " * 129, "\x00\x01\x7f\u0085", "<|endoftext|>")


class Report:
    """Prints each check as it is made and remembers whether one failed."""

    def __init__(self):
        self.failures = 0

    def check(self, passed, text):
        print(("ok    " if passed else "FAIL  ") + text, flush=True)
        self.failures += not passed


def load(path, report, expected_class):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
        experts_implementation="eager")  # the one that runs in float64 as well
    name = type(model).__name__
    report.check(name == expected_class, f"class {name} (expected {expected_class})")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info[kind]))
        report.check(not keys, f"{kind.replace('_', ' ')}: {keys[:3] if keys else 'none'}")
    return model.eval()


def check_tokenizer(path, cleave, tokenizer, report):
    different = []
    for text in STRINGS:
        with tempfile.NamedTemporaryFile("wb", suffix=".txt") as file:
            file.write(text.encode())
            file.flush()
            ids = oracle.run_cleave(cleave, "tokenize", path, "--text-file", file.name)["ids"]
        if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
            different.append(text)
    report.check(not different, f"token ids of {len(STRINGS)} strings; different: {different[:3]}")


@torch.no_grad()
def check_logits(path, cleave, model, ids, tolerance, report):
    theirs = model(input_ids=torch.tensor([ids])).logits[0]
    output = oracle.run_cleave(cleave, "logits", path, "--tokens", ",".join(map(str, ids)))
    ours = torch.tensor(output["logits"], dtype=torch.float64)
    report.check(output["tokens"] == ids, "cleave computed the logits of the same tokens")
    if ours.shape != theirs.shape:
        report.check(False, f"logits {list(ours.shape)}, Transformers has {list(theirs.shape)}")
        return
    exact = model.double()(input_ids=torch.tensor([ids])).logits[0]
    model.float()
    rounding = (theirs.double() - exact).abs().max().item()
    from_exact = (ours - exact).abs().max().item()
    difference = (ours - theirs.double()).abs()
    worst = difference.max().item()
    position, token = divmod(int(difference.argmax()), theirs.shape[1])
    # NaN compares false with everything, so it fails here.
    report.check(worst <= tolerance or from_exact <= 4 * rounding,
                 f"logits of {len(ids)} tokens x {theirs.shape[1]}: largest difference {worst:.3g} at "
                 f"position {position}, token {token} (allowed {tolerance:g}; largest logit "
                 f"{theirs.abs().max().item():.3g})")
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    print(f"      from a float64 run: cleave {from_exact:.3g}, Transformers' float32 {rounding:.3g}")
    print(f"      same most likely token at {100 * agreement:.1f} % of the positions")


def check_perplexity(path, cleave, model, tokenizer, options, report):
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        text = (options.text.read_text(encoding="utf-8") if options.text else TEXT)
        file.write(text)
        file.flush()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        context = min(options.context, len(ids))
        limit = options.limit_tokens
        ours = oracle.run_cleave(cleave, "eval", path, "--text", file.name, "--context", context,
                                 "--limit-tokens", limit)["perplexity"]
    theirs = oracle.perplexity(model, ids, context, limit)
    difference = abs(ours / theirs - 1)
    report.check(difference <= 1e-3, f"perplexity: cleave {ours:.5f}, Transformers {theirs:.5f}, "
                                     f"relative difference {difference:.2g} (allowed 1e-3)")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=pathlib.Path, help="directory to check")
    parser.add_argument("--cleave", type=pathlib.Path, default=oracle.DEFAULT_CLEAVE,
                        help="the command line (default build/bin/cleave)")
    parser.add_argument("--tolerance", type=float, default=2e-4,
                        help="largest allowed difference of a logit (default %(default)g)")
    parser.add_argument("--expect",
                        help="class that Transformers must choose (default: the one in config.json)")
    parser.add_argument("--text", type=pathlib.Path, help="text for the perplexity (default: a short one)")
    parser.add_argument("--context", type=int, default=128, help="tokens a window (default %(default)s)")
    parser.add_argument("--limit-tokens", type=int, default=1024, help="(default %(default)s)")
    options = parser.parse_args()
    if not options.model.is_dir():
        parser.error(f"{options.model} is not a directory")
    if options.expect is None:
        options.expect = json.loads((options.model / "config.json").read_text())["architectures"][0]
    return options


def main():
    options = parse_options()
    report = Report()
    model = load(options.model, report, options.expect)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:96]
    check_tokenizer(options.model, options.cleave, tokenizer, report)
    check_logits(options.model, options.cleave, model, ids, options.tolerance, report)
    check_perplexity(options.model, options.cleave, model, tokenizer, options, report)
    print("all checks passed" if report.failures == 0 else f"{report.failures} checks failed")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
