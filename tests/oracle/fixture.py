"""Makes one fixture: a tiny random model, and what transformers computes for it.

A fixture is a folder with the model (config.json, model.safetensors) and expected.safetensors:
  tokens         documents, one after the other
  lengths        tokens of each document
  target         1 where a token counts in the loss, else 0
  logits         [tokens, vocabulary]
  loss           mean next-token loss over the targets
  gradient.NAME  gradient of that loss, for every parameter under its published name
  prompt         how many tokens of each document are a prompt
  greedy         [documents, new tokens], the greedy continuation of each prompt
The Rust suite (tests/suite/oracle.rs) opens the model as a person's checkpoint and compares. Knows no case; make_fixtures.py
and check.py choose them.

A model is written in one of these forms:
  published  config.json with rope_scaling and rope_theta, one tensor per expert, as the authors released it
  saved      what save_pretrained of this version writes: rope_parameters, one tensor per expert
  fused      the same with all experts of a layer in one tensor (save_original_format=False)

Where transformers departs from the published model:
  * it ignores norm_topk_prob; `PublishedRouter` takes the router's place then
  * its group-limited routing masks with 0.0; scores that underflow are not made here, and every choice of experts is
    compared with `choose` below, which masks with -inf
Near ties, where rounding may decide, are drawn again: two experts within 3e-6, or two tokens within 2e-4 in a logit.
"""
import json
import math

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, LlamaConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

FORMS = ("published", "saved", "fused")
NEW_TOKENS = 12
EXPERT_MARGIN, TOKEN_MARGIN = 3e-6, 2e-4


def choose(scores, config):
    """The published choice of experts: indices, weights, and the distance to the next other choice."""
    masked, margin = scores, torch.full(scores.shape[:1], math.inf)
    if config.topk_method == "group_limited_greedy":
        best = scores.unflatten(-1, (config.n_group, -1)).amax(-1)
        order = best.sort(-1, descending=True)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, order.indices[:, : config.topk_group], True)
        if config.topk_group < config.n_group:
            margin = order.values[:, config.topk_group - 1] - order.values[:, config.topk_group]
        masked = scores.masked_fill(~kept.repeat_interleave(scores.shape[-1] // config.n_group, -1), -math.inf)
    order = masked.sort(-1, descending=True)
    k = config.num_experts_per_tok
    if k < scores.shape[-1]:
        margin = torch.minimum(margin, order.values[:, k - 1] - order.values[:, k])
    indices = order.indices[:, :k]
    weights = scores.gather(-1, indices)
    if config.norm_topk_prob and k > 1:
        return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20), margin
    return indices, weights * config.routed_scaling_factor, margin


class PublishedRouter(DeepseekV2TopkRouter):
    """The router with norm_topk_prob: weights divided by their sum, and no scaling factor then."""

    def forward(self, hidden):
        logits = torch.nn.functional.linear(hidden.flatten(0, -2).float(), self.weight.float())
        indices, weights, _ = choose(logits.softmax(-1), self.model_config)
        return logits, weights, indices


class RouterWatch:
    """Compares every choice of experts with `choose` and keeps the smallest margin."""

    def __init__(self, model):
        self.margin = math.inf
        for module in model.modules():
            if isinstance(module, DeepseekV2TopkRouter):
                if model.config.norm_topk_prob:
                    module.__class__, module.model_config = PublishedRouter, model.config
                module.register_forward_hook(lambda _module, _input, output: self.look(output, model.config))

    def look(self, output, config):
        logits, weights, indices = (tensor.detach() for tensor in output)
        wanted, wanted_weights, margin = choose(logits.softmax(-1), config)
        self.margin = min(self.margin, margin.min().item())
        if self.margin > EXPERT_MARGIN:
            ours, theirs = wanted.sort(-1), indices.sort(-1)
            assert torch.equal(ours.values, theirs.values), "transformers chose other experts"
            gap = wanted_weights.gather(-1, ours.indices) - weights.gather(-1, theirs.indices)
            assert gap.abs().max() < 1e-5, "transformers weighs experts differently"


def check_softmax_scale():
    """Old versions of transformers leave YaRN's m squared out of the softmax scale (huggingface/transformers 47435)."""
    rope = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707)
    config = DeepseekV2Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, kv_lora_rank=4, q_lora_rank=None, n_routed_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, rope_parameters=rope,
    )
    scaling = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn.scaling
    m = 0.1 * 0.707 * math.log(4.0) + 1
    assert abs(scaling - 16**-0.5 * m * m) < 1e-6, f"transformers {transformers.__version__}: scaling {scaling} lacks m squared"


def build(keys):
    """A random model: every product keeps its input's size, and no norm weight is 1."""
    kind = LlamaConfig if keys["model_type"] == "llama" else DeepseekV2Config
    model = AutoModelForCausalLM.from_config(kind(**keys), attn_implementation="eager", experts_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                is_table = "embed_tokens" in name and not model.config.tie_word_embeddings
                gain = 1.0 if "embed_tokens" in name or "lm_head" in name else 1.4
                width = 1 if is_table else parameter.shape[-1]
                parameter.normal_(0, gain / math.sqrt(width))
    return model


def published(name, tensor):
    """Published names: transformers keeps all experts of a layer in one tensor."""
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


def published_config(model, keys):
    """config.json with the keys of the release instead of those of this version."""
    rope = dict(keys["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else dict(rope, type=kind)
    written = dict(keys, architectures=model.config.architectures or [type(model).__name__], rope_theta=theta, rope_scaling=scaling, torch_dtype="float32")
    del written["rope_parameters"]
    if keys["model_type"] == "deepseek_v2":
        written.update(scoring_func="softmax", aux_loss_alpha=0.001, seq_aux=True, moe_layer_freq=1, ep_size=1)
    return written


def write_model(model, keys, form, folder):
    if form == "published":
        (folder / "config.json").write_text(json.dumps(published_config(model, keys), indent=1) + "\n")
        tensors = {k: v for n, p in model.named_parameters() for k, v in published(n, p.detach())}
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    else:
        model.save_pretrained(folder, save_original_format=form == "saved")
        (folder / "generation_config.json").unlink(missing_ok=True)


def draw(model, watch, lengths, prompt):
    """Documents whose choices of experts and of greedy tokens are no near ties, with all that is expected of them."""
    for _ in range(200):
        documents = [torch.randint(0, model.config.vocab_size, (1, length)) for length in lengths]
        prompts = torch.cat([document[:, :prompt] for document in documents])
        watch.margin = math.inf
        whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.no_grad():
            best = model(whole).logits[:, prompt - 1 : -1].topk(2, -1)
        is_greedy = torch.equal(best.indices[..., 0], whole[:, prompt:])
        token_margin = (best.values[..., 0] - best.values[..., 1]).min().item()
        logits = [model(document).logits[0] for document in documents]
        if is_greedy and token_margin > TOKEN_MARGIN and watch.margin > EXPERT_MARGIN:
            return documents, logits, whole[:, prompt:]
    raise SystemExit("no documents without near ties in 200 draws; the model is degenerate")


def make(folder, keys, form, lengths, prompt, seed):
    """Writes the fixture of one case into `folder`."""
    torch.manual_seed(seed)
    model = build(keys)
    documents, logits, greedy = draw(model, RouterWatch(model), lengths, prompt)
    target = [torch.rand(length) < 0.8 for length in lengths]
    for mask in target:
        mask[0], mask[-1] = False, True
    losses = [torch.nn.functional.cross_entropy(l[:-1][m[1:]], d[0, 1:][m[1:]], reduction="sum") for l, d, m in zip(logits, documents, target)]
    loss = sum(losses) / sum(mask.sum() for mask in target)
    loss.backward()
    folder.mkdir(parents=True, exist_ok=True)
    write_model(model, keys, form, folder)
    expected = {f"gradient.{k}": v for n, p in model.named_parameters() for k, v in published(n, p.grad)}
    expected.update(
        tokens=torch.cat(documents, -1)[0], lengths=torch.tensor(lengths), target=torch.cat(target), logits=torch.cat(logits).detach(),
        loss=loss.detach().reshape(1), prompt=torch.tensor([prompt]), greedy=greedy,
    )
    save_file({k: v.contiguous().clone().float() for k, v in expected.items()}, folder / "expected.safetensors")
