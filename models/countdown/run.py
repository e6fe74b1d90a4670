"""A training run that can be stopped and resumed at any time: phases, optimizer, and state on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..network import LanguageModel
from ..scorer import schedule

__all__ = ["Phase", "TrainingRun"]


@dataclass(frozen=True)
class Phase:
    """A number of optimizer steps with the same losses, which are summed, and one learning rate schedule."""

    steps: int
    peak: float
    losses: Callable[[LanguageModel, random.Random], dict[str, Tensor]]


class TrainingRun:
    """The model, its optimizer and the number of steps done, saved in one file from which a run can resume."""

    def __init__(self, folder: Path, seed: int, model: LanguageModel) -> None:
        self.path, self.seed, self.step, self.phase_start = folder / "run.safetensors", seed, 0, 0
        self.model = model.train()
        self.begin_phase()
        if self.path.is_file():
            self._restore()

    def begin_phase(self) -> None:
        """Start a phase with a new optimizer, because its loss and schedule differ."""
        self.phase_start = self.step
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)

    def advance(self, loss: Tensor, rate: float) -> None:
        """Take one optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1

    def follow(self, phases: Sequence[Phase], save_every: int) -> None:
        """Train to the end of the phases, and append a line to `log.jsonl` at every save."""
        total, start = sum(phase.steps for phase in phases), 0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeRemainingColumn()) as progress:
            task = progress.add_task("training", total=total, completed=self.step)
            for phase in phases:
                if self.step == start:
                    self.begin_phase()
                while self.step < start + phase.steps:
                    losses = phase.losses(self.model, random.Random(f"{self.seed} {self.step}"))
                    rate = schedule(self.step - start, phase.steps, phase.peak)
                    self.advance(torch.stack(list(losses.values())).sum(), rate)
                    seen = {name: round(loss.item(), 4) for name, loss in losses.items()}
                    description = " ".join(f"{name} loss {value:.3f}" for name, value in seen.items())
                    progress.update(task, completed=self.step, description=description)
                    if self.step % save_every == 0 or self.step == total:
                        self.save()
                        with self.path.with_name("log.jsonl").open("a", encoding="utf-8") as log:
                            log.write(json.dumps({"step": self.step, **seen}) + "\n")
                start += phase.steps

    def save(self) -> None:
        """Replace the file atomically, so that an incomplete one is never read."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        numbers = {"seed": self.seed, "size": self._size(), "step": self.step, "phase_start": self.phase_start}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        save_file(tensors, partial, metadata={name: str(value) for name, value in numbers.items()})
        partial.replace(self.path)

    def _size(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _restore(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            numbers = {name: int(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if numbers["seed"] != self.seed:
            raise SystemExit(
                f"{self.path} was started with --seed {numbers['seed']}; got --seed {self.seed}: pass the same seed or "
                "another folder"
            )
        if numbers["size"] != self._size():
            raise SystemExit(
                f"{self.path} was started with a model of {numbers['size']} parameters; got one of {self._size()}: "
                "pass the same --size or another folder"
            )
        self.step, self.phase_start = numbers["step"], numbers["phase_start"]
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        for name, parameter in self.model.named_parameters():
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step - self.phase_start)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }
