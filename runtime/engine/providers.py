"""Which ONNX Runtime is installed, and whether it can be used. Needs nothing but Python, for `bonnx doctor`."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import sys
from pathlib import Path
from types import ModuleType

from bonnx.errors import ProviderError

__all__ = ["FLAVOURS", "cuda_fault", "installed_flavours", "runtime_module"]

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


def cuda_fault(runtime: ModuleType) -> str | None:
    """Why an ONNX Runtime that is built for CUDA cannot load its provider; None if it can, or is built for the CPU.

    ONNX Runtime lists the provider as available in either case, and then runs on the CPU. Linux only.
    """
    if "CUDAExecutionProvider" not in runtime.get_available_providers() or sys.platform != "linux":
        return None
    if hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()
    libraries = Path(str(runtime.__file__)).parent / "capi"
    try:
        # The provider's own symbols are in this one, which it does not name.
        ctypes.CDLL(str(libraries / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(libraries / "libonnxruntime_providers_cuda.so"))
        # The provider loads it only when the first reduction runs.
        ctypes.CDLL("libcudnn.so.9")
    except OSError as e:
        built = str(getattr(runtime, "cuda_version", "")).partition(".")[0]
        there = _cuda_packages()
        reason = f"onnxruntime-gpu {runtime.__version__} cannot use CUDA: {e}"
        if "libcuda.so" in str(e):
            return f"{reason}; this machine has no NVIDIA driver: install one, or `pip install bonnx[cpu]` in its place"
        return (
            f"{reason}; this wheel is built for CUDA {built or 'of an unknown version'}, and installed are "
            f"{', '.join(there) or 'no packages of CUDA'}; run `pip install 'onnxruntime-gpu[cuda,cudnn]'` for the "
            "libraries of its version, or `pip install 'onnxruntime-gpu<1.27'` for a wheel for CUDA 12, and export "
            "with --opset 18 for it"
        )
    return None


def _cuda_packages() -> list[str]:
    """The installed packages that bring libraries of CUDA, with their versions."""
    found = set()
    for package in importlib.metadata.distributions():
        name, version = str(package.metadata["Name"]), package.version
        if re.fullmatch(r"nvidia-(cublas|cuda-runtime|cudnn)(-cu\d+)?", name) or (name == "torch" and "+cu" in version):
            found.add(f"{name} {version}")
    return sorted(found)


def _broken(versions: dict[str, str], error: Exception) -> str:
    names = " ".join(versions) or "onnxruntime"
    return (
        f"ONNX Runtime is installed but cannot be loaded: {type(error).__name__}: {error}; run "
        f"`pip install --force-reinstall {names}`, and on Windows install the Visual C++ runtime"
    )
