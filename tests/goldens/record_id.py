"""Test vectors of record ids (docs/formats.md, "Record id"), by hashlib alone.

  python3 tests/goldens/record_id.py > memory/testdata/record_id.json
"""
import hashlib
import json
import struct
import sys


def record_id(tenant, fingerprint, codec, codebook, tokens):
    fields = [
        b"m3id1",
        tenant.encode("utf-8"),
        fingerprint,
        codec.encode("ascii"),
        codebook,
        b"".join(struct.pack("<I", t) for t in tokens),
    ]
    return hashlib.sha256(b"".join(struct.pack("<Q", len(f)) + f for f in fields)).hexdigest()


def main():
    a = hashlib.sha256(b"writer a").digest()
    b = hashlib.sha256(b"writer b").digest()
    book = hashlib.sha256(b"codebook").digest()
    none = bytes(32)
    cases = [
        ("default", a, "f32", none, [1, 2, 3]),
        ("default", b, "f32", none, [1, 2, 3]),
        ("default", a, "bf16", none, [1, 2, 3]),
        ("default", a, "int8", none, [1, 2, 3]),
        ("default", a, "vq", book, [1, 2, 3]),
        ("", a, "f32", none, [1, 2, 3]),
        ("Bücherei/読書", a, "f32", none, [1, 2, 3]),
        ("default", a, "f32", none, [0x01020304]),
        ("default", a, "f32", none, list(range(0, 60416, 472))),
        ("t" * 300, none, "vq", book, []),
    ]
    json.dump(
        [
            {
                "tenant": tenant,
                "writer_fingerprint": fingerprint.hex(),
                "codec": codec,
                "codebook_hash": codebook.hex(),
                "token_ids": tokens,
                "record_id": record_id(tenant, fingerprint, codec, codebook, tokens),
            }
            for tenant, fingerprint, codec, codebook, tokens in cases
        ],
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
