"""Norms of gradients by group and layer, measured while a job trains: after backward, before clipping.

What is measured stays on the device until the next report, as losses do. Gradients are by then summed over the pieces
of an accumulated batch and, by DDP, averaged over ranks, so that rank 0 alone measures; where they lie in pieces, each
rank measures its own, and they add up when lines are written.
"""

# P parameters  G groups  L layers, behind one column for what is in none

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import paths
from modularforge.experts.trainable import Trainable
from modularforge.log import MetricsLog
from modularforge.model.names import MODULE_GROUPS, module_group
from modularforge.model.shards import Total, own_piece
from modularforge.norm_files import Floats, norms_line, norms_url, parse_norms, write_tables
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.sharding import shard_ranks


def count_layers(names: Iterable[str]) -> int:
    """Layers of the model that has parameters of these names."""
    return 1 + max((layer for name in names if (layer := module_group(name)[1]) is not None), default=-1)


class NormMeasure:
    """Sums of squares of the gradients of named parameters, by group and layer."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], layers: int) -> None:
        self._parameters, self._columns = list(parameters.values()), layers + 1
        places = [module_group(name) for name in parameters]
        self._cells = [
            MODULE_GROUPS.index(group) * self._columns + (0 if layer is None else layer + 1) for group, layer in places
        ]
        self._is_missing = np.ones(len(MODULE_GROUPS) * self._columns, dtype=bool)
        self._is_missing[self._cells] = False

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Sums of squares by cell, in float64 on the device; 0 where no parameter of a cell has a gradient.

        Half precision is squared in float32: a sum of many small numbers would stop growing.
        """
        cells = zip(self._cells, self._parameters, strict=True)
        learns = [(cell, own_piece(w.grad)) for cell, w in cells if w.grad is not None]
        if not learns:
            return torch.zeros(len(self._is_missing), dtype=torch.float64)
        device = learns[0][1].device
        norms_P = torch.stack([_norm(gradient).to(device) for _, gradient in learns]).double()
        cells_P = torch.tensor([cell for cell, _ in learns]).to(device, non_blocking=True)
        return norms_P.new_zeros(len(self._is_missing)).index_add_(0, cells_P, norms_P.square())

    def table(self, squares: Tensor) -> Floats:
        """The same here by group and layer [G, 1 + L]: `nan` where no parameter is, `inf` where a gradient is `nan`."""
        found: Floats = np.nan_to_num(squares.cpu().numpy(), nan=math.inf, posinf=math.inf)
        found[self._is_missing] = math.nan
        return found.reshape(len(MODULE_GROUPS), self._columns)


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norm


class NormLog:
    """The norms of one job as JSON lines at `url`, and tables beside them; use on rank 0 only.

    Lines behind `step`, up to which the job is done, are dropped. It measures every so many steps, and at the last.
    Where gradients lie in pieces it is used on every rank, one of which `writes`, and `total` adds up their squares.
    """

    def __init__(
        self,
        url: str,
        job: str,
        measure: NormMeasure,
        every: int,
        last_step: int,
        step: int = 0,
        writes: bool = True,
        total: Total | None = None,
    ) -> None:
        self.url, self.job, self.every, self.last_step = url, job, every, last_step
        self._measure, self._measured, self._total = measure, list[tuple[int, Tensor]](), total
        self._log = MetricsLog(url) if writes else None
        if self._log:
            self._log.restart_after(step)

    def measure(self, step: int) -> None:
        """Measure the gradients of a step (1-based) if it is its turn."""
        if step % self.every == 0 or step == self.last_step:
            self._measured.append((step, self._measure.squares()))

    def write(self) -> None:
        """Write a line for each measurement since the last time."""
        for step, squares in self._measured:
            whole = torch.tensor(self._total(squares.tolist()), dtype=torch.float64) if self._total else squares
            if self._log:
                norms = norms_line(self._measure.table(whole))
                self._log.write(job=self.job, time=round(time.time(), 3), step=step, **norms)
        self._measured.clear()

    def flush(self) -> None:
        """Make lines visible on an object store, and the tables anew."""
        if self._log is None:
            return
        self._log.flush()
        try:
            content = paths.read_bytes(self.url)
        except FileNotFoundError:  # nothing is measured yet
            return
        write_tables(self.url, parse_norms(content))

    def close(self) -> None:
        """Let another process write this job's norms."""
        if self._log:
            self._log.close()


def norm_log(job: Job, trainable: Trainable, world: World, step: int) -> NormLog | None:
    """The log of a job that measures norms; None where it does not, without metrics, and on other ranks than rank 0.

    Where the model lies in pieces, other ranks have one too, which writes nothing.
    """
    every, shards = job.training.gradient_norms, shard_ranks(job.training, world)
    if not every or not job.metrics_url or not (world.is_main or shards > 1):
        return None

    def total(squares: list[float]) -> list[float]:
        """Of all pieces, each of which is on as many ranks as there are groups of them."""
        return [value * shards / world.size for value in world.total(squares)]

    measure = NormMeasure(trainable.parameters, count_layers(name for name, _ in trainable.model.named_parameters()))
    place = norms_url(job.metrics_url), job.name, measure, every, job.end, step
    return NormLog(*place, world.is_main, total if shards > 1 else None)
