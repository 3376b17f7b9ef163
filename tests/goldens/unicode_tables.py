r"""Makes transformer/tokenizer_unicode_tables.inc: the code points of \p{L}, \p{N} and \s as the regular
expressions of Hugging Face's tokenizers see them (found by asking for every code point, so that
the Unicode version is theirs).

    python tests/goldens/unicode_tables.py     (packages: tests/goldens/requirements.txt)
"""

import pathlib

import tokenizers
from tokenizers import Regex, pre_tokenizers

out = [f"// Made by tests/goldens/unicode_tables.py with tokenizers {tokenizers.__version__}; inclusive ranges, ascending."]
for name, pattern in (("kLetterRanges", r"\p{L}"), ("kNumberRanges", r"\p{N}"), ("kSpaceRanges", r"\s")):
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    ranges = []
    for c in range(0x110000):
        if 0xD800 <= c <= 0xDFFF or split.pre_tokenize_str(chr(c)):
            continue
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    out.append(f"constexpr CodePointRange {name}[] = {{")
    for i in range(0, len(ranges), 6):
        out.append("    " + " ".join(f"{{0x{a:x}, 0x{b:x}}}," for a, b in ranges[i:i + 6]))
    out.append("};")
path = pathlib.Path(__file__).resolve().parents[2] / "transformer" / "tokenizer_unicode_tables.inc"
path.write_text("\n".join(out) + "\n")
