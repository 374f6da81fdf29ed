"""The block rotation against HF PEFT's OFT layer: error, time and memory of its rotation and of the whole layer.

    python benchmarks/oft.py            # writes results/oft_cpu.json, some minutes
    python benchmarks/oft.py --small    # one small layer, to look at

Forward and backward of one layer, real ``peft.OFTConfig`` models, the base weight frozen.  bf16 is what PEFT does by
default: weights and activations in bf16, the adapter in fp32; "peft bf16" has the adapter in bf16 too.  Every way runs
on the same operands in the same process, turn by turn; times are the best of the turns.  Bytes are counted operation
by operation beside the operands, inside our ops as well (``LiveBytes``); the C++ kernel's panels, about a MiB a thread,
are not seen.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import peft
import torch
from peft import OFTConfig, get_peft_model
from torch import nn

from burnish import block_rotation
from burnish.methods import fuse_oft
from burnish.ops import block_rotation as module
from burnish.ops.live_bytes import LiveBytes
from burnish.reference.block_rotation import block_rotation as reference

RESULTS = Path(__file__).parent / "results" / "oft_cpu.json"
#: Tokens, d and outputs: SmolLM2-135M's q_proj and down_proj, and the q_proj of a model of 7B.
LAYERS = [(4096, 576, 576), (2048, 1536, 576), (1024, 4096, 4096)]
BLOCKS = (16, 32, 64, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Of a generator's entry: a rotation such as fine-tuning makes.
SIZE = 0.01


#: What an op of ours runs, by its registered name.
OPS = {op._qualname: op._init_fn for op in (module._block_rotation, module._block_rotation_backward)}


class Inside(LiveBytes):
    """Live bytes that look inside our ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = OPS.get(func.name())
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Cell:
    """One layer in one dtype, its operands and its ways."""

    def __init__(self, tokens: int, d: int, outputs: int, b: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        inner = nn.Sequential()
        inner.proj = nn.Linear(d, outputs, bias=False, dtype=dtype)
        nn.init.normal_(inner.proj.weight, std=d**-0.5, generator=g)
        model = get_peft_model(inner, OFTConfig(target_modules=["proj"], r=0, oft_block_size=b))
        self.model, self.layer = model, model.base_model.model.proj
        self.rotation = self.layer.oft_R["default"]
        nn.init.normal_(self.rotation.weight, std=SIZE, generator=g)
        self.x, self.dy = (torch.randn(tokens, d, generator=g).to(dtype) for _ in range(2))
        self.up = torch.randn(tokens, outputs, generator=g).to(dtype)
        self.b, self.dtype = b, dtype

    def peft(self, x):
        return self.rotation(x.to(self.rotation.weight.dtype)).to(x.dtype)

    def peft_low(self, x):
        """PEFT with the adapter in bf16: R is made in bf16."""
        real = self.rotation.weight
        self.rotation.weight = nn.Parameter(real.detach().to(self.dtype))
        try:
            return self.rotation(x)
        finally:
            self.low, self.rotation.weight = self.rotation.weight, real

    def ours(self, backend):
        return lambda x: block_rotation(x, self.rotation.weight, backend=backend)

    def rotations(self) -> dict:
        found = {"peft": self.peft, "burnish torch": self.ours("torch"), "burnish": self.ours("host")}
        return found | ({"peft bf16": self.peft_low} if self.dtype != torch.float32 else {})

    def both(self, f, up):
        """y and the gradients of x and of the generator."""
        x, self.low = self.x.detach().requires_grad_(), None
        y = f(x)
        weight = self.rotation.weight if self.low is None else self.low
        return y, *torch.autograd.grad(y, (x, weight), up)

    def base(self, x):
        return self.layer.base_layer(x)

    def errors(self) -> dict[str, float]:
        """The largest relative error of y, dx and the generator's gradient against fp64."""
        x, w = self.x.double().requires_grad_(), self.rotation.weight.detach().double().requires_grad_()
        y = reference(x, w)
        exact = y.detach(), *torch.autograd.grad(y, (x, w), self.dy.double())
        found = {}
        for name, f in self.rotations().items():
            got = [a.detach().double() for a in self.both(f, self.dy)]
            found[name] = max(float((a - e).norm() / e.norm()) for a, e in zip(got, exact, strict=True))
        return found

    def bytes(self, f) -> dict[str, float]:
        """MiB kept between the passes, y aside, and the peak of both, gradients included."""
        x, self.low = self.x.detach().requires_grad_(), None
        with Inside() as counter:
            y = f(x)
            kept = counter.live - y.numel() * y.element_size()
            weight = self.rotation.weight if self.low is None else self.low
            grads = torch.autograd.grad(y, (x, weight), self.dy)
        del grads
        return {"kept_mib": kept / 2**20, "peak_mib": counter.peak / 2**20}


def measure(layer: tuple[int, int, int], b: int, dtype: str, turns: int) -> dict:
    """A row: errors, milliseconds and MiB of each way of the rotation; milliseconds of the whole layer."""
    cell = Cell(*layer, b, DTYPES[dtype])
    ways = cell.rotations()
    row = {"layer": layer, "b": b, "dtype": dtype, "error": cell.errors()}
    row["memory"] = {name: cell.bytes(f) for name, f in ways.items()}
    times: dict[str, float] = {}

    def note(name: str, run) -> None:
        start = time.perf_counter()
        run()
        times[name] = min(times.get(name, float("inf")), 1e3 * (time.perf_counter() - start))

    def base():
        x = cell.x.detach().requires_grad_()
        torch.autograd.grad(cell.base(x), x, cell.up)

    for turn in range(turns):
        for name, f in ways.items():
            note(name, lambda f=f: cell.both(f, cell.dy))
        if turn < max(2, turns // 2):  # products: their times vary less
            note("base layer", base)
            note("peft layer", lambda: cell.both(cell.layer, cell.up))
            with fuse_oft(cell.model):
                note("burnish layer", lambda: cell.both(cell.layer, cell.up))
    row["ms"] = times
    return row


def table(result: dict) -> str:
    """The rows as a table of Markdown."""
    lines = [
        f"{result['machine']}, {result['threads']} thread(s), torch {result['torch']}, peft {result['peft']}; forward "
        "and backward. Error: the largest of y, dx and the generator's gradient against fp64, PEFT / ours. Rotation: "
        "milliseconds of PEFT's, and of ours (torch twin, C++) over it. Layer: time over that of the base layer alone. "
        "Kept: MiB between the passes beside x, the generator and y; peak: MiB of both passes beside the operands.",
        "",
        "| tokens x d -> out | b | | error | PEFT, ms | twin | C++ | PEFT layer | our layer | kept, MiB | peak, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        (n, d, out), ms, memory = row["layer"], row["ms"], row["memory"]

        def pair(values, form):
            return " / ".join(format(v, form) for v in values)

        ours = [memory[name] for name in ("peft", "burnish")]
        lines.append(
            f"| {n} x {d} -> {out} | {row['b']} | {row['dtype']} "
            f"| {pair((row['error'][name] for name in ('peft', 'burnish')), '.1e')} | {ms['peft']:.1f} "
            f"| {ms['burnish torch'] / ms['peft']:.2f} | {ms['burnish'] / ms['peft']:.2f} "
            f"| {ms['peft layer'] / ms['base layer']:.2f} | {ms['burnish layer'] / ms['base layer']:.2f} "
            f"| {pair((m['kept_mib'] for m in ours), '.1f')} | {pair((m['peak_mib'] for m in ours), '.1f')} |"
        )
    low = [row for row in result["rows"] if "peft bf16" in row["error"]]
    if low:
        times = [row["ms"]["burnish"] / row["ms"]["peft bf16"] for row in low]
        errors = [row["error"]["peft bf16"] / row["error"]["burnish"] for row in low]
        lines += ["", (
            f"With PEFT's adapter in bf16 as well (x is not copied, R is made and rounded in bf16): C++ over it "
            f"{min(times):.2f} to {max(times):.2f}, its error {min(errors):.1f} to {max(errors):.1f} times ours."
        )]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="one small layer; writes nothing")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    layers, blocks = ([(64, 96, 32)], (16, 32)) if arguments.small else (LAYERS, BLOCKS)
    rows = []
    for layer in layers:
        for b in blocks:
            if layer[1] % b == 0:
                rows += [measure(layer, b, dtype, arguments.turns) for dtype in DTYPES]
    result = {"machine": f"CPU ({torch.backends.cpu.get_cpu_capability()}), {platform.machine()}",
              "threads": torch.get_num_threads(), "torch": torch.__version__, "peft": peft.__version__,
              "rows": rows}  # fmt: skip
    print(table(result))
    if not arguments.small:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
