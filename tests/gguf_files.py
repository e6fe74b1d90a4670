"""GGUF files of models of transformers, as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# transformers' parts of names -> llama.cpp's, in the order in which they are replaced.
NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "score.": "cls.output.",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def arch_name(config):
    return {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)


def stored_name(name, arch):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    after = "post_attention_norm" if arch in ("gemma2", "gemma3", "olmo2") else "ffn_norm"
    return name.replace("post_attention_layernorm", after)


def permuted(array, heads):
    """Rows as for rotating adjacent features."""
    return array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def changed(name, array, config, arch):
    """What the converter does to the values."""
    if arch in ("llama", "smollm3", "granite") and (".attn_q." in name or ".attn_k." in name):
        return permuted(array, config.num_attention_heads if "attn_q" in name else config.num_key_value_heads)
    return array + 1 if arch.startswith("gemma") and "norm" in name else array


def add_metadata(writer, config, arch):
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * (rope.get("partial_rotary_factor") or 1)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if arch in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, head, rope))
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))


def llama3_factors(config, head, rope):
    """The divisors of the frequencies, computed by transformers."""
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, head, 2) / head)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy()


def add_tokenizer(writer, tokenizer, config):
    """A byte-level tokenizer; without one, only the number of tokens."""
    writer.add_tokenizer_model("gpt2")
    if tokenizer is None:
        writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
        writer.add_pad_token_id(config.pad_token_id)
        return
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    added = tokenizer.get_added_vocab()
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in added else 5 if token.startswith("[PAD") else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def write(path, model, kind="F32", tokenizer=None, labels=None, skip=(), split_max_tensors=0, rerank=None):
    """Write a model; matrices are quantized where their rows fill blocks, as llama-quantize does."""
    config, arch = model.config, arch_name(model.config)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    add_metadata(writer, config, arch)
    add_tokenizer(writer, tokenizer, config)
    if labels is not None:
        writer.add_classifier_output_labels(labels)
    if rerank is not None:
        writer.add_chat_template([{"name": "rerank", "template": rerank}])
    kind = Kind[kind] if isinstance(kind, str) else kind
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = stored_name(name, arch)
        if stored in skip:
            continue
        array = changed(stored, tensor.float().numpy(), config, arch)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        own = kind if array.ndim == 2 and array.shape[1] % block == 0 and kind != Kind.F32 else Kind.F32
        writer.add_tensor(stored, gguf.quantize(np.ascontiguousarray(array), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
