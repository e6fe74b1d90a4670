"""The same chunks on Ray Data: actors rank them, and the driver writes the results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from bonnx.errors import BonnxError

from .source import Chunk
from .worker import ChunkResult, Task, Worker

__all__ = ["on_ray"]


class _Actor:
    """Ranks one chunk after another; its model is loaded once."""

    def __init__(self, task: Task) -> None:
        self._worker = Worker(task)

    def __call__(self, batch: dict[str, NDArray[np.generic]]) -> dict[str, list[object]]:
        chunk = Chunk(**{name: column[0].item() for name, column in batch.items()})
        result = self._worker(chunk)
        return {name: [value] for name, value in asdict(result).items()}


def on_ray(workers: int, cpus: int, gpus: float) -> Callable[[Task, Iterable[Chunk]], Iterator[ChunkResult]]:
    """The argument `work` of `run_batch` for a cluster that `ray.init` has joined.

    Args:
        workers: number of actors, each with its own model.
        cpus: cores of each actor; give its runs as many threads.
        gpus: GPUs of each actor.
    """

    def work(task: Task, chunks: Iterable[Chunk]) -> Iterator[ChunkResult]:
        listed = [asdict(chunk) for chunk in chunks]
        if not listed:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        dataset = ray.data.from_items(listed, override_num_blocks=min(len(listed), max(200, 8 * workers)))
        ranked = dataset.map_batches(
            _Actor,
            fn_constructor_args=(task,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus or None,
            # An actor that dies is restarted and repeats its chunk: each result is written once.
            max_restarts=-1,
            max_task_retries=-1,
        )
        try:
            for row in ranked.iter_rows():
                yield ChunkResult(**row)
        except ray.exceptions.RayError as e:
            raise BonnxError(f"Ray cannot go on: {str(e).strip().splitlines()[-1]:.300}") from e

    return work
