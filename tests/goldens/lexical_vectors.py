"""Makes embedder/testdata/lexical_expected.json: the lexical embedder written a second time, from the
comments of embedder/lexical.h and embedder/idf_table.h, over the shipped table. ASCII texts without
plurals and apostrophes, so that splitting is a lower-cased [a-z0-9]+.

    python tests/goldens/lexical_vectors.py
"""

import json
import math
import pathlib
import re
import struct

ROOT = pathlib.Path(__file__).resolve().parents[2]
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
TEXTS = [
    "Harbour",
    "The old harbour and the old town, and the OLD old wall.",
    "xqzzt 1847 of the",
    "Every morning the keeper of the lighthouse wrote down what the wind did to the boat in the night.",
]


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def hash_word(word):
    h = 0xCBF29CE484222325
    for b in word.encode():
        h = (h ^ b) * 0x100000001B3 & MASK
    return mix(h)


def main():
    table = (ROOT / "models" / "lexical" / "idf.bin").read_bytes()
    log2, = struct.unpack_from("<I", table, 12)

    def idf(h):
        return struct.unpack_from("<H", table, 32 + 2 * (h >> (64 - log2)))[0] / 4096

    expected = []
    for text in TEXTS:
        hashes = [hash_word(w) for w in re.findall("[a-z0-9]+", text.lower())]
        terms = {}
        for i, h in enumerate(hashes):
            terms.setdefault(h, [idf(h), 0])[1] += 1
            if i:
                pair = mix((hashes[i - 1] * GOLDEN + h) & MASK)
                terms.setdefault(pair, [min(idf(hashes[i - 1]), idf(h)) / 5, 0])[1] += 1
        v = [0.0] * 1024
        for h, (weight, tf) in terms.items():
            for j in range(4):
                r = mix((h + (j + 1) * GOLDEN) & MASK)
                for k in range(4):
                    bits = r >> (16 * k) & 0xFFFF
                    v[bits & 1023] += (-1 if bits >> 15 else 1) * weight * tf * 33 / (tf + 32)
        norm = math.sqrt(sum(x * x for x in v))
        # [dimension, value] of what is not zero.
        expected.append([[i, round(x / norm, 7)] for i, x in enumerate(v) if x])
    out = ROOT / "embedder" / "testdata" / "lexical_expected.json"
    out.write_text(json.dumps({"texts": TEXTS, "vectors": expected}) + "\n")


if __name__ == "__main__":
    main()
