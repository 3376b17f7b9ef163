#!/usr/bin/env python3
"""Holds `trainer pretrain` against PyTorch: the same initial weights, the same batches, 200 steps.

  trainer pretrain SHARDS --tokenizer T --out RUN --no_shuffle --steps 200 --batch B --context C \\
      --learning_rate P --final_learning_rate F --warmup_steps W
  train_200.py --run RUN --shards SHARD --batch B --context C --peak P --floor F --warmup W --out CURVE

Reads the shard by docs/formats.md, RUN/initial with transformers, RUN/metrics.jsonl; writes both
curves and fails where the losses differ by more than 1e-3. Run by hand.
"""

import argparse
import json
import math
import struct
import sys

import numpy as np
import torch
from transformers import LlamaForCausalLM


def read_shard(path):
    with open(path, "rb") as file:
        data = file.read()
    assert data[:8] == b"m3shard\0"
    version, token_bytes = struct.unpack_from("<II", data, 8)
    assert version == 1
    (tokens,) = struct.unpack_from("<Q", data, 16)
    dtype = np.uint16 if token_bytes == 2 else np.int32
    return torch.from_numpy(np.frombuffer(data, dtype, tokens, 96).astype(np.int64))


def main():
    parser = argparse.ArgumentParser()
    for name in ("run", "shards", "out"):
        parser.add_argument("--" + name, required=True)
    for name in ("batch", "context", "warmup"):
        parser.add_argument("--" + name, type=int, required=True)
    for name in ("peak", "floor"):
        parser.add_argument("--" + name, type=float, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--double", action="store_true",
                        help="PyTorch in float64: how far f32 rounding alone carries a run")
    a = parser.parse_args()
    torch.set_num_threads(1)

    model = LlamaForCausalLM.from_pretrained(a.run + "/initial", dtype=torch.float32)
    if a.double:
        model = model.double()
    bos = model.config.bos_token_id
    tokens = read_shard(a.shards)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=a.peak, betas=(0.9, 0.95), eps=1e-8)

    with open(a.run + "/metrics.jsonl") as file:
        ours = [json.loads(line)["loss"] for line in file]
    worst = 0.0
    with open(a.out, "w") as out:
        out.write("step,memory3,pytorch\n")
        for step in range(a.steps):
            if step < a.warmup:
                rate = a.peak * (step + 1) / a.warmup
            else:
                part = (step - a.warmup) / (a.steps - a.warmup)
                rate = a.floor + (a.peak - a.floor) * 0.5 * (1 + math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = rate
            first = step * a.batch * a.context
            targets = tokens[first:first + a.batch * a.context].view(a.batch, a.context)
            inputs = torch.cat([torch.full((a.batch, 1), bos), targets[:, :-1]], dim=1)
            logits = model(input_ids=inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            worst = max(worst, abs(loss.item() - ours[step]))
            out.write(f"{step + 1},{ours[step]:.6f},{loss.item():.6f}\n")
    print(f"{a.steps} steps, largest difference of the losses {worst:.2e}")
    return 0 if worst <= 1e-3 and len(ours) >= a.steps else 1


if __name__ == "__main__":
    sys.exit(main())
