"""The fused LM-head loss beside the materialised one and the bare GEMMs, in one run.

    python benchmarks/linear_loss.py [--device cuda] [--shapes 1024,576,49152 ...] [--repeats 5]

Columns: error of dW against fp64 first; then the median time of forward and backward, its ratio to the floor (the
three products alone, in chunks of the size we use), and the peak of live bytes beside inputs and gradients.  Rounds
are interleaved, so that a machine whose speed drifts treats all alike.  Writes benchmarks/results/linear_loss_*.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import burnish
from burnish import Teacher, linear_loss, objectives
from burnish.methods.measure import LiveBytes
from burnish.ops.geometry import DEFAULT_ROWS, DEFAULT_ROWS_GPU

SHAPES = ["1024,576,49152"]


def materialised(objective: str, hidden, weight, target, t_hidden, t_weight):
    """The loss as a trainer writes it in plain torch."""
    z = (hidden @ weight.t()).float()
    if objective == "nll":
        return F.cross_entropy(z, target)
    logp = z.log_softmax(-1)
    label = logp.gather(1, target[:, None])[:, 0]
    if objective == "dft":
        return -(label.detach().exp() * label).mean()
    with torch.no_grad():
        t = (t_hidden @ t_weight.t()).float()
        if objective == "kd":
            q = t.softmax(-1)
        else:  # target_sft, eta 0.5
            q = (0.5 * logp + 0.5 * t.log_softmax(-1)).softmax(-1) * (1 - label.exp())[:, None]
            q.scatter_add_(1, target[:, None], label.exp()[:, None])
    if objective == "kd":
        return F.kl_div(logp, q, reduction="batchmean")
    return -(q * logp).sum(-1).mean()


OBJECTIVES = {
    "nll": objectives.nll(), "dft": objectives.dft(), "kd": objectives.kd(), "target_sft": objectives.target_sft(0.5),
}  # fmt: skip


def floor(rows: int, hidden, weight, t_hidden=None, t_weight=None):
    """The products of the fused loss and nothing else: per chunk logits, dX, dW += (and the teacher's logits)."""
    low = weight.dtype != torch.float32
    cast = low and weight.device.type == "cpu"
    w = weight.float() if cast else weight
    x = hidden.float() if cast else hidden
    acc = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    tile = torch.empty(rows, weight.shape[0], dtype=w.dtype, device=w.device)
    for start in range(0, hidden.shape[0], rows):
        part = x[start : start + rows]
        z = torch.mm(part, w.t(), out=tile[: part.shape[0]])
        if t_weight is not None:
            torch.mm(t_hidden[start : start + rows].to(w.dtype), t_weight.to(w.dtype).t())
        torch.mm(z, w)
        if low and not cast:
            torch.addmm(acc, z.t(), part, out_dtype=torch.float32, out=acc)
        else:
            torch.addmm(acc, z.t(), part, out=acc)


def measure(n, h, v, dtype, device, repeats):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype)

    hidden, weight = rand(n, h), (rand(v, h) * 0.05).to(dtype)
    t_hidden, t_weight = rand(n, h), (rand(v, h) * 0.05).to(dtype)
    target = torch.randint(0, v, (n,), generator=g).to(device)
    rows = min(n, DEFAULT_ROWS.get(device, DEFAULT_ROWS_GPU))
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    out = []
    for name, objective in OBJECTIVES.items():
        teacher = Teacher(hidden=t_hidden, weight=t_weight) if objective.needs else None
        args = (t_hidden, t_weight) if objective.needs else (None, None)
        ways = {
            "materialised": lambda hh, ww, name=name: materialised(name, hh, ww, target, t_hidden, t_weight),
            "burnish": lambda hh, ww, o=objective, t=teacher: linear_loss(hh, ww, target, o, teacher=t),
        }
        part = slice(0, min(n, 256))  # the fp64 reference of dW is costly: on the first rows
        exact_w = weight.double().requires_grad_()
        exact = materialised_fp64(
            name, hidden[part].double(), exact_w, target[part], t_hidden[part].double(), t_weight.double()
        )
        (exact_dw,) = torch.autograd.grad(exact, exact_w)
        rows_out = {}
        for way, fn in ways.items():
            w = weight.clone().requires_grad_()
            small = linear_loss(hidden[part], w, target[part], objective, teacher=None if teacher is None else Teacher(
                hidden=t_hidden[part], weight=t_weight)) if way == "burnish" else materialised(
                name, hidden[part], w, target[part], t_hidden[part], t_weight)  # fmt: skip
            (dw,) = torch.autograd.grad(small, w)
            error = float((dw.double() - exact_dw).norm() / exact_dw.norm())
            hh, ww = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            with LiveBytes() as counter:
                fn(hh, ww).backward()
            extra = counter.peak - sum(x.grad.numel() * x.grad.element_size() for x in (hh, ww))
            rows_out[way] = {"dw_error": error, "extra_bytes": extra, "seconds": []}
        rows_out["floor"] = {"dw_error": None, "extra_bytes": None, "seconds": []}

        def step(fn):
            hh, ww = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            fn(hh, ww).backward()

        calls = {way: (lambda fn=fn: step(fn)) for way, fn in ways.items()}
        calls["floor"] = lambda args=args: floor(rows, hidden, weight, *args)
        for call in calls.values():
            call()
        for _ in range(repeats):
            for way, call in calls.items():
                sync()
                begin = time.perf_counter()
                call()
                sync()
                rows_out[way]["seconds"].append(time.perf_counter() - begin)
        base = statistics.median(rows_out["floor"]["seconds"])
        for way, r in rows_out.items():
            r["median"] = statistics.median(r["seconds"])
            # a ratio of medians, and the medians of the interleaved rounds' ratios agree where the machine is calm
            r["of_floor"] = r["median"] / base
            out.append({"n": n, "h": h, "v": v, "dtype": str(dtype).split(".")[1], "objective": name, "way": way, **r})
            error = "-" if r["dw_error"] is None else f"{r['dw_error']:.1e}"
            extra = "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:.0f} MiB"
            cells = f"{n:>6} {out[-1]['dtype']:<9}{name:<12}{way:<13}{error:>9}{r['median'] * 1e3:>9.0f} ms"
            print(f"{cells}{r['of_floor']:>7.2f} x{extra:>11}", flush=True)
    return out


def materialised_fp64(name, hidden, weight, target, t_hidden, t_weight):
    z = hidden @ weight.t()
    from burnish import reference

    return reference.row_loss(z, target, OBJECTIVES[name], teacher=t_hidden @ t_weight.t()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="N,H,V")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("     n dtype    objective   way           error dW   median  of floor   extra")
    table = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            table += measure(*map(int, shape.split(",")), getattr(torch, dtype), options.device, options.repeats)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    path = Path(__file__).parent / "results" / f"linear_loss_{name.replace(' ', '_').lower()}.json"
    meta = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "burnish": burnish.__version__,
    }
    path.write_text(json.dumps({**meta, "rows": table}, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
