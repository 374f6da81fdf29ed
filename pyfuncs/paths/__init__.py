"""Weight paths: theta(t) between a model before and after training, selectors from its config, shards streamed."""

from .adapters import Adapter, LoRAScale, OFTGenerator, cayley_neumann, equalised, read_adapter, split_model
from .distance import Distance, distance
from .frontier import Scored, best_sum, best_target, dominates, furthest, hypervolume, pareto_front, retention_at
from .kinds import LayerKinds, as_config, layer_count, layer_kinds
from .layers import Stack, find_stack
from .output import atomic_directory
from .path import Additive, PathPoint, Point, WeightPath
from .save import Saved, save
from .selectors import Attention, Selection, Selector, attention, attention_sizes, everything, whole_layers
from .sweep import Choice, Evaluator, choose, score, sweep
from .tensors import Checkpoint, StateDict, Tensors, as_tensors

__all__ = [
    "Adapter", "Additive", "Attention", "Checkpoint", "Choice", "Distance", "Evaluator", "LayerKinds", "LoRAScale",
    "OFTGenerator", "PathPoint", "Point", "Saved", "Scored", "Selection", "Selector", "Stack", "StateDict", "Tensors",
    "WeightPath", "as_config", "as_tensors", "atomic_directory", "attention", "attention_sizes", "best_sum",
    "best_target", "cayley_neumann", "choose", "distance", "dominates", "equalised", "everything", "find_stack",
    "furthest", "hypervolume", "layer_count", "layer_kinds", "pareto_front", "read_adapter", "retention_at", "save",
    "score", "split_model", "sweep", "whole_layers",
]  # fmt: skip
