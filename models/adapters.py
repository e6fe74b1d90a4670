"""Refuse unmerged peft adapters, without which the model would compute something else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import ConfigError

__all__ = ["ADAPTER_FILES", "check_adapter_files", "check_adapter_names"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_WRAPPER = "base_model.model."
# Parts of tensor names, and below their prefixes, that peft's methods add to a model.
_PARTS = {"base_layer", "modules_to_save", "original_module", "prompt_encoder", "prompt_embeddings"}
_METHODS = (
    *("lora", "adamss", "adaption_prompt", "beft", "boft", "c3a", "cartridge", "cpt", "deft", "delora", "fourierft"),
    *("frod", "glora", "gralora", "hada", "hira", "hra", "ia3", "lily", "ln_tuning", "lokr", "miss", "bone", "oft"),
    *("osf", "peanut", "poly", "prefix_tuning", "prompt_tuning", "multitask_prompt_tuning", "p_tuning", "psoft"),
    *("pvera_lambda", "randlora", "road", "shadow", "shira", "supertuning", "tinylora", "trainable_tokens", "unilora"),
    *("vblora", "vera_lambda", "waveft", "xlora"),
)
_PREFIXES = tuple(f"{method}_" for method in _METHODS)
# Methods whose weights are not inside the model's modules.
_PROMPTS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
}
# `task_type` of adapter_config.json -> the peft class that loads the model with its head.
_TASKS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}


def check_adapter_files(folder: Path) -> None:
    """Refuse a folder that contains an adapter, with or without its base model.

    Raises:
        ConfigError: with the file, and how to merge it.
    """
    names = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not names:
        return
    settings = _settings(folder)
    kind = settings.get("peft_type") or "peft"
    base = settings.get("base_model_name_or_path")
    if kind in _PROMPTS:
        raise ConfigError(
            f"{folder / names[0]}: an adapter ({kind}{f' of {base}' if base else ''}) that prepends trained vectors to "
            "the text; these cannot be merged into weights, so it is not supported. To export the model without it, "
            f"move {' and '.join(names)} out of the folder"
        )
    raise ConfigError(
        f"{folder / names[0]}: an adapter ({kind}{f' of {base}' if base else ''}) that is not merged into its model; "
        f"expected the merged weights. Merge it once: {_merge(folder, settings)}; then pass MERGED. If the weights in "
        f"the folder are already merged, move {' and '.join(names)} out of the folder"
    )


def check_adapter_names(names: Iterable[str]) -> None:
    """Refuse weights that were saved with an unmerged adapter or from inside peft's wrapper.

    Raises:
        ConfigError: with the first such tensor, and how to save the merged model.
    """
    for name in sorted(names):
        if name.startswith(_WRAPPER) or any(p in _PARTS or p.startswith(_PREFIXES) for p in name.split(".")):
            raise ConfigError(
                f"tensor '{name}' belongs to a model with an unmerged peft adapter; expected the merged weights: in "
                "the program that trained it, save `model.merge_and_unload()` with `save_pretrained(MERGED)`, and pass "
                "MERGED"
            )


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _merge(folder: Path, settings: dict[str, Any]) -> str:
    """Return the command that merges the adapter, including a trained head."""
    task = _TASKS.get(str(settings.get("task_type")), "CausalLM")
    # A reward model has one label, but peft would create a head with two.
    labels = ", num_labels=1" if task == "SequenceClassification" else ""
    return (
        f'python -c "from peft import AutoPeftModelFor{task} as A; '
        f"A.from_pretrained({str(folder)!r}{labels}).merge_and_unload().save_pretrained('MERGED')\" "
        f"and copy the tokenizer's files to it"
    )
