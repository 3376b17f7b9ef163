"""Makes transformer/testdata/llama_*: small random LlamaForCausalLM directories as transformers saves
them, each with the logits transformers computes for them.

    python tests/goldens/llama_logits.py [name ...]     (packages: tests/goldens/requirements.txt)

expected.safetensors holds input_ids [sequences, tokens] (I32) and logits [sequences, tokens, vocab]
(F32), computed in f32 on the CPU from the saved files (bf16 and f16 weights widened first), positions
0, 1, 2, ... and nothing before them (the plain layout).

Weights are drawn so that the model is no near-uniform blur: queries and keys large enough for peaked
attention, norm gains away from 1, logits with a standard deviation of at least 1.
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = pathlib.Path(__file__).resolve().parents[2] / "transformer" / "testdata"

BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=None)

# `old_rope`: config.json in the spelling used before transformers 5.
MODELS = {
    "llama_mha": dict(num_key_value_heads=4, num_hidden_layers=3),
    # Longer sequences: prefix + 128-token reference + context fit.
    "llama_gqa": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=48, head_dim=8, _tokens=200),
    "llama_tied": dict(tie_word_embeddings=True, vocab_size=80),
    "llama_rope_theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama_rope_linear": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
                              _old_rope=True),
    "llama_rope_llama3": dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                               "high_freq_factor": 4.0, "rope_theta": 10000.0,
                                               "original_max_position_embeddings": 64}, _tokens=96),
    # 4 heads of 16 on a width of 32: head_dim is not hidden_size / heads.
    "llama_head_dim": dict(head_dim=16),
    # Multi-query attention, in several files.
    "llama_sharded": dict(num_key_value_heads=1, _shard="40KB"),
    "llama_bf16": dict(_dtype=torch.bfloat16, eos_token_id=[2, 3]),
    "llama_f16": dict(_dtype=torch.float16),
}


def draw(model, generator):
    for name, p in model.named_parameters():
        z = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * z
        elif "embed_tokens" in name:
            value = 0.4 * z
        elif "lm_head" in name:
            value = 0.4 * z
        elif "q_proj" in name or "k_proj" in name:
            value = z * 1.5 / p.shape[1] ** 0.5
        else:
            value = z / p.shape[1] ** 0.5
        p.data = value.to(p.dtype)


def make(name, overrides):
    special = {k: v for k, v in overrides.items() if k.startswith("_")}
    config = LlamaConfig(**{**BASE, **{k: v for k, v in overrides.items() if k not in special}})
    generator = torch.Generator().manual_seed(sum(name.encode()))
    model = LlamaForCausalLM(config)
    draw(model, generator)
    model.tie_weights()
    model = model.to(special.get("_dtype", torch.float32))

    path = OUT / name
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, max_shard_size=special.get("_shard", "1GB"))
    (path / "generation_config.json").unlink(missing_ok=True)
    if special.get("_old_rope"):
        c = json.loads((path / "config.json").read_text())
        rope = c.pop("rope_parameters")
        c["rope_theta"] = rope.pop("rope_theta")
        c["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        c["torch_dtype"] = c.pop("dtype")
        (path / "config.json").write_text(json.dumps(c, indent=2) + "\n")

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    ids = torch.randint(3, config.vocab_size, (2, special.get("_tokens", 48)), generator=generator)
    ids[:, 0] = 1
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        attention = model(ids, output_attentions=True, use_cache=False).attentions
    std = logits.std().item()
    # Attention that moves with the content: the largest weight of a late row, averaged.
    peak = sum(a[:, :, -16:].amax(-1).mean().item() for a in attention) / len(attention)
    assert logits.dtype == torch.float32 and std >= 1 and peak > 0.15, (name, std, peak)
    save_file({"input_ids": ids.to(torch.int32), "logits": logits.contiguous()}, path / "expected.safetensors")
    size = sum(f.stat().st_size for f in path.iterdir())
    print(f"{name:20} logits std {std:5.2f}  attention peak {peak:4.2f}  {size:7} bytes")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name, MODELS[name])
