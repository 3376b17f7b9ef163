"""Exits 0 where two safetensors files hold the same tensors: names, types, shapes, bits.

    compare_safetensors.py A B
"""

import sys

from safetensors.numpy import load_file

a, b = (load_file(path) for path in sys.argv[1:3])
assert a and sorted(a) == sorted(b), sorted(set(a) ^ set(b))
for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name
