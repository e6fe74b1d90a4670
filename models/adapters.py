"""Adapters of peft: which can be merged, how they are configured, and why the others are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ConfigError
from .files import read_json, unpickling

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILES",
    "ADAPTER_WEIGHTS",
    "LoraSettings",
    "check_adapter_names",
    "is_adapter_part",
    "read_settings",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, _PICKLED)
# Parts of tensor names, and below their prefixes, that peft's methods add to a model.
_PARTS = {"base_layer", "modules_to_save", "original_module", "prompt_encoder", "prompt_embeddings", "token_adapter"}
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
# `task_type` of adapter_config.json -> the end of the class names of peft and of transformers.
_TASKS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
# Fields that are read, and fields that matter only to training or are visible in the tensors.
_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "r", "lora_alpha"),
    *("use_rslora", "rank_pattern", "alpha_pattern", "trainable_token_indices", "init_lora_weights"),
}
_HARMLESS = {
    *("peft_version", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "bias", "lora_bias", "modules_to_save", "ensure_weight_tying", "megatron_config"),
    *("megatron_core", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    # peft turns it off for linear layers, which all layers of the supported families are.
    "fan_in_fan_out",
}
_VARIANTS = {"use_dora": "DoRA", "use_qalora": "QALoRA", "alora_invocation_tokens": "activated LoRA"}
# Initializations that change the base model's own weights, as peft does again whenever it loads the adapter.
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter_config.json of a LoRA adapter (Hu et al., 2022).

    Attributes:
        path: path of adapter_config.json.
        base: `base_model_name_or_path`, a folder or a hub id; None if it has none.
        revision: the base model's revision that it was trained on; None if it names none.
        head: end of the class that loads the model, such as `ForSequenceClassification`; None for the base's own.
        rank: default rank.
        alpha: default numerator of the scale.
        rslora: whether the scale is alpha / sqrt(rank) (Kalajdzievski, 2023) instead of alpha / rank.
        rank_pattern: ranks by regular expressions of module names.
        alpha_pattern: numerators by regular expressions of module names.
        tokens: ids of the tokens whose embeddings were trained, by the end of the module's name.
        targets: ends of the names of all modules that have an adapter, or a regular expression of whole names; empty if
            further fields choose among these modules.
    """

    path: Path
    base: str | None
    revision: str | None
    head: str | None
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    tokens: Mapping[str, list[int]]
    targets: list[str] | str

    def adapts(self, module: str) -> bool:
        """Whether a module must have an adapter."""
        if isinstance(self.targets, list):
            return any(f".{module}".endswith(f".{target}") for target in self.targets)
        try:
            return re.fullmatch(self.targets, module) is not None
        except re.error as e:
            raise ConfigError(f"{self.path}, 'target_modules': expected a regular expression: {e}") from e

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return int(self._match(self.rank_pattern, module, self.rank))

    def scale(self, module: str) -> float:
        """Return the factor of a module's adapter."""
        rank, alpha = self.rank_of(module), float(self._match(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _match(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """Return the value of the first pattern that the whole name, or its end after a dot, matches."""
        try:
            return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)
        except re.error as e:
            raise ConfigError(f"{self.path}: a pattern is not a regular expression: {e}") from e


def read_settings(folder: Path) -> LoraSettings:
    """Read the adapter_config.json of a folder.

    Raises:
        ConfigError: if the files are incomplete or pickled, or the adapter cannot be merged.
    """
    path = folder / ADAPTER_CONFIG
    settings = read_json(path) if path.is_file() else {}
    if settings:
        _check_method(folder, settings)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if (folder / _PICKLED).is_file():
            raise ConfigError(
                f"{folder / _PICKLED} is a pickle, which can run any code when it is opened, so it is never read; "
                f"expected {ADAPTER_WEIGHTS}. {unpickling([_PICKLED], ADAPTER_WEIGHTS)}"
            )
        raise ConfigError(
            f"{path}: the adapter's weights, {ADAPTER_WEIGHTS}, are missing; copy them to {folder}, or move "
            f"{ADAPTER_CONFIG} out of the folder to export the model without the adapter"
        )
    if not settings:
        raise ConfigError(
            f"{folder / ADAPTER_WEIGHTS}: an adapter without {ADAPTER_CONFIG}, which has its scale; copy it to "
            f"{folder}, or move {ADAPTER_WEIGHTS} out of the folder to export the model without the adapter"
        )
    return LoraSettings(
        path=path,
        base=_text(settings, "base_model_name_or_path", path),
        revision=_text(settings, "revision", path),
        head=_head(settings),
        rank=int(_number(settings.get("r", 8), "r", path)),
        alpha=_number(settings.get("lora_alpha", 8), "lora_alpha", path),
        rslora=bool(settings.get("use_rslora")),
        rank_pattern={key: int(value) for key, value in _pattern(settings, "rank_pattern", path).items()},
        alpha_pattern=_pattern(settings, "alpha_pattern", path),
        tokens=_tokens(settings.get("trainable_token_indices"), path),
        targets=_targets(settings, path),
    )


def check_adapter_names(names: Iterable[str]) -> None:
    """Refuse weights that were saved with an unmerged adapter.

    Raises:
        ConfigError: with the first such tensor, and how to save the merged model.
    """
    for name in sorted(names):
        if is_adapter_part(name):
            raise ConfigError(
                f"tensor '{name}' belongs to a model with an unmerged peft adapter; expected the merged weights: in "
                "the program that trained it, save `model.merge_and_unload()` with `save_pretrained(MERGED)`, and pass "
                "MERGED; or save the adapter alone with peft's `model.save_pretrained(ADAPTER)`, and pass ADAPTER"
            )


def is_adapter_part(name: str) -> bool:
    """Whether a tensor's name is one that a method of peft adds to a model."""
    return any(part in _PARTS or part.startswith(_PREFIXES) for part in name.split("."))


def _check_method(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse everything but plain LoRA."""
    kind, base = settings.get("peft_type") or "peft", settings.get("base_model_name_or_path")
    of = f" of {base}" if base else ""
    if kind in _PROMPTS:
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG}: an adapter ({kind}{of}) that prepends trained vectors to the text; these "
            "cannot be merged into weights, so it is not supported. To export the model without it, move "
            f"{_files(folder)} out of the folder"
        )
    reason = None
    if kind != "LORA":
        reason = f"an adapter ({kind}{of}) of a method that bonnx does not merge"
    elif str(settings.get("init_lora_weights")).startswith(_CHANGING):
        reason = f"'init_lora_weights' {settings['init_lora_weights']!r} changed the weights of the base model{of}"
    else:
        for name, value in settings.items():
            if value and name not in _READ | _HARMLESS:
                reason = f"'{name}' ({_VARIANTS.get(name, f'{value!r:.80}')}) is not supported"
                break
    if reason is not None:
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG}: {reason}; expected LoRA, or merged weights. Merge it once with peft: "
            f"{_merge(folder, settings)}; then pass MERGED. If the weights in the folder are merged already, move "
            f"{_files(folder)} out of the folder"
        )


def _files(folder: Path) -> str:
    """Return the names of the adapter's files."""
    return " and ".join(name for name in ADAPTER_FILES if (folder / name).is_file())


def _merge(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return the command that merges the adapter, including a trained head."""
    task = _TASKS.get(str(settings.get("task_type")), "CausalLM")
    # A reward model has one label, but peft would create a head with two.
    labels = ", num_labels=1" if task == "SequenceClassification" else ""
    return (
        f'python -c "from peft import AutoPeftModelFor{task} as A; '
        f"A.from_pretrained({str(folder)!r}{labels}).merge_and_unload().save_pretrained('MERGED')\" "
        f"and copy the tokenizer's files to it"
    )


def _head(settings: Mapping[str, Any]) -> str | None:
    """Return the end of the name of the class that the adapter was trained with."""
    task = settings.get("task_type")
    if task is not None:
        return f"For{_TASKS[task]}" if task in _TASKS else None
    mapping = settings.get("auto_mapping")
    name = str(mapping.get("base_model_class")) if isinstance(mapping, Mapping) else ""
    return next((f"For{task}" for task in _TASKS.values() if name.endswith(f"For{task}")), None)


def _text(settings: Mapping[str, Any], name: str, path: Path) -> str | None:
    value = settings.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{path}, '{name}': expected a text; got {value!r:.80}")
    return value or None


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
        raise ConfigError(f"{path}, '{name}': expected a number above 0; got {value!r:.80}")
    return value


def _pattern(settings: Mapping[str, Any], name: str, path: Path) -> dict[str, float]:
    patterns = settings.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{path}, '{name}': expected an object of names and numbers; got {patterns!r:.80}")
    return {key: _number(value, name, path) for key, value in patterns.items()}


def _targets(settings: Mapping[str, Any], path: Path) -> list[str] | str:
    """Return `target_modules`, unless other fields choose among the modules of these names."""
    if any(settings.get(name) is not None for name in ("layers_to_transform", "layers_pattern", "exclude_modules")):
        return []
    targets = settings.get("target_modules") or []
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ConfigError(f"{path}, 'target_modules': expected names or a regular expression; got {targets!r:.80}")
    return targets


def _tokens(indices: Any, path: Path) -> dict[str, list[int]]:
    """Return the trained tokens by module; a list is of the input embedding."""
    named = {"embed_tokens": indices} if isinstance(indices, list) else indices or {}
    lists = list(named.values()) if isinstance(named, Mapping) else [None]
    if not all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in lists):
        raise ConfigError(f"{path}, 'trainable_token_indices': expected lists of token ids; got {indices!r:.80}")
    return dict(named)
