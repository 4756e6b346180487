#!/usr/bin/env python3
"""Makes tests/data/oracle/ anew: the small fixtures with which `cargo test` needs no Python.

Usage: pip install -r tests/oracle/requirements.txt; python tests/oracle/make_fixtures.py
"""
import pathlib
import shutil

import torch
import transformers
from check import LENGTHS, PROMPT, dense
from fixture import check_softmax_scale, make

OUT = pathlib.Path(__file__).resolve().parents[1] / "data" / "oracle"
DEEPSEEK = dict(
    model_type="deepseek_v2", vocab_size=32, hidden_size=16, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=12,
    moe_intermediate_size=4, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, num_attention_heads=2, num_key_value_heads=2,
    q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, max_position_embeddings=64,
    rms_norm_eps=1e-6, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.7, norm_topk_prob=False,
    tie_word_embeddings=False, hidden_act="silu", attention_bias=False, bos_token_id=None, eos_token_id=1, pad_token_id=None,
)
PLAIN = dict(rope_type="default", rope_theta=100.0)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4, beta_slow=1, mscale=0.707, mscale_all_dim=0.707)
GROUPS = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)
CASES = {
    "greedy-q-lora": ("published", dict(DEEPSEEK, q_lora_rank=10, num_hidden_layers=3, rope_parameters=PLAIN)),
    "group-limited-yarn": ("published", dict(DEEPSEEK, **GROUPS, rope_parameters=YARN)),
    "greedy-yarn-tied": ("saved", dict(DEEPSEEK, tie_word_embeddings=True, first_k_dense_replace=0, rope_parameters=dict(YARN, mscale=1.0))),
}
DENSE = ("dense-2-of-4-untied", "dense-1-of-4-tied")


if __name__ == "__main__":
    check_softmax_scale()
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, (form, keys)) in enumerate(CASES.items()):
        make(OUT / name, keys, form, [29, 11, 23], 10, seed)
    for seed, (name, keys, form) in enumerate(dense()):
        if name in DENSE:
            make(OUT / name, keys, form, LENGTHS, PROMPT, seed)
    print(f"{len(CASES) + len(DENSE)} fixtures of transformers {transformers.__version__}, torch {torch.__version__} in {OUT}")
