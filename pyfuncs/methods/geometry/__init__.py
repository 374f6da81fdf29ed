"""Geometry of fine-tuning (PEFT-Arena, arXiv 2605.28819): what moved in the weights, and in what the model computes."""

from .activations import activation_geometry
from .capability import InputMoments, capability_drift, input_moments
from .intruders import Intruders, intruder_dimensions
from .spectrum import clusters, fluctuation, nuclear_norm, singular_values, spectral_norm
from .weights import average, weight_geometry

__all__ = [
    "InputMoments", "Intruders", "activation_geometry", "average", "capability_drift", "clusters", "fluctuation",
    "input_moments", "intruder_dimensions", "nuclear_norm", "singular_values", "spectral_norm", "weight_geometry",
]  # fmt: skip
