"""Norms of a job's gradients in files: JSON lines, which are the record, two tables in CSV and a summary of them.

They lie beside the job's metrics, in `metrics/gradients/JOB/`. Every line has all groups and layers, so that columns
and rows never shift: a group is `nan` where the job trains nothing of it, and 0 where what it trains is paused.
"""

# S steps  G groups, the total last  L layers

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints import paths
from modularforge.json_lines import MOST, number_of, objects_in
from modularforge.log import json_safe
from modularforge.model.names import MODULE_GROUPS

Floats = npt.NDArray[np.float64]
FOLDER, ROWS_NAME = "gradients", "norms.jsonl"
GROUPS_NAME, LAYERS_NAME, SUMMARY_NAME = "group_norms.csv", "layer_norms.csv", "summary.json"
GROUPS = (*MODULE_GROUPS, "total")
IN_LAYERS = ("attention", "mlp", "other", "total")
"""The groups that a layer has; embedding and head are in none."""
MOST_LAYERS = 10_000  # lines may be of another program


@dataclass(frozen=True)
class Norms:
    """What was measured of one job, by group of `GROUPS`; `nan` where there is nothing of a group."""

    steps_S: Floats
    groups_SG: Floats
    layers_SGL: Floats

    def __len__(self) -> int:
        return len(self.steps_S)

    def group(self, name: str) -> Floats:
        """The norms of a group by step [S]."""
        return self.groups_SG[:, GROUPS.index(name)]

    def layers(self, name: str) -> Floats:
        """The norms of a group by step and layer [S, L]."""
        return self.layers_SGL[:, GROUPS.index(name)]

    @property
    def ratio_S(self) -> Floats:
        """The norm of attention over that of the MLPs by step; `nan` where one of them does not learn."""
        attention_S, mlp_S = self.group("attention"), self.group("mlp")
        both_S = (attention_S > 0) & (mlp_S > 0)
        ratio_S: Floats = np.full(len(self), math.nan)
        ratio_S[both_S] = attention_S[both_S] / mlp_S[both_S]
        return ratio_S


def norms_url(metrics_url: str) -> str:
    """Where the norms of the job with these metrics are written as JSON lines."""
    folder, _, name = metrics_url.rpartition("/")
    return paths.join(folder, FOLDER, name.removesuffix(".jsonl"), ROWS_NAME)


def norms_line(squares_GL: Floats) -> dict[str, Any]:
    """One line's norms, from sums of squares by group of `MODULE_GROUPS`; column 0 is of what is in no layer.

    Those of groups without parameters are `nan`.
    """
    everything_GL = np.vstack([squares_GL, _sums(squares_GL, axis=0)[None]])
    groups_G, layers_GL = np.sqrt(_sums(everything_GL, axis=1)), np.sqrt(everything_GL[:, 1:])
    norms = {name: _rounded(value) for name, value in zip(GROUPS, groups_G, strict=True)}
    layers = {name: [_rounded(value) for value in layers_GL[GROUPS.index(name)]] for name in IN_LAYERS}
    return {**norms, "layers": layers}


def _sums(values: Floats, axis: int) -> Floats:
    """Sums of what is there; `nan` where nothing is."""
    missing = np.isnan(values).all(axis=axis)
    return np.where(missing, math.nan, np.nansum(values, axis=axis))


def _rounded(value: float) -> float:
    """Seven digits, which is what float32 has."""
    return float(f"{value:.7g}")


def parse_norms(content: bytes) -> Norms:
    """Norms from JSON lines; what is no line of ours is passed over, and of two with one step the later one counts."""
    rows: dict[float, Mapping[str, Any]] = {}
    for row in objects_in(content)[0]:
        step = number_of(row.get("step"))
        if step is not None and 0 <= step <= MOST and isinstance(row.get("layers"), dict):
            rows[step] = row
    steps = sorted(rows)
    layers = min(MOST_LAYERS, max((_depth(rows[step]) for step in steps), default=0))
    groups_SG = np.array([[_value(rows[step].get(name)) for name in GROUPS] for step in steps])
    layers_SGL = np.full((len(steps), len(GROUPS), layers), math.nan)
    for place, step in enumerate(steps):
        for name in IN_LAYERS:
            found = _list(rows[step]["layers"].get(name))[:layers]
            layers_SGL[place, GROUPS.index(name), : len(found)] = [_value(value) for value in found]
    return Norms(np.array(steps, dtype=float), groups_SG.reshape(len(steps), len(GROUPS)), layers_SGL)


def _depth(row: Mapping[str, Any]) -> int:
    return max((len(_list(found)) for found in row["layers"].values()), default=0)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _value(value: Any) -> float:
    number = number_of(value)
    return math.nan if number is None else number


def write_tables(url: str, norms: Norms) -> None:
    """Write both tables and the summary beside the lines at `url`."""
    folder = url.rpartition("/")[0]
    content = json.dumps(json_safe(summary(norms)), indent=1, allow_nan=False) + "\n"
    for name, text in (
        (GROUPS_NAME, group_table(norms)),
        (LAYERS_NAME, layer_table(norms)),
        (SUMMARY_NAME, content),
    ):
        paths.replace_bytes(paths.join(folder, name), text.encode())


def group_table(norms: Norms) -> str:
    """CSV: step, a column for each group, and the ratio of attention to MLP."""
    rows = zip(norms.steps_S, norms.groups_SG, norms.ratio_S, strict=True)
    return _csv(["step", *GROUPS, "attention_to_mlp"], [[int(step), *row, ratio] for step, row, ratio in rows])


def layer_table(norms: Norms) -> str:
    """CSV: a line for each step and layer, with a column for each group."""
    columns = [GROUPS.index(name) for name in IN_LAYERS]
    rows = [
        [int(step), layer, *layers_GL[columns, layer]]
        for step, layers_GL in zip(norms.steps_S, norms.layers_SGL, strict=True)
        for layer in range(layers_GL.shape[1])
    ]
    return _csv(["step", "layer", *IN_LAYERS], rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[f"{value:.7g}" if isinstance(value, float) else value for value in row] for row in rows])
    return out.getvalue()


def summary(norms: Norms) -> dict[str, Any]:
    """What the tables come to: each group over the steps at which it learned, and each layer's mean."""
    return {
        "measurements": len(norms),
        "first_step": int(norms.steps_S[0]) if len(norms) else None,
        "last_step": int(norms.steps_S[-1]) if len(norms) else None,
        "groups": {name: _statistics(norms.steps_S, norms.group(name)) for name in GROUPS},
        "attention_to_mlp": _statistics(norms.steps_S, norms.ratio_S),
        "layers": {name: mean_of_learning(norms.layers(name)).tolist() for name in IN_LAYERS},
    }


def _statistics(steps_S: Floats, values_S: Floats) -> dict[str, Any] | None:
    """Of the steps at which a group learned; None where it never did."""
    learned = values_S > 0
    if not learned.any():
        return None
    steps, values = steps_S[learned], values_S[learned]
    ends = {"first": float(values[0]), "last": float(values[-1]), "mean": float(values.mean())}
    extremes = {"least": float(values.min()), "most": float(values.max()), "most_at_step": int(steps[values.argmax()])}
    return {"measurements": int(learned.sum()), **ends, **extremes}


def mean_of_learning(values_SL: Floats) -> Floats:
    """Each layer's mean over the steps at which it learned [L]; `nan` where it never did."""
    learned_SL = values_SL > 0
    counts_L = learned_SL.sum(axis=0)
    sums_L = np.where(learned_SL, values_SL, 0.0).sum(axis=0)
    means_L: Floats = np.full(values_SL.shape[1], math.nan)
    means_L[counts_L > 0] = sums_L[counts_L > 0] / counts_L[counts_L > 0]
    return means_L
