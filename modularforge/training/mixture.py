"""All partitions mixed: the very windows that the experts' jobs take, in one shuffled order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from checkpoints import Artifact
from modularforge.artifacts import derived_seed, token_file
from modularforge.config import Config, PhaseConfig
from modularforge.data.loader import mixed_batches
from modularforge.training.distributed import World
from modularforge.training.loop import Batch


def mixed_partitions(
    config: Config, partitions: Artifact, name: str, phase: PhaseConfig, world: World, skipped_windows: int = 0
) -> Callable[[int], Iterator[Batch]]:
    """The batches of a job called `name` from a position on: of each partition as many windows, in the experts' order.

    With a phase of `Config.baseline_phase` they are what all experts see together, no token more or less. Those that
    come after the first `skipped_windows` of each partition are as many as the phase needs.
    """
    experts, context = config.experts, config.model.context_length
    streams = [token_file(partitions, f"partition-{k}").tokens for k in range(experts.count)]
    seeds = [derived_seed(config.seed, "expert order", k) for k in range(experts.count)]
    each, order = -(-phase.steps * phase.batch_size // experts.count), derived_seed(config.seed, f"{name} order")

    def batches_from(position: int) -> Iterator[Batch]:
        place = position, world.rank, world.size, skipped_windows
        return mixed_batches(streams, seeds, each, context, phase.batch_size, order, *place)

    return batches_from
