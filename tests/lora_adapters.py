"""Base models and LoRA adapters, as transformers and peft write them, and what the two compute."""

import peft
import torch
import transformers

from bonnx.models import load_checkpoint

VOCABULARY = 90
LINEAR = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]


def ids(rng, rows=2):
    return torch.from_numpy(rng.integers(5, VOCABULARY, (rows, 11)))


def save_base(folder, family, task, rng, dtype=torch.float32, **options):
    """A base model with weights large enough to matter, in one file or in shards."""
    if family in ("Llama", "Qwen3"):
        options |= {"attention_bias": bool(rng.integers(2))}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1}
    sizes |= {"pad_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    model = getattr(transformers, f"{family}For{task}")(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if rng.integers(2) else "1GB")
    return model


def train(base, folder, config, task="SequenceClassification", resize=None, **options):
    """Save an adapter of random weights; return the model as peft computes it."""
    auto = getattr(transformers, f"AutoModelFor{task}")
    model = auto.from_pretrained(base, dtype=torch.float32, **options)
    if resize is not None:
        model.resize_token_embeddings(resize)
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted


def draw_config(rng, task):
    """A LoRA config of random options."""
    chosen = [name for name in LINEAR if rng.integers(2)] + ["down_proj"]
    options = {"r": int(rng.integers(1, 6)), "lora_alpha": int(rng.integers(1, 20))}
    if rng.integers(2):
        options |= {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 2}}
    if rng.integers(2):
        options |= {"alpha_pattern": {r".*\.0\..*": 5, "up_proj": 9}}
    if rng.integers(2):
        options |= {"layers_to_transform": [int(rng.integers(2))]}
    options |= {name: bool(rng.integers(2)) for name in ("use_rslora", "fan_in_fan_out")}
    return peft.LoraConfig(
        task_type=task, target_modules=chosen, bias=["none", "all", "lora_only"][rng.integers(3)], **options
    )


def scores(checkpoint, tokens):
    with torch.no_grad():
        return load_checkpoint(checkpoint)[0](tokens)[1][:, -1]


def logits(checkpoint, tokens):
    with torch.no_grad():
        return load_checkpoint(checkpoint, no_scorer=True)[0](tokens)[2]


def compute(model, tokens):
    with torch.no_grad():
        return model(tokens).logits
