"""Write an artifact: graphs that share one weights file, manifest, model card, recorded outputs. All or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..errors import ExportError
from ..models.network import LanguageModel, TwoHeadedNetwork
from ..runtime.artifact.folder import CARD, MANIFEST, WEIGHTS, file_digest
from ..runtime.artifact.manifest import (
    PRECISIONS,
    SCHEMA_VERSION,
    File,
    Graph,
    Limits,
    Manifest,
    Parity,
    Precision,
    Scoring,
    TextRules,
    Value,
    seal,
)
from ..runtime.artifact.unfinished import unfinished
from ..runtime.engine.engine import make_engine
from ..runtime.engine.session import SessionOptions
from .card import model_card
from .checkpoint.source import check_scoring
from .checkpoint.tokenizer import TextFiles
from .graphs.trace import DEFAULT_OPSET, OPSETS, trace_graphs
from .graphs.vote import weighed
from .precision.quantize import quantized
from .verify.agreement import HeldOut, measure, own_prompts
from .verify.generate import check_generation
from .verify.parity import Checker, check_structure
from .verify.selection import selection_cases

__all__ = ["export_model", "staged"]

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
# As in transformers.js.
_SUFFIXES: dict[Precision, str] = {"fp32": "", "fp16": "_fp16", "bf16": "_bf16", "int8": "_int8", "int4": "_q4"}
# Smaller tensors stay in the graph: a program that reads shapes needs no second file, and pages stay aligned.
_EXTERNAL_FROM, _ALIGNMENT = 1024, 64


def export_model(
    model: LanguageModel | TwoHeadedNetwork,
    output: Path,
    *,
    name: str,
    source: str | None = None,
    scoring: Scoring | None = None,
    limits: Limits | None = None,
    tokenizer: TextFiles | None = None,
    text: TextRules | None = None,
    opset: int = DEFAULT_OPSET,
    precision: Precision = "fp32",
    held_out: tuple[Sequence[HeldOut], str] | None = None,
    min_agreement: float = 0.85,
    overwrite: bool = False,
    seed: int = 0,
    reload: Callable[[], LanguageModel | TwoHeadedNetwork] | None = None,
) -> Manifest:
    """Export a model, verify what was written, and only then put it in its place.

    Args:
        model: in inference mode.
        output: the artifact's folder; it must not exist, unless `overwrite`.
        name: of the model, for people.
        source: id and commit of a checkpoint from a hub.
        scoring: how positions become one number; the last position's score if not given.
        limits: greatest sizes that the runtime accepts.
        tokenizer: to put in, with its chat template.
        text: how text becomes tokens; `special_tokens` and what concerns the template are taken from the tokenizer.
        opset: 23, or 18 with every operator decomposed.
        precision: `fp32`, `fp16` or `bf16` for half the size, `int8` for speed on a CPU, `int4` for memory.
        held_out: prompts on which fewer bits must prove themselves, and where they come from; noise if not given.
        min_agreement: share of these prompts, 0 to 1, for which a candidate as good as float32's must be selected.
        overwrite: replace an existing artifact; the old one stays until the new one has passed.
        seed: of the random inputs of the verification.
        reload: gives the model once more. With it this one is used up: its memory is given back as soon as it has been
            read, so that a model needs little more than its own size.

    Raises:
        ExportError: the folder exists, there is no room, or the verification failed; nothing is left behind.
    """
    scoring, limits = weighed(scoring or Scoring()), limits or Limits()
    _check_options(model, scoring, opset, precision, min_agreement)
    _check_cache(model, limits)
    output = output.absolute()
    check_output(output, overwrite=overwrite)
    config, is_language_model = model.config, isinstance(model, LanguageModel)
    computed = quantized(model, precision, consume=reload is not None)
    with staged(output) as folder:
        (folder / "onnx").mkdir()
        graphs = _write_graphs(trace_graphs(computed, scoring, opset=opset), folder, _SUFFIXES[precision])
        parity = _verify(computed, folder, graphs, scoring, limits, seed, frugal=reload is not None)
        text = _write_tokenizer(tokenizer, text or TextRules(), folder)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            seal="",
            name=name,
            source=source,
            kind="language_model" if is_language_model else "network",
            model=config.to_dict(),
            precision=precision,
            scoring=scoring,
            limits=limits,
            graphs=graphs,
            tokenizer=TOKENIZER if tokenizer is not None else None,
            text=text,
            files={},
            parity=parity,
            tools=_tools(),
        )
        if precision != "fp32":
            readable = None if tokenizer is None else text
            cases, origin = held_out or own_prompts(config, readable, limits.max_tokens, seed)
            engine = make_engine(folder, manifest, SessionOptions(provider="cpu"))
            agreement = measure(reload or (lambda: model), engine, cases, source=origin, least=min_agreement)
            manifest = msgspec.structs.replace(manifest, agreement=agreement)
        manifest = _with_files(manifest, folder)
        (folder / CARD).write_text(model_card(manifest), encoding="utf-8")
        (folder / MANIFEST).write_bytes(seal(manifest))
    return manifest


def _write_tokenizer(tokenizer: TextFiles | None, text: TextRules, folder: Path) -> TextRules:
    """Write the tokenizer and its template; the rules, completed with what these say."""
    if tokenizer is None:
        return text
    (folder / TOKENIZER).write_bytes(tokenizer.json)
    template = tokenizer.chat_template
    if template is not None:
        (folder / TEMPLATE).write_bytes(template.encode())
    return msgspec.structs.replace(
        text,
        special_tokens=tokenizer.adds_special_tokens,
        chat_template=None if template is None else TEMPLATE,
        template_tokens={} if template is None else tokenizer.special_tokens,
    )


def _check_options(
    model: LanguageModel | TwoHeadedNetwork, scoring: Scoring, opset: int, precision: Precision, min_agreement: float
) -> None:
    check_scoring(model, scoring)
    if opset not in OPSETS:
        raise ExportError(f"opset: expected one of {', '.join(map(str, OPSETS))}; got {opset}")
    if precision not in PRECISIONS:
        raise ExportError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    if not 0 <= min_agreement <= 1:
        raise ExportError(f"min_agreement: expected a share between 0 and 1; got {min_agreement}")


def _check_cache(model: LanguageModel | TwoHeadedNetwork, limits: Limits) -> None:
    """Refuse what `generate` would get wrong: keys in its cache whose frequencies a longer row no longer has."""
    if not isinstance(model, LanguageModel) or not model.config.vocabulary_head:
        return
    scaling = model.config.network.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and limits.max_tokens > scaling.original_max_positions:
        raise ExportError(
            f"dynamic rope scaling: every frequency changes with each token beyond {scaling.original_max_positions}, "
            f"and keys that `generate` has cached would be of another length; --max-tokens is {limits.max_tokens}, "
            f"expected at most {scaling.original_max_positions} for a model with a vocabulary head"
        )


def _verify(
    computed: LanguageModel | TwoHeadedNetwork,
    folder: Path,
    graphs: dict[str, Graph],
    scoring: Scoring,
    limits: Limits,
    seed: int,
    *,
    frugal: bool,
) -> list[Parity]:
    """Every check of the written graphs against PyTorch at their precision; some cases are kept for `bonnx verify`."""
    for graph in graphs.values():
        check_structure(folder / graph.file)
    checker = Checker(computed, folder, graphs, scoring, limits, seed)
    cases = [*checker.cases(), *selection_cases(checker)]
    generates = isinstance(computed, LanguageModel) and computed.config.vocabulary_head
    if frugal and not generates:
        _give_back(computed)
    parity = checker.run(cases)
    if generates:
        parity += check_generation(checker)
    np.savez_compressed(folder / "golden.npz", **checker.recorded)  # type: ignore[arg-type]
    return parity


def _give_back(model: nn.Module) -> None:
    """Free a module's memory, whoever still knows its tensors; the tracer does."""
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        tensor.data = torch.empty(0)
        if storage.resizable():
            storage.resize_(0)
    gc.collect()
    # The C library keeps what is freed for itself; glibc's has a way to ask.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        ExportError: it exists and may not be replaced, or replacing it would delete what is not an artifact.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output} exists; choose another folder, or pass --overwrite to replace it")
    if not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} is not an artifact, so --overwrite does not replace it; choose another folder")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place if the block succeeds, and is deleted if not."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as e:
        raise ExportError(f"cannot write to {output.parent}: {e.strerror or e}; choose another folder") from e
    try:
        with unfinished(staging):
            # mkdtemp makes a folder that only its owner can read.
            staging.chmod(0o755)
            yield staging
            if output.exists():
                _replace(output, staging)
            else:
                staging.rename(output)
    except OSError as e:
        raise ExportError(f"cannot write {output}: {e.strerror or e}; nothing was left behind") from e


def _replace(output: Path, staging: Path) -> None:
    """Put a new folder in the place of an old one, which goes back if that fails or is interrupted."""
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    old = aside / "old"
    try:
        output.rename(old)
        staging.rename(output)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(aside, ignore_errors=True)


def _write_graphs(models: Iterable[tuple[str, ir.Model]], folder: Path, suffix: str) -> dict[str, Graph]:
    """Write every graph, equal tensors once for all of them."""
    graphs, places = {}, dict[str, tuple[int, int]]()
    with (folder / "onnx" / WEIGHTS).open("wb") as weights:
        for name, model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes < _EXTERNAL_FROM:
                    continue
                array = tensor.numpy()
                shape = ir.Shape(array.shape)
                # The bytes themselves where they lie in order, and not a copy.
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                digest = hashlib.sha256(data).hexdigest()
                if digest not in places:
                    weights.write(b"\0" * (-weights.tell() % _ALIGNMENT))
                    places[digest] = (weights.tell(), len(data))
                    weights.write(data)
                offset, length = places[digest]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, offset, length, tensor.dtype, shape=shape, name=str(value.name)
                )
            file = f"onnx/{name}{suffix}.onnx"
            (folder / file).write_bytes(ir.to_proto(model).SerializeToString())
            inputs, outputs = ([_value(v) for v in values] for values in (model.graph.inputs, model.graph.outputs))
            opset = model.graph.opset_imports[""]
            graphs[name] = Graph(file=file, opset=opset, inputs=inputs, outputs=outputs)
            # Let go before the next one is traced.
            del model
    return graphs


def _value(value: ir.Value) -> Value:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]
    return Value(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def _with_files(manifest: Manifest, folder: Path) -> Manifest:
    files = {
        path.relative_to(folder).as_posix(): File(sha256=file_digest(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return msgspec.structs.replace(manifest, files=files)


def _tools() -> dict[str, str]:
    names = ["bonnx", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"]
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
