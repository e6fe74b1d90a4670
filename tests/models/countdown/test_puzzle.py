"""The generator and the exact checker against an independent solver."""

import itertools
import random
from fractions import Fraction

import pytest

from bonnx.models.countdown.puzzle import (
    Puzzle,
    answer,
    check,
    draw_solution,
    held_out,
    parse_prompt,
    reachable,
    step_labels,
)
from bonnx.models.countdown.vocabulary import VOCABULARY, decode, encode, make_tokenizer


def solver(numbers):
    """Every value of every expression tree, by permutations and fractions: another way than the checker's."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = solver([numbers[i] for i in chosen])
            right = solver([n for i, n in enumerate(numbers) if i not in chosen])
            for a, b in itertools.product(left, right):
                results = [a + b, a - b, a * b, Fraction(a, b)]
                values |= {int(r) for r in results if r == int(r) and 1 <= r <= 999}
    return values


@pytest.mark.parametrize("count", [2, 3, 4])
def test_reachable_is_what_a_solver_finds(count):
    for _ in range(5):
        numbers = tuple(sorted(random.randint(1, 25) for _ in range(count)))
        assert reachable(numbers) == solver(list(numbers)), numbers


def test_drawn_solutions_are_right_and_completable_at_every_step(dice):
    for _ in range(300):
        puzzle, solution = draw_solution(dice, dice.choice([3, 4]))
        assert check(puzzle, solution)
        assert step_labels(puzzle, solution) == [True] * (len(puzzle.numbers) - 1)
        assert parse_prompt(puzzle.prompt) == puzzle
        assert all(1 <= n <= 25 for n in puzzle.numbers)
        assert 1 <= puzzle.target <= 100


PUZZLE = Puzzle((3, 7, 12, 25), 98)


@pytest.mark.parametrize(
    ("completion", "right", "labels"),
    [
        ("25-12=13;13*7=91;91+3=94;", False, [None, None, False]),
        ("7*12=84;84+25=109;109-3=106;", False, [None, None, False]),
        ("12*7=84;25-3=22;84+22=106;", False, [None, None, False]),
        ("12-3=9;9*7=63;63+25=98;", False, [None, None, False]),
        ("12-3=9;9*7=63;", False, [None, None]),
        ("12-3=9;9*8=72;72+26=98;", False, [None, False, False]),
        ("3-12=9;", False, [False]),
        ("25/3=8;", False, [False]),
        ("12+12=24;", False, [False]),
        ("", False, [False]),
        (";;", False, [False, False]),
        ("98", False, [False]),
    ],
)
def test_wrong_solutions(completion, right, labels):
    steps = step_labels(PUZZLE, completion)
    assert check(PUZZLE, completion) is right
    assert len(steps) == len(labels)
    for label, expected in zip(steps, labels, strict=True):
        assert expected is None or label is expected


def test_a_step_is_right_while_the_target_can_be_reached(dice):
    seen = set()
    for _ in range(200):
        numbers = sorted(dice.randint(1, 25) for _ in range(4))
        a, b, *left = dice.sample(numbers, 4)
        target = dice.randint(1, 100)
        label = step_labels(Puzzle(tuple(numbers), target), f"{a}+{b}={a + b};")
        assert label == [target in solver([a + b, *left])]
        seen.add(label[0])
    assert seen == {False, True}


def test_a_bent_last_step_is_wrong():
    puzzle = Puzzle((2, 4, 6), 11)
    assert check(puzzle, "6+4=10;10+2=12;") is False
    assert check(puzzle, "6+4=10;10+2=11;") is False
    assert check(Puzzle((2, 4, 6), 12), "6+4=10;10+2=12;\n") is True
    assert check(Puzzle((2, 4, 6), 12), "6+4=10;10+2=12") is False


@pytest.mark.parametrize("prompt", ["", "3,7", "3,7>", "3>5:", "a,b>5:", "3,7>5:1"])
def test_prompts_that_are_none(prompt):
    with pytest.raises(ValueError, match="expected a Countdown prompt"):
        parse_prompt(prompt)


def test_one_puzzle_in_ten_is_held_out():
    rng = random.Random(0)
    share = sum(held_out(draw_solution(rng, 4)[0]) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_the_tokenizer_that_ships_is_the_vocabulary(dice):
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab() == VOCABULARY
    for _ in range(50):
        puzzle, solution = draw_solution(dice, 4)
        text = puzzle.prompt + solution + "\n"
        ids = tokenizer.encode(text).ids
        assert ids == encode(text)
        assert tokenizer.decode(ids) == decode(ids) == text


def expression(rng, size):
    """A random tree over numbers that its results never meet, so that no number has two meanings."""
    if size == 1:
        return rng.randrange(2, 20)
    left = rng.randrange(1, size)
    return (rng.choice("+*-"), expression(rng, left), expression(rng, size - left))


def written(rng, tree, steps):
    """Append the tree's operations in a random order and with random operands of + and * first; its value."""
    if isinstance(tree, int):
        return tree
    operator, *parts = tree
    order = [0, 1] if rng.random() < 0.5 else [1, 0]
    values = [0, 0]
    for i in order:
        values[i] = written(rng, parts[i], steps)
    a, b = values
    if operator != "-" and rng.random() < 0.5:
        a, b = b, a
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    steps.append((f"{a}{operator}{b}={result};", a, b, result))
    return result


def test_an_answer_does_not_depend_on_the_order_of_writing(dice):
    seen = 0
    while seen < 300:
        tree = expression(dice, dice.randrange(2, 6))
        forms = []
        for _ in range(4):
            steps = []
            written(dice, tree, steps)
            forms.append(steps)
        numbers = [value for text, *values in forms[0] for value in values]
        results = [step[3] for step in forms[0]]
        # Each result is used once at most, and no number of the puzzle looks like one.
        if not all(1 <= r <= 999 and numbers.count(r) <= 2 for r in results) or len(set(results)) < len(results):
            continue
        seen += 1
        assert len({answer("".join(step[0] for step in steps)) for steps in forms}) == 1


def test_different_computations_are_different_answers():
    assert answer("24-20=4;7-3=4;4/4=1;") == answer("7-3=4;24-20=4;4/4=1;\n")
    assert answer("3+4=7;7*2=14;") == answer("4+3=7;2*7=14;") != answer("3*4=12;12+2=14;")
    assert answer("9-2=7;") != answer("8-1=7;")


@pytest.mark.parametrize("text", ["", "\n", "1+2", "1+2=3;x", "1+2=3;;", "1%2=3;"])
def test_what_is_no_operation_has_no_answer(text):
    assert answer(text) is None


def test_an_answer_is_not_checked():
    # Else a vote would know what is right.
    assert answer("4-4=1;") == "(4-4)"
