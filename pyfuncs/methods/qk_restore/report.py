"""What a restore did, as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from dataclasses import field as default

from .drift import Drift
from .options import QKRestoreOptions


@dataclass
class Report:
    """What was restored.

    layers, field: the layers, and the config's field that chose them.
    tensors: drift of each tensor before the restore; ``bytes_changed`` is what the restore changes.
    bytes: of all weights written; 0 for a dry run.
    notes: what the reader should know, one sentence each.
    """

    options: QKRestoreOptions
    model_type: str
    layers: list[int]
    field: str
    tensors: list[Drift]
    notes: list[str] = default(default_factory=list)
    bytes: int = 0
    out: str | None = None

    @property
    def bytes_changed(self) -> int:
        """Bytes that differ from the fine-tuned checkpoint's."""
        return sum(t.bytes_changed for t in self.tensors)

    def json(self) -> str:
        """Everything, for ``qk_restore.json``."""
        found = {**asdict(self), "bytes_changed": self.bytes_changed}
        for row in found["tensors"]:
            # JSON has no infinity: the drift of what was zero before (a bias)
            row |= {n: None for n in ("relative", "angle") if row[n] is not None and not math.isfinite(row[n])}
        return json.dumps(found, indent=1, default=str, allow_nan=False)

    def __str__(self) -> str:
        o = self.options
        how = f"QK-Pro, lambda {o.lam:g}, convention {o.convention}" if o.mode == "pro" else "restore"
        lines = [
            f"{how}, alpha {o.alpha:g}, parts {'+'.join(o.parts)}",
            f"layers {', '.join(map(str, self.layers))} by {self.field} (model_type {self.model_type or 'unknown'})",
            f"biases {_said(o.include_bias)}, q and k norms {_said(o.include_qk_norm)},"
            f" sliding-window layers {_said(o.include_swa)}",
        ]
        with_angles = any(t.angle is not None for t in self.tensors)
        lines.append("layer  part    drift" + ("   angle" if with_angles else "") + "     changed  tensor")
        for t in self.tensors:
            angle = ""
            if with_angles:
                angle = f"{t.angle:>7.1f}°" if t.angle is not None else " " * 8
            share = f"{t.changed / t.elements:.1%}" if t.elements else "-"
            layer = "-" if t.layer is None else t.layer
            lines.append(f"{layer:>5}  {t.part or '-':<6}{t.relative:>7.4f}{angle}{share:>12}  {t.name}")
        lines.append(f"{self.bytes_changed / 1e6:.3f} MB in {len(self.tensors)} tensors change")
        lines.extend(f"note: {n}" for n in self.notes)
        lines.append(f"written: {self.out} ({self.bytes / 1e6:.1f} MB)" if self.out else "dry run: nothing written")
        return "\n".join(lines)


def _said(value: bool) -> str:
    return "restored" if value else "kept"
