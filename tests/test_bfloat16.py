"""Benchmarks leave out bfloat16 where PyTorch has no kernels for it, and say so."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import peers, rank


@pytest.mark.parametrize("has", [True, False])
def test_rank_times_bfloat16_only_where_there_are_kernels(monkeypatch, rng, has):
    monkeypatch.setattr(rank, "has_bfloat16", lambda: has)
    net = rank.network(layers=1)
    with torch.no_grad():
        prompt, candidates = rank.draw(rng, 1)
        rows = torch.from_numpy(np.concatenate([prompt, candidates[0]]))[None]
        scores = net(rows)[1][:, rank.PROMPT :, 0].numpy()
        artifact = SimpleNamespace(rank=lambda *_: SimpleNamespace(scores=[*scores]))
        models = rank.Models(float32=artifact, int8=artifact, opset_18=None, net=net, plain=None)
        ways = rank.compared_ways(models, prompt, candidates)
    assert any("PyTorch float32" in way for way in ways)
    assert any("bfloat16" in way for way in ways) == has


def test_a_peer_in_bfloat16_is_left_out_where_there_are_no_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "has_bfloat16", lambda: False)
    assert peers.start(tmp_path, ["transformers bfloat16", "transformers bfloat16, prompt once"], 1) == {}
    left_out = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in left_out] == [
        "left out transformers bfloat16",
        "left out transformers bfloat16, prompt once",
    ]
