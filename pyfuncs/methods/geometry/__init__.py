"""Geometry of fine-tuning (PEFT-Arena, arXiv 2605.28819): what moved in the weights, and in what the model computes."""

from .intruders import Intruders, intruder_dimensions
from .spectrum import clusters, fluctuation, nuclear_norm, singular_values, spectral_norm
from .weights import average, weight_geometry

__all__ = [
    "Intruders", "average", "clusters", "fluctuation", "intruder_dimensions", "nuclear_norm", "singular_values",
    "spectral_norm", "weight_geometry",
]  # fmt: skip
