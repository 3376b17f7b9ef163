#!/usr/bin/env python3
"""Writes embedder/unicode_tables.inc from Python's unicodedata:  python3 embedder/unicode_tables.py

kClasses   from 0x80 up: {first, last, class} (CharClass of unicode.h).
kLower     simple lower-casing.
kFold      canonical decomposition (NFD) without nonspacing marks, lower-cased; where it is one or two
           code points and differs from kLower. Hangul is decomposed by arithmetic in unicode.cc.
"""
import pathlib
import sys
import unicodedata

WORD, PUNCTUATION, SPACE, CONTROL, MARK, OTHER = range(6)


def char_class(cp):
    c = chr(cp)
    category = unicodedata.category(c)
    if category == "Mn":
        return MARK
    if category[0] in "LNM":
        return WORD
    if category[0] == "P":
        return PUNCTUATION
    if category in ("Zs",):
        return SPACE
    if category[0] == "C":
        return CONTROL  # unassigned, private, surrogate, format, control
    return OTHER


def lower(cp):
    s = chr(cp).lower()
    return ord(s) if len(s) == 1 else cp


def fold(cp):
    kept = [c for c in unicodedata.normalize("NFD", chr(cp)) if unicodedata.category(c) != "Mn"]
    return [ord(c) for c in "".join(kept).lower()]


def wrap(items):
    lines, line = [], ""
    for item in items:
        if len(line) + len(item) > 98:
            lines.append(line)
            line = ""
        line += item
    return "\n".join(lines + [line])


def main():
    ranges, start = [], 0x80
    for cp in range(0x80, 0x110000):
        if cp == 0x10FFFF or char_class(cp + 1) != char_class(start):
            ranges.append((start, cp, char_class(start)))
            start = cp + 1
    lowers = [(cp, lower(cp)) for cp in range(0x80, 0x110000) if lower(cp) != cp]
    folds = []
    for cp in range(0x80, 0x110000):
        if 0xAC00 <= cp <= 0xD7A3 or char_class(cp) == MARK:
            continue
        f = fold(cp)
        if f != [lower(cp)] and 1 <= len(f) <= 2:
            folds.append((cp, f[0], f[1] if len(f) == 2 else 0))
    out = pathlib.Path(__file__).parent / "unicode_tables.inc"
    out.write_text(
        f"// Unicode {unicodedata.unidata_version}. Made by embedder/unicode_tables.py.\n"
        "// clang-format off\n"
        "constexpr ClassRange kClasses[] = {\n"
        + wrap("{0x%X,0x%X,%d}," % r for r in ranges)
        + "\n};\nconstexpr LowerPair kLower[] = {\n"
        + wrap("{0x%X,0x%X}," % p for p in lowers)
        + "\n};\nconstexpr FoldEntry kFold[] = {\n"
        + wrap("{0x%X,0x%X,0x%X}," % f for f in folds)
        + "\n};\n// clang-format on\n"
    )
    print(len(ranges), len(lowers), len(folds), file=sys.stderr)


if __name__ == "__main__":
    main()
