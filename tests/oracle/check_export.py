#!/usr/bin/env python3
"""Loads an exported folder with transformers and compares its log-probabilities with `rehearsal score`.

Usage: python tests/oracle/check_export.py EXPORT_FOLDER [path of the rehearsal binary]
"""
import json
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
binary = sys.argv[2] if len(sys.argv) > 2 else "target/release/rehearsal"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = ["To be, or not to be, that is the question", "swap, rotate: p u n k"]
with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    file.flush()
    out = subprocess.run([binary, "score", folder, "--input", file.name, "--json"], check=True, capture_output=True, text=True).stdout
worst = 0.0
for text, line in zip(texts, out.splitlines()):
    ours = json.loads(line)
    ids = tokenizer(text)["input_ids"]
    assert ids == ours["tokens"], f"tokenizers disagree on {text!r}: {ids} and {ours['tokens']}"
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    for position in range(1, len(ids)):
        worst = max(worst, abs(logprobs[position - 1, ids[position]].item() - ours["logprobs"][position]))
print(f"largest difference of a log-probability: {worst:.2e}")
chat = tokenizer.apply_chat_template([{"role": "user", "content": "swap: p u n k"}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
reply = model.generate(**{k: v for k, v in ids.items() if k != "token_type_ids"}, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(reply[0]))
sys.exit(worst > 1e-4)
