"""What an export takes: processor time, wall time and peak memory, beside the size of the weights.

`python -m benchmarks.export FOLDER` exports Countdown and a random Qwen2 reward model (bfloat16, three shards; the
sizes of Qwen2-0.5B, 494 million parameters), and with `--language-model DIR` also a language model of transformers with
a new scorer, each at every precision and in a process of its own. Checkpoints and artifacts are kept in FOLDER. It
prints a table and appends the figures to the record.

Processor time is user and system time of the process with all of its threads. On Linux the peak of anonymous memory is
read every 20 ms; it does not include files that are mapped. The maximum resident set size does, and libraries too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bonnx.runtime.artifact.folder import WEIGHTS

from .record import add_output, record

PRECISIONS = ["fp32", "fp16", "bf16", "int8", "int4"]
COLUMNS = ["model", "precision", "CPU time, s", "wall time, s", "float32 weights, MB", "anonymous memory, MB"]
COLUMNS += ["resident memory, MB", "artifact, MB", "as good as float32's choice", "mean error of a score"]


def make_reward_model(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=151643,
        num_labels=1,
    )
    model = transformers.Qwen2ForSequenceClassification(config)
    # Scales the scores to order 1, as in a trained model.
    model.score.weight.data *= 2
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400MB")


def add_scorer(folder: Path, source: Path) -> None:
    import torch

    from bonnx.models.checkpoint import load_checkpoint, save_checkpoint
    from bonnx.models.opened import open_checkpoint

    torch.manual_seed(0)
    model, metadata = load_checkpoint(open_checkpoint(source), new_scorer=True)
    save_checkpoint(model, folder, metadata=metadata, tokenizer_from=source)


def apart(call: Callable[..., None], *arguments: Path) -> None:
    """Call a function of this module in a process of its own, so that its memory does not count."""
    values = ", ".join(f"Path({str(value)!r})" for value in arguments)
    code = f"from pathlib import Path\nfrom benchmarks.export import {call.__name__}\n{call.__name__}({values})"
    subprocess.run([sys.executable, "-c", code], check=True)


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; its times in seconds and its peaks in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while not ended.wait(0.02):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            peak[0] = max([peak[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    figures = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "seconds": seconds}
    return figures | {"anonymous_megabytes": peak[0] / 1e3, "resident_megabytes": usage.ru_maxrss / 1e3}


def export(name: str, checkpoint: Path | None, output: Path, precision: str, verify: str) -> dict[str, Any]:
    """Export a model with the command; what it took, and what it selects."""
    command = [sys.executable, "-m", "bonnx", "export", "-o", str(output), "--precision", precision, "--overwrite"]
    command += ["--min-agreement", "0", "--json", "--verify", verify]
    command += [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
    figures: dict[str, Any] = {"model": name, "precision": precision, "verify": verify, **measured(command)}
    manifest = json.loads((output / "manifest.json").read_text())
    figures["artifact_megabytes"] = sum(file["size"] for file in manifest["files"].values()) / 1e6
    if (agreement := manifest["agreement"]) is not None:
        figures |= {"as_good_share": agreement["share"], "mean_error": agreement["mean_error"]}
        figures["prompts"] = agreement["prompts"]
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language-model", type=Path, metavar="DIR", help="also export this one, with a new scorer")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="countdown, 0.5B, or the name of DIR")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--verify", choices=["full", "quick"], default="full")
    add_output(parser)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoints: dict[str, Path | None] = {"countdown": None, "0.5B": arguments.folder / "checkpoint"}
    if arguments.language_model is not None:
        name = arguments.language_model.resolve().name
        checkpoints[name] = arguments.folder / f"{name}-checkpoint"
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    weights = dict[str, float]()
    for name, checkpoint in checkpoints.items():
        if arguments.only and name not in arguments.only:
            continue
        if checkpoint is not None and not (checkpoint / "config.json").is_file():
            made = (checkpoint,) if name == "0.5B" else (checkpoint, arguments.language_model)
            apart(make_reward_model if name == "0.5B" else add_scorer, *made)
        for precision in arguments.precisions:
            figures = export(name, checkpoint, arguments.folder / f"{name}-{precision}", precision, arguments.verify)
            if precision == "fp32":
                weights[name] = (arguments.folder / f"{name}-fp32" / "onnx" / WEIGHTS).stat().st_size / 1e6
            show(figures, weights.get(name))
            record("export", [figures], path=arguments.output)


def show(figures: dict[str, Any], weights: float | None) -> None:
    """Print a row of the table."""
    cells = [figures["model"], figures["precision"], f"{figures['cpu_seconds']:.0f}", f"{figures['seconds']:.0f}"]
    cells += ["" if weights is None else f"{weights:.0f}"]
    cells += [f"{figures[f'{kind}_megabytes']:.0f}" for kind in ("anonymous", "resident", "artifact")]
    if "prompts" in figures:
        cells += [f"{100 * figures['as_good_share']:.0f}% of {figures['prompts']}", f"{figures['mean_error']:.2g}"]
    else:
        cells += ["-", "-"]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
