#!/usr/bin/env python3
"""Plots what bench_moe_ffn --json wrote: speed-up over the dense FFN by number of tokens.

    build/bin/bench_moe_ffn --shape tinyllama --json a.json
    python3 bench/plot.py a.json [b.json ...] --out speedup.svg     (or .png)

Needs matplotlib (pip install matplotlib). Two curves say what is possible:
  ideal   E / K: only the active experts cost anything. The bound where arithmetic limits.
  valley  1 / a(T), a(T) = 1 - (1 - K/E)^T: the share of the experts that T tokens touch, if they choose
          independently. The bound where memory limits: each touched expert is read once.
An SVG follows the reader's choice of a light or a dark page.
"""
import argparse
import json
import os
import sys

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d1d9e0"
DARK = {INK: "#e6edf3", PAPER: "#0d1117", GRID: "#3d444d"}
# Told apart on white and on black, and by readers who do not tell red from green.
COLOURS = ["#0f7fd8", "#d1690e", "#0f9d76", "#b34fc5", "#8a7a00"]


def fail(message):
    sys.exit(f"plot.py: {message}")


def load(path):
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        return data, [row["tokens"] for row in data["rows"]], data["experts"] / data["active"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path}: not what bench_moe_ffn --json writes without --suite ({error!r})")


def draw(axes, path, colour):
    data, tokens, ideal = load(path)
    label = (f"D {data['d_model']} H {data['hidden']}, {data['active']} of {data['experts']}, "
             f"{data['dtype']}")
    rows = data["rows"]
    axes.fill_between(tokens, *zip(*[row["speedup_quartiles"] for row in rows]), color=colour, alpha=0.2, lw=0)
    axes.plot(tokens, [row["speedup"] for row in rows], color=colour, marker="o", ms=4, label=label)
    others = {name for row in rows for name in row.get("others", {}) if name.endswith("sparse")}
    for name in sorted(others):
        axes.plot(tokens, [row["dense_s"] / row["others"][name]["median_s"] for row in rows],
                  color=colour, ls="-.", lw=1, label=f"the same experts by {name.split(' sparse')[0]}")
    return data, tokens, ideal


def draw_bounds(axes, data, ideal, low, high):
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    untouched = 1 - data["active"] / data["experts"]
    axes.axhline(ideal, color=INK, ls="--", lw=1)
    axes.text(high, ideal, f"ideal E/K = {ideal:g} ", color=INK, ha="right", va="bottom", fontsize=9)
    axes.plot(steps, [1 / (1 - untouched ** t) for t in steps], color=INK, ls=":", lw=1.2,
              label="valley 1/a(T), a(T) = 1 − (1 − K/E)$^T$")


def follow_the_page(path):
    """Adds the dark colours to an SVG: matplotlib writes each colour into the element's style."""
    with open(path, encoding="utf-8") as file:
        svg = file.read()
    rules = "".join(f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
                    for light, dark in DARK.items() for kind in ("fill", "stroke"))
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    at = svg.index(">", svg.index("<svg")) + 1
    with open(path, "w", encoding="utf-8") as file:
        file.write(svg[:at] + style + svg[at:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("json", nargs="+", help="files of bench_moe_ffn --json")
    parser.add_argument("--out", required=True, help="file to write, .svg or .png")
    parser.add_argument("--dark", action="store_true", help="dark page in a .png")
    arguments = parser.parse_args()
    if not arguments.out.endswith((".svg", ".png")):
        fail(f"--out {arguments.out}: expected a name that ends with .svg or .png")
    try:
        import matplotlib
    except ImportError:
        fail("matplotlib is missing (pip install matplotlib)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if arguments.dark and arguments.out.endswith(".png"):
        globals().update(INK=DARK[INK], PAPER=DARK[PAPER], GRID=DARK[GRID])
    pyplot.rcParams.update({
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
        "ytick.color": INK, "figure.facecolor": PAPER, "axes.facecolor": PAPER, "grid.color": GRID,
        "svg.fonttype": "none", "svg.hashsalt": "cleave", "font.size": 10, "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    drawn = [draw(axes, path, COLOURS[i % len(COLOURS)]) for i, path in enumerate(arguments.json)]
    low = min(min(tokens) for _, tokens, _ in drawn)
    high = max(max(tokens) for _, tokens, _ in drawn)
    for data, ideal in {(d["experts"], d["active"]): (d, i) for d, _, i in drawn}.values():
        draw_bounds(axes, data, ideal, low, high)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2 ** i for i in range(64) if low <= 2 ** i <= high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 1.15 * max(ideal for _, _, ideal in drawn))
    axes.set_xlabel("tokens, T")
    axes.set_ylabel("speed-up over the dense FFN")
    machines = {f"{d['threads']} threads, {d['instruction_set']}" for d, _, _ in drawn}
    axes.set_title(f"MoE FFN, {' / '.join(sorted(machines))}; medians and quartiles", fontsize=10)
    axes.grid(True, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=2, frameon=False)
    temporary = f"{arguments.out}.tmp-{os.getpid()}{arguments.out[-4:]}"
    metadata = {"Date": None} if arguments.out.endswith(".svg") else None
    figure.savefig(temporary, dpi=110, metadata=metadata)
    if arguments.out.endswith(".svg"):
        follow_the_page(temporary)
    os.replace(temporary, arguments.out)


if __name__ == "__main__":
    main()
