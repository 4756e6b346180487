#!/usr/bin/env python3
"""Compares the program with transformers on fresh random models: logits, loss, every gradient, greedy continuations.

Usage: pip install -r tests/oracle/requirements.txt; python tests/oracle/check.py [--seed N] [--random N] [--keep FOLDER]

Makes the fixtures of a whole matrix with a new seed (told, so that --seed repeats it) and runs the Rust suite's module
`oracle` on them: routing x query compression x YaRN x tied head, each with its own first dense layers, shared experts,
scaling factor, mscales and form of the files; what the matrix leaves out; and --random N models of random sizes. Exits
with 0 only if every figure is within its bound: 1e-4 for logits and loss, 1e-4 (relative L2) for each parameter's
gradient, the same tokens for the continuations.
"""
import argparse
import itertools
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile

import transformers
from fixture import FORMS, check_softmax_scale, make

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEEPSEEK = dict(
    model_type="deepseek_v2", vocab_size=61, hidden_size=24, num_hidden_layers=3, intermediate_size=20, moe_intermediate_size=12,
    n_routed_experts=8, num_experts_per_tok=3, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=12, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=10, max_position_embeddings=256, rms_norm_eps=1e-6, norm_topk_prob=False, hidden_act="silu",
    attention_bias=False, bos_token_id=None, eos_token_id=1, pad_token_id=None,
)
GREEDY = dict(topk_method="greedy", n_group=1, topk_group=1)
GROUPS = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)
PLAIN = dict(rope_type="default", rope_theta=100.0)
MSCALES = ((0.707, 0.707), (1.0, 1.0), (1.0, 0.707), (0.707, 1.0))
LENGTHS, PROMPT = [48, 17, 70], 14


def yarn(mscale, mscale_all_dim, factor=8.0, original=16, beta_fast=4, beta_slow=1, theta=100.0):
    return dict(
        rope_type="yarn", rope_theta=theta, factor=factor, original_max_position_embeddings=original, beta_fast=beta_fast,
        beta_slow=beta_slow, mscale=mscale, mscale_all_dim=mscale_all_dim,
    )


def matrix():
    """All sixteen products of what must be covered; the rest goes round beside them."""
    for i, (groups, q_lora, stretched, tied) in enumerate(itertools.product([False, True], repeat=4)):
        keys = dict(
            DEEPSEEK, **(GROUPS if groups else GREEDY), q_lora_rank=16 if q_lora else None, tie_word_embeddings=tied,
            rope_parameters=yarn(*MSCALES[i // 2 % 4]) if stretched else PLAIN, first_k_dense_replace=i % 3,
            n_shared_experts=1 + (i + 1) % 3, routed_scaling_factor=(1.7, 1.0, 0.6, 4.0)[i // 3 % 4],
        )
        name = "-".join(("groups" if groups else "greedy", "qlora" if q_lora else "q", "yarn" if stretched else "plain", "tied" if tied else "untied"))
        yield name, keys, FORMS[i % len(FORMS)]


def beyond_the_matrix():
    base = dict(
        DEEPSEEK, **GREEDY, q_lora_rank=16, tie_word_embeddings=False, rope_parameters=PLAIN, first_k_dense_replace=1, n_shared_experts=2,
        routed_scaling_factor=1.7,
    )
    yield "normalised-weights", dict(base, norm_topk_prob=True), "published"
    yield "normalised-weights-groups", dict(base, **GROUPS, norm_topk_prob=True), "published"
    yield "normalised-weight-of-one", dict(base, norm_topk_prob=True, num_experts_per_tok=1), "published"
    yield "no-groups-named", dict(base, n_group=None, topk_group=None), "saved"
    yield "all-layers-dense", dict(base, first_k_dense_replace=3), "saved"
    yield "one-expert-of-many", dict(base, n_routed_experts=32, num_experts_per_tok=1), "saved"
    yield "mscale-all-dim-zero", dict(base, rope_parameters=yarn(1.0, 0.0)), "published"
    yield "yarn-at-its-paper-values", dict(
        base, **GROUPS, qk_rope_head_dim=64, max_position_embeddings=4096, rope_parameters=yarn(0.707, 0.707, 40.0, 4096, 32, 1, 10000.0)
    ), "saved"


def dense():
    """The dense models that DeepSeek-V2 is compared with: every sharing of keys and values, either head."""
    base = dict(
        model_type="llama", vocab_size=61, hidden_size=24, num_hidden_layers=3, intermediate_size=20, num_attention_heads=4,
        max_position_embeddings=256, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, mlp_bias=False, bos_token_id=None,
        eos_token_id=1, pad_token_id=None,
    )
    rope = dict(rope_type="default", rope_theta=100.0)
    for kv_heads, tied in itertools.product([4, 2, 1], [False, True]):
        keys = dict(base, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_parameters=rope)
        yield f"dense-{kv_heads}-of-4-{'tied' if tied else 'untied'}", keys, "published" if tied else "saved"
    wide = dict(base, num_key_value_heads=2, tie_word_embeddings=False, head_dim=10)
    yield "dense-heads-of-their-own-width", dict(wide, rope_parameters=rope), "published"
    stretched = dict(rope_type="yarn", rope_theta=100.0, factor=8.0, original_max_position_embeddings=16, beta_fast=4, beta_slow=1)
    yield "dense-yarn", dict(wide, rope_parameters=stretched), "saved"


def at_random(rng):
    """A model of random sizes. Even widths before a rotated part: transformers views pairs as complex numbers."""
    experts, groups = rng.choice([(4, 2), (6, 3), (8, 4), (12, 2), (16, 8), (20, 5)])
    kept = rng.randint(1, groups)
    limited = rng.random() < 0.5
    heads = rng.randint(1, 5)
    keys = dict(
        DEEPSEEK, vocab_size=rng.randint(30, 90), hidden_size=heads * rng.randint(3, 9), num_hidden_layers=rng.randint(1, 4),
        intermediate_size=rng.randint(3, 40), moe_intermediate_size=rng.randint(2, 17), n_routed_experts=experts, num_attention_heads=heads,
        num_key_value_heads=heads, kv_lora_rank=2 * rng.randint(2, 16), qk_nope_head_dim=2 * rng.randint(1, 9), qk_rope_head_dim=2 * rng.randint(1, 9),
        v_head_dim=rng.randint(2, 21), q_lora_rank=rng.choice([None, rng.randint(3, 33)]), tie_word_embeddings=rng.random() < 0.5,
        first_k_dense_replace=rng.randint(0, 2), n_shared_experts=rng.randint(1, 3), routed_scaling_factor=rng.choice([1.0, 2.5, 16.0]),
        num_experts_per_tok=rng.randint(1, experts // groups * kept if limited else experts),
        norm_topk_prob=rng.random() < 0.3,
        rope_parameters=yarn(*rng.choice(MSCALES), rng.choice([2.0, 5.5, 40.0]), rng.choice([8, 16, 30]), rng.choice([8, 32]), rng.choice([0.5, 1]), rng.choice([50.0, 10000.0]))
        if rng.random() < 0.6
        else dict(PLAIN, rope_theta=rng.choice([50.0, 10000.0])),
        **(dict(topk_method="group_limited_greedy", n_group=groups, topk_group=kept) if limited else GREEDY),
    )
    lengths = [rng.randint(20, 90) for _ in range(rng.randint(1, 5))]
    return keys, rng.choice(FORMS), lengths, rng.randint(1, 20)


def cases(seed, count):
    """Name, keys, form, lengths, prompt, seed of each case."""
    rng = random.Random(seed)
    for name, keys, form in itertools.chain(matrix(), beyond_the_matrix(), dense()):
        yield name, keys, form, LENGTHS, PROMPT, rng.getrandbits(32)
    for i in range(count):
        yield (f"random-{i:03}", *at_random(rng), rng.getrandbits(32))


def compare(place):
    """Runs the Rust suite on the fixtures; returns its largest errors, or None if it fails."""
    command = ["cargo", "test", "--release", "--package", "rehearsal", "--test", "suite", "oracle::", "--", "--nocapture", "--test-threads=1"]
    run = subprocess.run(command, cwd=ROOT, env=dict(os.environ, REHEARSAL_ORACLE=str(place)), stdout=subprocess.PIPE, text=True)
    figures = re.findall(r"^(?:test .*\.\.\. )?oracle (\S+) (\w+): (logit|loss|gradient) ([^\s,]+)", run.stdout, re.M)
    continued = re.findall(r"^(?:test .*\.\.\. )?oracle (\S+): (\d+) greedy tokens", run.stdout, re.M)
    if run.returncode != 0:
        print(run.stdout)
        return None
    worst = {}
    for name, path, what, error in figures:
        worst[what] = max(worst.get(what, (0.0,)), (float(error), f"{name}, {path}"))
    return worst, len({name for name, *_ in figures}), sum(int(count) for _, count in continued)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="repeats a run; a new one each time if left out")
    parser.add_argument("--random", type=int, default=8, help="models of random sizes beside the matrix")
    parser.add_argument("--keep", type=pathlib.Path, help="leaves the fixtures in this new folder")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_softmax_scale()
    print(f"seed {arguments.seed}, transformers {transformers.__version__}: m squared is in the softmax scale", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = (arguments.keep or pathlib.Path(temporary)).resolve()
        names = []
        for name, keys, form, lengths, prompt, seed in cases(arguments.seed, arguments.random):
            make(place / name, keys, form, lengths, prompt, seed)
            names.append(name)
        print(f"{len(names)} models made", flush=True)
        outcome = compare(place)
    if outcome is None:
        sys.exit(f"the program and transformers differ, see above; --seed {arguments.seed} repeats it")
    worst, compared, tokens = outcome
    assert compared == len(names), f"{compared} of {len(names)} models were compared"
    for what, (error, where) in sorted(worst.items()):
        print(f"largest error of a {what}: {error:.1e} ({where})")
    print(f"{tokens} greedy tokens are the same; {compared} models agree")


if __name__ == "__main__":
    main()
