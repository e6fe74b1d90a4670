"""Write an artifact, completely or not at all: graphs with shared weights, manifest, model card, recorded cases."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bonnx.errors import ExportError
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.folder import CARD, MANIFEST, file_digest
from bonnx.runtime.artifact.manifest import (
    PRECISIONS,
    SCHEMA_VERSION,
    VERIFICATIONS,
    File,
    Graph,
    Limits,
    Manifest,
    Parity,
    Precision,
    Scoring,
    TextRules,
    Verification,
    seal,
)
from bonnx.runtime.engine.engine import make_engine
from bonnx.runtime.engine.session import SessionOptions
from bonnx.runtime.model import Model
from bonnx.runtime.verification import verify

from .card import model_card
from .checkpoint.source import check_scoring, default_scoring
from .checkpoint.tokenizer import TextFiles
from .graphs.trace import DEFAULT_OPSET, OPSETS, trace_graphs
from .graphs.vote import with_vote_weight
from .graphs.write import write_graphs
from .precision.quantize import quantized
from .single_file import SingleFile, check_size, choose_graph, keep_one
from .stages import Report, silent
from .staging import check_output, staged
from .verify.agreement import HeldOut, default_prompts, measure
from .verify.run import verify_graphs

__all__ = ["export_model"]

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
# File suffixes as in transformers.js.
_SUFFIXES: dict[Precision, str] = {"fp32": "", "fp16": "_fp16", "bf16": "_bf16", "int8": "_int8", "int4": "_q4"}


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
    verification: Verification = "full",
    single_file: SingleFile | bool = False,
    cuda_graph: bool = False,
    report: Report = silent,
) -> Manifest:
    """Export a model to a temporary folder, verify it, and then move it to `output`.

    Args:
        model: the model, in inference mode.
        output: the artifact's folder; it must not exist, unless `overwrite`.
        name: a descriptive name of the model.
        source: id and commit of a checkpoint from a hub.
        scoring: how the scores of positions become one; by default the last position's score counts.
        limits: maximum sizes that the runtime accepts.
        tokenizer: the tokenizer to include, with its chat template.
        text: how text becomes tokens; `special_tokens` and the template's fields are taken from the tokenizer.
        opset: 23, or 18 with newer operators decomposed.
        precision: `fp32`, `fp16` or `bf16` for half the size, `int8` for speed on a CPU, `int4` for memory.
        held_out: prompts that test reduced precision, and where they come from; by default built-in questions, or noise
            for a model that does not read text.
        min_agreement: minimum share of these prompts, 0 to 1, for which the selected candidate must be as good as
            float32's.
        overwrite: replace an existing artifact; the old one stays until the new one is verified.
        seed: seeds the random inputs of the verification.
        reload: loads the model again. If given, `model` is consumed: its memory is freed as soon as possible, so that
            an export needs little more than the model's own size.
        verification: `quick` runs every kind of check with fewer cases; the manifest says which it was.
        single_file: keep one graph, with the weights inside: this one, or if True `generate` of a language model and
            `rank` of others. It is verified like any other.
        cuda_graph: also write `decode_static`, which a CUDA graph can capture, for a language model at 16 or 32 bits.
        report: is called with the name of each stage when it begins.

    Raises:
        ExportError: if the folder exists, the disk is full, verification fails, or a single file would be larger than
            protobuf allows; nothing is left behind.
    """
    scoring, limits = with_vote_weight(scoring or default_scoring(model)), limits or Limits()
    _check_options(model, scoring, limits, opset, precision, min_agreement, verification)
    output, frugal = output.absolute(), reload is not None
    if cuda_graph:
        _check_cuda_graph(model, precision, single_file)
    check_output(output, overwrite=overwrite)
    quick = verification == "quick"
    if precision != "fp32":
        report(f"converting the weights to {precision}")
    computed = quantized(model, precision, consume=frugal)
    with staged(output) as folder:
        traced = trace_graphs(computed, scoring, opset=opset, static=cuda_graph, report=report)
        graphs = write_graphs(traced, folder, _SUFFIXES[precision])
        single = choose_graph(graphs, None if single_file is True else single_file) if single_file else None
        if single is not None:
            check_size(folder, graphs[single])
        parity = verify_graphs(
            computed, folder, graphs, scoring, limits, seed, frugal=frugal, quick=quick, report=report
        )
        text = _write_tokenizer(tokenizer, text or TextRules(), folder)
        manifest = _manifest(model.config, name, source, precision, scoring, limits, graphs, tokenizer, text, parity)
        manifest = msgspec.structs.replace(manifest, verification=verification)
        if precision != "fp32":
            prompts, origin = held_out or default_prompts(manifest, model.config, seed, quick=quick)
            engine = make_engine(folder, manifest, SessionOptions(provider="cpu"))
            load = reload or (lambda: model)
            agreement = measure(load, engine, prompts, source=origin, least=min_agreement, report=report)
            manifest = msgspec.structs.replace(manifest, agreement=agreement)
        if single is None:
            manifest = _write_manifest(manifest, folder)
        else:
            report("putting the weights into one file, and comparing what it computes")
            manifest = _fold(manifest, folder, single)
    return manifest


def _fold(manifest: Manifest, folder: Path, name: str) -> Manifest:
    """Make a single file of a verified folder, and check that it computes the same.

    Raises:
        ExportError: it does not.
    """
    before = _generated(manifest, folder) if name == "generate" else []
    manifest = _write_manifest(
        msgspec.structs.replace(manifest, graphs=keep_one(folder, manifest.graphs, name)), folder
    )
    verify(folder, provider="cpu")[0].close()
    if name == "generate" and (after := _generated(manifest, folder)) != before:
        raise ExportError(f"with its weights inside, generate gave the tokens {after}; expected {before}")
    return manifest


def _generated(manifest: Manifest, folder: Path) -> list[list[int]]:
    """The tokens that `generate` draws after one that every vocabulary has."""
    model = Model(make_engine(folder, manifest, SessionOptions(provider="cpu")), folder)
    new = min(8, manifest.limits.max_tokens - 1)
    generation = model.generate([0], n=min(4, manifest.limits.max_candidates), max_new_tokens=new, stop=[])
    model.close()
    return [candidate.tokens.tolist() for candidate in generation.candidates]


def _write_tokenizer(tokenizer: TextFiles | None, text: TextRules, folder: Path) -> TextRules:
    """Write the tokenizer and its template; return the text rules with the tokenizer's own settings filled in."""
    if tokenizer is None:
        return text
    (folder / TOKENIZER).write_bytes(tokenizer.json)
    template, pair = tokenizer.chat_template, tokenizer.pair_template
    if template is not None:
        (folder / TEMPLATE).write_bytes(template.encode())
    if pair is not None and text.pair is not None:
        (folder / text.pair.template).write_bytes(pair.encode())
    return msgspec.structs.replace(
        text,
        special_tokens=tokenizer.adds_special_tokens,
        chat_template=None if template is None else TEMPLATE,
        template_tokens={} if template is None and pair is None else tokenizer.special_tokens,
    )


def _check_options(
    model: LanguageModel | TwoHeadedNetwork,
    scoring: Scoring,
    limits: Limits,
    opset: int,
    precision: Precision,
    min_agreement: float,
    verification: Verification,
) -> None:
    check_scoring(model, scoring)
    if opset not in OPSETS:
        raise ExportError(f"opset: expected one of {', '.join(map(str, OPSETS))}; got {opset}")
    if precision not in PRECISIONS:
        raise ExportError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    if verification not in VERIFICATIONS:
        raise ExportError(f"verification: expected one of {', '.join(VERIFICATIONS)}; got {verification!r}")
    if not 0 <= min_agreement <= 1:
        raise ExportError(f"min_agreement: expected a share between 0 and 1; got {min_agreement}")
    _check_cache(model, limits)


def _check_cuda_graph(
    model: LanguageModel | TwoHeadedNetwork, precision: Precision, single_file: SingleFile | bool
) -> None:
    """Refuse to write graphs for CUDA that nothing would run."""
    if not isinstance(model, LanguageModel) or not model.config.vocabulary_head:
        raise ExportError("cuda_graph: expected a language model that generates; this model has no vocabulary head")
    if model.config.network.num_experts is not None:
        raise ExportError(
            "cuda_graph: the loop over this model's experts cannot be captured in a CUDA graph; leave out the option, "
            "and CUDA runs decode"
        )
    if precision in ("int8", "int4"):
        raise ExportError(
            f"cuda_graph: expected fp32, fp16 or bf16; got {precision}, which CUDA does not run: its 8-bit products "
            "have no kernel there"
        )
    if single_file:
        raise ExportError("cuda_graph: a single file has one graph and no others; leave out one of the two options")


def _check_cache(model: LanguageModel | TwoHeadedNetwork, limits: Limits) -> None:
    """Refuse models for which `generate` would be wrong: cached keys whose frequencies change as the row grows."""
    if not isinstance(model, LanguageModel) or not model.config.vocabulary_head:
        return
    scaling = model.config.network.rope_scaling
    if scaling is None or not scaling.depends_on_length:
        return
    if limits.max_tokens > scaling.original_max_positions:
        raise ExportError(
            f"{scaling.kind} rope scaling: the frequencies of a row change beyond {scaling.original_max_positions} "
            "tokens, so the keys that `generate` has cached would be wrong; expected --max-tokens of at most "
            f"{scaling.original_max_positions} for a model with a vocabulary head; got {limits.max_tokens}"
        )


def _manifest(
    config: LanguageModelConfig | NetworkConfig,
    name: str,
    source: str | None,
    precision: Precision,
    scoring: Scoring,
    limits: Limits,
    graphs: dict[str, Graph],
    tokenizer: TextFiles | None,
    text: TextRules,
    parity: list[Parity],
) -> Manifest:
    """Return the manifest before its files are listed and it is sealed."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        seal="",
        name=name,
        source=source,
        kind="language_model" if isinstance(config, LanguageModelConfig) else "network",
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


def _write_manifest(manifest: Manifest, folder: Path) -> Manifest:
    """List the folder's files in the manifest, write the model card and the sealed manifest, and return it."""
    files = {
        path.relative_to(folder).as_posix(): File(sha256=file_digest(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = msgspec.structs.replace(manifest, files=files)
    (folder / CARD).write_text(model_card(manifest), encoding="utf-8")
    (folder / MANIFEST).write_bytes(seal(manifest))
    return manifest


def _tools() -> dict[str, str]:
    names = ["bonnx", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"]
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
