"""``burnish demo q0``: many epochs over a small text, spent in several ways.

The text is modules of Python's standard library as they are on this machine; training, fitness and validation text are
different modules.  A Llama of transformers with 0.25M parameters, AdamW.  Every arm has the same number of passes over
the training text in all, whatever models it makes of them; what a teacher's forward costs comes on top.

The baselines' decay is chosen from ``DECAYS`` on each seed's fitness text, and so is q0's in its last row; the rows
that leave parts of q0 out have the same decay as the row "q0", one number for all seeds.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import statistics
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from ..demo_results import publish
from ..intervals import interval
from ..run_directory import write_json
from .config import HyperEpochConfig
from .demo_options import Q0DemoOptions
from .prior import effective_size, learn_prior, mixture_nll, sweep_k
from .schedule import lr_mult, wd_mult
from .snapshots import log_probs_of
from .text import make_tokenizer, tokenized
from .trainer import HyperEpochTrainer

TRAIN = ("fnmatch", "glob", "copy")
FITNESS = ("reprlib", "linecache", "getopt")
VALIDATION = ("sched", "fileinput", "filecmp")
VOCABULARY, LENGTH = 512, 128
#: What weight decay is chosen from.
DECAYS = (0.1, 1.0, 3.0)
#: q0 and what is left out of it, over the defaults of ``HyperEpochConfig``.
ARMS: dict[str, dict] = {
    "q0": {},
    "q0 without distillation": {"distill_share": 0.0},
    "q0, flat decay of the same mean": {"flat": True},
    "q0 without noise": {"perturb_first": 0.0, "perturb_last": 0.0},
    "q0, two trajectories of half the epochs": {"trajectories": 2},
}
SINGLE, STOPPED, LONG, INDEPENDENT = (
    "single run, decay tuned", "best single model of all ordinary runs", "one ordinary run's snapshots",
    "independent runs",
)  # fmt: skip
_MAY_CHANGE = ("seeds", "processes", "output")
TUNED = "q0, decay tuned"
#: One ordinary schedule over the run: no cycles, no teacher, no noise.
_ORDINARY = {"lr_schedule": "once", "wd_floor": 1.0, "distill_share": 0.0, "perturb_first": 0.0, "perturb_last": 0.0}


def documents(names: tuple[str, ...]) -> list[str]:
    """Standard modules, cut before their functions and classes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    pieces = [p for n in names for p in re.split(r"(?m)^(?=(?:def|class) )", (library / f"{n}.py").read_text())]
    return [p for p in pieces if p.strip()]


def texts() -> dict[str, list[np.ndarray]]:
    """Token ids of the three texts, by a BPE made of the training text."""
    train = documents(TRAIN)
    tokenizer = make_tokenizer(f"bpe:{VOCABULARY}", train)
    named = {"train": train, "fitness": documents(FITNESS), "eval": documents(VALIDATION)}
    return {name: tokenized(pieces, tokenizer) for name, pieces in named.items()}


def model(seed: int) -> LlamaForCausalLM:
    """0.25M parameters, embeddings tied."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH + 1, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=0,
    ))  # fmt: skip


def train(data: dict, options: Q0DemoOptions, folder: Path, seed: int, epochs: int, **arm) -> dict[str, Tensor]:
    """One trajectory; log-probabilities (M, N) of its snapshots, {"fitness", "eval"}."""
    shutil.rmtree(folder, ignore_errors=True)
    fields = {
        "learning_rate": options.learning_rate, "weight_decay": options.weight_decay,
        "distill_after_cycles": options.distill_after, **arm,
    }  # fmt: skip
    trainer = HyperEpochTrainer(
        model(seed),
        HyperEpochConfig(
            output_dir=str(folder), cycles=epochs // options.epochs_per_cycle,
            epochs_per_cycle=options.epochs_per_cycle, seq_length=LENGTH, seed=seed, save_strategy="no",
            per_device_train_batch_size=options.batch_size, adam_beta2=0.95, report_to="none", disable_tqdm=True,
            bf16=False, use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=False,
            logging_steps=10_000, per_device_eval_batch_size=16, **fields,
        ),
        train_dataset=data["train"], fitness_dataset=data["fitness"], eval_dataset=data["eval"],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found = {name: log_probs_of(trainer.snapshot_folders(), name) for name in ("fitness", "eval")}
    shutil.rmtree(folder)
    return found


def long_runs(data: dict, options: Q0DemoOptions, folder: Path, seed: int) -> dict[str, Tensor]:
    """One ordinary run of all epochs for each decay, with a snapshot wherever q0 has one."""
    found: dict[str, Tensor] = {}
    for decay in DECAYS:
        out = train(data, options, folder, seed, options.epochs, weight_decay=decay, **_ORDINARY)
        found |= {f"{name} {decay}": log_probs for name, log_probs in out.items()}
    return found


def independent_runs(data: dict, options: Q0DemoOptions, folder: Path, seed: int) -> dict[str, Tensor]:
    """Ordinary runs of a share of the epochs each; all have the decay that is best for the first."""
    epochs = options.epochs // options.runs

    def last(number: int, decay: float) -> dict[str, Tensor]:
        out = train(data, options, folder, seed + number, epochs, weight_decay=decay, **_ORDINARY)
        return {name: log_probs[-1] for name, log_probs in out.items()}

    first = [last(0, decay) for decay in DECAYS]
    best = max(range(len(DECAYS)), key=lambda i: float(first[i]["fitness"].mean()))
    runs = [first[best], *(last(number, DECAYS[best]) for number in range(1, options.runs))]
    found = {name: torch.stack([run[name] for run in runs]) for name in ("fitness", "eval")}
    return found | {f"{name} first": torch.stack([run[name] for run in first]) for name in ("fitness", "eval")}


def q0_run(data: dict, options: Q0DemoOptions, folder: Path, seed: int, arm: dict) -> dict[str, Tensor]:
    """One arm of ``ARMS``."""
    arm = dict(arm)
    trajectories = arm.pop("trajectories", 1)
    if arm.pop("flat", False):
        arm |= {"wd_floor": 1.0, "weight_decay": options.weight_decay * mean_decay(100)}
    epochs = options.epochs // trajectories
    parts = [train(data, options, folder, seed + number, epochs, **arm) for number in range(trajectories)]
    return {name: torch.cat([part[name] for part in parts]) for name in ("fitness", "eval")}


def other_decays(data: dict, options: Q0DemoOptions, folder: Path, seed: int) -> dict[str, Tensor]:
    """q0 at the decays that the row "q0" does not have."""
    found: dict[str, Tensor] = {}
    for decay in DECAYS:
        if decay != options.weight_decay:
            out = train(data, options, folder, seed, options.epochs, weight_decay=decay)
            found |= {f"{name} {decay}": log_probs for name, log_probs in out.items()}
    return found


def mean_decay(steps: int) -> float:
    """Mean of the decay's multiplier over a cycle as it acts, that is weighed by the learning rate."""
    rates = [lr_mult(s, steps) for s in range(steps)]
    return sum(r * wd_mult(s, steps) for s, r in enumerate(rates)) / sum(rates)


def job(name: str, seed: int, options: Q0DemoOptions) -> None:
    """Train what ``name`` stands for; its log-probabilities go to OUTPUT/seed-N/NAME.safetensors."""
    torch.set_num_threads(1)
    target = _file(options, seed, name)
    data, folder, start = texts(), target.with_suffix(""), 1000 * (seed + 1)
    if name == LONG:
        found = long_runs(data, options, folder, start)
    elif name == INDEPENDENT:
        found = independent_runs(data, options, folder, start)
    elif name == TUNED:
        found = other_decays(data, options, folder, start)
    else:
        found = q0_run(data, options, folder, start, ARMS[name])
    save_file({k: v.contiguous() for k, v in found.items()}, target.with_suffix(".tmp"))
    target.with_suffix(".tmp").rename(target)


def run(options: Q0DemoOptions) -> dict:
    """All arms over all seeds; writes ``output``/results.json and curves.png; returns the results."""
    out = Path(options.output)
    record, told = out / "options.json", {k: v for k, v in asdict(options).items() if k not in _MAY_CHANGE}
    if record.is_file() and json.loads(record.read_text()) != told:
        raise ValueError(f"output {out}: is of a demo with other options; give another --output")
    todo = []
    for seed in range(options.seeds):
        (out / f"seed-{seed}").mkdir(parents=True, exist_ok=True)
        todo += [(n, seed) for n in (LONG, INDEPENDENT, *ARMS, TUNED) if not _file(options, seed, n).is_file()]
    write_json(record, told)
    seconds = json.loads((out / "seconds.json").read_text()) if (out / "seconds.json").is_file() else 0.0
    started = time.perf_counter()
    bar = tqdm(total=len(todo), desc="demo q0")
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(job, *work, options) for work in todo]):
            future.result()
            bar.update()
            write_json(out / "seconds.json", seconds + time.perf_counter() - started)
    bar.close()
    data = texts()
    results = {
        "options": asdict(options), "decays": DECAYS, "mean_decay": mean_decay(100),
        "python": platform.python_version(),
        "parameters": model(0).num_parameters(),
        "tokens": {name: int(sum(map(len, pieces))) for name, pieces in data.items()},
        "text": {"train": TRAIN, "fitness": FITNESS, "eval": VALIDATION},
        "seeds": [summary(options, seed) for seed in range(options.seeds)],
        "seconds": seconds + time.perf_counter() - started,
    }  # fmt: skip
    publish(results, out, table, plot)
    return results


def summary(options: Q0DemoOptions, seed: int) -> dict:
    """NLL on the validation text, nats a token, of one seed's arms; what is chosen is chosen by the fitness text."""
    long = load_file(_file(options, seed, LONG))
    runs = load_file(_file(options, seed, INDEPENDENT))
    by_decay = {decay: _mixed(long[f"fitness {decay}"], long[f"eval {decay}"]) for decay in DECAYS}
    single = min(by_decay.values(), key=lambda m: m["members_fitness"][-1])
    everyone = [
        pair
        for m in [*by_decay.values(), _mixed(runs["fitness first"], runs["eval first"])]
        for pair in zip(m["members_fitness"], m["members"], strict=True)
    ]
    rows = {
        SINGLE: {"best": single["members"][-1]},
        STOPPED: {"best": min(everyone)[1]},
        LONG: min(by_decay.values(), key=lambda m: m["learned_fitness"]),
        INDEPENDENT: _mixed(runs["fitness"], runs["eval"]),
    }
    for name in ARMS:
        found = load_file(_file(options, seed, name))
        rows[name] = _mixed(found["fitness"], found["eval"])
    other = load_file(_file(options, seed, TUNED))
    decays = [decay for decay in DECAYS if f"fitness {decay}" in other]
    every = [rows["q0"], *(_mixed(other[f"fitness {d}"], other[f"eval {d}"]) for d in decays)]
    rows[TUNED] = min(every, key=lambda m: m["learned_fitness"])
    return {"rows": rows, "ordinary": {str(decay): m["members"] for decay, m in by_decay.items()}}


def _mixed(fitness: Tensor, held_out: Tensor) -> dict:
    uniform = torch.full((len(fitness),), 1 / len(fitness), dtype=torch.float64)
    weights = learn_prior(fitness).weights
    ks = range(1, len(fitness) + 1)
    members, own = ((-x.double().mean(1)).tolist() for x in (held_out, fitness))
    return {
        "best": members[own.index(min(own))], "uniform": mixture_nll(held_out, uniform),
        "learned": mixture_nll(held_out, weights), "learned_fitness": mixture_nll(fitness, weights),
        "effective": effective_size(weights), "weights": weights.tolist(), "members": members, "members_fitness": own,
        "top": {
            kind: [p.second_nll for p in sweep_k(fitness, weights, ks, refit=refit, second=held_out)]
            for kind, refit in (("renormalised", False), ("refit", True))
        },
    }  # fmt: skip


def about(results: dict) -> str:
    """A paragraph on what was run."""
    o, tokens, text = results["options"], results["tokens"], results["text"]
    names = {kind: ", ".join(text[kind]) for kind in text}
    return (
        f"`burnish demo q0`: {results['parameters']:,} parameters, {tokens['train']:,} training tokens "
        f"({names['train']}), {tokens['fitness']:,} fitness tokens ({names['fitness']}), {tokens['eval']:,} validation "
        f"tokens ({names['eval']}), {o['epochs']} epochs in all for every arm, cycles of {o['epochs_per_cycle']}, "
        f"teacher after {o['distill_after']} cycles, {o['seeds']} seeds, {results['seconds'] / 60:.0f} minutes with "
        f"{o['processes']} process{'es' if o['processes'] > 1 else ''} (Python {results['python']}). Validation NLL in "
        "nats a token; 95% intervals over seeds; the last column is paired."
    )


def table(results: dict) -> str:
    """The results as a Markdown table: means over seeds with 95% intervals."""

    def cell(values: list[float], sign: str = "", digits: int = 3) -> str:
        mean, half = interval(values)
        return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"

    seeds = [s["rows"] for s in results["seeds"]]
    lines = [
        "| | models | best member | uniform weights | learned weights | effective members | learned, minus q0's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in seeds[0]:
        rows = [s[name] for s in seeds]
        if "learned" in rows[0]:
            less = [r["learned"] - s["q0"]["learned"] for r, s in zip(rows, seeds, strict=True)]
            cells = [
                str(len(rows[0]["members"])),
                *(cell([r[c] for r in rows]) for c in ("best", "uniform", "learned")),
            ]
            cells += [cell([r["effective"] for r in rows], digits=1), "0" if name == "q0" else cell(less, "+")]
        else:
            less = [r["best"] - s["q0"]["learned"] for r, s in zip(rows, seeds, strict=True)]
            cells = ["1", cell([r["best"] for r in rows]), "", "", "", cell(less, "+")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Validation NLL of models by epoch, and of mixtures by their size; means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    o = results["options"]
    seeds = results["seeds"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained", sharey=True)
    epochs = [o["epochs_per_cycle"] * (c + 1) for c in range(o["epochs"] // o["epochs_per_cycle"])]
    mean = lambda rows: [statistics.fmean(column) for column in zip(*rows, strict=True)]  # noqa: E731
    for number, decay in enumerate(results["decays"]):
        grey = str(0.8 - 0.6 * number / len(results["decays"]))
        curve = mean([s["ordinary"][str(decay)] for s in seeds])
        left.plot(epochs, curve, color=grey, label=f"ordinary run, decay {decay:g}")
    for name, color in zip(("q0", "q0 without distillation"), ("C0", "C1"), strict=True):
        left.plot(
            epochs, mean([s["rows"][name]["members"] for s in seeds]), "o-", ms=3, color=color, label=f"{name}: members"
        )
    shown = {"q0": "C0", "q0 without distillation": "C1", LONG: "0.4", INDEPENDENT: "C2",
             "q0, two trajectories of half the epochs": "C4"}  # fmt: skip
    for name, color in shown.items():
        curve = mean([s["rows"][name]["top"]["refit"] for s in seeds])
        right.plot(range(1, len(curve) + 1), curve, "o-", ms=3, color=color, label=name)
    left.set(xlabel="epochs", ylabel="validation NLL, nats a token", title="single models")
    right.set(xlabel="members K of the largest weights, learned anew", title="mixtures")
    low = min(min(s["rows"]["q0"]["top"]["refit"]) for s in seeds)
    left.set_ylim(low - 0.05, low + 0.9)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.suptitle(f"{o['epochs']} epochs in all for every arm; means of {o['seeds']} seeds", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _file(options: Q0DemoOptions, seed: int, name: str) -> Path:
    plain = name.replace(" ", "-").replace(",", "").replace("'", "")
    return Path(options.output) / f"seed-{seed}" / f"{plain}.safetensors"
