#!/usr/bin/env python3
"""llama.cpp: decoding of many sequences, and prefill, on a GGUF file. Started by compare.py.

Logits are computed for every new token; nothing is sampled from them (the next token is fixed), which favours llama.cpp.
"""
import argparse
import ctypes
import time

import llama_cpp
from peer import serve

F32, F16 = 0, 1


def context(model, args, sequences, tokens, flash, unified, cache):
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = sequences * tokens
    settings.n_batch = settings.n_ubatch = max(512, sequences)
    settings.n_seq_max = sequences
    settings.n_threads = settings.n_threads_batch = args.threads
    settings.flash_attn_type = 1 if flash else 0
    settings.kv_unified = unified
    settings.type_k = settings.type_v = cache
    settings.no_perf = True
    return llama_cpp.llama_init_from_model(model, settings)


class Batch:
    """One llama_batch, refilled in place."""

    def __init__(self, capacity):
        self.batch = llama_cpp.llama_batch_init(capacity, 0, 1)

    def fill(self, rows):
        batch = self.batch
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(rows)

    def decode(self, ctx):
        if llama_cpp.llama_decode(ctx, self.batch):
            raise SystemExit("llama_decode failed")


def decode(ctx, args):
    """Prompts one after another, then `new` tokens of all sequences together."""
    prompt, step = Batch(max(512, args.tokens)), Batch(args.batch)

    def run():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        began = time.perf_counter()
        for sequence in range(args.batch):
            prompt.fill([(300 + (7 * i + sequence) % 3000, i, sequence, i + 1 == args.tokens) for i in range(args.tokens)])
            prompt.decode(ctx)
        prefilled, cpu = time.perf_counter(), time.process_time()
        step.fill([(300 + s, args.tokens, s, True) for s in range(args.batch)])
        positions = step.batch.pos
        for n in range(1, args.new):
            step.decode(ctx)
            for s in range(args.batch):
                positions[s] = args.tokens + n
        decoded = time.perf_counter()
        return dict(prefill_seconds=prefilled - began, decode_seconds=decoded - prefilled, decode_cpu_seconds=time.process_time() - cpu)

    return run


def prefill(ctx, args):
    step = Batch(512)

    def run():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        for first in range(0, args.tokens, 512):
            end = min(first + 512, args.tokens)
            step.fill([(300 + (7 * i) % 3000, i, 0, i + 1 == args.tokens) for i in range(first, end)])
            step.decode(ctx)

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["decode", "prefill"])
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(args.file.encode(), llama_cpp.llama_model_default_params())
    sequences = args.batch if args.what == "decode" else 1
    best = None
    # The best of its settings: flash attention, one cache for all sequences, type of the cache.
    for flash, unified, cache in [(0, False, F32), (1, False, F16), (0, True, F32), (1, True, F16), (1, True, F32)]:
        ctx = context(model, args, sequences, args.tokens + args.new, flash, unified, cache)
        if not ctx:
            continue
        work = (decode if args.what == "decode" else prefill)(ctx, args)
        began = time.perf_counter()
        figures = work() or {}
        seconds = figures.get("decode_seconds", time.perf_counter() - began)
        if best is None or seconds < best[0]:
            if best:
                llama_cpp.llama_free(best[2])
            best = (seconds, work, ctx, dict(flash=flash, unified=unified, cache="f32" if cache == F32 else "f16"))
        else:
            llama_cpp.llama_free(ctx)
    serve(lambda: (best[1]() or {}) | dict(settings=best[3]), warm_up=False)
