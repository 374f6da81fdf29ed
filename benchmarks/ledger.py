"""What the kernels issue: bytes and arithmetic, counted in Triton's interpreter.  No GPU needed.

    python benchmarks/ledger.py               # ours, Liger's and TRL's losses on the same tokens: ledger.json
    python benchmarks/ledger.py --ours        # ours only, nothing written
    python benchmarks/ledger.py --optimizer   # AdamW and the segmented sum only, which it puts into ledger.json

Every unmasked lane of a load or store is counted, by the pointer argument it goes through, and every lane of
a floating-point operation, masked or not, as hardware runs them.  Ours are held to ``traffic``, exactly: fold
reads a logit once, and the label's once more; grad reads it once and writes its gradient once; AdamW reads an
element of each buffer once and writes it once.  Exit 1 if not.

A path runs from hidden states (or logits that exist) to gradients through a library's own host code.  Beside
its kernels stand the bytes of host code's torch operations on tensors as large as the logits: each input read
once and each output written once, which is the least they can do.  Matrix products are outside: all paths
make the same.  Operations are those of the source; a compiler merges some.  Counts are not times.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for the bf16 shim
sys.path.insert(0, str(Path(__file__).parent))

import interpreter as shim
import numpy as np
import peer_kernels as peers
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

import burnish
from burnish.kernels import adamw_triton, segment_sum_triton
from burnish.kernels.adamw import QUANT_BLOCK, TILE, AdamWSpec, TileTable, Update
from burnish.objectives import Objective, confidence_penalty, dft, jsd, kd, nll, reverse_kl, target_sft
from burnish.ops import gemm
from burnish.ops.geometry import whole_columns

RESULTS = Path(__file__).parent / "results" / "ledger.json"
ROWS = 8
COLUMNS = (4096, 5003)
OBJECTIVES = {
    "nll": nll(), "dft": dft(), "target_sft": target_sft(0.3), "entropy": confidence_penalty(peers.BETA),
    "kd": kd(), "reverse_kl": reverse_kl(), "jsd": jsd(0.5),
}  # fmt: skip
_BUILDER = interpreter.InterpreterBuilder
_OPERATIONS = {
    "exp": ("create_exp", "create_exp2"), "log": ("create_log", "create_log2"), "div": ("create_fdiv",),
    "add": ("create_fadd", "create_fsub"), "mul": ("create_fmul",), "fma": ("create_fma",),
    "max": ("create_maximumf", "create_minimumf", "create_maxnumf", "create_minnumf"),
}  # fmt: skip


@dataclass
class Launch:
    """Elements that one launch reads and writes through each argument, and its operations."""

    kernel: str
    args: dict[str, object]
    reads: Counter = field(default_factory=Counter)
    writes: Counter = field(default_factory=Counter)
    operations: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.spans = []
        for name, x in self.args.items():
            if isinstance(x, torch.Tensor) and x.numel():
                last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                self.spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size(), name))

    def argument(self, address: int) -> str:
        # an argument that stands in for another (INV for none is STATE) counts as the first; AdamW's weights, which
        # are no argument, lie outside
        return next((name for first, end, name in self.spans if first <= address < end), "outside")

    def size(self, argument: str, columns: int) -> int:
        """Bytes of an element of an argument (n, columns); 0 for a row's scalars, which are left out of tables."""
        x = self.args[argument]
        return x.element_size() if x.ndim == 2 and x.shape[1] == columns else 0


@contextlib.contextmanager
def counted():
    """A list that grows by a ``Launch`` for each kernel launched inside."""
    launches: list[Launch] = []
    real_convert = interpreter._implicit_cvt
    real_load, real_store = _BUILDER.create_masked_load, _BUILDER.create_masked_store
    real_call, real_sum, real_extreme = (
        interpreter.GridExecutor.__call__, interpreter.ReduceOps.sum, interpreter.ReduceOps.min_max
    )  # fmt: skip

    def note(counter: Counter, pointers, mask) -> None:
        at = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        if at.size:
            counter[launches[-1].argument(int(at.min()))] += at.size

    def load(self, pointers, mask, *rest):
        note(launches[-1].reads, pointers, mask)
        return real_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        note(launches[-1].writes, pointers, mask)
        return real_store(self, pointers, value, mask, *rest)

    def atomic(*_):
        raise NotImplementedError("the ledger does not count atomics")

    def call(self, *args, **kwargs):
        known = {k: v for k, v in kwargs.items() if k in self.arg_names}
        launches.append(Launch(self.fn.__name__, inspect.getcallargs(self.fn, *args, **known)))
        with _disable_current_modes():  # the interpreter's own copies are not host code's
            return real_call(self, *args, **kwargs)

    def convert(x):
        # a launch passes a number of Python as an fp32 scalar; the interpreter leaves it a Python number
        return interpreter.interpreter_semantic.to_tensor(x) if isinstance(x, float) else real_convert(x)

    def operation(name, real):
        def run(self, *args):
            out = real(self, *args)
            launches[-1].operations[name] += out.data.size
            return out

        return run

    def reduction(name, real):
        def run(self, x, *args, **kwargs):
            data = (x[0] if isinstance(x, tuple) else x).handle.data
            if data.dtype.kind == "f":
                kept = 1 if self.axis is None else data.size // data.shape[self.axis]
                launches[-1].operations[name] += data.size - kept
            return real(self, x, *args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:

        def replace(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(_BUILDER, "create_masked_load", load)
        replace(_BUILDER, "create_masked_store", store)
        replace(_BUILDER, "create_atomic_rmw", atomic)
        replace(_BUILDER, "create_atomic_cas", atomic)
        replace(interpreter, "_implicit_cvt", convert)
        replace(interpreter.GridExecutor, "__call__", call)
        replace(interpreter.ReduceOps, "sum", reduction("add", real_sum))
        replace(interpreter.ReduceOps, "min_max", reduction("max", real_extreme))
        for name, methods in _OPERATIONS.items():
            for method in methods:
                replace(_BUILDER, method, operation(name, getattr(_BUILDER, method)))
        yield launches


def traffic(launch: Launch) -> tuple[Counter, Counter]:
    """Elements that one of our launches must read and write, by argument: the formula.

    With N rows, V columns, and the label's logit where the label lies in the tile (L rows):

        fold   reads N V + L of Z, N V of T where a teacher is used (+ L for teacher_logp)
        jsd    reads N V of Z and N V of T
        grad   reads N V of Z, N V of T where the gradient depends on it; writes N V of OUT

    and scalars: each row of STATE that the flags ask for is read and written once, each row of COEF read once
    a block of columns.  The other kernels' formulas are their functions'.
    """
    if launch.kernel in OTHERS:
        return OTHERS[launch.kernel](launch.args)
    a = launch.args
    n, v = a["Z"].shape
    programs = n * (triton.cdiv(v, a["BLOCK"]) if launch.kernel == "grad_kernel" else 1)
    reads, writes = Counter(Z=n * v, INV=programs), Counter()

    def on(*names: str) -> int:
        return sum(bool(a[name]) for name in names)

    if launch.kernel == "jsd_kernel":
        reads += Counter(T=n * v, T_INV=n, STATE=6 * n)
        return reads, Counter(STATE=2 * n)
    labels = int(((a["Y"] >= a["start"]) & (a["Y"] < a["start"] + v)).sum())
    if a["HAS_T"]:
        reads["T"] += n * v
    reads["Y"] += programs
    if launch.kernel == "fold_kernel":
        sums = 2 + on("MEAN", "SQUARE", "OTHER", "HIT") + 2 * on("UNIFORM", "FOLD_T", "MIX") + on("MIX_MEAN")
        sums += on("CROSS", "T_ENTROPY") if a["FOLD_T"] else 0
        reads += Counter(Z=labels, T=labels * on("T_LABEL"), T_INV=n, STATE=n * sums)
        writes["STATE"] = n * sums + labels * (1 + on("T_LABEL"))
    else:
        scalars = 5 + on("MEAN", "SQUARE", "OTHER", "UNIFORM") + 3 * on("MIX", "CROSS") + 4 * on("JSD")
        reads += Counter(COEF=programs * scalars, T_INV=programs * on("HAS_T"))
        reads += Counter(IDS=programs * a["K"], IDS_GRAD=programs * a["K"])
        writes["OUT"] = n * v
    return +reads, +writes


def adamw_traffic(a: dict) -> tuple[Counter, Counter]:
    """AdamW, where tile t has n valid elements, none after an overflow, and w is n rounded up to a multiple of 16.

    Reads w of GRAD, M, V and of MASTER, or n of the weight where there is no master; writes n of the weight, w of M, V
    and of MASTER; moments of 8 bits: reads and writes ceil(n / BLOCK) scales of each.  And 2 scalars of TABLE, a third
    where random bits are drawn, and one each of SCALE and FOUND.
    """
    tiles = len(a["TABLE"])
    valid = a["TABLE"][:, 1] * (0 if a["HAS_FOUND"] and float(a["FOUND"]) != 0 else 1)
    n, w, blocks = (int((-(-valid // unit) * unit).sum()) for unit in (1, 16, a["BLOCK"]))
    buffers = Counter(M=w, V=w, MASTER=w * a["HAS_MASTER"])
    if a["QUANTIZED"]:
        buffers += Counter(M_SCALE=blocks // a["BLOCK"], V_SCALE=blocks // a["BLOCK"])
    reads = buffers + Counter(GRAD=w, outside=n * (not a["HAS_MASTER"]), SCALE=tiles * a["HAS_SCALE"])
    reads += Counter(TABLE=tiles * (3 if a["QUANTIZED"] or a["STOCHASTIC"] else 2), FOUND=tiles * a["HAS_FOUND"])
    return +reads, +(buffers + Counter(outside=n))


def segment_sum_traffic(a: dict) -> tuple[Counter, Counter]:
    """The segmented sum of R rows of D columns, K of whose tokens are in the range and are not the padding's.

    Reads K D of GRAD and writes R D of OUT; and scalars: for each block of columns K of POSITIONS and 2 R of OFFSETS.
    """
    rows, columns = a["OUT"].shape
    counts = a["OFFSETS"].diff()
    found = int(counts.sum()) - (int(counts[a["padding"]]) if a["padding"] >= 0 else 0)
    blocks = triton.cdiv(columns, a["BLOCK"])
    reads = Counter(GRAD=found * columns, POSITIONS=found * blocks, OFFSETS=2 * rows * blocks)
    return +reads, +Counter(OUT=rows * columns)


def rotate_traffic(a: dict) -> tuple[Counter, Counter]:
    """The block rotation of N rows of d columns, a block in one tile, the rows in S shares.

    Reads N d of X and S d b of DELTA, writes N d of OUT.
    """
    n, d = a["OUT"].shape
    shares = triton.cdiv(n, a["share"])
    return Counter(X=n * d, DELTA=shares * d * a["B"]), Counter(OUT=n * d)


def rotation_backward_traffic(a: dict) -> tuple[Counter, Counter]:
    """Both gradients: reads N d of X and of DY and S d b of DELTA, writes N d of DX and S d b of PARTS."""
    n, d = a["X"].shape
    parts = triton.cdiv(n, a["share"]) * d * a["B"]
    reads, writes = Counter(X=n * d, DY=n * d), Counter(PARTS=parts)
    if a["OF_X"]:
        reads["DELTA"], writes["DX"] = parts, n * d
    return reads, writes


OTHERS = {
    "adamw_kernel": adamw_traffic, "segment_sum_kernel": segment_sum_traffic, "rotate_kernel": rotate_traffic,
    "backward_kernel": rotation_backward_traffic,
}  # fmt: skip


def violations(launches: list[Launch]) -> list[str]:
    """Where a count of ours differs from the formula.

    An argument that stands in for another, or is the same tensor (OUT and Z), is counted under the first of the two.
    """
    wrong = []
    for launch in launches:
        for what, found, formula in zip(
            ("reads", "writes"), (launch.reads, launch.writes), traffic(launch), strict=True
        ):
            expected: Counter = Counter()
            for argument, elements in formula.items():
                known = argument if argument == "outside" else launch.argument(launch.args[argument].data_ptr())
                expected[known] += elements
            if found != expected:
                wrong.append(f"{launch.kernel} {what} {dict(found)}, formula {dict(expected)}")
    return wrong


class HostTraffic(TorchDispatchMode):
    """Bytes of torch's operations on tensors of V to N V elements: what kernels would read and write at least."""

    PRODUCTS = ("mm", "addmm", "bmm", "matmul")
    #: Operations that write nothing, or read one logit a row.
    FREE = ("detach", "gather")
    #: Operations whose first argument is only written.
    FILLS = ("fill_", "zero_", "copy_")

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.rows, self.columns, self.bytes = rows, columns, 0
        self.names: Counter = Counter()

    def _size(self, x: torch.Tensor) -> int:
        if not self.columns <= x.numel() <= self.rows * self.columns:
            return 0
        held = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())  # an expanded tensor holds less
        return held if held >= self.columns * x.element_size() else 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "burnish":  # look inside
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if view or name.rstrip("_") in (*self.PRODUCTS, *self.FREE) or "empty" in name:
            return out
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        inputs = {id(x): x for x in (tensors[1:] if name in self.FILLS else tensors)}
        outputs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        moved = sum(map(self._size, inputs.values())) + sum(map(self._size, outputs))
        self.bytes += moved
        if moved:
            self.names[name] += 1
        return out


def ours() -> list[peers.Path]:
    """``linear_loss`` from hidden states, and ``row_loss`` on logits that exist."""

    def teacher_of(o: Objective, p: peers.Problem, whole: bool):
        if "teacher" not in o.needs:
            return None
        if whole:
            return burnish.Teacher(logits=p.teacher_logits)
        return burnish.Teacher(hidden=p.teacher_hidden, weight=p.teacher_weight)

    def linear(o):
        return lambda p: burnish.linear_loss(
            p.hidden, p.weight, p.target, o, teacher=teacher_of(o, p, False), backend="triton", budget=1 << 40
        )  # fmt: skip

    def rows(o):
        return lambda p: burnish.row_loss(p.logits, p.target, o, teacher=teacher_of(o, p, True), backend="triton")

    return [
        peers.Path("burnish", kind, name, make(o))
        for name, o in OBJECTIVES.items()
        for kind, make in (("linear_loss", linear), ("row_loss", rows))
    ]


@contextlib.contextmanager
def products_as_on_a_gpu():
    """Our head's products write fp32 from low-precision operands, as on CUDA; nothing else of host code changes."""

    def project(self, x, out):
        return out.copy_(x.float() @ self.weight.float().t())

    def input_grad(self, dz):
        return dz.float() @ self.weight.float()

    def weight_grad(self, dz, x, into, *, first):
        product = dz.float().t() @ x.float()
        into.copy_(product) if first else into.add_(product)

    def mode(weight_dtype, compute_dtype, device, dtype, backend):
        return "native" if weight_dtype == compute_dtype == dtype else "mixed"

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gemm, "mode", mode))
        for name, function in (("project", project), ("input_grad", input_grad), ("weight_grad", weight_grad)):
            unseen = peers.unseen(function)
            stack.enter_context(mock.patch.object(gemm.Head, name, unseen))
        yield


def reference(p: peers.Problem, objective: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss and d hidden in fp64 by burnish's torch twin."""
    double = {k: v.detach().double() if v.is_floating_point() else v for k, v in vars(p).items()}
    double["hidden"].requires_grad_()
    q, o = peers.Problem(**double), OBJECTIVES[objective]
    teacher = burnish.Teacher(logits=q.teacher_logits) if "teacher" in o.needs else None
    loss = burnish.row_loss(q.logits, q.target, o, teacher=teacher, backend="torch")
    loss.backward()
    return loss.detach(), q.hidden.grad


def run(path: peers.Path, dtype: torch.dtype, columns: int) -> dict:
    """Counts of one path on one problem; its loss and gradient are compared with fp64 first."""
    p = peers.problem(ROWS, columns, dtype)
    host = HostTraffic(ROWS, columns)
    with peers.as_on("sm_90"), products_as_on_a_gpu(), counted() as launches, host:
        loss = path.run(p)
        loss.backward()
    want, want_grad = reference(p, path.objective)
    error = float((loss.detach() - want).abs() / want.abs())
    grad_error = float((p.hidden.grad - want_grad).norm() / want_grad.norm())
    allowed = 1e-4 if dtype == torch.float32 else 5e-2
    if not (error < allowed and grad_error < allowed):
        raise SystemExit(f"{path}: loss off by {error:.1e}, gradient by {grad_error:.1e}: not the same objective")
    if path.library == "burnish" and (wrong := violations(launches)):
        raise SystemExit(f"{path.name} {path.objective}: " + "; ".join(wrong))
    fused = (path.library, path.name) == ("burnish", "linear_loss")
    width = whole_columns(columns) if fused else columns  # its tiles are padded
    kernels: dict[str, Counter] = {}
    for launch in launches:
        k = kernels.setdefault(launch.kernel.strip("_").removesuffix("_kernel").removeprefix("liger_"), Counter())
        k += launch.operations
        for what, counts in (("read", launch.reads), ("written", launch.writes)):
            for argument, elements in counts.items():
                if size := launch.size(argument, width):
                    k[f"{what} {argument}"] += elements
                    k["bytes"] += elements * size
    per = ROWS * columns
    total = sum(kernels.values(), Counter())
    arithmetic = {name: round(total[name] / per, 3) for name in _OPERATIONS}
    return {
        "reads": round(sum(v for k, v in total.items() if k.startswith("read ")) / per, 4),
        "writes": round(sum(v for k, v in total.items() if k.startswith("written ")) / per, 4),
        "kernel_bytes": round(total["bytes"] / per, 3), "host_bytes": round(host.bytes / per, 3),
        "operations": arithmetic, "flops": round(sum(arithmetic.values()) + arithmetic["fma"], 3),
        "host": dict(sorted(host.names.items())),
        "kernels": {n: {key: round(v / per, 4) for key, v in sorted(k.items())} for n, k in kernels.items()},
    }  # fmt: skip


#: Elements of the segments, and (weights, variant) of AdamW.
SEGMENTS = (4096, 5003, 300)
ADAMW = {
    "fp32": (torch.float32, AdamWSpec()), "fp32, 8bit": (torch.float32, AdamWSpec("8bit")),
    "bf16": (torch.bfloat16, AdamWSpec(rounding="stochastic")),
    "bf16, 8bit": (torch.bfloat16, AdamWSpec("8bit", "stochastic")),
    "bf16, master": (torch.bfloat16, AdamWSpec(master=True)),
    "bf16, master, 8bit": (torch.bfloat16, AdamWSpec("8bit", master=True)),
}  # fmt: skip


def launch_adamw(dtype: torch.dtype, spec: AdamWSpec, sizes=SEGMENTS, found_inf: float = 0.0) -> list[torch.Tensor]:
    """One step on zeros; returns the weights."""
    weights = [torch.zeros(n, dtype=dtype) for n in sizes]
    table = TileTable.build([(w, 0) for w in weights])
    n = len(table) * TILE
    m, v = torch.zeros(2, n, dtype=torch.uint8 if spec.quantized else torch.float32)
    scales = [torch.zeros(n // QUANT_BLOCK) if spec.quantized else None for _ in range(2)]
    master, one, found = torch.zeros(n) if spec.master else None, torch.ones(1), torch.tensor([found_inf])
    adamw_triton.adamw(table, torch.ones(n), master, m, v, *scales, dtype, spec, Update(lr=0.1), one, found)
    return weights


def run_optimizer() -> dict[str, dict]:
    """Bytes an element of the weights, read and written, of each variant; held to the formula."""
    table = {}
    for name, (dtype, spec) in ADAMW.items():
        with counted() as launches:
            weights = launch_adamw(dtype, spec)
        if wrong := violations(launches):
            raise SystemExit(f"adamw {name}: " + "; ".join(wrong))
        (launch,) = launches
        sizes = {x: y.element_size() for x, y in launch.args.items() if isinstance(y, torch.Tensor)}
        sizes["outside"] = weights[0].element_size()
        moved = (sum(k * sizes[x] for x, k in counts.items()) for counts in (launch.reads, launch.writes))
        read, written = (round(size / sum(SEGMENTS), 3) for size in moved)
        table[name] = {"read": read, "written": written}
        print(f"adamw {name:<20} bytes an element: {read:>6.2f} read {written:>6.2f} written")
    grad, tokens, out = torch.ones(97, 3001), torch.arange(97) % 7, torch.empty(4, 3001)
    with counted() as launches:
        segment_sum_triton.segment_sum(grad, tokens, 2, 6, 3, out)
    if wrong := violations(launches):
        raise SystemExit("segment_sum: " + "; ".join(wrong))
    return table


def show(table: dict[str, dict]) -> None:
    long = max(map(len, table))
    print(f"{'a logit':<{long}} reads  writes  bytes  +host   exp   log  flops")
    for name, r in table.items():
        print(
            f"{name:<{long}} {r['reads']:>5.2f} {r['writes']:>7.2f} {r['kernel_bytes']:>6.2f} {r['host_bytes']:>6.2f} "
            f"{r['operations']['exp']:>5.2f} {r['operations']['log']:>5.2f} {r['flops']:>6.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ours", action="store_true", help="ours only, nothing written")
    parser.add_argument("--optimizer", action="store_true", help="AdamW and the segmented sum only")
    arguments = parser.parse_args()
    shim.install()
    optimizer = run_optimizer()
    if arguments.optimizer:
        stored = json.loads(RESULTS.read_text())
        write({**stored, "segments": SEGMENTS, "optimizer": optimizer}, stored["paths"])
        return
    found = {} if arguments.ours else peers.versions()
    for library in sorted({"liger", "trl"} - set(found)):
        print(f"{library}: not counted")
    table = {}
    for columns in COLUMNS:
        for dtype in (torch.float32, torch.bfloat16):
            for path in [*ours(), *([] if arguments.ours else peers.paths())]:
                key = f"{path.objective}/{path.library}/{path.name}/{str(dtype).removeprefix('torch.')}/{columns}"
                table[key] = run(path, dtype, columns)
    table = dict(sorted(table.items(), key=lambda item: list(OBJECTIVES).index(item[0].split("/")[0])))
    show(table)
    print("ours: every launch reads and writes what the formula says")
    if not arguments.ours:
        head = {"triton": triton.__version__, "rows": ROWS, "columns": COLUMNS, "peers": found}
        write({**head, "segments": SEGMENTS, "optimizer": optimizer}, table)


def write(head: dict, paths: dict[str, dict]) -> None:
    """ledger.json, with one path or variant a line."""
    text = json.dumps({**head, "paths": {}, "optimizer": {}}, indent=1)
    for key, table in (("optimizer", head["optimizer"]), ("paths", paths)):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in table.items())
        text = text.replace(f'"{key}": {{}}', f'"{key}": {{\n{lines}\n }}')
    RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
