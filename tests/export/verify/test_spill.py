"""Weights in a file: the model computes the same, and the memory is free."""

import torch

from bonnx.export.precision.quantize import quantized
from bonnx.export.verify import spill


def test_a_model_computes_the_same_from_a_file(language_model, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(spill, "_LEAST", int(rng.integers(3000)))
    ids = torch.from_numpy(rng.integers(0, 130, (2, 7)))
    for precision in ("fp32", "bf16", "int8"):
        model = quantized(language_model, precision)
        weight = next(model.network.parameters())
        view, shared = weight.data.T, model.embedding
        with torch.no_grad():
            expected = model(ids)
            forget = spill.spill(model, tmp_path)
            storage = view.untyped_storage()
            # What another test has mapped already cannot be resized.
            assert storage.nbytes() == 0 or weight.nbytes < spill._LEAST or not storage.resizable()
            assert all(torch.equal(a, b) for a, b in zip(model(ids), expected, strict=True))
            forget()
            assert all(torch.equal(a, b) for a, b in zip(model(ids), expected, strict=True))
        assert model.embedding is shared
        assert not [*tmp_path.iterdir()]


def test_without_room_the_model_stays_in_memory(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "_LEAST", 0)
    before = [parameter.data_ptr() for parameter in language_model.parameters()]
    spill.spill(language_model, tmp_path / "missing")()
    assert [parameter.data_ptr() for parameter in language_model.parameters()] == before
