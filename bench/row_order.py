#!/usr/bin/env python3
"""Do the rows of a quality table stand in the same order on two models?

    python3 bench/row_order.py [--file docs/benchmarks.md] FIRST SECOND

FIRST and SECOND are words of the line in the Markdown file behind which a model's tables stand: for each
rho the first table with a row a method (a line with "rho 0.5" goes before it), and one whose first column
is rho. Of every cell the first figure counts, KL or cosine distance. Prints Kendall's tau-b of the rows
that both models have, for each rho and text, all of them and those that can be deployed; the same
between texts of one model; which pairs of rows stand the other way round; and the first deployable row.
"""
import argparse
import itertools
import math
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
RHOS = ("0.75", "0.5", "0.25")
LEAST = 0.05  # two figures nearer than that, relative, are taken for equal where pairs are named
# What is one row under several names.
NAMES = [(r".*cleave, default.*|default", "cleave"), (r".*--refit off.*", "cleave without refit"),
         (r".*routing off, same refit.*", "static mask, refitted"), (r"k-means width \d+", "k-means"),
         (r"CMoE S\d+A\d+(E\d+)", r"CMoE \1")]


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def name_of(text):
    text = text.strip("* ")
    for pattern, name in NAMES:
        text = re.sub(f"^{pattern}$" if ".*" in pattern else pattern, name, text)
    return text


def figure(cell):
    found = re.search(r"\d+(\.\d+)?(e[-+]?\d+)?", cell)
    if not found:
        raise SystemExit(f"a cell of a table has '{cell}'; expected a figure")
    return float(found.group())


def tables(lines):
    """(the line before, header, rows) of every table."""
    before, block = "", []
    for line in lines + [""]:
        if line.startswith("|"):
            block.append(cells_of(line))
            continue
        if len(block) > 2:
            yield before, block[0], block[2:]
        block = []
        if line.strip():
            before = line


def read(path, words):
    """{rho: {text: {row: figure}}} behind the line with these words, and the rows that cannot be deployed."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = [i for i, line in enumerate(lines) if words in line]
    if not at:
        raise SystemExit(f"{path}: no line has the words '{words}'")
    end = next((i for i in range(at[0] + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    found, more, fixed = {}, {}, set()
    for before, header, rows in tables(lines[at[0]:end]):
        texts = {i: text for i, text in enumerate(header) if i > 1}
        rho = re.match(r"\W*rho (0\.\d+)", before)
        if header[0] == "method" and rho and rho.group(1) not in found:
            target = found[rho.group(1)] = {text: {} for text in texts.values()}
            for row in rows:
                if name_of(row[0]) == "dense":
                    continue
                if row[1] in ("oracle", "no stock class"):
                    fixed.add(name_of(row[0]))
                for i, text in texts.items():
                    target[text].setdefault(name_of(row[0]), figure(row[i]))
        elif header[0] == "rho" and set(RHOS) <= {row[0] for row in rows} and not more:
            for row in rows:
                for i, text in texts.items():
                    more.setdefault((row[0], text), {})[name_of(row[1])] = figure(row[i])
        if set(RHOS) <= set(found) and more:
            break
    for (rho, text), rows in more.items():
        for name in ("cleave without refit", "static mask, refitted"):
            if name in rows and rho in found:
                found[rho][text].setdefault(name, rows[name])
    return found, fixed


def tau(a, b, names):
    """Kendall's tau-b."""
    both = ties_a = ties_b = 0
    for x, y in itertools.combinations(names, 2):
        left, right = a[x] - a[y], b[x] - b[y]
        both += (left * right > 0) - (left * right < 0)
        ties_a += left == 0
        ties_b += right == 0
    pairs = len(names) * (len(names) - 1) / 2
    return both / math.sqrt((pairs - ties_a) * (pairs - ties_b))


def turned(first, second, names, texts):
    """Pairs that stand one way on one model and the other way on the other, each clearly and on two texts or more."""
    def clear(column, x, y):
        return column[x] < (1 - LEAST) * column[y]
    pairs = []
    for x, y in itertools.permutations(names, 2):
        on = [t for t in texts if clear(first[t], x, y) and clear(second[t], y, x)]
        if len(on) > 1:
            pairs.append(f"{x} before {y} ({len(on)} texts)")
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=pathlib.Path, default=ROOT / "docs/benchmarks.md")
    parser.add_argument("first")
    parser.add_argument("second")
    options = parser.parse_args()
    (first, fixed), (second, others) = (read(options.file, words) for words in (options.first, options.second))
    fixed |= others
    rhos = [rho for rho in RHOS if rho in first and rho in second]
    every_table = [found[rho] for rho in rhos for found in (first, second)]
    texts = [text for text in (every_table[0] if every_table else ()) if all(text in table for table in every_table)]
    if not texts:
        raise SystemExit("the two models have no table of one rho with a text that both name")
    print("| rho | rows | |", *(f"{text} |" for text in texts))
    print("|" + "---|" * (3 + len(texts)))
    notes = []
    for rho in rhos:
        a, b = first[rho], second[rho]
        every = [name for name in a[texts[0]] if name in b[texts[0]]]
        deployable = [name for name in every if name not in fixed]
        for what, names in (("all", every), ("deployable", deployable)):
            print(f"| {rho} | {len(names)} | {what} |", *(f"{tau(a[t], b[t], names):.2f} |" for t in texts))
        for model, columns in (("first", a), ("second", b)):
            between = [f"{s} and {t} {tau(columns[s], columns[t], every):.2f}" for s, t in itertools.combinations(texts, 2)]
            notes.append(f"rho {rho}, the {model} model's own texts: " + ", ".join(between))
            best = [min((n for n in columns[t] if n not in fixed), key=columns[t].get) for t in texts]
            notes.append(f"rho {rho}, the {model} model's first deployable row: " + ", ".join(best))
        pairs = turned(a, b, every, texts)
        notes.append(f"rho {rho}, of {math.comb(len(every), 2)} pairs {len(pairs)} turned round: " + ("; ".join(pairs) or "none"))
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main()
