#!/usr/bin/env python3
"""Losses and gradients of small models, from the equations with plain PyTorch operations and autograd.

Written from shared equations (RMSNorm, RoPE in halves, SiLU-gated MLP, grouped-query attention, and
the writing and reading of explicit memories), not from memory3's code; in float64. Writes
transformer/testdata/gradients/: per model its weights, per case its batch, loss and gradients.

    python tests/goldens/gradients.py [directory]
"""

import json
import math
import pathlib
import sys

import torch
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)


def names_and_shapes(m):
    d, q, kv, f = m["hidden_size"], m["heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"], m["intermediate_size"]
    yield "model.embed_tokens.weight", (m["vocab_size"], d)
    for i in range(m["layers"]):
        p = f"model.layers.{i}."
        yield p + "self_attn.q_proj.weight", (q, d)
        yield p + "self_attn.k_proj.weight", (kv, d)
        yield p + "self_attn.v_proj.weight", (kv, d)
        yield p + "self_attn.o_proj.weight", (d, q)
        yield p + "mlp.gate_proj.weight", (f, d)
        yield p + "mlp.up_proj.weight", (f, d)
        yield p + "mlp.down_proj.weight", (d, f)
        yield p + "input_layernorm.weight", (d,)
        yield p + "post_attention_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    if not m["tied"]:
        yield "lm_head.weight", (m["vocab_size"], d)


def make_weights(m, generator):
    weights = {}
    for name, shape in names_and_shapes(m):
        w = torch.randn(shape, generator=generator)
        w = 1 + 0.2 * w if len(shape) == 1 else w * (1.0 if "embed" in name else 2.0 / math.sqrt(shape[1]))
        weights[name] = w.float().double()  # exactly representable in the stored file
    return weights


class Decoder:
    def __init__(self, m, w, tokens_kept, through_writing):
        self.m, self.w, self.keep, self.through = m, w, tokens_kept, through_writing

    def norm(self, x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.m["rms_norm_eps"]) * self.w[name]

    def rotate(self, x, positions):
        """x [tokens, heads, head_dim]"""
        half = x.shape[-1] // 2
        inverse = self.m["rope_theta"] ** (-torch.arange(half) / half)
        angle = positions[:, None].double() * inverse
        cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def project(self, layer, x):
        m, p = self.m, f"model.layers.{layer}."
        h = self.norm(x, p + "input_layernorm.weight")
        split = lambda name, heads: (h @ self.w[p + f"self_attn.{name}_proj.weight"].T).view(-1, heads, m["head_dim"])
        return split("q", m["heads"]), split("k", m["kv_heads"]), split("v", m["kv_heads"])

    def finish(self, layer, x, attention):
        p = f"model.layers.{layer}."
        x = x + attention.reshape(len(x), -1) @ self.w[p + "self_attn.o_proj.weight"].T
        h = self.norm(x, p + "post_attention_layernorm.weight")
        gate, up = h @ self.w[p + "mlp.gate_proj.weight"].T, h @ self.w[p + "mlp.up_proj.weight"].T
        return x + (gate * torch.sigmoid(gate) * up) @ self.w[p + "mlp.down_proj.weight"].T

    def attend(self, q, sources):
        """q [1, heads, d] of one token; sources: (k, v), each [kv_heads, n, d], under one softmax."""
        m = self.m
        k, v = torch.cat([s[0] for s in sources], 1), torch.cat([s[1] for s in sources], 1)
        group = m["heads"] // m["kv_heads"]
        out = []
        for h in range(m["heads"]):
            s = (k[h // group] @ q[h]) / math.sqrt(m["head_dim"])
            out.append(torch.softmax(s, 0) @ v[h // group])
        return torch.stack(out)

    def context(self, ids, positions, prefix_kv, memories_of_token, on_layer=None, until=None):
        """One causal context; prefix_kv: per layer (k, v) [kv_heads, p, d]. Returns x and per layer (k, v)."""
        x = self.w["model.embed_tokens.weight"][torch.tensor(ids)]
        positions = torch.tensor(positions)
        kv = []
        for layer in range(self.m["layers"]):
            q0, k0, v = self.project(layer, x)
            q, k = self.rotate(q0, positions), self.rotate(k0, positions)
            kv.append((k.transpose(0, 1), v.transpose(0, 1)))
            if on_layer:
                on_layer(layer, q0, k0, k, v)
            if layer == until:
                return None, kv
            rows = []
            for t in range(len(ids)):
                sources = [prefix_kv[layer]] if prefix_kv else []
                sources += memories_of_token(layer, t)
                sources.append((kv[layer][0][:, : t + 1], kv[layer][1][:, : t + 1]))
                rows.append(self.attend(q[t], sources))
            x = self.finish(layer, x, torch.stack(rows))
        return x, kv

    def write(self, ids, prefix_kv):
        """The memory of one reference: {layer: (k, v)}, each [kv_heads, kept, d]."""
        m, e = self.m, self.m["explicit_memory"]
        p, memory = len(e["prefix_token_ids"]), {}
        group = m["heads"] // m["kv_heads"]

        def keep(layer, q0, k0, k, v):
            if layer not in e["memory_layers"]:
                return
            ks, vs = [], []
            for g in range(m["kv_heads"]):
                with torch.no_grad():
                    w = torch.zeros(len(ids))
                    for h in range(g * group, (g + 1) * group):
                        w += torch.softmax(q0[:, h] @ k0[:, g].T / math.sqrt(m["head_dim"]), -1).sum(0)
                    kept = sorted(sorted(range(len(ids)), key=lambda j: (-w[j].item(), j))[: self.keep])
                    if self.keep < len(ids):  # far from a tie, so that float32 chooses the same
                        ranked = torch.sort(w, descending=True).values
                        assert ranked[self.keep - 1] - ranked[self.keep] > 1e-4, "a tie; change the seed"
                ks.append(k[kept, g])
                vs.append(v[kept, g])
            k_kept, v_kept = torch.stack(ks), torch.stack(vs)
            memory[layer] = (k_kept, v_kept) if self.through else (k_kept.detach(), v_kept.detach())

        none = lambda layer, t: []
        self.context(ids, range(p, p + len(ids)), prefix_kv, none, keep, e["memory_layers"][-1])
        return memory

    def loss(self, batch):
        if batch["layout"] == "memory":
            e = self.m["explicit_memory"]
            p, start = len(e["prefix_token_ids"]), len(e["prefix_token_ids"]) + e["reference_tokens"]
            _, prefix_kv = self.context(e["prefix_token_ids"], range(p), None, lambda layer, t: [])
            memories = [self.write(ids, prefix_kv) for ids in batch["references"]]
        else:
            prefix_kv, start = None, 0
        total = []
        for s in batch["sequences"]:

            def of_token(layer, t):
                if not s["chunk_references"]:
                    return []
                chunk = 0 if t == 0 else (t - 1) // self.m["explicit_memory"]["chunk_tokens"]
                return [memories[r][layer] for r in s["chunk_references"][chunk] if layer in memories[r]]

            ids = s["token_ids"]
            x, _ = self.context(ids, range(start, start + len(ids)), prefix_kv, of_token)
            head = self.w["model.embed_tokens.weight" if self.m["tied"] else "lm_head.weight"]
            log_p = torch.log_softmax(self.norm(x, "model.norm.weight") @ head.T, -1)
            total.append(-sum(log_p[i, t] for i, t in enumerate(s["targets"]) if t >= 0))
        return total


def random_ids(n, m, generator):
    return torch.randint(2, m["vocab_size"], (n,), generator=generator).tolist()


def sequence(n, m, generator, chunk_references=()):
    ids = [1] + random_ids(n - 1, m, generator)
    targets = ids[1:] + [-1]
    targets[n // 2] = -1  # a hole
    return {"token_ids": ids, "targets": targets, "chunk_references": list(chunk_references)}


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[2] / "transformer/testdata/gradients")
    out.mkdir(parents=True, exist_ok=True)
    base = dict(vocab_size=67, hidden_size=24, intermediate_size=40, layers=4, rms_norm_eps=1e-5, rope_theta=500.0)
    memory = dict(tokens_kept=3, reference_tokens=12, chunk_tokens=6, references_per_chunk=3, prefix_token_ids=[1, 7, 4])
    models = {
        # Grouped queries, tied, the first half of the layers; heads * head_dim != hidden_size.
        "gqa_tied": base | dict(heads=4, kv_heads=2, head_dim=8, tied=True, explicit_memory=memory | dict(memory_layers=[0, 1])),
        # One KV head a query head, untied, scattered memory layers.
        "mha_untied": base | dict(layers=3, heads=3, kv_heads=3, head_dim=8, tied=False, explicit_memory=memory | dict(memory_layers=[0, 2])),
    }
    cases = []
    for number, (name, m) in enumerate(models.items()):
        g = torch.Generator().manual_seed(20 + number)
        weights = make_weights(m, g)
        save_file({k: v.float().contiguous() for k, v in weights.items()}, out / f"{name}.weights.safetensors")
        plain = {"layout": "plain", "references": [], "sequences": [sequence(17, m, g), sequence(9, m, g)]}
        # References of full length, shorter, as long as what is kept, shorter than that; chunks that
        # read different ones, shared ones, none; a sequence of `<s>` and a bit; one without memories.
        # Their tokens differ: equal ones would tie at layer 0.
        references = [(2 + torch.randperm(m["vocab_size"] - 2, generator=g)[:n]).tolist() for n in (12, 9, 3, 2, 12)]
        reading = {
            "layout": "memory",
            "references": references,
            "sequences": [
                sequence(20, m, g, [[0, 1], [1, 2, 3], [], [4, 0, 2]]),
                sequence(8, m, g, [[3], [4, 1]]),
                sequence(5, m, g),
            ],
        }
        for case, batch, keep, through in (
            ("plain", plain, 3, True),
            ("memory", reading, 3, True),
            ("memory_stopped", reading, 3, False),
            ("memory_dense", reading, 12, True),
        ):
            if case == "memory_dense" and m["tied"]:
                continue
            w = {k: v.clone().requires_grad_() for k, v in weights.items()}
            losses = Decoder(m, w, keep, through).loss(batch)
            sum(losses).backward()
            file = f"{name}.{case}.safetensors"
            save_file({k: v.grad.float().contiguous() for k, v in w.items()}, out / file)
            cases.append({"name": f"{name}_{case}", "model": name, "gradients": file, "tokens_kept": keep,
                          "gradient_through_writing": through, "sequence_loss": [l.item() for l in losses], **batch})
            print(cases[-1]["name"], cases[-1]["sequence_loss"])
    (out / "cases.json").write_text(json.dumps({"models": models, "cases": cases}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
