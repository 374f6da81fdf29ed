"""``burnish demo axpo``: a toy in which GRPO gives its tool up, with AXPO's own decisions and credit.

24 questions.  The policy thinks (one token), then calls the tool or does not, then

* without the tool answers, one of six.  A question's usual answer is right with probability 0.9 for half of the
  questions, with 0.15 for the others: what is right is drawn anew each time a question is asked.
* with the tool gives an argument, one of six.  The question's right one, always the same, makes the tool show the
  answer, and the policy answers; a wrong one ends the episode.

A reward is 1 for the right answer.  So the tool is worth learning, hardly ever works at first, and half of the
questions do well without.  The start is fitted to a teacher that calls the tool 29 % of the time, with the right
argument in 13 % of the calls, and answers the usual answer otherwise.  All arms of a seed begin at the same weights.

Regime: p(tool works) is low but not hopeless, success without it moderate.  The toy shows a direction in that regime,
not the size of an effect.

One update a batch, on the policy that sampled: the ratio is 1 and the clip at 0.2 / 0.4 never acts.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import objectives
from ...ops.row_loss import row_loss
from ..demo_results import publish
from ..intervals import interval
from .demo_options import AXPODemoOptions
from .plan import Rules, credit, mean_probability, normalise, select, stream_masks, token_weights, triggered

QUESTIONS, THINKS, CHOICES = 24, 4, 6
THINK = QUESTIONS
TOOL = THINK + THINKS
NO_TOOL = TOOL + 1
ARGUMENT = NO_TOOL + 1
ANSWER = ARGUMENT + CHOICES
SHOWN = ANSWER + CHOICES
PAD = SHOWN + CHOICES
#: question, think, tool or not, argument or answer, what the tool shows, answer
LENGTH = 6
#: Tokens up to and including the tool call's tag.
PREFIX = 3
GUESSABLE, PRIOR = 0.9, 0.15
TOOL_RATE, RIGHT_ARGUMENT, SURE = 0.29, 0.13, 0.98
ROLLOUTS, LEARNING_RATE, BETA = 8, 1e-3, 1e-3
FIT_STEPS = 400
#: Draws of each question's answer in an evaluation, and rollouts of each.
DRAWS, TRIES = 64, 4


@dataclass(frozen=True)
class Arm:
    """A method: its rollouts a question, and AXPO's rules where it resamples."""

    name: str
    rollouts: int = ROLLOUTS
    rules: Rules | None = None
    random: bool = False


ARMS = {
    "grpo": Arm("GRPO"),
    "grpo_2x": Arm("GRPO, doubled rollouts", 2 * ROLLOUTS),
    "axpo": Arm("AXPO", rules=Rules()),
    "axpo_random": Arm("AXPO, random ranking", rules=Rules(), random=True),
    "axpo_no_fix": Arm("AXPO, no prefix fix", rules=Rules(fix_prefix=False)),
}


class World:
    """The questions of a seed: their usual answers and right arguments, and draws of what is right."""

    def __init__(self, seed: int):
        g = torch.Generator().manual_seed(seed)
        self.usual = torch.randint(CHOICES, (QUESTIONS,), generator=g)
        self.argument = torch.randint(CHOICES, (QUESTIONS,), generator=g)
        self.share = torch.full((QUESTIONS,), PRIOR)
        self.share[torch.randperm(QUESTIONS, generator=g)[: QUESTIONS // 2]] = GUESSABLE

    def draw(self, questions: Tensor, g: torch.Generator) -> Tensor:
        """The right answer, 0 to 5, of each time a question is asked."""
        usual = torch.rand(len(questions), generator=g) < self.share[questions]
        other = torch.randint(1, CHOICES, (len(questions),), generator=g)
        return torch.where(usual, self.usual[questions], (self.usual[questions] + other) % CHOICES)


def make_model(seed: int):
    """Llama of two layers, width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=PAD + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def fit(model, world: World, seed: int) -> None:
    """The SFT-like start: cross-entropy to the teacher's distributions at every token that the policy makes."""
    g = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, FIT_STEPS)

    def mixed(chosen: Tensor, share: float) -> Tensor:
        """share on the chosen of six, the rest evenly on the other five."""
        out = torch.full((len(chosen), CHOICES), (1 - share) / (CHOICES - 1))
        return out.scatter_(1, chosen[:, None], share)

    for _ in range(FIT_STEPS):
        questions = torch.arange(QUESTIONS).repeat(16)
        count = len(questions)
        target = torch.zeros(count, LENGTH, PAD + 1)
        tokens = torch.full((count, LENGTH), PAD)
        tokens[:, 0] = questions
        target[:, 1, THINK : THINK + THINKS] = 1 / THINKS
        target[:, 2, TOOL], target[:, 2, NO_TOOL] = TOOL_RATE, 1 - TOOL_RATE
        tokens[:, 1] = THINK + torch.randint(THINKS, (count,), generator=g)
        # both ways as often, whatever the policy will choose: the loss at the choice is against its distribution
        tool = torch.rand(count, generator=g) < 0.5
        tokens[:, 2] = torch.where(tool, TOOL, NO_TOOL)
        arguments = mixed(world.argument[questions], RIGHT_ARGUMENT)
        answers = mixed(world.usual[questions], SURE)
        target[tool, 3, ARGUMENT : ARGUMENT + CHOICES] = arguments[tool]
        target[~tool, 3, ANSWER : ANSWER + CHOICES] = answers[~tool]
        shown = torch.randint(CHOICES, (count,), generator=g)
        tokens[:, 3] = torch.where(tool, ARGUMENT + world.argument[questions], PAD)
        tokens[tool, 4] = SHOWN + shown[tool]
        target[tool, 5, ANSWER : ANSWER + CHOICES] = mixed(shown, SURE)[tool]
        logp = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        loss = -(target[:, 1:] * logp).sum() / target.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass
class Episodes:
    """R episodes: tokens (R, LENGTH), own (R, LENGTH) 1 where the policy made the token, rewards (R,)."""

    tokens: Tensor
    own: Tensor
    rewards: Tensor

    @property
    def called(self) -> Tensor:
        """(R,) whether the tool was called."""
        return self.tokens[:, 2] == TOOL


@torch.no_grad()
def roll(model, world: World, prefix: Tensor, right: Tensor, g: torch.Generator) -> Episodes:
    """Episodes that begin with ``prefix`` (R, 1) or (R, PREFIX), with the right answers (R,)."""
    count, given = prefix.shape
    questions = prefix[:, 0]
    tokens = torch.full((count, LENGTH), PAD)
    tokens[:, :given] = prefix
    own = torch.zeros(count, LENGTH, dtype=torch.long)
    own[:, 1:given] = 1

    def sample(at: int, who: Tensor) -> None:
        probabilities = model(input_ids=tokens[who, :at]).logits[:, -1].softmax(-1)
        tokens[who, at] = torch.multinomial(probabilities, 1, generator=g)[:, 0]
        own[who, at] = 1

    everyone = torch.arange(count)
    for at in range(given, 4):
        sample(at, everyone)
    called = tokens[:, 2] == TOOL
    works = called & (tokens[:, 3] == ARGUMENT + world.argument[questions])
    tokens[works, 4] = SHOWN + right[works]
    if works.any():
        sample(5, works.nonzero()[:, 0])
    said = torch.where(called, tokens[:, 5], tokens[:, 3])
    return Episodes(tokens, own, (said == ANSWER + right).float())


def token_logps(model, tokens: Tensor) -> Tensor:
    """(R, LENGTH): log p of each token but the first, whose place is 0."""
    logp = model(input_ids=tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return F.pad(logp, (1, 0))


def step_rows(model, world: World, arm: Arm, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, dict]:
    """A step's rows for the loss: tokens (R, LENGTH), masks, advantages (R,), and what is logged."""
    size = arm.rollouts
    right = world.draw(torch.arange(QUESTIONS), g)
    questions = torch.arange(QUESTIONS).repeat_interleave(size)
    rolled = roll(model, world, questions[:, None], right.repeat_interleave(size), g)
    rewards, called = rolled.rewards.view(QUESTIONS, size), rolled.called.view(QUESTIONS, size)
    trigger = triggered(called, rewards == 1)
    log = {
        "reward": rewards.mean().item(), "tool_rate": called.float().mean().item(),
        "all_wrong": trigger[called.any(1)].float().mean().item(), "recovered": math.nan, "extra": 0,
    }  # fmt: skip
    tokens, masks, advantages = rolled.tokens, rolled.own, normalise(rewards).flatten()
    if arm.rules is None:
        return tokens, masks, advantages, log
    candidates = called & trigger[:, None]
    if arm.random:
        confidence = torch.rand(candidates.shape, generator=g)
    else:
        confidence = torch.ones(candidates.shape)
        with torch.no_grad():
            logps = token_logps(model, tokens).view(QUESTIONS, size, LENGTH)
        for b, i in candidates.nonzero().tolist():
            confidence[b, i] = mean_probability(logps[b, i, PREFIX : PREFIX + 1])  # the argument
    selected = select(confidence, candidates, arm.rules.prefixes(rewards.numel()))
    if not selected:
        return tokens, masks, advantages, log
    copies, kept = arm.rules.resamples, PREFIX if arm.rules.keeps_prefix else 1
    source = torch.tensor([b * size + i for b, i in selected])
    begin = tokens[source, :kept].repeat_interleave(copies, 0)
    again = roll(model, world, begin, right[begin[:, 0]], g)
    given = credit(rewards, selected, again.rewards.view(-1, copies), arm.rules)
    if given.prefix is not None:
        advantages[source] = given.prefix
        masks[source] = stream_masks(masks[source], kept)[0]
    log["recovered"] = (again.rewards.view(-1, copies) == 1).any(1).float().mean().item()
    log["extra"] = len(again.rewards)
    return (
        torch.cat([tokens, again.tokens]), torch.cat([masks, stream_masks(again.own, kept)[1]]),
        torch.cat([advantages, given.resampled.flatten()]), log,
    )  # fmt: skip


def train(model, reference, world: World, arm: Arm, steps: int, seed: int) -> dict[str, list[float]]:
    """AdamW on the clipped surrogate and the k3 divergence, row normalisation.  Returns what was logged, by step."""
    g = torch.Generator().manual_seed(seed + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    objective = objectives.dapo(low=0.2, high=0.4, beta=BETA, correct_kl=False)
    history: dict[str, list[float]] = {}
    for _ in range(steps):
        tokens, masks, advantages, log = step_rows(model, world, arm, g)
        with torch.no_grad():
            ref = token_logps(reference, tokens)[:, 1:]
        labels = tokens[:, 1:].masked_fill(masks[:, 1:] == 0, -100)
        losses = row_loss(
            model(input_ids=tokens).logits[:, :-1], labels, objective, reduction="none",
            inputs={"advantages": advantages, "ref_logp": ref},
        )  # fmt: skip
        loss = (token_weights(masks[:, 1:], "row", QUESTIONS * arm.rollouts) * losses).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in log.items():
            history.setdefault(name, []).append(value)
    return history


def evaluate(model, world: World, seed: int) -> dict[str, float]:
    """Fresh draws of every question: accuracy, with and without the tool, by half, pass@4, all-wrong rate of eights."""
    g = torch.Generator().manual_seed(seed + 3)
    asked = torch.arange(QUESTIONS).repeat(DRAWS)
    right = world.draw(asked, g)
    rolled = roll(model, world, asked.repeat_interleave(TRIES)[:, None], right.repeat_interleave(TRIES), g)
    rewards, called = rolled.rewards.view(-1, TRIES), rolled.called.view(-1, TRIES)
    hard = world.share[asked] == PRIOR
    groups = roll(model, world, asked.repeat_interleave(ROLLOUTS)[:, None], right.repeat_interleave(ROLLOUTS), g)
    members, correct = groups.called.view(-1, ROLLOUTS), groups.rewards.view(-1, ROLLOUTS) == 1
    some = members.any(1)

    def share(values: Tensor) -> float:
        return values.float().mean().item() if values.numel() else math.nan

    return {
        "accuracy": share(rewards), "pass_at_4": share(rewards.any(1)), "accuracy_hard": share(rewards[hard]),
        "tool_rate": share(called), "tool_accuracy": share(rewards[called]),
        "no_tool_accuracy": share(rewards[~called]), "all_wrong": share(triggered(members, correct)[some]),
    }  # fmt: skip


def run(options: AXPODemoOptions) -> dict[str, Any]:
    """Every arm from each seed's start; writes results.json and curves.png to ``output``; returns the results."""
    started = time.perf_counter()
    results: dict[str, Any] = {"options": asdict(options), "seeds": []}
    for seed in range(options.seeds):
        world, reference = World(1000 * seed), make_model(1000 * seed)
        fit(reference, world, 1000 * seed)
        entry: dict[str, Any] = {"start": evaluate(reference, world, 1000 * seed), "arms": {}}
        for key, arm in ARMS.items():
            begun = time.perf_counter()
            model = make_model(0)
            model.load_state_dict(reference.state_dict())
            history = train(model, reference, world, arm, options.steps, 1000 * seed)
            final = evaluate(model, world, 1000 * seed)
            seconds = time.perf_counter() - begun
            entry["arms"][key] = {"final": final, "history": thinned(history), "seconds": seconds}
            print(
                f"seed {seed}  {arm.name:<24} accuracy {final['accuracy']:.3f}  tool rate {final['tool_rate']:.3f}  "
                f"({seconds:.0f} s)",
                flush=True,
            )
        results["seeds"].append(entry)
    results["seconds"] = time.perf_counter() - started
    results = _rounded(results)  # what is shown is what the file holds
    publish(results, Path(options.output), table, plot)
    return results


def thinned(history: dict[str, list[float]], every: int = 10) -> dict[str, list[float]]:
    """Means over those of ``every`` steps that have a value; NaN where none has."""
    out = {}
    for name, values in history.items():
        out[name] = [_mean(values[i : i + every]) for i in range(0, len(values), every)]
    return out


def _rounded(value):
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


#: Shown columns: key of the final evaluation, heading.
COLUMNS = (
    ("accuracy", "accuracy"), ("pass_at_4", "pass@4"), ("accuracy_hard", "accuracy, hard half"),
    ("tool_rate", "tool rate"), ("tool_accuracy", "accuracy given a call"), ("all_wrong", "all-wrong rate"),
)  # fmt: skip
#: Below it a policy no longer calls its tool.
COLLAPSED = 0.01


def shown(values: list[float | None]) -> str:
    """Mean and half width of the 95 % interval over seeds that have a value; how many, where not all."""
    x = [v for v in values if v is not None and not math.isnan(v)]
    if not x:
        return "-"
    mean, half = interval(x)
    spread = "" if math.isnan(half) else f" ± {half:.3f}"
    return f"{mean:.3f}{spread}" + (f" ({len(x)})" if 1 < len(x) < len(values) else "")


def rows_of(results: dict) -> list[list[str]]:
    """Heading and a row an arm, for text and for docs: means over seeds after the last step."""
    seeds = results["seeds"]
    rows = [["arm", "rollouts a step", *[name for _, name in COLUMNS], "gave the tool up"]]
    starts = [shown([s["start"][key] for s in seeds]) for key, _ in COLUMNS]
    rows.append(["start", "", *starts, ""])
    for key, arm in ARMS.items():
        runs = [s["arms"][key] for s in seeds]
        extra = sum(sum(r["history"]["extra"]) / len(r["history"]["extra"]) for r in runs) / len(runs)
        count = sum(r["final"]["tool_rate"] < COLLAPSED for r in runs)
        cells = [shown([r["final"][column] for r in runs]) for column, _ in COLUMNS]
        rows.append([arm.name, f"{QUESTIONS * arm.rollouts + extra:.0f}", *cells, f"{count} of {len(runs)}"])
    return rows


def table(results: dict) -> str:
    """The results as text."""
    rows = rows_of(results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(results: dict) -> str:
    """The results as a table for docs."""
    head, *rest = rows_of(results)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest))


def _mean(values) -> float:
    """Of those that are numbers; NaN where none is."""
    some = [v for v in values if not math.isnan(v)]
    return sum(some) / len(some) if some else math.nan


def plot(results: dict, path: Path) -> None:
    """Reward, tool rate and all-wrong rate of the training rollouts by step; a line a seed and the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"reward": "accuracy", "tool_rate": "tool rate", "all_wrong": "all-wrong rate of tool-using subgroups"}
    colors = dict(zip(ARMS, ("#4c72b0", "#8172b3", "#dd8452", "#55a868", "#c44e52"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, arm in ARMS.items():
            # a share of nothing has no value: a gap in the line
            given = [s["arms"][name]["history"][key] for s in results["seeds"]]
            lines = [[math.nan if v is None else v for v in line] for line in given]
            every = results["options"]["steps"] / len(lines[0])
            steps = [(i + 0.5) * every for i in range(len(lines[0]))]
            for line in lines:
                axis.plot(steps, line, color=colors[name], alpha=0.2, linewidth=0.8)
            mean = [_mean(values) for values in zip(*lines, strict=True)]
            axis.plot(steps, mean, color=colors[name], linewidth=2, label=arm.name)
        axis.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
