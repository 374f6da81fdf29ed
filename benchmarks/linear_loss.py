"""The fused LM-head loss beside everybody else's and the bare GEMMs, in one run.

    python benchmarks/linear_loss.py [--quick] [--resume] [--shapes 1024,576,49152 ...] [--dtypes float32 bfloat16]
        [--objectives nll ...] [--ways torch burnish_host ...] [--repeats 5] [--cap 20] [--device cuda]

A cell is (shape, dtype, objective).  For each way (benchmarks/peers.py): the relative error of dX and dW against fp64
first; the extra peak memory of forward and backward; the median time, and its ratio to the floor.

* floor: the products alone, of the same order, in chunks of the rows we use (1024 on a CPU with tile registers):
  logits, dX, dW +=, and the teacher's logits.  In low precision the faster of native products and fp32 products of
  operands cast up once, cast included.
  floor_recompute: the logits' products twice, for ways that recompute them.
* Rounds are interleaved, so that a machine whose speed drifts treats all alike; ratios are of one run.
* A way that a probe with few rows predicts to take longer than ``--cap`` seconds a call is timed at fewer rows, and
  the floor and burnish are timed again at those rows, in the same rounds.  Column "rows" says how many.
* Extra memory on a CPU is the process's: its peak resident size (VmHWM, reset before the call) less its resident
  size before, after a warm-up call and with free heap given back, less the bytes of dX and dW.  It sees compiled code,
  C++ and the scratch of the BLAS, which no counter of tensors does.  On a GPU: torch's own peak, likewise.

Writes benchmarks/results/linear_loss_<device>.json after every cell; --resume skips the cells that are there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from peers import CHAIN, OBJECTIVES, POLICY, Problem, Way, exact, has_teacher, our_ways, peer_ways, problem

import burnish
from burnish.kernels import dispatch, gemm_host
from burnish.ops import gemm
from burnish.ops.geometry import TILE_ROWS, default_rows

SHAPES = ["1024,576,49152", "4096,576,49152", "2048,1536,151936"]
QUICK = ("nll", "dft", "target_sft")
LOSSES = tuple(name for name in OBJECTIVES if name not in POLICY + CHAIN)
#: FLOPs of the fp64 reference, which fix the rows that errors are measured on.
ERROR_FLOPS = 1.2e11
FIRST_PROBE = 32


class Device:
    """What differs between a CPU and a GPU when one measures."""

    def __init__(self, kind: str):
        self.kind = kind
        cuda = kind == "cuda"
        self.sync: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
        self.name = torch.cuda.get_device_name().replace(" ", "_").lower() if cuda else "cpu"
        if not cuda and gemm_host.supported():
            self.name = "cpu_amx"  # products of bf16 are four times as fast there: another table

    def seconds(self, call: Callable[[], object]) -> float:
        self.sync()
        begin = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - begin

    def extra_bytes(self, call: Callable[[], object]) -> int | None:
        """Peak memory of a call beside what there was; None where the system does not tell."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
            before = _status("VmRSS")
            call()
            return _status("VmHWM") - before
        except (OSError, AttributeError):
            return None

    def free_bytes(self) -> int:
        if self.kind == "cuda":
            return torch.cuda.mem_get_info()[0]
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) << 10


def floor_call(p: Problem, native: bool, teacher: bool, logits: int) -> Callable[[], object]:
    """The bare products, in our chunks.  ``native``: in the operands' dtype; else in fp32 of operands cast up once.

    ``logits``: how often the logits' products are made, 1 or 2.
    """
    low, cuda = p.weight.dtype != torch.float32, p.weight.device.type == "cuda"
    n, v = p.hidden.shape[0], p.weight.shape[0]
    kernels = dispatch.resolve("auto", p.weight.device)
    how = gemm.mode(p.weight.dtype, p.weight.dtype, p.weight.device, torch.float32, kernels)
    chunk = default_rows(n, how, p.weight.device.type, teacher=teacher)
    if how == "mixed" and not cuda:
        chunk = TILE_ROWS["cpu"]
    mixed = {"out_dtype": torch.float32} if low and native and cuda else {}

    def call() -> None:
        kind = p.weight.dtype if native else torch.float32
        x, w, tx, tw = (a.to(kind) for a in (p.hidden, p.weight, p.t_hidden, p.t_weight if teacher else p.weight[:0]))
        out = torch.float32 if mixed else kind
        dw = torch.empty(w.shape, dtype=out, device=w.device)
        dx = torch.empty(x.shape, dtype=out, device=w.device)
        tile = torch.empty(min(chunk, n), v, dtype=out, device=w.device)
        # what stands for the gradient of the logits has the operands' dtype
        dz = torch.zeros_like(tile, dtype=kind) if mixed else tile
        second = torch.empty_like(tile) if teacher else tile
        for start in range(0, n, chunk):
            part = x[start : start + chunk]
            z, d = tile[: len(part)], dz[: len(part)]
            for _ in range(logits):
                torch.mm(part, w.t(), out=z, **mixed)
                if teacher:
                    torch.mm(tx[start : start + chunk], tw.t(), out=second[: len(part)], **mixed)
            torch.mm(d, w, out=dx[start : start + chunk], **mixed)
            if start:
                torch.addmm(dw, d.t(), part, out=dw, **mixed)
            else:
                torch.mm(d.t(), part, out=dw, **mixed)

    return call


def step_call(way: Way, objective: str, p: Problem) -> Callable[[], object]:
    """One forward and backward."""

    def call() -> None:
        q = p.trainable()
        way.loss(objective, q).backward()

    return call


def power_of_two(rows: float) -> int:
    return 1 << max(4, int(rows).bit_length() - 1)


def affordable(call_at: Callable[[int], Callable[[], object]], n: int, cap: float, device: Device) -> tuple[int, float]:
    """Rows that take at most ``cap`` seconds a call, all n or a power of two, and the seconds that all would take.

    A call costs a constant (dW is written however few rows there are) and so much a row, read off the last two probes;
    probes grow only while they stay cheap, since with few rows every product is slower a row than it will be.
    """
    before, rows = min(n, 8), min(n, FIRST_PROBE)
    call_at(before)()  # warm
    last, seconds = device.seconds(call_at(before)), device.seconds(call_at(rows))
    while True:
        each = max(seconds - last, 0.0) / max(1, rows - before)
        whole = seconds + each * (n - rows)
        following = min(n, 4 * rows)
        if rows == n or seconds + each * (following - rows) > cap / 2:
            break
        before, last, rows = rows, seconds, following
        seconds = device.seconds(call_at(rows))
    if whole <= cap:
        return n, whole
    return min(n, power_of_two(rows + (cap - seconds) / each if each else rows)), whole


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


class Cell:
    """All ways of one objective on one problem."""

    def __init__(self, p: Problem, objective: str, ways: list[Way], device: Device, options: argparse.Namespace):
        self.p, self.objective, self.device, self.options = p, objective, device, options
        self.n, self.h, self.v = *p.hidden.shape, p.weight.shape[0]
        self.low = p.weight.dtype != torch.float32
        dtype = p.weight.dtype
        self.ways = {w.name: w for w in ways if objective in w.objectives and (not w.dtypes or dtype in w.dtypes)}
        self.failed: dict[str, str] = {}
        self.references: dict[int, tuple] = {}

    def call(self, name: str, rows: int) -> Callable[[], object]:
        part = self.p.rows(rows)
        if name.startswith("floor"):
            logits = 2 if name == "floor_recompute" else 1
            return floor_call(part, self.native, has_teacher(self.objective), logits)
        return step_call(self.ways[name], self.objective, part)

    def choose_floor(self) -> dict:
        """In low precision: which of native and cast-up products are faster, from a few rows."""
        self.native = True
        if not self.low or self.device.kind == "cuda":
            return {}
        part, speed = self.p.rows(min(self.n, FIRST_PROBE)), {}
        # the cast is done once however many rows there are: left out of the probe, in the floor
        for kind in (self.p.weight.dtype, torch.float32):
            z = part.to(kind)
            call = floor_call(z, True, False, 1)
            floor_call(z.rows(8), True, False, 1)()  # warm
            speed[str(kind).split(".")[1]] = len(z.target) / self.device.seconds(call)
            del z
        self.native = speed[str(self.p.weight.dtype).split(".")[1]] > speed["float32"]
        return {"floor_rows_per_second": speed, "floor_products": "native" if self.native else "float32"}

    def plan(self) -> dict[str, int]:
        """Rows that each way is timed at."""
        cap, rows, self.whole = self.options.cap, {}, {}
        memory = self.device.free_bytes() / 2
        for name, way in self.ways.items():
            if way.proxy in self.whole:
                rows[name], self.whole[name] = rows[way.proxy], self.whole[way.proxy]
                continue
            try:
                rows[name], self.whole[name] = affordable(lambda r, n=name: self.call(n, r), self.n, cap, self.device)
            except Exception as error:  # a peer that cannot do this is a result, not the end of the run
                self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if not way.bounded:  # ten buffers of whole logits, at worst
                rows[name] = min(rows[name], self.n if 40 * self.n * self.v <= memory else
                                 power_of_two(memory / 40 / self.v))  # fmt: skip
        ours = [rows[n] for n in rows if self.ways[n].ours]
        most = max(ours) if ours else self.n
        return {name: min(r, most) for name, r in rows.items()}

    def error(self, name: str, rows: int) -> dict:
        limit = power_of_two(min(self.n, ERROR_FLOPS / (6 * self.h * self.v)))
        rows = min(rows, limit)
        if rows not in self.references:
            self.references[rows] = exact(self.objective, self.p.rows(rows))
        _, dx, dw = self.references[rows]
        q = self.p.rows(rows).trainable()
        self.ways[name].loss(self.objective, q).backward()
        return {"error_rows": rows, "dx_error": relative(q.hidden.grad, dx), "dw_error": relative(q.weight.grad, dw)}

    def memory(self, name: str, rows: int) -> dict:
        way = self.ways[name]
        fits = way.bounded or 40 * self.n * self.v < self.device.free_bytes() / 2
        if fits and self.whole[name] <= self.options.memory_seconds:
            rows = self.n
        call = self.call(name, rows)
        if way.proxy:  # compiling is not running
            call()
        part = self.p.rows(rows)
        gradients = sum(x.numel() * x.element_size() for x in (part.hidden, part.weight))
        extra = self.device.extra_bytes(call)
        return {"memory_rows": rows, "extra_bytes": None if extra is None else extra - gradients}

    def attempt(self, name: str, function: Callable[[], dict]) -> dict:
        try:
            return function()
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return {}

    def measure(self) -> dict:
        torch._dynamo.reset()
        notes = self.choose_floor()
        plan = self.plan()
        facts = {name: self.attempt(name, lambda n=name, r=r: self.error(n, r)) for name, r in plan.items()}
        self.references.clear()
        recompute = any(self.ways[n].recompute for n in plan)
        floors = ["floor", "floor_recompute"] if recompute else ["floor"]
        # a group of ways is timed at the same rows, with the floor and ours
        groups: dict[int, list[str]] = {}
        for name, rows in plan.items():
            groups.setdefault(rows, []).append(name)
        # ours once more at the rows of those that take too long: one backend, the one a user gets
        best = next((n for n in plan if self.ways[n].ours), None)
        out = []
        for rows, names in sorted(groups.items(), reverse=True):
            if best and best not in names:
                names = [*names, best]
            out += self.rounds(rows, floors, names, facts)
        for row in out:
            if row["way"] in plan and row["rows"] == plan[row["way"]] and row["way"] not in self.failed:
                row |= self.attempt(row["way"], lambda r=row: self.memory(r["way"], r["rows"]))
        cell = {
            "n": self.n, "h": self.h, "v": self.v, "dtype": str(self.p.weight.dtype).split(".")[1],
            "objective": self.objective, "ours": best, **notes, "rows": out, "failed": self.failed,
        }  # fmt: skip
        cell["targets"] = targets(cell)
        return cell

    def rounds(self, rows: int, floors: list[str], names: list[str], facts: dict[str, dict]) -> list[dict]:
        calls = {name: self.call(name, rows) for name in [*floors, *names]}
        warm = {}
        for name in list(calls):  # compiles, loads, warms up
            try:
                warm[name] = self.device.seconds(calls[name])
            except Exception as error:
                self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                del calls[name]
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        begin = time.perf_counter()
        for done in range(self.options.repeats):
            for name, call in calls.items():
                seconds[name].append(self.device.seconds(call))
            spent = time.perf_counter() - begin
            if done + 1 >= self.options.least and spent * (done + 2) / (done + 1) > self.options.seconds:
                break
        base = statistics.median(seconds["floor"])
        again = statistics.median(seconds["floor_recompute"]) if "floor_recompute" in seconds else None
        table = []
        for name, times in seconds.items():
            way, median = self.ways.get(name), statistics.median(times)
            row = {"way": name, "rows": rows, "median": median, "of_floor": median / base, "seconds": times}
            if way:
                row |= {"bounded": way.bounded, "recompute": way.recompute, "ours": way.ours, **facts[name]}
                if way.recompute and again:
                    row["of_floor_recompute"] = median / again
            table.append(row)
        return table


def targets(cell: dict) -> list[dict]:
    """The issue's targets that this cell can tell, for what a user gets: auto's backend and plan."""
    rows = cell["rows"]
    ours = {r["rows"]: r for r in rows if r["way"] == cell["ours"]}
    if not ours:
        return []
    teacher, out = has_teacher(cell["objective"]), []

    def add(name: str, figure: float, limit: float, against: str) -> None:
        met = figure <= limit
        out.append({"target": name, "met": met, "figure": figure, "limit": limit, "against": against})

    main = next((r for r in ours.values() if "memory_rows" in r), ours[max(ours)])
    small = cell["v"] * cell["h"] <= 49152 * 576
    if teacher:
        add("time / floor, with a teacher", main["of_floor"], 1.2, "floor")
    elif cell["objective"] in ("nll", "dft") and small:
        add("time / floor", main["of_floor"], 1.15, "floor")

    def fastest(chosen: list[dict]) -> dict | None:
        """The one that fares best against us, each at the rows it was timed at."""
        return max(chosen, key=lambda r: ours[r["rows"]]["median"] / r["median"], default=None)

    others = [r for r in rows if not r.get("ours") and not r["way"].startswith("floor") and r["rows"] in ours]
    for name, chosen in (
        ("time / torch.compile of the materialised", [r for r in others if r["way"].startswith("torch_compile")]),
        ("time / fastest peer that bounds its memory", [r for r in others if r["bounded"]]),
    ):
        peer = fastest(chosen)
        if peer:
            add(name, ours[peer["rows"]]["median"] / peer["median"], 1.0, f"{peer['way']} at {peer['rows']} rows")
    whole = [r for r in others if r["way"] in ("torch", "torch_upcast") and r.get("extra_bytes")]
    whole = [r for r in whole if r["memory_rows"] == main.get("memory_rows")]
    if teacher and whole and main.get("extra_bytes") is not None:
        least = min(whole, key=lambda r: r["extra_bytes"])
        figure = main["extra_bytes"] / least["extra_bytes"]
        add("memory / materialised, with a teacher", figure, 0.2, f"{least['way']} at {least['memory_rows']} rows")
    return out


def show(cell: dict) -> None:
    for r in cell["rows"]:
        errors = f"{r['dx_error']:>9.1e}{r['dw_error']:>9.1e}" if "dx_error" in r else " " * 18
        extra = f"{r['extra_bytes'] / 2**20:>8.0f} MiB" if r.get("extra_bytes") is not None else " " * 12
        print(f"    {r['way']:<24}{r['rows']:>6}{errors}{r['median'] * 1e3:>9.0f} ms{r['of_floor']:>7.2f} x{extra}")
    for name, why in cell["failed"].items():
        print(f"    {name:<24} failed: {why}")
    for t in cell["targets"]:
        print(f"    target: {'met' if t['met'] else 'missed'}, {t['target']} {t['figure']:.2f} "
              f"(limit {t['limit']:g}, {t['against']})", flush=True)  # fmt: skip


def versions() -> dict[str, str]:
    names = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"burnish": burnish.__version__, "python": platform.python_version(), **found}


def parse(
    about: str = __doc__, objectives: tuple[str, ...] = LOSSES, quick: tuple[str, ...] = QUICK,
    shapes: list[str] | None = None,
) -> argparse.Namespace:  # fmt: skip
    """Options of this script, or of another that measures other ``objectives`` of peers.py so, at ``shapes``."""
    shapes = SHAPES if shapes is None else shapes
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="*", help="N,H,V")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--objectives", nargs="*", choices=objectives)
    parser.add_argument("--ways", nargs="*", help="names of peers.py; default: all that run here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cap", type=float, help="seconds a call may take before it gets fewer rows; 20")
    parser.add_argument("--seconds", type=float, help="for the rounds of a group of ways, after three rounds; 300")
    parser.add_argument("--memory-seconds", type=float, help="that the one call for memory may take for all rows; 60")
    parser.add_argument("--minutes", type=float, help="no cell is begun that would not end by then")
    parser.add_argument("--quick", action="store_true", help="first shape, three objectives, within nine minutes")
    parser.add_argument("--resume", action="store_true", help="skip the cells that the output has")
    parser.add_argument("--output", type=Path)
    o = parser.parse_args()
    o.shapes = o.shapes or (shapes[:1] if o.quick else shapes)
    o.objectives = o.objectives or list(quick if o.quick else objectives)
    o.cap = o.cap or (4.0 if o.quick else 20.0)
    o.seconds = o.seconds or (20.0 if o.quick else 300.0)
    o.memory_seconds = o.memory_seconds or (3 * o.cap if o.quick else 60.0)
    o.minutes = o.minutes or (8.0 if o.quick else float("inf"))
    o.least = min(o.repeats, 3)
    return o


def run(options: argparse.Namespace, name: str) -> None:
    """Measure every cell asked for; results/<name>_<device>.json."""
    warnings.filterwarnings("ignore")
    device = Device(options.device)
    # "auto"'s backend first: it is what targets are held against; the interpreter is never timed
    backends = ("triton", "torch") if options.device == "cuda" else ("host", "torch")
    if dispatch.resolve("auto", torch.device(options.device)) != backends[0]:
        backends = ("torch",)
    ways = our_ways(backends) + peer_ways(options.device)
    if options.ways:
        ways = [w for w in ways if w.name in options.ways]
    suffix = "_quick" if options.quick else ""
    path = options.output or Path(__file__).parent / "results" / f"{name}_{device.name}{suffix}.json"
    memory = "torch.cuda peak" if options.device == "cuda" else "process: VmHWM, reset before the call, less VmRSS"
    result = {
        "device": device.name, "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "versions": versions(),
        "memory": f"{memory}, less dX and dW", "cap_seconds": options.cap, "cells": [],
    }  # fmt: skip
    if options.resume and path.exists():
        result = json.loads(path.read_text())
    key = ("n", "h", "v", "dtype", "objective")
    done = {tuple(cell[k] for k in key) for cell in result["cells"]}
    begin, longest = time.monotonic(), 0.0
    for shape in options.shapes:
        n, h, v = map(int, shape.split(","))
        for dtype in options.dtypes:
            p = problem(n, h, v, getattr(torch, dtype), options.device)
            for objective in options.objectives:
                if (n, h, v, dtype, objective) in done:
                    continue
                start = time.monotonic()
                if start - begin + longest > 60 * options.minutes:
                    print(f"left out, {options.minutes:g} minutes are over: {shape} {dtype} {objective}", flush=True)
                    continue
                print(f"{shape} {dtype} {objective}: rows, error of dX, of dW, median, of floor, extra", flush=True)
                cell = Cell(p, objective, ways, device, options).measure()
                longest = max(longest, time.monotonic() - start)
                cell["wall_seconds"] = time.monotonic() - start
                show(cell)
                result["cells"].append(cell)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(result, indent=1) + "\n")
                part.replace(path)
    print(f"written: {path}")
    every = [(cell, t) for cell in result["cells"] for t in cell["targets"]]
    for cell, t in every:
        where = f"{cell['n']},{cell['h']},{cell['v']} {cell['dtype']} {cell['objective']}"
        print(f"target: {'met' if t['met'] else 'missed'}, {t['figure']:.2f} (limit {t['limit']:g}) "
              f"{where}: {t['target']}, {t['against']}")  # fmt: skip
    print(f"{sum(t['met'] for _, t in every)} of {len(every)} targets met")


def main() -> None:
    run(parse(), "linear_loss")


if __name__ == "__main__":
    main()
