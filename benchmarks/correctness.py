"""How wrong each way of computing a loss is, and which known defects it has: live, on a CPU, in a few minutes.

    python benchmarks/correctness.py [--output benchmarks/results/correctness.json]

Two parts, each in two processes, one plain and one with Triton's interpreter for burnish's and Liger's Triton kernels:

* table: relative error of loss, dX and dW against fp64 of the same operands, by objective, dtype and way; every
  objective for burnish and for plain torch in the same dtype, and those that a peer offers for the peer.
* checks: defects that were reported of, or found in, libraries of this kind.  Each runs burnish's code and the peers'
  and says what happened.  Exit status 1 if burnish fails one; a peer's outcome is recorded as found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
sys.path.append(str(ROOT / "tests"))  # the objectives' arguments, and bf16 for the interpreter
if INTERPRETED:  # before a kernel is decorated
    import interpreter

    interpreter.install()

import cases  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peers import (  # noqa: E402
    OBJECTIVES,
    Problem,
    Way,
    exact,
    installed,
    liger_triton_ways,
    our_ways,
    peer_ways,
    problem,
)
from torch import Tensor  # noqa: E402

from burnish import linear_loss, objectives, reference, row_loss  # noqa: E402

BACKENDS = ("triton",) if INTERPRETED else ("host", "torch")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Rows, hidden size, vocabulary: three chunks of tokens on the CPU; an interpreter is slow.
SHAPE = (12, 24, 257) if INTERPRETED else (520, 48, 509)
#: Below one unit in the last place of fp32 a loss's error is luck.
EPS = torch.finfo(torch.float32).eps
Outcome = tuple[bool, str]


def relative(got: Tensor | None, want: Tensor) -> float:
    if got is None:
        return float("inf")
    return float(f"{float((got.double() - want).norm() / want.norm()):.3g}")


def plain_ways() -> list[Way]:
    """Everybody's but the compiled forms, whose numbers benchmarks/linear_loss.py has."""
    ways = [w for w in peer_ways("cpu") if "compile" not in w.name and w.name not in ("liger_chunked", "torch_upcast")]
    if INTERPRETED:
        ways = [w for w in ways if w.name == "torch"] + (liger_triton_ways() if installed("liger_kernel") else [])
    return our_ways(BACKENDS) + ways


# ---------------------------------------------------------------------------------------------------- errors


def loss_scale(dtype: torch.dtype) -> float:
    """As training in fp16 has it; the gradients of a mean would leave its range."""
    return 1024.0 if dtype == torch.float16 else 1.0


def peer_rows() -> Iterator[dict]:
    """The objectives that peers offer, on one problem."""
    n, h, v = SHAPE
    for label, dtype in DTYPES.items():
        p = problem(n, h, v, dtype, scale=0.4)
        for name in OBJECTIVES:
            want = exact(name, p)
            for way in plain_ways():
                if name not in way.objectives:
                    continue
                q, factor = p.trainable(), loss_scale(dtype)
                try:
                    loss = way.loss(name, q)
                    (loss * factor).backward()
                except Exception as error:
                    yield {"objective": name, "dtype": label, "way": way.name, "failed": first_line(error)}
                    continue
                got = (loss.detach(), *(x.grad.double() / factor for x in (q.hidden, q.weight)))
                errors = dict(zip(("loss", "dx", "dw"), map(relative, got, want), strict=True))
                yield {"objective": name, "dtype": label, "way": way.name, **errors}


def our_rows() -> Iterator[dict]:
    """Every registered objective: burnish, and plain torch on whole logits in the operands' dtype."""
    n, h, v = SHAPE
    for name in objectives.names():
        arguments = cases.ARGUMENTS.get(name, [{}])[0]
        for label, dtype in DTYPES.items():
            o, hidden, weight, bias, target, extra = cases.problem(name, arguments, n, v, h=h, dtype=dtype)
            weight = weight * 0.5  # logits of standard deviation about 2.4
            side = {k: x for k, x in extra.items() if k != "teacher"}
            teacher, valid, factor = extra.get("teacher"), (target != -100).sum(), loss_scale(dtype)

            def whole(kind: torch.dtype, up: torch.dtype, o=o, target=target, side=side, teacher=teacher,
                      operands=(hidden, weight, bias), valid=valid, factor=factor):  # fmt: skip
                x, w, b = (a.to(kind, copy=True).requires_grad_() for a in operands)
                t = None
                if teacher is not None:
                    t = (teacher.hidden.to(kind) @ teacher.weight.to(kind).T + teacher.bias.to(kind)).to(up)
                losses = reference.row_loss((x @ w.T + b).to(up), target, o, teacher=t, **side)
                loss = losses.sum() / valid
                (loss * factor).backward()
                return loss.detach(), x.grad.double() / factor, w.grad.double() / factor

            def row(way: str, got, want=None, name=name, arguments=arguments, label=label):
                errors = dict(zip(("loss", "dx", "dw"), map(relative, got, want), strict=True))
                return {"objective": name, "arguments": arguments, "dtype": label, "way": way, **errors}

            want = whole(torch.float64, torch.float64)
            yield row("torch", whole(dtype, torch.float32), want)
            for backend in BACKENDS:
                x, w, b = (a.clone().requires_grad_() for a in (hidden, weight, bias))
                loss = linear_loss(x, w, target, o, bias=b, backend=backend, reduction="sum", **extra) / valid
                (loss * factor).backward()
                got = (loss.detach(), x.grad.double() / factor, w.grad.double() / factor)
                yield row(f"burnish_{backend}", got, want)


# ---------------------------------------------------------------------------------------------------- checks

CHECKS: dict[str, dict] = {}


def check(title: str, source: str):
    """Registers a function that yields (who, function returning (passes, what happened))."""

    def add(function: Callable[[], Iterator[tuple[str, Callable[[], Outcome]]]]):
        CHECKS[function.__name__] = {"title": title, "source": source, "cases": function}
        return function

    return add


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return re.sub(r"/\S*/", "", f"{type(error).__name__}: {lines[0]}")[:160]  # no machine's paths


def small(dtype: torch.dtype = torch.float32, n=16, h=24, v=97, seed=1, scale=0.4) -> Problem:
    return problem(n, h, v, dtype, seed=seed, scale=scale)


def by_objective(names: tuple[str, ...]) -> Iterator[tuple[str, str, Way]]:
    for way in plain_ways():
        for name in names:
            if name in way.objectives:
                yield f"{way.name}, {name}", name, way


@check("a second backward of one graph gives the same gradients", "Liger's saved gradients are scaled in place")
def second_backward():
    for who, name, way in by_objective(("nll", "kd")):

        def run(name=name, way=way) -> Outcome:
            p = small()
            want = exact(name, p)
            q = p.trainable()
            loss = 2 * way.loss(name, q)
            ratios = []
            for keep in (True, False):
                q.weight.grad = None
                loss.backward(retain_graph=keep)
                ratios.append(float((q.weight.grad * want[2]).sum() / want[2].square().sum()))
            return all(abs(r - 2) < 1e-4 for r in ratios), f"dW of 2 x loss: {ratios[0]:.4g} x, then {ratios[1]:.4g} x"

        yield who, run


@check("logits handed in are not written", "Liger cross entropy stores the gradient in its input")
def logits_overwritten():
    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> Outcome:
        g = torch.Generator().manual_seed(0)
        leaf, target = torch.randn(6, 33, generator=g).requires_grad_(), torch.arange(6)
        z = leaf * 1.0
        before = z.detach().clone()
        value = loss(z, target)
        changed = float((z.detach() - before).abs().max())
        value.backward()
        want = (before.double().softmax(1) - F.one_hot(target, 33)) / 6
        error = relative(leaf.grad, want)
        return changed == 0 and error < 1e-5, f"logits moved by {changed:.2g}; gradient's error {error:.1e}"

    for backend in BACKENDS:
        yield f"burnish_{backend}", lambda b=backend: run(lambda z, y: row_loss(z, y, objectives.nll(), backend=b))
    if INTERPRETED and installed("liger_kernel"):
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        yield "liger_triton", lambda: run(lambda z, y: LigerCrossEntropyFunction.apply(z, y, None)[0])
    if not INTERPRETED:
        yield "torch", lambda: run(F.cross_entropy)


@check("a frozen hidden still trains the head", "Liger's gradient work depends on hidden.requires_grad; TRL#4612")
def frozen_hidden():
    for who, name, way in by_objective(("nll", "kd")):

        def run(name=name, way=way) -> Outcome:
            p = small()
            want = exact(name, p)[2]
            q = replace(p, weight=p.weight.detach().requires_grad_())
            way.loss(name, q).backward()
            if q.weight.grad is None:
                return False, "dW is None"
            error = relative(q.weight.grad, want)
            return error < 1e-4, f"dW's error {error:.1e}"

        yield who, run


def fused_losses(**options) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """NLL of (hidden, weight, target) with ``reduction`` and ``softcap``, everybody's who has them."""
    reduction, softcap = options.get("reduction", "mean"), options.get("softcap")
    for backend in BACKENDS:
        yield (
            f"burnish_{backend}",
            lambda x, w, y, b=backend: linear_loss(
                x, w, y, objectives.nll(), reduction=reduction, softcap=softcap, backend=b
            ),
        )
    if INTERPRETED:
        if installed("liger_kernel"):
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

            # bias, class weights, ignore_index, lse_square_scale, label_smoothing
            yield (
                "liger_triton",
                lambda x, w, y: Fused.apply(x, w, y, None, None, -100, 0.0, 0.0, reduction, softcap)[0],
            )
        return
    if softcap is None:
        whole = torch.float64 if options.get("fp64") else torch.float32
        yield "torch", lambda x, w, y: F.cross_entropy((x @ w.t()).to(whole), y, reduction=reduction)
        if hasattr(F, "linear_cross_entropy"):
            chunked = torch.nn.LinearCrossEntropyOptions()
            yield (
                "torch_lce_chunked",
                lambda x, w, y: F.linear_cross_entropy(x, w, y, reduction=reduction, options=chunked),
            )
    if installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        yield (
            "cce_torch_compile",
            lambda x, w, y: linear_cross_entropy(x, w, y, softcap=softcap, reduction=reduction, impl="torch_compile"),
        )

    def reduced(losses: Tensor, y: Tensor) -> Tensor:
        if reduction == "none":
            return losses
        return losses.sum() / ((y != -100).sum() if reduction == "mean" else 1)

    if installed("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl(x, w, y):  # the caller's mask, as its trainers do it
            logp = ChunkedLogProbFunction.apply(x, w, None, y.clamp(min=0), 1.0, 64, softcap, 1.0, ())[0]
            return reduced(torch.where(y == -100, 0.0, -logp), y)

        yield "trl", trl
    if installed("liger_kernel") and softcap is None:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        yield "liger_scaled", lambda x, w, y: reduced(LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, y), y)


def with_ignored(p: Problem) -> Tensor:
    target = p.target.clone()
    target[::3] = -100
    return target


@check("all labels ignored: no NaN", "Liger 0, torch NaN; an all-masked micro-batch")
def all_ignored():
    for who, loss in fused_losses():
        if who in ("trl", "liger_scaled"):
            continue  # they return a loss a token; the mean is the caller's

        def run(loss=loss) -> Outcome:
            q = small().trainable()
            value = loss(q.hidden, q.weight, torch.full_like(q.target, -100))
            if not value.requires_grad:
                return bool(value.isfinite()), f"loss {float(value):g}, without a graph"
            value.backward()
            largest = max(0.0 if x.grad is None else float(x.grad.abs().max()) for x in (q.hidden, q.weight))
            return bool(value.isfinite()) and largest == 0, f"loss {float(value):g}, largest gradient {largest:g}"

        yield who, run


@check("softcap", "a limit of tests: Liger's kernel needs libdevice's tanh, which the interpreter has not")
def softcap():
    for who, loss in fused_losses(softcap=5.0):

        def run(loss=loss) -> Outcome:
            p = small()
            e = p.to(torch.float64).trainable()
            F.cross_entropy(5 * torch.tanh(e.hidden @ e.weight.t() / 5), p.target).backward()
            q = p.trainable()
            loss(q.hidden, q.weight, p.target).backward()
            error = relative(q.weight.grad, e.weight.grad)
            return error < 1e-4, f"dW's error {error:.1e}"

        yield who, run


@check("fp64 gradcheck", "a limit of tests: code that casts to fp32 cannot be checked to fp64's precision")
def gradcheck():
    for who, loss in fused_losses(fp64=True):

        def run(loss=loss) -> Outcome:
            p = small(torch.float64, n=3, h=4, v=11).trainable()
            torch.autograd.gradcheck(
                lambda x, w: loss(x, w, p.target), (p.hidden, p.weight), fast_mode=True, nondet_tol=0.0
            )
            return True, "passes"

        yield who, run


@check("dW of low-precision operands is accumulated in fp32", "Liger#512, #830; error against one rounding of dW")
def accumulated_weight_gradient():
    for who, loss in fused_losses():

        def run(loss=loss) -> Outcome:
            p = small(torch.bfloat16, n=256 if INTERPRETED else 8192, h=8, v=64)
            want = exact("nll", p)[2]
            q = p.trainable()
            loss(q.hidden, q.weight, p.target).backward()
            error, rounding = relative(q.weight.grad, want), relative(want.to(torch.bfloat16), want)
            return error < 2 * rounding, f"dW's error {error:.1e}, {error / rounding:.1f} x one rounding"

        yield who, run


@check(
    "compiled, with ignored rows: the same loss",
    "Liger#1338, a wrong loss on GPUs, which the interpreter cannot show: it does not compile",
)
def compiled_ignored():
    for who, loss in fused_losses():
        if who == "cce_torch_compile":
            continue  # compiles itself

        def run(loss=loss) -> Outcome:
            p = small()
            target = with_ignored(p)
            e = p.to(torch.float64).trainable()
            value = F.cross_entropy(e.hidden @ e.weight.t(), target)
            value.backward()
            q = p.trainable()
            torch._dynamo.reset()
            got = torch.compile(loss)(q.hidden, q.weight, target)
            got.backward()
            error = relative(q.weight.grad, e.weight.grad)
            text = f"loss {float(got):.4f}, right {float(value):.4f}; dW's error {error:.1e}"
            return abs(float(got - value)) < 1e-4 and error < 1e-4, text

        yield who, run


@check("log-probabilities are never positive", "verl#2656: label logit and log-sum-exp of different precision")
def positive_logp():
    def data() -> Problem:
        p = small(torch.bfloat16, n=64, h=16, v=128, scale=1.0)
        # labels from sure to unsure
        hidden = p.weight[p.target].float() * torch.linspace(0.2, 2, 64)[:, None]
        return replace(p, hidden=hidden.to(torch.bfloat16))

    def run(logp: Callable[[Problem], Tensor]) -> Outcome:
        p = data()
        with torch.no_grad():
            got = logp(p).float()
        want = _labels((p.hidden.double() @ p.weight.double().t()).log_softmax(1), p.target)
        error = float((got - want).abs().max())
        text = f"largest {float(got.max()):.3g}, {int((got > 0).sum())} of 64 positive; largest error {error:.1e}"
        return bool((got <= 0).all()), text

    for backend in BACKENDS:
        yield f"burnish_{backend}", lambda b=backend: run(lambda p: linear_loss(
            p.hidden, p.weight, p.target, objectives.nll(), metrics=("logp",), backend=b)[1]["logp"])  # fmt: skip
    for who, loss in fused_losses(reduction="none"):
        if not who.startswith("burnish"):
            yield who, lambda f=loss: run(lambda p: -f(p.hidden, p.weight, p.target))
    if not INTERPRETED:

        def idiom(p: Problem) -> Tensor:
            exact_label = _labels(p.hidden.float() @ p.weight.float().t(), p.target)
            return exact_label - (p.hidden @ p.weight.t()).logsumexp(1)

        yield "torch, label in fp32, lse in bf16", lambda: run(idiom)


def _labels(x: Tensor, target: Tensor) -> Tensor:
    return x.gather(1, target[:, None])[:, 0]


@check("gradient of the label's logit where p = 0.999", "Liger#1329: p - 1 after rounding")
def sure_label_gradient():
    def data(dtype: torch.dtype) -> Problem:
        """An identity head, so that dX is the gradient of the logits."""
        v, target = 64, torch.arange(8)
        g = torch.Generator().manual_seed(3)
        z = torch.randn(8, v, generator=g) * 0.3
        z[torch.arange(8), target] = z.masked_fill(F.one_hot(target, v).bool(), -1e9).logsumexp(1) + 6.9
        none = torch.zeros(8, 1)
        return Problem(z.to(dtype), torch.eye(v, dtype=dtype), target, none, none, none, none)

    for label in ("bf16", "fp16"):
        losses = list(fused_losses(reduction="sum"))
        if not INTERPRETED:
            plain = ("torch, loss in the logits' dtype", lambda x, w, y: F.cross_entropy(x @ w.t(), y, reduction="sum"))
            losses.append(plain)
        for who, loss in losses:

            def run(loss=loss, label=label) -> Outcome:
                p = data(DTYPES[label])
                prob = _labels(p.hidden.double().softmax(1), p.target)
                q = p.trainable()
                value = loss(q.hidden, q.weight, p.target)
                value.sum().backward()
                got = _labels(q.hidden.grad.double(), p.target)
                error = float(((got - (prob - 1)) / (prob - 1)).abs().max())
                limit = 1.5 * torch.finfo(DTYPES[label]).eps
                return error < limit, f"largest relative error {error:.1e}"

            yield f"{who}, {label}", run


@check("per-token weights through reduction none", "Liger#338, #968")
def token_weights():
    for who, loss in fused_losses(reduction="none"):

        def run(loss=loss) -> Outcome:
            p = small()
            target, upstream = with_ignored(p), p.up_logp
            e, q = p.to(torch.float64).trainable(), p.trainable()
            right = F.cross_entropy(e.hidden @ e.weight.t(), target, reduction="none")
            (right * upstream).sum().backward()
            (loss(q.hidden, q.weight, target) * upstream).sum().backward()
            errors = relative(q.hidden.grad, e.hidden.grad), relative(q.weight.grad, e.weight.grad)
            return max(errors) < 1e-4, f"error of dX {errors[0]:.1e}, of dW {errors[1]:.1e}"

        yield who, run


@check("a teacher with padding rows is cut to the student's vocabulary", "LMOps#331; padded student logits leak mass")
def padded_teacher():
    for who, name, way in by_objective(("kd",)):
        if way.name == "torch":
            continue  # the materialised form has no convention

        def run(name=name, way=way) -> Outcome:
            p = small()
            padded = replace(p, t_weight=torch.cat([p.t_weight, torch.zeros(128, p.t_weight.shape[1])]))
            want = exact(name, p)
            q = padded.trainable()
            value = way.loss(name, q)
            value.backward()
            error = relative(q.weight.grad, want[2])
            return error < 1e-4, f"loss {float(value):.4f}, cut {float(want[0]):.4f}; dW's error {error:.1e}"

        yield who, run


@check("logits around -1e4", "SkyRL#2141: NaN where all logits are strongly negative")
def negative_logits():
    for who, loss in fused_losses():

        def run(loss=loss) -> Outcome:
            p = small()
            hidden, weight = p.hidden.clone(), p.weight.clone()
            hidden[:, 0], weight[:, 0] = 100.0, -100.0
            p = replace(p, hidden=hidden, weight=weight)
            want = exact("nll", p)
            q = p.trainable()
            value = loss(q.hidden, q.weight, p.target)
            value.backward()
            error = abs(float(value - want[0])), relative(q.hidden.grad[:, 1:], want[1][:, 1:])
            # fp32 logits of this size have steps of 1e-3
            return max(error) < 1e-2, f"loss off by {error[0]:.1e}, dX's error {error[1]:.1e}"

        yield who, run


@check("a label outside the vocabulary is an error", "a wild read, or a silent number")
def label_outside():
    for who, loss in fused_losses():
        if who == "liger_triton":
            continue  # a wild read may end the process

        def run(loss=loss) -> Outcome:
            p = small()
            target = p.target.clone()
            target[0] = 97
            try:
                value = loss(p.hidden, p.weight, target)
            except Exception as error:
                return True, first_line(error)
            return False, f"loss {float(value):.4f}, no error"

        yield who, run


def run_checks(skip: int) -> Iterator[dict]:
    """Outcomes of all cases but the first ``skip``, each announced before it runs."""
    every = [(name, *case) for name, entry in CHECKS.items() for case in entry["cases"]()]
    for name, who, function in every[skip:]:
        yield {"check": name, "who": who}
        try:
            passes, text = function()
        except Exception as error:
            passes, text = False, "raises " + first_line(error)
        yield {"check": name, "who": who, "passes": passes, "result": text}


# ---------------------------------------------------------------------------------------------------- both


def part(kind: str, skip: int) -> None:
    """One process's share, a JSON object a line, so that what a crash leaves is kept."""
    torch.set_num_threads(1)  # shapes this small lose more to waiting for a second thread than they gain
    warnings.filterwarnings("ignore")
    for row in itertools.chain(our_rows(), peer_rows()) if kind == "errors" else run_checks(skip):
        print(json.dumps({"kind": kind, "interpreter": INTERPRETED, **row}), flush=True)


def spawn(kind: str, interpreted: bool, skip: int = 0) -> tuple[list[dict], str]:
    """Rows of a part run in a process of its own, and how it ended if not well."""
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(Path(__file__)), "--part", kind, "--skip", str(skip)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows, "" if done.returncode == 0 else f"the process ends with {done.returncode}: {' '.join(last)}"[:200]


def all_checks(interpreted: bool) -> list[dict]:
    """A case that ends its process has failed; the ones after it run in the next."""
    out: list[dict] = []
    while True:
        rows, why = spawn("checks", interpreted, len(out))
        out += [r for r in rows if "result" in r]
        if not why:
            return out
        if not rows or "result" in rows[-1]:
            raise RuntimeError(why)
        out.append({**rows[-1], "passes": False, "result": why})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "correctness.json")
    parser.add_argument("--part", choices=("errors", "checks"), help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part(options.part, options.skip)
        return 0
    from linear_loss import versions

    begin, rows = time.monotonic(), []
    for interpreted in (False, True):
        got, why = spawn("errors", interpreted)
        if why:
            raise RuntimeError(why)
        rows += got + all_checks(interpreted)
    checks = []
    for name, entry in CHECKS.items():
        keys = ("who", "passes", "result", "interpreter")
        results = [{k: r[k] for k in keys} for r in rows if r["kind"] == "checks" and r["check"] == name]
        checks.append({"name": name, "title": entry["title"], "source": entry["source"], "results": results})
        print(f"{entry['title']}  [{entry['source']}]")
        for r in results:
            print(f"  {'passes' if r['passes'] else 'FAILS ':<7}{r['who']:<40}{r['result']}")
    errors = [{k: v for k, v in r.items() if k != "kind"} for r in rows if r["kind"] == "errors"]
    worst = worst_ratios(errors)
    print("largest error of burnish over that of plain torch in the same dtype, of all objectives:")
    for w in worst:
        print(f"  {w['dtype']} {w['way']:<16} loss {w['loss']:.2f} ({w['loss_objective']})  dX {w['dx']:.2f} "
              f"({w['dx_objective']})  dW {w['dw']:.2f} ({w['dw_objective']})")  # fmt: skip
    result = {
        "versions": versions(), "threads": 1, "seconds": round(time.monotonic() - begin, 1),
        "shapes": {"plain": [520, 48, 509], "interpreter": [12, 24, 257]},
        "worst_ratio_to_torch": worst, "checks": checks, "errors": errors,
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    ours = [r for c in checks for r in c["results"] if r["who"].startswith("burnish")]
    failed = sum(not r["passes"] for r in ours)
    print(f"{len(ours) - failed} of {len(ours)} of burnish's checks pass; {result['seconds']:.0f} s; {options.output}")
    return 1 if failed or not ours else 0


def worst_ratios(errors: list[dict]) -> list[dict]:
    """For each dtype and backend: the objective whose error is largest beside plain torch's in the same dtype."""
    key = ("objective", "dtype", "interpreter")
    ours = [r for r in errors if r["way"].startswith("burnish") and "arguments" in r]
    base = {tuple(r[k] for k in key): r for r in errors if r["way"] == "torch" and "arguments" in r}
    out = []
    for dtype, way in dict.fromkeys((r["dtype"], r["way"]) for r in ours):
        entry: dict = {"dtype": dtype, "way": way}
        for what in ("loss", "dx", "dw"):
            ratios = {
                r["objective"]: r[what] / max(base[tuple(r[k] for k in key)][what], EPS)
                for r in ours if (r["dtype"], r["way"]) == (dtype, way)
            }  # fmt: skip
            top = max(ratios, key=lambda name: ratios[name])
            entry |= {what: ratios[top], f"{what}_objective": top}
        out.append(entry)
    return out


if __name__ == "__main__":
    raise SystemExit(main())
