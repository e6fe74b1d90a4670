"""Train a language model and its scorer on Countdown: `python -m bonnx.models.countdown.train --output FOLDER`.

1. Language model: next-token loss on random solved puzzles, new ones at every optimizer step.
2. Scorer, together with the language model: the model samples completions of new puzzles, the exact checker labels each
   reasoning step (correct so far, and the target still reachable), and the scorer learns the labels at the step tokens
   and at the end. Samples always come from the current model, so the scorer learns from the mistakes that it will have
   to judge.
3. As 2, but some samples are corrupted before they are labelled: cut short, or with one token changed. Users rank
   completions from other sources too, and a scorer that has only seen its own model's completions may overrate those
   that this model never writes.

For another task, replace `solved_batch` (solved examples) and `label` (the checker). The data of an optimizer step
depends only on (seed, step), so a stopped run resumes exactly, and two runs with one seed are identical. `--size small`
is a network with a fourteenth of the parameters. With `--labels outcome`, the scorer learns only whether the whole
completion is right, not which steps are.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import save_checkpoint
from ..config import LanguageModelConfig, NetworkConfig
from ..decoding import sample
from ..network import LanguageModel
from .puzzle import Puzzle, check, draw_puzzles, step_labels
from .run import Phase, TrainingRun
from .vocabulary import END, PAD, STEP, VOCABULARY, decode, encode, make_tokenizer

__all__ = [
    "NETWORKS",
    "Supervision",
    "label",
    "label_losses",
    "main",
    "next_token_loss",
    "save",
    "solved_batch",
    "spoil",
    "train",
]

# A completion for 4 numbers: 3 steps of 6 tokens and the end token.
MAX_NEW_TOKENS = 19
IGNORED = -100
# Share of the third phase's samples that is corrupted.
SPOILED = 0.25
_OPERATORS = [VOCABULARY[operator] for operator in "+-*/"]
# What an export needs besides the network: see `export/checkpoint/source.py`.
METADATA = {
    "scoring": {"aggregation": "last", "activation": "sigmoid", "step_token": STEP, "end_token": END, "pad_token": PAD},
    "limits": {"max_tokens": 64},
}
# No dropout, because no example is seen twice.
NETWORKS = {
    "default": NetworkConfig(embed_dim=256, dropout=0.0),
    "small": NetworkConfig(
        embed_dim=80, hidden_size=80, num_layers=2, num_heads=4, num_kv_heads=2, scorer_hidden=64, dropout=0.0
    ),
}
# What the scorer learns at the end of a step: whether the steps so far are right, or whether the whole completion is.
Supervision: TypeAlias = Literal["process", "outcome"]


def solved_batch(rng: random.Random, rows: int) -> tuple[Tensor, Tensor]:
    """Return solved puzzles of 3 and 4 numbers: ids (rows, T) int64, and the next token to learn at each position."""
    examples = [example for count in (3, 4) for example in draw_puzzles(rng, count, rows // 2, test=False)]
    ids = [(encode(puzzle.prompt), [*encode(solution), END]) for puzzle, solution in examples]
    length = max(len(prompt) + len(completion) for prompt, completion in ids)
    inputs = torch.full((len(ids), length), PAD)
    targets = torch.full((len(ids), length), IGNORED)
    for i, (prompt, completion) in enumerate(ids):
        end = len(prompt) + len(completion)
        inputs[i, :end] = torch.tensor(prompt + completion)
        targets[i, len(prompt) - 1 : end - 1] = inputs[i, len(prompt) : end]
    return inputs, targets


def label(puzzle: Puzzle, completion: list[int], kind: Supervision = "process") -> list[float]:
    """Return the scorer's label for each token of a completion: 0 or 1 at step and end tokens, else IGNORED."""
    text = decode([token for token in completion if token != PAD])
    right = check(puzzle, text)
    steps = step_labels(puzzle, text) if kind == "process" else [right] * completion.count(STEP)
    labels, step = [float(IGNORED)] * len(completion), 0
    for i, token in enumerate(completion):
        if token == STEP:
            labels[i] = float(steps[step])
            step += 1
        elif token == END:
            labels[i] = float(right)
    return labels


def spoil(rng: random.Random, completion: list[int]) -> list[int]:
    """Corrupt a completion: end it early, after a step or anywhere, or change one of its tokens."""
    written = [token for token in completion if token not in (END, PAD)]
    if len(written) < 2:
        return completion
    kind = rng.randrange(3)
    if kind == 0:
        places = [i + 1 for i, token in enumerate(written[:-1]) if token == STEP]
        written = written[: rng.choice(places or [len(written)])]
    elif kind == 1:
        written = written[: rng.randrange(1, len(written))]
    else:
        i = rng.randrange(len(written))
        written[i] = rng.choice(_OPERATORS) if written[i] in _OPERATORS else rng.randrange(1, 100)
    return [*written, END, *[PAD] * len(completion)][: len(completion)]


def scored_batch(
    model: LanguageModel, rng: random.Random, count: int, rows: int, spoiled: float, kind: Supervision
) -> tuple[Tensor, Tensor]:
    """Sample completions of new training puzzles from the model -> ids (rows, T) int64, labels (rows, T) float32.

    `spoiled` is the share of completions that `spoil` corrupts.
    """
    puzzles = [puzzle for puzzle, _ in draw_puzzles(rng, count, rows, test=False)]
    prompts = torch.tensor([encode(puzzle.prompt) for puzzle in puzzles])
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        completions = sample(model, prompts, MAX_NEW_TOKENS, END, PAD, generator)
    model.train()
    for i in range(round(spoiled * rows)):
        completions[i] = torch.tensor(spoil(rng, completions[i].tolist()))
    labels = torch.full((rows, prompts.shape[1] + completions.shape[1]), float(IGNORED))
    for i, completion in enumerate(completions.tolist()):
        labels[i, prompts.shape[1] :] = torch.tensor(label(puzzles[i], completion, kind))
    return torch.cat([prompts, completions], 1), labels


def next_token_loss(model: LanguageModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of next tokens (rows, T) int64 that are not IGNORED, for inputs (rows, T) int64."""
    with torch.autocast("cpu", torch.bfloat16):
        backbone = model.network.encode(model.embedding(inputs))[targets != IGNORED]
        logits = model.logits(backbone)
    return F.cross_entropy(logits.float(), targets[targets != IGNORED])


def label_losses(model: LanguageModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the scorer's binary loss at each label (rows, T) that is not IGNORED, for ids (rows, T) int64."""
    with torch.autocast("cpu", torch.bfloat16):
        backbone = model.network.encode(model.embedding(ids))[labels != IGNORED]
        scores = model.network.scorer(backbone)
    return F.binary_cross_entropy_with_logits(scores[:, 0].float(), labels[labels != IGNORED], reduction="none")


def language_loss(model: LanguageModel, rng: random.Random, rows: int) -> Tensor:
    """Return the mean next-token loss over the completions of new solved puzzles."""
    return next_token_loss(model, *solved_batch(rng, rows))


def scorer_loss(model: LanguageModel, rng: random.Random, rows: int, spoiled: float, kind: Supervision) -> Tensor:
    """Return the scorer's mean binary loss at the labelled positions of the model's own completions."""
    # Puzzles of four numbers are harder and get three quarters of the rows.
    shares = ((3, rows // 4), (4, rows - rows // 4))
    losses = [label_losses(model, *scored_batch(model, rng, count, share, spoiled, kind)) for count, share in shares]
    return torch.cat(losses).mean()


def save(model: LanguageModel, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the checkpoint and the tokenizer."""
    save_checkpoint(model, folder, dtype=torch.float16, metadata=metadata)
    make_tokenizer().save(str(folder / "tokenizer.json"))


def train(
    folder: Path,
    *,
    size: str = "default",
    labels: Supervision = "process",
    language_steps: int = 3000,
    joint_steps: int = 1800,
    spoiled_steps: int = 600,
    rows: int = 256,
    seed: int = 0,
    save_every: int = 100,
) -> LanguageModel:
    """Train the three phases in `folder`, resuming a run found there, and write a checkpoint to it.

    Args:
        folder: receives the state of the run, `log.jsonl`, and at the end `config.json` and `model.safetensors`.
        size: the network's size, a key of `NETWORKS`.
        labels: what the scorer learns. The first phase has no labels, so two runs may share its state.
        language_steps: optimizer steps of the first phase.
        joint_steps: optimizer steps of the second phase.
        spoiled_steps: optimizer steps of the third phase.
        rows: batch size: solved puzzles, or sampled completions in the second and third phase.
        seed: seeds the initial weights and all puzzles and samples.
        save_every: optimizer steps between saves.
    """

    def language(model: LanguageModel, rng: random.Random) -> dict[str, Tensor]:
        return {"language": language_loss(model, rng, rows)}

    def both(model: LanguageModel, rng: random.Random, spoiled: float) -> dict[str, Tensor]:
        return {**language(model, rng), "scorer": scorer_loss(model, rng, rows, spoiled, labels)}

    torch.manual_seed(seed)
    config = LanguageModelConfig(network=NETWORKS[size], vocab_size=len(VOCABULARY))
    run = TrainingRun(folder, seed, LanguageModel(config))
    phases = (
        Phase(language_steps, 1e-3, language),
        Phase(joint_steps, 5e-4, partial(both, spoiled=0.0)),
        Phase(spoiled_steps, 2e-4, partial(both, spoiled=SPOILED)),
    )
    run.follow(phases, save_every)
    save(run.model, folder, METADATA)
    return run.model.eval()


def main() -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(description="Train the Countdown model and its scorer.")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder to write; a run found there is resumed"
    )
    parser.add_argument("--size", choices=list(NETWORKS), default="default", help="network size (default: %(default)s)")
    parser.add_argument(
        "--labels",
        choices=get_args(Supervision),
        default="process",
        help="whether the scorer learns the steps or only the outcome (default: %(default)s)",
    )
    steps = "optimizer steps of the %s phase (default: %%(default)s)"
    parser.add_argument("--language-steps", type=int, default=3000, help=steps % "first")
    parser.add_argument("--joint-steps", type=int, default=1800, help=steps % "second")
    parser.add_argument("--spoiled-steps", type=int, default=600, help=steps % "third")
    parser.add_argument("--rows", type=int, default=256, help="batch size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    train(
        arguments.output,
        size=arguments.size,
        labels=arguments.labels,
        language_steps=arguments.language_steps,
        joint_steps=arguments.joint_steps,
        spoiled_steps=arguments.spoiled_steps,
        rows=arguments.rows,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
