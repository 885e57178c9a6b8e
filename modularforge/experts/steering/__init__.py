"""Experts that are steering vectors within a frozen speech encoder, with the gates that mix them (SteerMoE)."""

from modularforge.experts.kind import Kind

STEERING_NAME = "steering.safetensors"
UTTERANCES_NAME = "utterances.safetensors"
"""Sums like those of the router statistics, over the means of utterances."""
HERE = "modularforge.experts.steering"
STEERING = Kind("steering", "steering", STEERING_NAME, f"{HERE}.training", f"{HERE}.merging")
FROZEN_FACT = "frozen"
"""In the manifests of a projector and of an expert: identities of encoder and language model."""
