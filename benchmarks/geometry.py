"""Geometry of weights without an SVD beside torch.linalg.svd, on SmolLM2-135M's own matrices.

Writes benchmarks/results/geometry_cpu.json.

    python benchmarks/geometry.py [--repeats 3]

dW is of rank 16 and a hundredth of W's length, as a LoRA's may be, added in fp32.  Three tasks, each in every way in
turn, medians of the repeats: (1) stable rank and nuclear norm of dW and the two profiles over W's directions, by
``weight_geometry`` and by the formulas with torch.linalg.svd in fp32 (as the official code has it) and fp64; (2) the
stable rank alone, by Lanczos and by torch.linalg.svdvals; (3) the Procrustes residual of activations that differ by a
rotation and a little noise, by the nuclear norm from refined Gram matrices, from one Gram matrix, and by SVD.  Then the
whole model once.  Errors are against the same formula by SVD in fp64.  Added memory is VmHWM, reset before, less the
RSS then: LAPACK's workspace is in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from burnish.methods import load_model
from burnish.methods.geometry import average, nuclear_norm, spectral_norm, weight_geometry
from burnish.methods.geometry.spectrum import gram_values, smaller_gram

RESULT = Path(__file__).parent / "results" / "geometry_cpu.json"
LAYER = "model.layers.15."
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
RANK, SHARE = 16, 0.01


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def measure(call: Callable[[], dict]) -> tuple[dict, float, int]:
    """(result, seconds, bytes added at the peak)."""
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = status("VmRSS"), time.perf_counter()
    found = call()
    return found, time.perf_counter() - begin, max(0, status("VmHWM") - before)


def tuned(w: torch.Tensor, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    delta = torch.randn(w.shape[0], RANK, generator=g) @ torch.randn(RANK, w.shape[1], generator=g)
    return w + delta * (SHARE * w.norm() / delta.norm())


def by_svd(w0: torch.Tensor, w1: torch.Tensor, dtype: torch.dtype) -> dict:
    w0, w1 = w0.to(dtype), w1.to(dtype)
    delta = w1 - w0
    u, s, vh = torch.linalg.svd(w0, full_matrices=False)
    values = torch.linalg.svdvals(delta)
    return {
        "stable_rank": float(delta.square().sum() / values[0] ** 2), "nuclear": float(values.sum()),
        "retention": (torch.einsum("ij,ij->j", u, w1 @ vh.T) - s).abs(), "adaptation": (delta @ vh.T).norm(dim=0),
    }  # fmt: skip


def errors(got: dict, exact: dict) -> dict[str, float]:
    """Relative; of a profile the largest, over the profile's largest value."""
    out = {}
    for key in exact.keys() & got.keys():
        a, b = (torch.as_tensor(x[key], dtype=torch.float64) for x in (got, exact))
        out[key] = float((a - b).abs().max() / b.abs().max())
    return out


def in_turn(ways: dict[str, Callable[[], dict]], exact: dict, repeats: int) -> list[dict]:
    found: dict[str, list] = {way: [] for way in ways}
    names = list(ways)
    for i in range(repeats):
        for way in names[i % len(names) :] + names[: i % len(names)]:
            found[way].append(measure(ways[way]))
    return [
        {"way": way, "seconds": median(f[1] for f in runs), "all_seconds": [f[1] for f in runs],
         "added_bytes": max(f[2] for f in runs), "errors": errors(runs[0][0], exact)}
        for way, runs in found.items()
    ]  # fmt: skip


def matrix(w0: torch.Tensor, w1: torch.Tensor, repeats: int) -> list[dict]:
    exact = by_svd(w0, w1, torch.float64)
    groups = ("spectrum", "profiles")
    return in_turn({
        "weight_geometry": lambda: weight_geometry({"w": w0}, {"w": w1}, groups=groups, profiles=True)["w"],
        "svd, fp32": lambda: by_svd(w0, w1, torch.float32),
        "svd, fp64": lambda: by_svd(w0, w1, torch.float64),
    }, exact, repeats)  # fmt: skip


def stable(w0: torch.Tensor, w1: torch.Tensor, repeats: int) -> list[dict]:
    delta = w1 - w0
    square = float(delta.double().square().sum())
    exact = {"stable_rank": square / float(torch.linalg.svdvals(delta.double())[0]) ** 2}
    return in_turn({
        "spectral_norm (Lanczos)": lambda: {"stable_rank": square / spectral_norm(delta) ** 2},
        "svdvals, fp32": lambda: {"stable_rank": square / float(torch.linalg.svdvals(delta)[0]) ** 2},
    }, exact, repeats)  # fmt: skip


def procrustes(d: int, repeats: int) -> list[dict]:
    """Of 4096 tokens whose principal directions have lengths over four decades."""
    g = torch.Generator().manual_seed(d)
    x0 = torch.randn(4096, d, generator=g, dtype=torch.float64) * torch.logspace(0, -4, d, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    x1 = x0 @ turn + 1e-4 * torch.randn(4096, d, generator=g, dtype=torch.float64) * x0.std()
    cross, a, b = x1.T @ x0, float(x0.square().sum()), float(x1.square().sum())
    u, _, vh = torch.linalg.svd(cross)
    exact = {"proc_residual": float((x1 @ (u @ vh) - x0).norm() / x0.norm())}

    def residual(nuclear: float) -> dict:
        return {"proc_residual": (max(0.0, a + b - 2 * nuclear) / a) ** 0.5}

    def by_rotation() -> dict:
        u, _, vh = torch.linalg.svd(cross)
        return {"proc_residual": float((x1 @ (u @ vh) - x0).norm() / x0.norm())}

    return in_turn({
        "nuclear_norm": lambda: residual(nuclear_norm(cross)),
        "one Gram matrix": lambda: residual(float(gram_values(smaller_gram(cross)).sum())),
        "svdvals, fp64": lambda: residual(float(torch.linalg.svdvals(cross).sum())),
        "svd, fp64, and the rotation": by_rotation,
    }, exact, repeats)  # fmt: skip


def table(r: dict) -> str:
    """The tables of docs/geometry.md."""
    w, head = r["whole"], ["", "way", "ms", "MiB added", "error"]
    short = {"stable_rank": "stable rank", "nuclear": "nuclear", "retention": "dP", "adaptation": "E"}

    def rows(part):
        out = []
        for case in part:
            for m in case["rows"]:
                found = ", ".join(f"{short.get(k, '')} {m['errors'][k]:.0e}".strip() for k in sorted(m["errors"]))
                out.append([case["name"], m["way"], f"{m['seconds'] * 1e3:,.0f}", f"{m['added_bytes'] / 2**20:,.0f}",
                            found if any(m["errors"].values()) else "the reference"])  # fmt: skip
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * 5, *out))

    return "\n".join([
        f"`python benchmarks/geometry.py`: SmolLM2-135M's matrices, an update of rank {RANK}, CPU ({r['capability']}), "
        f"{r['threads']} thread{'s' * (r['threads'] > 1)}, torch {r['torch']}, medians of {r['repeats']}; errors "
        "relative to an SVD in fp64, of a profile the largest over its largest value.", "",
        "Stable rank, nuclear norm and both profiles:", "", rows(r["matrices"]), "",
        "The stable rank alone:", "", rows(r["stable"]), "",
        "Procrustes residual from the cross moments of activations (d columns) that differ by a rotation and noise of "
        "1e-4:", "", rows(r["procrustes"]), "",
        f"The whole model, {w['matrices']} matrices ({w['parameters'] / 1e6:.0f}M parameters): {w['seconds']:.1f} s "
        f"and {w['added_bytes'] / 2**20:,.0f} MiB added, where the two tensors of the largest matrix are "
        f"{2 * w['largest_bytes'] / 2**20:,.0f} MiB; mean relative drift {w['average']['relative']:.4f}, mean stable "
        f"rank {w['average']['stable_rank']:.2f}.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    model, _ = load_model("smollm2")
    pre = {n: x for n, x in model.state_dict().items() if x.dim() == 2 and n != "lm_head.weight"}
    post = {n: tuned(x, i) for i, (n, x) in enumerate(pre.items())}
    result: dict = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": options.repeats,
        "capability": torch.backends.cpu.get_cpu_capability(), "matrices": [], "stable": [], "procrustes": [],
    }  # fmt: skip
    for name in (*(f"{LAYER}{m}.weight" for m in MATRICES), "model.embed_tokens.weight"):
        shape = f"{pre[name].shape[0]} x {pre[name].shape[1]}"
        large = pre[name].numel() > 1e7
        for part, call in (("matrices", matrix), ("stable", stable)):
            rows = call(pre[name], post[name], 1 if large else options.repeats)
            label = name.split(".")[-2].removesuffix("_proj").removesuffix("_tokens")
            result[part].append({"name": f"{label}, {shape}", "rows": rows})
            for m in rows:
                print(f"{label:<6} {shape:<12} {m['way']:<26} {m['seconds']:7.3f} s "
                      f"+ {m['added_bytes'] / 2**20:5.0f} MiB  {m['errors']}", flush=True)  # fmt: skip
    for d in (576, 1536):
        rows = procrustes(d, options.repeats)
        result["procrustes"].append({"name": f"d = {d}", "rows": rows})
        for m in rows:
            print(f"{d:<19} {m['way']:<26} {m['seconds']:7.3f} s {m['errors']}", flush=True)
    found, seconds, added = measure(lambda: weight_geometry(pre, post))
    result["whole"] = {
        "matrices": len(found), "parameters": sum(x.numel() for x in pre.values()), "seconds": seconds,
        "added_bytes": added, "largest_bytes": max(x.nbytes for x in pre.values()), "average": average(found),
    }  # fmt: skip
    print(f"whole model: {len(found)} matrices, {seconds:.1f} s, + {added / 2**20:.0f} MiB")
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
