#!/usr/bin/env python3
"""TRL: GRPO steps with one update and without a reference. Started by compare.py; a step is made for every line that comes in."""
import argparse
import sys
import tempfile

import datasets
import torch
import transformers
import trl
from peer import peak_rss, say
import time


class OneStepPerLine(transformers.TrainerCallback):
    def __init__(self):
        self.began = None

    def on_step_begin(self, args, state, control, **_):
        # The first step is the warm-up.
        if state.global_step > 0:
            if state.global_step == 1:
                say(dict(ready=True))
            if not sys.stdin.readline():
                control.should_training_stop = True
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_):
        if state.global_step > 1:
            wall, cpu = self.began
            say(dict(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu, peak_rss_bytes=peak_rss()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    output = sys.stdout
    sys.stdout = sys.stderr  # the trainer prints its logs
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, experts_implementation="grouped_mm", attn_implementation="sdpa")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = ["".join(letters[(i * i + 7 * p + i) % 26] for i in range(args.tokens)) for p in range(64)]
    assert all(len(tokenizer(p)["input_ids"]) == args.tokens for p in prompts)
    draw = iter(range(1 << 30))
    rows = args.prompts * args.group
    with tempfile.TemporaryDirectory() as place:
        settings = trl.GRPOConfig(
            output_dir=place, per_device_train_batch_size=rows, num_generations=args.group, max_completion_length=args.new, beta=0.0, temperature=1.0,
            num_iterations=1, max_steps=1000, learning_rate=1e-6, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, generation_kwargs=dict(min_new_tokens=args.new, top_k=0),
        )
        trainer = trl.GRPOTrainer(
            model=model, args=settings, processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(dict(prompt=prompts)),
            reward_funcs=lambda completions, **_: [float(next(draw) * 7919 % 13) for _ in completions], callbacks=[OneStepPerLine()],
        )
        sys.stdout = output
        trainer.train()
