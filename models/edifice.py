"""Read parameters of the original implementation, Edifice's TestTimeCompute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .config import ConfigError, NetworkConfig
from .network import TwoHeadedNetwork

__all__ = ["edifice_names", "from_edifice"]

# Keys of a recorded config that describe the recording rather than the network.
_RECORDING_KEYS = {"seq_len", "batch", "seed"}


def edifice_names(config: NetworkConfig) -> dict[str, str]:
    """Our parameter name -> the original's `layer.parameter`."""
    names: dict[str, str] = {}

    def dense(ours: str, theirs: str) -> None:
        names[f"{ours}.weight"] = f"{theirs}.kernel"
        names[f"{ours}.bias"] = f"{theirs}.bias"

    if config.embed_dim != config.hidden_size:
        dense("input_projection", "input_projection")
    for i in range(config.num_layers):
        block, theirs = f"blocks.{i}", f"ttc_block_{i + 1}"
        for norm, short in (("attention_norm", "attn_norm"), ("ffn_norm", "ffn_norm")):
            names[f"{block}.{norm}.weight"] = f"{theirs}_{short}.{theirs}_{short}_gamma"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            dense(f"{block}.attention.{part}", f"{theirs}_attn_{part}")
        for part in ("gate", "up", "down"):
            dense(f"{block}.ffn.{part}", f"{theirs}_ffn_{part}")
    names["final_norm.weight"], names["final_norm.bias"] = "final_norm.gamma", "final_norm.beta"
    dense("scorer.dense1", "scorer_dense1")
    dense("scorer.dense2", "scorer_dense2")
    return names


def from_edifice(config: Mapping[str, Any], params: Mapping[str, NDArray[np.float32]]) -> TwoHeadedNetwork:
    """Build the network from a config and parameters of the original, in inference mode.

    Args:
        config: options of `NetworkConfig`; `seq_len`, `batch` and `seed` of a recording are ignored.
        params: arrays by `layer.parameter`, dense kernels (in, out); a leading `param:` in a name is dropped.

    Raises:
        ConfigError: if an option is invalid, or a tensor's name or shape does not match the config.
    """
    network = TwoHeadedNetwork(NetworkConfig.from_dict({k: v for k, v in config.items() if k not in _RECORDING_KEYS}))
    arrays = {name.removeprefix("param:"): array for name, array in params.items()}
    names = edifice_names(network.config)
    missing = sorted(set(names.values()) - set(arrays))
    extra = sorted(set(arrays) - set(names.values()))
    if missing or extra:
        raise ConfigError(
            f"the parameters do not match the config; missing: {missing or 'none'}, unexpected: {extra or 'none'}"
        )
    state = {}
    for ours, expected in network.state_dict().items():
        array = np.asarray(arrays[names[ours]], dtype=np.float32)
        if names[ours].endswith(".kernel"):
            array = array.T
        if array.shape != tuple(expected.shape):
            shape = arrays[names[ours]].shape
            raise ConfigError(f"tensor '{names[ours]}': expected shape {tuple(expected.shape)}; got {shape}")
        state[ours] = torch.from_numpy(array.copy())
    network.load_state_dict(state)
    return network.eval()
