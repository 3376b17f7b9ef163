#!/usr/bin/env python3
"""llama.cpp on the geometry of bench/decoder_cpu: prefill of 512 tokens, decoding of one sequence.

By hand, in an environment of its own (built from source, so that it uses what this CPU has):
    python3 -m venv VENV
    CMAKE_ARGS=-DGGML_NATIVE=ON VENV/bin/pip install llama-cpp-python gguf numpy
    VENV/bin/python bench/peers/llama_cpp.py --ours build/bench/decoder_cpu

Random weights in BF16 and Q8_0; numbers are medians. With --ours the project's benchmark runs
between two runs of llama.cpp, for a machine's speed changes from minute to minute.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

del sys.path[0]  # this file has its package's name
import gguf
import llama_cpp as ll
import numpy as np

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32000, 2048, 5632, 22, 32, 4, 64
PREFILL, CONTEXT, STEPS = 512, 128, 16
FORMATS = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def write_model(path, name):
    kind, file_type = FORMATS[name]
    w = gguf.GGUFWriter(path, "llama")
    w.add_vocab_size(VOCAB)
    w.add_context_length(2048)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(INTERMEDIATE)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_file_type(file_type)
    w.add_tokenizer_model("no_vocab")
    table = np.random.default_rng(1).normal(0, 0.02, 1 << 20).astype(np.float32)

    def matrix(tensor, rows, cols):
        values = np.resize(table, rows * cols).reshape(rows, cols)
        w.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(tensor):
        w.add_tensor(tensor, np.ones(HIDDEN, np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    for i in range(LAYERS):
        matrix(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(f"blk.{i}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{i}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        matrix(f"blk.{i}.ffn_down.weight", HIDDEN, INTERMEDIATE)
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
    norm("output_norm.weight")
    matrix("output.weight", VOCAB, HIDDEN)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


class Peer:
    def __init__(self, path, threads):
        parameters = ll.llama_model_default_params()
        parameters.use_mmap = False  # weights are repacked where llama.cpp wants to
        self.model = ll.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        context = ll.llama_context_default_params()
        context.n_ctx = 1024
        context.n_batch = context.n_ubatch = PREFILL
        context.n_threads = context.n_threads_batch = threads
        self.context = ll.llama_init_from_model(self.model, context)
        self.tokens = np.random.default_rng(2).integers(0, VOCAB, PREFILL)
        self.batch = ll.llama_batch_init(PREFILL, 0, 1)

    def decode(self, first, count):
        """Seconds for `count` tokens from position `first`; logits of the last."""
        b = self.batch
        b.n_tokens = count
        for i in range(count):
            b.token[i] = int(self.tokens[(first + i) % PREFILL])
            b.pos[i] = first + i
            b.n_seq_id[i] = 1
            b.seq_id[i][0] = 0
            b.logits[i] = i == count - 1
        start = time.perf_counter()
        if ll.llama_decode(self.context, b) != 0:
            sys.exit("llama_decode failed")
        ll.llama_get_logits_ith(self.context, count - 1)
        return time.perf_counter() - start

    def clear(self):
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)

    def measure(self, rounds):
        prefill, step = [], []
        for _ in range(rounds):
            self.clear()
            prefill.append(self.decode(0, PREFILL))
            self.clear()
            self.decode(0, CONTEXT)
            step += [self.decode(CONTEXT + i, 1) for i in range(STEPS)]
        return PREFILL / statistics.median(prefill), 1 / statistics.median(step)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", help="folder for the two models, kept (default: a temporary one)")
    parser.add_argument("--ours", help="the project's benchmark, to run in between")
    arguments = parser.parse_args()
    quiet = ll.llama_log_callback(lambda level, text, data: None)  # must outlive its use
    ll.llama_log_set(quiet, None)
    print(f"llama-cpp-python {ll.__version__}, {arguments.threads} threads")
    print(ll.llama_print_system_info().decode())

    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        for name in FORMATS:
            path = pathlib.Path(arguments.models or folder) / f"{name}.gguf"
            if not path.exists():
                write_model(path, name)
            peers[name] = Peer(path, arguments.threads)
            peers[name].decode(0, 64)

        def run():
            for name, peer in peers.items():
                prefill, decode = peer.measure(arguments.rounds)
                print(f"llama.cpp {name}: prefill {prefill:.1f} tokens/s, decode {decode:.2f} tokens/s",
                      flush=True)

        run()
        if arguments.ours:
            subprocess.run([arguments.ours, "--out", folder, "--rounds", str(arguments.rounds)],
                           check=True, stdout=subprocess.DEVNULL)
            metrics = json.loads((pathlib.Path(folder) / "decoder_cpu.json").read_text())["metrics"]
            for name in ("bf16", "int8"):
                print(f"memory3 {name}: prefill {metrics[f'prefill_{name}_tokens_per_s']:.1f} tokens/s, "
                      f"decode {metrics[f'decode_b1_{name}_tokens_per_s']:.2f} tokens/s", flush=True)
            run()


if __name__ == "__main__":
    main()
