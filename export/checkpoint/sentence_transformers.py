"""Read the description that Sentence Transformers writes beside a reranker's weights (version 5.4 and later).

`modules.json` lists the modules: a `Transformer` and, behind a language model, a `LogitScore`, whose `config.json`
has the tokens that answer. `sentence_bert_config.json` says how a pair becomes messages, and
`config_sentence_transformers.json` or `config.json` which activation is applied to scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from bonnx.models.config import ConfigError
from bonnx.models.files import read_json
from bonnx.models.head import LabelTokens

__all__ = ["Description", "content_of", "read_description"]

MODULES, TRANSFORMER, MODEL = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_PACKAGE = "sentence_transformers."
_KNOWN = (["Transformer"], ["Transformer", "LogitScore"])
_TASKS = {1: "sequence-classification", 2: "text-generation"}
# Settings of the `Transformer` module that change neither the text nor the score, or that are read below.
_HARMLESS = {
    *("transformer_task", "modality_config", "module_output_name", "processing_kwargs", "max_seq_length"),
    *("unpad_inputs", "model_args", "model_kwargs", "config_args", "config_kwargs", "query_length", "document_length"),
}
_PADDING = {
    *("padding", "padding_side", "truncation", "max_length", "return_tensors", "restore_suffix", "logits_to_keep"),
}


@dataclass(frozen=True)
class Description:
    """What the files say of a reranker.

    Attributes:
        labels: the tokens whose logits are the score; None if the checkpoint has a scorer.
        activation: applied to the score.
        content: whether the content of the template's messages is a text or a list of parts; None if nothing is said.
        options: further variables of the template.
        instruction: what every pair gets as instruction; None for none.
        max_tokens: longer texts would be cut; None for the model's own maximum.
    """

    labels: LabelTokens | None
    activation: Literal["none", "sigmoid"]
    content: Literal["flat", "structured"] | None
    options: dict[str, object]
    instruction: str | None
    max_tokens: int | None


def read_description(folder: Path, config: Mapping[str, Any]) -> Description | None:
    """Read a checkpoint's description.

    Args:
        folder: the checkpoint.
        config: the parsed config.json.

    Returns:
        the description; None if there is none, or if the checkpoint's scorer has several labels or reads pairs as its
        tokenizer joins them: that is not a ranking by a template.

    Raises:
        ConfigError: if a module or a setting is not supported, or a file is missing or unreadable; it is named.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = _modules(folder)
    transformer, model = _settings(folder / TRANSFORMER), _settings(folder / MODEL)
    message = _message(folder, transformer, _TASKS[len(modules)])
    if len(modules) == 1 and (message is None or len(config.get("id2label") or "12") != 1):
        return None
    if message is None:
        raise ConfigError(
            f"{folder / TRANSFORMER}, 'modality_config': expected 'message', by which a query and a document go "
            "through the chat template; Sentence Transformers would join their tokens without one"
        )
    return Description(
        labels=_labels(folder / modules[1] / "config.json") if len(modules) == 2 else None,
        activation=_activation(folder, model, config),
        content=message.get("format") if message.get("format") != "auto" else None,
        options=_options(folder, transformer),
        instruction=_instruction(folder, model),
        max_tokens=_max_tokens(folder, transformer),
    )


def content_of(template: str) -> Literal["flat", "structured"]:
    """Return what Sentence Transformers passes as content where nothing is said: parts if the template reads these."""
    signs = ("content[0]", ".type", "'type'", '"type"', "message.content[")
    return "structured" if any(sign in template for sign in signs) else "flat"


def _modules(folder: Path) -> list[str]:
    """Return the folders of the modules, if they are those of a reranker."""
    path = folder / MODULES
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(listed, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in listed):
        raise ConfigError(f"{path}: expected a list of modules with a 'type' each; found {listed!r:.80}")
    kinds = [str(module["type"]).rpartition(".")[2] for module in listed]
    foreign = [module["type"] for module in listed if not module["type"].startswith(_PACKAGE)]
    if foreign or kinds not in _KNOWN:
        raise ConfigError(
            f"{path}: expected a reranker, of the modules Transformer and LogitScore, or Transformer alone; found "
            f"{', '.join(foreign or kinds)}"
        )
    paths = [str(module.get("path") or "") for module in listed]
    if paths[0] or any(Path(name).name != name for name in paths[1:]):
        raise ConfigError(f"{path}: expected the Transformer's path to be '' and others to be folders; found {paths}")
    return paths


def _settings(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from e


def _message(folder: Path, settings: Mapping[str, Any], task: str) -> dict[str, Any] | None:
    """Return how messages are read; None if pairs do not become messages."""
    path = folder / TRANSFORMER
    unknown = sorted(name for name, value in settings.items() if name not in _HARMLESS and value)
    if unknown:
        raise ConfigError(f"{path}, '{unknown[0]}': {settings[unknown[0]]!r:.60} is not supported")
    stated = settings.get("transformer_task", "feature-extraction")
    if stated != task:
        raise ConfigError(f"{path}, 'transformer_task': expected '{task}' for these modules; found {stated!r}")
    modalities = settings.get("modality_config", {})
    message = modalities.get("message") if isinstance(modalities, dict) else None
    if message is None:
        return None
    read = {"method": "forward", "method_output_name": "logits"}
    if not isinstance(message, dict) or any(message.get(name, value) != value for name, value in read.items()):
        raise ConfigError(f"{path}, 'message': expected logits of 'forward'; found {message!r:.80}")
    if message.get("format", "auto") not in ("auto", "flat", "structured"):
        raise ConfigError(f"{path}, 'format': expected 'flat' or 'structured'; found {message['format']!r:.40}")
    return {"format": "auto", **message}


def _labels(path: Path) -> LabelTokens:
    settings = _settings(path)
    if not settings:
        raise ConfigError(f"{path}: expected 'true_token_id' and 'false_token_id'; the file is missing or empty")
    unknown = settings.keys() - {"true_token_id", "false_token_id", "module_input_name"}
    if unknown or settings.get("module_input_name", "causal_logits") != "causal_logits":
        raise ConfigError(f"{path}: expected 'true_token_id' and 'false_token_id' of 'causal_logits'; found {settings}")
    ids = [settings.get("true_token_id"), settings.get("false_token_id")]
    whole = [isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids]
    if not whole[0] or not (whole[1] or ids[1] is None) or ids[0] == ids[1]:
        raise ConfigError(
            f"{path}: expected the id of one token in 'true_token_id', and of another or null in 'false_token_id'; "
            f"found {ids[0]!r} and {ids[1]!r}"
        )
    return LabelTokens(tuple(token for token in ids if token is not None), contrast=True)


def _activation(folder: Path, model: Mapping[str, Any], config: Mapping[str, Any]) -> Literal["none", "sigmoid"]:
    """Return the activation; Sentence Transformers applies a sigmoid to one label if nothing else is stated."""
    nested = config.get("sentence_transformers")
    places = {
        MODEL: model.get("activation_fn"),
        "config.json": nested.get("activation_fn") if isinstance(nested, Mapping) else None,
        "config.json, of version 3": config.get("sbert_ce_default_activation_function"),
    }
    place, stated = next(((place, name) for place, name in places.items() if name is not None), ("", "Sigmoid"))
    known: dict[str, Literal["none", "sigmoid"]] = {"Sigmoid": "sigmoid", "Identity": "none"}
    activation = known.get(str(stated).rpartition(".")[2])
    if activation is None or not str(stated).startswith(("torch.", "Sigmoid")):
        raise ConfigError(
            f"{folder} ({place}), 'activation_fn': expected Sigmoid or Identity of torch; found {stated!r}"
        )
    return activation


def _options(folder: Path, settings: Mapping[str, Any]) -> dict[str, object]:
    """Return the template's variables."""
    kinds = settings.get("processing_kwargs") or {}
    options = kinds.get("chat_template", {}) if isinstance(kinds, dict) else None
    others = [name for key in ("text", "common") for name in (kinds.get(key) or {})] if options is not None else []
    if not isinstance(options, dict) or "chat_template" in options or not _PADDING.issuperset(others):
        raise ConfigError(
            f"{folder / TRANSFORMER}, 'processing_kwargs': expected variables of the chat template, and how texts are "
            f"padded and cut; found {kinds!r:.120}"
        )
    return {name: value for name, value in options.items() if name not in _PADDING}


def _instruction(folder: Path, model: Mapping[str, Any]) -> str | None:
    """Return the prompt that is used by default, which goes into the template as a system message."""
    name, prompts = model.get("default_prompt_name"), model.get("prompts") or {}
    if name is None:
        return None
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise ConfigError(f"{folder / MODEL}, 'default_prompt_name': {name!r} is not one of 'prompts'")
    return cast(str, prompts[name]) or None


def _max_tokens(folder: Path, settings: Mapping[str, Any]) -> int | None:
    """Return the length beyond which Sentence Transformers cuts a text."""
    longest = settings.get("max_seq_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise ConfigError(
            f"{folder / TRANSFORMER}, 'max_seq_length': expected a whole number above 0; found {longest!r:.40}"
        )
    return longest
