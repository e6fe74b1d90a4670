"""A trained model at every precision: size, time, errors, and whether it still selects what float32 selects.

`python -m benchmarks.real_models MODEL` takes a trained language model (a folder in the format of transformers, or a
GGUF file), trains a scorer for it on its own answers to sums, and exports it at each precision with the command. The
log-probabilities of the model, and of the artifacts' greedy tokens, are compared with those of transformers, which
reads the same files. `--text` compares the float32 artifact's text on 50 chat prompts with transformers'. `--same-as
OTHER` checks first that both files contain the same model. `--precisions` without names exports nothing. The results
are written to MODEL-bonnx/real_models.jsonl, from which an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rates import measure_rates
from benchmarks.record import add_output, record
from bonnx.models import draw_examples, load_checkpoint, save_checkpoint, train_scorer
from bonnx.models.opened import open_checkpoint
from bonnx.runtime.artifact.folder import read_verified
from bonnx.runtime.artifact.manifest import PRECISIONS
from tests.real_text import PROMPTS, compare_log_probs, compare_text, pretrained

ROOT = Path(__file__).resolve().parent.parent


def difference(model: Path, other: Path | None = None) -> float:
    """Return the largest difference of log-probabilities between two files, or from transformers' reading of one."""
    ours = load_checkpoint(model, no_scorer=True)[0]
    if other is None:
        reference = AutoModelForCausalLM.from_pretrained(**pretrained(model), dtype=torch.float32).eval()
    else:
        reference = load_checkpoint(other, no_scorer=True)[0]
    tokenizer, worst = AutoTokenizer.from_pretrained(**pretrained(model)), 0.0
    for text in PROMPTS[:10]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = reference(ids).logits if other is None else reference(ids)[2]
            worst = max(worst, float((ours(ids)[2].log_softmax(-1) - expected.log_softmax(-1)).abs().max()))
    return worst


def make_scorer(source: Path, folder: Path, questions: int, samples: int) -> None:
    """Train a scorer on the model's own answers to sums; a third of them are right or fewer."""
    torch.manual_seed(0)
    rng = random.Random(0)
    opened = open_checkpoint(source)
    model, metadata = load_checkpoint(opened, new_scorer=True)
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer)
    answers: dict[tuple[int, ...], str] = {}
    for _ in range(questions):
        # Examples before the question, so that a model that was not tuned for chat answers it too.
        *shown, (a, b) = [(rng.randrange(2, 20), rng.randrange(2, 20)) for _ in range(5)]
        prompt = tokenizer("".join(f"{x}+{y}={x + y}\n" for x, y in shown) + f"{a}+{b}=")["input_ids"]
        answers[tuple(prompt)] = str(a + b)

    def label(prompt: tuple[int, ...], completion: list[int]) -> float:
        text = tokenizer.decode(completion, skip_special_tokens=True)
        return float(text.partition("\n")[0].strip() == answers[tuple(prompt)])

    stops = metadata["scoring"]["stop_tokens"]
    examples = draw_examples(model, answers, label, n=samples, max_new_tokens=8, stop_tokens=stops)
    losses = train_scorer(model, examples)
    right = np.mean([x[2] for x in examples])
    print(f"{len(examples)} answers, {100 * right:.0f}% right; loss {np.mean(losses[-20:]):.3f}", file=sys.stderr)
    save_checkpoint(model, folder, metadata=metadata, tokenizer_from=source)


def export(checkpoint: Path, output: Path, precision: str, held_out: Path) -> dict[str, Any]:
    """Export with the command, and read its measurements from the manifest."""
    command = [sys.executable, str(ROOT / "export.py"), "--checkpoint", str(checkpoint), "-o", str(output)]
    command += ["--precision", precision, "--overwrite", "--held-out", str(held_out), "--min-agreement", "0"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, Any] = {"precision": precision, "wall_s": wall}
    row["cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        return row | {"refused": done.stderr.strip().splitlines()[-1]}
    manifest = read_verified(output)
    row["mb"] = sum(file.size for file in manifest.files.values()) / 1e6
    row["parity"] = {p.check: [p.max_difference, p.pytorch_error, p.allowed] for p in manifest.parity}
    if manifest.agreement is not None:
        a = manifest.agreement
        row |= {"as_good": a.share, "same": a.same, "mean_error": a.mean_error, "prompts": a.prompts}
    return row


def table(rows: list[dict[str, Any]]) -> None:
    """Print the results as a Markdown table."""
    print("| precision | size, MB | CPU time, s | error of scores: ONNX Runtime / PyTorch |", end="")
    print(" of log-probabilities | log-probabilities beside transformers |", end="")
    print(" as good as float32's choice | the same | mean error of a candidate's score |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "refused" in row:
            print(f"| {row['precision']} | refused: {row['refused']} |")
            continue
        scores, log_probs = (
            row["parity"][f"generate, {kind}"][:2] for kind in ("tokens and scores", "log-probabilities")
        )
        cells = [row["precision"], f"{row['mb']:.0f}", f"{row['cpu_s']:.0f}"]
        cells += [f"{a:.1e} / {b:.1e}" for a, b in (scores, log_probs)]
        cells += [f"{row['from_transformers']:.1e}"]
        agreement = (
            [f"{100 * row['as_good']:.0f}% of {row['prompts']}", f"{100 * row['same']:.0f}%"] if "same" in row else []
        )
        cells += [*agreement, f"{row['mean_error']:.2g}"] if agreement else ["-", "-", "-"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--questions", type=int, default=24, help="questions to train the scorer on (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=8, help="sampled answers per question (default: %(default)s)")
    parser.add_argument("--same-as", type=Path, metavar="OTHER", help="another file of the same model")
    parser.add_argument("--text", action="store_true", help="compare text with transformers' on 50 chat prompts")
    add_output(parser)
    arguments = parser.parse_args()
    print(f"log-probabilities of PyTorch beside transformers: {difference(arguments.model):.1e}")
    if arguments.same_as is not None:
        print(f"beside {arguments.same_as.name}: {difference(arguments.model, arguments.same_as):.1e}")
    if not arguments.precisions:
        return
    work = arguments.model.with_name(arguments.model.name + "-bonnx")
    work.mkdir(exist_ok=True)
    checkpoint, measured = work / "checkpoint", work / "real_models.jsonl"
    if not (checkpoint / "config.json").exists():
        make_scorer(arguments.model, checkpoint, arguments.questions, arguments.samples)
    held_out = work / "prompts.jsonl"
    chat = AutoTokenizer.from_pretrained(**pretrained(arguments.model)).chat_template is not None
    prompts = [[{"role": "user", "content": text}] if chat else text for text in PROMPTS]
    held_out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    lines = measured.read_text(encoding="utf-8").splitlines() if measured.exists() else []
    rows = {row["precision"]: row for row in map(json.loads, lines)}
    for precision in arguments.precisions:
        if precision not in rows:
            row = export(checkpoint, work / precision, precision, held_out)
            if "refused" not in row:
                row["from_transformers"] = compare_log_probs(arguments.model, work / precision)
            rows[precision] = row
            with measured.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[precision]) + "\n")
            figure = {"model": arguments.model.name, **row}
            record("real_models", [figure], rates=measure_rates(os.cpu_count() or 1), path=arguments.output)
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    print(f"{arguments.model.name}, {os.cpu_count()} cores,{model.partition(':')[2] or platform.processor()}\n")
    table([rows[precision] for precision in arguments.precisions])
    if arguments.text:
        print(f"\n{compare_text(arguments.model, work / 'fp32')}")


if __name__ == "__main__":
    main()
