"""``burnish demo qk-restore``: a tiny hybrid learns recall, loses it to local reasoning, and has it restored.

The model (``toy.py``) learns to recall values of keys hidden among fillers, with a little of a chain whose steps each
need the two tokens before; then it is fine-tuned on the chain alone.  Then every restore of the paper's ablation, the
wrong one (queries and keys of the linear layers), QK-Pro, controls that know nothing of layers (all weights part of the
way back; a lower rate; queries and keys frozen while tuning), and two regimes in which there is little to repair:
fine-tuning on a chain over other tokens, and with a little recall mixed in.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ...paths import Additive, Scored, Selection, as_tensors, attention, everything, hypervolume, pareto_front
from ..demo_options import RecallDemoOptions
from ..demo_results import publish
from .demo_report import BACK, FROZEN, LENGTHS, LOWER, MIXED, OTHER, PRO, REGIMES, plot, table
from .drift import drift
from .options import QKRestoreOptions
from .probe import DistanceProbe
from .restore import restore, restore_path
from .toy import LINEAR, SOFTMAX, chain, model, recall

#: Fillers and pairs of a problem in pretraining, short ones first; questions of each.
BODIES, QUESTIONS = (24, 32, 48, 64, 96), 8
#: Share of pretraining's batches that are the chain; of the last regime's that are recall.
EXPOSURE, MIX = 0.08, 0.05
PRETRAIN_RATE = 3e-3
#: The paper does not give QK-Pro's; this is about the median of the keys' squared singular values here.
LAMBDA = 1.0
#: Name -> (layers, parts); "linear" are the layers that the method must leave alone.
VARIANTS = {
    "QK-Restore": ("softmax", "qk"), "Q only": ("softmax", "q"), "K only": ("softmax", "k"), "V only": ("softmax", "v"),
    "V and O": ("softmax", "vo"), "V, O and MLP": ("softmax", "vom"), "Q, K of linear layers": ("linear", "qk"),
}  # fmt: skip


def select(net, layers: str, parts: str) -> dict[str, Selection]:
    """Parts (m for the MLP) of the softmax layers, or of the linear ones."""
    kinds = {SOFTMAX: "linear", LINEAR: "softmax"} if layers == "linear" else None
    tensors = as_tensors(net)
    chosen = attention(tensors, net.config, parts=parts.replace("m", ""), kinds=kinds)
    if "m" in parts:
        inside = tuple(f"model.layers.{i}.mlp." for i in {s.layer for s in chosen.values()})
        chosen |= {name: Selection() for name in tensors if name.startswith(inside)}
    return chosen


def train(net, steps: int, lr: float, batches, title: str, quiet: bool = False) -> list[float]:
    """AdamW with a one-cycle rate; ``batches(share)`` gives (ids, labels) at a share of the run.  The losses."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    net.train()
    losses = []
    for step in tqdm(range(steps), desc=title, mininterval=2, disable=quiet):
        ids, labels = batches(step / steps)
        loss = net(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    net.eval()
    return losses


@torch.no_grad()
def accuracy(net, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of labelled tokens that the model puts first."""
    hits = total = 0
    for x, y in zip(ids.split(16), labels.split(16), strict=True):
        asked = y[:, 1:] != -100
        top = net(input_ids=x).logits[:, :-1].argmax(-1)
        hits += int((top == y[:, 1:])[asked].sum())
        total += int(asked.sum())
    return hits / total


def evaluate(net, problems: int, seed: int, other: bool = False) -> dict[str, float]:
    """Accuracy on the chain and on recall at each length; the problems are the same for every model of a seed."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    out = {"chain": accuracy(net, *chain(problems, generator, other=other))}
    for length in LENGTHS:
        # every problem asks for all its keys; fewer long ones
        count = max(32, min(problems, problems * 256 // length))
        out[f"recall {length}"] = accuracy(net, *recall(count, length, generator))
    return out


def one_seed(options: RecallDemoOptions, seed: int, quiet: bool = False) -> dict:
    """Everything for one seed."""
    generator = torch.Generator().manual_seed(seed)

    def pretraining(share: float):
        if float(torch.rand(1, generator=generator)) < EXPOSURE:
            return chain(options.batch_size, generator)
        # from the shortest to all of them over the first half
        known = min(len(BODIES), 1 + int(2 * len(BODIES) * share))
        body = BODIES[int(torch.randint(known, (1,), generator=generator))]
        return recall(options.batch_size, body + 3 * QUESTIONS, generator, QUESTIONS)

    before = model(seed)
    losses = train(before, options.pretrain_steps, PRETRAIN_RATE, pretraining, f"seed {seed}: recall", quiet)
    found: dict = {"seed": seed, "pretrain_loss": losses[::25], "regimes": {}}
    for regime in REGIMES:

        def tuning(_, regime=regime):
            if regime == MIXED and float(torch.rand(1, generator=generator)) < MIX:
                return recall(options.batch_size, 64 + 3 * QUESTIONS, generator, QUESTIONS)
            return chain(options.batch_size, generator, other=regime == OTHER)

        def tuned(net, rate=options.sft_learning_rate, regime=regime, tuning=tuning):
            rate = rate * 0.3 if regime == LOWER else rate
            train(net, options.sft_steps, rate, tuning, f"seed {seed}: {regime}", quiet)
            return net

        def score(net, regime=regime):
            return evaluate(net, options.problems, seed, regime == OTHER)

        after = tuned(copy.deepcopy(before))
        rows = {"before": score(before), "after": score(after), **_restored(before, after, score)}
        found["regimes"][regime] = {"rows": rows, "drift": _drift(before, after)}
        if regime == REGIMES[0]:
            frozen = copy.deepcopy(before)
            for name in select(frozen, "softmax", "qk"):
                frozen.get_parameter(name).requires_grad_(False)
            rows[FROZEN] = score(tuned(frozen))
            found |= _more(before, after, score, rows, seed)
            found["bytes_changed"] = _through_files(before, after, Path(options.output) / f"seed-{seed}")
    return found


def _restored(before, after, score) -> dict:
    work, rows = copy.deepcopy(after), {}
    for name, (layers, parts) in VARIANTS.items():
        Additive(before, after, select(after, layers, parts)).load_into(work, 0)
        rows[name] = score(work)
    return rows


def _drift(before, after) -> list[dict]:
    selector = {**select(after, "softmax", "qkvo"), **select(after, "linear", "qkvo")}
    rows = drift(as_tensors(before), as_tensors(after), selector, angles=True)
    return [{"layer": r.layer, "part": r.part, "relative": r.relative, "angle": r.angle} for r in rows]


def _more(before, after, score, rows: dict, seed: int) -> dict:
    """QK-Pro and both paths into ``rows``; the frontier of the restore's, and attention's distances."""
    work = copy.deepcopy(after)
    restore_path(before, after, options=QKRestoreOptions(mode="pro", lam=LAMBDA)).load_into(work, 0)
    rows[PRO] = score(work)
    points = []
    for kind, path in (
        ("Q, K", restore_path(before, after)), ("all weights", Additive(before, after, everything(as_tensors(after)))),
    ):  # fmt: skip
        for alpha in (0.1, 0.25, 0.5):
            path.load_into(work, 1 - alpha)
            rows[f"{kind}, {100 * alpha:.0f}{BACK}"] = score(work)
    for name, row in rows.items():
        if name not in ("before", FROZEN):
            recalled = sum(row[f"recall {n}"] for n in LENGTHS) / len(LENGTHS)
            points.append(Scored(row["chain"], recalled, name=name))
    distance = {}
    generator = torch.Generator().manual_seed(seed)
    problems = {"chain": chain(64, generator), "recall": recall(32, 128, generator)}
    for name, net in (("before", before), ("after", after)):
        for task, (ids, labels) in problems.items():
            with DistanceProbe(net) as probe:
                net(input_ids=ids, labels=labels).loss.backward()
            net.zero_grad()
            profile = probe.profile()
            distance[f"{task}, {name}"] = {"mean_distance": profile.mean_distance, "g": profile.absolute.tolist()}
    front = [p.name for p in pareto_front(points)]
    return {"front": front, "hypervolume": hypervolume(points), "distance": distance}


def _through_files(before, after, folder: Path) -> int:
    """The same through the command's own path, directories on disk: RuntimeError where it is not to the bit what it is
    in memory.  Returns the bytes that changed."""
    before.save_pretrained(folder / "before")
    after.save_pretrained(folder / "after")
    report = restore(folder / "before", folder / "after", folder / "restored")
    written = as_tensors(folder / "restored")
    for name, value in restore_path(before, after).at(0).items():
        if not torch.equal(written.tensor(name), value):
            raise RuntimeError(f"{folder / 'restored'}: {name} is not what it is in memory")
    return report.bytes_changed


def check_output(options: RecallDemoOptions) -> None:
    """ValueError where ``output`` holds something."""
    out = Path(options.output)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty directory")


def _one_seed_alone(options: RecallDemoOptions, seed: int) -> dict:
    """``one_seed`` in a process of its own, on one thread: a model this small gains nothing from a second."""
    torch.set_num_threads(1)
    return one_seed(options, seed, quiet=True)


def run(options: RecallDemoOptions) -> dict:
    """All seeds, a table, a plot, ``results.json`` and the checkpoints in ``output``; returns the results."""
    started = time.perf_counter()
    results: dict = {
        "options": asdict(options), "constants": {"exposure": EXPOSURE, "mix": MIX, "lambda": LAMBDA},
        "parameters": sum(p.numel() for p in model(0).parameters()), "cores": os.cpu_count(),
        "torch": torch.__version__, "seeds": [],
    }  # fmt: skip
    seeds = range(options.seed, options.seed + options.seeds)
    workers = min(options.workers, len(seeds))
    if workers == 1:
        results["seeds"] = [one_seed(options, seed) for seed in seeds]
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            made = pool.map(_one_seed_alone, [options] * len(seeds), seeds)
            results["seeds"] = list(tqdm(made, total=len(seeds), desc="seeds"))
    results["seconds"] = time.perf_counter() - started
    # a dictionary's keys are text in JSON: the report is made from what a reader of the file has
    publish(json.loads(json.dumps(results)), Path(options.output), table, plot)
    return results
