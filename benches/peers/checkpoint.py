"""A random checkpoint for a config.json: Hugging Face names, f32, and a tokenizer of the config's size."""
import json
import pathlib

import numpy


def shapes_of(keys):
    """Tensor names (without .weight) and shapes of a DeepSeek-V2 model with compressed queries."""
    k = type("Keys", (), keys)
    d, heads, latent = k.hidden_size, k.num_attention_heads, k.kv_lora_rank
    shapes = {"model.embed_tokens": [k.vocab_size, d], "model.norm": [d], "lm_head": [k.vocab_size, d]}
    for n in range(k.num_hidden_layers):
        layer = f"model.layers.{n}"
        own = f"{layer}.self_attn"
        queries = heads * (k.qk_nope_head_dim + k.qk_rope_head_dim)
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = [d]
        shapes |= {f"{own}.q_a_proj": [k.q_lora_rank, d], f"{own}.q_a_layernorm": [k.q_lora_rank], f"{own}.q_b_proj": [queries, k.q_lora_rank]}
        shapes |= {f"{own}.kv_a_proj_with_mqa": [latent + k.qk_rope_head_dim, d], f"{own}.kv_a_layernorm": [latent]}
        shapes |= {f"{own}.kv_b_proj": [heads * (k.qk_nope_head_dim + k.v_head_dim), latent], f"{own}.o_proj": [d, heads * k.v_head_dim]}
        places = {f"{layer}.mlp": k.intermediate_size}
        if n >= k.first_k_dense_replace:
            places = {f"{layer}.mlp.experts.{e}": k.moe_intermediate_size for e in range(k.n_routed_experts)}
            places[f"{layer}.mlp.shared_experts"] = k.n_shared_experts * k.moe_intermediate_size
            shapes[f"{layer}.mlp.gate"] = [k.n_routed_experts, d]
        for place, width in places.items():
            shapes |= {f"{place}.gate_proj": [width, d], f"{place}.up_proj": [width, d], f"{place}.down_proj": [d, width]}
    return shapes


def write_tokenizer(folder, vocab_size):
    """Byte-level BPE: 256 bytes, then merges of bytes that no ASCII text has, so that a letter is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}
    high = [letters[byte] for byte in range(128, 256)]
    special = ["<pad>", "<eos>"]
    pairs = [(a, b) for a in high for b in high][: vocab_size - 256 - len(special)]
    vocab = special + [letters[b] for b in range(256)] + [a + b for a, b in pairs]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    added = [dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True) for i, text in enumerate(special)]
    model = dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
        ignore_merges=False, vocab={text: i for i, text in enumerate(vocab)}, merges=[list(pair) for pair in pairs],
    )
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None, pre_tokenizer=level, post_processor=None, decoder=level,
        model=model,
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<eos>", pad_token="<pad>", add_bos_token=False, model_max_length=1 << 20)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def write(config, folder, seed=1):
    """Writes config, weights and tokenizer to `folder`; does nothing if they are there."""
    folder = pathlib.Path(folder)
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    keys = json.loads(pathlib.Path(config).read_text())
    (folder / "config.json").write_text(json.dumps(keys))
    write_tokenizer(folder, keys["vocab_size"])
    draw, header, data, at = numpy.random.default_rng(seed), {}, [], 0
    for name, shape in shapes_of(keys).items():
        numbers = numpy.ones(shape, "<f4") if len(shape) == 1 else (draw.standard_normal(shape, "f4") * keys["initializer_range"]).astype("<f4")
        header[f"{name}.weight"] = dict(dtype="F32", shape=shape, data_offsets=[at, at + numbers.nbytes])
        at += numbers.nbytes
        data.append(numbers.tobytes())
    text = json.dumps(header).encode()
    part = folder / "model.safetensors.part"
    part.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    part.rename(folder / "model.safetensors")
    return folder
