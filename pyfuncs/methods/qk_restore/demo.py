"""``burnish demo qk-restore``: a tiny hybrid learns recall, loses it to local reasoning, and has it restored.

A transformers MiniMax model of about 0.2M parameters: two layers of lightning attention and two of softmax attention
without positions (rotary angles divided by 1e9).  First it learns to recall values of keys hidden among fillers, with
a little of the chain below; then it is fine-tuned on the chain alone, each of whose steps needs the two tokens before
it.  Then every restore of the paper's ablation, the wrong one (queries and keys of the linear layers), and two regimes
in which there is little to repair: fine-tuning on a chain over other tokens, and with a little recall mixed in.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ...paths import Additive, Scored, as_tensors, attention, hypervolume, pareto_front
from ..demo_options import RecallDemoOptions
from .drift import drift
from .options import QKRestoreOptions
from .probe import DistanceProbe
from .restore import restore, restore_path

KEYS, VALUES, FILLERS, PAIRS, CHAIN = 16, 10, 16, 4, 12
ASK, START = 1, 2
KEY, VALUE, FILLER = 3, 3 + KEYS, 3 + KEYS + VALUES
VOCABULARY = FILLER + FILLERS
LENGTHS = (32, 128, 512, 1024)
#: Name -> (layers, parts); "linear" are the layers that the method must leave alone.
VARIANTS = {
    "QK-Restore": ("softmax", ("q", "k")), "Q only": ("softmax", ("q",)), "K only": ("softmax", ("k",)),
    "V only": ("softmax", ("v",)), "V and O": ("softmax", ("v", "o")), "Q, K of linear layers": ("linear", ("q", "k")),
}  # fmt: skip
REGIMES = ("chain", "chain over other tokens", "chain and 5 % recall")


def model(seed: int):
    """The hybrid, with random weights."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    torch.manual_seed(seed)
    return MiniMaxForCausalLM(MiniMaxConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, num_local_experts=1, num_experts_per_tok=1, block_size=64,
        layer_types=["linear_attention", "full_attention"] * 2, max_position_embeddings=4096,
        rope_parameters={"rope_type": "linear", "factor": 1e9, "rope_theta": 10000.0}, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, initializer_range=0.05,
    ))  # fmt: skip


def recall(batch: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels): PAIRS keys with values among fillers, then each key asked for in another order; labels at the
    values."""
    body = length - 3 * PAIRS
    rows = torch.randint(FILLER, VOCABULARY, (batch, body), generator=generator)
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :PAIRS] + KEY
    values = torch.randint(VALUE, VALUE + VALUES, (batch, PAIRS), generator=generator)
    # places two apart, so that pairs do not overlap
    places = torch.rand(batch, body // 2, generator=generator).argsort(1)[:, :PAIRS] * 2
    rows.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = torch.rand(batch, PAIRS, generator=generator).argsort(1)
    asked = torch.stack([torch.full_like(order, ASK), keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    ids = torch.cat([rows, asked], 1)
    labels = torch.full_like(ids, -100)
    at = torch.arange(body + 2, length, 3)
    labels[:, at] = ids[:, at]
    return ids, labels


def chain(batch: int, generator: torch.Generator, *, other: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels): v0 k1 v1 k2 v2 ..., v_t = v_{t-1} + k_t mod 10; ``other`` spells it with fillers."""
    steps = torch.randint(0, KEYS if not other else 6, (batch, CHAIN), generator=generator)
    first = torch.randint(0, VALUES, (batch, 1), generator=generator)
    values = torch.cat([first, first + steps.cumsum(1)], 1) % VALUES
    key, value = (FILLER + VALUES, FILLER) if other else (KEY, VALUE)
    ids = torch.stack([values[:, :-1] + value, steps + key], 2).flatten(1)
    ids = torch.cat([torch.full((batch, 1), START), ids, values[:, -1:] + value], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 3::2] = ids[:, 3::2]
    return ids, labels


def train(net, steps: int, lr: float, batches, title: str) -> list[float]:
    """AdamW with a one-cycle rate; ``batches()`` gives (ids, labels).  Returns the losses."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    net.train()
    losses = []
    for _ in (bar := tqdm(range(steps), desc=title, mininterval=2)):
        ids, labels = batches()
        loss = net(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if len(losses) % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.3f}")
    net.eval()
    return losses


@torch.no_grad()
def accuracy(net, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of labelled tokens that the model puts first."""
    hits = total = 0
    for x, y in zip(ids.split(32), labels.split(32), strict=True):
        top = net(input_ids=x, use_cache=False).logits[:, :-1].argmax(-1)
        hits += int((top == y[:, 1:]).sum())
        total += int((y[:, 1:] != -100).sum())
    return hits / total


def evaluate(net, problems: int, seed: int) -> dict[str, float]:
    """Accuracy on the chain and on recall at each length; the problems are the same for every model of a seed."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    out = {"chain": accuracy(net, *chain(problems, generator))}
    for length in LENGTHS:
        # every problem asks for PAIRS values; fewer long ones
        count = max(32, min(problems, problems * 128 // length))
        out[f"recall {length}"] = accuracy(net, *recall(count, length, generator))
    return out


def one_seed(options: RecallDemoOptions, seed: int, folder: Path) -> dict:
    """Everything for one seed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (16, 32, 48, 64, 96)

    def pretraining():
        if float(torch.rand(1, generator=generator)) < 0.1:
            return chain(options.batch_size, generator)
        pick = lengths[int(torch.randint(len(lengths), (1,), generator=generator))]
        return recall(options.batch_size, max(pick, 3 * PAIRS + 2 * PAIRS), generator)

    net = model(seed)
    losses = train(net, options.pretrain_steps, 3e-3, pretraining, f"seed {seed}: recall")
    before = copy.deepcopy(net)
    out: dict = {
        "seed": seed,
        "pretrain_loss": losses[::50],
        "before": evaluate(net, options.problems, seed),
        "regimes": {},
    }
    for regime in REGIMES:

        def tuning(regime=regime):
            if regime == REGIMES[2] and float(torch.rand(1, generator=generator)) < 0.05:
                return recall(options.batch_size, 64, generator)
            return chain(options.batch_size, generator, other=regime == REGIMES[1])

        net = copy.deepcopy(before)
        train(net, options.sft_steps, options.sft_learning_rate, tuning, f"seed {seed}: {regime}")
        out["regimes"][regime] = _compare(before, net, options, seed, folder if regime == REGIMES[0] else None)
    return out


def _compare(before, after, options: RecallDemoOptions, seed: int, folder: Path | None) -> dict:
    found: dict = {"after": evaluate(after, options.problems, seed)}
    work = copy.deepcopy(after)
    kinds = {"linear_attention": "softmax", "full_attention": "linear"}
    for name, (layers, parts) in VARIANTS.items():
        selector = attention(
            as_tensors(after), after.config, parts=parts, kinds=kinds if layers == "linear" else None
        )  # fmt: skip
        Additive(before, after, selector).load_into(work, 0)
        found[name] = evaluate(work, options.problems, seed)
    path = restore_path(before, after)
    rows = drift(as_tensors(before), as_tensors(after), path.selector, angles=True)
    found["drift"] = [{"layer": r.layer, "part": r.part, "relative": r.relative, "angle": r.angle} for r in rows]
    if folder is None:
        return found
    points = []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        path.load_into(work, 1 - alpha)
        scores = evaluate(work, options.problems, seed)
        recalled = sum(scores[f"recall {n}"] for n in LENGTHS) / len(LENGTHS)
        points.append(Scored(scores["chain"], recalled, alpha))
    found["path"] = [asdict(p) for p in points]
    found["front"] = [p.t for p in pareto_front(points)]
    found["hypervolume"] = hypervolume(points)
    for lam in (0.1, 1.0, 10.0):
        restore_path(before, after, options=QKRestoreOptions(mode="pro", lam=lam)).load_into(work, 0)
        found[f"QK-Pro, lambda {lam:g}"] = evaluate(work, options.problems, seed)
    found["distance"] = {}
    ids, labels = chain(64, torch.Generator().manual_seed(seed))
    for name, net in (("before", before), ("after", after)):
        with DistanceProbe(net) as probe:
            net(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        net.zero_grad()
        profile = probe.profile()
        found["distance"][name] = {
            "window": profile.window()[0],
            "mean_distance": profile.mean_distance,
            "g": profile.absolute.tolist(),
        }
    # the same through the command's own path: directories on disk
    before.save_pretrained(folder / "before")
    after.save_pretrained(folder / "after")
    report = restore(folder / "before", folder / "after", folder / "restored")
    found["bytes_changed"] = report.bytes_changed
    return found


def check_output(options: RecallDemoOptions) -> None:
    """ValueError where ``output`` holds something."""
    out = Path(options.output)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty directory")


def run(options: RecallDemoOptions) -> dict:
    """All seeds; writes ``results.json`` and ``recall.png`` under ``output`` as they come.  Returns the results."""
    out = Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results: dict = {"options": asdict(options), "torch": torch.__version__, "seeds": []}
    for seed in range(options.seeds):
        results["seeds"].append(one_seed(options, seed, out / f"seed-{seed}"))
        results["seconds"] = time.perf_counter() - started
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print(table(results), flush=True)
    plot(results, out / "recall.png")
    print(f"written: {out / 'results.json'}, {out / 'recall.png'} ({results['seconds'] / 60:.1f} minutes)")
    return results


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval by Student's t); NaN half width for one value."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(n, 2.26)
    return mean, t * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def rows(results: dict, regime: str) -> dict[str, dict[str, tuple[float, float]]]:
    """model -> column -> (mean, half width) over seeds."""
    seeds = results["seeds"]
    names = [n for n, v in seeds[0]["regimes"][regime].items() if isinstance(v, dict) and "chain" in v]
    columns = list(seeds[0]["before"])
    out = {"before": {c: interval([s["before"][c] for s in seeds]) for c in columns}}
    for name in names:
        out[name] = {c: interval([s["regimes"][regime][name][c] for s in seeds]) for c in columns}
    return out


def table(results: dict) -> str:
    """Means over seeds, with 95 % intervals where there are several."""
    lines = []
    for regime in REGIMES:
        found = rows(results, regime)
        columns = list(found["before"])
        lines.append(f"\nfine-tuned on: {regime} ({len(results['seeds'])} seeds)")
        lines.append(" " * 22 + "".join(f"{c:>16}" for c in columns))
        for name, row in found.items():
            cells = (f"{m:.1%}" + ("" if math.isnan(h) else f" ± {h:.1%}") for m, h in row.values())
            lines.append(f"{name:<22}" + "".join(f"{c:>16}" for c in cells))
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Recall against length for each model, and g(tau) before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    found = rows(results, REGIMES[0])
    for name in ("before", "after", *VARIANTS):
        means = [found[name][f"recall {n}"][0] for n in LENGTHS]
        left.plot(LENGTHS, means, marker="o", label=name)
        middle.plot(found[name]["chain"][0], sum(means) / len(means), "o", label=name)
    left.set(title="recall by length", xscale="log", xlabel="tokens", ylim=(0, 1.02))
    left.legend(fontsize=7)
    middle.set(title="chain against mean recall", xlabel="chain", ylabel="recall")
    for name in ("before", "after"):
        g = results["seeds"][0]["regimes"][REGIMES[0]]["distance"][name]["g"]
        right.plot(range(len(g)), g, label=name)
    right.set(title="g(tau) on the chain, first seed", xlabel="distance, tokens", yscale="log")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
