"""Checks that transformers loads a model directory of ours and computes the same logits from it as
from the one it was saved from. Run by hand (packages: tests/goldens/requirements.txt); `make test`
compares the tensors alone.

    transformers_loads.py SAVED ORIGINAL
    transformers_loads.py --config CONFIG_JSON     only that LlamaConfig reads it, and prints its rope
"""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

if sys.argv[1] == "--config":
    config = LlamaConfig.from_pretrained(sys.argv[2])
    print(config.rope_parameters, getattr(config, "explicit_memory", None))
    sys.exit(0)

saved, original = sys.argv[1:3]
for path in (saved, original):
    config = AutoConfig.from_pretrained(path)
    assert isinstance(config, LlamaConfig), type(config)
models = []
for path in (saved, original):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    models.append(model.eval())
ids = torch.arange(60).reshape(2, 30) % models[0].config.vocab_size
with torch.no_grad():
    a, b = (m(ids).logits for m in models)
assert torch.equal(a, b), (a - b).abs().max()
print(saved, "loads; logits are bit-identical to", original)
