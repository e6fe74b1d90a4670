"""ONNX Runtime sessions: the choice of provider and options, and the errors when one is unavailable."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import msgspec
import numpy as np

from bonnx.errors import ArtifactError, InputError, ProviderError

from ..arrays import Array
from ..artifact.folder import WEIGHTS
from ..artifact.manifest import Graph
from ..checks import check_whole, shown
from .device import DEVICE, HeldArray, on_host
from .fixed_run import FixedRuns
from .graph_cache import GraphCache
from .providers import runtime_module

__all__ = [
    "Provider",
    "Session",
    "SessionOptions",
    "Stop",
]

T = TypeVar("T")

Provider: TypeAlias = Literal["auto", "cpu", "cuda"]

_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Tokens times bytes of weights. A run below this takes at most about a twentieth of a second on two cores.
_BRIEF = 5 * 10**10
# How long a thread of a run waits awake for its next part, in microseconds. The parts of a run follow each other more
# quickly than this. ONNX Runtime's default is far longer: a thread that waits awake takes the time of others that have
# work, those that read and answer a server's requests or other programs.
_SPIN = 20
_TYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run: see `bonnx.load`."""

    provider: Provider = "auto"
    threads: int | None = None
    device_id: int = 0
    memory_limit: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.provider, str) or self.provider not in ("auto", "cpu", "cuda"):
            raise InputError(f"provider: expected 'auto', 'cpu' or 'cuda'; got {shown(self.provider)}")
        # ONNX Runtime holds threads and device_id in 32 bits.
        if self.threads is not None:
            check_whole("threads", self.threads, 1, bits=31)
        check_whole("device_id", self.device_id, 0, bits=31)
        if self.memory_limit is not None:
            check_whole("memory_limit", self.memory_limit, 1)


class Stop(Protocol):
    """Ends a run from another thread once `terminate` is set: ONNX Runtime's `RunOptions`."""

    terminate: bool


class Session:
    """One graph, ready to run. Safe to share between threads.

    Args:
        path: of the graph's file.
        graph: the manifest's entry.
        options: how to run.
        key: identifies the contents of the graph and its weights; needed if the options name a `cache_dir`.
        captured: ONNX Runtime captures its `fixed_runs` in CUDA graphs, where it runs on CUDA.

    Attributes:
        inference: ONNX Runtime's own session.
        fixed_runs: runs at addresses that stay.
    """

    def __init__(
        self, path: Path, graph: Graph, options: SessionOptions, key: str = "", *, captured: bool = False
    ) -> None:
        runtime = runtime_module()
        self.graph, self.options = graph, options
        self._runtime = runtime
        providers = _providers(runtime, options, captured=captured)
        settings, source = _settings(runtime, options), path
        self.fixed_runs = FixedRuns(self)
        self._open: Callable[[], Any] = lambda: runtime.InferenceSession(str(source), settings, providers=providers)
        try:
            # Other providers pack no weights, or keep them where no file can be mapped.
            if options.cache_dir is not None and providers == [_NAMES["cpu"]]:
                source = _optimized(runtime, path, options, key)
                settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.reopen()
        except InputError:
            raise
        except Exception as e:  # ONNX Runtime raises its own subclasses of Exception
            raise ArtifactError(f"{path}: ONNX Runtime {runtime.__version__} cannot load it: {e}") from e
        self._weights = _MappedWeights(path.with_name(WEIGHTS), path)
        active = self.inference.get_providers()[0]
        self.provider = next((short for short, name in _NAMES.items() if name == active), active)
        if options.provider == "cuda" and self.provider != "cuda":
            raise ProviderError(_no_cuda(f"the session runs on {active} instead; a CUDA library is missing"))
        self._compare(path)
        # Where inputs and outputs are bound; None to pass them from and to the host.
        self._device = ("cuda", options.device_id) if self.provider == "cuda" else None
        self._on_host = self._host_values() if self._device else frozenset()

    def reopen(self) -> None:
        """Open ONNX Runtime's session anew; runs under way keep the one that they have."""
        with DEVICE.used():
            self.inference = self._open()

    def check_weights(self) -> None:
        """Refuse results that were computed while the weights were overwritten.

        Raises:
            ArtifactError: they were.
        """
        self._weights.check()

    def _host_values(self) -> frozenset[str]:
        """The inputs that a graph on CUDA reads on the host, and the outputs that it makes there."""
        session = self.inference
        if not hasattr(session, "get_input_memory_infos"):
            # ONNX Runtime 1.23.0 does not say; binding copies these values then.
            return frozenset()
        values = [*session.get_inputs(), *session.get_outputs()]
        places = [*session.get_input_memory_infos(), *session.get_output_memory_infos()]
        return frozenset(value.name for value, place in zip(values, places, strict=True) if place.name == "Cpu")

    def _compare(self, path: Path) -> None:
        """Refuse a graph whose inputs and outputs are not those of the manifest."""
        for kind, declared, loaded in (
            ("inputs", self.graph.inputs, self.inference.get_inputs()),
            ("outputs", self.graph.outputs, self.inference.get_outputs()),
        ):
            expected = [(value.name, value.dtype, list(value.shape)) for value in declared]
            got = [(value.name, _TYPES.get(value.type, value.type), list(value.shape)) for value in loaded]
            if expected != got:
                raise ArtifactError(
                    f"{path}: its {kind} are {got}; the manifest says {expected}; export the model again"
                )

    def make_stop(self) -> Stop:
        """A handle that can end one run."""
        options = self._runtime.RunOptions()
        # Keeps ONNX Runtime from logging runs that are ended on purpose.
        options.log_severity_level = 4
        stop: Stop = options
        return stop

    def run(self, feeds: dict[str, Array], outputs: list[str], stop: Stop | None = None) -> list[Array]:
        """Run the graph; on CUDA only the requested outputs are copied to the host.

        A run whose `stop` is set to terminate raises an exception at its next operator.
        """
        stop = stop or self.make_stop()
        result: Sequence[Array]
        if self._device is None:
            result = self._interruptibly(lambda: self.inference.run(outputs, feeds, stop), feeds, stop)
        else:
            held = self._wrap(feeds)
            values = self._interruptibly(lambda: self._bound(held, outputs, stop), feeds, stop)
            result = [on_host(value) for value in values]
        self.check_weights()
        return [*result]

    def hold(self, arrays: dict[str, Array]) -> dict[str, HeldArray]:
        """Copies of arrays where the session runs, for `values`."""
        return self._wrap(arrays, *(self._device or ()))

    def _wrap(self, arrays: dict[str, Array], *place: str | int) -> dict[str, HeldArray]:
        """Copies of arrays, on the host unless another place is given and the graph reads them there.

        Binding copies those that the graph reads on CUDA; numbers that it reads on the host, such as a loop's, stay.
        """
        make = self._runtime.OrtValue.ortvalue_from_numpy
        with DEVICE.used():
            # Not ascontiguousarray, which turns a scalar into an array of one element.
            return {
                name: make(np.asarray(array, order="C"), *(() if name in self._on_host else place))
                for name, array in arrays.items()
            }

    def values(
        self, feeds: Mapping[str, Array | HeldArray], *, logits: bool = False, stop: Stop | None = None
    ) -> dict[str, HeldArray]:
        """Run on arrays or held values; every output stays where it was computed."""
        arrays = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        held = {**feeds, **self._wrap(arrays)}
        outputs = [value.name for value in self.graph.outputs if logits or value.name != "logits"]
        handle = stop or self.make_stop()

        def work() -> Sequence[HeldArray]:
            if self._device is not None:
                return self._bound(held, outputs, handle)
            values: Sequence[HeldArray] = self.inference.run_with_ort_values(outputs, held, handle)
            return values

        values = self._interruptibly(work, arrays, handle)
        self.check_weights()
        return dict(zip(outputs, values, strict=True))

    def into(self, feeds: Mapping[str, Array | HeldArray], outputs: Mapping[str, HeldArray]) -> None:
        """Run on arrays or held values, and write the outputs into held values of the right sizes."""
        arrays = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        binding = self._bind({**feeds, **self._wrap(arrays)})
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        with DEVICE.used():
            self.inference.run_with_iobinding(binding)
        self.check_weights()

    def _interruptibly(self, work: Callable[[], T], feeds: dict[str, Array], stop: Stop) -> T:
        """Do work that Ctrl-C can end if it may take long; brief work is done without an extra thread."""
        masks = [array for name, array in feeds.items() if name.endswith("mask") and name != "step_mask"]
        tokens = sum(mask.size for mask in masks)
        if "max_new_tokens" in feeds:
            tokens += len(masks[0]) * int(feeds["num_candidates"].max()) * int(feeds["max_new_tokens"].max())
        return work() if tokens * self._weights.size < _BRIEF else interruptibly(work, stop)

    def _bind(self, feeds: Mapping[str, Array | HeldArray]) -> Any:
        """ONNX Runtime's binding of inputs."""
        binding = self.inference.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _bound(
        self, feeds: Mapping[str, Array | HeldArray], outputs: list[str], stop: Stop | None = None
    ) -> Sequence[HeldArray]:
        assert self._device is not None
        binding = self._bind(feeds)
        for name in outputs:
            binding.bind_output(name, *(("cpu",) if name in self._on_host else self._device))
        with DEVICE.used():
            self.inference.run_with_iobinding(binding, stop)
        values: Sequence[HeldArray] = binding.get_outputs()
        return values


def interruptibly(work: Callable[[], T], stop: Stop) -> T:
    """Do long work that Ctrl-C can end.

    Python handles signals in the main thread, between two instructions; so another thread works while the main one
    waits.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    results, errors, done, begun = list[T](), list[BaseException](), threading.Event(), threading.Lock()

    def run() -> None:
        # Interrupted before it began.
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
        # Without a timeout, Ctrl-C would not end this wait on Windows.
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


class _MappedWeights:
    """The weights file that ONNX Runtime has mapped into memory: writing to it changes the running model.

    Replacing the file, as an export does, is harmless: the model keeps the old one.
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
        """Refuse results that were computed while the file was overwritten.

        Raises:
            ArtifactError: the file has changed.
        """
        if self._file is not None and self._read() != self._state:
            raise ArtifactError(
                f"{self._path} was overwritten while in use, so its results may be wrong: write a new artifact beside "
                "the old one and rename it, then load the model again"
            )


def _settings(runtime: ModuleType, options: SessionOptions) -> Any:
    """ONNX Runtime's options of a session."""
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3
    # 0 is one thread for each physical core; using every logical core slows matrix products.
    settings.intra_op_num_threads = options.threads or 0
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN))
    if not _has_vnni():
        # Prevents overflow of 8-bit products on such processors; on others it would halve their speed.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    return settings


def _optimized(runtime: ModuleType, path: Path, options: SessionOptions, key: str) -> Path:
    """The graph from the cache; it is optimized first, if the cache does not have it."""
    assert options.cache_dir is not None

    def optimize(target: Path, weights: str) -> None:
        settings = _settings(runtime, options)
        settings.optimized_model_filepath = str(target)
        prefix = "session.optimized_model_external_initializers"
        settings.add_session_config_entry(f"{prefix}_file_name", weights)
        settings.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
        settings.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        runtime.InferenceSession(str(path), settings, providers=[_NAMES["cpu"]])

    cache = GraphCache(Path(options.cache_dir), runtime.__version__, str(_has_vnni()))
    return cache.graph(key, optimize)


def _providers(
    runtime: ModuleType, options: SessionOptions, *, captured: bool
) -> list[str | tuple[str, dict[str, int]]]:
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
    if captured:
        settings["enable_cuda_graph"] = 1
    if options.memory_limit is not None:
        settings["gpu_mem_limit"] = options.memory_limit
    if hasattr(runtime, "preload_dlls"):
        # CUDA and cuDNN of pip packages or of PyTorch's wheel are found only if they are loaded first.
        runtime.preload_dlls()
    return [(_NAMES["cuda"], settings), _NAMES["cpu"]]


def _has_device() -> bool:
    """Whether there is a CUDA driver; without one ONNX Runtime silently falls back to the CPU."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg") or os.name == "nt"


def _has_vnni() -> bool:
    """Whether the processor is known to add 8-bit products in 32 bits; only Linux says so."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _no_cuda(reason: str) -> str:
    return (
        f"provider='cuda' was requested, but {reason}; install `bonnx[gpu]` (and remove onnxruntime), an NVIDIA "
        "driver, CUDA and cuDNN, and see `bonnx doctor`; or use provider='auto' or 'cpu'"
    )
