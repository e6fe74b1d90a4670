"""Export a reward model with half a billion parameters: size, time, peak memory and agreement at each precision.

`python -m benchmarks.export FOLDER` makes a random Qwen2 reward model in FOLDER with transformers (bfloat16, three
shards; the sizes of Qwen2-0.5B), exports it at each precision with `bonnx export` in a separate process, and prints a
table. Peak memory is the process's maximum resident set size, including libraries and mapped file pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

PRECISIONS = ["fp32", "fp16", "bf16", "int8", "int4"]


def make(folder: Path) -> None:
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    arguments = parser.parse_args()
    checkpoint = arguments.folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from pathlib import Path\nfrom benchmarks.export import make\nmake(Path({str(checkpoint)!r}))",
            ],
            check=True,
        )
    print("| precision | size, MB | time, s | peak memory, MB | as good as float32's choice | mean error of a score |")
    print("|---|---|---|---|---|---|")
    for precision in arguments.precisions:
        output = arguments.folder / precision
        command = [sys.executable, "-m", "bonnx", "export", "--checkpoint", str(checkpoint)]
        command += ["-o", str(output), "--precision", precision, "--overwrite", "--min-agreement", "0", "--json"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"bonnx export --precision {precision} failed with status {status}")
        seconds = time.perf_counter() - start
        manifest = json.loads((output / "manifest.json").read_text())
        size = sum(file["size"] for file in manifest["files"].values())
        agreement = manifest["agreement"]
        quality = (
            "- | -"
            if agreement is None
            else f"{100 * agreement['share']:.0f}% of {agreement['prompts']} | {agreement['mean_error']:.2g}"
        )
        print(
            f"| {precision} | {size / 1e6:.0f} | {seconds:.0f} | {usage.ru_maxrss / 1e3:.0f} | {quality} |", flush=True
        )


if __name__ == "__main__":
    main()
