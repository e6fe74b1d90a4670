"""Train a scorer for a language model whose backbone stays frozen.

`draw_examples` samples completions from the model, which the caller's checker labels; `train_scorer` fits the scorer to
them. Completions from other sources can be used too, but a scorer should be trained on mistakes like those that it will
have to judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bonnx.errors import InputError

from .config import ConfigError
from .decoding import sample
from .network import LanguageModel, initialize
from .scorer_kinds import Scorer, make_scorer

__all__ = ["Example", "Labels", "draw_examples", "schedule", "train_scorer"]

# Probabilities in [0, 1] that a completion is right: one per token, NaN where unknown (process supervision labels the
# ends of steps), or a single one for all tokens (outcome supervision).
Labels: TypeAlias = float | Sequence[float]
# Ids of the prompt, ids of the completion, labels of the completion.
Example: TypeAlias = tuple[Sequence[int], Sequence[int], Labels]


def draw_examples(
    model: LanguageModel,
    prompts: Iterable[Sequence[int]],
    label: Callable[[list[int], list[int]], Labels],
    *,
    n: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Example]:
    """Sample `n` completions of each prompt and label them.

    Args:
        model: the model in inference mode, as returned by `load_checkpoint`.
        prompts: token ids of each prompt.
        label: the checker, called with the token ids of a prompt and of a completion, including its stop token.
        n: number of completions per prompt.
        max_new_tokens: maximum length of a completion.
        stop_tokens: the tokens that end a completion.
        temperature: divides the logits.
        seed: seeds all random numbers.
    """
    generator, stops, examples = torch.Generator().manual_seed(seed), set(stop_tokens), list[Example]()
    for prompt in map(list, prompts):
        rows = torch.tensor([prompt]).expand(n, -1)
        drawn = sample(model, rows, max_new_tokens, stop_tokens, 0, generator, temperature)
        for row in drawn.tolist():
            length = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            examples.append((prompt, row[:length], label(prompt, row[:length])))
    return examples


def train_scorer(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train a new scorer to predict the labels, and put it in place of the model's scorer.

    The loss is binary cross-entropy on logits, averaged over labelled tokens. The backbone processes each example once;
    its outputs at labelled tokens are kept in memory, 4 bytes times `hidden_size` each.

    Args:
        model: the model in inference mode; only `network.scorer` changes.
        examples: labelled completions.
        steps: number of optimizer steps.
        learning_rate: the peak learning rate, see `schedule`.
        batch_size: number of labelled tokens per optimizer step, drawn at random.
        seed: seeds the initial weights and the batches.
        progress: called after each optimizer step with the number of steps done and the loss.

    Returns:
        The loss of each optimizer step.

    Raises:
        ConfigError: if the model's scorer has several labels.
        InputError: if an example's labels are invalid, or no example has any.
    """
    if model.config.network.num_labels != 1:
        raise ConfigError(f"num_labels: expected 1, a scorer with one label; got {model.config.network.num_labels}")
    features, labels = _labelled(model, examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = make_scorer(model.config.network).apply(initialize)
        scaling = _standardize(features, centre=model.config.network.scorer_bias)
        losses = _fit(scorer, features, labels, steps, learning_rate, batch_size, progress)
    _absorb(scorer, *scaling)
    model.network.scorer.load_state_dict(scorer.state_dict())
    return losses


def schedule(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up over the first 2%, then cosine decay to a tenth of the peak."""
    warm = max(1, steps // 50)
    return peak * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.no_grad()
def _labelled(model: LanguageModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return the backbone's output at each labelled token (M, D) float32, and the labels (M,) float32."""
    labels = [_labels(i, completion, marks) for i, (_, completion, marks) in enumerate(examples)]
    known = [~row.isnan() for row in labels]
    total = sum(int(places.sum()) for places in known)
    if total == 0:
        raise InputError(f"none of the {len(examples)} examples has a label; expected at least one")
    features, filled = torch.empty(total, model.config.network.hidden_size), 0
    for (prompt, completion, _), places in zip(examples, known, strict=True):
        if not places.any():
            continue
        ids = torch.tensor([[*prompt, *completion]])
        hidden = model.network.encode(model.embedding(ids))[0, len(prompt) :][places]
        features[filled : filled + len(hidden)] = hidden
        filled += len(hidden)
    return features, torch.cat([row[places] for row, places in zip(labels, known, strict=True)])


def _labels(index: int, completion: Sequence[int], marks: Labels) -> Tensor:
    """Return one label for each token of a completion, (L,) float32."""
    labels = torch.tensor(marks, dtype=torch.float32)
    if labels.ndim == 0:
        labels = labels.expand(len(completion))
    if labels.shape != (len(completion),):
        raise InputError(f"example {index}: expected one label, or {len(completion)} for its tokens; got {len(labels)}")
    wrong = labels[(labels < 0) | (labels > 1)]
    if len(wrong):
        raise InputError(f"example {index}: expected labels from 0 to 1, or NaN for none; got {wrong[0].item():g}")
    return labels


def _standardize(features: Tensor, *, centre: bool) -> tuple[Tensor, Tensor]:
    """Scale every feature to mean 0 and standard deviation 1, in place; return the original ones, (D,) each.

    A few features of a language model are hundreds of times larger than the others and would dominate them.
    """
    mean = features.mean(0) if centre else torch.zeros(features.shape[1])
    deviation = features.std(0, correction=0)
    # A feature that hardly varies, or is constant, must not be amplified.
    deviation = deviation.clamp(min=max(0.1 * deviation.median().item(), 1e-6))
    features.sub_(mean).div_(deviation)
    return mean, deviation


def _absorb(scorer: Scorer, mean: Tensor, deviation: Tensor) -> None:
    """Fold the standardization of features into a scorer's weights."""
    with torch.no_grad():
        for layer in scorer.readers:
            layer.weight.div_(deviation)
            if layer.bias is not None:
                layer.bias.sub_(layer.weight @ mean)


def _fit(
    scorer: Scorer,
    features: Tensor,
    labels: Tensor,
    steps: int,
    peak: float,
    batch_size: int,
    progress: Callable[[int, float], object] | None,
) -> list[float]:
    optimizer = torch.optim.AdamW(scorer.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(labels), (batch_size,))
        loss = F.binary_cross_entropy_with_logits(scorer(features[rows])[:, 0], labels[rows])
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, peak)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses
