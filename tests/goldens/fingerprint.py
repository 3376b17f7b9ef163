"""The writer fingerprint (docs/formats.md, Writer fingerprint) without memory3's C++: standard library
only.

    fingerprint.py MODEL_DIR TOKENIZER_FILE [EXPLICIT_MEMORY_JSON]    prints the fingerprint
    fingerprint.py --vectors       makes transformer/testdata/fingerprints.json
"""

import hashlib
import json
import pathlib
import struct
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def hash_fields(fields):
    h = hashlib.sha256()
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        h.update(struct.pack("<Q", len(data)) + data)
    return h.digest()


def tensors_of(directory):
    out = {}
    for path in directory.glob("model*.safetensors"):
        blob = path.read_bytes()
        n, = struct.unpack("<Q", blob[:8])
        for name, entry in json.loads(blob[8:8 + n]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                out[name] = (entry["dtype"], entry["shape"], blob[8 + n + begin:8 + n + end])
    return out


def fingerprint(directory, tokenizer, memory):
    c = json.loads((directory / "config.json").read_text())
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = c["num_attention_heads"]
    tied = c.get("tie_word_embeddings", False)
    i64 = lambda v: struct.pack("<q", v)
    f64 = lambda v: struct.pack("<d", v)
    i32s = lambda vs: b"".join(struct.pack("<i", v) for v in vs)
    f32 = lambda v: struct.unpack("<f", struct.pack("<f", v))[0]

    tensors = ["m3tensors1"]
    for name, (dtype, shape, data) in sorted(tensors_of(directory).items()):
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        tensors += [name, dtype, b"".join(i64(d) for d in shape), data]

    fields = ["m3fp1",
              "vocab_size", i64(c["vocab_size"]),
              "hidden_size", i64(c["hidden_size"]),
              "intermediate_size", i64(c["intermediate_size"]),
              "num_hidden_layers", i64(c["num_hidden_layers"]),
              "num_attention_heads", i64(heads),
              "num_key_value_heads", i64(c.get("num_key_value_heads") or heads),
              "head_dim", i64(c.get("head_dim") or c["hidden_size"] // heads),
              "tie_word_embeddings", i64(int(tied)),
              "rms_norm_eps", f64(f32(c.get("rms_norm_eps", 1e-6))),
              "rope_theta", f64(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
              "rope_type", kind]
    if kind != "default":
        fields += ["factor", f64(rope["factor"])]
    if kind == "llama3":
        fields += ["low_freq_factor", f64(rope["low_freq_factor"]), "high_freq_factor", f64(rope["high_freq_factor"]),
                   "original_max_position_embeddings", i64(rope["original_max_position_embeddings"])]
    fields += ["tensors", hash_fields(tensors),
               "tokenizer", hashlib.sha256(tokenizer.read_bytes()).digest(),
               "memory_layers", i32s(memory["memory_layers"]),
               "tokens_kept", i64(memory.get("tokens_kept", 8)),
               "reference_tokens", i64(memory.get("reference_tokens", 128)),
               "prefix_token_ids", i32s(memory["prefix_token_ids"])]
    return hash_fields(fields).hex()


def vectors():
    tokenizer = "transformer/testdata/spm_tiny/tokenizer.model"
    sparse = {"memory_layers": [0], "tokens_kept": 8, "reference_tokens": 128, "prefix_token_ids": [1, 9, 10]}
    cases = [(name, tokenizer, sparse) for name in (
        "llama_gqa", "llama_tied", "llama_rope_linear", "llama_rope_llama3", "llama_head_dim", "llama_sharded", "llama_bf16")]
    cases += [("llama_gqa", "transformer/testdata/bpe_llama3/tokenizer.json", sparse)]
    for change in ({"memory_layers": [0, 1]}, {"tokens_kept": 4}, {"reference_tokens": 64}, {"prefix_token_ids": [1, 9]}):
        cases.append(("llama_gqa", tokenizer, {**sparse, **change}))
    return [{"model": "transformer/testdata/" + name, "tokenizer": tok, "memory": memory,
             "fingerprint": fingerprint(ROOT / "transformer/testdata" / name, ROOT / tok, memory)}
            for name, tok, memory in cases]


if __name__ == "__main__":
    if sys.argv[1:] == ["--vectors"]:
        (ROOT / "transformer/testdata/fingerprints.json").write_text(
            "[\n" + ",\n".join(json.dumps(v) for v in vectors()) + "\n]\n")
    else:
        model = pathlib.Path(sys.argv[1])
        memory = json.loads(sys.argv[3]) if len(sys.argv) > 3 else json.loads(
            (model / "config.json").read_text())["explicit_memory"]
        print(fingerprint(model, pathlib.Path(sys.argv[2]), memory))
