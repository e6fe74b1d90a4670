"""The same work in PyTorch and in transformers: each a function without arguments."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Precision

from ..peer_server import Transformers
from ..rank import SharedByHand
from .machine import Machine, Size

__all__ = ["OnDevice", "generate_ways", "rank_ways", "transformers_module"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
Ways = dict[str, Callable[[], Any]]


class OnDevice(Transformers):
    """A random Llama of a size, on the machine's device, with PyTorch's attention (sdpa)."""

    def __init__(self, module: ModuleType, size: Size, machine: Machine, precision: Precision) -> None:
        self.torch, self.transformers = torch, module
        self.new, self.once = machine.length, False
        dtype = DTYPES[precision]
        config = module.LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        self.model = module.LlamaForCausalLM(config).to(machine.provider, dtype).eval()
        self.scorer = torch.randn(size.hidden, dtype=dtype, device=machine.provider)

    def prompt_once(self, once: bool) -> OnDevice:
        """Compute the prompt once and repeat its cache, or compute it for each candidate."""
        self.once = once
        return self


def transformers_module() -> ModuleType | None:
    """The package transformers, if it is installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    module: ModuleType = transformers
    return module


def rank_ways(
    model: LanguageModel, peer: OnDevice | None, prompt: np.ndarray, candidates: np.ndarray, machine: Machine
) -> Ways:
    """Score candidates (N, C) after a prompt (P,), int64; the model is on the machine's device."""
    p, c = (torch.from_numpy(ids).to(machine.provider) for ids in (prompt[None], candidates))
    by_hand = SharedByHand(model.network)
    ways: Ways = {
        "PyTorch, whole rows": lambda: model.network(model.embedding(torch.cat([p.expand(len(c), -1), c], 1))),
        "PyTorch by hand, prompt once": lambda: by_hand(model.embedding(p), model.embedding(c)),
    }
    if peer is not None:
        ways["transformers, whole rows"] = lambda: peer.prompt_once(False).rank(prompt, candidates)
        ways["transformers, prompt once"] = lambda: peer.prompt_once(True).rank(prompt, candidates)
    return ways


def generate_ways(peer: OnDevice | None, prompt: np.ndarray, count: int) -> Ways:
    """Sample candidates of a prompt (P,) int64; transformers computes no scores."""
    if peer is None:
        return {}
    return {
        "transformers": lambda: peer.prompt_once(False).generate(prompt, count),
        "transformers, prompt once": lambda: peer.prompt_once(True).generate(prompt, count),
    }
