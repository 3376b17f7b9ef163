"""Makes transformer/testdata/rope_frequencies.json: inverse frequencies of RoPE as transformers'
ROPE_INIT_FUNCTIONS give them, each beside the config.json they belong to (as f32 bit patterns).

    python tests/goldens/rope_frequencies.py     (packages: tests/goldens/requirements.txt)
"""

import json
import pathlib

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BASE = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=64, hidden_size=256, intermediate_size=64,
            num_hidden_layers=1, num_attention_heads=2)
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = [
    {},
    {"rope_theta": 500000.0},
    {"rope_theta": 1000000},
    {"hidden_size": 160},
    {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 130000.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "rope_theta": 100000.0},
    {"rope_parameters": {"rope_type": "linear", "factor": 8, "rope_theta": 10000.0}},
    {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA31}},
    {"rope_theta": 500000.0, "head_dim": 64, "rope_scaling": {"type": "llama3", **LLAMA31, "factor": 32.0}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA31, "original_max_position_embeddings": 64}},
    # The length defaults to max_position_embeddings.
    {"max_position_embeddings": 4096,
     "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 2.0,
                         "high_freq_factor": 5.0}},
]

out = []
for case in CASES:
    config = LlamaConfig(**json.loads(json.dumps({**BASE, **case})))
    kind = config.rope_parameters["rope_type"]
    init = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequencies, scale = init(config)
    assert scale == 1.0 and frequencies.dtype == torch.float32
    out.append({"config": {**BASE, **case}, "inv_freq_bits": frequencies.view(torch.int32).tolist()})
path = pathlib.Path(__file__).resolve().parents[2] / "transformer" / "testdata" / "rope_frequencies.json"
path.write_text("[\n" + ",\n".join(json.dumps(o) for o in out) + "\n]\n")
