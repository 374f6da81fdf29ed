"""``burnish demo sft``: SmolLM2-135M learns a task on this machine, by SFT and by Target-SFT.

The model's own weights, TRL's trainer, a reasoning-gym task and its verifier; nothing is fetched.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import objectives
from ..ops.linear_loss import linear_loss
from ..ops.live_bytes import LiveBytes
from ..ops.teacher import Teacher
from .data import load_task
from .demo_options import DemoOptions
from .demo_results import publish
from .evaluate import accuracy
from .models import load_model
from .progress import show_loss

TASK, TASK_ARGUMENTS = "word_sequence_reversal", {"min_words": 3, "max_words": 4}


def words(entry: dict) -> str:
    """The list to reverse, out of the task's question."""
    return entry["question"].strip().split(": ")[-1]


def question(entry: dict) -> str:
    """A short form of the task's question that a completion continues."""
    return f'Reverse: "{words(entry)}"\nReversed: "'


def row(entry: dict) -> dict:
    """prompt and completion of an entry; the closing quote ends the answer."""
    return {"prompt": question(entry), "completion": f'{entry["answer"]}"'}


def answer(text: str) -> str:
    """What the model answered: the text up to the closing quote."""
    return text.split('"')[0].strip()


def run(options: DemoOptions) -> dict:
    """Train twice from the same weights, evaluate, measure, write ``output``; returns the results."""
    from datasets import Dataset
    from trl import SFTConfig

    from .target_sft import TargetSFTTrainer

    started = time.perf_counter()
    out = Path(options.output)
    held_out = load_task(TASK, size=options.problems, seed=options.seed + 10_000, **TASK_ARGUMENTS)
    seen = {words(e) for e in held_out.entries}
    pool = load_task(TASK, size=options.steps * options.batch_size + 64, seed=options.seed, **TASK_ARGUMENTS)
    train = [row(e) for e in pool.entries if words(e) not in seen][: options.steps * options.batch_size]

    print(f"loading {options.model} ...", flush=True)
    model, tokenizer = load_model(options.model)
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def evaluate() -> float:
        result = accuracy(
            model, tokenizer, held_out.task, entries=held_out.entries, batch_size=64, max_new_tokens=20,
            prompt_format=question, extract=answer,
        )  # fmt: skip
        return result.solved

    results: dict = {"options": asdict(options), "task": TASK, "task_arguments": TASK_ARGUMENTS, "methods": {}}
    before = evaluate()
    print(f"accuracy of the untouched model: {before:.1%} of {options.problems} held-out problems", flush=True)
    for name, arguments, teacher in (("nll", {}, None), ("target_sft", {"eta": options.eta}, "self")):
        model.load_state_dict(start)
        print(f"\n{name}{arguments or ''}: {options.steps} steps of {options.batch_size} examples", flush=True)
        trainer = TargetSFTTrainer(
            model,
            SFTConfig(
                output_dir=str(out / name),
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=5,
                adam_beta2=0.95,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=options.seed,
                completion_only_loss=True,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                disable_tqdm=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(train),
            processing_class=tokenizer,
            objective=name,
            objective_args=arguments,
            teacher_model=teacher,
        )
        show_loss(trainer)
        trainer.train()
        seconds = trainer.state.log_history[-1]["train_runtime"]
        logs = [x for x in trainer.state.log_history if "loss" in x]
        tokens = logs[-1]["num_tokens"]
        trainer.fused_head.restore()
        after = evaluate()
        results["methods"][name] = {
            "arguments": arguments, "before": before, "after": after, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "loss": [x["loss"] for x in logs],
            "token_accuracy": [x["mean_token_accuracy"] for x in logs],
        }  # fmt: skip
        print(f"{name}: {before:.1%} -> {after:.1%}, {tokens / seconds:.0f} tokens/s", flush=True)
    results["memory"] = memory(model)
    results["seconds"] = time.perf_counter() - started
    for name in results["methods"]:  # empty: nothing was saved in them
        shutil.rmtree(out / name, ignore_errors=True)
    publish(results, out, table, plot)
    return results


def memory(model, tokens: int = 1024) -> list[dict]:
    """Peak live bytes of the loss, forward and backward, with the model's real head: fused and materialised.

    Counted beside the inputs and gradients that both must have, for ``tokens`` labelled tokens.
    """
    head = model.get_output_embeddings().weight.detach()
    vocabulary, width = head.shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(head)
    # another state than the student's: equal ones would leave a gradient of p_y (p - delta) alone, which the
    # materialised form loses to cancellation
    other = torch.randn(tokens, width, generator=generator).to(head)
    target = torch.randint(0, vocabulary, (tokens,), generator=generator).to(head.device)
    target_sft = objectives.target_sft(0.5)

    def nll(h, w):
        return F.cross_entropy((h @ w.t()).float(), target)

    def materialised_target_sft(h, w):
        z = (h @ w.t()).float()
        with torch.no_grad():
            t = (other @ head.t()).float()
            log_probs = z.log_softmax(-1)
            p_label = log_probs.gather(1, target[:, None]).exp()
            q = (0.5 * log_probs + 0.5 * t.log_softmax(-1)).softmax(-1) * (1 - p_label)
            q.scatter_add_(1, target[:, None], p_label)
        return -(q * z.log_softmax(-1)).sum(-1).mean()

    def fused(objective, teacher=None):
        return lambda h, w: linear_loss(h, w, target, objective, teacher=teacher)

    rows = []
    for name, plain, ours in (
        ("nll", nll, fused(objectives.nll())),
        ("target_sft", materialised_target_sft, fused(target_sft, Teacher(hidden=other, weight=head))),
    ):
        entry: dict = {"objective": name, "tokens": tokens, "vocabulary": vocabulary}
        grads = {}
        for kind, function in (("materialised", plain), ("fused", ours)):
            h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            with LiveBytes() as counter:
                function(h, w).backward()
            grads[kind] = [x.grad for x in (h, w) if x.grad is not None]
            entry[kind] = counter.peak - sum(g.numel() * g.element_size() for g in grads[kind])
        entry["gradient_error"] = max(
            float((a - b).norm() / b.norm()) for a, b in zip(grads["fused"], grads["materialised"], strict=True)
        )
        rows.append(entry)
    return rows


def table(results: dict) -> str:
    """The results as text."""
    lines = ["method        accuracy before   after   tokens/s   seconds"]
    for name, r in results["methods"].items():
        lines.append(
            f"{name:<14}{r['before']:>14.1%}{r['after']:>9.1%}{r['tokens_per_second']:>11.0f}{r['seconds']:>10.0f}"
        )
    lines.append("")
    lines.append(f"loss at {results['memory'][0]['tokens']} tokens   materialised     fused   ratio   gradient error")
    for m in results["memory"]:
        ratio = m["fused"] / m["materialised"]
        lines.append(
            f"{m['objective']:<20}{m['materialised'] / 2**20:>11.0f} MiB{m['fused'] / 2**20:>6.0f} MiB{ratio:>8.2f}"
            f"{m['gradient_error']:>17.1e}"
        )
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Loss and token accuracy by step, and accuracy on the task before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = {"nll": "SFT", "target_sft": f"Target-SFT (eta {results['options']['eta']})"}
    colors = {"nll": "#4c72b0", "target_sft": "#dd8452"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, r in results["methods"].items():
        steps = range(1, len(r["loss"]) + 1)
        left.plot(steps, r["loss"], label=names[name], color=colors[name])
        middle.plot(steps, r["token_accuracy"], label=names[name], color=colors[name])
    left.set(title="loss (each its own objective)", xlabel="step", ylabel="nats a token")
    middle.set(title="token accuracy on the batch", xlabel="step", ylim=(0, 1.02))
    left.legend()
    bars = ["before", *[names[n] for n in results["methods"]]]
    heights = [next(iter(results["methods"].values()))["before"], *[r["after"] for r in results["methods"].values()]]
    shown = right.bar(bars, heights, color=["#999999", *[colors[n] for n in results["methods"]]])
    right.bar_label(shown, [f"{h:.0%}" for h in heights])
    right.set(title=f"{results['options']['problems']} held-out problems, task's verifier", ylim=(0, 1.1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
