"""The machine, the sizes of the models that are timed on it, and how times are taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import bonnx
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Precision
from bonnx.runtime.engine.session import Provider

__all__ = ["DRY", "EXPORT", "PRECISIONS", "Machine", "Size", "rates", "streamed", "timed"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
# What is of interest here is the GPU, not the export.
EXPORT: dict[str, Any] = {"verification": "quick", "min_agreement": 0.0}


@dataclass(frozen=True)
class Size:
    """The sizes of a language model with tied embeddings and a scorer."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    def model(self) -> LanguageModel:
        """A random one."""
        torch.manual_seed(0)
        network = NetworkConfig(
            embed_dim=self.hidden,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            ffn_inner=self.inner,
            scorer_hidden=256,
            dropout=0.0,
        )
        return LanguageModel(LanguageModelConfig(network=network, vocab_size=self.vocabulary)).eval()

    @property
    def weights(self) -> int:
        """Of all layers, without the embedding."""
        kv = self.kv_heads * (self.hidden // self.heads)
        return self.layers * (2 * self.hidden * self.hidden + 2 * self.hidden * kv + 3 * self.hidden * self.inner)

    def rank_work(self, prompt: int, count: int, length: int) -> float:
        """The TFLOP that `rank` cannot avoid: all products of all tokens, and attention to unmasked positions."""
        tokens = prompt + count * length
        read = prompt * (prompt + 1) / 2 + count * length * (prompt + (length + 1) / 2)
        return 1e-12 * (2 * self.weights * tokens + 4 * self.layers * self.hidden * read)

    def token_work(self, count: int) -> float:
        """The TFLOP of a token of every candidate, without attention."""
        return 2e-12 * count * (self.weights + self.hidden * self.vocabulary)

    def token_bytes(self, width: int) -> float:
        """The TB that a token of all candidates cannot avoid to read, with weights of `width` bytes."""
        return 1e-12 * width * (self.weights + self.hidden * self.vocabulary)


@dataclass(frozen=True)
class Machine:
    """Where to run, and how much.

    Attributes:
        provider: of the artifacts.
        sizes: of the models whose time is measured.
        counts: of candidates.
        prompt: tokens of a prompt.
        length: tokens of a candidate.
        puzzles: of Countdown that are generated for.
        repeats: of each timed call.
        kinds: of networks that are compared.
        cases: of random shapes of each.
    """

    provider: Provider = "cuda"
    sizes: tuple[Size, ...] = (
        Size("85M", 768, 12, 12, 4, 2048, 32000),
        Size("0.5B", 896, 24, 14, 2, 4864, 151936),
    )
    counts: tuple[int, ...] = (1, 16, 64, 256)
    prompt: int = 512
    length: int = 64
    puzzles: int = 50
    repeats: int = 10
    kinds: int = 3
    cases: int = 20

    @property
    def name(self) -> str:
        """The GPU's, or `cpu`."""
        return str(torch.cuda.get_device_name()) if self.provider == "cuda" else "cpu"

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.provider == "cuda":
            torch.cuda.synchronize()


DRY = Machine(
    "cpu",
    sizes=(Size("tiny", 64, 1, 4, 2, 128, 300),),
    counts=(1, 4),
    prompt=24,
    length=5,
    puzzles=2,
    repeats=1,
    kinds=1,
    cases=2,
)


def streamed(model: bonnx.Model, prompt: Any, *, static: bool, **options: Any) -> bonnx.Generation:
    """What the host's loop generates, with `decode_static` or with `decode`."""
    engine = model._engine
    before, engine.static_cache = engine.static_cache, static
    try:
        *_, last = model.stream(prompt, **options)
    finally:
        engine.static_cache = before
    return last


def timed(way: Callable[[], Any], machine: Machine) -> float:
    """Return the median time in seconds, including the GPU's work."""
    taken = []
    for repeat in range(machine.repeats + 2):
        machine.wait()
        start = time.perf_counter()
        way()
        machine.wait()
        if repeat > 1:
            taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def rates(machine: Machine) -> dict[str, float]:
    """Measure what PyTorch's products and copies reach on the device: TFLOP/s by type, and TB/s of memory."""
    size = 8192 if machine.provider == "cuda" else 256
    device = torch.device(machine.provider)
    # The products of ONNX Runtime's float32 are TensorFloat-32 by default.
    torch.backends.cuda.matmul.allow_tf32 = True
    found = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2e-12 * size**3 / timed(lambda: a @ b, machine)  # noqa: B023
    data = torch.empty(size * size * 4, device=device)
    found["memory"] = 2e-12 * 4 * data.numel() / timed(data.clone, machine)
    return found
