#!/usr/bin/env python3
"""inference_server beside llama.cpp on the same weights: tokens per second at 1 and 8 clients.

By hand, in llama_cpp.py's environment, after bench/inference_ttft has made the model:
    VENV/bin/python bench/peers/llama_cpp_server.py --build build --model build/bench/inference/model

Ours is the real binary over HTTP: each client streams 128 tokens after a prompt of 128 ids, one
request after the other, without memory. llama.cpp's is the loop of its server's slots and nothing
else: all sequences in one batch a step (llama_decode, n_batch 2048, n_ubatch 512, KV f16), the
likeliest token taken; no HTTP, no text, no queue, so that its server could only be slower. Both in
turns, for a machine's speed changes from minute to minute; medians.
"""
import argparse
import http.client
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import threading
import time

del sys.path[0]  # llama_cpp.py beside this file has the package's name
import gguf
import llama_cpp as ll
import numpy as np

IN, OUT = 128, 128
KINDS = {  # our name: llama.cpp's
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def prompts(count, vocabulary):
    return np.random.default_rng(2).integers(3, vocabulary, (count, IN)).tolist()


# ---- the same weights as GGUF ----

def read_tensors(directory):
    with open(directory / "model.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(directory / "model.safetensors", np.uint8, "r", 8 + size)
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        assert tensor["dtype"] == "BF16", (name, tensor["dtype"])
        begin, end = tensor["data_offsets"]
        yield name, data[begin:end].view(np.uint16).reshape(tensor["shape"])


def write_gguf(directory, config, path, weights):
    kind, file_type = KINDS[weights]
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_vocab_size(config["vocab_size"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_file_type(file_type)
    w.add_tokenizer_model("no_vocab")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}
    for name, values in read_tensors(directory):
        stem = name.removesuffix(".weight")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        out = f"blk.{layer[1]}.{names[layer[2]]}" if layer else names[stem]
        if values.ndim == 2 and out.endswith(("attn_q", "attn_k")):
            # Rotary pairs: neighbours there, halves of a head here.
            heads = config["num_attention_heads" if out.endswith("_q") else "num_key_value_heads"]
            rows, cols = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)
        floats = (values.astype(np.uint32) << 16).view(np.float32)
        if values.ndim == 1:
            w.add_tensor(out + ".weight", floats)
        else:
            w.add_tensor(out + ".weight", gguf.quants.quantize(floats, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---- llama.cpp ----

class Slots:
    def __init__(self, path, threads, vocabulary, most):
        parameters = ll.llama_model_default_params()
        parameters.use_mmap = False  # weights are repacked where llama.cpp wants to
        self.model = ll.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        context = ll.llama_context_default_params()
        context.n_ctx = most * 512
        context.n_seq_max = most
        context.n_batch, context.n_ubatch = 2048, 512
        context.n_threads = context.n_threads_batch = threads
        self.context = ll.llama_init_from_model(self.model, context)
        self.vocabulary = vocabulary
        self.batch = ll.llama_batch_init(most * IN, 0, 1)

    def decode(self, rows):
        """rows: (sequence, position, id, wants a token). The likeliest next ids of those that do."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (sequence, position, token, wants) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wants
            b.seq_id[i][0] = sequence
        if ll.llama_decode(self.context, b) != 0:
            sys.exit("llama_decode failed")
        return [int(np.argmax(np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, i),
                                                    (self.vocabulary,))))
                for i, row in enumerate(rows) if row[3]]

    def run(self, asked):
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
        begin = time.perf_counter()
        answers = [[token] for token in self.decode(
            [(s, p, token, p == IN - 1) for s, ids in enumerate(asked) for p, token in enumerate(ids)])]
        for step in range(OUT - 1):
            rows = [(s, IN + step, answer[-1], True) for s, answer in enumerate(answers)]
            for answer, token in zip(answers, self.decode(rows)):
                answer.append(token)
        return len(asked) * OUT / (time.perf_counter() - begin)


# ---- ours ----

class Ours:
    def __init__(self, build, model, weights, threads):
        self.process = subprocess.Popen(
            [build / "bin/inference_server", "--model", model, "--model_name", "m", "--weights", weights,
             "--threads", str(threads), "--listen", "127.0.0.1:0", "--http_listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in self.process.stdout:
            if found := re.search(r"HTTP on port (\d+)", line):
                self.port = int(found[1])
            if "ready:" in line:
                return
        sys.exit("inference_server did not start")

    def ask(self, ids):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(
            {"model": "m", "prompt": ids, "max_tokens": OUT, "temperature": 0, "ignore_eos": True,
             "stream": True, "stream_options": {"include_usage": True}}),
            {"Content-Type": "application/json"})
        body = connection.getresponse().read().decode()
        assert f'"completion_tokens":{OUT}' in body.replace(" ", ""), body[-500:]

    def run(self, asked):
        begin = time.perf_counter()
        threads = [threading.Thread(target=self.ask, args=(ids,)) for ids in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(asked) * OUT / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default="build")
    parser.add_argument("--model", type=pathlib.Path, default="build/bench/inference/model")
    parser.add_argument("--gguf", type=pathlib.Path, default="build/bench", help="where GGUF files are kept")
    parser.add_argument("--weights", choices=KINDS, default="bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    quiet = ll.llama_log_callback(lambda level, text, data: None)  # must outlive its use
    ll.llama_log_set(quiet, None)
    print(f"llama-cpp-python {ll.__version__}, {arguments.threads} threads, {arguments.weights}", flush=True)

    path = arguments.gguf / f"inference-{arguments.weights}.gguf"
    if not path.exists():
        write_gguf(arguments.model, config, path, arguments.weights)
    ours = Ours(arguments.build, arguments.model, arguments.weights, arguments.threads)
    try:
        slots = Slots(path, arguments.threads, config["vocab_size"], 8)
        for clients in (1, 8):
            asked = prompts(clients * (arguments.rounds + 1), config["vocab_size"])
            rates = {"memory3": [], "llama.cpp": []}
            for r in range(arguments.rounds + 1):
                mine = asked[r * clients:(r + 1) * clients]
                for name, run in (("memory3", ours.run), ("llama.cpp", slots.run)):
                    rate = run(mine)
                    if r > 0:  # the first is for warming up
                        rates[name].append(rate)
            a, b = (statistics.median(rates[name]) for name in rates)
            print(f"{clients} clients: memory3 {a:.1f} tokens/s, llama.cpp {b:.1f} tokens/s, ratio "
                  f"{statistics.median(x / y for x, y in zip(*rates.values())):.2f}", flush=True)
    finally:
        ours.process.terminate()
        ours.process.wait()


if __name__ == "__main__":
    main()
