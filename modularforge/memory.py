"""What a training needs of a GPU's memory, by arithmetic: weights, gradients, moments, activations and logits.

As it is with bf16: master weights of what learns, and of what is frozen unless it stays as it was stored, are float32.
Not counted are the CUDA context, libraries' workspaces and fragments, for which `ROOM` is left. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from modularforge.config import Config
from modularforge.cost import BYTES_FP32, OF_EXPERTS, in_order, sizes_of, trained_parameters
from modularforge.errors import ConfigError
from modularforge.model.sizes import activation_bytes, ffn_parameters, logits_bytes
from modularforge.pipeline import Stage

BYTES_HALF, BYTES_MOMENTS = 2, 8
ROOM = 0.9  # of a GPU's memory, as `training.recompute: auto` has it
MOST_GPUS = 1 << 14
USUAL_NODE = 8  # GPUs of a node where the settings ask for one GPU or none


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `gathered` are others' pieces: what stands around blocks, and two blocks with their gradients;
    `copies` what autocast makes in bf16 of weights that are float32.
    """

    weights: float
    gradients: float
    moments: float
    gathered: float
    copies: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def job_memory(
    config: Config, stage: Stage, gpus: int, parallel: str, shards: int | None = None, recomputes: bool = False
) -> Memory:
    """Of a job of a stage on so many GPUs; `shards` are those over which `hsdp` cuts a weight.

    Blocks are computed again where the settings say so, or `recomputes`.
    """
    assert stage.phase is not None
    phase, model, vocab_size = stage.phase(config), config.model, config.data.vocab_size
    all_weights, learned = sizes_of(config, stage.name).parameters, trained_parameters(config, stage.name)
    if learned < all_weights and (config.experts.kind == "lora" or config.experts.anchored):
        all_weights += learned  # stands beside the backbone's
    count = 1 if parallel == "ddp" else gpus if parallel == "fsdp" else min(shards or gpus, gpus)
    half = keeps_stored(config, stage)
    weights = BYTES_FP32 * learned + (BYTES_HALF if half else BYTES_FP32) * (all_weights - learned)
    tokens = max(1, phase.batch_size // phase.accumulation_steps // gpus) * model.context_length
    recomputes |= config.training.recompute == "blocks"
    block, around = _block(config, all_weights), _around(config)
    is_whole = count == 1 or (parallel == "fsdp" and phase.accumulation_steps > 1)
    learns_around = learned > model.layers * block
    return Memory(
        weights=weights / count,
        gradients=BYTES_FP32 * learned / (1 if is_whole else count),
        moments=BYTES_MOMENTS * learned / count,
        gathered=0.0 if count == 1 else BYTES_FP32 * around * (2 if learns_around else 1) + 2 * block * (2 + 4),
        copies=float(BYTES_HALF * (learned if half else all_weights)) if count == 1 and not recomputes else 0.0,
        activations=float(activation_bytes(model, tokens, BYTES_HALF, recomputes)),
        logits=float(logits_bytes(vocab_size, tokens, "cuda")),
    )


def keeps_stored(config: Config, stage: Stage) -> bool:
    """Whether frozen weights stay in bf16, in which pretrained models are mostly stored."""
    return config.model.pretrained is not None and (
        stage.name in (*OF_EXPERTS, "calibrate") or stage.name.startswith("joint_lora")
    )


def _around(config: Config) -> int:
    """Weights of embedding and head."""
    return config.data.vocab_size * config.model.width * (1 if config.model.tied_head else 2)


def _block(config: Config, all_weights: int) -> int:
    return max((all_weights - _around(config)) // config.model.layers, ffn_parameters(config.model))


def trained_stages(config: Config) -> list[Stage]:
    """The rows whose jobs train, one of each."""
    rows = [stage for stage in in_order(config) if stage.phase is not None]
    return [] if config.task == "speech" else rows


def smallest(config: Config, stage: Stage, room: float) -> tuple[int, str] | None:
    """The fewest GPUs on which a job fits into `room` bytes of each, and how; the batch allows no more than it has.

    Blocks are computed again, which is a third more work, only where it fits in no other way.
    """
    assert stage.phase is not None
    phase = stage.phase(config)
    for recomputes in (False, True):
        for gpus in _counts(phase.batch_size // phase.accumulation_steps):
            for parallel, shards in _ways(config, stage, gpus):
                if job_memory(config, stage, gpus, parallel, shards, recomputes).total <= room:
                    given = [f"training.shard_ranks {shards}"] if parallel == "hsdp" and shards < gpus else []
                    given += ["training.recompute blocks"] if recomputes else []
                    return gpus, " with ".join([parallel, " and ".join(given)] if given else [parallel])
    return None


def _ways(config: Config, stage: Stage, gpus: int) -> list[tuple[str, int]]:
    """The ways in which a job shares its model on so many GPUs, with the GPUs that each weight is cut over.

    `hsdp` cuts over those of a node, if these divide all. It needs less than `fsdp` where a batch is accumulated, and
    more over several nodes; where it needs the same, it is not named.
    """
    if gpus == 1:
        return [("ddp", 1)]
    with_ddp: list[tuple[str, int]] = [] if stage.within else [("ddp", 1)]  # by itself such a job is one process
    asked = getattr(config.cluster, stage.nodes).gpus
    shards = min(config.training.shard_ranks or (asked if asked > 1 else USUAL_NODE), gpus)
    ways = [*with_ddp, ("fsdp", gpus)]
    of_fsdp, of_hsdp = (job_memory(config, stage, gpus, name, shards) for name in ("fsdp", "hsdp"))
    return [*ways, ("hsdp", shards)] if of_hsdp != of_fsdp and gpus % shards == 0 else ways


def _counts(most: int) -> Iterator[int]:
    return (count for count in (1 << power for power in range(MOST_GPUS.bit_length())) if most % count == 0)


def too_large(config: Config, stage: Stage) -> str | None:
    """Why a job cannot run on the GPUs that the launcher asks for, and what would do.

    None where it can, and where `cluster.gpu_memory_gb` does not say how large they are.
    """
    memory, training, nodes = config.cluster.gpu_memory_gb, config.training, getattr(config.cluster, stage.nodes)
    gpus = min(1, nodes.gpus) if training.parallel == "ddp" and stage.within else nodes.nodes * nodes.gpus
    if memory is None or not gpus:
        return None
    shards, again = training.shard_ranks or nodes.gpus, training.recompute == "auto"  # which chooses by what is there
    needed = job_memory(config, stage, gpus, training.parallel, shards, recomputes=again).total
    if needed <= ROOM * memory * 1e9:
        return None
    found = smallest(config, stage, ROOM * memory * 1e9)
    cure = f"{found[1]} on {found[0]} would do" if found else "no number of GPUs that divides its batch would do"
    return (
        f"{stage.name} must fit into {100 * ROOM:.0f} % of cluster.gpu_memory_gb ({memory:g}), but needs about "
        f"{needed / 1e9:.0f} GB on each of {_gpus(gpus)} with training.parallel {training.parallel}; {cure}"
    )


def gpu_counts(text: str) -> list[int]:
    """Numbers of GPUs as `--gpus` has them, `1,8`; raises ConfigError."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",") if text]
    if not all(counts):
        raise ConfigError(f"--gpus must be numbers of 1 or more with commas between, but is {text!r:.40}; write 1,8,64")
    return counts


def memory_table(config: Config, counts: Sequence[int]) -> list[str]:
    """Lines of text: by job, way and number of GPUs, what each GPU needs, and the smallest number that fits."""
    lines = []
    for stage in trained_stages(config):
        assert stage.phase is not None
        phase = stage.phase(config)
        sequences = phase.batch_size // phase.accumulation_steps
        for gpus in counts:
            if sequences % gpus:
                lines.append(
                    f"memory:     {stage.name} on {_gpus(gpus)}: cannot be, as they cannot share its {sequences} "
                    "sequences at a time (batch_size / accumulation_steps) evenly"
                )
                continue
            for parallel, shards in _ways(config, stage, gpus):
                found = job_memory(config, stage, gpus, parallel, shards)
                parts = ", ".join(f"{name} {_gb(value)}" for name, value in found.parts.items() if value)
                way = f"hsdp over {shards}" if parallel == "hsdp" else parallel
                what = f"{stage.name} on {_gpus(gpus)}, {way}"
                lines.append(f"memory:     {what}: {_gb(found.total)} GB each ({parts})")
        lines += _fits(config, stage)
    return lines


def _fits(config: Config, stage: Stage) -> Iterator[str]:
    memory = config.cluster.gpu_memory_gb
    if memory is not None:
        found = smallest(config, stage, ROOM * memory * 1e9)
        what = f"{found[1]} on {_gpus(found[0])}" if found else "no number of GPUs that divides its batch"
        yield f"memory:     {stage.name} fits into {memory:g} GB on: {what}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}" if count < 1e10 else f"{count / 1e9:.0f}"
