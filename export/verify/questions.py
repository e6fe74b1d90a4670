"""Built-in questions with answers of varying quality, to measure ranking models when the user gives no prompts."""

from __future__ import annotations

import numpy as np

__all__ = ["draw_questions"]

_TASKS = (
    ("{who} has {a} {things} and gets {b} more. How many {things} does {who} have now?", "+"),
    ("There are {a} {things} on the table. {who} takes {b} of them. How many are left?", "-"),
    ("{who} packs {b} boxes with {a} {things} each. How many {things} are that?", "*"),
    ("What is {a} {sign} {b}?", "+"),
    ("What is {a} {sign} {b}?", "-"),
    ("What is {a} {sign} {b}?", "*"),
)
_WHO = ("Ana", "Bo", "Chidi", "Dana", "Emre", "Fumiko", "Grace", "Hugo")
_THINGS = ("apples", "books", "coins", "marbles", "stamps", "tickets")
_STYLES = (
    "{answer}",
    "The answer is {answer}.",
    "We compute {a} {sign} {b}.\nThat gives {answer}.\nThe answer is {answer}.",
    "First note the numbers: {a} and {b}.\nThen {a} {sign} {b} = {answer}.\nSo it is {answer}, as a check shows.",
    "I am not sure, but maybe {answer}?",
    "Let me think. {a} and {b}, hmm.\n{answer}",
)
_OTHERS = ("I don't know.", "That depends on what you mean.", "Why do you ask? Let us talk about the weather instead.")


def draw_questions(count: int, candidates: int, seed: int) -> list[tuple[str, list[str]]]:
    """Draw questions, each with `candidates` distinct answers: right, wrong, long, short and evasive."""
    rng, questions = np.random.default_rng(seed), []
    for _ in range(count):
        text, sign = _TASKS[rng.integers(len(_TASKS))]
        a, b = sorted((int(n) for n in rng.integers(2, 60, 2)), reverse=True)
        right = {"+": a + b, "-": a - b, "*": a * b}[sign]
        words = {"who": rng.choice(_WHO), "things": rng.choice(_THINGS), "a": a, "b": b, "sign": sign}
        answers = dict.fromkeys([str(rng.choice(_OTHERS))])
        while len(answers) < candidates:
            wrong = int(rng.integers(-9, 10)) if rng.integers(3) else 0
            answers[str(rng.choice(_STYLES)).format(**words, answer=right + wrong)] = None
        order = rng.permutation(candidates)
        questions.append((text.format(**words), [list(answers)[i] for i in order]))
    return questions
