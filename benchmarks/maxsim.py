"""MaxSim against einsum and sentence-transformers' own, side by side: time, share of the product's time, peak bytes.

    python benchmarks/maxsim.py            # writes results/maxsim_cpu.json
    python benchmarks/maxsim.py --small    # one small problem, to look at

Peak bytes are counted operation by operation beside the operands (``live_bytes``), gradients included.  Every way is
run on the same operands in the same process, turn by turn; times are the best of the turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from burnish import maxsim
from burnish.ops.live_bytes import LiveBytes

RESULTS = Path(__file__).parent / "results" / "maxsim_cpu.json"
#: Q, Lq, D, Ld, d: a batch of ColBERT, of MiniLM's tokens, and of long documents.
PROBLEMS = [(32, 32, 128, 180, 128), (64, 64, 64, 256, 384), (16, 32, 64, 1024, 128)]


def einsum(q, k):
    return torch.einsum("aid,bjd->abij", q, k).max(-1).values.sum(-1)


def ways() -> dict:
    """Name: function of token embeddings."""
    found = {"einsum": einsum, "burnish": maxsim}
    try:
        from sentence_transformers.util import maxsim as theirs
    except ImportError:
        print("sentence-transformers: not installed or without maxsim, skipped")
    else:
        found["sentence-transformers"] = theirs
    return found


def measure(problem: tuple[int, ...], turns: int) -> list[dict]:
    """A row a way: milliseconds of forward, of both passes, and of a search without gradients; peak MiB; error."""
    n, lq, m, ld, d = problem
    g = torch.Generator().manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(*s, d, generator=g), dim=-1) for s in ((n, lq), (m, ld)))
    up = torch.randn(n, m, generator=g)
    exact = [x.double().requires_grad_() for x in (q, k)]
    want = einsum(*exact)
    want_grads = torch.autograd.grad(want, exact, up.double())
    rows: dict[str, dict] = {}

    def both(f, grad: bool):
        a, b = (x.clone().requires_grad_() for x in (q, k))
        scores = f(a, b)
        return (scores, torch.autograd.grad(scores, (a, b), up)) if grad else (scores, ())

    def search(f):
        with torch.no_grad():
            return f(q, k)

    for name, f in ways().items():
        with LiveBytes() as counter:
            scores, grads = both(f, True)
        errors = [
            (a.double() - b).norm() / b.norm() for a, b in zip((scores, *grads), (want, *want_grads), strict=True)
        ]
        rows[name] = {"problem": problem, "way": name, "peak_mib": counter.peak / 2**20,
                      "error": max(float(e) for e in errors)}  # fmt: skip
    parts = {"forward_ms": lambda f: both(f, False), "both_ms": lambda f: both(f, True), "search_ms": search}
    floor = float("inf")
    for _ in range(turns):
        floor = min(floor, _time(lambda: q.view(-1, d) @ k.view(-1, d).T))
        for name, f in ways().items():
            for part, run in parts.items():
                rows[name][part] = min(rows[name].get(part, float("inf")), _time(lambda f=f, run=run: run(f)))
    for row in rows.values():
        row["product_ms"] = floor
    return list(rows.values())


def _time(run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def table(result: dict) -> str:
    """The rows as a table of Markdown."""
    lines = [
        f"{result['machine']}, {result['threads']} thread(s), torch {result['torch']}; fp32. x product: time over that "
        "of the one product (Q Lq, d) x (d, D Ld). MiB: peak beside the operands, both passes, gradients included.",
        "",
        "| Q x Lq, D x Ld, d | | search, x product | forward, x product | both, x product | MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        n, lq, m, ld, d = row["problem"]
        cells = [f"{row[part] / row['product_ms']:.2f}" for part in ("search_ms", "forward_ms", "both_ms")]
        lines.append(
            f"| {n} x {lq}, {m} x {ld}, {d} | {row['way']} | {' | '.join(cells)} | {row['peak_mib']:.1f} | "
            f"{row['error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="one small problem; writes nothing")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    problems = [(4, 8, 8, 16, 32)] if arguments.small else PROBLEMS
    rows = [row for problem in problems for row in measure(problem, arguments.turns)]
    result = {"machine": f"CPU ({torch.backends.cpu.get_cpu_capability()}), {platform.machine()}",
              "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}  # fmt: skip
    print(table(result))
    if not arguments.small:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
