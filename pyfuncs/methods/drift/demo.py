"""``burnish demo drift``: a toy whose optimum is known, every arm beside its honest baselines, over several seeds.

A prompt is four different symbols of eight and a mode; correct is the largest symbol where the mode is "easy" and the
smallest where it is "hard".  The reference policy is a Llama of two layers, width 32, fitted to a script that does not
read the mode: it answers the largest symbol 80% of the time, another one else, and after the feedback repeats its last
answer 75% of the time.  All arms train from it with one optimizer, on one collection of its episodes.
"""

from __future__ import annotations

import random
import shutil
import statistics
import time
from dataclasses import asdict
from itertools import permutations
from pathlib import Path

import torch
from datasets import disable_progress_bars, enable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from ..demo_results import publish
from ..intervals import interval
from .demo_options import DriftDemoOptions
from .engines import TransformersEngine
from .episode import Episode
from .episodes import collect, solved_at
from .returns import WeightOptions
from .rows import weigh, weighted_rows
from .trainer import DriftConfig, DriftTrainer
from .verify import Prompt

SYMBOLS = "01234567"
FEEDBACK = "again"
PREFERS, REPEATS = 0.8, 0.75
_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + (' : ' if m['role'] == 'user' else ' ' + eos_token + ' ') }}{% endfor %}"
)
#: What is trained, from the same reference on the same episodes; the reference itself is the first row of the table.
ARMS: dict[str, dict] = {
    "SFT on the last turn (w = 1)": {"weighting": "uniform"},
    "DRIFT, last turn": {},
    "DRIFT, all turns": {"supervise": "all"},
    "rejection-sampling SFT": {"weighting": "rejection"},
    "DRIFT without all-wrong prompts": {"drop_all_failed": True},
    "DRIFT without repetition penalty": {"repetition_penalty": 0.0},
}
REFERENCE = "reference policy"
_COLUMNS = ("sampled", "sampled_hard", "sampled_first", "greedy", "greedy_hard")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: the symbols, the modes, the feedback and what ends a user's message."""
    words = ["<pad>", "<eos>", "<unk>", *SYMBOLS, "easy", "hard", FEEDBACK, ":"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    out.chat_template = _TEMPLATE
    return out


def prompts(seed: int, count: int) -> list[Prompt]:
    """Different prompts, half of them of either mode; the entry is the right answer."""
    every = [(p, mode) for p in permutations(SYMBOLS, 4) for mode in ("easy", "hard")]
    chosen = random.Random(seed).sample(every, count)
    return [
        Prompt(i, [{"role": "user", "content": " ".join((*p, mode))}], max(p) if mode == "easy" else min(p))
        for i, (p, mode) in enumerate(chosen)
    ]


def verifier(text: str, entry: str) -> tuple[float, str | None]:
    """1 for the right symbol; any other word is an answer too."""
    answer = text.strip()
    return float(answer == entry), answer or None


def scripted(rng: random.Random, turns: int) -> list[str]:
    """The words of a conversation of the script that the reference is fitted to; it never ends before ``turns``."""
    symbols = rng.sample(SYMBOLS, 4)
    words = [*symbols, rng.choice(("easy", "hard")), ":"]
    last = None
    for turn in range(turns):
        if last is None or rng.random() >= REPEATS:
            others = [s for s in symbols if s != last]
            best = max(symbols)
            last = best if best in others and rng.random() < PREFERS else rng.choice([s for s in others if s != best])
        words += [last, "<eos>"] if turn == turns - 1 else [last, "<eos>", FEEDBACK, ":"]
    return words


def reference(options: DriftDemoOptions, seed: int, tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The fitted reference policy; all its conversations have one length, so a batch has no padding."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=tok.pad_token_id, bos_token_id=None, eos_token_id=tok.eos_token_id,
    ))  # fmt: skip
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.reference_steps, pct_start=0.05)
    for _ in range(options.reference_steps):
        words = [scripted(rng, options.turns) for _ in range(options.batch_size)]
        ids = torch.tensor([tok.convert_tokens_to_ids(w) for w in words])
        labels = ids.clone()
        labels[:, :6] = -100  # of the user's words only the turns' answers and ends are learnt
        for start in range(8, ids.shape[1], 4):
            labels[:, start : start + 2] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def script_followed(episodes: list[Episode]) -> dict[str, float]:
    """How far the fitted policy is the script: how often it answers the largest symbol first, and repeats itself."""
    first = [e.messages[1]["content"] == max(e.messages[0]["content"][:7].split()) for e in episodes]
    again = [a == b for e in episodes for a, b in zip(e.answers, e.answers[1:], strict=False)]
    return {"largest_first": statistics.fmean(first), "repeats": statistics.fmean(again) if again else float("nan")}


def evaluate(model, tok, problems: list[Prompt], options: DriftDemoOptions, seed: int) -> dict[str, float]:
    """Shares of fresh prompts solved within T turns: sampled at temperature 1 and greedily; ``_first``: at turn 1."""
    out: dict[str, float] = {}
    hard = [p.messages[0]["content"].endswith("hard") for p in problems]
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        engine = TransformersEngine(model, tok, temperature=temperature, max_new_tokens=2)
        at = solved_at(
            problems, engine, verifier, max_turns=options.turns, feedback=FEEDBACK, seed=seed, batch_size=1000,
            progress=False,
        )  # fmt: skip
        out[name] = statistics.fmean(t is not None for t in at)
        out[f"{name}_first"] = statistics.fmean(t == 1 for t in at)
        if any(hard):
            out[f"{name}_hard"] = statistics.fmean(t is not None for t, h in zip(at, hard, strict=True) if h)
    return out


def train(start, tok, episodes: list[Episode], arm: dict, options: DriftDemoOptions, seed: int, folder: Path):
    """A copy of the reference, trained by one arm."""
    model = LlamaForCausalLM(start.config)
    model.load_state_dict(start.state_dict())
    weights = WeightOptions(**arm)
    trainer = DriftTrainer(
        model,
        DriftConfig(
            output_dir=str(folder), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate, lr_scheduler_type="constant_with_warmup",
            warmup_steps=options.steps // 10, seed=seed, logging_steps=max(1, options.steps // 10), save_strategy="no",
            report_to="none", bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        ),
        train_dataset=weighted_rows(episodes, weights), processing_class=tok,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.fused_head.restore()
    return model, trainer.state.log_history


def run(options: DriftDemoOptions) -> dict:
    """All arms over all seeds; writes ``output``/results.json and curves.png; returns the results."""
    started = time.perf_counter()
    out = Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    tok = tokenizer()
    results: dict = {"options": asdict(options), "arms": {name: [] for name in (REFERENCE, *ARMS)}, "episodes": []}
    bar = tqdm(total=options.seeds * (2 + len(ARMS)), desc="demo drift")
    disable_progress_bars()
    try:
        for seed in range(options.seeds):
            bar.set_postfix_str(f"seed {seed}: fitting the reference")
            model = reference(options, seed, tok)
            bar.update()
            every = prompts(seed, options.prompts + options.problems)
            given, fresh = every[: options.prompts], every[options.prompts :]
            bar.set_postfix_str(f"seed {seed}: episodes")
            folder = out / f"seed-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            episodes = collect(
                folder / "episodes.jsonl", given, TransformersEngine(model, tok, max_new_tokens=2), verifier,
                trajectories=options.trajectories, max_turns=options.turns, feedback=FEEDBACK, seed=seed,
                batch_size=800, progress=False,
            )  # fmt: skip
            results["episodes"].append({**weigh(episodes).statistics, **script_followed(episodes)})
            results["arms"][REFERENCE].append(evaluate(model, tok, fresh, options, seed))
            bar.update()
            for name, arm in ARMS.items():
                bar.set_postfix_str(f"seed {seed}: {name}")
                trained, history = train(model, tok, episodes, arm, options, seed, folder / "trainer")
                losses = [e["loss"] for e in history if "loss" in e]
                results["arms"][name].append({**evaluate(trained, tok, fresh, options, seed), "loss": losses})
                bar.update()
            shutil.rmtree(folder)
    finally:
        enable_progress_bars()
        bar.close()
    results["seconds"] = time.perf_counter() - started
    publish(results, out, table, plot)
    return results


def table(results: dict) -> str:
    """The results as a Markdown table: means over seeds with 95% intervals, in percent of fresh prompts."""
    o = results["options"]

    def cell(values: list[float], sign: str = "") -> str:
        mean, half = interval(values)
        return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}"

    lines = [
        f"| | sampled, within {o['turns']} turns | hard ones | sampled, turn 1 | greedy | hard ones "
        "| sampled, minus rejection sampling |",
        "|---|---|---|---|---|---|---|",
    ]
    baseline = [r["sampled"] for r in results["arms"]["rejection-sampling SFT"]]
    for name, runs in results["arms"].items():
        cells = [cell([r[c] for r in runs]) for c in _COLUMNS]
        paired = [r["sampled"] - b for r, b in zip(runs, baseline, strict=True)]
        cells.append("0" if name == "rejection-sampling SFT" else cell(paired, "+"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Accuracy of each arm, a dot a seed; loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    o = results["options"]
    names = list(results["arms"])
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained", sharey=True)
    for axis, column, kind in zip(axes, ("sampled", "greedy"), ("sampled", "greedy"), strict=True):
        for row, name in enumerate(names):
            values = [100 * r[column] for r in results["arms"][name]]
            mean, half = interval(values)
            axis.barh(row, mean, xerr=0.0 if half != half else half, color="#4c72b0" if "DRIFT" in name else "#bbbbbb")
            axis.plot(values, [row] * len(values), "k.", markersize=4)
        axis.set(
            xlim=(0, 104), xlabel=f"% of {o['problems']} fresh prompts solved within {o['turns']} turns", title=kind
        )
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(f"{o['seeds']} seeds; dots are seeds, bars means with 95% intervals", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
