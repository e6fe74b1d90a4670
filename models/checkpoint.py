"""Checkpoints: a folder with `config.json` and `model.safetensors`. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import ConfigError, LanguageModelConfig, NetworkConfig
from .network import LanguageModel, TwoHeadedNetwork

__all__ = ["load_checkpoint", "save_checkpoint"]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_checkpoint(
    model: LanguageModel | TwoHeadedNetwork,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write the model's config and its weights as `dtype` into `folder`, which is made if it is not there.

    `metadata` becomes further keys of config.json, such as `scoring` (see `docs/checkpoint.md`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "language_model" if isinstance(model, LanguageModel) else "network"
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    text = json.dumps({kind: model.config.to_dict(), **(metadata or {})}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[LanguageModel | TwoHeadedNetwork, dict[str, Any]]:
    """The model in inference mode, float32, and the further keys of its config.json.

    Raises:
        ConfigError: a file is missing or unreadable, or a tensor's name or shape does not fit the config (it is named).
    """
    folder = Path(folder)
    config = read_config(folder)
    model: LanguageModel | TwoHeadedNetwork
    if "language_model" in config:
        description = dict(config.pop("language_model"))
        network = NetworkConfig.from_dict(description.pop("network", {}))
        model = LanguageModel(LanguageModelConfig.from_dict({**description, "network": network}))
    elif "network" in config:
        model = TwoHeadedNetwork(NetworkConfig.from_dict(config.pop("network")))
    else:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: expected a key 'language_model' or 'network'; found {sorted(config)}"
        )
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, safetensors.SafetensorError) as e:
        raise ConfigError(f"cannot read the weights {folder / WEIGHTS_FILE}: {e}") from e
    check_shapes(model.state_dict(), state)
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})
    return model.eval(), config


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        ConfigError: it is missing or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"cannot read the checkpoint {folder}: {e.strerror or e} ({path.name}); "
            f"expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from e
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object; found {type(config).__name__}")
    return config


def check_shapes(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse tensors that do not fit.

    Raises:
        ConfigError: names the tensors that are missing, unexpected, or of another shape.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise ConfigError(
            f"the weights do not fit the config; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(extra) or 'none'}"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ConfigError(
                f"tensor '{name}': the config needs {tuple(tensor.shape)}, the weights have {tuple(found[name].shape)}"
            )
