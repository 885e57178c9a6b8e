"""For those who stay with the Hugging Face Trainer: phases of LoRA and norms of gradients, by the code of our own loop.

Thin adapters for transformers' Trainer and PEFT (extra `transformers`):

    model = get_peft_model(model, create_phased_lora_config("attn->mlp->both"))
    Trainer(model, arguments, callbacks=[DynamicLoRACallback("attn->mlp->both")], …)

Phases are those of `experts.lora.phases`, norms and their files those of `training.gradient_norms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor, nn

from checkpoints import paths
from modularforge.config import LoraConfig
from modularforge.errors import ConfigError
from modularforge.experts.lora.phases import Phase, phase_at, phases_of
from modularforge.mistakes import config_error
from modularforge.norm_files import ROWS_NAME, norms_line
from modularforge.training.gradient_norms import NormLog, NormMeasure, count_layers

try:
    from transformers import Trainer, TrainerCallback
except ImportError as missing:
    raise ConfigError(
        "modularforge.huggingface must have transformers, peft and accelerate, but they are not installed; run "
        "`pip install 'modularforge[transformers]'`"
    ) from missing

if TYPE_CHECKING:
    import peft

NORMS_FOLDER = "gradient_norms"
ADAPTER = "lora_"
Phases = str | Sequence[dict[str, Any]]
"""A name (`attn->mlp->both`, `both->mlp->attn`, `both->mlp->both`, `early->late`), or a list of phases with `until`,
`train` and `layers`."""


class DynamicLoRACallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Lets the adapters of each phase learn in its steps; the others stay as they are, by decay too.

    All adapters must require gradients when training begins, so that they are in the optimizer; a resumed training is
    in the phase of its step. Under DDP, parameters that learn nothing in a phase must be looked for.
    """

    def __init__(self, phases: Phases) -> None:
        self.settings = _settings(phases=phases)
        self.phases: list[Phase] = []
        self.phase: int | None = None
        self._adapters: dict[str, nn.Parameter] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find the adapters and the phases; raises ConfigError where there are none to switch."""
        named = dict(model.named_parameters())
        self._adapters = {name: weight for name, weight in named.items() if ADAPTER in name and ".layers." in name}
        if not self._adapters:
            raise ConfigError(
                "DynamicLoRACallback must have a model with LoRA adapters in its layers, but it has none; make it with "
                "peft.get_peft_model and create_phased_lora_config"
            )
        if args.world_size > 1 and args.ddp_find_unused_parameters is False:
            raise ConfigError(
                "ddp_find_unused_parameters must be true for phases on several processes, but is false; set it"
            )
        self.phases = phases_of(self.settings, state.max_steps, count_layers(named))
        self.phase, ends = None, [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)):
            raise ConfigError(f"phases must end later and later, but end at {ends}; put them in order")
        for number, phase in enumerate(self.phases):
            if not any(phase.trains(name) for name in self._adapters):
                raise ConfigError(
                    f"phases must each train adapters that the model has, but phase {number} trains none; change its "
                    "train or layers, or the model's target_modules"
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switch the adapters where a phase begins."""
        number, phase = phase_at(self.phases, state.global_step)
        if number != self.phase:
            self.phase = number
            for name, weight in self._adapters.items():
                weight.requires_grad_(phase.trains(name))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All adapters may learn again."""
        for weight in self._adapters.values():
            weight.requires_grad_(True)


class GradientNormCallback(TrainerCallback):  # type: ignore[misc]
    """Measures norms every so many steps, into `gradient_norms/` of the Trainer's output (or `folder`).

    The Trainer tells callbacks of gradients after it has clipped them: where it clips, ratios are right and sizes are
    not. `GradientMeasuringTrainer` measures before, as does `max_grad_norm=0`, with which nothing is clipped.
    """

    def __init__(self, every: int = 10, folder: str | None = None) -> None:
        self.every, self.folder = every, folder
        self.log: NormLog | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin the files anew, or go on behind the step that the training goes on from; the first process writes."""
        if not state.is_world_process_zero:
            return
        folder = self.folder or paths.join(args.output_dir, NORMS_FOLDER)
        url = paths.join(folder, ROWS_NAME)
        self.log = NormLog(url, "trainer", norm_measure(model), self.every, state.max_steps, state.global_step)

    def measure(self, step: int) -> None:
        """Measure the gradients of a step (1-based) if it is its turn."""
        if self.log:
            self.log.measure(step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure what the optimizer is about to take."""
        self.measure(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what was measured."""
        if self.log:
            self.log.write()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the tables anew with each checkpoint."""
        if self.log:
            self.log.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the tables."""
        if self.log:
            self.log.flush()
            self.log.close()


class _BeforeClipping(GradientNormCallback):
    """Measures when its Trainer tells it to."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """By now they are clipped."""


class GradientMeasuringTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that measures norms every `norms_every` steps, after backward and before clipping."""

    def __init__(self, *arguments: Any, norms_every: int = 10, norms_folder: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.norms = _BeforeClipping(norms_every, norms_folder)
        self.add_callback(self.norms)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Forward and backward of one piece of a batch; the last piece's gradients are those of the whole batch."""
        loss: Tensor = super().training_step(*arguments, **options)
        if self.accelerator.sync_gradients:
            self.norms.measure(self.state.global_step + 1)
        return loss


def norm_measure(model: nn.Module) -> NormMeasure:
    """What measures the parameters of a model that may learn now; others are no number in all measurements."""
    named = dict(model.named_parameters())
    return NormMeasure({name: weight for name, weight in named.items() if weight.requires_grad}, count_layers(named))


def measure_gradient_norms(model: nn.Module) -> dict[str, Any]:
    """L2 norms of a model's gradients as they are now: by group, `total`, and `layers` by group and layer.

    `nan` where no parameter may learn, 0 where those that may have no gradient.
    """
    measure = norm_measure(model)
    return norms_line(measure.table(measure.squares()))


def create_phased_lora_config(
    phases: Phases, rank: int = 4, alpha: float = 32.0, dropout: float = 0.1, **options: Any
) -> peft.LoraConfig:
    """PEFT's settings for adapters beside all matrices that any of the phases trains; `options` are PEFT's own."""
    groups = {group for phase in phases_of(_settings(phases=phases), 2**31, 2) for group in phase.groups}
    targets = "both" if len(groups) > 1 else next(iter(groups))
    return _peft_config(_settings(phases=phases, targets=targets, rank=rank, alpha=alpha, dropout=dropout), options)


def create_layerwise_lora_config(
    layers: Sequence[int],
    targets: str | list[str] = "both",
    rank: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.1,
    **options: Any,
) -> peft.LoraConfig:
    """PEFT's settings for adapters in these layers (from 0) alone; `targets` as in `experts.lora.targets`."""
    settings = _settings(targets=targets, rank=rank, alpha=alpha, dropout=dropout)
    return _peft_config(settings, {"layers_to_transform": list(layers), "layers_pattern": "layers", **options})


def _settings(**values: Any) -> LoraConfig:
    """`experts.lora` with these values; raises ConfigError."""
    try:
        return LoraConfig(**values)
    except ValidationError as error:
        raise config_error(error, "an adapter's settings (as experts.lora)") from error


def _peft_config(settings: LoraConfig, options: dict[str, Any]) -> peft.LoraConfig:
    import peft

    ours = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": list(settings.modules),
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**{**ours, **options})
