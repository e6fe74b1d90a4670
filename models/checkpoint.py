"""Checkpoints: folders with `config.json` and safetensors, in bonnx's format or that of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import ConfigError, LanguageModelConfig, NetworkConfig
from .fields import check_fields
from .files import read_json
from .gate_weights import gate_state
from .head import LabelTokens
from .head_file import HeadFile
from .huggingface import Translation, is_huggingface, translate
from .network import LanguageModel, TwoHeadedNetwork, initialize, without_scorer
from .opened import CONFIG_FILE, OpenedCheckpoint, open_checkpoint
from .rotary import Rotary
from .scorer_kinds import make_scorer
from .tokenizer_files import class_fields, copy_tokenizer, token_id
from .weights import WEIGHTS_FILE, TensorReader

__all__ = ["load_checkpoint", "save_checkpoint"]

_SCORER = "network.scorer.dense2.weight"
_FAR = 1e30


def save_checkpoint(
    model: LanguageModel | TwoHeadedNetwork,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, Any] | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write a model's config and weights into a folder.

    Args:
        model: the model to save.
        folder: the folder, created if needed; files of the same names are replaced.
        dtype: the dtype of the weights in the file.
        metadata: further keys of config.json, such as `scoring` (see `docs/checkpoint.md`).
        tokenizer_from: folder of the checkpoint from which the model was made; its tokenizer and chat templates are
            copied, so that text becomes the same tokens.

    Raises:
        ConfigError: if `tokenizer_from` has no tokenizer.json, or is `folder`.
    """
    folder, metadata = Path(folder), dict(metadata or {})
    if tokenizer_from is not None:
        opened = open_checkpoint(tokenizer_from)
        described = opened.tokenizer / CONFIG_FILE  # an adapter may have a tokenizer of its own, but no config.json
        metadata["tokenizer"] = class_fields(read_json(described) if described.is_file() else {})
        copy_tokenizer(opened.tokenizer, folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "language_model" if isinstance(model, LanguageModel) else "network"
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    text = json.dumps({kind: model.config.to_dict(), **metadata}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_checkpoint(
    checkpoint: str | os.PathLike[str] | OpenedCheckpoint,
    *,
    label_tokens: LabelTokens | None = None,
    new_scorer: bool = False,
    no_scorer: bool = False,
    head: HeadFile | None = None,
) -> tuple[LanguageModel | TwoHeadedNetwork, dict[str, Any]]:
    """Load a model in float32 and inference mode, with the further keys of its config.json.

    These keys are `scoring`, `text` and `limits`; for a checkpoint of transformers also `remarks`, sentences about the
    settings of its config that are ignored, and `gate_header`, the text that a gated head looks for.

    Args:
        checkpoint: a folder written by `save_checkpoint`, by `save_pretrained` of transformers or, for an adapter, of
            peft (see `docs/reward_models.md`); or what `open_checkpoint` returned for one.
        label_tokens: for a language model that answers at a step tag, the tokens whose logits are the scorer's labels.
        new_scorer: add a new scorer, to be trained, to a language model without one.
        no_scorer: leave the scorer out, if there is one; the model must have a vocabulary head.
        head: what the caller says of a head that is not recognized by its tensors.

    Returns:
        The model, and the keys.

    Raises:
        ConfigError: if a file is missing, unreadable or not supported, or a tensor's name or shape does not match the
            config.
    """
    opened = checkpoint if isinstance(checkpoint, OpenedCheckpoint) else open_checkpoint(checkpoint)
    folder, config = opened.path, dict(opened.config)
    if is_huggingface(config):
        loaded, metadata = _load_huggingface(opened, label_tokens, new_scorer, no_scorer, head)
        return without_scorer(loaded) if no_scorer else loaded, metadata
    if head is not None:
        raise ConfigError(
            f"{folder}: --head declares the head of a checkpoint of transformers; this one is bonnx's own"
        )
    with torch.device("meta"):
        model = _own_model(folder, config)
    weights = opened.weights()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_shapes(expected, weights.shapes)
    _fill(model, weights.read({name: name for name in expected}))
    if no_scorer:
        if not isinstance(model, LanguageModel):
            raise ConfigError(f"{folder}: expected a language model; one over embeddings only scores")
        model = without_scorer(model)
    return model, config


def _own_model(folder: Path, config: dict[str, Any]) -> LanguageModel | TwoHeadedNetwork:
    """Build the model that a config in bonnx's format describes, and remove its key from the config."""
    if "language_model" in config:
        description = dict(config.pop("language_model"))
        network = NetworkConfig.from_dict(description.pop("network", {}))
        return LanguageModel(LanguageModelConfig.from_dict({**description, "network": network}))
    if "network" in config:
        return TwoHeadedNetwork(NetworkConfig.from_dict(config.pop("network")))
    raise ConfigError(
        f"{folder / CONFIG_FILE}: expected the key 'model_type' of transformers, or 'language_model' or 'network' of "
        f"bonnx; found {sorted(config)}"
    )


def _load_huggingface(
    opened: OpenedCheckpoint,
    label_tokens: LabelTokens | None,
    new_scorer: bool,
    no_scorer: bool,
    declared: HeadFile | None,
) -> tuple[LanguageModel, dict[str, Any]]:
    weights = _supported_weights(opened)
    try:
        translation = translate(
            opened.config,
            weights.shapes,
            label_tokens=label_tokens,
            new_scorer=new_scorer,
            no_scorer=no_scorer,
            declared=declared,
        )
        with torch.device("meta"):
            model = LanguageModel(translation.config)
        tokens = translation.label_tokens
        expected = _stored_shapes(translation, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        _check_shapes(expected, {name: shape for name, shape in weights.shapes.items() if name in expected})
    except ConfigError as e:
        raise ConfigError(f"{opened.path}: {e}") from e
    scoring, head = translation.scoring, translation.head
    if head.appended is not None:
        scoring = {**scoring, "reward_token": token_id(opened.tokenizer, head.appended)}
    state: dict[str, Tensor] = {}
    for ours, theirs in translation.names.items():
        if tokens is not None and ours == _SCORER:
            state[ours] = _answer_weights(weights, theirs, tokens)
        else:
            state |= weights.read({ours: theirs})
        if ours in translation.parts:
            state[ours] = translation.parts[ours](state[ours])
    if head.gate is not None:
        stored = translation.stored
        state |= gate_state(head.gate, lambda names: weights.read({a: stored[b] for a, b in names.items()}))
    if translation.new_scorer:
        model.network.scorer = make_scorer(translation.config.network)
        model.network.scorer.apply(initialize)
        state |= {f"network.scorer.{name}": value for name, value in model.network.scorer.state_dict().items()}
    # The layers of a scorer have biases or not; in the checkpoint some may and others not.
    for name, value in model.network.scorer.named_parameters(prefix="network.scorer"):
        if name.endswith(".bias"):
            state.setdefault(name, torch.zeros(value.shape))
    if head.normal is not None:
        _normalize(state, model.network.scorer.last, *head.normal)
    _fill(model, state)
    text = {"unknown": "replace", **head.steps}
    header = {} if head.header is None else {"gate_header": head.header}
    return model, {
        "scoring": scoring,
        "text": text,
        "limits": translation.limits,
        "remarks": [*opened.remarks, *translation.remarks],
        **header,
    }


def _answer_weights(weights: TensorReader, name: str, tokens: LabelTokens) -> Tensor:
    """Return the weights (labels, D) of the scorer whose labels are the logits of tokens, from the vocabulary head."""
    rows = weights.read_rows(name, tokens.ids)
    if not tokens.contrast:
        return rows
    return (rows[:1] - rows[1:2] if len(rows) > 1 else rows) / tokens.divisor


def _stored_shapes(translation: Translation, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shape that each tensor of the checkpoint must have, given the shapes of our parameters."""
    expected = {}
    for ours, shape in shapes.items():
        if ours not in translation.names:
            continue
        part = translation.parts.get(ours)
        if translation.label_tokens is not None and ours == _SCORER:
            shape = (translation.config.vocab_size, *shape[1:])
        expected[translation.names[ours]] = shape if part is None or part.shape is None else part.shape
    return expected


def _supported_weights(opened: OpenedCheckpoint) -> TensorReader:
    """Open the weights, but refuse an unsupported family before looking for them."""
    try:
        check_fields(opened.config)
    except ConfigError as e:
        raise ConfigError(f"{opened.path}: {e}") from e
    return opened.weights()


def _normalize(state: dict[str, Tensor], layer: str, mean: float, std: float) -> None:
    """Fold (score - mean) / std into the scorer's last layer.

    Raises:
        ConfigError: if these are no numbers, or so large or small that float32 cannot hold the result.
    """
    if not (abs(mean) < _FAR and 1 / _FAR < std < _FAR):
        raise ConfigError(
            f"rewards are standardized with the mean {mean} and the standard deviation (times a temperature) {std}; "
            f"expected numbers whose size is below {_FAR:g}, and the latter above {1 / _FAR:g}"
        )
    weight, bias = (f"network.scorer.{layer}.{part}" for part in ("weight", "bias"))
    state[bias] = (state[bias] - mean) / std
    state[weight] = state[weight] / std


def _fill(model: LanguageModel | TwoHeadedNetwork, state: dict[str, Tensor]) -> None:
    """Set the parameters of a model that was built on the meta device."""
    model.load_state_dict(state, assign=True)
    network = model.network if isinstance(model, LanguageModel) else model
    for rotary in network.rotaries.values():
        assert isinstance(rotary, Rotary)
        rotary.reset()
    model.eval()


def _check_shapes(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that do not match the config.

    Raises:
        ConfigError: with the tensors that are missing or unexpected, or the first whose shape differs.
    """
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or extra:
        raise ConfigError(
            f"the weights do not match the config; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(extra) or 'none'}"
        )
    for name, shape in expected.items():
        if shape != actual[name]:
            raise ConfigError(f"tensor '{name}': expected shape {shape} from the config; got {actual[name]}")
