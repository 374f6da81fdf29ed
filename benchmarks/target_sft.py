"""Learning from wrong and from non-unique demonstrations: SFT, its relatives and Target-SFT on a small model.

    python benchmarks/target_sft.py [--workers 2] [--fresh]

Each run is appended to runs/target_sft/runs.jsonl as it ends; a killed study goes on from there.  The end writes
benchmarks/results/target_sft.json and docs/target_sft.png.

The protocol, fixed before any final run was looked at:

Tasks.  Three of reasoning-gym, in equal parts, each with the package's own verifier, in a short form of its question.
``spell_backward`` (three to six letters) has one right answer.  ``palindrome_generation`` (three or four letters) has
two where two letters occur twice, and the demonstration is either.  ``number_sorting`` (two or three whole numbers
below 100, ascending or descending) takes any JSON list, and the demonstration is [7,23] or [7, 23], half each.

Noise.  A corrupted demonstration has the answer of another problem of its task, one that the verifier rejects.  Each
row is corrupted with probability 0, 0.3 or 0.6; prompts and held-out problems never are.

Models.  Llama of two layers, half a million parameters, one token a character.  The *base* model is trained by NLL on
clean rows of these tasks; one in five hundred is in the form of question that fine-tuning and the tests use, the others
end in another character.  So it has the skills in part, and the form hardly.  The *strong* one has the same shape,
another initialisation, half of its rows in either form, and is trained several times longer.  Both are made once and
shared by all seeds, so the intervals do not cover the luck of their training.  No held-out problem, in whatever order
of its letters or numbers, is in their rows or in a fine-tuning set.

Methods.  Every run starts at the base model and differs in the objective alone, through ``burnish.linear_loss``:

    objective                 what it is given as teacher
    SFT, DFT, GEM             nothing
    ASFT                      the base model (its reference)
    KD, KD hybrid             the strong model, frozen
    Target-SFT, each eta      the strong model, frozen
    Target-SFT, base          the base model, frozen

So KD, KD hybrid and Target-SFT with the strong model see what the others do not; KD, which reads no label at all, says
how far that alone goes.  The strong model was trained on clean rows: it stands for a teacher that is right more often
than the data.  A teacher reads the same, perhaps corrupted, prefix as the student.

Seeds.  A seed draws the fine-tuning problems, their corruption and the order of batches; all methods share them, so
that differences to SFT are paired by seed.  Intervals are 95 %, by Student's t over seeds; the test problems are the
same for all, and the intervals do not cover their choice.

Learning rate.  Each method, each eta included, is run at each rate on the sweep seeds, which are used for nothing else,
at noise 0.3, and keeps the rate with the highest mean accuracy on validation problems (on a tie the lower one), at
all noise shares.  The same validation accuracy chooses an eta above 0.  That eta and the other methods are run at every
noise share, the other etas at 0.3.  eta 0 has DFT's gradient: it takes DFT's rate, as a check.

Pilots, on a seed of their own and the validation problems, settled the tasks (what the strong model learns in two
minutes), the base model's share of the new form, and the range of rates.  They ran SFT, DFT and Target-SFT at eta 0.3,
and of the other methods at most one sweep run each; of test accuracies only the two pretrained models' was seen.

Metrics, after the last step, on the test problems: accuracy, the share of greedy answers with full score (primary);
mean NLL of a token of the clean demonstrations, which for palindromes cannot reach 0.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from burnish import Teacher, linear_loss, objectives
from burnish.methods import accuracy, intervals
from burnish.methods.data import TaskData, load_task

ROOT = Path(__file__).resolve().parents[1]

TASKS: dict[str, dict] = {
    "number_sorting": {
        "min_numbers": 2,
        "max_numbers": 3,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    },
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
    "palindrome_generation": {"min_length": 3, "max_length": 4},
}
CHARACTERS = "0123456789=?<~[], " + "abcdefghijklmnopqrstuvwxyz"
#: What ends a question: in most of the base model's rows, and in fine-tuning and tests.
OLD, NEW = "=", "?"
#: Two ways to write a JSON list.
SEPARATORS = ((",", ":"), (", ", ": "))
#: reasoning-gym's entry i of seed s is that of seed s + i: our sets lie this far apart.
SET = 1_000_000


@dataclass(frozen=True)
class Method:
    """An objective and whom it gets as teacher: None, "base" or "strong"."""

    label: str
    objective: str
    arguments: dict
    teacher: str | None = None


def target(eta: float, teacher: str = "strong") -> Method:
    suffix = ", base as teacher" if teacher == "base" else ""
    return Method(f"Target-SFT, eta {eta:g}{suffix}", "target_sft", {"eta": eta}, teacher)


ETAS = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
METHODS: dict[str, Method] = {
    "sft": Method("SFT", "nll", {}),
    "dft": Method("DFT", "dft", {}),
    "gem": Method("GEM, beta 0.7", "gem", {"beta": 0.7}),
    "asft": Method("ASFT, lambda 0.1", "asft", {"lam": 0.1}, "base"),
    "kd_hybrid": Method("KD hybrid, lambda 0.5", "kd_hybrid", {"lam": 0.5}, "strong"),
    "kd": Method("KD", "kd", {}, "strong"),
    **{f"target_{eta:g}": target(eta) for eta in ETAS},
    "target_base": target(0.3, "base"),
}


ETA_METHODS = tuple(f"target_{eta:g}" for eta in ETAS)
#: DFT under another name.
CHECK = "target_0"


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = tuple(METHODS)
    noises: tuple[float, ...] = (0.0, 0.3, 0.6)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sweep_seeds: tuple[int, ...] = (100, 101)
    sweep_noise: float = 0.3
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    base_steps: int = 600
    strong_steps: int = 2500
    pretrain_rows: int = 20_000  # a task
    pretrain_rate: float = 4e-3
    rows: int = 267  # a task: two epochs
    steps: int = 100
    batch_size: int = 16
    pretrain_batch_size: int = 32
    problems: int = 200  # held out, a task, for test and again for validation
    width: int = 128
    layers: int = 2
    heads: int = 4


# --- data


def question(task: str, entry: dict, end: str = NEW) -> str:
    """A short form of the entry's question: "a34,12" (ascending), "<word", "~letters"; and its end."""
    facts = entry["metadata"]
    if task == "number_sorting":
        return facts["direction"][0] + ",".join(str(int(float(x))) for x in facts["original_numbers"]) + end
    if task == "spell_backward":
        return f"<{facts['word'].lower()}{end}"
    return f"~{''.join(facts['letters'])}{end}"


def problem(task: str, entry: dict) -> str:
    """The same for entries that differ in the order of their letters or numbers alone."""
    text = question(task, entry)
    return text if task == "spell_backward" else text[0] + str(sorted(text[1:-1].split(",") if "," in text else text))


def demonstration(task: str, entry: dict, rng: random.Random) -> str:
    """A right answer, in one of its forms."""
    if task == "number_sorting":
        return json.dumps(
            [int(float(x)) for x in entry["metadata"]["sorted_numbers"]], separators=rng.choice(SEPARATORS)
        )
    answer = entry["answer"].lower()
    if task == "palindrome_generation" and len(answer) == 4:
        return rng.choice([answer, answer[1] + answer[0] + answer[0] + answer[1]])
    return answer


def forms(task: str, entry: dict) -> int:
    """How many right answers there are, as ``demonstration`` writes them."""
    if task == "palindrome_generation":
        return 2 if len(entry["answer"]) == 4 and len(set(entry["answer"])) == 2 else 1
    return len(SEPARATORS) if task == "number_sorting" else 1


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    ids = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@functools.cache
def held_out(settings: Settings, which: str) -> dict[str, TaskData]:
    """The test or validation problems of each task, no two alike and none in both sets."""
    sets: dict[str, dict[str, TaskData]] = {"test": {}, "validation": {}}
    for task, arguments in TASKS.items():
        pool = load_task(task, size=4 * settings.problems + 100, seed=0, **arguments)
        distinct = list({problem(task, e): e for e in pool.entries}.values())
        for i, name in enumerate(sets):
            part = distinct[i * settings.problems : (i + 1) * settings.problems]
            assert len(part) == settings.problems, task
            sets[name][task] = TaskData(task, pool.task, part)
    return sets[which]


@functools.lru_cache(maxsize=2)  # the methods of a seed and noise follow each other
def demonstrations(
    settings: Settings, size: int, seed: int, noise: float, new: float = 1.0
) -> tuple[list[tuple[str, str]], dict]:
    """``size`` rows (prompt, completion) of each task, a share ``new`` in the new form; and what was done to them.

    No held-out problem is among them.  ``corrupted`` is the share of rows with a wrong answer, ``non_unique`` the share
    of rows whose problem has more than one right answer.
    """
    rng = random.Random(seed)
    rows, corrupted, several = [], 0, 0
    for task, arguments in TASKS.items():
        taken = {problem(task, e) for which in ("test", "validation") for e in held_out(settings, which)[task].entries}
        pool = load_task(task, size=2 * size + 100, seed=(seed + 1) * SET, **arguments)
        entries = [e for e in pool.entries if problem(task, e) not in taken][:size]
        assert len(entries) == size, task
        for entry in entries:
            answer = demonstration(task, entry, rng)
            if rng.random() < noise:
                while pool.task.score_answer(answer, entry) >= 1.0:
                    answer = demonstration(task, rng.choice(entries), rng)
                corrupted += 1
            several += forms(task, entry) > 1
            rows.append((question(task, entry, NEW if rng.random() < new else OLD), answer))
    rng.shuffle(rows)
    return rows, {"corrupted": corrupted / len(rows), "non_unique": several / len(rows)}


def encode(rows: list[tuple[str, str]], tok) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (rows, length), padded on the right; only answers and their end are targets."""
    prompts = tok([p for p, _ in rows])["input_ids"]
    answers = tok([a for _, a in rows])["input_ids"]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    inputs = torch.full((len(rows), length), tok.pad_token_id)
    targets = torch.full((len(rows), length), -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        text = [*p, *a, tok.eos_token_id]
        inputs[i, : len(text) - 1] = torch.tensor(text[:-1])
        targets[i, len(p) - 1 : len(text) - 1] = torch.tensor(text[len(p) :])
    return inputs, targets


# --- training and evaluation


def model(settings: Settings, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=settings.width, intermediate_size=4 * settings.width,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=False,
        )
    )  # fmt: skip


def train(
    student, teacher, objective, rows, tok, *, steps: int, rate: float, batch_size: int, seed: int,
    report: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """AdamW, a tenth of the steps warming up, then linearly to 0; epochs in an order that the seed gives."""
    inputs, targets = encode(rows, tok)
    lengths = (inputs != tok.pad_token_id).sum(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(rows), generator=generator) for _ in range(steps * batch_size // len(rows) + 1)]
    )
    student.train()
    for step in range(steps):
        batch = order[step * batch_size : (step + 1) * batch_size]
        length = int(lengths[batch].max())
        x, y = inputs[batch, :length], targets[batch, :length]
        # padding is on the right and attention causal: no mask is needed
        hidden = student.model(input_ids=x, use_cache=False).last_hidden_state
        given = None
        if teacher is not None:
            with torch.no_grad():
                seen = teacher.model(input_ids=x, use_cache=False).last_hidden_state
            given = Teacher(hidden=seen, weight=teacher.lm_head.weight)
        loss = linear_loss(hidden, student.lm_head.weight, y, objective, teacher=given)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1)


@torch.no_grad()
def evaluate(student, tok, sets: dict[str, TaskData]) -> dict:
    """Accuracy and NLL of each task, and their means over tasks."""
    student.eval()
    result: dict = {"accuracy": {}, "nll": {}}
    for task, data in sets.items():
        answers = accuracy(
            student, tok, data.task, entries=data.entries, batch_size=256, max_new_tokens=13, progress=False,
            prompt_format=lambda entry, task=task: question(task, entry),
        )  # fmt: skip
        result["accuracy"][task] = answers.solved
        rng = random.Random(0)
        x, y = encode([(question(task, e), demonstration(task, e, rng)) for e in data.entries], tok)
        hidden = student.model(input_ids=x, use_cache=False).last_hidden_state
        result["nll"][task] = float(linear_loss(hidden, student.lm_head.weight, y, objectives.nll()))
    for name in ("accuracy", "nll"):
        result[name]["mean"] = statistics.fmean(result[name].values())
    return result


# --- jobs; each is a process's own


#: Of a pretrained model's rows, those in the form that fine-tuning teaches.
NEW_SHARE = {"base": 0.002, "strong": 0.5}


def pretrain(settings: Settings, which: str, folder: Path) -> dict:
    """Make the base or the strong model, unless it is there; returns its evaluation."""
    file = folder / f"{which}.pt"
    if not file.exists():
        torch.set_num_threads(1)
        started = time.process_time()
        tok, seed = tokenizer(), {"base": 1000, "strong": 1001}[which]
        steps = {"base": settings.base_steps, "strong": settings.strong_steps}[which]
        rows, _ = demonstrations(settings, settings.pretrain_rows, seed, 0.0, NEW_SHARE[which])
        student = model(settings, seed)

        def report(step: int) -> None:
            if step % max(1, steps // 5) == 0:
                print(f"{which} model: step {step}/{steps}, {time.process_time() - started:.0f} s", flush=True)

        train(
            student, None, objectives.nll(), rows, tok, steps=steps, rate=settings.pretrain_rate,
            batch_size=settings.pretrain_batch_size, seed=seed, report=report,
        )  # fmt: skip
        result = evaluate(student, tok, held_out(settings, "test"))
        result["cpu_seconds"] = time.process_time() - started
        result["parameters"] = sum(p.numel() for p in student.parameters())
        whole = file.with_suffix(".tmp")
        torch.save({"weights": student.state_dict(), "result": result}, whole)
        os.replace(whole, file)
    return torch.load(file)["result"]


def load(settings: Settings, which: str, folder: Path) -> LlamaForCausalLM:
    loaded = model(settings, 0)
    loaded.load_state_dict(torch.load(folder / f"{which}.pt")["weights"])
    return loaded


def run(settings: Settings, folder: Path, name: str, noise: float, seed: int, rate: float, sweep: bool) -> dict:
    """Fine-tune the base model once and evaluate it."""
    torch.set_num_threads(1)
    started = time.process_time()
    method, tok = METHODS[name], tokenizer()
    rows, shares = demonstrations(settings, settings.rows, seed, noise)
    student = load(settings, "base", folder)
    teacher = load(settings, method.teacher, folder).eval().requires_grad_(False) if method.teacher else None
    objective = objectives.get(method.objective, **method.arguments)
    train(
        student, teacher, objective, rows, tok, steps=settings.steps, rate=rate, batch_size=settings.batch_size,
        seed=seed,
    )  # fmt: skip
    result = evaluate(student, tok, held_out(settings, "validation" if sweep else "test"))
    seconds = time.process_time() - started
    return {
        "sweep": sweep, "method": name, "noise": noise, "seed": seed, "rate": rate, **shares, **result,
        "cpu_seconds": round(seconds, 2),
    }  # fmt: skip


# --- the study


class Log:
    """runs.jsonl: a line of settings, then a line a finished run."""

    def __init__(self, folder: Path, settings: Settings, fresh: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "runs.jsonl"
        head = json.loads(json.dumps(asdict(settings)))
        if fresh:
            for old in (self.file, folder / "base.pt", folder / "strong.pt"):
                old.unlink(missing_ok=True)
        self.runs: list[dict] = []
        if not self.file.exists():
            self.file.write_text(json.dumps(head) + "\n")
            return
        lines = self.file.read_text().splitlines(keepends=True)
        if not lines or json.loads(lines[0]) != head:
            raise SystemExit(f"{self.file} is of a study with other settings; --fresh begins anew")
        # a line that a kill cut short is dropped
        whole = [line for line in lines if line.endswith("\n")]
        self.file.write_text("".join(whole))
        self.runs = [json.loads(line) for line in whole[1:]]

    def add(self, result: dict) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps(result) + "\n")
        self.runs.append(result)

    def has(self, *key) -> bool:
        return any((r["sweep"], r["method"], r["noise"], r["seed"], r["rate"]) == key for r in self.runs)


def choose_rates(settings: Settings, runs: list[dict]) -> dict[str, dict]:
    """For each method: validation accuracy of each rate, and the rate that won."""
    chosen = {}
    for name in settings.methods:
        if name == CHECK:
            continue
        means = {
            rate: statistics.fmean(
                r["accuracy"]["mean"] for r in runs if r["sweep"] and r["method"] == name and r["rate"] == rate
            )
            for rate in sorted(settings.rates)
        }
        rate = max(means, key=means.__getitem__)  # the first, and so the lowest, on a tie
        chosen[name] = {"validation": {str(k): v for k, v in means.items()}, "rate": rate, "best": means[rate]}
    if CHECK in settings.methods:
        chosen[CHECK] = {**chosen["dft"], "borrowed": "dft"}
    return chosen


def interval(values: list[float]) -> dict:
    """Mean and half width of the 95 % interval (null for one value)."""
    mean, half = intervals.interval(values)
    return {"mean": mean, "half": half if len(values) > 1 else None}


def summarise(settings: Settings, runs: list[dict]) -> dict:
    """{noise: {method: accuracy of each task and mean, NLL, and paired differences of accuracy}}."""
    final = {(r["noise"], r["method"], r["seed"]): r for r in runs if not r["sweep"]}
    summary: dict = {}
    for noise in settings.noises:
        table = summary[str(noise)] = {}
        for name in settings.methods:
            if (noise, name, settings.seeds[0]) not in final:
                continue
            mine = [final[noise, name, s] for s in settings.seeds]
            row = {k: interval([r["accuracy"][k] for r in mine]) for k in (*TASKS, "mean")}
            row["nll"] = interval([r["nll"]["mean"] for r in mine])
            row["minus"] = {}
            for other in settings.methods:
                if other != name and (noise, other, settings.seeds[0]) in final:
                    theirs = [final[noise, other, s]["accuracy"]["mean"] for s in settings.seeds]
                    row["minus"][other] = interval(
                        [r["accuracy"]["mean"] - t for r, t in zip(mine, theirs, strict=True)]
                    )
            row["minus_sft"] = row["minus"].get("sft", {"mean": 0.0, "half": 0.0})
            table[name] = row
    return summary


def execute(pool, jobs: list[tuple], title: str, log: Log | None) -> list[dict]:
    """Do (function, *arguments), in ``pool`` or here; a line with the time left after each."""
    started, results = time.perf_counter(), []

    def outcomes() -> Iterator[dict]:
        if pool is None:
            for function, *arguments in jobs:
                yield function(*arguments)
        else:
            for future in as_completed([pool.submit(*job) for job in jobs]):
                yield future.result()

    for done, result in enumerate(outcomes(), 1):
        results.append(result)
        if log is not None:
            log.add(result)
            spent = time.perf_counter() - started
            left = spent / done * (len(jobs) - done)
            print(
                f"{title} {done}/{len(jobs)}: {result['method']:<12} noise {result['noise']:g} seed {result['seed']} "
                f"lr {result['rate']:g}  accuracy {result['accuracy']['mean']:.1%}  {left:.0f} s left",
                flush=True,
            )
    return results


def study(settings: Settings, folder: Path, workers: int, fresh: bool = False) -> dict:
    """All of it; returns what goes into the JSON file."""
    started = time.perf_counter()
    log = Log(folder, settings, fresh)
    resumed = bool(log.runs) or any(folder.glob("*.pt"))
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        execute(pool, [(pretrain, settings, which, folder) for which in ("strong", "base")], "models", None)
        pretrained = {which: pretrain(settings, which, folder) for which in ("base", "strong")}
        for which, result in pretrained.items():
            print(
                f"{which} model: accuracy {result['accuracy']['mean']:.1%}, {result['cpu_seconds']:.0f} s", flush=True
            )
        sweep = [
            (run, settings, folder, name, settings.sweep_noise, seed, rate, True)
            for seed, name, rate in itertools.product(settings.sweep_seeds, settings.methods, settings.rates)
            if name != CHECK and not log.has(True, name, settings.sweep_noise, seed, rate)
        ]
        execute(pool, sweep, "sweep", log)
        rates = choose_rates(settings, log.runs)
        etas = [n for n in settings.methods if n in ETA_METHODS and n != CHECK]
        chosen = max(etas, key=lambda n: rates[n]["best"], default=None)
        final = [
            (run, settings, folder, name, noise, seed, rates[name]["rate"], False)
            for seed, noise, name in itertools.product(settings.seeds, settings.noises, settings.methods)
            if (noise == settings.sweep_noise or name not in ETA_METHODS or name == chosen)
            and not log.has(False, name, noise, seed, rates[name]["rate"])
        ]
        execute(pool, final, "run", log)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    packages = ("burnish", "torch", "transformers", "reasoning-gym")
    return {
        "settings": asdict(settings),
        "tasks": TASKS,
        "methods": {name: asdict(METHODS[name]) for name in settings.methods},
        "versions": {**{p: version(p) for p in packages}, "python": platform.python_version()},
        "workers": workers,
        "seconds": None if resumed else time.perf_counter() - started,
        "cpu_seconds": sum(r["cpu_seconds"] for r in [*log.runs, *pretrained.values()]),
        "pretrained": pretrained,
        "sweep": rates,
        "chosen": chosen,
        "summary": summarise(settings, log.runs),
        "runs": log.runs,
    }


def plot(result: dict, file: Path) -> None:
    """Left: accuracy over eta with the other methods as lines, at the sweep's noise.  Right: accuracy over noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summary, methods = result["summary"], result["methods"]
    noises, seeds = result["settings"]["noises"], len(result["settings"]["seeds"])
    noise = str(result["settings"]["sweep_noise"])
    etas = [n for n in methods if n in ETA_METHODS]
    lines = ["sft", "dft", "gem", "asft", "kd_hybrid", "kd"]
    colour = {n: f"C{i}" for i, n in enumerate([result["chosen"], *lines, "target_base"])}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))

    def bars(axis, xs, cells, **style):
        axis.errorbar(xs, [100 * c["mean"] for c in cells], [100 * c["half"] for c in cells], capsize=3, **style)

    bars(left, [methods[n]["arguments"]["eta"] for n in etas], [summary[noise][n]["mean"] for n in etas],
         color="C0", marker="o", label="Target-SFT")  # fmt: skip
    for name in lines:
        left.axhline(100 * summary[noise][name]["mean"]["mean"], color=colour[name], ls="--", lw=1,
                     label=methods[name]["label"])  # fmt: skip
    left.set(xlabel="eta", ylabel="accuracy, %", title=f"{float(noise):.0%} of the demonstrations wrong")
    for i, name in enumerate([result["chosen"], "target_base", *lines]):
        shifted = [100 * x + 0.5 * (i - 3.5) for x in noises]  # side by side, so that intervals can be read
        bars(right, shifted, [summary[str(x)][name]["mean"] for x in noises], color=colour[name], marker="o", ms=3,
             lw=1, label=methods[name]["label"])  # fmt: skip
    for which, style in (("base", ":"), ("strong", "-.")):
        level = 100 * result["pretrained"][which]["accuracy"]["mean"]
        right.axhline(level, color="grey", ls=style, lw=1, label=f"{which} model")
    right.set(xlabel="wrong demonstrations, %", title=f"over the noise ({seeds} seeds, 95 %)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    low, high = left.get_ylim()
    left.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    left.legend(fontsize=7, ncol=2, loc="upper right")
    right.legend(fontsize=7, ncol=2, loc="lower left")
    right.set_ylim(0, 100)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "target_sft", help="unfinished work")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    options = parser.parse_args()
    result = study(Settings(), options.folder, options.workers, options.fresh)
    (ROOT / "benchmarks" / "results" / "target_sft.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, ROOT / "docs" / "target_sft.png")
    for noise, table in result["summary"].items():
        print(f"\n{float(noise):.0%} wrong: accuracy, difference to SFT, NLL")
        for name, row in table.items():
            delta = row["minus_sft"]
            print(
                f"  {METHODS[name].label:<34} {row['mean']['mean']:6.1%} ± {row['mean']['half']:.1%}  "
                f"{delta['mean']:+6.1%} ± {delta['half']:.1%}  {row['nll']['mean']:.3f}"
            )


if __name__ == "__main__":
    main()
