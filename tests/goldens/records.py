"""Stored records of version 1, one of each codec, written without any of our C++ (docs/formats.md).

  python3 tests/goldens/records.py memory/testdata            # f32, bf16, int8
  python3 tests/goldens/records.py memory/testdata vq         # vq, of memory/testdata/codebook_v1.m3cb

Needs numpy. The numbers of the memory follow a formula that the tests repeat.
"""
import hashlib
import struct
import sys

import numpy as np

LAYERS, KV_HEADS, TOKENS, HEAD_DIM, REFERENCE_TOKENS = 2, 2, 3, 16, 5
VECTORS = LAYERS * 2 * KV_HEADS * TOKENS
FINGERPRINT = hashlib.sha256(b"golden writer").digest()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def values():
    i = np.arange(VECTORS * HEAD_DIM)
    return (((i * 7919) % 1009 - 504) / np.float32(256)).astype(np.float32).reshape(VECTORS, HEAD_DIM)


def record(codec, payload, codebook_hash=bytes(32)):
    header = b"m3record" + struct.pack(
        "<IBBHIIIIII", 1, codec, 0, 0, LAYERS, KV_HEADS, TOKENS, HEAD_DIM, REFERENCE_TOKENS, 0
    )
    header += FINGERPRINT + codebook_hash + struct.pack("<QQI", len(payload), 0, crc32c(payload))
    header += struct.pack("<I", crc32c(header))
    assert len(header) == 128
    return header + payload


def bf16(x):
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def int8(x):
    out = b""
    for vector in x:
        scale = np.float32(np.abs(vector).max() / np.float32(127))
        out += scale.astype("<f4").tobytes() + np.rint(vector / scale).astype(np.int8).tobytes()
    return out


def bits_to_bytes(numbers, bits):
    """Little-endian bit packing: the first number in the lowest bits."""
    packed = 0
    for n, number in enumerate(numbers):
        packed |= int(number) << (n * bits)
    return packed.to_bytes((len(numbers) * bits + 7) // 8, "little")


def nearest(x, book):
    return int(np.argmin(((x - book) ** 2).sum(axis=1)))


def vq(x, path):
    file = open(path, "rb").read()
    magic, version, dim, coarse_bits, pq_bits = struct.unpack_from("<8sIIII", file, 0)
    assert magic == b"m3codebk" and version == 1 and dim == HEAD_DIM
    assert struct.unpack("<I", file[-4:])[0] == crc32c(file[:-4])
    numbers = np.frombuffer(file[64:-4], "<f4").astype(np.float64)
    half, part = dim // 2, dim // 8
    sizes = [dim * dim, (2 * half) << coarse_bits, (8 * part) << pq_bits]
    assert numbers.size == sum(sizes)
    rotation = numbers[: sizes[0]].reshape(dim, dim)
    coarse = numbers[sizes[0] : sizes[0] + sizes[1]].reshape(2, 1 << coarse_bits, half)
    fine = numbers[sizes[0] + sizes[1] :].reshape(8, 1 << pq_bits, part)
    out = b""
    for vector in x.astype(np.float64):
        y = rotation @ vector
        c = [nearest(y[m * half : (m + 1) * half], coarse[m]) for m in range(2)]
        r = y - np.concatenate([coarse[m][c[m]] for m in range(2)])
        f = [nearest(r[m * part : (m + 1) * part], fine[m]) for m in range(8)]
        out += bits_to_bytes(c, coarse_bits) + bits_to_bytes(f, pq_bits)
    return out, hashlib.sha256(file).digest()


def main():
    folder = sys.argv[1]
    x = values()
    if sys.argv[2:] == ["vq"]:
        files = {"record_v1_vq.m3rec": record(4, *vq(x, folder + "/codebook_v1.m3cb"))}
    else:
        files = {
            "record_v1_f32.m3rec": record(1, x.astype("<f4").tobytes()),
            "record_v1_bf16.m3rec": record(2, bf16(x)),
            "record_v1_int8.m3rec": record(3, int8(x)),
        }
    for name, data in files.items():
        with open(f"{folder}/{name}", "wb") as f:
            f.write(data)


if __name__ == "__main__":
    main()
