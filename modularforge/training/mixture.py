"""All partitions mixed: the very windows that the experts' jobs take, in one shuffled order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from checkpoints import Artifact
from modularforge.artifacts import derived_seed, token_file
from modularforge.config import Config
from modularforge.data.loader import mixed_batches
from modularforge.training.distributed import World
from modularforge.training.loop import Batch


def mixed_partitions(config: Config, partitions: Artifact, name: str, world: World) -> Callable[[int], Iterator[Batch]]:
    """The batches of a job called `name` from a position on: what all experts see together, no token more or less."""
    experts, context, batch_size = config.experts, config.model.context_length, config.joint_phase.batch_size
    streams = [token_file(partitions, f"partition-{k}").tokens for k in range(experts.count)]
    seeds = [derived_seed(config.seed, "expert order", k) for k in range(experts.count)]
    windows, order = experts.steps * experts.batch_size, derived_seed(config.seed, f"{name} order")

    def batches_from(position: int) -> Iterator[Batch]:
        ranks = world.rank, world.size
        return mixed_batches(streams, seeds, windows, context, batch_size, order, position, *ranks)

    return batches_from
