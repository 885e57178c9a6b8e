"""Weights, gradients and moments in pieces on the ranks of a job, by torch's `fully_shard` (FSDP2, arXiv 2304.11277).

Each block is gathered for its forward and backward pass and let go behind it; what stands around the blocks, embedding
and head, is gathered once for both. Gradients come back as sums of the ranks' in pieces, so that AdamW sees its own
piece alone. With `hsdp` the pieces are repeated: gradients are summed within a group of ranks in every piece of an
accumulated batch, and between the groups once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints.pieces import Part
from modularforge.config import TrainingConfig
from modularforge.errors import ConfigError
from modularforge.experts.trainable import ParameterGroup, Trainable
from modularforge.model.backbone import Block, Decoder
from modularforge.model.deferred import Deferred, own_rows_of, settle
from modularforge.model.shards import is_sharded, own_piece
from modularforge.ranks import node_size
from modularforge.training.distributed import World
from modularforge.training.optimizer import Trainer
from modularforge.training.precision import is_half


def shard(trainable: Trainable, training: TrainingConfig, world: World) -> Trainable:
    """The same job with its model in pieces, where `training.parallel` asks for that and there are several ranks.

    In either case what learns is float32 behind it, in whatever type it was read, and a model on the meta device gets
    its weights here. What is in pieces stays as it is.
    """
    if is_in_pieces(trainable):
        return trainable
    if training.parallel == "ddp" or world.size == 1:
        _widen(trainable.parameters.values())
        masks = {name: mask.to(world.device) for name, mask in trainable.masks.items()}
        return _settled(replace(trainable, masks=masks), world)
    mesh, names = _mesh(training, world), _names(trainable)
    reduces_in = torch.bfloat16 if training.gradient_exchange == "bf16" else torch.float32
    _fully_shard(trainable, mesh, is_half(training, world.device), reduces_in)
    for module in _sharded_modules(trainable.model):
        # gloo's mean is a sum (pytorch issue 162338), so that the division is done here.
        module.set_force_sum_reduction_for_comms(world.device.type == "cpu")
        module.set_reduce_scatter_unused_params(trainable.may_skip_parameters, recurse=False)
    groups = [replace(group, parameters=_renewed(group, names, trainable.model)) for group in trainable.groups]
    found = _settled(replace(trainable, groups=groups), world)
    masks = {name: _as_piece(mask, found.parameters[name]) for name, mask in trainable.masks.items()}
    return replace(found, masks=masks)


def _settled(trainable: Trainable, world: World) -> Trainable:
    """The same job behind the making of its weights, where that was left until it was known who holds what."""
    if trainable.weights:
        settle(trainable.model, trainable.weights, world.device)
    return replace(trainable, weights={})


def spread(looked_at: Deferred, training: TrainingConfig, world: World) -> Decoder:
    """A model that nothing trains, with its weights as those of a job lie: all ranks must run it alike.

    On a CPU it is looked at in float32, in one piece or in several.
    """
    model = looked_at.model.requires_grad_(False)
    if world.device.type != "cuda":
        training = training.model_copy(update={"precision": "fp32"})
    settled = shard(Trainable(model, _no_loss, [], weights=looked_at.weights), training, world)
    return cast("Decoder", settled.model.to(world.device))


def _no_loss(_model: nn.Module, _tensors: Mapping[str, Tensor]) -> Tensor:
    raise NotImplementedError


def is_in_pieces(trainable: Trainable) -> bool:
    """Whether a job's model lies in pieces on several ranks."""
    return any(map(is_sharded, trainable.model.parameters()))


def _as_piece(whole: Tensor, weight: Any) -> Tensor:
    """This rank's piece of a tensor that all have as a whole, as a weight's lies and where it does."""
    return own_rows_of(whole, weight).to(own_piece(weight).device)


def shard_ranks(training: TrainingConfig, world: World) -> int:
    """Ranks over which a weight is cut into pieces; raises ConfigError where they do not divide the ranks."""
    if training.parallel == "ddp" or world.size == 1:
        return 1
    count = world.size if training.parallel == "fsdp" else training.shard_ranks or node_size()
    if world.size % count:
        raise ConfigError(
            f"training.shard_ranks must divide the {world.size} processes of the job, but is {count}; choose another, "
            "or fsdp"
        )
    return count


def part_of(trainer: Trainer, training: TrainingConfig, world: World) -> Part | None:
    """Which piece this rank has of a job's weights; None where it has all."""
    count = shard_ranks(training, world)
    return Part(world.rank % count, count, trainer.rows) if count > 1 else None


def _mesh(training: TrainingConfig, world: World) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    count = shard_ranks(training, world)
    if training.parallel == "fsdp":
        return init_device_mesh(world.device.type, (count,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // count, count), mesh_dim_names=("replica", "shard"))


def _widen(weights: Iterable[nn.Parameter]) -> None:
    for weight in weights:
        weight.data = weight.data.float()


def _fully_shard(trainable: Trainable, mesh: Any, is_half: bool, reduces_in: torch.dtype) -> None:
    """Cut weights into pieces; blocks are gathered in the type that they compute in.

    Under autocast alone, copies in bf16 of all blocks would stay for the backward pass. So gains of norms in blocks are
    rounded to bf16 too, which with `ddp` they are not; weights that AdamW sees, sums of gradients and what stands
    around blocks are float32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"training.parallel must be ddp with torch {torch.__version__}, whose fully_shard lacks what a mixture "
            "needs; install torch 2.13 or later"
        )
    of_blocks = MixedPrecisionPolicy(torch.bfloat16 if is_half else None, reduces_in, cast_forward_inputs=False)
    around = MixedPrecisionPolicy(reduce_dtype=reduces_in)
    learned = {id(weight) for weight in trainable.parameters.values()}
    for module in _inside_out(trainable.model):
        if isinstance(module, Decoder):
            module.has_half_blocks |= is_half
        whole = [weight for weight in module.parameters() if not is_sharded(weight)]
        _widen(weight for weight in whole if id(weight) in learned)
        fully_shard(module, mesh=mesh, mp_policy=of_blocks if isinstance(module, Block) else around)
        for weight in whole:  # which the groups still name: no rank holds more than one block as a whole
            weight.data = weight.data.new_empty(0)


def _inside_out(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: each block, and then what is left."""
    yield from (module for module in model.modules() if isinstance(module, Block))
    yield model


def _sharded_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


def _names(trainable: Trainable) -> dict[int, str]:
    """Places in the model of its parameters as they are now."""
    return {id(weight): name for name, weight in trainable.model.named_parameters()}


def _renewed(group: ParameterGroup, names: Mapping[int, str], model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(names[id(weight)]) for name, weight in group.parameters.items()}


def exchange_gradients(model: nn.Module, training: TrainingConfig, is_last: bool) -> None:
    """Let a sharded model's next backward pass exchange what it must: all, if it is the last piece of a batch.

    With `fsdp` the pieces before it keep whole gradients, and send nothing; with `hsdp` they are summed within a group
    and kept in pieces.
    """
    modules = _sharded_modules(model)
    if modules and training.parallel == "fsdp":
        modules[0].set_requires_gradient_sync(is_last)
    elif modules:
        modules[0].set_requires_all_reduce(is_last)


def forget_unvisited(trainable: Trainable) -> None:
    """Take the gradients from parameters that no rank's batch reached, as a job of one process has none there.

    FSDP gives them zeros, with which AdamW would let them decay.
    """
    learns = [weight for weight in trainable.parameters.values() if weight.grad is not None]
    if not trainable.may_skip_parameters or not any(map(is_sharded, learns)):
        return
    pieces = [own_piece(weight.grad) for weight in learns if weight.grad is not None]
    reached = torch.stack([piece.count_nonzero() for piece in pieces]).sign()
    dist.all_reduce(reached)
    for weight, count in zip(learns, reached.tolist(), strict=True):
        if not count:
            weight.grad = None


def mask_gradients(trainable: Trainable) -> None:
    """Let only those entries learn that a job's masks let through."""
    for name, mask in trainable.masks.items():
        gradient = trainable.parameters[name].grad
        if gradient is not None:
            own_piece(gradient).mul_(mask)


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over all ranks from one that lies in parts on them."""
    found: Any = norm
    whole: Tensor = found.full_tensor() if is_sharded(norm) else norm
    return whole
