#!/usr/bin/env python3
"""Writes src/unicode_tables.cpp from Python's copy of the Unicode character database.

Run from the repository root:  python3 scripts/make_unicode_tables.py
Numbers that Unicode 15 to 17 assigned are listed by hand below, so that the result does not depend
on the Python that runs the script (its database must be 14.0 or newer).
"""
import sys
import unicodedata
from pathlib import Path

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
NUMBERS_SINCE_15 = [
    (0x10D40, 0x10D49), (0x116D0, 0x116E3), (0x11BF0, 0x11BF9), (0x11DE0, 0x11DE9),
    (0x11F50, 0x11F59), (0x16130, 0x16139), (0x16D70, 0x16D79), (0x16FF4, 0x16FF6),
    (0x1CCF0, 0x1CCF9), (0x1D2C0, 0x1D2D3), (0x1E4F0, 0x1E4F9), (0x1E5F1, 0x1E5FA),
]  # fmt: skip


def ranges(keys):
    """Sorted (first, last, value) of equal neighbours in {code point: value}."""
    out = []
    for c in sorted(keys):
        if out and out[-1][1] == c - 1 and out[-1][2] == keys[c]:
            out[-1][1] = c
        else:
            out.append([c, c, keys[c]])
    return out


def decompositions():
    for c in CODE_POINTS:
        parts = unicodedata.decomposition(chr(c)).split()
        if not parts or parts[0].startswith("<"):
            continue
        first, second = int(parts[0], 16), int(parts[1], 16) if len(parts) > 1 else 0
        composes = second != 0 and unicodedata.normalize("NFC", chr(first) + chr(second)) == chr(c)
        yield f"{{0x{c:X}, 0x{first:X}, 0x{second:X}, {str(composes).lower()}}}"


def table(kind, name, rows):
    lines = [", ".join(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    body = "".join(f"    {line},\n" for line in lines)
    function = name[1].lower() + "".join("_" + x.lower() if x.isupper() else x for x in name[2:])
    return (
        f"constexpr {kind} {name}[] = {{\n{body}}};\n",
        f"std::span<const {kind}> {function}() {{ return {name}; }}\n",
    )


def main():
    if tuple(map(int, unicodedata.unidata_version.split("."))) < (14, 0, 0):
        sys.exit("make_unicode_tables: this Python's Unicode database is older than 14.0")
    numeric = {c: 0 for c in CODE_POINTS if unicodedata.category(chr(c))[0] == "N"}
    numeric |= {c: 0 for first, last in NUMBERS_SINCE_15 for c in range(first, last + 1)}
    combining = {c: unicodedata.combining(chr(c)) for c in CODE_POINTS}
    combining = {c: k for c, k in combining.items() if k}
    tables = [
        table("Range", "kNumericRanges", [f"{{0x{a:X}, 0x{b:X}}}" for a, b, _ in ranges(numeric)]),
        table("CombiningRange", "kCombiningRanges",
              [f"{{0x{a:X}, 0x{b:X}, {k}}}" for a, b, k in ranges(combining)]),
        table("Decomposition", "kDecompositions", list(decompositions())),
    ]  # fmt: skip
    text = (
        "// Written by scripts/make_unicode_tables.py; do not edit.\n"
        '#include "unicode_tables.h"\n\nnamespace cleave::unicode_tables {\nnamespace {\n\n'
        "// clang-format off\n"
        + "\n".join(definition for definition, _ in tables)
        + "// clang-format on\n\n}  // namespace\n\n"
        + "\n".join(accessor for _, accessor in tables)
        + "\n}  // namespace cleave::unicode_tables\n"
    )
    target = Path(__file__).resolve().parent.parent / "src" / "unicode_tables.cpp"
    target.write_text(text)


if __name__ == "__main__":
    main()
