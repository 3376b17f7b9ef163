"""The small codebook of the tests (docs/formats.md, "Codebook"), without any of our C++.

  python3 tests/goldens/codebook.py memory/testdata/codebook_v1.m3cb

Needs numpy. Its tables are random, not trained: the tests that compare with FAISS train their own.
"""
import struct
import sys

import numpy as np

from records import crc32c

HEAD_DIM, COARSE_BITS, FINE_BITS = 16, 4, 3


def main():
    random = np.random.Generator(np.random.PCG64(2407))
    rotation, _ = np.linalg.qr(random.standard_normal((HEAD_DIM, HEAD_DIM)))
    coarse = random.standard_normal((2, 1 << COARSE_BITS, HEAD_DIM // 2)) * 1.5
    fine = random.standard_normal((8, 1 << FINE_BITS, HEAD_DIM // 8)) * 0.7
    file = b"m3codebk" + struct.pack("<IIII", 1, HEAD_DIM, COARSE_BITS, FINE_BITS) + bytes(40)
    for table in (rotation, coarse, fine):
        file += table.astype("<f4").tobytes()
    file += struct.pack("<I", crc32c(file))
    with open(sys.argv[1], "wb") as f:
        f.write(file)


if __name__ == "__main__":
    main()
