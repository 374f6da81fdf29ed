"""Gathered-key attention beside its alternatives, and a whole model with token selection, in one run on the CPU.

    python benchmarks/tokens.py                 # everything, about 15 minutes; also docs/tokens.png
    python benchmarks/tokens.py --part layer    # one global-attention layer: 64 frames of 260 tokens
    python benchmarks/tokens.py --part model    # a whole mini VGGT, 8 to 96 frames
    python benchmarks/tokens.py --device cuda   # the protocol for a GPU: VGGT's shapes, bf16

On a GPU there is a fourth case, one list of whole frames, as in VGGT's later layers.

A layer: N frames of P tokens, H heads of 64, K frames of keys; every way gets the same q, k, v.  Columns: relative
error against fp64 attention over the listed keys alone (of some frames), median seconds of a forward, and of a forward
and backward, useful FLOP/s (those of the listed keys: 4 L M H D forward, 2.5 times that backward), peak bytes beside
the operands.  A way that cannot do a case is a row that says why.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tokens"))  # for the mini model

import torch
import torch.nn.functional as F
from linear_loss import Device
from torch import Tensor

import burnish
from burnish import tokens
from burnish.ops.attention_entropy import attention_entropy
from burnish.ops.selected_attention import selected_attention

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).resolve().parents[1] / "docs" / "tokens.png"


@dataclass
class Layer:
    """One global-attention layer and the lists of a case."""

    case: str
    frames: int
    tokens: int
    q: Tensor
    k: Tensor
    v: Tensor
    lists: Tensor  # (M,), (F, M) or (1, H, M)

    @property
    def useful(self) -> float:
        """FLOPs of a forward over the listed keys."""
        return 4.0 * self.q.shape[1] * self.q.shape[2] * self.lists.shape[-1] * self.q.shape[3]


def strided(special: int, h: int, w: int, stride: int, phase: tuple[int, int] = (0, 0)) -> Tensor:
    ys, xs = torch.arange(phase[0], h, stride), torch.arange(phase[1], w, stride)
    return torch.cat([torch.arange(special), (special + ys[:, None] * w + xs).reshape(-1)])


def layers(device: torch.device, dtype: torch.dtype, *, frames: int, grid: tuple[int, int], heads: int, count: int,
           stride: int):  # fmt: skip
    """The three cases: one set for all (strided), a set a frame (whole frames), a list a head (phases of the grid)."""
    special, (h, w) = 5, grid
    tokens = special + h * w
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, frames * tokens, heads, 64, generator=g).to(dtype).to(device).transpose(1, 2) for _ in range(3)
    )  # fmt: skip
    kept = torch.randperm(frames, generator=g)[:count].sort().values
    shared = (kept[:, None] * tokens + strided(special, h, w, stride)).reshape(-1)
    own = torch.stack([torch.randperm(frames, generator=g)[:count].sort().values for _ in range(frames)])
    by_frame = (own[:, :, None] * tokens + torch.arange(tokens)).reshape(frames, -1)
    phases = [(i // stride % stride, i % stride) for i in range(heads)]
    grids = [strided(special, h, w, stride, p) for p in phases]
    least = min(map(len, grids))  # phases differ by a row: the longest are cut
    by_head = torch.stack([(kept[:, None] * tokens + one[:least]).reshape(-1) for one in grids])[None]
    cases = [("shared", shared), ("frame", by_frame), ("head", by_head)]
    if device.type == "cuda":  # the last two thirds of VGGT's layers
        cases.insert(1, ("shared", (kept[:, None] * tokens + torch.arange(tokens)).reshape(-1)))
    for case, lists in cases:
        yield Layer(case, frames, tokens, q, k, v, lists.int().to(device))


def rows_of(x: Layer) -> Tensor:
    """True where the queries of a frame may look, (1 or H, 1 or F, Lk)."""
    lists = {"shared": lambda: x.lists[None, None], "frame": lambda: x.lists[None], "head": lambda: x.lists[0][:, None]}
    at = lists[x.case]().long()
    return torch.zeros(*at.shape[:2], x.k.shape[2], dtype=torch.bool, device=at.device).scatter_(2, at, True)


def dense(x: Layer) -> Callable:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v)


def masked(x: Layer) -> Callable:
    rows = rows_of(x)
    # (1, 1 or H, 1 or L, Lk): not expanded, since torch makes floats of what it is given
    mask = (rows if rows.shape[1] == 1 else rows.repeat_interleave(x.tokens, 1))[None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def loop(x: Layer) -> Callable:
    """What the method's own code does: a copy of the chosen frames for every query frame."""

    def call(q, k, v):
        out = torch.empty_like(q)
        pieces = []
        for f in range(x.frames):
            place = slice(f * x.tokens, (f + 1) * x.tokens)
            if x.case == "head":
                at = x.lists[0].long()[None, :, :, None].expand(1, -1, -1, 64)
                kk, vv = k.gather(2, at), v.gather(2, at)
            else:
                at = (x.lists if x.case == "shared" else x.lists[f]).long()
                kk, vv = k[:, :, at], v[:, :, at]
            piece = F.scaled_dot_product_attention(q[:, :, place], kk, vv)
            if torch.is_grad_enabled():
                pieces.append(piece)
            else:
                out[:, :, place] = piece
        return torch.cat(pieces, 2) if pieces else out

    return call


def gather(x: Layer) -> Callable:
    """All lists gathered at once, frames as a batch, one call of torch's attention."""

    def call(q, k, v):
        if x.case == "shared":
            at = x.lists.long()
            return F.scaled_dot_product_attention(q, k.index_select(2, at), v.index_select(2, at))
        if x.case == "head":
            at = x.lists[0].long()[None, :, :, None].expand(1, -1, -1, 64)
            return F.scaled_dot_product_attention(q, k.gather(2, at), v.gather(2, at))
        at = x.lists.long().reshape(-1)
        kk, vv = (y[0].index_select(1, at).unflatten(1, (x.frames, -1)).transpose(0, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q[0].unflatten(1, (x.frames, -1)).transpose(0, 1), kk, vv)
        return out.transpose(0, 1).flatten(1, 2)[None]

    return call


def flex(x: Layer) -> Callable:
    """FlexAttention over frames padded to whole blocks of 128; compiled, and what a block holds is masked."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    block = 128
    padded = -(-x.tokens // block) * block
    rows = F.pad(rows_of(x).unflatten(-1, (x.frames, x.tokens)), (0, padded - x.tokens)).flatten(-2)
    by_head, by_frame = rows.shape[0] > 1, rows.shape[1] > 1
    length = x.frames * padded

    def may(b, h, i, j):
        return rows[h if by_head else h * 0, i // padded if by_frame else i * 0, j]

    # not create_block_mask, which forms all L x Lk of it
    some = rows.unflatten(-1, (length // block, block)).any(-1)  # (1 or H, 1 or F, blocks of keys)
    some = some.repeat_interleave(length // block // some.shape[1], 1)[None]
    order = some.int().argsort(dim=-1, descending=True, stable=True).int()
    mask = BlockMask.from_kv_blocks(some.sum(-1, dtype=torch.int32), order, BLOCK_SIZE=block, mask_mod=may)
    compiled = torch.compile(flex_attention)

    def pad(y):
        return F.pad(y.unflatten(2, (x.frames, x.tokens)), (0, 0, 0, padded - x.tokens)).flatten(2, 3)

    def call(q, k, v):
        out = compiled(pad(q), pad(k), pad(v), block_mask=mask)
        return out.unflatten(2, (x.frames, padded))[:, :, :, : x.tokens].flatten(2, 3)

    return call


def ours(x: Layer, **kwargs) -> Callable:
    m = x.lists.shape[-1]
    return lambda q, k, v: selected_attention(q, k, v, x.lists, m, **kwargs)


WAYS: dict[str, Callable[[Layer], Callable]] = {
    "dense": dense, "masked SDPA": masked, "FlexAttention, padded": flex, "loop over frames": loop,
    "gather + SDPA": gather, "burnish": ours, "burnish, entropy": lambda x: ours(x, return_entropy=True),
}  # fmt: skip


def exact(x: Layer, frame: int) -> Tensor:
    """fp64 attention of one frame's queries over its lists, (1, H, P, D)."""
    q, k, v = (y.double() for y in (x.q[:, :, frame * x.tokens : (frame + 1) * x.tokens], x.k, x.v))
    lists = x.lists[0] if x.case == "head" else (x.lists if x.case == "shared" else x.lists[frame])[None]
    at = lists.long()[None, :, :, None].expand(1, q.shape[1], -1, 64)
    return F.scaled_dot_product_attention(q, k.gather(2, at), v.gather(2, at))


def out_of(result) -> Tensor:
    return result if isinstance(result, Tensor) else result.out


def measure(x: Layer, name: str, device: Device, repeats: int, budget: float) -> dict:
    row: dict = {"case": x.case, "way": name, "keys": x.lists.shape[-1]}
    try:
        call = WAYS[name](x)

        def forward():
            with torch.no_grad():
                return call(x.q, x.k, x.v)

        first, row["extra_bytes"], out = once(forward, device)
        out = out_of(out)
        if name != "dense":
            got = torch.cat([out[:, :, f * x.tokens : (f + 1) * x.tokens] for f in (0, x.frames - 1)], 2).double()
            want = torch.cat([exact(x, f) for f in (0, x.frames - 1)], 2)
            row["error"] = float((got - want).norm() / want.norm())
        del out
        row["seconds"] = timed(forward, device, repeats, budget, first)
    except Exception as error:  # what a way cannot do is a result
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    leaves = [y.detach().clone().requires_grad_() for y in (x.q, x.k, x.v)]

    def both():
        for leaf in leaves:
            leaf.grad = None
        result = call(*leaves)
        loss = out_of(result).float().square().mean()
        if not isinstance(result, Tensor):
            loss = loss + result.entropy.mean()
        loss.backward()

    try:
        first, row["both_extra_bytes"], _ = once(both, device)
        row["both_seconds"] = timed(both, device, repeats, budget, first)
    except Exception as error:
        row["both_failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def once(call: Callable, device: Device) -> tuple[float, int | None, object]:
    """The first call: its seconds, its peak bytes, what it returned."""
    kept: list = []
    extra = device.extra_bytes(lambda: kept.extend([time.perf_counter(), call(), device.sync(), time.perf_counter()]))
    return kept[3] - kept[0], extra, kept[1]


def timed(call: Callable, device: Device, repeats: int, budget: float, first: float) -> list[float]:
    """Seconds of up to ``repeats`` calls after the first, within ``budget``; of the first where it used that up."""
    out: list[float] = []
    begin = time.perf_counter()
    while first < budget and len(out) < repeats and time.perf_counter() - begin < budget:
        out.append(device.seconds(call))
    gc.collect()
    return out or [first]


def run_layers(device: Device, options) -> dict:
    cpu = device.kind == "cpu"
    shape = {"frames": 64, "grid": (15, 17), "heads": 16, "count": 8, "stride": 2}
    if not cpu:
        shape = {"frames": 500, "grid": (28, 37), "heads": 16, "count": 25, "stride": 3}
    dtype = torch.float32 if cpu else torch.bfloat16
    rows: list[dict] = []
    dense_seconds = None
    for x in layers(torch.device(device.kind), dtype, **shape):
        ratio = x.lists.shape[-1] / x.k.shape[2]
        print(f"{x.case}: {x.frames} frames of {x.tokens} tokens, {x.lists.shape[-1]} keys a query", flush=True)
        for name in WAYS:
            skipped = options.ways and name not in options.ways
            if skipped or (name == "dense" and dense_seconds is not None):
                continue
            row = measure(x, name, device, options.repeats, options.budget)
            if "seconds" in row:
                flops = 4.0 * x.q.shape[1] * x.q.shape[2] * x.k.shape[2] * 64 if name == "dense" else x.useful
                row["useful_flops"] = flops / statistics.median(row["seconds"])
                if "both_seconds" in row:
                    row["both_useful_flops"] = 3.5 * flops / statistics.median(row["both_seconds"])
                if name == "dense":
                    dense_seconds = statistics.median(row["seconds"])
                elif dense_seconds:
                    row["of_dense_by_flops"] = statistics.median(row["seconds"]) / (dense_seconds * ratio)
            rows.append(row)
            show(row)
        if x.case == "shared" and dense_seconds:
            probe = run_probe(x, device, options, dense_seconds)
        del x
        gc.collect()
    return {"shape": shape, "dtype": str(dtype).split(".")[1], "rows": rows, "probe": probe if dense_seconds else None}


def run_probe(x: Layer, device: Device, options, dense_seconds: float) -> dict:
    """The probe of a layer: 4 heads and 50 queries over all keys."""
    heads = slice(0, None, (x.q.shape[1] - 1) // 3)
    at = torch.linspace(0, x.q.shape[2] - 1, 50, device=x.q.device).long()
    q = x.q[:, heads][:, :, at].contiguous()

    def call():
        return attention_entropy(q, x.k[:, heads], frames=x.frames)

    s = (q.double() @ x.k[:, heads].double().transpose(-1, -2) / 8).log_softmax(-1)
    error = float((call().entropy.double() + (s.exp() * s).sum(-1)).abs().max())
    seconds = timed(call, device, 20, options.budget, 0.0)
    share = statistics.median(seconds) / dense_seconds
    print(f"  probe: {statistics.median(seconds) * 1e3:.1f} ms, {share:.2%} of the dense layer, error {error:.1e} nats")
    return {"seconds": seconds, "of_dense": share, "error": error, "heads": q.shape[1], "queries": q.shape[2]}


def show(row: dict) -> None:
    name = f"  {row['way']:<22}"
    if "failed" in row:
        print(f"{name} failed: {row['failed']}", flush=True)
        return
    error = f"{row['error']:.1e}" if "error" in row else "       "
    line = f"{name}{error}{statistics.median(row['seconds']) * 1e3:>9.0f} ms {row['useful_flops'] / 1e9:>6.0f} GFLOP/s"
    line += "" if row["extra_bytes"] is None else f" {row['extra_bytes'] / 2**20:>6.0f} MiB"
    if "both_seconds" in row:
        line += f"   both {statistics.median(row['both_seconds']) * 1e3:>7.0f} ms"
        line += "" if row["both_extra_bytes"] is None else f" {row['both_extra_bytes'] / 2**20:>6.0f} MiB"
    else:
        line += f"   both: {row['both_failed'][:60]}"
    print(line, flush=True)


def targets(result: dict) -> list[dict]:
    """What issue 5 asks of this run."""
    rows = {(r["case"], r["way"]): r for r in result["rows"] if "seconds" in r}

    def seconds(case, way):
        return statistics.median(rows[case, way]["seconds"])

    def target(name, figure, limit):
        return {"target": name, "figure": figure, "limit": limit, "met": figure <= limit}

    return [
        target("shared: time / (dense x FLOP ratio)", rows["shared", "burnish"]["of_dense_by_flops"], 1.15),
        target(
            "frame lists: time / loop over frames",
            seconds("frame", "burnish") / seconds("frame", "loop over frames"),
            1,
        ),
        target("frame lists: time / masked SDPA", seconds("frame", "burnish") / seconds("frame", "masked SDPA"), 1 / 3),
        target("probe: time / dense layer", result["probe"]["of_dense"], 0.01),
    ]


def run_model(device: Device, options) -> dict:
    """A whole mini VGGT with random weights: dense, the published rule and the adaptive one, over the frames."""
    from mini_models import MiniVGGT, sharpen

    side, patch = (11, 12), 14
    rows = []
    for frames in options.frames:
        g = torch.Generator().manual_seed(frames)
        # a camera that moves along: neighbours look alike, as in a video
        scene = torch.randn(1, 3, patch * side[0], patch * (side[1] + frames), generator=g)
        images = torch.stack([scene[0, :, :, patch * i : patch * (i + side[1])] for i in range(frames)])[None]
        torch.manual_seed(0)
        model = MiniVGGT(dim=192, depth=12, num_heads=3, patch_size=patch, registers=4).eval().to(device.kind)
        for i, block in enumerate(model.aggregator.global_blocks):  # flat attention first, spikes later, as in VGGT
            sharpen(block, 0.6 + 0.3 * i)
        images = images.to(device.kind)

        def forward(model=model, images=images):
            with torch.no_grad():
                return model(images)

        first, _, want = once(forward, device)
        seconds = timed(forward, device, options.repeats, options.budget, first)
        rows.append({"frames": frames, "rule": "dense", "seconds": seconds, "deviation": 0.0})
        for name, rule in (("published", tokens.LayerRule()), ("adaptive", tokens.AdaptiveRule())):
            with tokens.accelerate(model, frames=8, stride=2, rule=rule) as handle:
                first, _, got = once(forward, device)
                seconds = timed(forward, device, options.repeats, options.budget, first)
                layers = handle.report().layers
            rows.append({
                "frames": frames, "rule": name, "seconds": seconds,
                "deviation": float((got - want).norm() / want.norm()),
                "layers": [x.kind for x in layers], "entropy": [x.entropy for x in layers],
            })  # fmt: skip
        if not torch.equal(forward(), want):
            raise SystemExit("the model is not what it was after restore")
        for r in rows[-3:]:
            print(f"  {frames:>3} frames {r['rule']:<10}{statistics.median(r['seconds']):>8.2f} s "
                  f"deviation {r['deviation']:.2e}", flush=True)  # fmt: skip
    return {"tokens": side[0] * side[1] + 5, "dim": 192, "depth": 12, "count": 8, "stride": 2, "rows": rows}


def plot(model: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for rule, colour in (("dense", "#777777"), ("published", "#1f77b4"), ("adaptive", "#d62728")):
        rows = [r for r in model["rows"] if r["rule"] == rule]
        axis.plot(
            [r["frames"] for r in rows], [statistics.median(r["seconds"]) for r in rows], "o-", color=colour, label=rule
        )
    axis.set_xlabel("frames")
    axis.set_ylabel("seconds a forward pass")
    axis.set_title(
        f"mini VGGT, {model['depth']} + {model['depth']} blocks, {model['tokens']} tokens a frame, K = {model['count']}"
    )
    axis.set_ylim(bottom=0)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--part", choices=("layer", "model"), help="only this; the other's figures are kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=15.0, help="seconds for the repeats of one figure")
    parser.add_argument("--ways", nargs="*", choices=tuple(WAYS))
    parser.add_argument("--frames", nargs="*", type=int, default=[8, 16, 32, 48, 64, 96])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = Device(options.device)
    path = RESULTS / f"tokens_{device.name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {
        "device": device.name, "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "burnish": burnish.__version__,
    }  # fmt: skip
    if options.part != "model":
        result["layer"] = run_layers(device, options)
        if not options.ways:
            result["targets"] = targets(result["layer"])
            for t in result["targets"]:
                met = "met" if t["met"] else "missed"
                print(f"target: {met}, {t['target']} {t['figure']:.3f} (limit {t['limit']:.3g})")
    if options.part != "layer":
        result["model"] = run_model(device, options)
        if device.kind == "cpu":
            plot(result["model"], PLOT)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
