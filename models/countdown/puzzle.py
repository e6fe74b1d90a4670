"""Countdown puzzles: combine all the numbers with + - * / to reach the target. Generator and exact checker.

A solution has one operation per step, `25-12=13;13*7=91;91+3=94;`, on the remaining numbers. Every result is a whole
number from 1 to 999. Finding a solution requires search; checking one requires only arithmetic.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from bonnx.errors import InputError

__all__ = [
    "MAX_RESULT",
    "Puzzle",
    "answer",
    "check",
    "draw_puzzles",
    "draw_solution",
    "held_out",
    "parse_prompt",
    "reachable",
    "step_labels",
]

MAX_NUMBER, MAX_TARGET, MAX_RESULT = 25, 100, 999
_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
_PROMPT = re.compile(r"(\d+(?:,\d+)+)>(\d+):")


@dataclass(frozen=True)
class Puzzle:
    """Numbers in ascending order and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """The text that a model completes, such as `3,7,12,25>98:`."""
        return f"{','.join(map(str, self.numbers))}>{self.target}:"


def parse_prompt(prompt: str) -> Puzzle:
    """Return the puzzle of a prompt.

    Raises:
        InputError: if the text is not numbers separated by commas, `>`, the target and `:`.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise InputError(f"expected a Countdown prompt such as '3,7,12,25>98:'; got {prompt!r}")
    return Puzzle(tuple(sorted(map(int, match[1].split(",")))), int(match[2]))


def held_out(puzzle: Puzzle) -> bool:
    """Whether the puzzle is held out from training, as one in ten is, by a stable hash."""
    return zlib.crc32(puzzle.prompt.encode()) % 10 == 0


def _apply(a: int, operator: str, b: int) -> int | None:
    """Return the result, or None if the rules forbid the operation."""
    if operator == "/":
        return a // b if b and a % b == 0 else None
    result = a + b if operator == "+" else a - b if operator == "-" else a * b
    return result if 1 <= result <= MAX_RESULT else None


def draw_solution(rng: random.Random, count: int) -> tuple[Puzzle, str]:
    """Draw a puzzle of `count` numbers with a solution, by random operations until the result is a valid target."""
    while True:
        numbers = sorted(rng.randint(1, MAX_NUMBER) for _ in range(count))
        left, steps = numbers.copy(), []
        while len(left) > 1:
            b, a = sorted((left.pop(rng.randrange(len(left))), left.pop(rng.randrange(len(left)))))
            operator = rng.choice("+-*/")
            result = _apply(a, operator, b)
            if result is None:
                break
            steps.append(f"{a}{operator}{b}={result};")
            left.append(result)
        else:
            if left[0] <= MAX_TARGET:
                return Puzzle(tuple(numbers), left[0]), "".join(steps)


def draw_puzzles(rng: random.Random, count: int, amount: int, *, test: bool) -> list[tuple[Puzzle, str]]:
    """Draw `amount` solved puzzles of `count` numbers, all from the training set or all held out."""
    drawn: list[tuple[Puzzle, str]] = []
    while len(drawn) < amount:
        puzzle, solution = draw_solution(rng, count)
        if held_out(puzzle) == test:
            drawn.append((puzzle, solution))
    return drawn


@lru_cache(maxsize=200_000)
def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Return every value that can be computed from all of the numbers (ascending)."""
    if len(numbers) == 1:
        return frozenset(numbers)
    values: set[int] = set()
    for j in range(1, len(numbers)):
        for i in range(j):
            rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            for operator in "+-*/":
                result = _apply(numbers[j], operator, numbers[i])
                if result is not None:
                    values |= reachable(tuple(sorted((*rest, result))))
    return frozenset(values)


def _remaining_numbers(puzzle: Puzzle, completion: str) -> Iterator[list[int] | None]:
    """Yield the remaining numbers after each step, or None once a step is wrong."""
    left: list[int] | None = list(puzzle.numbers)
    for step in completion.rstrip("\n").removesuffix(";").split(";"):
        match = _STEP.fullmatch(step)
        if left is not None and match is not None:
            a, operator, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
            try:
                left.remove(a)
                left.remove(b)
            except ValueError:
                left = None
            else:
                left = [*left, result] if _apply(a, operator, b) == result else None
        else:
            left = None
        yield None if left is None else list(left)


def answer(completion: str) -> str | None:
    """Return a completion's calculation in a normal form, `((24-20)/(7-3))`, so that a vote counts equal ones together.

    The order of independent steps does not matter, nor that of the operands of + and *. A number that equals an unused
    result of an earlier step stands for that result (if there are several, the first in text order); any other number
    is one of the puzzle's. The calculation is not checked. Returns None if a step is not an operation.
    """
    results: list[tuple[int, str]] = []

    def operand(value: int) -> str:
        earlier = min((result for result in results if result[0] == value), default=None)
        if earlier is None:
            return str(value)
        results.remove(earlier)
        return earlier[1]

    for step in completion.rstrip("\n").removesuffix(";").split(";"):
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        a, operator, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
        parts = [operand(a), operand(b)]
        if operator in "+*":
            parts.sort()
        results.append((result, f"({parts[0]}{operator}{parts[1]})"))
    return ";".join(sorted(text for _, text in results))


def check(puzzle: Puzzle, completion: str) -> bool:
    """Whether the completion uses every number once, computes every step correctly and ends at the target."""
    *_, left = _remaining_numbers(puzzle, completion)
    return left == [puzzle.target] and completion.rstrip("\n").endswith(";")


def step_labels(puzzle: Puzzle, completion: str) -> list[bool]:
    """Return for each step whether all steps so far are correct and the target can still be reached."""
    return [
        left is not None and puzzle.target in reachable(tuple(sorted(left)))
        for left in _remaining_numbers(puzzle, completion)
    ]
