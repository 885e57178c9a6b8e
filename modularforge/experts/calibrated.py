"""Which parameters of an assembled model a calibration may touch, whatever its experts are."""

from __future__ import annotations

from torch import nn

from modularforge.config import CalibrationConfig
from modularforge.errors import ConfigError
from modularforge.model import names
from modularforge.model.backbone import Decoder


def calibrates(model: Decoder, settings: CalibrationConfig) -> dict[str, nn.Parameter]:
    """Norm gains and router rows of an assembled model, as the settings say."""
    rows = settings.router and model.text_router is None  # which routes in their place
    found = {
        name: weight
        for name, weight in model.named_parameters()
        if (settings.norms and names.is_norm(name)) or (rows and names.is_gate(name))
    }
    if not found:
        raise ConfigError(
            "calibration must train norms or a router's rows, but calibration.norms is false and the model routes by "
            "tables or by nothing; set calibration.norms to true, assembly.token_pairs to 0 (by which a mixture routes "
            "by its rows), or leave calibration out"
        )
    if names.FINAL_NORM in found:
        # Zero gains hide the evidence router's channels from the head, and must stay so: others would add what the
        # routers read to the logits.
        is_seen_D = found[names.FINAL_NORM].detach() != 0
        found[names.FINAL_NORM].requires_grad_(True).register_hook(lambda gradient_D: gradient_D * is_seen_D)  # type: ignore[no-untyped-call]
    return found
