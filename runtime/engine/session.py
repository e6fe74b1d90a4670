"""ONNX Runtime sessions: which provider, with which options, and what to say when it is unavailable."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, TypeAlias, TypeVar

import msgspec
import numpy as np

from bonnx.errors import ArtifactError, InputError, ProviderError

from ..arrays import Array
from ..artifact.folder import WEIGHTS
from ..artifact.manifest import Graph
from ..checks import shown
from .providers import runtime_module

__all__ = [
    "HeldArray",
    "Provider",
    "Session",
    "SessionOptions",
    "Stop",
]

T = TypeVar("T")

Provider: TypeAlias = Literal["auto", "cpu", "cuda"]

_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Tokens times bytes of weights: of a run that takes about a twentieth of a second on two cores.
_BRIEF = 5 * 10**10
_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run: see `bonnx.load`."""

    provider: Provider = "auto"
    threads: int | None = None
    device_id: int = 0
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.provider, str) or self.provider not in ("auto", "cpu", "cuda"):
            raise InputError(f"provider: expected 'auto', 'cpu' or 'cuda'; got {shown(self.provider)}")
        # ONNX Runtime holds the first two in 32 bits.
        for name, least, most in (("threads", 1, 2**31), ("device_id", 0, 2**31), ("memory_limit", 1, 2**63)):
            value = getattr(self, name)
            known = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if value is not None and not (known and least <= value < most):
                raise InputError(f"{name}: expected a whole number of at least {least}; got {shown(value)}")


class Stop(Protocol):
    """What ends a run from another thread when `terminate` is set: ONNX Runtime's `RunOptions`."""

    terminate: bool


class HeldArray(Protocol):
    """An array that stays where the session runs: ONNX Runtime's `OrtValue`."""

    def numpy(self) -> Array:
        """A copy on the host."""
        ...


class Session:
    """One graph, ready to run. Safe to share between threads."""

    def __init__(self, path: Path, graph: Graph, options: SessionOptions) -> None:
        runtime = runtime_module()
        self.graph, self.options = graph, options
        self._runtime = runtime
        providers = _providers(runtime, options)
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3
        # Every logical core would also take the other half of each physical one, which slows matrix products.
        settings.intra_op_num_threads = options.threads or 0
        if not _has_vnni():
            # Without it 8-bit products overflow there; where it is not needed it halves their speed.
            settings.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = runtime.InferenceSession(str(path), settings, providers=providers)
        except Exception as e:  # ONNX Runtime raises bare subclasses of Exception of its own
            raise ArtifactError(f"{path}: ONNX Runtime {runtime.__version__} cannot load it: {e}") from e
        self._weights = _Weights(path.with_name(WEIGHTS), path)
        active = self._session.get_providers()[0]
        self.provider = next((short for short, name in _NAMES.items() if name == active), active)
        if options.provider == "cuda" and self.provider != "cuda":
            raise ProviderError(_no_cuda(f"the session runs on {active} instead; a CUDA library is missing"))
        self._compare(path)

    def _compare(self, path: Path) -> None:
        """Refuse a graph whose inputs and outputs are not those of the manifest."""
        for kind, declared, loaded in (
            ("inputs", self.graph.inputs, self._session.get_inputs()),
            ("outputs", self.graph.outputs, self._session.get_outputs()),
        ):
            expected = [(value.name, value.dtype, list(value.shape)) for value in declared]
            got = [(value.name, _TYPES.get(value.type, value.type), list(value.shape)) for value in loaded]
            if expected != got:
                raise ArtifactError(
                    f"{path}: its {kind} are {got}; the manifest says {expected}; export the model again"
                )

    def make_stop(self) -> Stop:
        """What can end one run."""
        options = self._runtime.RunOptions()
        # A run that is ended on purpose is not worth ONNX Runtime's line on stderr.
        options.log_severity_level = 4
        stop: Stop = options
        return stop

    def run(self, feeds: dict[str, Array], outputs: list[str], stop: Stop | None = None) -> list[Array]:
        """Run the graph; on CUDA the inputs are bound once and only the asked outputs come back to the host.

        A run whose `stop` is told to terminate ends at its next operator, with an exception.
        """
        stop = stop or self.make_stop()
        result: Sequence[Array]
        if self.provider != "cuda":
            result = self._interruptibly(lambda: self._session.run(outputs, feeds, stop), feeds, stop)
        else:
            held = self.hold(feeds)
            values = self._interruptibly(lambda: self._bound(held, outputs, stop), feeds, stop)
            result = [value.numpy() for value in values]
        self._weights.check()
        return [*result]

    def hold(self, arrays: dict[str, Array]) -> dict[str, HeldArray]:
        """Arrays as values where the session runs, for `values`."""
        place = (self.provider, self.options.device_id) if self.provider == "cuda" else ("cpu", 0)
        make = self._runtime.OrtValue.ortvalue_from_numpy
        # Not ascontiguousarray, which makes a list of one of a scalar.
        return {name: make(np.asarray(array, order="C"), *place) for name, array in arrays.items()}

    def values(self, feeds: Mapping[str, Array | HeldArray], *, logits: bool = False) -> dict[str, HeldArray]:
        """Run on arrays or held values; every output stays where it was computed, none is copied to the host."""
        arrays = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        held = {**feeds, **self.hold(arrays)}
        outputs = [value.name for value in self.graph.outputs if logits or value.name != "logits"]
        stop = self.make_stop()

        def work() -> Sequence[HeldArray]:
            if self.provider == "cuda":
                return self._bound(held, outputs, stop)
            values: Sequence[HeldArray] = self._session.run_with_ort_values(outputs, held, stop)
            return values

        values = self._interruptibly(work, arrays, stop)
        self._weights.check()
        return dict(zip(outputs, values, strict=True))

    def _interruptibly(self, work: Callable[[], T], feeds: dict[str, Array], stop: Stop) -> T:
        """Do work that Ctrl-C ends if it may take long; what is brief spares the thread that this takes."""
        masks = [array for name, array in feeds.items() if name.endswith("mask") and name != "step_mask"]
        tokens = sum(mask.size for mask in masks)
        if "max_new_tokens" in feeds:
            tokens += len(masks[0]) * int(feeds["num_candidates"]) * int(feeds["max_new_tokens"])
        return work() if tokens * self._weights.size < _BRIEF else interruptibly(work, stop)

    def _bound(
        self, feeds: Mapping[str, Array | HeldArray], outputs: list[str], stop: Stop | None = None
    ) -> Sequence[HeldArray]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cuda", self.options.device_id)
        self._session.run_with_iobinding(binding, stop)
        values: Sequence[HeldArray] = binding.get_outputs()
        return values


def interruptibly(work: Callable[[], T], stop: Stop) -> T:
    """Do long work that Ctrl-C can end.

    The main thread hears of a signal only between two instructions of Python, so it waits while another one works.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    results, errors, done, begun = list[T](), list[BaseException](), threading.Event(), threading.Lock()

    def run() -> None:
        # After an interruption there is nothing left to do.
        if not begun.acquire(blocking=False):
            return
        try:
            results.append(work())
        except BaseException as e:
            errors.append(e)
        finally:
            done.set()

    try:
        threading.Thread(target=run, daemon=True).start()
        # Without a limit Windows would not let go of it.
        while not done.wait(0.2):
            pass
    except BaseException:
        stop.terminate = True
        if not begun.acquire(blocking=False):
            done.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]


class _Weights:
    """The file that ONNX Runtime has mapped: writing into it changes the running model.

    A file that takes its place, as an export makes it, is another file, and the model keeps the old one.
    """

    def __init__(self, path: Path, graph: Path) -> None:
        self._path, self._file, self.size = path, None, graph.stat().st_size
        if path.is_file():
            self.size = path.stat().st_size
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._state = self._read()

    def _read(self) -> tuple[int, int]:
        assert self._file is not None
        state = os.fstat(self._file)
        return state.st_mtime_ns, state.st_size

    def check(self) -> None:
        """Refuse what was computed if the file was written into.

        Raises:
            ArtifactError: it was.
        """
        if self._file is not None and self._read() != self._state:
            raise ArtifactError(
                f"{self._path} was written over while it was in use, and what was computed may be wrong: "
                "put a new artifact beside an old one and rename it, then load the model again"
            )


def _providers(runtime: ModuleType, options: SessionOptions) -> list[str | tuple[str, dict[str, int]]]:
    available = runtime.get_available_providers()
    if options.provider == "cpu":
        return [_NAMES["cpu"]]
    if _NAMES["cuda"] not in available or not _has_device():
        if options.provider == "auto":
            return [_NAMES["cpu"]]
        reason = (
            f"this ONNX Runtime {runtime.__version__} has {', '.join(available)} only"
            if _NAMES["cuda"] not in available
            else "no CUDA device or driver was found on this machine"
        )
        raise ProviderError(_no_cuda(reason))
    settings = {"device_id": options.device_id}
    if options.memory_limit is not None:
        settings["gpu_mem_limit"] = options.memory_limit
    if hasattr(runtime, "preload_dlls"):
        # CUDA and cuDNN from pip packages or from PyTorch's wheel are found only if they are loaded first.
        runtime.preload_dlls()
    return [(_NAMES["cuda"], settings), _NAMES["cpu"]]


def _has_device() -> bool:
    """Whether there is a CUDA driver to speak of; ONNX Runtime itself falls back without a word."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg") or os.name == "nt"


def _has_vnni() -> bool:
    """Whether the processor is known to add 8-bit products in 32 bits: told by Linux only."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _no_cuda(reason: str) -> str:
    return (
        f"provider='cuda' was asked for, but {reason}; install `bonnx[gpu]` (and remove onnxruntime), an NVIDIA "
        "driver, CUDA and cuDNN, and see `bonnx doctor`; or use provider='auto' or 'cpu'"
    )
