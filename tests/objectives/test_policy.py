"""Policy-gradient objectives: definitions in plain arithmetic, facts, aggregation, parts of a batch, edges."""

import itertools
import math
import pickle
from pathlib import Path

import pytest
import ranks
import torch

from burnish import Objective, implied_target, linear_loss, objectives, row_loss
from burnish.objectives import aggregate, count_items
from burnish.ops import linear_loss as linear_module

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, V, H = 4, 5, 19, 7
#: Labels that count in each sequence: one has none.
LENGTHS = (5, 3, 0, 4)
POLICIES = ["bnpo", "cispo", "dapo", "dr_grpo", "gmpo", "grpo", "gspo", "ppo_clip", "reinforce", "rloo", "sapo"]


def policy(name, **options):
    return objectives.get(name, **({"length": 6.0} if name == "dr_grpo" else {}), **options)


def problem(seed=0, dtype=torch.float64):
    """hidden, weight, labels, and inputs whose ratios lie on both sides of every bound."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = rand(B, T, H), rand(V, H)
    target = torch.randint(0, V, (B, T), generator=g)
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    inputs = {
        "advantages": rand(B), "old_logp": logp + 0.5 * rand(B, T), "ref_logp": logp + 0.5 * rand(B, T),
        "correction": rand(B, T).exp(), "entropy_weight": rand(B, T).exp(),
    }  # fmt: skip
    for b, length in enumerate(LENGTHS):
        target[b, length:] = -100
    return (
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target,
        {k: v.to(dtype) for k, v in inputs.items()},
    )  # fmt: skip


def given(o, inputs, *without):
    return {k: inputs[k] for k in (*o.inputs, *o.optional) if k not in without}


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol / 10)


# ------------------------------------------------------------------------------------- the papers, token by token


def clip(x, low, high):
    return min(max(x, low), high)


def by_hand(name, logp, old, ref, a, correction, entropies, o):
    """Losses of one sequence's tokens, lists of floats, from the definitions; advantages are one number."""
    p, n = o.params, len(logp)
    logs = [x - y for x, y in zip(logp, old, strict=True)]
    high = p.get("high") if p.get("high") is not None else p.get("low")
    if name == "rloo":
        ratios = [math.exp(sum(logs))] * n
    elif name == "gspo" or p.get("level") == "sequence":
        ratios = [math.exp(sum(logs) / n)] * n
    else:
        ratios = [math.exp(x) for x in logs]
    if name == "gmpo":
        held = [min(x, high) if a > 0 else max(x, -p["low"]) for x in logs]
        ratios, weight = [math.exp(sum(held) / n)] * n, math.exp(sum(map(math.log, correction)) / n)
        correction = [weight] * n
    losses = []
    for t, r in enumerate(ratios):
        if name == "reinforce":
            loss = -a * logp[t]
        elif name == "cispo":
            loss = -clip(r, p["floor"], p["cap"]) * a * logp[t]
        elif name == "sapo":
            tau = p["tau_pos"] if a > 0 else p["tau_neg"]
            loss = -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
        elif name == "gmpo":
            loss = -a * r
        elif a >= 0:
            loss = -a * min(r, 1 + high)
        else:  # the larger of the two, and by the dual clip no more than c |A|
            bounded = min(r, p.get("delta") or math.inf)
            loss = -a * min(max(bounded, 1 - p["low"]), p.get("dual") or math.inf)
        loss *= correction[t]
        if p["beta"]:
            d = logp[t] - ref[t]
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[p["kl"]]
            loss += p["beta"] * kl * (r if p.get("correct_kl") else 1.0)
        loss -= p["entropy"] * entropies[t]
        losses.append(loss / p.get("length", 1.0))
    return losses


OPTIONS = [{}, {"beta": 0.3, "entropy": 0.05}]
EXTRA = {
    "cispo": [{"cap": 1.2, "floor": 0.8}, {"level": "sequence", "beta": 0.2}],
    "dapo": [{"delta": 1.4}, {"level": "sequence", "beta": 0.1}, {"beta": 0.2, "kl": "k1"}, {"beta": 0.2, "kl": "k2"}],
    "gmpo": [{"low": 0.1, "high": 0.2}],
    "grpo": [{"high": 0.3}, {"beta": 0.4, "correct_kl": False}],
    "gspo": [{"low": 0.05, "high": 0.3, "aggregate": "sequence_mean_token_sum"}],
    "ppo_clip": [{"dual": 1.3}, {"dual": None}],
    "rloo": [{"low": 0.4, "high": 0.9}],
    "sapo": [{"tau_pos": 2.0, "tau_neg": 3.0, "level": "sequence"}],
}
CASES = [(n, o) for n in POLICIES for o in OPTIONS + EXTRA.get(n, [])]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_definitions(name, options):
    """Values by the papers' formulas in floats, all three aggregations; gradients by finite differences (gradcheck)."""
    hidden, weight, target, inputs = problem()
    z = (hidden @ weight.T).detach()
    logp = z.log_softmax(-1)
    entropies = -(logp.exp() * logp).sum(-1) * inputs["entropy_weight"]
    chosen = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    for how in objectives.AGGREGATES if options == {} else (options.get("aggregate"),):
        o = policy(name, **{**options, **({"aggregate": how} if how else {})})
        per_sequence = [
            by_hand(name, *(x[b, :n].tolist() for x in (chosen, inputs["old_logp"], inputs["ref_logp"])),
                    inputs["advantages"][b].item(), inputs["correction"][b, :n].tolist(), entropies[b, :n].tolist(), o)
            for b, n in enumerate(LENGTHS) if n
        ]  # fmt: skip
        want = {
            "token_mean": lambda rows: sum(map(sum, rows)) / sum(LENGTHS),
            "sequence_mean_token_mean": lambda rows: sum(sum(r) / len(r) for r in rows) / B,
            "sequence_mean_token_sum": lambda rows: sum(map(sum, rows)) / B,
        }[o.aggregate](per_sequence)
        got = linear_loss(hidden, weight, target, o, inputs=given(o, inputs))
        assert got.item() == pytest.approx(want, rel=1e-11)
    if name == "cispo":
        return  # a weight inside is a constant: not the derivative of the value
    fn = lambda h, w: linear_loss(h, w, target, o, inputs=given(o, inputs))  # noqa: E731
    assert torch.autograd.gradcheck(fn, (hidden, weight), fast_mode=True)


# ------------------------------------------------------------------------------------- facts


def logp_gradient(o, log_ratio, advantage, **inputs):
    """d loss / d log p of one token whose ratio is given; A10 of the specification."""
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([2])
    old = torch.tensor([math.log(0.25) - log_ratio], dtype=torch.float64)
    rows = {"advantages": torch.tensor([advantage], dtype=torch.float64), "old_logp": old, **inputs}
    extra = {"sequences": torch.zeros(1, dtype=torch.int64)} if "sequences" in o.needs else {}
    loss = row_loss(z, y, o, inputs={k: v for k, v in rows.items() if k in o.inputs + o.optional}, **extra)
    (g,) = torch.autograd.grad(loss, z)
    return g[0, 2].item() / 0.75  # d log p_y / d z_y = 1 - p_y


@pytest.mark.parametrize(("ratio", "advantage", "want"), [
    (1.41, 1.0, 0.0), (1.39, 1.0, -1.39), (0.5, -1.0, 0.0), (1.5, -1.0, 1.5), (2.9, -1.0, 2.9), (3.1, -1.0, 0.0),
])  # fmt: skip
def test_where_a_clip_leaves_no_gradient(ratio, advantage, want):
    for o in (objectives.ppo_clip(0.2, 0.4), objectives.dapo(0.2, 0.4, delta=3.0)):
        assert logp_gradient(o, math.log(ratio), advantage) == pytest.approx(want, abs=1e-12)


def test_delta_is_the_dual_clip():
    hidden, weight, target, inputs = problem(1)
    inputs["old_logp"] -= 1.0  # ratios far above 1
    for a, b in zip(*(
        (loss := linear_loss(hidden, weight, target, o, inputs=given(o, inputs)), *torch.autograd.grad(
            loss, (hidden, weight))) for o in (objectives.ppo_clip(dual=1.7), objectives.bnpo(delta=1.7))
    ), strict=True):  # fmt: skip
        close(a, b)


@pytest.mark.parametrize("name", POLICIES)
def test_on_policy_every_gradient_is_that_of_weighted_nll(name):
    """R11, D13: at r = 1 the gradient is REINFORCE's, the values differ."""
    hidden, weight, target, inputs = problem()
    a = inputs["advantages"]
    o = policy(name)
    loss = linear_loss(hidden, weight, target, o, inputs={"advantages": a})
    # a product's gradient reaches each token whole, and dr_grpo divides by a constant
    how = "sequence_mean_token_sum" if name == "rloo" else o.aggregate
    nll = linear_loss(hidden, weight, target, objectives.weighted_nll(how), token_weight=a / o.params.get("length", 1))
    for g, w in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, nll)), strict=True):
        close(g, w)
    assert abs(loss - nll) > 1e-3 or name in ("reinforce", "cispo")
    with pytest.raises(ValueError, match="needs token_weight"):
        linear_loss(hidden, weight, target, objectives.weighted_nll())


def test_weighted_nll_is_drifts_loss():
    """D1, D11: weights K softmax(R / beta), sums or means of tokens, mean of rollouts; equal returns are SFT."""
    hidden, weight, target, _ = problem()
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target != -100)
    length = torch.tensor(LENGTHS, dtype=torch.float64).clamp(min=1)
    for returns in (torch.tensor([1.0, 0.9, -0.1, -0.4], dtype=torch.float64), torch.zeros(B, dtype=torch.float64)):
        w = B * (returns / 0.1).softmax(0)
        if returns.any():  # D4
            close(w, torch.tensor([2.92419683, 1.0757519, 4.884e-5, 2.43e-6], dtype=torch.float64), 1e-3)
        for how, share in (("sequence_mean_token_sum", 1.0), ("sequence_mean_token_mean", 1 / length)):
            got = linear_loss(hidden, weight, target, objectives.weighted_nll(how), token_weight=w)
            want = -(w * share * logp.sum(1)).mean()
            close(got, want)
            both = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (got, want))
            for a, b in zip(*both, strict=True):
                close(a, b)
    sft = linear_loss(hidden, weight, target, objectives.nll(), num_items=B)
    close(sft, linear_loss(hidden, weight, target, objectives.weighted_nll("sequence_mean_token_sum"), token_weight=w))


def test_a_sequence_ratio_reaches_all_its_tokens_alike():
    hidden, weight, target, inputs = problem()
    for name in ("gspo", "rloo", "gmpo"):
        o = policy(name, low=0.99, high=50.0)
        leaf = torch.zeros(B, T, V, dtype=torch.float64).log_softmax(-1).requires_grad_()
        loss = row_loss(leaf, target, o, inputs={"advantages": inputs["advantages"]})
        (g,) = torch.autograd.grad(loss, leaf)
        per_token = g.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        for b, n in enumerate(LENGTHS):
            assert not per_token[b, n:].any()
            close(per_token[b, :n], per_token[b, :1].expand(n))
    # one token a sequence: the ratio of the sequence is the token's
    one = target.clone()
    one[:, 1:] = -100
    pair = [linear_loss(hidden, weight, one, o, inputs=given(o, inputs))
            for o in (objectives.gspo(0.2, 0.2), objectives.grpo(0.2))]  # fmt: skip
    close(*pair)


def test_divergence():
    """R10 and A11: zero advantages leave the divergence's gradient, none where policy and reference agree."""
    hidden, weight, target, inputs = problem()
    for kl in ("k1", "k2", "k3"):
        o = objectives.grpo(beta=1e-3, kl=kl, correct_kl=False)
        rows = {"advantages": torch.zeros(B, dtype=torch.float64), "ref_logp": inputs["ref_logp"]}
        loss = linear_loss(hidden, weight, target, o, inputs=rows)
        assert torch.autograd.grad(loss, hidden)[0].abs().max() > 1e-5
        assert loss > 0 or kl == "k1"
        z = (hidden @ weight.T).log_softmax(-1)
        rows["ref_logp"] = z.gather(-1, target.clamp(min=0)[..., None])[..., 0].detach()
        loss = linear_loss(hidden, weight, target, o, inputs=rows)
        assert abs(loss) < 1e-15
        assert (torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-15) == (kl != "k1")
    without = objectives.grpo()
    loss = linear_loss(hidden, weight, target, without, inputs={"advantages": torch.zeros(B, dtype=torch.float64)})
    assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any()


def test_bonus_is_the_entropys_own_gradient():
    hidden, weight, target, _ = problem()
    zero = {"advantages": torch.zeros(B, dtype=torch.float64)}
    o = objectives.dapo(entropy=0.7)
    loss, info = linear_loss(hidden, weight, target, o, inputs=zero, metrics=("entropy",))
    logp = (hidden @ weight.T).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1) * (target != -100)
    close(info["entropy"], entropy.detach())
    want = -0.7 * entropy.sum() / sum(LENGTHS)
    close(loss, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, want)), strict=True):
        close(a, b)


# ------------------------------------------------------------------------------------- aggregation and parts of a batch


def test_shapes_of_inputs_and_weights():
    """(B,), (B, 1) and (B, T) are one; so are (B, T) labels and rows with ``sequences``."""
    hidden, weight, target, inputs = problem()
    for name, how in itertools.product(("dapo", "gspo"), objectives.AGGREGATES):
        o = policy(name, aggregate=how)
        rows = given(o, inputs)
        a = rows["advantages"]
        losses = [
            linear_loss(hidden, weight, target, o, inputs={**rows, "advantages": x})
            for x in (a, a[:, None], a[:, None].expand(B, T))
        ]
        flat = {k: (v[:, None].expand(B, T) if v.ndim == 1 else v).reshape(-1) for k, v in rows.items()}
        ids = torch.tensor([7, -3, 2**40, 7000])[:, None].expand(B, T).reshape(-1)
        order = torch.randperm(B * T, generator=torch.Generator().manual_seed(0))
        losses.append(linear_loss(
            hidden.reshape(B * T, H)[order], weight, target.reshape(-1)[order], o, sequences=ids[order],
            inputs={k: v[order] for k, v in flat.items()},
        ))  # fmt: skip
        for other in losses[1:]:
            close(other, losses[0])
    o = objectives.weighted_nll("sequence_mean_token_mean")
    w = inputs["advantages"].exp()
    close(linear_loss(hidden, weight, target, o, token_weight=w),
          linear_loss(hidden, weight, target, o, token_weight=w[:, None].expand(B, T).contiguous()))  # fmt: skip


def gradients(parts, o, inputs, hidden, weight, target, items, **options):
    """Summed gradients of the parts of a batch: slices of its sequences."""
    leaves = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    total = 0.0
    for part in parts:
        rows = {k: v[part] for k, v in given(o, inputs).items()}
        extra = {k: v[part] for k, v in options.items()}
        loss = linear_loss(leaves[0][part], leaves[1], target[part], o, inputs=rows, num_items=items, **extra)
        loss.backward()
        total += loss.detach()
    return total, leaves[0].grad, leaves[1].grad


@pytest.mark.parametrize("how", objectives.AGGREGATES)
@pytest.mark.parametrize("name", [*POLICIES, "weighted_nll"])
def test_micro_batches_add_up_to_the_batch(name, how):
    """D12: any split, with ``count_items`` of the whole, gives the batch's loss and gradient."""
    hidden, weight, target, inputs = problem()
    options = {} if name == "weighted_nll" else {"beta": 0.1, "entropy": 0.01}
    o = policy(name, aggregate=how, **options)
    more = {"token_weight": inputs["advantages"].exp()} if name == "weighted_nll" else {}
    whole = gradients([slice(0, B)], o, inputs, hidden, weight, target, None, **more)
    for cuts in ((0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)):
        parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        items = count_items([target[p] for p in parts], o)
        for a, b in zip(gradients(parts, o, inputs, hidden, weight, target, items, **more), whole, strict=True):
            close(a, b, 1e-12)
    # what it is there for: a mean over each part is another number
    apart = gradients(parts, o, inputs, hidden, weight, target, None, **more)
    assert (apart[2] - whole[2]).abs().max() > 1e-3 * whole[2].abs().max()


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    ranks.run(Path(__file__).with_name("policy_ranks.py"), 2, tmp_path)


def test_count_items():
    _, _, target, _ = problem()
    o = objectives.grpo()
    assert count_items(target).item() == sum(LENGTHS) and count_items(target).ndim == 0
    assert count_items([target, target[:1]], o).item() == B + 1
    ids = torch.arange(B)[:, None].expand(B, T).reshape(-1)
    assert count_items(target.reshape(-1), o, sequences=ids).item() == B
    assert count_items([target.reshape(-1)] * 2, o, sequences=[ids, ids + B]).item() == 2 * B
    assert count_items(target[:0], o).item() == 0 == count_items(target[:0].reshape(-1), o, sequences=ids[:0]).item()
    for call, text in (
        (lambda: count_items(target, "mean"), "objective must be an Objective or one of token_mean, .*; got 'mean'"),
        (lambda: count_items(target.reshape(-1), o), r"sequences must be given .* target \(20,\)"),
        (lambda: count_items([target] * 2, o, sequences=ids), "sequences must have one tensor for each of the 2"),
        (lambda: count_items([], o), "target must hold at least one tensor"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# ------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("name", POLICIES)
def test_what_masked_rows_hold_reaches_nothing(name, monkeypatch):
    """NaN in the inputs of rows that do not count; their gradients are exact zeros."""
    o = policy(name, beta=0.1, entropy=0.01)
    results = []
    for poison in (False, True):
        hidden, weight, target, inputs = problem()
        rows = {k: v.clone() for k, v in given(o, inputs).items()}
        z = (hidden @ weight.T).detach().clone()
        if poison:
            for k in rows.keys() - {"advantages"}:
                rows[k][target == -100] = math.nan
        for reduction in ("mean", "sum"):
            leaf = z.clone().requires_grad_()
            loss = row_loss(leaf, target, o, inputs=rows, reduction=reduction)
            (g,) = torch.autograd.grad(loss, leaf)
            assert not g[target == -100].any()
            results.append((poison, loss, g[target != -100]))
        for dropped in (True, False):  # rows are dropped on a CPU, projected where finding them would sync
            with monkeypatch.context() as patch:
                if not dropped:
                    patch.setattr(linear_module, "_kept", lambda *_: None)
                for plan in ("vocab", "auto"):
                    loss = linear_loss(hidden, weight, target, o, inputs=rows, plan=plan)
                    results.append((poison, loss, *torch.autograd.grad(loss, (hidden, weight))))
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        for x, y in zip(a[1:], b[1:], strict=True):
            assert x.isfinite().all()
            close(x, y)


@pytest.mark.parametrize("name", [*POLICIES, "weighted_nll"])
def test_no_row_counts(name):
    hidden, weight, target, inputs = problem()
    o = policy(name)
    more = {"token_weight": inputs["advantages"]} if name == "weighted_nll" else {}
    for rows in (B, 0):
        labels = torch.full_like(target, -100)[:rows]
        extra = {k: v[:rows] for k, v in more.items()}
        own = {k: v[:rows] for k, v in given(o, inputs).items()}
        loss = linear_loss(hidden[:rows], weight, labels, o, inputs=own, **extra)
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("name", POLICIES)
def test_masked_and_impossible_logits(name):
    """-inf entries of the vocabulary, and a label that is one of them: finite gradients, no NaN."""
    _, _, target, inputs = problem()
    o = policy(name, entropy=0.01)
    rows = given(o, inputs)
    z = torch.randn(B, T, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    allowed = torch.rand(B, T, V, generator=torch.Generator().manual_seed(4)) < 0.6
    allowed.scatter_(-1, target.clamp(min=0)[..., None], True)
    z = torch.where(allowed, z, -math.inf)
    leaf = z.clone().requires_grad_()
    loss = row_loss(leaf, target, o, inputs=rows)
    (g,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite() and g.isfinite().all() and not g[~allowed].any()
    dense = torch.where(allowed, z, -1e4).requires_grad_()
    want = row_loss(dense, target, o, inputs=rows)
    close(loss, want)
    close(g, torch.autograd.grad(want, dense)[0])
    z[0, 0, target[0, 0]] = -math.inf
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(row_loss(leaf, target, o, inputs=rows), leaf)
    assert g.isfinite().all()


@pytest.mark.parametrize("name", POLICIES)
def test_far_off_policy_is_finite(name):
    """Ratios of e^200 and e^-200 in fp32: held at e^20, no NaN from an advantage of 0."""
    hidden, weight, target, inputs = problem(dtype=torch.float32)
    for shift in (200.0, -200.0):
        for a in (torch.zeros(B), torch.ones(B), -torch.ones(B)):
            o = policy(name, beta=0.1)
            rows = {**given(o, inputs), "advantages": a}
            for k in {"old_logp", "ref_logp"} & rows.keys():
                rows[k] = rows[k] + shift
            loss = linear_loss(hidden, weight, target, o, inputs=rows)
            assert loss.isfinite()
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_errors_name_the_argument():
    hidden, weight, target, inputs = problem()
    rows = {"advantages": inputs["advantages"]}
    grpo = objectives.grpo()

    def call(o=grpo, labels=target, h=hidden, **options):
        return linear_loss(h, weight, labels, o, **options)

    for run, error, text in (
        (lambda: call(), ValueError, "'grpo' needs inputs={'advantages': ...}"),
        (lambda: call(objectives.grpo(beta=0.1), inputs=rows), ValueError, "needs inputs={'ref_logp': ...}"),
        (lambda: call(inputs={"advantage": rows["advantages"]}), ValueError,
         "'grpo' reads advantages, old_logp, correction; got 'advantage'; did you mean 'advantages'"),
        (lambda: call(inputs={**rows, "ref_logp": inputs["ref_logp"]}), ValueError, "got 'ref_logp'"),
        (lambda: call(inputs=[1]), TypeError, "inputs must be a mapping of names to tensors; got list"),
        (lambda: call(inputs={"advantages": 1.0}), TypeError, r"inputs\['advantages'\] must be a tensor; got float"),
        (lambda: call(inputs={"advantages": torch.arange(B)}), TypeError, r"inputs\['advantages'\] must be float32"),
        (lambda: call(inputs={"advantages": torch.ones(B + 1)}), ValueError,
         r"inputs\['advantages'\] must have target's shape \(4, 5\); got \(5,\)"),
        (lambda: call(h=hidden.reshape(-1, H), labels=target.reshape(-1), inputs={"advantages": torch.ones(B * T)}),
         ValueError, "'grpo' couples the tokens of a sequence: give sequences="),
        (lambda: call(objectives.gspo(), inputs=rows, plan="tokens"), ValueError, "got objective 'gspo'"),
        (lambda: row_loss(hidden @ weight.T, target, objectives.gspo(), inputs=rows, reduction="none"), ValueError,
         "reduction must be 'mean' or 'sum' where rows interact, as those of 'gspo' do"),
        (lambda: objectives.get("grpo", level="x"), ValueError, "grpo: level must be 'token' or 'sequence'; got 'x'"),
        (lambda: objectives.get("grpo", kl="k4"), ValueError, "grpo: kl must be one of k1, k2, k3; got 'k4'"),
        (lambda: objectives.get("grpo", aggregate="mean"), ValueError, "aggregate must be one of token_mean, "),
        (lambda: objectives.get("grpo", low=-0.1), ValueError, r"grpo: low must lie in \[0.0, 1.0\]; got -0.1"),
        (lambda: objectives.get("dapo", delta=0.9), ValueError, r"dapo: delta must lie in \(1.0, inf\]; got 0.9"),
        (lambda: objectives.get("ppo_clip", dual=1.0), ValueError, "ppo_clip: dual must lie in"),
        (lambda: objectives.get("cispo", cap=0.5, floor=0.7), ValueError, "cispo: cap must lie in"),
        (lambda: objectives.get("sapo", tau_neg=0), ValueError, "sapo: tau_neg must lie in"),
        (lambda: objectives.get("grpo", beta=-1.0), ValueError, "grpo: beta must lie in"),
        (lambda: objectives.get("grpo", epsilon=0.2), ValueError, "epsilon"),
        (lambda: objectives.get("dr_grpo"), ValueError, "length"),
        (lambda: objectives.get("dr_grpo", length=0), ValueError, "dr_grpo: length must lie in"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            run()


def test_inputs_of_an_objective_of_ones_own():
    hidden, weight, target, _ = problem()
    margin = torch.rand(B, T, dtype=torch.float64)
    mine = Objective(
        "mine", lambda s: -s.logp * (s.margin if s.more is None else s.margin + s.more), ("logp",), inputs=("margin",),
        optional=("more",),
    )  # fmt: skip
    got = linear_loss(hidden, weight, target, mine, inputs={"margin": margin, "more": None})
    close(got, linear_loss(hidden, weight, target, objectives.weighted_nll(), token_weight=margin))
    got = linear_loss(hidden, weight, target, mine, inputs={"margin": margin, "more": margin})
    close(got, 2 * linear_loss(hidden, weight, target, objectives.weighted_nll(), token_weight=margin))
    centred = Objective("centred", lambda s: (s.logp - s.logp.sum() / s.valid.sum()) ** 2, ("logp",), joint=True)
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0][target != -100]
    want = logp.var(unbiased=False)
    for reduction in ("mean", "none"):
        got = linear_loss(hidden, weight, target, centred, reduction=reduction).sum()
        got = got if reduction == "mean" else got / sum(LENGTHS)
        close(got, want)
        both = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (got, want))
        for a, b in zip(*both, strict=True):
            close(a, b)
    # weights of the losses, not of the gradients: they multiply before rows are mixed
    w = torch.rand(B, T, dtype=torch.float64)
    got = row_loss(hidden @ weight.T, target, centred, token_weight=w, reduction="sum")
    want = ((logp - logp.mean()) ** 2 * w[target != -100]).sum()
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want)), strict=True):
        close(a, b)
    for bad, text in (
        ({"inputs": ("logp",)}, "inputs must be new names"), ({"inputs": ("a",), "optional": ("a",)}, "each once"),
        ({"inputs": ("x y",)}, "got 'x y'"), ({"aggregate": "sum"}, "aggregate must be one of"),
        ({"joint": True, "couple": lambda s: s.logp}, "joint and couple exclude each other"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Objective("bad", lambda s: s.logp, ("logp",), **bad)
    with pytest.raises(TypeError, match="inputs must be a tuple of names"):
        Objective("bad", lambda s: s.logp, ("logp",), inputs="margin")


def test_copies_and_inspection():
    o = pickle.loads(pickle.dumps(objectives.grpo(0.1, 0.3, beta=0.2)))
    assert (o.name, o.params["high"], o.inputs) == ("grpo", 0.3, ("advantages", "ref_logp"))
    z = torch.randn(3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(3)
    a = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    q = implied_target(z, y, objectives.dapo(), inputs={"advantages": a})
    p = z.softmax(-1)
    close(q, p - a[:, None] * (p - torch.nn.functional.one_hot(y, V)))


def test_numbers_and_pooling():
    ids = torch.tensor([5, -2, 5, 9, -2, 5])
    number = aggregate.numbers(ids)
    assert number.max() == 2 and all((number == number[i]).equal(ids == ids[i]) for i in range(6))
    x = torch.arange(6.0, requires_grad=True)
    valid = torch.tensor([True, True, False, False, True, True])
    mean = aggregate.over_sequences(x, valid, ids, mean=True)
    assert mean.tolist() == [2.5, 2.5, 2.5, 0.0, 2.5, 2.5]
    (g,) = torch.autograd.grad(mean.sum(), x)
    assert g.tolist() == [1.5, 1.0, 0.0, 0.0, 1.0, 1.5]
