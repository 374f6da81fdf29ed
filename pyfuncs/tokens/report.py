r"""What the layers of the latest forward pass did, and the FLOPs it took.

Counted is what selection changes, of all global layers and scenes of the batch: attention, 4 pairs C' (scores and
weighted sum over pairs of query and key, forward, C' = heads times head dimension), the projection to K and V,
4 rows C C', and the probe: its projections and scores, of the sampled heads.  Queries, output projection and MLP are
the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .grid import Layout
from .rule import DENSE
from .scene import Scene, Step


@dataclass(frozen=True)
class LayerReport:
    """Of one global layer.

    ``layer``: its index among the global layers, ``name``: within the trunk; ``kind``: dense, local, stride or frames;
    ``entropy``: H_norm in [0, 1], ``top1``: mean largest weight, both of the dense attention and None where it was
    not probed; ``keys``: that a frame's query sees (a mean where lists differ), of ``all_keys``; ``rows``: of a scene,
    projected to K and V; ``flops`` and ``dense_flops``: of the batch.
    """

    layer: int
    name: str
    kind: str
    entropy: float | None
    top1: float | None
    keys: float
    all_keys: int
    rows: int
    flops: int
    dense_flops: int


@dataclass(frozen=True)
class Report:
    """``layers``: one each; ``layout``: of the scene; ``batch``: B; ``frames``: the selected ones, by scene, in the
    caller's order of frames, None where no one set was chosen.  ``str()`` is the table."""

    layers: tuple[LayerReport, ...]
    layout: Layout
    batch: int
    frames: tuple[tuple[int, ...], ...] | None

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def dense_flops(self) -> int:
        return sum(layer.dense_flops for layer in self.layers)

    @property
    def saved(self) -> float:
        """Share of the dense model's FLOPs, of what is counted, that were not spent."""
        return 1 - self.flops / self.dense_flops

    def __str__(self) -> str:
        layout = self.layout
        head = ("layer", "module", "did", "H_norm", "top-1", "keys", "of", "K/V rows", "FLOP", "dense", "saved")
        lines = [list(head)]
        for x in self.layers:
            lines.append(
                [
                    str(x.layer), x.name, x.kind, "" if x.entropy is None else f"{x.entropy:.3f}",
                    "" if x.top1 is None else f"{x.top1:.2%}", f"{x.keys:,.0f}", f"{x.all_keys:,}", f"{x.rows:,}",
                    in_units(x.flops), in_units(x.dense_flops), f"{1 - x.flops / x.dense_flops:.1%}",
                ]
            )  # fmt: skip
        total = [in_units(self.flops), in_units(self.dense_flops), f"{self.saved:.1%}"]
        lines.append(["", "all", *[""] * 6, *total])
        text = align(lines, left=(1, 2))
        shape = (
            f"{self.batch} x {layout.frames} frames of {layout.tokens} tokens ({layout.special} + {layout.height} x "
            f"{layout.width} + {layout.trailing}), {layout.tail} more"
        )
        note = "FLOP: attention, K and V projection, probe; global layers only"
        out = [shape, text, note]
        if self.frames is not None:
            out += [f"frames of scene {i}: {', '.join(map(str, s))}" for i, s in enumerate(self.frames)]
        return "\n".join(out)


def align(lines: list[list[str]], left: Sequence[int] = ()) -> str:
    """Columns of text, those in ``left`` flush left and the others right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    pads = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    text = ("  ".join(pad(c, w) for pad, c, w in zip(pads, line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in text)


def in_units(flops: int) -> str:
    """A number and MF, GF, TF or PF: 10^6 to 10^15 FLOPs."""
    for unit, size in (("PF", 1e15), ("TF", 1e12), ("GF", 1e9)):
        if flops >= size:
            return f"{flops / size:.{2 if unit == 'PF' else 1}f} {unit}"
    return f"{flops / 1e6:.2f} MF"


def attention_flops(queries: int, keys: float, width: int) -> int:
    """4 Nq Nk C: scores and weighted sum of one attention, forward."""
    return int(4 * queries * keys * width)


def layer_flops(step: Step, layout: Layout) -> tuple[int, int]:
    """(done, dense) FLOPs of one layer and one scene; see the top of this file."""
    rows, length, end, tail = step.rows, layout.length, layout.frames * layout.tokens, layout.tail
    project = 4 * step.width * step.inner  # a row, K and V
    dense = attention_flops(length, length, step.inner) + length * project
    probe = 0
    heads, queries = step.sampled
    if heads:
        d = heads * (step.inner // step.heads)
        made = d if step.plain else 3 * step.inner  # columns of the projections
        probe = 2 * (length + queries) * step.width * made + 2 * queries * length * d
    plan = step.plan
    if plan.kind == DENSE:
        return dense + probe, dense
    done = attention_flops(end, float(step.computed), step.inner) + rows * project + probe
    if tail:
        done += attention_flops(tail, rows, step.inner)  # its queries see what is projected
    if not step.plain and rows < length:  # the whole qkv module ran for the rows, and for all tokens
        done += rows * project // 2 + length * project
    return done, dense


def make(scene: Scene, names: Sequence[str]) -> Report:
    """Of a scene whose forward pass is over; numbers that are on the device are fetched now."""
    layers = []
    for index, step in sorted(scene.steps.items()):
        done, dense = layer_flops(step, scene.layout)
        layers.append(
            LayerReport(
                index, names[index], step.plan.kind, None if step.entropy is None else float(step.entropy),
                None if step.top1 is None else float(step.top1), float(step.keys), scene.layout.length,
                step.rows, done * scene.batch, dense * scene.batch,
            )
        )  # fmt: skip
    chosen = scene.chosen
    if chosen is not None and chosen.ndim == 2:
        if scene.order is not None:
            chosen = scene.order.gather(1, chosen).sort(1).values
        frames = tuple(tuple(row) for row in chosen.tolist())
    else:
        frames = None
    return Report(tuple(layers), scene.layout, scene.batch, frames)
