"""Explicit memory in NumPy, written from the equations of Memory3 (arXiv 2407.01178) as the design
states them, to hold the decoder against. Makes transformer/testdata/memory_gqa.

    python tests/goldens/memory_reference.py     (packages: tests/goldens/requirements.txt)

The directory is a small random Llama (config.json, model.safetensors) with expected.safetensors. For
each of the geometries `first_half` and `spread`:
  <g>.reference_<r>        [tokens] I32            references, without <s>
  <g>.kept_<r>             [layers, heads, kept]   indices of the kept tokens, ascending (I32)
  <g>.memory_<r>           [layers, 2, heads, kept, head_dim] F32, keys after RoPE
  <g>.context              [tokens] I32            begins with <s>
  <g>.reads                [tokens, references] I32: 1 where the token reads the reference's memory
  <g>.logits               [tokens, vocab] F32
  <g>.logits_without       the same where no token reads any
  <g>.memory_layers, <g>.prefix, <g>.numbers       (numbers: tokens_kept, reference_tokens)

Everything is one dense matrix of scores and one mask per layer, in double precision; the angles of
RoPE are rounded to float32 first, as transformers does.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parents[2] / "transformer" / "testdata" / "memory_gqa"

VOCAB, WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 48, 4, 4, 2, 8
EPS, THETA, BOS = 1e-5, 10000.0, 1

GEOMETRIES = {
    "first_half": dict(memory_layers=[0, 1], tokens_kept=8, reference_tokens=128,
                       prefix=[BOS, 17, 40, 9, 33, 5], lengths=[128, 100, 64, 17, 5, 1], context=150, chunk=64,
                       chunks=[[0, 3], [1, 2, 4, 5], [5, 0, 3]]),
    "spread": dict(memory_layers=[1, 3], tokens_kept=4, reference_tokens=24, prefix=[BOS, 50],
                   lengths=[24, 23, 4, 3, 20], context=40, chunk=16, chunks=[[0, 1, 2, 3, 4], [], [4, 2]]),
}


def rms_norm(x, gain):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * gain


def rotate(x, positions):
    """x [tokens, heads, head_dim], pairs (i, i + head_dim / 2)."""
    half = HEAD_DIM // 2
    frequency = (1.0 / THETA ** (np.arange(half, dtype=np.float32) * 2 / np.float32(HEAD_DIM))).astype(np.float32)
    angle = (np.asarray(positions, np.float32)[:, None] * frequency).astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def run(w, ids, positions, seen, extra=None):
    """Logits of `ids`, and per layer q, k before RoPE, k after, v.

    seen [tokens, tokens]: which token sees which. extra(layer): more keys and values, and which token
    sees them, or None."""
    x = w["model.embed_tokens.weight"][ids]
    trace = []
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        h = rms_norm(x, w[at + "input_layernorm.weight"])
        q = (h @ w[at + "self_attn.q_proj.weight"].T).reshape(len(ids), HEADS, HEAD_DIM)
        k = (h @ w[at + "self_attn.k_proj.weight"].T).reshape(len(ids), KV_HEADS, HEAD_DIM)
        v = (h @ w[at + "self_attn.v_proj.weight"].T).reshape(len(ids), KV_HEADS, HEAD_DIM)
        q_turned, k_turned = rotate(q, positions), rotate(k, positions)
        trace.append((q, k, k_turned, v))
        out = np.empty((len(ids), HEADS, HEAD_DIM))
        for head in range(HEADS):
            g = head // (HEADS // KV_HEADS)
            keys, values, visible = k_turned[:, g], v[:, g], seen
            more = extra(layer, g) if extra else None
            if more:
                keys = np.concatenate([more[0], keys])
                values = np.concatenate([more[1], values])
                visible = np.concatenate([more[2], seen], axis=1)
            scores = q_turned[:, head] @ keys.T / np.sqrt(HEAD_DIM)
            out[:, head] = softmax(np.where(visible, scores, -np.inf)) @ values
        x = x + out.reshape(len(ids), -1) @ w[at + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"])
        gate = h @ w[at + "mlp.gate_proj.weight"].T
        up = h @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T, trace


def causal(n):
    return np.tril(np.ones((n, n), bool))


def write(w, prefix, reference, layers, keep):
    """A memory: kept indices [layers, heads, kept] and values [layers, 2, heads, kept, head_dim]."""
    ids = np.concatenate([prefix, reference])
    p, n = len(prefix), len(reference)
    _, trace = run(w, ids, np.arange(len(ids)), causal(len(ids)))
    keep = min(keep, n)
    kept = np.empty((len(layers), KV_HEADS, keep), np.int64)
    values = np.empty((len(layers), 2, KV_HEADS, keep, HEAD_DIM))
    for i, layer in enumerate(layers):
        q, k, k_turned, v = trace[layer]
        for g in range(KV_HEADS):
            received = np.zeros(n)
            for head in range(g * HEADS // KV_HEADS, (g + 1) * HEADS // KV_HEADS):
                received += softmax(q[p:, head] @ k[p:, g].T / np.sqrt(HEAD_DIM)).sum(axis=0)
            # In the first layer equal tokens tie, but for the last bit of the sums here: lower index first.
            received = np.round(received, 10)
            order = np.lexsort((np.arange(n), -received))
            if keep < n:  # a choice that rounding could turn would test nothing
                margin = received[order[keep - 1]] - received[order[keep]]
                tie = margin == 0 and layer == 0 and reference[order[keep - 1]] == reference[order[keep]]
                assert tie or margin > 1e-4 * received[order[keep]], (layer, g, margin)
            kept[i, g] = np.sort(order[:keep])
            values[i, 0, g] = k_turned[p + kept[i, g], g]
            values[i, 1, g] = v[p + kept[i, g], g]
    return kept, values


def read(w, prefix, reference_tokens, context, layers, memories, reads):
    """Logits of the context in the memory layout; reads [tokens, memories]."""
    p, n = len(prefix), len(context)
    ids = np.concatenate([prefix, context])
    positions = np.concatenate([np.arange(p), p + reference_tokens + np.arange(n)])
    reads = np.concatenate([np.zeros((p, len(memories)), bool), reads.astype(bool)])

    def extra(layer, g):
        if layer not in layers or not memories:
            return None
        i = layers.index(layer)
        return (np.concatenate([m[i, 0, g] for m in memories]), np.concatenate([m[i, 1, g] for m in memories]),
                np.concatenate([np.repeat(reads[:, [r]], m.shape[3], axis=1) for r, m in enumerate(memories)],
                               axis=1))

    return run(w, ids, positions, causal(p + n), extra)[0][p:]


def check_dense(w, rng):
    """One whole reference kept in every layer is the plain forward of prefix + reference + context."""
    prefix, reference, context = np.array([BOS, 7, 8]), rng.integers(3, VOCAB, 20), rng.integers(3, VOCAB, 15)
    _, memory = write(w, prefix, reference, list(range(LAYERS)), len(reference))
    got = read(w, prefix, len(reference), context, list(range(LAYERS)), [memory], np.ones((len(context), 1)))
    ids = np.concatenate([prefix, reference, context])
    want = run(w, ids, np.arange(len(ids)), causal(len(ids)))[0][-len(context):]
    assert np.abs(got - want).max() < 1e-12 * np.abs(want).max() + 1e-12


def draw_weights(rng):
    w = {}

    def put(name, *shape, scale, mean=0.0):
        w[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    put("model.embed_tokens.weight", VOCAB, WIDTH, scale=0.5)
    put("lm_head.weight", VOCAB, WIDTH, scale=0.4)
    put("model.norm.weight", WIDTH, scale=0.3, mean=1)
    inward = WIDTH ** -0.5
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        put(at + "input_layernorm.weight", WIDTH, scale=0.3, mean=1)
        put(at + "post_attention_layernorm.weight", WIDTH, scale=0.3, mean=1)
        put(at + "self_attn.q_proj.weight", HEADS * HEAD_DIM, WIDTH, scale=1.5 * inward)
        put(at + "self_attn.k_proj.weight", KV_HEADS * HEAD_DIM, WIDTH, scale=1.5 * inward)
        put(at + "self_attn.v_proj.weight", KV_HEADS * HEAD_DIM, WIDTH, scale=inward)
        put(at + "self_attn.o_proj.weight", WIDTH, HEADS * HEAD_DIM, scale=inward)
        put(at + "mlp.gate_proj.weight", MLP, WIDTH, scale=inward)
        put(at + "mlp.up_proj.weight", MLP, WIDTH, scale=inward)
        put(at + "mlp.down_proj.weight", WIDTH, MLP, scale=MLP ** -0.5)
    return w


def main():
    rng = np.random.default_rng(2407)
    stored = draw_weights(rng)
    w = {name: value.astype(np.float64) for name, value in stored.items()}
    check_dense(w, rng)
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(stored, OUT / "model.safetensors", metadata={"format": "pt"})
    (OUT / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 512,
        "rms_norm_eps": EPS, "rope_theta": THETA, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": BOS, "eos_token_id": 2,
    }, indent=2) + "\n")

    out = {}
    for name, g in GEOMETRIES.items():
        references = [rng.integers(3, VOCAB, n) for n in g["lengths"]]
        memories = []
        for r, reference in enumerate(references):
            kept, memory = write(w, np.array(g["prefix"]), reference, g["memory_layers"], g["tokens_kept"])
            memories.append(memory)
            out[f"{name}.reference_{r}"] = reference.astype(np.int32)
            out[f"{name}.kept_{r}"] = kept.astype(np.int32)
            out[f"{name}.memory_{r}"] = memory.astype(np.float32)
        context = np.concatenate([[BOS], rng.integers(3, VOCAB, g["context"])])
        reads = np.zeros((len(context), len(references)), np.int32)
        for i in range(len(context)):
            chunk = 0 if i == 0 else min((i - 1) // g["chunk"], len(g["chunks"]) - 1)
            reads[i, g["chunks"][chunk]] = 1
        args = (w, np.array(g["prefix"]), g["reference_tokens"], context, g["memory_layers"])
        logits, without = read(*args, memories, reads), read(*args, [], np.zeros((len(context), 0)))
        assert np.abs(logits - without).max() > 0.05 * np.abs(without).max()
        out[f"{name}.context"] = context.astype(np.int32)
        out[f"{name}.reads"] = reads
        out[f"{name}.logits"] = logits.astype(np.float32)
        out[f"{name}.logits_without"] = without.astype(np.float32)
        out[f"{name}.memory_layers"] = np.array(g["memory_layers"], np.int32)
        out[f"{name}.prefix"] = np.array(g["prefix"], np.int32)
        out[f"{name}.numbers"] = np.array([g["tokens_kept"], g["reference_tokens"]], np.int32)
        print(name, "logits std", logits.std(), "moved by memories", np.abs(logits - without).max())
    save_file(out, OUT / "expected.safetensors")


if __name__ == "__main__":
    main()
