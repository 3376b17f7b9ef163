#!/usr/bin/env python3
"""PyTorch training the 124 M model of bench/trainer_cuda: the same geometry, batch and precision.

By hand, on a machine with a GPU, in an environment with torch and transformers:
    python bench/peers/pytorch_train.py --ours build/bench/trainer_cuda

transformers' LlamaForCausalLM under bf16 autocast with f32 weights, scaled-dot-product attention,
torch.compile, fused AdamW: what a PyTorch user would reach for. The rate is the median of whole
steps; with --ours the project's benchmark runs right after and reports its own over it.
"""
import argparse
import statistics
import subprocess
import sys
import time

del sys.path[0]  # this file's directory is no package
import torch
import transformers


def tokens_per_second(device, layers, hidden, vocab, sequences, tokens, steps):
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, max_position_embeddings=4096,
        tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = transformers.LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=device == "cuda")
    run = torch.compile(model) if device == "cuda" else model
    ids = torch.randint(vocab, (sequences, tokens), device=device)
    targets = torch.randint(vocab, (sequences, tokens), device=device)

    def step():
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = run(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, vocab), targets.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for i in range(steps + 5):
        begin = time.perf_counter()
        step()
        if i >= 5:  # compiled, and at speed
            times.append(time.perf_counter() - begin)
    return sequences * tokens / statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", help="the project's benchmark, run afterwards")
    parser.add_argument("--out", default="build/bench")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU: a trial")
    args = parser.parse_args()
    if args.tiny:
        rate = tokens_per_second("cpu", 2, 192, 1000, 2, 64, 2)
    else:
        rate = tokens_per_second("cuda", 12, 768, 50257, 32, 1024, args.steps)
    print(f"PyTorch {torch.__version__}: {rate:.0f} tokens/s")
    if args.ours:
        sys.exit(subprocess.call([args.ours, "--out", args.out,
                                  "--pytorch_tokens_per_s", str(rate)]))


if __name__ == "__main__":
    main()
