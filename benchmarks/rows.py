"""The row kernels alone, fold and grad, on the CPU: twin and host beside torch's own cross entropy, in one run.

    python benchmarks/rows.py [--shape 256,576,49152] [--repeats 9] [--threads 2]

For each objective and dtype of the logits: the largest error of the gradient against fp64, relative to its largest
entry; the median time of fold and gradient (for torch: forward and backward of F.cross_entropy on the same logits);
and that time's share of a chunk's three fp32 products, logits, dX and dW += at hidden size H.  Rounds are interleaved.
Writes benchmarks/results/rows_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from burnish.kernels import dispatch
from burnish.kernels.contract import RowSpec, coefficients, finalize, new_state

BASE = frozenset({"lse", "label", "logp"})
SPECS = {
    "nll": RowSpec(BASE),
    "target_sft": RowSpec(BASE | {"mix"}, alpha=0.5, eta=0.5),
    "kd": RowSpec(BASE | {"cross", "teacher_entropy"}),
    "reverse_kl": RowSpec(BASE | {"mean", "other", "teacher_lse"}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def upstream(name: str, stats: dict) -> dict:
    """Gradients of the objective's value, summed over rows, with respect to its statistics."""
    one = torch.ones_like(stats["lse"])
    if name == "nll":
        return {"logp": -one}
    if name == "target_sft":  # lse - gamma label - (1 - gamma) mix
        gamma = stats["logp"].exp()
        return {"lse": one, "label": -gamma, "mix": gamma - 1}
    if name == "kd":  # lse - cross
        return {"lse": one, "cross": -one}
    return {"mean": one, "lse": -one, "other": -one}  # E_p[log p - t]


def run(kernels, name: str, tile, teacher, target, dtype=torch.float32) -> torch.Tensor:
    """The gradient, written over ``tile``."""
    spec, state = SPECS[name], new_state(tile.shape[0], dtype, tile.device)
    t = teacher if spec.uses_teacher else None
    kernels.fold(tile, t, state, target, spec)
    stats = finalize(state, spec)
    kernels.grad(tile, t, tile, coefficients(stats, upstream(name, stats), spec), target, spec)
    return tile


def cross_entropy(tile, target) -> torch.Tensor:
    z = tile.detach().requires_grad_()
    F.cross_entropy(z, target, reduction="sum").backward()
    return z.grad


def gemms(n: int, h: int, v: int):
    """A chunk's three products in fp32."""
    x, w, tile, dw = torch.randn(n, h), torch.randn(v, h), torch.empty(n, v), torch.zeros(v, h)

    def step():
        torch.mm(x, w.t(), out=tile)
        torch.mm(tile, w)
        torch.addmm(dw, tile.t(), x, beta=1.0, alpha=1e-6, out=dw)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="256,576,49152", help="rows of a chunk, hidden size, vocabulary")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "rows_cpu.json"))
    options = parser.parse_args()
    n, h, v = map(int, options.shape.split(","))
    torch.set_num_threads(options.threads)
    backends = {name: dispatch.rows(dispatch.resolve(name, torch.device("cpu"))) for name in ("torch", "host")}
    g = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(n, v, generator=g) for _ in range(2))
    target = torch.randint(0, v, (n,), generator=g)

    cases: dict[tuple[str, str, str], tuple] = {}  # (objective, dtype, who) -> (function, logits)
    errors = {}
    for name in SPECS:
        for label, dtype in DTYPES.items():
            source, teacher = z.to(dtype), t.to(dtype)
            want = run(backends["torch"], name, source.double(), teacher.double(), target, torch.float64)
            who = {
                b: (lambda x, k=k, name=name, teacher=teacher: run(k, name, x, teacher, target))
                for b, k in backends.items()
            }
            if name == "nll":
                who["cross_entropy"] = lambda x: cross_entropy(x, target)
            for key, function in who.items():
                got = function(source.clone())
                errors[name, label, key] = float((got.double() - want).abs().max() / want.abs().max())
                cases[name, label, key] = (function, source)
    products, times = gemms(n, h, v), {key: [] for key in cases}
    floor = []
    for _ in range(options.repeats + 1):
        begin = time.perf_counter()
        products()
        floor.append(time.perf_counter() - begin)
        for key, (function, source) in cases.items():
            x = source.clone()
            begin = time.perf_counter()
            function(x)
            times[key].append(time.perf_counter() - begin)
    gemm = statistics.median(floor[1:])  # the first round warms up
    table = []
    for (name, label, who), seconds in times.items():
        median = statistics.median(seconds[1:])
        table.append({
            "objective": name, "logits": label, "backend": who, "gradient_error": errors[name, label, who],
            "ms": 1e3 * median, "ms_lowest": 1e3 * min(seconds[1:]), "ms_highest": 1e3 * max(seconds[1:]),
            "share_of_gemms": median / gemm,
        })  # fmt: skip
        spread = f"[{1e3 * min(seconds[1:]):.1f}, {1e3 * max(seconds[1:]):.1f}]"
        print(f"{name:11} {label:5} {who:14} error {errors[name, label, who]:.1e}  {1e3 * median:8.1f} ms {spread}  "
              f"{median / gemm:6.1%} of the products")  # fmt: skip
    result = {
        "shape": {"rows": n, "hidden": h, "vocabulary": v}, "threads": options.threads, "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(), "repeats": options.repeats, "gemms_ms": 1e3 * gemm,
        "gemms_ms_range": [1e3 * min(floor[1:]), 1e3 * max(floor[1:])], "table": table,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"three products {1e3 * gemm:.1f} ms; written to {options.output}")


if __name__ == "__main__":
    main()
