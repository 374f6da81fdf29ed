"""QK-Restore (arXiv 2606.11052): long-range recall back after chain-of-thought fine-tuning of a hybrid model."""

from .adapters import Dropped, drop_adapters, dropped
from .drift import Drift, drift, principal_angles
from .needle import NeedleGrid, needle_accuracy, needles
from .options import QKRestoreOptions
from .pro import ProPath, nearest_rotation, qk_pro
from .probe import DistanceProbe, DistanceProfile, fit_decay, score_gradient
from .report import Report
from .restore import restore, restore_path, select

__all__ = [
    "DistanceProbe", "DistanceProfile", "Drift", "Dropped", "NeedleGrid", "ProPath", "QKRestoreOptions", "Report",
    "drift", "drop_adapters", "dropped", "fit_decay", "nearest_rotation", "needle_accuracy", "needles",
    "principal_angles", "qk_pro", "restore", "restore_path", "score_gradient", "select",
]  # fmt: skip
