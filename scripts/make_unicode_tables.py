#!/usr/bin/env python3
"""Writes src/unicode_tables.cpp from Python's copy of the Unicode character database and from
HuggingFace `tokenizers` (0.23), whose own tables are of Unicode 8 (categories), 9 (normalisation)
and 17 (letter case): tokens are only the same if the tables are.

Run from the repository root:  python3 scripts/make_unicode_tables.py
Numbers that Unicode 15 to 17 assigned are listed by hand below, and what that library does not
normalise is left out, so that the result does not depend on the Python that runs the script (its
database must be 14.0 or newer).
"""
import sys
import unicodedata
from pathlib import Path

from tokenizers import normalizers, pre_tokenizers

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


nfd = normalizers.NFD().normalize_str


def decompositions():
    for c in CODE_POINTS:
        parts = unicodedata.decomposition(chr(c)).split()
        if not parts or parts[0].startswith("<") or nfd(chr(c)) == chr(c):
            continue
        first, second = int(parts[0], 16), int(parts[1], 16) if len(parts) > 1 else 0
        composes = second != 0 and unicodedata.normalize("NFC", chr(first) + chr(second)) == chr(c)
        yield f"{{0x{c:X}, 0x{first:X}, 0x{second:X}, {str(composes).lower()}}}"


def has_known_class(c):
    """tokenizers sorts c among marks of four classes as Python does; one it doesn't know stays."""
    marks = "\u0334\u0323\u0301\u0345"
    texts = ["a" + pair for m in marks for pair in (chr(c) + m, m + chr(c))]
    return all(nfd(text) == unicodedata.normalize("NFD", text) for text in texts)


def bert_classes():
    """Code points that BertNormalizer removes to clean a text, those that it strips as accents, and
    those that BertPreTokenizer isolates."""
    off = dict(clean_text=False, handle_chinese_chars=False, strip_accents=False, lowercase=False)
    cleans = normalizers.BertNormalizer(**off | {"clean_text": True}).normalize_str
    strips = normalizers.BertNormalizer(**off | {"strip_accents": True}).normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    inside = {c: f"a{chr(c)}b" for c in CODE_POINTS}
    removed = {c: 0 for c in CODE_POINTS if cleans(inside[c]) == "ab"}
    accents = {c: 0 for c in CODE_POINTS if strips(inside[c]) == "ab"}
    isolated = {c: 0 for c in CODE_POINTS if len(split(inside[c])) == 3}
    return removed, accents, isolated


def lowercase_ranges():
    """{first, last, step, delta}: every step-th code point's lower case is delta away."""
    lower = normalizers.Lowercase().normalize_str
    out = []
    for c in CODE_POINTS:
        to = lower(chr(c))
        if to == chr(c) or len(to) > 1:  # only U+0130 becomes two
            continue
        delta = ord(to) - c
        last = out[-1] if out else [0, 0, 0, 0]
        step = c - last[1]
        if delta == last[3] and step in ([last[2]] if last[2] else [1, 2]):
            last[1:3] = c, step
        else:
            out.append([c, c, 0, delta])
    return [f"{{0x{a:X}, 0x{b:X}, {max(1, step)}, {delta}}}" for a, b, step, delta in out]


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
    combining = {c: k for c, k in combining.items() if k and has_known_class(c)}
    removed, accents, isolated = bert_classes()
    plain = lambda keys: [f"{{0x{a:X}, 0x{b:X}}}" for a, b, _ in ranges(keys)]
    tables = [
        table("Range", "kNumericRanges", plain(numeric)),
        table("Range", "kControlRanges", plain(removed)),
        table("Range", "kAccentRanges", plain(accents)),
        table("Range", "kPunctuationRanges", plain(isolated)),
        table("CaseRange", "kLowercaseRanges", lowercase_ranges()),
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
