"""Which parameters of an assembled model a calibration may touch, whatever its experts are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from modularforge.config import CalibrationConfig
from modularforge.errors import ConfigError
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.model.lora import adapter_parameters

MATRICES = ("embeddings", "attention", "head")
"""What `calibration.shared` lets learn; norms have a setting of their own."""


def calibrates(model: Decoder, settings: CalibrationConfig) -> dict[str, nn.Parameter]:
    """Norm gains, router rows, shared matrices and adapters of an assembled model, as the settings say."""
    rows = settings.router and model.text_router is None  # which routes in their place
    parts = (*(["norms"] if settings.norms else []), *(MATRICES if settings.shared else []))
    found = {
        name: weight
        for name, weight in model.named_parameters()
        if names.shared_part(name) in parts or (rows and names.is_gate(name))
    }
    found |= adapter_parameters(model) if settings.adapters else {}
    if not found:
        raise ConfigError(
            "calibration must train norms, shared weights, adapters or a router's rows, but the others are false and "
            "the model routes by tables or by nothing; set calibration.norms to true, assembly.token_pairs to 0 (by "
            "which a mixture routes by its rows), or leave calibration out"
        )
    return found


def masks_of(model: Decoder, learns: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Which entries of these may learn, where not all may, as what the evidence router has put into the model.

    Zero gains hide its channels from the head, and must stay so: others would add what the routers read to the logits.
    """
    is_seen_D = model.model.norm.weight.detach() != 0
    masks = {
        name: is_seen_D if name == names.FINAL_NORM else own_entries(name, weight.detach(), is_seen_D)
        for name, weight in learns.items()
        if name == names.FINAL_NORM or names.shared_part(name) in MATRICES
    }
    return {name: mask for name, mask in masks.items() if not mask.all()}


def own_entries(name: str, weight: Tensor, is_seen_D: Tensor) -> Tensor:
    """Which entries of a shared matrix the backbone has too; the evidence router has put the others around them.

    `is_seen_D` says which channels of the residual stream are the backbone's. What a further head reads and writes has
    zeros in all of these.
    """
    if names.attention_part(name) == "o_proj":  # [D, heads]
        return is_seen_D[:, None] & (weight[is_seen_D] != 0).any(dim=0)
    if not names.attention_part(name):  # an entry of the vocabulary may be zero
        return is_seen_D.expand_as(weight)
    return (weight[:, is_seen_D] != 0).any(dim=1)[:, None] & is_seen_D
