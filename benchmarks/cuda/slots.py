"""A `decode` that ONNX Runtime captures in a CUDA graph, timed beside that of the artifact. No artifact has it yet.

A captured graph runs again at once, without the host's work for each operator, if nothing in it depends on the host:
its shapes and addresses are fixed, it has no branches and copies nothing. So the rows' caches have slots for all tokens
that they may get, written in place; the random numbers and what the host knows of the rows are inputs; and tokens are
drawn from all, or the most likely is selected: top-k and top-p would need sizes that depend on values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxscript import opset18, script
from onnxscript.values import Opset
from torch import Tensor

from bonnx.export.graphs import experts, sampling, trace
from bonnx.export.graphs.blocks import attention_functions
from bonnx.export.graphs.builder import Builder, finish, name_value
from bonnx.export.graphs.generate_passes import RowsPass
from bonnx.export.graphs.layers import Trunk
from bonnx.export.graphs.sampling import draw_from_all
from bonnx.export.precision.products import VocabularyHead
from bonnx.export.verify.draws import uniform_in
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Scoring
from bonnx.runtime.engine.engine import Engine
from bonnx.runtime.engine.prompt_cache import nothing_read
from bonnx.runtime.engine.session import HeldArray

from .machine import Machine, timed

__all__ = ["SlotsPass", "compared", "slots_graph"]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
# Any, because the operators' type variables are too narrow for the values that onnxscript infers.
op: Any = opset18
this: Any = Opset("bonnx", 1)


class SlotsPass(RowsPass):
    """`RowsPass` for caches with a slot for every token: `ages` are the numbers of the slots, 0, 1, ..., T - 1.

    Networks without sliding windows only, for which `RowsPass` asks how old a token is.
    """

    def append(self, cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
        """Write into each row's first free slot."""
        return cache.scatter(2, lengths[:, None, None, None].expand_as(new), new)


@script(this, default_opset=opset18)
def draw_anew(logits, uniform, heat, sampled):  # type: ignore[no-untyped-def]
    """`draw_token` without branches and without top-k and top-p.

    Logits (1, M, V), uniform (1, M), heat (M, 1) float32, sampled (M, 1) bool -> tokens and log-probabilities (1, M).
    """
    last = op.Constant(value_ints=[-1])
    log_all = op.LogSoftmax(logits, axis=-1)
    drawn = draw_from_all(op.Softmax(op.Div(log_all, heat), axis=-1), op.Unsqueeze(uniform, last))
    token = op.Where(sampled, drawn, op.ArgMax(logits, axis=-1, keepdims=1))
    return op.Squeeze(token, last), op.Squeeze(op.GatherElements(log_all, token, axis=2), last)


def slots_graph(model: LanguageModel, opset: int = trace.DEFAULT_OPSET) -> ir.Model:
    """Trace the flavour of `decode` of a model with a scorer and without sliding windows."""
    scoring = Scoring()
    trunk = Trunk(model, scoring, fused=opset >= 23).eval()
    traced = trace._Traced(trunk, opset, trace.Repetition(trunk))
    # As many slots as tokens of the caches.
    graph = trace._trace_rows_pass(traced, SlotsPass(trunk, VocabularyHead(model)), ages=4)
    scores, logits, *caches = graph.outputs
    uniform, heat = (ir.val(name, FLOAT, ["rows"]) for name in ("uniform", "heat"))
    sampled = ir.val("sampled", ir.DataType.BOOL, ["rows"])
    b = Builder("draw")
    first, column = b.ints(0), b.ints(1)
    rows = (b.Unsqueeze(value, first) for value in (logits, uniform))
    tokens, log_probs = b.call(draw_anew, *rows, *(b.Unsqueeze(value, column) for value in (heat, sampled)))
    graph.inputs.extend([uniform, heat, sampled])
    drawn = [
        name_value(b.Squeeze(tokens, first), "next_tokens", INT, ["rows"]),
        name_value(b.Squeeze(log_probs, first), "log_probs", FLOAT, ["rows"]),
    ]
    b.extend(graph)
    graph.outputs[:] = [scores, *drawn, logits, *caches]
    functions = [*sampling.FUNCTIONS, *experts.FUNCTIONS, draw_anew, *attention_functions(trunk.config)]
    return finish(graph, functions, opset)


def uniforms(stream: np.ndarray, positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The random numbers of rows: all (M) int64 -> (M) float32."""
    drawn: np.ndarray = uniform_in(*(x.astype(np.uint64) for x in (stream, positions, numbers))).astype(np.float32)
    return drawn


class Bound:
    """A session whose inputs and outputs have fixed addresses; the caches are read and written in place."""

    def __init__(self, path: Path, feeds: dict[str, np.ndarray], machine: Machine) -> None:
        cuda = machine.provider == "cuda"
        capture = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
        self._session = onnxruntime.InferenceSession(
            str(path), providers=[capture, "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]
        )
        place = ("cuda", 0) if cuda else ("cpu", 0)
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        # On the CPU, the value would share the array's memory.
        self._values = {name: make(array.copy(), *place) for name, array in feeds.items()}
        self._binding = self._session.io_binding()
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        rows, vocabulary = len(feeds["tokens"]), self._session.get_outputs()[3].shape[1]
        sizes = {"next_tokens": (np.int64, (rows,)), "logits": (np.float32, (rows, vocabulary))}
        for output in self._session.get_outputs():
            name = output.name.removeprefix("grown_")
            if name not in feeds:
                kind, shape = sizes.get(name, (np.float32, (rows,)))
                self._values[name] = make(np.zeros(shape, kind), *place)
            self._binding.bind_ortvalue_output(output.name, self._values[name])

    def run(self, feeds: dict[str, np.ndarray]) -> None:
        """Run with new values of some inputs."""
        for name, array in feeds.items():
            self._values[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding)

    def numpy(self, name: str) -> np.ndarray:
        """A copy of an input or output."""
        array: np.ndarray = self._values[name].numpy()
        return array


def compared(
    engine: Engine, path: Path, prompt: np.ndarray, count: int, machine: Machine, temperature: float = 1.0
) -> str:
    """Let candidates of a prompt (P,) int64 grow in both, and time a token of each; return the result.

    Args:
        engine: the artifact, opened on the machine's provider.
        path: of the graph of `slots_graph` for the same model.
        prompt: ids.
        count: N.
        machine: where to run; its `length` is the tokens that grow.
        temperature: 0 selects the most likely token.
    """
    decode = engine.session("decode")
    fixed, tokens = _read(engine, prompt, count, temperature)
    stream, shared = fixed["stream"].numpy(), {name: fixed[name] for name in fixed if name.startswith("prompt_")}
    numbers, zeros = np.arange(count), np.zeros(count, np.int64)
    shapes = {value.name: value.shape for value in decode.graph.inputs if value.name.startswith(("key.", "value."))}
    slots = {
        name: np.zeros((count, int(heads), machine.length, int(size)), np.float32)
        for name, (_, heads, _, size) in shapes.items()
    }
    own = decode.hold({name: array[:1, :, :0] for name, array in slots.items()})
    feeds: dict[str, Any] = {"tokens": tokens, "prompts": zeros, "lengths": zeros, "ages": np.arange(machine.length)}
    feeds |= {"places": numbers[None], "back": numbers, "attention_mask": np.ones((1, len(prompt)), np.int64)}
    feeds |= {"uniform": np.zeros(count, np.float32), "heat": np.full(count, temperature or 1, np.float32)}
    feeds |= {"sampled": np.full(count, temperature > 0), **{name: value.numpy() for name, value in shared.items()}}
    bound = Bound(path, feeds | slots, machine)
    same, worst, seconds = 0, 0.0, {}
    for length in range(machine.length):
        lengths = np.full(count, length)
        feeds = {"tokens": tokens, "prompts": zeros, "numbers": numbers, "lengths": lengths}
        feeds |= {"sources": numbers if length else zeros, **fixed, **own}
        changing = {"tokens": tokens, "lengths": lengths, "uniform": uniforms(stream[zeros], lengths + 1, numbers)}
        outputs = decode.values(feeds)
        bound.run(changing)
        drawn = outputs["next_tokens"].numpy()
        same += int((drawn == bound.numpy("next_tokens")).sum())
        worst = max(worst, float(np.abs(outputs["scores"].numpy() - bound.numpy("scores")).max()))
        if length == machine.length // 2:
            seconds = {"decode": timed(lambda: decode.values(feeds)["next_tokens"].numpy(), machine)}  # noqa: B023
            seconds["in slots"] = timed(lambda: (bound.run(changing), bound.numpy("next_tokens")), machine)  # noqa: B023
        own = {name: outputs[f"grown_{name}"] for name in shapes}
        tokens = drawn
    total = count * machine.length
    verdict = "ok" if same > 0.95 * total else "FAILED"
    text = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
    return f"{verdict}, {same} of {total} tokens are the same, scores differ by {worst:.1e}; {text}"


def _read(
    engine: Engine, prompt: np.ndarray, count: int, temperature: float
) -> tuple[dict[str, HeldArray], np.ndarray]:
    """Read a prompt: the inputs of `decode` that stay the same, held, and the first tokens (N,)."""
    prefill = engine.session("prefill")
    drawing = {"temperature": np.array([temperature], np.float32), "top_k": np.array([0])}
    drawing["top_p"] = np.array([1], np.float32)
    mask = np.ones((1, len(prompt)), np.int64)
    feeds: dict[str, Any] = {"input_ids": prompt[None], "attention_mask": mask, "num_candidates": np.array([count])}
    feeds |= {"seed": np.array([7]), **drawing, **prefill.hold(nothing_read(prefill.graph, 1))}
    read = prefill.values(feeds)
    shared = {name: value for name, value in read.items() if name.startswith(("prompt_key", "prompt_value"))}
    fixed = engine.session("decode").hold({"attention_mask": mask, "stream": read["stream"].numpy(), **drawing})
    return {**fixed, **shared}, read["tokens"].numpy()[:, 0]
