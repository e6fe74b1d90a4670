"""Fine-tune the Countdown model to revise: `python -m bonnx.models.countdown.revise -o FOLDER`.

As in Snell et al. (2024), section 6, a sequence is a prompt, up to four wrong attempts, the last of them the closest to
the right one by edit distance, and a right attempt, the only part with a loss. Attempts, each with its end token, are
sampled from the included model. At the same time the scorer learns to score attempts that follow earlier ones, on
chains of right and wrong attempts that the model in training samples itself.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import load_checkpoint
from ..decoding import sample
from ..network import LanguageModel
from . import CHECKPOINT
from .puzzle import Puzzle, check, draw_puzzles
from .run import Phase, TrainingRun
from .train import (
    IGNORED,
    MAX_NEW_TOKENS,
    METADATA,
    label,
    label_losses,
    next_token_loss,
    save,
)
from .vocabulary import END, PAD, decode, encode

__all__ = ["MEMORY", "chain_batch", "distance", "main", "revise", "revision", "revision_batch"]

# Maximum number of earlier attempts, and samples of each puzzle from which they are chosen.
MEMORY, SAMPLES = 4, 6
METADATA_REVISE = {**METADATA, "limits": {"max_tokens": 128}}


def distance(a: list[int], b: list[int]) -> int:
    """Return the edit distance of two token sequences (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def revision(
    rng: random.Random, puzzle: Puzzle, solution: str, attempts: list[list[int]]
) -> tuple[list[list[int]], list[int]]:
    """Return wrong attempts in the order in which they precede the right one, and the right one; all end with END.

    The right one is a right attempt if there is any, otherwise the known solution.
    """
    right = [a for a in attempts if check(puzzle, decode(a))]
    wrong = [a for a in attempts if a not in right]
    target = rng.choice(right) if right else [*encode(solution), END]
    shown = rng.sample(wrong, min(len(wrong), rng.randint(0, MEMORY)))
    shown.sort(key=lambda a: -distance(a, target))
    # Only the last position is significant.
    first = shown[:-1]
    rng.shuffle(first)
    return [*first, *shown[-1:]], target


def _attempts(model: LanguageModel, contexts: Tensor, rng: random.Random) -> list[list[int] | None]:
    """Sample one attempt for each context (rows, T); None for an attempt that did not end."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    training = model.training
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        rows = sample(model, contexts, MAX_NEW_TOKENS, END, PAD, generator).tolist()
    model.train(training)
    return [row[: row.index(END) + 1] if END in row else None for row in rows]


def revision_batch(base: LanguageModel, rng: random.Random, rows: int) -> tuple[Tensor, Tensor]:
    """Return sequences (rows, T) int64 and the next token to learn at each position; half of 3 numbers, half of 4."""
    sequences: list[tuple[list[int], list[int]]] = []
    for count in (3, 4):
        puzzles = draw_puzzles(rng, count, rows // 2, test=False)
        prompts = torch.tensor([encode(puzzle.prompt) for puzzle, _ in puzzles])
        attempts = _attempts(base, prompts.repeat_interleave(SAMPLES, 0), rng)
        for i, (puzzle, solution) in enumerate(puzzles):
            ended = [a for a in attempts[i * SAMPLES : (i + 1) * SAMPLES] if a is not None]
            shown, target = revision(rng, puzzle, solution, ended)
            sequences.append(([*encode(puzzle.prompt), *(token for a in shown for token in a)], target))
    length = max(len(context) + len(target) for context, target in sequences)
    inputs, targets = torch.full((len(sequences), length), PAD), torch.full((len(sequences), length), IGNORED)
    for i, (context, target) in enumerate(sequences):
        end = len(context) + len(target)
        inputs[i, :end] = torch.tensor(context + target)
        targets[i, len(context) - 1 : end - 1] = inputs[i, len(context) : end]
    return inputs, targets


def chain_batch(model: LanguageModel, rng: random.Random, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sample chains from the model -> ids (rows, T) int64 and the scorer's labels (rows, T) float32.

    To avoid padding, chains are dropped if an attempt does not end or is not as long as the puzzle's solutions.
    """
    puzzles = [puzzle for puzzle, _ in draw_puzzles(rng, count, rows, test=False)]
    ids = torch.tensor([encode(puzzle.prompt) for puzzle in puzzles])
    labels = torch.full(ids.shape, float(IGNORED))
    usual = 6 * (count - 1) + 1
    for _ in range(rng.randint(1, MEMORY + 1)):
        sampled = _attempts(model, ids, rng)
        kept = [i for i, attempt in enumerate(sampled) if attempt is not None and len(attempt) == usual]
        if not kept:
            break
        puzzles = [puzzles[i] for i in kept]
        attempts = [sampled[i] or [] for i in kept]
        ids = torch.cat([ids[kept], torch.tensor(attempts)], 1)
        new = torch.tensor([label(puzzle, attempt) for puzzle, attempt in zip(puzzles, attempts, strict=True)])
        labels = torch.cat([labels[kept], new], 1)
    return ids, labels


def revise(folder: Path, *, steps: int = 600, rows: int = 64, seed: int = 0, save_every: int = 25) -> LanguageModel:
    """Fine-tune in `folder`, resuming a run found there, and write a checkpoint to it.

    Args:
        folder: as in `train`.
        steps: number of optimizer steps.
        rows: number of sequences in a batch, and of puzzles for the chains.
        seed: seeds all puzzles and samples.
        save_every: optimizer steps between saves.
    """
    base, model = (load_checkpoint(CHECKPOINT)[0] for _ in range(2))
    assert isinstance(base, LanguageModel)
    assert isinstance(model, LanguageModel)

    def losses(model: LanguageModel, rng: random.Random) -> dict[str, Tensor]:
        language = next_token_loss(model, *revision_batch(base, rng, rows))
        # Puzzles of four numbers are harder; some of three are included so that they are not forgotten.
        ids, labels = chain_batch(model, rng, 3 if rng.random() < 0.25 else 4, rows)
        return {"language": language, "scorer": label_losses(model, ids, labels).mean()}

    run = TrainingRun(folder, seed, model)
    run.follow([Phase(steps, 3e-4, losses)], save_every)
    save(run.model, folder, METADATA_REVISE)
    return run.model.eval()


def main() -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune the Countdown model to revise its attempts.")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder to write; a run found there is resumed"
    )
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="batch size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    revise(arguments.output, steps=arguments.steps, rows=arguments.rows, seed=arguments.seed)


if __name__ == "__main__":
    main()
