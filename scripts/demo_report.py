#!/usr/bin/env python3
"""Puts the evaluations of scripts/demo.sh side by side: a table on the screen, report.json beside them.

    scripts/demo_report.py out/demo --name WHAT --text TEXT --dense MODEL --seconds 300
"""

import argparse
import json
import pathlib

COLUMNS = (("", 10), ("perplexity", 12), ("KL to dense", 13), ("same top-1", 12), ("active FFN", 12),
           ("tokens/s", 10))


def load(folder):
    """The evaluations that were made, in the order of the procedure."""
    paths = {name: folder / f"{name}.json" for name in ("dense", "budget", "converted", "tuned")}
    return {name: json.loads(path.read_text(encoding="utf-8"))
            for name, path in paths.items() if path.exists()}


def row(name, result):
    against_dense = name != "dense"
    return (name, f"{result['perplexity']:.3f}",
            f"{result['kl']:.4f}" if against_dense else "-",
            f"{100 * result['top1_agreement']:.1f} %" if against_dense else "-",
            f"{100 * result['active_share']:.0f} %", f"{result['tokens_per_s']:.0f}")


def line(cells):
    first, *others = cells
    return first.ljust(COLUMNS[0][1]) + "".join(
        cell.rjust(width) for cell, (_, width) in zip(others, COLUMNS[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--name", required=True, help="what was converted")
    parser.add_argument("--text", required=True, help="the held-out text")
    parser.add_argument("--dense", required=True, help="the dense model")
    parser.add_argument("--seconds", type=int, required=True, help="the job took")
    options = parser.parse_args()
    results = load(options.folder)

    heading = line([title for title, _ in COLUMNS])
    print(f"\n{options.name}\n\n{heading}\n{'-' * len(heading)}")
    for name, result in results.items():
        print(line(row(name, result)))
    print(f"\nHeld-out text: {options.text} ({results['dense']['tokens']} tokens).\n"
          "active FFN: share of the dense FFN's multiply-adds that run per token (with the routers).\n"
          "budget: half of the neurons run, fine experts and a shared slice, repaired, no training;\n"
          "converted: 8 experts, 4 active, which tuned starts from.\n"
          f"KL in nats a token. The job took {options.seconds} s after the build.\n")

    report = {"job": options.name, "dense_model": options.dense, "text": options.text,
              "seconds": options.seconds, "results": results}
    path = options.folder / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in results:
        where = options.dense if name == "dense" else options.folder / name
        print(f"{name:10} {where}")
    print(f"{'report':10} {path}")


if __name__ == "__main__":
    main()
