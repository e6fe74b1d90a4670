"""Merge a LoRA adapter into its base model while the tensors are read: W' = W + s B A (Hu et al., 2022)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters import ADAPTER_WEIGHTS, LoraSettings, is_adapter_part
from .config import ConfigError
from .families import Family
from .huggingface import plain_name
from .weights import TensorReader, Weights

__all__ = ["MergedWeights", "merged_config"]

# A tensor of the adapter: module, part, and in some files the adapter's name.
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.\w+?)??(?:\.(weight|bias))?")
_TOKENS = ".token_adapter.trainable_tokens_delta"
# Rows are merged so many values at a time, so that no tensor is in memory twice.
_VALUES = 2**22


@dataclass
class _Change:
    """What an adapter does to one tensor.

    Attributes:
        base: the tensor of the base model, or of the adapter in its place.
        reader: reads `base`.
        low: names of A and B by `A` and `B`, or by `embedding_A` and `embedding_B`.
        scale: factor of B A, or of `bias`.
        rank: rank of A and B.
        bias: name of a bias that is added.
        rows: name of the trained tokens' embeddings, and their ids.
    """

    base: str
    reader: TensorReader
    low: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0
    rank: int = 0
    bias: str | None = None
    rows: tuple[str, list[int]] | None = None


class MergedWeights:
    """A base model with a LoRA adapter merged into it, a `TensorReader` with the names of the base model.

    Args:
        base: the base model's tensors.
        folder: the adapter.
        settings: its adapter_config.json.
        family: the base model's family.
        tied: whether the base model's vocabulary head is its embedding.

    Attributes:
        shapes: the shape of each tensor, by name.
        unties: whether the head is the embedding no longer, because the adapter changes only one of them.

    Raises:
        ConfigError: if the adapter was made for a model of other tensors or sizes, or contains something other than
            LoRA; with the tensor.
    """

    def __init__(self, base: TensorReader, folder: Path, settings: LoraSettings, family: Family, *, tied: bool) -> None:
        self._embedding, self._head = f"{family.embedding}.weight", f"{family.vocabulary}.weight"
        self._base, self._settings, self._path = base, settings, folder / ADAPTER_WEIGHTS
        self._adapter = Weights(folder, ADAPTER_WEIGHTS)
        self._stored = {plain_name(name): name for name in base.shapes}
        # A classifier has no vocabulary head.
        self._tied = tied and self._head not in self._stored and settings.head is None
        self._changes: dict[str, _Change] = {}
        pieces = {plain_name(name): name for name in self._adapter.shapes}
        # Tensors in place of the base's come first, because others may change them.
        for piece in sorted(pieces, key=lambda name: (_PART.fullmatch(name) is not None, _TOKENS in name, name)):
            self._add(piece, pieces[piece])
        self.shapes = {
            name: s for name, s in base.shapes.items() if settings.head is None or not name.endswith(self._head)
        }
        for name, change in self._changes.items():
            self._check(name, change)
            self.shapes[name] = change.reader.shapes[change.base]
        self._check_complete()
        self.unties = self._tied and self._parts()
        if self._tied and not self.unties:
            self._changes.pop(self._head, None)
            self.shapes.pop(self._head, None)
        elif self.unties and self._head not in self._changes:
            self._changes[self._head] = _Change(self._name(self._embedding) or self._embedding, base)
            self.shapes[self._head] = base.shapes[self._changes[self._head].base]

    def file(self, name: str) -> Path:
        """Return the path of the file that contains a tensor, for messages."""
        return self._path

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens, if the adapter has another embedding than the base model."""
        name = self._name(self._embedding) or self._embedding
        return self.shapes[name][0] if name in self._changes else None

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Read merged tensors as float32: {our name: name in the base model} -> {our name: tensor}.

        Raises:
            ConfigError: if a file cannot be read, or a tensor contains NaN or infinity.
        """
        return {ours: self._merge(theirs) for ours, theirs in names.items()}

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a merged tensor as float32.

        Raises:
            ConfigError: as `read`.
        """
        return self._base.read_rows(name, rows) if name not in self._changes else self._merge(name)[list(rows)].clone()

    def _merge(self, name: str) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return self._base.read({name: name})[name]
        tensor = change.reader.read({name: change.base})[name]
        if change.rows is not None:
            stored, ids = change.rows
            tensor[ids] = self._adapter.read({name: stored})[name]
        if change.low:
            parts = self._adapter.read(change.low)
            if "embedding_A" in parts:
                left, right = parts["embedding_A"].T, parts["embedding_B"].T
            else:
                left, right = parts["B"], parts["A"]
            step = max(1, _VALUES // max(1, tensor.shape[-1]))
            for start in range(0, len(tensor), step):
                tensor[start : start + step].addmm_(left[start : start + step], right, alpha=change.scale)
        if change.bias is not None:
            tensor += change.scale * self._adapter.read({name: change.bias})[name]
        return tensor

    def _add(self, piece: str, stored: str) -> None:
        """Enter one tensor of the adapter into the changes."""
        if match := _PART.fullmatch(piece):
            module, part, kind = match.groups()
            change = self._change(f"{module}.{'bias' if kind == 'bias' else 'weight'}", stored)
            change.scale, change.rank = self._settings.scale(module), self._settings.rank_of(module)
            if kind == "bias":
                change.bias = stored
            else:
                change.low[part.removeprefix("lora_")] = stored
        elif piece.endswith(_TOKENS):
            module = piece.removesuffix(_TOKENS)
            ids = next((ids for end, ids in self._settings.tokens.items() if f".{module}".endswith(f".{end}")), None)
            if ids is None:
                raise ConfigError(
                    f"{self._settings.path}, 'trainable_token_indices': expected the tokens of '{stored}'; found none"
                )
            self._change(f"{module}.weight", stored).rows = stored, ids
        else:
            target = ".".join(part for part in piece.split(".") if part not in ("base_layer", "modules_to_save"))
            if is_adapter_part(target):
                raise ConfigError(f"{self._path}: expected an adapter of LoRA; found tensor '{stored}'")
            name = self._name(target)
            if name is None and ".layers." in target:
                raise self._lacks(target, stored)
            self._changes[name or target] = _Change(stored, self._adapter)

    def _change(self, target: str, stored: str) -> _Change:
        """Return the change of a tensor, by the name that it has in the adapter."""
        name = self._name(target)
        if name is None and target == self._head and self._tied:
            name = self._head
            self._changes.setdefault(name, _Change(self._name(self._embedding) or self._embedding, self._base))
        if name is None and target not in self._changes:
            raise self._lacks(target, stored)
        name = name or target
        return self._changes.setdefault(name, _Change(name, self._base))

    def _name(self, target: str) -> str | None:
        """Return the base model's name of a tensor; classes differ in what precedes `layers`."""
        if target in self._stored:
            return self._stored[target]
        ends = [name for name in self._stored if f".{name}".endswith(f".{target}") or f".{target}".endswith(f".{name}")]
        return self._stored[ends[0]] if len(ends) == 1 else None

    def _lacks(self, target: str, stored: str) -> ConfigError:
        layers = {match[1] for name in self._stored if (match := re.search(r"layers\.(\d+)\.", name))}
        return ConfigError(
            f"{self._path}: tensor '{stored}' changes '{target}', which the base model lacks (it has {len(layers)} "
            "layers); pass the model that the adapter was trained on with --base"
        )

    def _check(self, name: str, change: _Change) -> None:
        """Refuse an adapter of another size than the base model."""
        shapes, shape = self._adapter.shapes, change.reader.shapes[change.base]
        original = self._base.shapes.get(name)
        wanted = shape
        if change.low:
            low = {part: shapes[stored] for part, stored in change.low.items()}
            if set(low) not in ({"A", "B"}, {"embedding_A", "embedding_B"}) or any(len(s) != 2 for s in low.values()):
                raise ConfigError(
                    f"{self._path}: expected two matrices A and B for '{name}'; found {_shown(change.low, shapes)}; "
                    "the file is incomplete, as when the shards of DeepSpeed or FSDP were not gathered"
                )
            first, second = (low[part] for part in sorted(low))
            if (first[0], second[1]) != (change.rank, change.rank):
                raise ConfigError(
                    f"{self._path}: {_shown(change.low, shapes)}; expected the rank {change.rank} of "
                    f"{self._settings.path}"
                )
            wanted = (first[1], second[0]) if "embedding_A" in low else (second[0], first[1])
        elif change.bias is not None:
            wanted = shapes[change.bias]
        elif change.reader is self._adapter and original is not None and not _resizable(name):
            wanted, shape = shape, original
        if wanted != shape:
            raise ConfigError(
                f"{self._path}: the adapter is of a model whose tensor '{name}' has shape {wanted}; the base model's "
                f"has {shape}; pass the model that the adapter was trained on with --base"
            )
        if change.rows is not None:
            stored, ids = change.rows
            if shapes[stored] != (len(ids), *shape[1:]) or max(ids, default=0) >= shape[0]:
                raise ConfigError(
                    f"{self._path}: tensor '{stored}' has shape {shapes[stored]}; expected a row of {shape[1:]} for "
                    f"each of the {len(ids)} tokens, which are below {shape[0]}"
                )

    def _check_complete(self) -> None:
        """Refuse an adapter without the matrices of a layer that it names."""
        for name, stored in self._stored.items():
            module, is_weight = name.removesuffix(".weight"), name.endswith(".weight")
            if is_weight and ".layers." in f".{name}" and stored not in self._changes and self._settings.adapts(module):
                raise ConfigError(
                    f"{self._path}: the adapter of '{module}' is missing, which 'target_modules' of "
                    f"{self._settings.path} names; the file is incomplete, as when the shards of DeepSpeed or FSDP "
                    "were not gathered"
                )

    def _parts(self) -> bool:
        """Whether the adapter changes the embedding or the tied head, but not both alike."""
        embedding = self._changes.get(self._name(self._embedding) or self._embedding)
        head = self._changes.get(self._head)
        changes = [change for change in (embedding, head) if change is not None]
        if not changes:
            return False
        if embedding is not None and embedding.rows is not None:
            # peft ties the trained tokens of the embedding to the head, unless that has its own.
            if head is None:
                return False
            if head.rows is None and head.reader is self._base:
                head.rows = embedding.rows
        if head is None and embedding is not None and embedding.reader is self._adapter:
            # A head of another size than the embedding cannot be the base's.
            name = self._name(self._embedding) or self._embedding
            if self._adapter.shapes[embedding.base] != self._base.shapes[name]:
                return False
        whole = [c for c in changes if c.reader is self._adapter and not c.low and c.rows is None]
        if len(whole) == 2:
            first, second = (self._adapter.read({"": change.base})[""] for change in whole)
            return not (first.shape == second.shape and bool((first == second).all()))
        return True


def merged_config(
    config: Mapping[str, Any], weights: MergedWeights, settings: LoraSettings, family: Family
) -> dict[str, Any]:
    """Return the config.json that the merged model would have.

    Args:
        config: the base model's.
        weights: the merged weights.
        settings: the adapter's.
        family: the base model's.
    """
    merged = dict(config)
    if settings.head is not None:
        named = config.get("architectures") or [""]
        if not str(named[0]).endswith(settings.head):
            merged["architectures"] = [f"{family.name}{settings.head}"]
    if weights.vocabulary is not None:
        merged["vocab_size"] = weights.vocabulary
    if weights.unties:
        merged["tie_word_embeddings"] = False
    # The names of the base's labels are those of another head.
    scores = [shape[0] for name, shape in weights.shapes.items() if name == "score.weight"]
    if scores and len(config.get("id2label") or ()) != scores[0]:
        for name in ("id2label", "label2id", "num_labels"):
            merged.pop(name, None)
    return merged


def _resizable(name: str) -> bool:
    """Whether an adapter may give a tensor another size: the vocabulary, and heads."""
    return ".layers." not in name and not name.endswith("norm.weight")


def _shown(low: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"'{name}' {shapes[name]}" for name in low.values())
