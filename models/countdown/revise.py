"""Fine-tune the Countdown model to revise: `python -m bonnx.models.countdown.revise -o FOLDER`.

As in Snell et al. (2024), section 6: a sequence is a prompt, up to four wrong attempts, the last of them the nearest to
the right one by edit distance, and a right attempt, which alone is learned. Attempts are samples of the model that
ships, each with its end token. At the same time the scorer learns to rate attempts in view of earlier ones, right and
wrong, on chains that the model under training writes itself.
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

# Earlier attempts that are in view, and samples of each puzzle that these are chosen from.
MEMORY, SAMPLES = 4, 6
METADATA_REVISE = {**METADATA, "limits": {"max_tokens": 128}}


def distance(a: list[int], b: list[int]) -> int:
    """Edit distance of two sequences of tokens (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def revision(
    rng: random.Random, puzzle: Puzzle, solution: str, attempts: list[list[int]]
) -> tuple[list[list[int]], list[int]]:
    """Wrong attempts in the order in which they are shown, and the right one; all end with END.

    The right one is one of the attempts if any is right, else the known solution.
    """
    right = [a for a in attempts if check(puzzle, decode(a))]
    wrong = [a for a in attempts if a not in right]
    target = rng.choice(right) if right else [*encode(solution), END]
    shown = rng.sample(wrong, min(len(wrong), rng.randint(0, MEMORY)))
    shown.sort(key=lambda a: -distance(a, target))
    # Only the last place means something.
    first = shown[:-1]
    rng.shuffle(first)
    return [*first, *shown[-1:]], target


def _attempts(model: LanguageModel, contexts: Tensor, rng: random.Random) -> list[list[int] | None]:
    """One attempt for each context (rows, T); None for one that did not end."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    training = model.training
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        rows = sample(model, contexts, MAX_NEW_TOKENS, END, PAD, generator).tolist()
    model.train(training)
    return [row[: row.index(END) + 1] if END in row else None for row in rows]


def revision_batch(base: LanguageModel, rng: random.Random, rows: int) -> tuple[Tensor, Tensor]:
    """Sequences (rows, T) int64 and the next token to learn at each place; half of 3 numbers, half of 4."""
    sequences: list[tuple[list[int], list[int]]] = []
    for count in (3, 4):
        puzzles = draw_puzzles(rng, count, rows // 2, test=False)
        prompts = torch.tensor([encode(puzzle.prompt) for puzzle, _ in puzzles])
        attempts = _attempts(base, prompts.repeat_interleave(SAMPLES, 0), rng)
        for i, (puzzle, solution) in enumerate(puzzles):
            mine = [a for a in attempts[i * SAMPLES : (i + 1) * SAMPLES] if a is not None]
            shown, target = revision(rng, puzzle, solution, mine)
            sequences.append(([*encode(puzzle.prompt), *(token for a in shown for token in a)], target))
    length = max(len(context) + len(target) for context, target in sequences)
    inputs, targets = torch.full((len(sequences), length), PAD), torch.full((len(sequences), length), IGNORED)
    for i, (context, target) in enumerate(sequences):
        end = len(context) + len(target)
        inputs[i, :end] = torch.tensor(context + target)
        targets[i, len(context) - 1 : end - 1] = inputs[i, len(context) : end]
    return inputs, targets


def chain_batch(model: LanguageModel, rng: random.Random, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Chains that the model writes -> ids (rows, T) int64 and what the scorer should say (rows, T) float32.

    Chains with an attempt of another length than the puzzle's solutions, or without an end, are left out: nothing is
    padded.
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
    """Fine-tune in `folder`, going on from what is there, and leave a checkpoint in it.

    Args:
        folder: as in `train`.
        steps: of the optimizer.
        rows: sequences of a batch, and puzzles of the chains.
        seed: of every puzzle and sample.
        save_every: steps between saves.
    """
    base, model = (load_checkpoint(CHECKPOINT)[0] for _ in range(2))
    assert isinstance(base, LanguageModel)
    assert isinstance(model, LanguageModel)

    def losses(model: LanguageModel, rng: random.Random) -> dict[str, Tensor]:
        language = next_token_loss(model, *revision_batch(base, rng, rows))
        # Four numbers are harder; three are seen now and then, so that they are not forgotten.
        ids, labels = chain_batch(model, rng, 3 if rng.random() < 0.25 else 4, rows)
        return {"language": language, "scorer": label_losses(model, ids, labels).mean()}

    run = TrainingRun(folder, seed, model)
    run.follow([Phase(steps, 3e-4, losses)], save_every)
    save(run.model, folder, METADATA_REVISE)
    return run.model.eval()


def main() -> None:
    """The command line of the recipe."""
    parser = argparse.ArgumentParser(description="Fine-tune the Countdown model to revise its attempts.")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder to write; a run that it holds is resumed"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=64, help="batch size")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    revise(arguments.output, steps=arguments.steps, rows=arguments.rows, seed=arguments.seed)


if __name__ == "__main__":
    main()
