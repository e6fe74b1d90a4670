"""The compute-optimal policy: the best method and setting for prompts of each difficulty and each budget."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from bonnx.errors import InputError

from ..artifact.decode_json import decode_json
from ..artifact.folder import replace_file
from ..artifact.manifest import Manifest
from ..checks import check_path, check_whole

__all__ = ["Choice", "Policy", "cross_validated", "fit_policy", "quantile_bins", "read_policy"]

_Floats: TypeAlias = NDArray[np.float64]


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A method and its settings."""

    method: str
    options: dict[str, object]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The method for prompts of each difficulty.

    Attributes:
        schema_version: 1.
        name: the model that it was made for.
        artifact: the seal of that model's manifest.
        probe: number of completions whose mean score tells how hard a prompt is.
        thresholds: mean scores that divide the bins, from easy to hard; one fewer than there are bins.
        choices: for each budget, as text, a choice for each bin, the easiest first.
    """

    schema_version: int
    name: str
    artifact: str
    probe: int
    thresholds: list[float]
    choices: dict[str, list[Choice]]

    def bin(self, mean: float) -> int:
        """Bin of a prompt, 0 the easiest; a prompt without a mean score is hard."""
        return sum(not mean >= threshold for threshold in self.thresholds)

    def budget(self, most: int) -> int:
        """The largest budget in the policy that is at most `most`.

        Raises:
            InputError: all its budgets are larger.
        """
        check_whole("budget", most, 1)
        known = sorted(map(int, self.choices))
        if most < known[0]:
            raise InputError(f"budget: expected at least {known[0]}, the smallest in the policy; got {most!r}")
        return max(budget for budget in known if budget <= most)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON."""
        replace_file(Path(path), msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def read_policy(policy: Policy | str | os.PathLike[str], manifest: Manifest) -> Policy:
    """A policy for this artifact.

    Raises:
        InputError: the file cannot be read, is not a policy, or was made for another artifact.
    """
    where = "policy"
    if not isinstance(policy, Policy):
        path = check_path("policy", policy)
        where = f"policy {path}"
        try:
            policy = decode_json(path.read_bytes(), Policy)
        except OSError as e:
            raise InputError(f"{where}: cannot be read: {e.strerror or e}") from e
        except msgspec.MsgspecError as e:
            raise InputError(f"{where}: not a policy as `Policy.save` writes it: {e}") from e
    if policy.schema_version != 1:
        raise InputError(f"{where}: schema_version {policy.schema_version}; this bonnx reads 1")
    if policy.artifact != manifest.seal:
        raise InputError(
            f"{where}: made for another artifact of {policy.name!r} ({policy.artifact[:12]}); this one is "
            f"{manifest.name!r} ({manifest.seal[:12]}); make a policy for it"
        )
    bins = len(policy.thresholds) + 1
    counts = {budget: len(choices) for budget, choices in policy.choices.items()}
    if not counts or policy.probe < 1 or any(count != bins or not key.isdecimal() for key, count in counts.items()):
        raise InputError(f"{where}: expected a probe of at least 1 and {bins} choices for each budget; got {counts}")
    return policy


def quantile_bins(easiness: _Floats, bins: int = 5) -> NDArray[np.int64]:
    """Bins of equal size (n,), 0 the easiest; ties keep their order."""
    order = np.argsort(-easiness, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) * bins // len(order)
    return place


def fit_policy(
    accuracy: Mapping[int, Mapping[str, _Floats]],
    easiness: _Floats,
    settings: Mapping[str, Choice],
    *,
    name: str,
    artifact: str,
    probe: int,
    bins: int = 5,
    tokens: Mapping[int, Mapping[str, _Floats]] | None = None,
) -> Policy:
    """The best setting of each bin and budget (Snell et al., 2024, section 3).

    Args:
        accuracy: for each budget and setting, the share of attempts that solve each prompt (n,), 0 to 1.
        easiness: of each prompt (n,), the mean score of `probe` completions.
        settings: the method and options of each name.
        name: the model.
        artifact: the seal of its manifest.
        probe: number of completions behind each mean score.
        bins: number of bins of difficulty.
        tokens: the cost of each prompt, laid out as `accuracy`: the cheapest of the settings within a point of the
            best is chosen.
    """
    place = quantile_bins(easiness, bins)
    edges = [float((easiness[place == b].min() + easiness[place == b + 1].max()) / 2) for b in range(bins - 1)]
    choices = {
        str(budget): [settings[_best(table, place == b, (tokens or {}).get(budget))] for b in range(bins)]
        for budget, table in accuracy.items()
    }
    return Policy(1, name, artifact, probe, edges, choices)


def cross_validated(
    table: Mapping[str, _Floats],
    place: NDArray[np.int64],
    seed: int = 0,
    tokens: Mapping[str, _Floats] | None = None,
) -> tuple[_Floats, list[str]]:
    """Accuracy (n,) of each prompt under the setting that is best for its bin on the other half of the prompts.

    Args:
        table: for each setting the share of attempts that solve each prompt (n,).
        place: bin of each prompt (n,).
        seed: decides the two halves.
        tokens: as in `fit_policy`, for this budget.

    Returns:
        the accuracies, and the setting that was chosen for each prompt.
    """
    fold = np.random.default_rng(seed).permutation(len(place)) % 2
    accuracy, chosen = np.zeros(len(place)), [""] * len(place)
    for half in (0, 1):
        for b in np.unique(place):
            setting = _best(table, (place == b) & (fold != half), tokens)
            for i in np.flatnonzero((place == b) & (fold == half)):
                accuracy[i], chosen[i] = table[setting][i], setting
    return accuracy, chosen


def _best(table: Mapping[str, _Floats], rows: NDArray[np.bool_], tokens: Mapping[str, _Floats] | None) -> str:
    """The setting that solves the most of some prompts, or the first setting if there are no prompts.

    With `tokens`, the cheapest of the settings within a point of the best.
    """
    if not rows.any():
        return next(iter(table))
    solved = {name: float(values[rows].mean()) for name, values in table.items()}
    most = max(solved.values())
    if tokens is None:
        return next(name for name, value in solved.items() if value == most)
    good = [name for name, value in solved.items() if value >= most - 0.01]
    return min(good, key=lambda name: float(tokens[name][rows].mean()))
