#!/usr/bin/env python3
"""Exports models as GGUF, loads them with llama.cpp, and compares tokens, log-probabilities and greedy continuations.

Usage: python tests/oracle/check_gguf.py EXPORT_FOLDER [path of the rehearsal binary]   (needs: pip install llama-cpp-python numpy)

EXPORT_FOLDER is a Hugging Face folder with a tokenizer, such as the export of `rehearsal run configs/smoke.toml`. It is
checked as it is; then random models with its tokenizer are, with and without q-LoRA, YaRN (beyond the original length),
a tied head, scaled latents, normalised weights and all groups allowed. llama.cpp's cache is set to f32; it still rounds activations to
bf16 before a product with bf16 weights and to blocks of eight bits before one with q8_0, hence the tolerances.
"""
import ctypes
import json
import pathlib
import subprocess
import sys
import tempfile

import llama_cpp
import numpy

SOURCE = pathlib.Path(sys.argv[1])
BINARY = sys.argv[2] if len(sys.argv) > 2 else "target/release/rehearsal"
# Largest difference of a log-probability; a greedy token may differ where llama.cpp's best two are closer than this.
TOLERANCE = {"f32": 1e-3, "bf16": 1.0, "q8_0": 3.0}
# The same in the mean: random weights amplify what trained ones forgive, and a router's near tie may fall the other way.
MEAN_TOLERANCE = {"f32": 1e-4, "bf16": 0.08, "q8_0": 0.3}
TEXTS = [
    "To be, or not to be, that is the question", "swap, rotate: p u n k", "", " ", "   x", "a\n\nb\r\n c\t\td ", "12345 6.78 1,000",
    "it's we'll I'M", "naïve café ΑΒΓ привет", "中文字符 こんにちは 안녕", "<|user|>hi<|assistant|>", "f(x)=x^2; {\"a\": [1]}",
    "\u00a0nbsp\u2003em\u2028line", "emoji 🙂👍🏽 e\u0301", "٣٤٥ ²½ Ⅷ", "!?…—“quoted”", "<|end|><|pad|>", "ends with blanks  ",
]
PROMPTS = ["swap: p u n k", "The 3 cats", "To be, or not"]
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707)
VARIANTS = {
    "greedy": {},
    "q-lora": dict(q_lora_rank=64),
    "yarn": dict(rope_scaling=YARN),
    "q-lora yarn": dict(q_lora_rank=64, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
    "tied head": dict(tie_word_embeddings=True),
    "normalised weights": dict(norm_topk_prob=True, routed_scaling_factor=16.0),
    "all groups": dict(topk_method="group_limited_greedy", n_group=4, topk_group=4, q_lora_rank=64),
    "scaled latents": dict(latent_scaling="sqrt", q_lora_rank=64),
    "no experts": dict(n_routed_experts=0, n_shared_experts=0, first_k_dense_replace=3),
    "like V2-Lite": dict(num_hidden_layers=27, hidden_size=64),
}


def random_model(folder, source, changes, seed):
    """A model of its own sizes, every row whole blocks of 32, with the tokenizer of `source`."""
    keys = json.loads((source / "config.json").read_text())
    keys.update(
        hidden_size=128, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=160, moe_intermediate_size=64, n_routed_experts=8,
        n_shared_experts=2, num_experts_per_tok=3, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=128, rope_theta=10000.0, rope_scaling=None,
        routed_scaling_factor=2.5, norm_topk_prob=False, topk_method="greedy", n_group=1, topk_group=1, tie_word_embeddings=False, rms_norm_eps=1e-5,
    )
    keys.update(changes, head_dim=None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    k = type("Keys", (), keys)
    d, heads, latent = k.hidden_size, k.num_attention_heads, k.kv_lora_rank
    shapes = {"model.embed_tokens": [k.vocab_size, d], "model.norm": [d]}
    if not k.tie_word_embeddings:
        shapes["lm_head"] = [k.vocab_size, d]
    for n in range(k.num_hidden_layers):
        layer = f"model.layers.{n}"
        own = f"{layer}.self_attn"
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = [d]
        queries = heads * (k.qk_nope_head_dim + k.qk_rope_head_dim)
        if k.q_lora_rank:
            shapes |= {f"{own}.q_a_proj": [k.q_lora_rank, d], f"{own}.q_a_layernorm": [k.q_lora_rank], f"{own}.q_b_proj": [queries, k.q_lora_rank]}
        else:
            shapes[f"{own}.q_proj"] = [queries, d]
        shapes |= {f"{own}.kv_a_proj_with_mqa": [latent + k.qk_rope_head_dim, d], f"{own}.kv_a_layernorm": [latent]}
        shapes |= {f"{own}.kv_b_proj": [heads * (k.qk_nope_head_dim + k.v_head_dim), latent], f"{own}.o_proj": [d, heads * k.v_head_dim]}
        places = {f"{layer}.mlp": k.intermediate_size}
        if k.n_routed_experts and n >= k.first_k_dense_replace:
            places = {f"{layer}.mlp.experts.{e}": k.moe_intermediate_size for e in range(k.n_routed_experts)}
            places[f"{layer}.mlp.shared_experts"] = k.n_shared_experts * k.moe_intermediate_size
            shapes[f"{layer}.mlp.gate"] = [k.n_routed_experts, d]
        for place, width in places.items():
            shapes |= {f"{place}.gate_proj": [width, d], f"{place}.up_proj": [width, d], f"{place}.down_proj": [d, width]}
    draw, header, data, at = numpy.random.default_rng(seed), {}, [], 0
    for name, shape in shapes.items():
        numbers = draw.normal(0, 0.3 if name.endswith("gate") else 1.3 * shape[-1] ** -0.5, shape)
        numbers = (1 + 0.2 * draw.normal(size=shape) if len(shape) == 1 else numbers).astype("<f4")
        header[f"{name}.weight"] = dict(dtype="F32", shape=shape, data_offsets=[at, at + numbers.nbytes])
        at += numbers.nbytes
        data.append(numbers.tobytes())
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def ours(folder, command, option, lines, *more):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        call = [BINARY, command, str(folder), option, file.name, "--json", *more]
        done = subprocess.run(call, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def logits_of(llama, tokens):
    llama.reset()
    llama.eval(tokens)
    return numpy.array(llama.scores[: len(tokens)], dtype=numpy.float64)


def check_tokens(folder, llama):
    texts = [text for text in TEXTS if text]
    differing = 0
    for text, line in zip(texts, ours(folder, "score", "--input", [dict(text=text) for text in texts])):
        theirs = llama.tokenize(text.encode(), add_bos=True, special=True)
        if theirs != line["tokens"]:
            differing += 1
            print(f"  {text!r}: {theirs} and {line['tokens']}")
    print(f"  tokens: {len(texts) - differing} of {len(texts)} texts alike")
    return differing == 0


def check(name, folder):
    """Every type of file against our own numbers."""
    config = json.loads((folder / "config.json").read_text())
    length = min(config["max_position_embeddings"], 120)
    draw = numpy.random.default_rng(5)
    documents = [dict(tokens=[int(t) for t in draw.integers(5, 261, length)]) for _ in range(2)]
    scored = ours(folder, "score", "--input", documents)
    replies = ours(folder, "generate", "--prompts", [dict(prompt=text) for text in PROMPTS], "--max-tokens", "24")
    good = True
    for dtype, tolerance in TOLERANCE.items():
        if dtype != "f32" and config["num_hidden_layers"] > 8:
            continue  # each random layer multiplies the noise of rounded activations; many leave nothing to compare
        with tempfile.TemporaryDirectory() as place:
            path = f"{place}/model.gguf"
            subprocess.run([BINARY, "export", str(folder), "--format", "gguf", "--dtype", dtype, "--out", path], check=True, capture_output=True)
            llama = llama_cpp.Llama(path, n_ctx=256, logits_all=True, type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False)
            worst, total, count = 0.0, 0.0, 0
            for line in scored:
                logits = logits_of(llama, line["tokens"])
                logprobs = logits - numpy.logaddexp.reduce(logits, axis=1, keepdims=True)
                for position in range(1, length):
                    error = abs(logprobs[position - 1, line["tokens"][position]] - line["logprobs"][position])
                    worst, total, count = max(worst, error), total + error, count + 1
            alike, greedy = True, 0
            for prompt, reply in zip(PROMPTS, replies):
                tokens = llama.tokenize(prompt.encode(), add_bos=True, special=True)
                for token in reply["tokens"]:
                    last = logits_of(llama, tokens)[-1]
                    best = int(last.argmax())
                    if best != token:
                        alike &= last[best] - last[token] < tolerance and dtype != "f32"
                        break
                    tokens.append(token)
                    greedy += 1
            fine = worst <= tolerance and total / count <= MEAN_TOLERANCE[dtype] and alike
            good &= fine
            greedy = f"{greedy} of {sum(len(reply['tokens']) for reply in replies)} greedy tokens"
            print(f"  {dtype}: largest difference {worst:.2e} (limit {tolerance}), mean {total / count:.2e}; {greedy}{'' if fine else '  WRONG'}")
            if dtype == "f32" and name == "as it is":
                good &= check_tokens(folder, llama)
            llama.close()
    return good


def check_refused(folder):
    call = [BINARY, "export", str(folder), "--format", "gguf", "--out", f"{folder}.gguf"]
    done = subprocess.run(call, capture_output=True, text=True)
    print("  " + done.stderr.strip())
    return done.returncode == 2 and "best two" in done.stderr


if __name__ == "__main__":
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    print("as it is")
    good = check("as it is", SOURCE)
    with tempfile.TemporaryDirectory() as place:
        for seed, (name, changes) in enumerate(VARIANTS.items()):
            print(name)
            folder = pathlib.Path(place) / name.replace(" ", "-")
            random_model(folder, SOURCE, changes, seed)
            good &= check(name, folder)
        print("limited to the best groups")
        folder = pathlib.Path(place) / "limited"
        random_model(folder, SOURCE, dict(topk_method="group_limited_greedy", n_group=4, topk_group=2), 9)
        good &= check_refused(folder)
    print("llama-cpp-python", llama_cpp.__version__, "agrees" if good else "DISAGREES")
    sys.exit(not good)
