"""An arena at work: train, score, rewind and measure each run, one JSON each; what is there already is not run again.

OUTPUT/burnish_peft_arena.json       the file's options
OUTPUT/base-MODEL.json               scores of a model before training, and of which files they are
OUTPUT/runs/NAME.json                one run, written whole when all of it is done
OUTPUT/training/NAME/                its checkpoints meanwhile
OUTPUT/report.{html,md,json}, frontier.png
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...paths import Adapter, StateDict, split_model
from ...paths.output import lock
from ..chunkft_plan import empty_model
from ..data import TASK_PREFIX, TaskData, load_data, read_jsonl
from ..frozen import evaluating
from ..functions import load_function
from ..models import check_model_name, load_model
from ..processes import world_size
from ..run_directory import note, quiet_bars, write_json
from . import metrics
from .config import Config, files_in
from .evaluators import SPLITS, NotFinite, Suite, label_stats, prompt_of
from .plan import Run, plan_runs
from .rewind import choose_point, mean, paths_of, rule_of, travelled
from .techniques import technique

RECORD = "burnish_peft_arena.json"
#: An arena may grow by these; what else the file says is part of what its runs are.
_MAY_CHANGE = (
    "output", "methods", "budget", "lr", "seeds", "controls", "save_steps", "logging_steps", "forgetting", "keep",
    "eval_batch_size", "metrics",
)  # fmt: skip
#: What is measured where the file says nothing else.
METRICS = {"weights": True, "activations": True, "modules": "paper8", "rows": 8}


class Arena:
    """The runs of a ``Config``: ``runs`` lists them, done or not.

    Made, it has checked the config, the suites and the data, and written nothing.  ValueError, in one line, for
    anything wrong with them, or an output that is of another arena.
    """

    def __init__(self, config: Config):
        self.config = config
        self.output = Path(config["output"])
        self.suites = {
            axis: {name: Suite(f"{axis}: {name}", s, config["eval_batch_size"]) for name, s in config[axis].items()}
            for axis in ("target", "retention")
        }
        for seed in config["seeds"]:
            check_model_name(config.model(seed))
        self.data = self._load_data()
        self._check_splits()
        self._check_output()
        # from the model's config alone: what is wrong is said before any weights are read
        empty = empty_model(config.model(config["seeds"][0]), torch.float32)
        asked = {**METRICS, **config["metrics"]}
        if asked["weights"] or asked["activations"]:
            try:
                metrics.check(empty, asked["modules"])
            except ValueError as error:
                raise ValueError(f"metrics: {error}") from None
        self.runs = plan_runs(config, empty)
        for run in self.runs:
            self.done(run)
        self._loaded: tuple[str, Any, Any] | None = None
        self._base: dict[str, dict[str, Any]] = {}
        self._completed = False

    def run(self) -> None:
        """Make what is missing, this process's share of it under torchrun, and the report when nothing is."""
        rank, world = int(os.environ.get("RANK", "0")), world_size()
        with alone():
            quiet_bars()
            self.output.mkdir(parents=True, exist_ok=True)
            with self._one_at_a_time():
                write_json(self.output / RECORD, dict(self.config.values))
            runs = self.runs
            finished = sum(self.done(r) for r in runs)
            # where nothing is missing no process completes the runs
            self._completed = finished == len(runs) and rank == 0
            if finished:
                note(f"{finished} of {len(runs)} runs are done already")
            for number, one in enumerate(runs):
                # by place in the whole list, which all processes have alike whenever they look
                if number % world == rank and not self.done(one):
                    self.one(one, f"[{number + 1}/{len(runs)}]")
        if self._completed:  # under torchrun: in one process, whichever is the last
            from .report import write_report

            print(write_report(self.output, self.config, self.runs))

    def path(self, run: Run) -> Path:
        """Where a run's JSON is."""
        return self.output / "runs" / f"{run.name}.json"

    def done(self, run: Run) -> bool:
        """Whether a run's JSON is there.  One of a control, which is not rewound, is none of a rate of the grid.

        ValueError where it is of other settings.
        """
        try:
            found = json.loads(self.path(run).read_text())["run"]
        except OSError:
            return False
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path(run)}: is no run's JSON: remove it") from None
        name = run.differs(found)
        if name:
            raise ValueError(
                f"{self.path(run)}: {name} is {found.get(name)!r}, but {run.settings()[name]!r} in the file: remove "
                "it, or give the method another label"
            )
        return run.has_all(found)

    def one(self, run: Run, progress: str = "") -> dict[str, Any]:
        """Train, score, rewind, measure and write one run; returns what is written.  Of one whose weights or
        outputs are no longer finite that is all that is kept."""
        from . import train

        started = time.perf_counter()
        work, tokenizer = self._model(run.seed)
        base = self._base_scores(run.seed)
        folder = self.output / "training" / run.name
        rows = self._rows(tokenizer)
        trained = train.train(self.config, run, copy.deepcopy(work), tokenizer, rows, folder)
        adapter, post = _merge(trained.model, run)
        lost, said = {"run": run.settings(), "diverged": True}, f"{progress} {run.name}: diverged"
        if not all(bool(x.isfinite().all()) for x in post.values()):
            return self._write(run, lost, said)
        if self.config["keep"]:
            self._keep(run, trained.model, adapter, work, post)
        pre = snapshot(work)
        try:
            result = self._score_paths(run, work, tokenizer, base, pre, post, adapter)
        except NotFinite as error:
            load(work, pre)
            return self._write(run, lost, f"{said}: {error}")
        result = {
            "run": run.settings(), "base": base, **result,
            "training": {"seconds": trained.seconds, "loss": trained.loss, "rows": len(rows)},
            "seconds": time.perf_counter() - started,
            "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        }  # fmt: skip
        before, after = base["test"], result["final"]["test"]
        return self._write(
            run, result,
            f"{progress} {run.name}{f' ({run.control})' if run.control else ''}: target {before['target']:.3f} -> "
            f"{after['target']:.3f}, retention {before['retention']:.3f} -> {after['retention']:.3f}, "
            f"{result['seconds']:.0f} s",
        )  # fmt: skip

    def _write(self, run: Run, result: dict[str, Any], text: str) -> dict[str, Any]:
        with self._one_at_a_time():
            self.path(run).parent.mkdir(exist_ok=True)
            write_json(self.path(run), result)
            self._completed = all(self.done(r) for r in self.runs)
        shutil.rmtree(self.output / "training" / run.name, ignore_errors=True)
        note(text)
        return result

    def scores(self, model, tokenizer, split: str) -> tuple[dict[str, float], dict[str, float]]:
        """Each suite's score on a split, target and retention."""
        found = {a: {n: s.score(model, tokenizer, split) for n, s in self.suites[a].items()} for a in self.suites}
        return found["target"], found["retention"]

    def _score_paths(self, run: Run, work, tokenizer, base, pre, post, adapter) -> dict[str, Any]:
        config = self.config
        length = travelled(post, pre)
        try:
            load(work, post)
            self._check_outputs(work, tokenizer)
            final = {s: self._both(work, tokenizer, s) for s in SPLITS}
            measured = self._metrics(work, tokenizer, pre, post)
        finally:
            load(work, pre)
        known = {0.0: {s: base[s] for s in SPLITS}, 1.0: final}
        rule = rule_of(*config.rule, base["held_out"]["retention"])
        family = technique(run.technique).family
        found = {}
        if not run.control:  # a control answers what less training does
            for one in paths_of(family, pre, post, adapter, config.paths(family), config.power):
                found[one.name] = choose_point(
                    one, config.grid, work, lambda m, s: self.scores(m, tokenizer, s), rule, pre=pre, known=known,
                    length=length,
                )  # fmt: skip
        return {"final": final, "distance": length, "paths": found, "metrics": measured}

    def _check_outputs(self, model, tokenizer) -> None:
        """NotFinite for a model that a score might not say it of: first choices among NaNs are wrong answers."""
        for suite in (s for named in self.suites.values() for s in named.values()):
            rows = [(ids, ids) for ids in suite.sample(tokenizer, 1)]
            with torch.no_grad(), evaluating(model):
                label_stats(model, rows, 1)

    def _metrics(self, work, tokenizer, pre, post) -> dict[str, float]:
        asked = {**METRICS, **self.config["metrics"]}
        count = asked.pop("rows")
        rows = {
            axis: [r for suite in named.values() for r in suite.sample(tokenizer, count)]
            for axis, named in self.suites.items()
        }
        plain = copy.deepcopy(work)
        load(plain, pre)
        return metrics.measure(plain, work, pre, post, rows, batch_size=self.config["eval_batch_size"], **asked)

    def _both(self, model, tokenizer, split: str) -> dict[str, Any]:
        goal, kept = self.scores(model, tokenizer, split)
        return {"target": mean(goal), "retention": mean(kept), "suites": {**goal, **kept}}

    def _base_scores(self, seed: int) -> dict[str, Any]:
        name = self.config.model(seed)
        file = self.output / f"base-{re.sub(r'[^A-Za-z0-9._-]+', '_', name).strip('_')}.json"
        if name not in self._base:
            of = self._scored(name)
            try:
                found = json.loads(file.read_text())
            except (OSError, ValueError):
                found = {}
            if found.get("of") != of:
                model, tokenizer = self._model(seed)
                found = {"of": of, **{s: self._both(model, tokenizer, s) for s in SPLITS}}
                with self._one_at_a_time():
                    write_json(file, found)
            self._base[name] = {s: found[s] for s in SPLITS}
        return self._base[name]

    def _scored(self, name: str) -> dict[str, Any]:
        """What a model's scores before training are of, as JSON: with any of it they may change."""
        suites = {axis: self.config[axis] for axis in self.suites}
        of = {
            "model": name, "files": _stamps(name), **suites, "read": [_stamps(str(f)) for f in files_in(suites)],
            "eval_batch_size": self.config["eval_batch_size"],
        }  # fmt: skip
        return json.loads(json.dumps(of))

    def _model(self, seed: int):
        """(model, tokenizer) of a seed, with the weights before training."""
        name = self.config.model(seed)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            model, tokenizer = load_model(name)
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self._loaded = name, model.to(device or "cpu").eval(), tokenizer
        return self._loaded[1:]

    def _load_data(self):
        source, arguments = self.config["data"], self.config["data_args"]
        if source.startswith(TASK_PREFIX) or Path(source).is_file() or ":" not in source:
            data = load_data(source, arguments)
            if isinstance(data, TaskData):
                seen = {q for suites in self.suites.values() for s in suites.values() for q in s.questions}
                kept = [e for e in data.entries if e["question"] not in seen]
                if not kept:
                    raise ValueError(
                        f"data {source}: every problem of it is in a suite; ask for more, or for longer ones"
                    )
                data.entries = kept
            return data
        rows = list(load_function(source, "data")(**arguments))
        return _checked_rows(rows, source)

    def _check_splits(self) -> None:
        """ValueError where a function is handed a file that the other side reads too, and rows are in both."""
        if isinstance(self.data, TaskData):
            return
        rows = self.data if isinstance(self.data, list) else self.data.records
        trained = [*files_in(self.config["data"]), *files_in(self.config["data_args"])]
        for axis, named in self.suites.items():
            for name, suite in named.items():
                shared = [f for f in files_in(self.config[axis][name]) if any(f.samefile(t) for t in trained)]
                both = [r for r in rows if prompt_of(r) in suite.prompts] if shared else []
                if both:
                    raise ValueError(
                        f"data and {axis}: {name} read one file, {shared[0].resolve()}, and {len(both)} rows of the "
                        f"data are in the suite; the first is {str(both[0])[:80]}"
                    )

    def _rows(self, tokenizer) -> list[dict]:
        return self.data if isinstance(self.data, list) else self.data.rows(bool(tokenizer.chat_template))

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Within, no other process of the arena is: two that write one file would take each other's temporary file, and
        two that end together would both be the last."""
        handle = lock(self.output, wait=True)
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def _keep(self, run: Run, model, adapter, work, post) -> None:
        folder = self.output / "models" / run.name
        if adapter is not None:
            from safetensors.torch import save_file

            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "adapter_config.json", _plain(adapter.config))
            save_file({n: adapter.tensors.tensor(n).contiguous() for n in adapter.tensors},
                      folder / "adapter_model.safetensors")  # fmt: skip
            return
        copy.deepcopy(work).save_pretrained(folder, state_dict=post)

    def _check_output(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output {self.output}: is not a directory")
        try:
            before = json.loads((self.output / RECORD).read_text())
        except (OSError, ValueError):
            if self.output.is_dir() and any(self.output.iterdir()):
                raise ValueError(f"output {self.output}: is not empty, and no arena's") from None
            return
        now = json.loads(json.dumps(dict(self.config.values)))
        if isinstance(before.get("rule"), dict) and len(before["rule"]) > 1:
            before["rule"].pop("best_sum", None)  # an earlier version kept its default beside the file's own
        for name, value in before.items():
            if name in now and name not in _MAY_CHANGE and now[name] != value:
                raise ValueError(f"output {self.output}: its runs have {name} {value!r}, the file {now[name]!r}")


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's tensors on the CPU, tied ones still sharing their storage."""
    copies: dict[tuple, torch.Tensor] = {}
    out = {}
    for name, x in model.state_dict().items():
        key = (x.data_ptr(), x.shape)
        if key not in copies:
            copies[key] = x.detach().to("cpu", copy=True)
        out[name] = copies[key]
    return out


@torch.no_grad()
def load(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy a ``snapshot`` into a model."""
    for name, x in model.state_dict().items():
        x.copy_(weights[name])


def _stamps(name: str) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of each in a directory; of anything else, as a hub's name, there are none."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def _merge(model, run: Run) -> tuple[Adapter | None, dict[str, torch.Tensor]]:
    """(adapter where its own path needs it, weights with it merged), on the CPU."""
    if not hasattr(model, "peft_config"):
        return None, snapshot(model)
    adapter = None
    if technique(run.technique).family in ("lora", "oft"):
        _, found = split_model(model)
        tensors = {n: found.tensors.tensor(n).detach().to("cpu", copy=True) for n in found.tensors}
        adapter = Adapter(found.config, StateDict(tensors))
    return adapter, snapshot(model.eval().merge_and_unload())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """torchrun's processes each train runs of their own: within, nothing takes them for one run of several, and each
    sees one of the machine's GPUs."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    seen = "CUDA_VISIBLE_DEVICES"
    before = {n: os.environ[n] for n in (*names, seen) if n in os.environ}
    for name in names:
        os.environ.pop(name, None)
    if "LOCAL_RANK" in before:
        local, devices = int(before["LOCAL_RANK"]), before.get(seen, "").split(",")
        # a Trainer that sees several would split each batch over all of them
        os.environ[seen] = devices[local % len(devices)] if devices != [""] else str(local)
    try:
        yield
    finally:
        os.environ.pop(seen, None)
        os.environ.update(before)


def _checked_rows(rows: list, source: str) -> list[dict]:
    """Rows of a function, under the same checks as a file's."""
    import tempfile

    if not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"data {source}: rows must be mappings")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        try:
            return read_jsonl(str(file)).records
        except ValueError as error:
            raise ValueError(f"data {source}: {str(error).replace(str(file), 'row')}") from None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's config as JSON can hold it."""
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
