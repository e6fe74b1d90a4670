"""`bonnx export`: a checkpoint becomes an artifact. Without a checkpoint: the model that ships, and a demonstration."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import get_args

import msgspec

from bonnx.export.artifact import export_model
from bonnx.export.checkpoint.published_rerankers import PUBLISHED
from bonnx.export.checkpoint.source import Checkpoint, Overrides, read_checkpoint
from bonnx.export.demo import demonstrate, draw_prompts, show
from bonnx.export.graphs.trace import DEFAULT_OPSET, OPSETS
from bonnx.export.single_file import SINGLE_FILES
from bonnx.export.staging import check_output
from bonnx.export.triton.repository import check_repository, write_repository
from bonnx.export.verify.agreement import HeldOut, read_held_out
from bonnx.models.countdown import CHECKPOINT
from bonnx.models.hub import download, parse_source
from bonnx.models.opened import OpenedCheckpoint, open_checkpoint
from bonnx.runtime.artifact.manifest import PRECISIONS, VERIFICATIONS, Aggregation, Manifest

from ..errors import InputError
from . import print_json
from .stages import shown_stages

__all__ = ["configure", "run"]

DEFAULT_OUTPUT = Path("artifacts/countdown")
HELD_OUT_PUZZLES = 200


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="folder with config.json and safetensors files, or with a LoRA adapter of peft; a GGUF file; or the id of "
        "one of these on a hub: org/name, org/name@revision or org/name:file.gguf (default: Countdown, the model that "
        "ships)",
    )
    _configure_adapter(parser)
    parser.add_argument("-o", "--output", type=Path, help=f"folder to write (default for Countdown: {DEFAULT_OUTPUT})")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing artifact")
    parser.add_argument("--name", help="name of the model, shown to people (default: the checkpoint folder's)")
    parser.add_argument(
        "--opset", type=int, choices=OPSETS, default=DEFAULT_OPSET, help="ONNX operator set (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="fp16, bf16: weights of half the size; int8: 8-bit products, the fastest on a CPU with VNNI; "
        "int4: 4-bit weights, the smallest (default: fp32, with --single-file int8)",
    )
    parser.add_argument(
        "--single-file",
        nargs="?",
        choices=SINGLE_FILES,
        const=True,
        default=False,
        help="write one graph with the weights inside, for a device or a page: generate (default for a language "
        "model) or rank",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="also write decode_static, which CUDA captures and replays for each token (not measured on a GPU yet)",
    )
    parser.add_argument(
        "--held-out",
        "--calibration",
        type=Path,
        metavar="FILE",
        help="prompts on which fewer bits must select as float32 does: one a line, or a JSON object with 'prompt' "
        "and 'candidates' a line, or for embeddings an .npz file with 'prompts' and 'candidates' (default: built-in "
        "questions, or random tokens if the model reads no text)",
    )
    parser.add_argument(
        "--min-agreement",
        type=float,
        default=0.85,
        help="share of these prompts, 0 to 1, below which export refuses (default: %(default)s)",
    )
    _configure_scoring(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        help="maximum length, in tokens, of prompt and candidate together (default: the checkpoint's)",
    )
    parser.add_argument(
        "--max-candidates", type=int, help="maximum number of candidates of a prompt (default: the checkpoint's)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the verification's random inputs (default: %(default)s)"
    )
    parser.add_argument(
        "--verify",
        choices=VERIFICATIONS,
        default="full",
        help="quick: every kind of check with fewer cases, which the manifest and the model card then say",
    )
    parser.add_argument("--triton", type=Path, metavar="DIR", help="also write a model repository for Triton here")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the arguments and the checkpoint, and write nothing"
    )


def _configure_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="for an adapter: folder or hub id of the model that it was trained on (default: the one in the adapter's "
        "folder, or the one that its adapter_config.json names)",
    )
    parser.add_argument(
        "--adapter", metavar="NAME", help="the adapter in the subfolder of this name, if there are several"
    )


def _configure_scoring(parser: argparse.ArgumentParser) -> None:
    """The options of the scoring rule, where the checkpoint's own is not meant."""
    parser.add_argument(
        "--aggregation",
        choices=get_args(Aggregation),
        help="how the scores of the positions become one (default: the checkpoint's)",
    )
    parser.add_argument(
        "--activation",
        choices=["none", "sigmoid", "softmax"],
        help="applied to every score (default: the checkpoint's)",
    )
    parser.add_argument("--label", help="which of several labels is the score: its name, or its number from 0")
    parser.add_argument(
        "--label-tokens",
        nargs="+",
        metavar="TEXT",
        help="for a language model that answers with a token: the text of the token that means good, then the others; "
        "read at the last token, or at the ends of steps with --step-text",
    )
    parser.add_argument(
        "--head",
        type=Path,
        metavar="FILE",
        help="a JSON file that declares a head which is not recognized: its layers, and where its score is read",
    )
    parser.add_argument("--label-token-ids", nargs="+", type=int, metavar="ID", help="the same tokens by their ids")
    parser.add_argument(
        "--reranker",
        choices=[*PUBLISHED],
        help="how a reranker's makers compute its score and write its text, where neither the hub's id nor the "
        "checkpoint says which it is: Qwen3-Reranker, mxbai-rerank-v2, zerank, ctxl-rerank-v2 or bge-reranker-v2-gemma",
    )
    parser.add_argument(
        "--instruction", help="of a reranker: what makes a document relevant, by default (default: the model's own)"
    )
    parser.add_argument(
        "--no-scorer",
        action="store_true",
        help="export a language model without a scorer: it only generates, and chooses by its own certainty or by "
        "votes",
    )
    parser.add_argument("--step-text", help="the text that ends each step of a candidate")
    parser.add_argument("--step-split", help="where a candidate without it is split into steps")


def run(arguments: argparse.Namespace) -> int:
    """Export, verify, print the parity table; for Countdown also let the artifact solve puzzles."""
    shipped = arguments.checkpoint is None
    if arguments.output is None and not shipped:
        raise InputError("--checkpoint needs -o/--output: the folder to write")
    if arguments.single_file and arguments.triton is not None:
        raise InputError("--single-file and --triton: a repository for Triton needs all graphs; leave out one of them")
    if arguments.precision is None:
        arguments.precision = "int8" if arguments.single_file else "fp32"
    output = _output(arguments)
    check_output(output, overwrite=_overwrites(arguments))
    if arguments.triton is not None:
        check_repository(arguments.triton, output, overwrite=arguments.overwrite)
    opened, name, revision = _open(arguments)
    checkpoint = read_checkpoint(
        opened,
        Overrides(**{name: getattr(arguments, name) for name in Overrides.__annotations__}),
        no_scorer=arguments.no_scorer,
        repository=None if revision is None else revision.partition("@")[0],
    )
    held_out = _held_out(arguments, shipped)
    _describe(checkpoint, checkpoint.source or revision or opened.path)
    if arguments.dry_run:
        print(f"would write {output}{f' and {arguments.triton}' if arguments.triton else ''}", file=sys.stderr)
        return 0
    start = time.perf_counter()
    manifest = _export(arguments, checkpoint, output, name=name, revision=revision, held_out=held_out)
    print(f"wrote {output} and verified it in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    models = None
    if arguments.triton is not None:
        models = write_repository(output, arguments.triton, overwrite=arguments.overwrite)
        print(f"wrote {arguments.triton} for Triton: {', '.join(models)}", file=sys.stderr)
    # It shows what the scorer selects among what was generated.
    demonstrates = shipped and not arguments.no_scorer and "generate" in manifest.graphs
    demonstration = demonstrate(output) if demonstrates else None
    if arguments.json:
        summary: dict[str, object] = {"output": str(output), "parity": msgspec.to_builtins(manifest.parity)}
        summary["agreement"] = msgspec.to_builtins(manifest.agreement)
        summary["remarks"] = checkpoint.remarks
        summary |= {} if models is None else {"triton": models}
        print_json(summary | ({"demonstration": demonstration} if demonstration else {}))
        return 0
    _print_parity(manifest)
    if demonstration:
        show(demonstration)
    return 0


def _overwrites(arguments: argparse.Namespace) -> bool:
    """The demonstration may be run again and again; any other folder is replaced only when asked."""
    return arguments.overwrite or arguments.output is None


def _export(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str,
    revision: str | None,
    held_out: tuple[list[HeldOut], str] | None,
) -> Manifest:
    with shown_stages() as report:
        return export_model(
            checkpoint.model,
            output,
            name=arguments.name or name,
            source=checkpoint.source or revision,
            scoring=checkpoint.scoring,
            limits=checkpoint.limits,
            tokenizer=checkpoint.tokenizer,
            text=checkpoint.text,
            opset=arguments.opset,
            precision=arguments.precision,
            held_out=held_out,
            min_agreement=arguments.min_agreement,
            overwrite=_overwrites(arguments),
            seed=arguments.seed,
            reload=checkpoint.reload,
            verification=arguments.verify,
            single_file=arguments.single_file,
            cuda_graph=arguments.cuda_graph,
            report=report,
        )


def _describe(checkpoint: Checkpoint, source: str | Path) -> None:
    """Print the size of a checkpoint, and what was remarkable in it."""
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    print(f"{source}: {parameters:,} parameters", file=sys.stderr)
    for remark in checkpoint.remarks:
        print(f"note: {remark}", file=sys.stderr)


def _output(arguments: argparse.Namespace) -> Path:
    """The folder to write."""
    suffix = ("" if arguments.precision == "fp32" else f"_{arguments.precision}") + "_no_scorer" * arguments.no_scorer
    suffix += "_single_file" * bool(arguments.single_file)
    output: Path = arguments.output or Path(f"{DEFAULT_OUTPUT}{suffix}")
    return output


def _open(arguments: argparse.Namespace) -> tuple[OpenedCheckpoint, str, str | None]:
    """The checkpoint, a name for people, and for one from a hub its id with the commit."""
    if arguments.checkpoint is None:
        if arguments.base or arguments.adapter:
            raise InputError("--base and --adapter: expected --checkpoint too, the adapter")
        return open_checkpoint(CHECKPOINT), "countdown", None
    source, revision = parse_source(arguments.checkpoint), None
    if isinstance(source, Path):
        folder, name = source, source.resolve().name.removesuffix(".gguf")
    else:
        folder, commit = download(source, arguments.adapter)
        name, revision = source.repo.split("/")[-1], str(dataclasses.replace(source, revision=commit))
    opened = open_checkpoint(folder, base=arguments.base, adapter=arguments.adapter, source=revision)
    return opened, name, revision


def _held_out(arguments: argparse.Namespace, shipped: bool) -> tuple[list[HeldOut], str] | None:
    if arguments.held_out is not None:
        return read_held_out(arguments.held_out), arguments.held_out.name
    if shipped and arguments.precision != "fp32":
        count = HELD_OUT_PUZZLES // 5 if arguments.verify == "quick" else HELD_OUT_PUZZLES
        prompts = draw_prompts("agreement", count)
        return [HeldOut(prompt) for prompt in prompts], "held-out puzzles"
    return None


def _print_parity(manifest: Manifest) -> None:
    at = "" if manifest.precision == "fp32" else f" of the {manifest.precision} weights"
    print(f"\nMaximum error against PyTorch in float64{at}; selected candidates equal in every case:\n")
    print(f"  {'check':<30} {'cases':>5}  {'ONNX Runtime':>12}  {'PyTorch':>8}  allowed")
    for p in manifest.parity:
        allowed = "as NumPy" if p.allowed is None else f"{p.allowed:.1e}"
        print(f"  {p.check:<30} {p.cases:>5}  {p.max_difference:>12.1e}  {p.pytorch_error:>8.1e}  {allowed}")
    if manifest.agreement is not None:
        print(f"\n{manifest.agreement}")
