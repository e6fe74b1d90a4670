"""What `benchmarks.cuda` compares bonnx with: the ways agree, and each keeps to the device of its model."""

import numpy as np
import pytest
import torch

from benchmarks.cuda.machine import DRY
from benchmarks.cuda.others import OnDevice, rank_ways, transformers_module
from benchmarks.cuda.speed import _measured, _share
from benchmarks.rank import SharedByHand


@pytest.fixture
def case(rng):
    """Ids of a prompt (P,) and of candidates (N, C)."""
    return rng.integers(3, 300, int(rng.integers(2, 20))), rng.integers(3, 300, (3, int(rng.integers(1, 9))))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_prompt_once_or_in_every_row(case, rng):
    (size,) = DRY.sizes
    prompt, candidates = case
    model = size.model()
    with torch.no_grad():
        peer = OnDevice(transformers_module(), size, DRY, "fp32")
        ways = rank_ways(model, peer, prompt, candidates, DRY)
        whole, by_hand, rows, once = (way() for way in ways.values())
    assert torch.allclose(whole[1][:, len(prompt) :, 0], by_hand, atol=1e-4)
    assert np.allclose(rows, once, atol=1e-3)
    assert rows.shape == candidates.shape


def test_by_hand_makes_nothing_on_another_device(case):
    """Operators refuse to mix PyTorch's device without memory with the CPU, as they do with a GPU."""
    (size,) = DRY.sizes
    prompt, candidates = case
    network = size.model().network.to("meta")
    shapes = (1, len(prompt), size.hidden), (*candidates.shape, size.hidden)
    scores = SharedByHand(network)(*(torch.empty(shape, device="meta") for shape in shapes))
    assert scores.shape == candidates.shape
    assert scores.device.type == "meta"


def test_a_way_that_fails_says_so():
    def full():
        raise MemoryError("no room\nfor it")

    taken = _measured(full, DRY)
    assert taken == "FAILED (MemoryError: no room)"
    assert _share(1.0, taken) == "unknown share"
    assert _share(1.0, 4.0) == "25%"
