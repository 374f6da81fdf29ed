"""``burnish tokens cost``: the FLOPs of a model against the number of frames, dense and with selection."""

from __future__ import annotations

from dataclasses import replace

from ..tokens.cost import SHAPES, cost, quoted_table, table
from ..tokens.rule import LayerRule

#: Flags that replace a field of the model's shape.
FIELDS = {
    "channels": "width", "global_layers": "global_layers", "frame_layers": "frame_layers",
    "encoder_layers": "encoder_layers", "special": "special", "patch": "patch",
}  # fmt: skip


def report(
    model: str, frames: str, height: int, width: int, keep: int, stride: int, local: int, sample: int,
    edge: str = "ceil", **shape: int | None,
) -> str:  # fmt: skip
    """What the command prints.  ``frames``: numbers with commas between; ``shape``: of FIELDS, None as the model has
    it.  ValueError for what is out of range."""
    try:
        counts = [int(part) for part in frames.split(",")]
    except ValueError:
        raise ValueError(f"--frames must be whole numbers with commas between; got {frames!r}") from None
    given = {FIELDS[name]: value for name, value in shape.items() if value is not None}
    kind = replace(SHAPES[model], **given)
    rule = LayerRule(local, sample)
    costs = [cost(kind, n, height, width, keep=keep, stride=stride, rule=rule, edge=edge) for n in counts]
    published = model == "vggt" and not given and (keep, stride, local, sample) == (25, 3, 2, 9)
    rows, columns = height // kind.patch, width // kind.patch
    lines = [
        f"{model}: {kind.special} + {rows} x {columns} tokens a frame, {kind.global_layers} global layers of width "
        f"{kind.width}; K = {keep}, stride {stride}, local {local}, sample {sample}; forward FLOPs, multiply-add = 2",
        table(costs, published),
    ]
    if published:
        lines += [
            "", "seconds: arXiv 2605.23892, table 7, one NVIDIA L40S; quoted, not reproduced, and the authors' own",
            quoted_table(),
        ]  # fmt: skip
    return "\n".join(lines)
