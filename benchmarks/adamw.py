"""AdamW on the CPU: the host kernel over tiles beside torch's fused one, in interleaved rounds of one run.

    python benchmarks/adamw.py [--sizes 100000,10000000,50000000] [--repeats 15] [--threads 2]

fp32 weights, as one tensor and as many of SMALL elements.  First correctness: after three steps, whether weights and
moments have the bits of torch.optim.AdamW(foreach=False, fused=False), and by how many numbers of fp32 they are off at
most.  Then the median time of a step, from a table (for torch: lists of tensors) that exists.  A step moves at least
28 bytes an element: four reads and three writes.  Writes benchmarks/results/adamw_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from burnish.kernels import dispatch
from burnish.kernels.adamw import TILE, AdamWSpec, TileTable, Update

SMALL = 5000
STEPS = 3
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1}


def problem(n: int, small: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and gradients, the same at every call."""
    g = torch.Generator().manual_seed(0)
    sizes = [SMALL] * (n // SMALL) + [n % SMALL] * bool(n % SMALL) if small else [n]
    return tuple([torch.randn(k, generator=g) for k in sizes] for _ in range(2))


def host(weights, grads, exact: bool = True) -> tuple[Callable, Callable]:
    """(a step, what it has made of weights, m and v) of the host kernel."""
    table = TileTable.build([(w, 0) for w in weights])
    grad, m, v = torch.zeros(3, len(table) * TILE)

    def own(flat):
        return [flat[t * TILE : t * TILE + w.numel()] for t, w in zip(table.first_tile, weights, strict=True)]

    for to, x in zip(own(grad), grads, strict=True):
        to.copy_(x)
    kernels, steps = dispatch.adamw(dispatch.resolve("host", torch.device("cpu"))), [0]

    def step():
        steps[0] += 1
        update = Update(**OPTIONS, step_m=steps[0], step_v=steps[0])
        kernels.adamw(table, grad, None, m, v, None, None, torch.float32, AdamWSpec(exact=exact), update)

    return step, lambda: [*weights, *own(m), *own(v)]


def fused(weights, grads) -> tuple[Callable, Callable]:
    """torch's fused kernel itself, without the optimizer around it."""
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    steps = [torch.zeros(()) for _ in weights]

    def step():
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            weights, grads, m, v, [], steps, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, maximize=False, **OPTIONS
        )

    return step, lambda: [*weights, *m, *v]


def single(weights, grads) -> tuple[Callable, Callable]:
    """torch.optim.AdamW one operation at a time: the reference of the bits."""
    parameters = [torch.nn.Parameter(w) for w in weights]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(parameters, foreach=False, fused=False, **OPTIONS)

    def result():
        states = [optimizer.state[p] for p in parameters]
        return [*(p.detach() for p in parameters), *(s[k] for k in ("exp_avg", "exp_avg_sq") for s in states)]

    return optimizer.step, result


WAYS = {"host": host, "host, rounded root": partial(host, exact=False), "fused": fused, "single": single}


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The most numbers of fp32 that lie between two elements."""
    order = [torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (a.view(torch.int32).long(), b.view(torch.int32).long())]
    return int((order[0] - order[1]).abs().max())


def run(n: int, small: bool, repeats: int) -> list[dict]:
    ways = {name: way(*problem(n, small)) for name, way in WAYS.items()}
    for step, _ in ways.values():
        for _ in range(STEPS):
            step()
    want, off = ways["single"][1](), {}
    for name, (_, result) in ways.items():
        off[name] = max(ulps(a, b) for a, b in zip(result(), want, strict=True))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(repeats):
        names = list(ways) if i % 2 else list(reversed(ways))  # whoever comes first finds other things in the cache
        for name in names:
            begin = time.perf_counter()
            ways[name][0]()
            times[name].append(time.perf_counter() - begin)
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append({
            "elements": n, "tensors": -(-n // SMALL) if small else 1, "way": name, "bit_equal": off[name] == 0,
            "max_ulp": off[name], "ms": 1e3 * median, "ms_lowest": 1e3 * min(seconds), "ms_highest": 1e3 * max(seconds),
            "gb_per_s": 28e-9 * n / median, "of_fused": median / statistics.median(times["fused"]),
        })  # fmt: skip
        r = rows[-1]
        print(
            f"{n:>9} in {r['tensors']:>6}  {name:<18} {'bit-equal' if r['bit_equal'] else f'{off[name]} ulp':<12}"
            f"{r['ms']:>9.3f} ms [{r['ms_lowest']:.3f}, {r['ms_highest']:.3f}] {r['gb_per_s']:>6.1f} GB/s "
            f"{r['of_fused']:>6.2f} of fused"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="100000,10000000,50000000", help="elements")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "adamw_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = map(int, options.sizes.split(","))
    table = [row for n in sizes for small in (False, True) for row in run(n, small, options.repeats)]
    result = {
        "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "threads": options.threads,
        "repeats": options.repeats, "options": OPTIONS, "table": table,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
