#!/usr/bin/env python3
"""Makes tests/data/oracle/: tiny random DeepSeek-V2 models with what transformers computes for them.

Usage: python tests/oracle/make_fixtures.py            (needs: pip install torch transformers safetensors)

Each folder holds config.json and model.safetensors (published, unfused names), and expected.safetensors with
  tokens        one document
  logits        [tokens, vocabulary], float32
  loss          mean next-token loss
  gradient.NAME gradient of that loss for every parameter
  greedy        twelve tokens of greedy continuation of the first six tokens
The Rust suite compares with these; it needs no Python.
"""
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config

OUT = pathlib.Path(__file__).resolve().parents[1] / "data" / "oracle"
BASE = dict(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=20,
    moe_intermediate_size=12, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, num_attention_heads=2,
    num_key_value_heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=10,
    max_position_embeddings=128, rms_norm_eps=1e-6, routed_scaling_factor=1.7, norm_topk_prob=False,
    initializer_range=0.2, aux_loss_alpha=0.0, tie_word_embeddings=False, hidden_act="silu", attention_bias=False,
    bos_token_id=None, eos_token_id=1, pad_token_id=None,  # a padding token would have no gradient
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, beta_fast=32, beta_slow=1,
            mscale=0.707, mscale_all_dim=0.707)
CASES = {
    "greedy-q-lora": dict(q_lora_rank=16, topk_method="greedy", n_group=1, topk_group=1, rope_parameters=dict(rope_type="default", rope_theta=100.0)),
    "group-limited-yarn": dict(q_lora_rank=None, topk_method="group_limited_greedy", n_group=4, topk_group=2, rope_parameters=YARN),
}


def unfused(name, tensor):
    """Published names: transformers 5 keeps all experts of a layer in one tensor."""
    if name.endswith("experts.gate_up_proj"):
        for e, both in enumerate(tensor):
            gate, up = both.chunk(2, dim=0)
            yield f"{name[:-13]}.{e}.gate_proj.weight", gate
            yield f"{name[:-13]}.{e}.up_proj.weight", up
    elif name.endswith("experts.down_proj"):
        for e, down in enumerate(tensor):
            yield f"{name[:-10]}.{e}.down_proj.weight", down
    else:
        yield name, tensor


def published_config(config, case):
    keys = dict(BASE, **{k: v for k, v in case.items() if k != "rope_parameters"})
    rope = dict(case["rope_parameters"])
    keys["rope_theta"] = rope.pop("rope_theta")
    keys["rope_scaling"] = None if rope["rope_type"] == "default" else {("type" if k == "rope_type" else k): v for k, v in rope.items()}
    return dict(keys, architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", scoring_func="softmax", torch_dtype="float32")


def make(name, case, seed):
    torch.manual_seed(seed)
    config = DeepseekV2Config(**BASE, **case)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "experts" in key or "mlp.gate.weight" in key:
                parameter.normal_(0, 0.2)
    tokens = torch.randint(0, config.vocab_size, (1, 48))
    output = model(tokens, labels=tokens)
    output.loss.backward()
    greedy = model.generate(tokens[:, :6], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:]
    weights = {k: v for n, p in model.named_parameters() for k, v in unfused(n, p.detach())}
    gradients = {f"gradient.{k}": v for n, p in model.named_parameters() for k, v in unfused(n, p.grad)}
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(config, case), indent=1) + "\n")
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors")
    expected = dict(gradients, tokens=tokens[0].float(), logits=output.logits[0].detach(), loss=output.loss.detach().reshape(1), greedy=greedy.float())
    save_file({k: v.contiguous().clone().float() for k, v in expected.items()}, folder / "expected.safetensors")
    return float(output.loss)


def check_softmax_scale():
    """Old versions of transformers leave YaRN's m² out of the softmax scale (huggingface/transformers 47435)."""
    config = DeepseekV2Config(**BASE, **CASES["group-limited-yarn"])
    model = AutoModelForCausalLM.from_config(config)
    scaling = model.model.layers[0].self_attn.scaling
    m = 0.1 * 0.707 * torch.log(torch.tensor(4.0)).item() + 1
    assert abs(scaling - 16 ** -0.5 * m * m) < 1e-6, f"transformers {transformers.__version__}: scaling {scaling} lacks m squared"


if __name__ == "__main__":
    check_softmax_scale()
    for seed, (name, case) in enumerate(CASES.items()):
        print(name, "loss", make(name, case, seed), "transformers", transformers.__version__, "torch", torch.__version__)
