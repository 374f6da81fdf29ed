"""AXPOTrainer on TRL's trainer, tool loop and loss: what reaches the loss, and what does not change."""

import math

import axpo_tiny as toy
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from burnish.methods import fuse_policy_head
from burnish.methods.axpo import batch as rows
from burnish.methods.axpo.config import AXPOConfig
from burnish.methods.axpo.plan import Rules, credit, normalise, token_weights
from burnish.methods.axpo.trainer import AXPOTrainer

N, K = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save(tmp_path_factory.mktemp("axpo-model"))


class Recording(AXPOTrainer):
    """Keeps what it decided, and the sources."""

    def _resample(self, sources):
        self.sources = sources
        self.ordinary = self._rollouts
        extra, rewards = super()._resample(sources)
        self.resampled = rewards
        return extra, rewards

    def _credited(self, batch, extra, rewards, selected, *rest):
        self.selected, self.rewards = selected, rewards
        return super()._credited(batch, extra, rewards, selected, *rest)


def scored(tmp_path, folder, kind=Recording, seed=11, config=AXPOConfig, **more):
    """(trainer, its scored generation batch) from given randomness."""
    t = toy.trainer(tmp_path, folder, kind=kind, config=config, **more)
    t.model.train()
    t.current_gradient_accumulation_steps = t.args.gradient_accumulation_steps
    inputs = toy.generation_batch(t)
    torch.manual_seed(seed)
    return t, t._generate_and_score_completions(inputs)


def text(t, ids, mask):
    return t._tokenizer.decode(ids[mask.bool()])


PLAIN = {"epsilon_high": 0.4, "beta": 1e-3, "max_tool_calling_iterations": 3}


@pytest.mark.parametrize(("norm", "loss"), [("token_mean", "dapo"), ("row", "grpo")])
def test_without_a_trigger_or_a_budget_it_is_grpo_to_the_bit(tmp_path, folder, norm, loss):
    """Two steps of accumulation 2 and two updates a batch; with a trigger and a budget it is not."""
    runs = {}
    common = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3}
    for name, script, kind, more in (
        ("grpo", {}, GRPOTrainer, {"config": GRPOConfig, "loss_type": loss, **PLAIN}),
        ("budget 0", {}, AXPOTrainer, {"resample_budget": 0.0, "axpo_norm": norm}),
        ("budget", {}, AXPOTrainer, {"resample_budget": 1.0, "axpo_norm": norm}),
        ("grpo, right", {"right": 1.0}, GRPOTrainer, {"config": GRPOConfig, "loss_type": loss, **PLAIN}),
        ("no trigger", {"right": 1.0}, AXPOTrainer, {"resample_budget": 1.0, "axpo_norm": norm}),
    ):
        t = toy.trainer(tmp_path, folder, kind=kind, script=toy.Script(None, **script), **common, **more)
        start = toy.parameters(t)
        t.train()
        runs[name] = toy.parameters(t), [e.get("axpo/resampled_rows") for e in t.state.log_history[:3]]
        assert any(not torch.equal(start[n], p) for n, p in runs[name][0].items())
    same = lambda a, b: all(torch.equal(runs[a][0][n], runs[b][0][n]) for n in runs[a][0])  # noqa: E731
    assert same("grpo", "budget 0") and same("grpo, right", "no trigger")
    assert not same("grpo", "budget") and sum(x or 0 for x in runs["budget"][1]) > 0
    assert not any(runs["no trigger"][1]) and not any(runs["budget 0"][1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory, folder):
    """(AXPO's trainer and batch, plain GRPO's) from the same randomness; old log-probabilities are there to compare."""
    path = tmp_path_factory.mktemp("pair")
    more = {"num_iterations": 2, "per_device_train_batch_size": 16}
    ours = scored(path, folder, resample_budget=0.5, **more)
    plain = {**more, "loss_type": "dapo", **PLAIN}
    theirs = scored(path, folder, GRPOTrainer, config=GRPOConfig, **plain)
    return *ours, theirs[1]


def test_rows(pair):
    t, ours, theirs = pair
    count = rows.row_count(theirs)
    places = {b * N + i: j for j, (b, i) in enumerate(t.selected)}
    assert t.selected and len(t.selected) <= Rules(0.5, K).prefixes(count) == 4
    assert rows.row_count(ours) == count + len(t.selected) * K
    assert ours["prompt_ids"].shape[1] == theirs["prompt_ids"].shape[1]
    width = theirs["completion_ids"].shape[1]
    expected = credit(t.rewards, t.selected, t.resampled, Rules(0.5, K, eps=1e-4))
    for i in range(count):
        # A6: whoever is not selected is as GRPO has it, to the bit
        for key in ("completion_ids", "completion_mask", "ref_per_token_logps", "old_per_token_logps"):
            assert torch.equal(ours[key][i, :width], theirs[key][i]), key
        kept = len(t.sources[places[i]].prefix) if i in places else width
        assert torch.equal(ours["tool_mask"][i, :kept], theirs["tool_mask"][i, :kept])
        assert not ours["tool_mask"][i, kept:width].any()
        want = theirs["advantages"][i] if i not in places else expected.prefix[places[i]]
        assert torch.equal(ours["advantages"][i], want)
        if i in places:
            assert text(t, ours["completion_ids"][i, :kept], torch.ones(kept)).endswith("<tool_call>")
            assert text(t, ours["completion_ids"][i, :kept], torch.ones(kept)).count("<tool_call>") == 1
    for row in range(count, rows.row_count(ours)):
        place, copy = divmod(row - count, K)
        prefix = t.sources[place].prefix
        b, i = t.selected[place]
        assert ours["completion_ids"][row, : len(prefix)].tolist() == prefix
        assert torch.equal(ours["prompt_ids"][row], ours["prompt_ids"][b * N + i])
        mask = ours["tool_mask"][row] * ours["completion_mask"][row]
        assert not mask[: len(prefix)].any() and mask.any()
        assert ours["advantages"][row] == expected.resampled[place, copy]
        said = text(t, ours["completion_ids"][row], ours["completion_mask"][row])
        trained = text(t, ours["completion_ids"][row], mask)
        assert "<tool_response>" in said and "tool_response" not in trained  # the tool ran, and is not trained on
        assert trained.startswith("\n{")
    active = (ours["tool_mask"] * ours["completion_mask"]).sum()
    assert ours["num_items_in_batch"] == active
    # what was wrong was wrong: sources are the tool-using rollouts of groups without a right one
    for b, i in t.selected:
        called = [any(m["role"] == "tool" for m in t.ordinary.completions[b * N + j]) for j in range(N)]
        assert called[i] and not any(t.rewards[b, j] for j in range(N) if called[j])


def test_old_and_reference_logps_are_of_the_whole_concatenation(pair):
    t, ours, theirs = pair
    count = rows.row_count(theirs)
    extra = rows.take(ours, range(count, rows.row_count(ours)))
    logps = t._logps(extra)
    mask = extra["completion_mask"].bool()
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(extra[key][mask], logps[mask], rtol=1e-5, atol=1e-5)


def test_the_least_confident_call_goes_first(tmp_path, folder):
    """Against a forward of our own over prompt and completion, whole logits, temperature and all."""
    for known in (False, True):  # the rollout's log-probabilities made for this, or TRL's old ones
        t, _ = scored(tmp_path, folder, resample_budget=0.25, per_device_train_batch_size=16, temperature=0.7,
                      script=toy.Script(None, tool=0.8, right=0.0), num_iterations=1 + known)  # fmt: skip
        assert len(t.selected) == 2
        ordinary, found = t.ordinary, []
        for i, (prompt, ids) in enumerate(zip(ordinary.prompt_ids, ordinary.completion_ids, strict=True)):
            said = t._text(ids)
            if "<tool_call>" not in said:
                continue
            with torch.no_grad():
                logits = t.model(input_ids=torch.tensor([prompt + ids])).logits[0] / 0.7
            p = logits.softmax(-1)[torch.arange(len(prompt) - 1, len(prompt + ids) - 1), ids]
            # a token a character but for the last three kinds, none of which is in a call
            start = next(n for n in range(len(ids)) if t._text(ids[:n]).endswith("<tool_call>"))
            end = next(n for n in range(start, len(ids)) if t._text(ids[:n]).endswith("</tool_call>"))
            found.append((p[start:end].mean().item(), i // N, i % N))
        questions, want = set(), []
        for _, b, i in sorted(found):
            if b not in questions:
                want.append((b, i))
                questions.add(b)
        assert t.selected == want[:2]


def test_every_own_token_of_source_and_resamples_is_in_one_stream(pair):
    """A1 through TRL's loss: dL/dlogp is not zero exactly where the streams say, beta 0 and advantages not zero."""
    t, ours, _ = pair
    ours = {**ours, "advantages": torch.where(ours["advantages"] == 0, 0.5, ours["advantages"])}
    shape = ours["completion_ids"].shape
    leaf = torch.zeros(shape, requires_grad=True)
    ours["old_per_token_logps"] = torch.zeros(shape)
    own, beta = t._get_per_token_logps_and_entropies, t.beta
    try:
        t._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, torch.zeros(shape), None)
        t.beta = 0.0
        (grad,) = torch.autograd.grad(t._compute_loss(t.model, ours), leaf)
    finally:
        t._get_per_token_logps_and_entropies, t.beta = own, beta
    assert torch.equal(grad != 0, (ours["completion_mask"] * ours["tool_mask"]).bool())
    for place, (b, i) in enumerate(t.selected):
        length = len(t.sources[place].prefix)
        source = grad[b * N + i]
        assert (source[:length] != 0).all() and not source[length:].any()


@pytest.mark.parametrize("more", [
    {"axpo_norm": "token_mean"}, {"axpo_norm": "row"},
    {"axpo_norm": "row", "gradient_accumulation_steps": 3, "per_device_train_batch_size": 8},
    {"axpo_norm": "token_mean", "gradient_accumulation_steps": 3, "per_device_train_batch_size": 8},
], ids=str)  # fmt: skip
def test_the_loss_is_the_plans(tmp_path, folder, more):
    """TRL's loss over the mini-batches, summed, and its gradient = sum of token_weights times token losses."""
    torch.manual_seed(0)
    options = {"per_device_train_batch_size": 16, "resample_budget": 0.5, "num_iterations": 2, **more}
    t, batch = scored(tmp_path, folder, **options)
    ordinary = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
    assert rows.row_count(batch) % t.args.steps_per_generation == 0
    batch["old_per_token_logps"] += 0.3 * torch.randn_like(batch["old_per_token_logps"])
    whole = rows.take(batch, range(rows.row_count(batch)))
    t._generate_and_score_completions = lambda _: batch
    t._step, losses = 0, []
    for step in range(t.args.steps_per_generation):
        t._step = step
        losses.append(t._compute_loss(t.model, t._prepare_inputs([])))
    head = t.model.lm_head.weight
    (got,) = torch.autograd.grad(sum(losses), head)
    ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
    attention = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
    width = whole["completion_ids"].shape[1]
    logits = t.model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    logp = logits.log_softmax(-1).gather(2, whole["completion_ids"][..., None])[..., 0]
    ratio, a = (logp - whole["old_per_token_logps"]).exp(), whole["advantages"][:, None]
    d = logp - whole["ref_per_token_logps"]
    token = -torch.min(ratio * a, ratio.clamp(0.8, 1.4) * a) + 1e-3 * ratio * ((-d).exp() - 1 + d)
    mask = (whole["completion_mask"] * whole["tool_mask"]).float()
    want = (token_weights(mask, t.args.axpo_norm, ordinary) * token).sum()
    torch.testing.assert_close(sum(losses), want, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(want, head)
    assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("more", [
    {"gradient_accumulation_steps": 2}, {"steps_per_generation": 3, "max_steps": 3}, {"num_iterations": 2},
    {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 2},
], ids=str)  # fmt: skip
def test_every_row_is_trained_on_as_often(tmp_path, folder, more):
    """Whatever the split, each update of a batch sees its active tokens once."""

    class Counting(AXPOTrainer):
        seen: list = []  # noqa: RUF012

        def _compute_loss(self, model, inputs):
            active = (inputs["completion_mask"] * inputs["tool_mask"]).sum().item()
            self.seen.append((active, inputs["num_items_in_batch"].item(), rows.row_count(inputs)))
            return super()._compute_loss(model, inputs)

    Counting.seen = []
    t = toy.trainer(tmp_path, folder, kind=Counting, resample_budget=1.0, **more)
    t.train()
    size, assert_more = t.args.steps_per_generation, False
    for start in range(0, len(Counting.seen), size):
        part = Counting.seen[start : start + size]
        assert sum(active for active, _, _ in part) == part[0][1]
        assert len({count for _, _, count in part}) == 1
        assert_more |= part[0][2] > t.args.per_device_train_batch_size
    assert assert_more and len(Counting.seen) % size == 0
    assert all(math.isfinite(e["loss"]) for e in t.state.log_history if "loss" in e)


def test_metrics_are_of_the_ordinary_rollouts(tmp_path, folder):
    t, _ = scored(tmp_path, folder, per_device_train_batch_size=16, resample_budget=0.5)
    log = {k: v[-1] for k, v in t._metrics["train"].items()}
    called = [any(m["role"] == "tool" for m in c) for c in t.ordinary.completions]
    assert log["reward"] == pytest.approx(t.rewards.mean().item())
    assert log["axpo/tool_rate"] == pytest.approx(sum(called) / 16)
    fires = [any(called[b * N + i] for i in range(N))
             and not any(called[b * N + i] and t.rewards[b, i] for i in range(N)) for b in range(4)]  # fmt: skip
    assert log["axpo/trigger_rate"] == pytest.approx(sum(fires) / 4)
    with_call = [any(called[b * N : b * N + N]) for b in range(4)]
    assert log["axpo/all_wrong_rate"] == pytest.approx(sum(fires) / sum(with_call))
    assert log["axpo/resampled_rows"] == t.resampled.numel()
    assert log["axpo/recovered_rate"] == pytest.approx((t.resampled == 1).any(1).float().mean().item())
    assert log["axpo/resampled_reward"] == pytest.approx(t.resampled.mean().item())
    assert all(len(v) == 1 for v in t._metrics["train"].values())
    assert log["num_tokens"] == t.state.num_input_tokens_seen and len(t._logs["prompt"]) == 16
    assert t.num_generations == N


@pytest.mark.parametrize("switch", [
    {"fix_prefix": False}, {"resample_subgroup": "no_tool"}, {"prefix_credit": False}, {"merge_groups": True},
    {"confidence": "random"},
], ids=str)  # fmt: skip
def test_ablations(tmp_path, folder, switch):
    plain = {"loss_type": "dapo", **PLAIN, "per_device_train_batch_size": 16}
    script = toy.Script(None, tool=0.5, right=0.2, guess=0.1)
    t, ours = scored(tmp_path, folder, resample_budget=0.5, per_device_train_batch_size=16, script=script, **switch)
    again = toy.Script(None, tool=0.5, right=0.2, guess=0.1)
    _, theirs = scored(tmp_path, folder, GRPOTrainer, config=GRPOConfig, script=again, **plain)
    width = theirs["completion_ids"].shape[1]
    sources = [b * N + i for b, i in t.selected]
    assert sources
    kept = [len(s.prefix) for s in t.sources]
    asked = t.script.seen
    if "fix_prefix" in switch or "resample_subgroup" in switch:
        assert kept == [0] * len(kept) and not any(p.endswith("<tool_call>") for p in asked)
        for row in range(16, rows.row_count(ours)):
            assert ours["tool_mask"][row, 0] == 1
    else:
        assert min(kept) > 0 and any(p.endswith("<tool_call>") for p in asked)
    if "resample_subgroup" in switch:
        for b, i in t.selected:
            assert not any(m["role"] == "tool" for m in t.ordinary.completions[b * N + i])
    masked = [not torch.equal(ours["tool_mask"][i, :width], theirs["tool_mask"][i]) for i in range(16)]
    credited = "merge_groups" in switch or "confidence" in switch
    assert [i for i in range(16) if masked[i]] == (sorted(sources) if credited else [])
    changed = [i for i in range(16) if ours["advantages"][i] != theirs["advantages"][i]]
    if "merge_groups" in switch:
        b = t.selected[0][0]
        mine = [j for j, (q, _) in enumerate(t.selected) if q == b]
        pool = t.rewards[b].clone()
        for j in mine:
            pool[t.selected[j][1]] = float((t.resampled[j] == 1).any())
        pool = normalise(torch.cat([pool, t.resampled[mine].flatten()]), eps=1e-4)
        torch.testing.assert_close(ours["advantages"][b * N : b * N + N], pool[:N])
        torch.testing.assert_close(ours["advantages"][16 + mine[0] * K : 16 + mine[0] * K + K], pool[N : N + K])
    else:
        assert set(changed) <= (set(sources) if credited else set())


def test_fused_policy_head(tmp_path, folder):
    """fuse_policy_head around it: the run without, to rounding."""
    results = []
    for fused in (False, True):
        t = toy.trainer(tmp_path, folder, resample_budget=1.0, num_iterations=2, max_steps=3)
        handle = fuse_policy_head(t) if fused else None
        t.train()
        logs = [e for e in t.state.log_history if "loss" in e]
        assert sum(e.get("axpo/resampled_rows", 0) for e in logs) > 0
        results.append((toy.parameters(t), [e["loss"] for e in logs]))
        if handle:
            handle.restore()
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-6)
    for name, p in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], p, rtol=1e-4, atol=1e-5)


def test_lora(tmp_path, folder):
    """The reference is the model without its adapters; resampled rows have its log-probabilities too."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    t = toy.trainer(tmp_path, folder, peft_config=lora, resample_budget=1.0, num_iterations=2)
    t.train()
    logs = [e for e in t.state.log_history if "loss" in e]
    assert t.ref_model is None and sum(e.get("axpo/resampled_rows", 0) for e in logs) > 0
    assert logs[0]["kl"] == 0 and logs[1]["kl"] > 0


def test_evaluation_is_trls(tmp_path, folder):
    t = toy.trainer(tmp_path, folder, resample_budget=1.0)
    t.model.eval()
    inputs = toy.generation_batch(t)
    torch.manual_seed(0)
    batch = t._generate_and_score_completions(inputs)
    assert rows.row_count(batch) == len(inputs) and not t._metrics["eval"].get("axpo/tool_rate")


def test_rows_that_fill_up_take_no_loss():
    names = ("prompt_ids", "prompt_mask", "completion_mask", "tool_mask")
    batch = {k: torch.ones(3, 2, dtype=torch.long) for k in names}
    stand_in = type("Trainer", (), {"args": type("Args", (), {"steps_per_generation": 2})})
    out = AXPOTrainer._divisible(stand_in, {**batch, "advantages": torch.ones(3)})
    assert out["tool_mask"].sum(1).tolist() == [2, 2, 2, 0] and out["advantages"].tolist() == [1, 1, 1, 0]
