"""Which ONNX Runtime is installed, and whether it can be used. Needs nothing but Python, for `bonnx doctor`."""

from __future__ import annotations

import importlib.metadata
from types import ModuleType

from bonnx.errors import ProviderError

__all__ = ["FLAVOURS", "installed_flavours", "runtime_module"]

FLAVOURS = ("onnxruntime", "onnxruntime-gpu")
_INSTALL = "`pip install bonnx[cpu]`, or `pip install bonnx[gpu]` for CUDA"


def installed_flavours() -> dict[str, str]:
    """Version of each installed ONNX Runtime package."""
    versions = {}
    for name in FLAVOURS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def runtime_module() -> ModuleType:
    """The module `onnxruntime`.

    Raises:
        ProviderError: not installed, installed twice, not ONNX Runtime at all, or it cannot be loaded.
    """
    versions = installed_flavours()
    if len(versions) > 1:
        raise ProviderError(
            f"both {' and '.join(versions)} are installed, and each overwrites the other's files; "
            f"run `pip uninstall -y {' '.join(versions)}`, then {_INSTALL}"
        )
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        if e.name == "onnxruntime":
            raise ProviderError(f"ONNX Runtime is not installed; run {_INSTALL}") from e
        raise ProviderError(_broken(versions, e)) from e
    except Exception as e:  # any error of its own code when a library or a file is missing
        raise ProviderError(_broken(versions, e)) from e
    if hasattr(onnxruntime, "InferenceSession"):
        module: ModuleType = onnxruntime
        return module
    if getattr(onnxruntime, "__file__", None) is None:
        folder = next(iter(onnxruntime.__path__), "onnxruntime")
        raise ProviderError(
            f"{folder} is a folder without code, which an uninstalled ONNX Runtime left behind; delete it, then run "
            f"{_INSTALL}"
        )
    raise ProviderError(
        f"{onnxruntime.__file__} is not ONNX Runtime: it has no InferenceSession; if the file is yours, rename it; if "
        f"not, run `pip install --force-reinstall {next(iter(versions), 'onnxruntime')}`"
    )


def _broken(versions: dict[str, str], error: Exception) -> str:
    names = " ".join(versions) or "onnxruntime"
    return (
        f"ONNX Runtime is installed but cannot be loaded: {type(error).__name__}: {error}; run "
        f"`pip install --force-reinstall {names}`, and on Windows install the Visual C++ runtime"
    )
