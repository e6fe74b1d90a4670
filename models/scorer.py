"""The recipe that gives a language model a scorer: the backbone stays as it is, and only the scorer learns.

`draw_examples` lets the model write completions, which the caller's own checker labels; `train_scorer` fits the
scorer to them. Completions from elsewhere may be used as well, but a scorer should see mistakes like those that it will
meet.
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

# Chances in [0, 1] that a completion is right: one for each of its tokens, NaN where nothing is known (process
# supervision: at the ends of steps), or a single one for all of them (outcome supervision).
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
        model: in inference mode, as `load_checkpoint` gives it.
        prompts: token ids of each.
        label: the checker, called with a prompt's ids and a completion's, its stop token included.
        n: completions of each prompt.
        max_new_tokens: completions are cut here.
        stop_tokens: each of them ends a completion.
        temperature: divides the logits.
        seed: of every random number.
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
    """Replace the model's scorer by one that gives the logits of the labels, from fresh weights.

    The loss is binary cross entropy, the mean over labelled tokens. The backbone is run once over each example; its
    outputs at labelled tokens are kept meanwhile, 4 bytes times `hidden_size` for each.

    Args:
        model: in inference mode; nothing but `network.scorer` changes.
        examples: labelled completions.
        steps: optimizer steps.
        learning_rate: the peak, see `schedule`.
        batch_size: labelled tokens of a step, drawn at random.
        seed: of the fresh weights and of the batches.
        progress: called after each step with the number of steps done and the loss.

    Returns:
        The loss of each step.

    Raises:
        ConfigError: the model's scorer has several labels.
        InputError: an example's labels are not as described, or there are none.
    """
    if model.config.network.num_labels != 1:
        raise ConfigError(f"the recipe trains a scorer of one label; num_labels is {model.config.network.num_labels}")
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
    """The learning rate: a linear warm-up over the first 2%, then a cosine to a tenth of the peak."""
    warm = max(1, steps // 50)
    return peak * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.no_grad()
def _labelled(model: LanguageModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """The backbone's output at each labelled token (M, D) float32, and the labels (M,) float32."""
    labels = [_labels(i, completion, given) for i, (_, completion, given) in enumerate(examples)]
    known = [~row.isnan() for row in labels]
    total = sum(int(places.sum()) for places in known)
    if total == 0:
        raise InputError(f"none of the {len(examples)} examples has a label; there is nothing to learn from")
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
    """One label for each token of a completion (L,) float32."""
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
    """Give every feature mean 0 and standard deviation 1, in place; returns both (D,) as they were.

    Language models have a few features hundreds of times as large as the others, which would drown the rest.
    """
    mean = features.mean(0) if centre else torch.zeros(features.shape[1])
    deviation = features.std(0, correction=0)
    # A feature that hardly varies is no signal worth amplifying, and may be a constant.
    deviation = deviation.clamp(min=max(0.1 * deviation.median().item(), 1e-6))
    features.sub_(mean).div_(deviation)
    return mean, deviation


def _absorb(scorer: Scorer, mean: Tensor, deviation: Tensor) -> None:
    """Make a scorer of standardized features the same function of features as they are."""
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
