"""What recent prompts began with is found in whole blocks, and only so much is remembered."""

import numpy as np

from bonnx.runtime.engine import beginnings
from bonnx.runtime.engine.beginnings import BLOCK, Beginnings, block_keys


def draw_prompts(rng, count):
    """Prompts of pieces that some of them share."""
    pieces = [rng.integers(0, 50, rng.integers(1, 3 * BLOCK)) for _ in range(3)]
    return [np.concatenate([pieces[i] for i in rng.integers(0, 3, rng.integers(1, 5))]) for _ in range(count)]


def common(a, b):
    count = min(len(a), len(b))
    return next((i for i in range(count) if a[i] != b[i]), count)


def test_the_longest_beginning_of_an_earlier_prompt_is_found(rng):
    known, prompts = Beginnings(), draw_prompts(rng, 40)
    for i, prompt in enumerate(prompts):
        expected = max((common(prompt, earlier) // BLOCK for earlier in prompts[:i]), default=0)
        assert known.note([*block_keys(prompt)]) == expected


def test_embeddings_are_compared_by_their_numbers(rng):
    known, prompt = Beginnings(), rng.standard_normal((3 * BLOCK, 4)).astype(np.float32)
    other = prompt.copy()
    other[BLOCK] += 1
    assert [known.note([*block_keys(p)]) for p in (prompt, other, prompt)] == [0, 1, 3]


def test_only_the_latest_blocks_are_remembered(rng, monkeypatch):
    monkeypatch.setattr(beginnings, "_MOST", 10)
    known = Beginnings()
    prompts = [rng.integers(0, 10**6, 4 * BLOCK) for _ in range(20)]
    for prompt in prompts:
        known.note([*block_keys(prompt)])
    assert len(known._known) == 10
    assert known.note([*block_keys(prompts[-1])]) == 4
    assert known.note([*block_keys(prompts[0])]) == 0
