#!/usr/bin/env python3
"""transformers + PyTorch: training steps, generation, prefill, on a folder of weights. Started by compare.py."""
import argparse

import torch
import transformers
from peer import serve


def load(folder, experts):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts, attn_implementation="sdpa")


def tokens(model, rows, columns):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(300, model.config.vocab_size, (rows, columns), generator=generator)


def train(model, args):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = tokens(model, args.batch, args.tokens)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def generate(model, args):
    model.eval()
    ids = tokens(model, args.batch, args.tokens)
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.new, min_new_tokens=args.new, pad_token_id=0, eos_token_id=None
    )
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def prefill(model, args):
    model.eval()
    ids = tokens(model, args.batch, args.tokens)

    @torch.inference_mode()
    def run():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "generate", "prefill"])
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--experts", default="grouped_mm")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = dict(train=train, generate=generate, prefill=prefill)[args.what](load(args.folder, args.experts), args)

    def once():
        work()

    serve(once)
