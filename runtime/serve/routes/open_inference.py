"""The Open Inference Protocol (KServe v2) over the graphs: their tensors in, their tensors out.

Each graph is a separate model, `NAME_rank`, `NAME_score` and so on, with the inputs and outputs of docs/graphs.md.
Tensors come as JSON lists or, as Triton's clients send them, as raw bytes behind the JSON header.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated

import fastapi
import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

import bonnx
from bonnx.errors import ArtifactError

from ...arrays import Array
from ...artifact.manifest import Value
from ...engine.engine import Engine
from ...engine.session import Stop
from ..errors import ApiError, encode
from ..json_route import parse_json
from ..service import Service
from ..tensors import check_feeds, check_shapes

__all__ = ["add"]

_DATATYPES = {"int64": "INT64", "float32": "FP32"}
_KINDS: dict[str, np.dtype[np.int64] | np.dtype[np.float32]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}
_HEADER = "inference-header-content-length"


class _Parameters(msgspec.Struct, forbid_unknown_fields=True):
    binary_data: bool = False
    binary_data_size: Annotated[int, msgspec.Meta(ge=0)] | None = None
    binary_data_output: bool = False


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    shape: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
    datatype: str
    data: list[object] | None = None
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


class _RequestedOutput(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


class _Inference(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[_Tensor]
    id: str | None = None
    outputs: list[_RequestedOutput] | None = None
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


def add(routes: fastapi.APIRouter, service: Service) -> None:
    """Declare the endpoints below `/v2`, whose bodies may be more than JSON."""
    protocol = fastapi.APIRouter(prefix="/v2")
    artifact = service.engine.manifest
    models = {f"{artifact.slug}_{name}": name for name in ("rank", "score", "generate") if name in artifact.graphs}

    def graph_of(model: str, version: str | None) -> str:
        if model not in models or version not in (None, "1"):
            raise ApiError(404, f"no model '{model:.80}' here, or no such version of it; there are {', '.join(models)}")
        return models[model]

    @protocol.get("")
    async def server() -> dict[str, object]:
        """Name, version and extensions of this server."""
        return {"name": "bonnx", "version": bonnx.__version__, "extensions": ["binary_tensor_data"]}

    @protocol.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the server runs."""
        return {"live": True}

    @protocol.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Whether its models can be used: they are loaded before the server listens."""
        service.check_intact()
        return {"ready": True}

    @protocol.get("/models/{model}/versions/{version}/ready", include_in_schema=False)
    @protocol.get("/models/{model}/ready")
    async def model_ready(model: str, version: str | None = None) -> dict[str, object]:
        """Whether a model can be used."""
        graph_of(model, version)
        service.check_intact()
        return {"name": model, "ready": True}

    @protocol.get("/models/{model}/versions/{version}", include_in_schema=False)
    @protocol.get("/models/{model}")
    async def metadata(model: str, version: str | None = None) -> dict[str, object]:
        """A model's inputs and outputs; -1 is an axis of any length, [] a scalar.

        An option for each prompt is [-1], for which a scalar may come too.
        """
        graph = artifact.graphs[graph_of(model, version)]
        return {
            "name": model,
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": [_described(value, value.name in graph.per_prompt) for value in graph.inputs],
            "outputs": [_described(value) for value in graph.outputs],
        }

    @protocol.post("/models/{model}/versions/{version}/infer", include_in_schema=False)
    @protocol.post("/models/{model}/infer", openapi_extra={"requestBody": _BODY})
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        """Run a graph."""
        return await _infer(service, request, model, graph_of(model, version))

    routes.include_router(protocol)


async def _infer(service: Service, request: Request, model: str, name: str) -> Response:
    """Run the graph `name` on the request's tensors."""
    graph, body = service.engine.manifest.graphs[name], await request.body()
    read = lambda: _read(body, request.headers.get(_HEADER), name, service.engine)  # noqa: E731
    inference, feeds = await service.aside(read, request, len(body))
    known = [value.name for value in graph.outputs]
    wanted = (
        inference.outputs if inference.outputs else [_RequestedOutput(output, inference.parameters) for output in known]
    )
    for output in wanted:
        if output.name not in known:
            raise ApiError(400, f"outputs: there is no '{output.name:.80}', only {', '.join(known)}")
    if len({output.name for output in wanted}) < len(wanted):
        raise ApiError(400, "outputs: a name appears twice; expected each once")
    shape = check_feeds(name, feeds, service.engine)
    names = [output.name for output in wanted]
    arrays = await service.call(request, name, lambda stop: _run(service, name, feeds, names, stop), shape)
    write = lambda: _written(model, inference, wanted, arrays)  # noqa: E731
    return await service.aside(write, request, sum(array.size for array in arrays))


def _run(service: Service, name: str, feeds: dict[str, Array], outputs: list[str], stop: Stop) -> Sequence[Array]:
    try:
        return service.engine.session(name).run(feeds, outputs, stop)
    except ArtifactError:
        raise
    except Exception as e:  # ONNX Runtime raises its own bare subclasses of Exception
        if stop.terminate:
            raise
        raise ApiError(400, f"the graph cannot run on these inputs: {_plain(str(e))}") from e


def _plain(message: str) -> str:
    """ONNX Runtime's words without its source files."""
    return re.sub(r"/\S+", "...", message.partition("\n")[0])[:300]


def _described(value: Value, per_prompt: bool = False) -> dict[str, object]:
    shape = [-1] if per_prompt else [axis if isinstance(axis, int) else -1 for axis in value.shape]
    return {"name": value.name, "datatype": _DATATYPES[value.dtype], "shape": shape}


def _read(body: bytes, length: str | None, name: str, engine: Engine) -> tuple[_Inference, dict[str, Array]]:
    """The request and the graph's inputs."""
    header, rest = body, memoryview(b"")
    if length is not None:
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > len(body):
            raise ApiError(400, f"Inference-Header-Content-Length: expected at most the body's {len(body)} bytes")
        header, rest = body[: int(length)], memoryview(body)[int(length) :]
    try:
        inference = msgspec.convert(parse_json(header), _Inference)
    except (msgspec.ValidationError, UnicodeEncodeError) as e:
        # The latter for half of a surrogate pair, which JSON may hold.
        raise ApiError(400, f"the request is not one of the Open Inference Protocol: {str(e)[:300]}") from e
    graph = engine.manifest.graphs[name]
    declared = {value.name: value for value in graph.inputs}
    shapes: dict[str, list[int]] = {}
    for tensor in inference.inputs:
        if tensor.name not in declared:
            raise ApiError(400, f"inputs: '{tensor.name:.80}' is not wanted; expected {', '.join(declared)}")
        if tensor.name in shapes:
            raise ApiError(400, f"inputs: '{tensor.name}' appears twice; expected it once")
        shapes[tensor.name] = _shape(tensor, declared[tensor.name], tensor.name in graph.per_prompt)
    missing = [other for other in declared if other not in shapes]
    if missing:
        raise ApiError(400, f"inputs: {', '.join(missing)} not given")
    check_shapes(name, graph, shapes, engine.manifest.limits)
    feeds: dict[str, Array] = {}
    for tensor in inference.inputs:
        feeds[tensor.name], rest = _tensor(tensor, shapes[tensor.name], rest)
    if rest:
        raise ApiError(400, f"{len(rest)} bytes behind the last input belong to none; see binary_data_size")
    return inference, feeds


def _shape(tensor: _Tensor, value: Value, per_prompt: bool) -> list[int]:
    """An input's shape, checked against the graph's, for which there may be one value for each prompt instead."""
    name, datatype = f"input '{tensor.name}'", _DATATYPES[value.dtype]
    if tensor.datatype != datatype:
        raise ApiError(400, f"{name}: expected datatype {datatype}; got {tensor.datatype:.40}")
    # Clients whose tensors have at least one axis send a scalar as a list of one.
    shape = [] if not value.shape and tensor.shape == [1] else tensor.shape
    fits = (per_prompt and len(shape) == 1) or (
        len(shape) == len(value.shape)
        and all(not isinstance(axis, int) or axis == size for axis, size in zip(value.shape, shape, strict=True))
    )
    if not fits:
        expected = "[] or [batch]" if per_prompt else value.shape
        raise ApiError(400, f"{name}: expected the shape {expected}; got {tensor.shape!s:.100}")
    return shape


def _tensor(tensor: _Tensor, shape: list[int], rest: memoryview) -> tuple[Array, memoryview]:
    """An input's array, and the bytes behind it."""
    name, kind = f"input '{tensor.name}'", _KINDS[tensor.datatype]
    count, size = math.prod(shape), tensor.parameters.binary_data_size
    if size is not None:
        if tensor.data is not None:
            raise ApiError(400, f"{name}: expected 'data' or 'binary_data_size'; got both")
        if size != count * kind.itemsize or size > len(rest):
            raise ApiError(400, f"{name}: {count} values are {count * kind.itemsize} bytes; got {min(size, len(rest))}")
        return np.frombuffer(rest[:size], kind).reshape(shape), rest[size:]
    try:
        return _flat(tensor.data, kind).reshape(shape), rest
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ApiError(
            400, f"{name}: its data are not {tensor.datatype} values of the shape {tensor.shape}: {str(e)[:200]}"
        ) from e


def _flat(data: list[object] | None, kind: np.dtype[np.int64] | np.dtype[np.float32]) -> Array:
    """JSON lists, nested or not, as one; a number with a fraction is no whole one."""
    array = np.asarray(data, object).ravel()
    allowed = (int,) if kind.kind == "i" else (int, float)
    if not all(type(item) in allowed for item in array):
        raise TypeError(f"expected {'whole numbers' if kind.kind == 'i' else 'numbers'}")
    with np.errstate(over="raise"):
        return array.astype(kind)


def _written(
    model: str, inference: _Inference, wanted: Sequence[_RequestedOutput], arrays: Sequence[Array]
) -> Response:
    outputs, blobs = [], []
    for output, array in zip(wanted, arrays, strict=True):
        entry: dict[str, object] = {
            "name": output.name,
            "datatype": _DATATYPES[str(array.dtype)],
            "shape": [*array.shape],
        }
        if output.parameters.binary_data or output.parameters.binary_data_output:
            blobs.append(np.ascontiguousarray(array).tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    header = {"model_name": model, "model_version": "1", "outputs": outputs}
    head = encode(header | ({"id": inference.id} if inference.id is not None else {}))
    if not blobs:
        return Response(head, media_type="application/json")
    return Response(head + b"".join(blobs), headers={_HEADER: str(len(head))}, media_type="application/octet-stream")


_BODY: dict[str, object] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name", "shape", "datatype", "data"],
                            "properties": {
                                "name": {"type": "string"},
                                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                                "datatype": {"type": "string", "enum": ["INT64", "FP32"]},
                                "data": {"type": "array"},
                            },
                        },
                    },
                    "outputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": {"type": "string"}},
                        },
                    },
                },
            }
        }
    },
}
