"""A1 to A11 of the specification, on the functions that trainer and demo share."""

import math

import pytest
import torch

from burnish import objectives, row_loss
from burnish.methods.axpo.plan import (
    Rules,
    check_rewards,
    credit,
    mean_probability,
    normalise,
    prefix_advantages,
    prefix_rewards,
    select,
    stream_masks,
    token_weights,
    triggered,
)

EXACT = {"eps": 0.0}


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def group(correct: int, size: int = 8):
    return t(*[1.0] * correct, *[0.0] * (size - correct))


def loss_of(logp, rows, norm="row", rollouts=None):
    """sum of -A exp(logp - logp') over rows of (advantage, mask), weighted as ``norm`` says."""
    mask = torch.stack([m for _, m in rows]).double()
    advantages = t(*[float(a) for a, _ in rows])
    ratio = (logp - logp.detach()).exp()
    return (token_weights(mask, norm, rollouts or len(rows)) * -ratio * advantages[:, None]).sum()


def test_a1_every_token_belongs_to_one_stream():
    """dL/dlogp is zero at resampled rows' prefixes and behind the source's, and nowhere else among own tokens."""
    own = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1])
    head, tail = stream_masks(own, 3)
    assert (head + tail).tolist() == own.tolist() and (head * tail).sum() == 0
    rewards = group(0).view(1, 8)
    given = credit(rewards, [(0, 2)], t(1, 0, 0, 1).view(1, 4), Rules())
    rows = [(given.prefix[0], head), *[(a, tail) for a in given.resampled[0]]]
    logp = torch.zeros(5, 8, dtype=torch.float64, requires_grad=True)
    for norm in ("row", "token_mean"):
        (grad,) = torch.autograd.grad(loss_of(logp, rows, norm), logp)
        nonzero = grad != 0
        assert nonzero[0].tolist() == head.bool().tolist()
        assert all(nonzero[k].tolist() == tail.bool().tolist() for k in range(1, 5))


@pytest.mark.parametrize(("s", "want"), [
    (1, [1.5, -0.5, -0.5, -0.5]), (2, [0.866025, 0.866025, -0.866025, -0.866025]), (3, [0.5, 0.5, 0.5, -1.5]),
    (0, [0, 0, 0, 0]), (4, [0, 0, 0, 0]),
])  # fmt: skip
def test_a2_resampled_advantages(s, want):
    assert normalise(group(s, 4), **EXACT).tolist() == pytest.approx(want, abs=5e-7)
    given = credit(group(0).view(1, 8), [(0, 0)], group(s, 4).view(1, 4), Rules())
    assert given.resampled[0].tolist() == pytest.approx(want, abs=3e-6)  # eps 1e-6 on the std


def source_advantage(m: int, recovered: int, **scale) -> float:
    """Of the first wrong rollout; with m = 8 - 1 right ones there is no other."""
    return prefix_advantages(group(m).view(1, 8), [(0, m)], t(recovered), **scale).item()


def test_a3_an_all_wrong_group():
    assert source_advantage(0, 1, **EXACT) == pytest.approx(2.474874, abs=5e-7)
    assert source_advantage(0, 1, std="population", **EXACT) == pytest.approx(2.645751, abs=5e-7)
    assert source_advantage(0, 0) == 0
    assert source_advantage(0, 1) == pytest.approx(2.474867, abs=5e-7)  # with eps 1e-6
    assert source_advantage(0, 1, eps=1e-4) == pytest.approx(2.474174, abs=5e-7)  # with TRL's


@pytest.mark.parametrize(("m", "yes", "no"), [
    (1, 1.620185, -0.353553), (2, 1.207615, -0.540062), (3, 0.935414, -0.724569), (4, 0.724569, -0.935414),
    (5, 0.540062, -1.207615), (6, 0.353553, -1.620185), (7, 0.0, -2.474874),
])  # fmt: skip
def test_a4_a_mixed_group(m, yes, no):
    assert source_advantage(m, 1, **EXACT) == pytest.approx(yes, abs=5e-7)
    assert source_advantage(m, 0, **EXACT) == pytest.approx(no, abs=5e-7)


def test_a4_each_source_replaces_its_own_reward_only():
    rewards = group(2).view(1, 8)
    both = prefix_advantages(rewards, [(0, 3), (0, 5)], t(1, 0), **EXACT)
    assert both.tolist() == pytest.approx([1.207615, -0.540062], abs=5e-7)
    assert rewards.tolist() == group(2).view(1, 8).tolist()


def test_a5_selection_alone_takes_the_penalty_off_the_call():
    """Mixed group, not recovered: GRPO pushes the source's later tokens down, AXPO does not touch them."""
    head, tail = stream_masks(torch.ones(6, dtype=torch.long), 2)
    given = credit(group(3).view(1, 8), [(0, 4)], group(0, 4).view(1, 4), Rules())
    assert given.prefix.item() < 0 and not given.resampled.any()
    logp = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(loss_of(logp, [(given.prefix[0], head)]), logp)
    (theirs,) = torch.autograd.grad(loss_of(logp, [(normalise(group(3))[4], head + tail)]), logp)
    assert (theirs[0] != 0).all() and (ours[0, 2:] == 0).all() and (ours[0, :2] != 0).all()


def test_a7_trigger():
    member = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    correct = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]).bool()
    assert triggered(member, correct).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(("b", "n", "r", "k", "want"), [
    (1, 8, 0.25, 4, 0), (2, 8, 0.25, 4, 1), (24, 8, 0.25, 4, 12), (2, 8, 0.0, 4, 0), (10, 10, 0.29, 29, 1),
    (3, 8, 0.5, 2, 6), (100, 1, 0.07, 7, 1),
])  # fmt: skip
def test_a8_budget(b, n, r, k, want):
    rules = Rules(budget=r, resamples=k)
    assert rules.prefixes(b * n) == want
    assert want * k <= r * b * n + 1e-9


def test_a8_breadth_first():
    g = torch.Generator().manual_seed(0)
    confidence = torch.rand(6, 8, generator=g)
    candidates = torch.rand(6, 8, generator=g) < 0.5
    candidates[2] = False
    have = candidates.sum(1)
    for count in range(int(have.sum()) + 2):
        chosen = select(confidence, candidates, count)
        assert len(chosen) == len(set(chosen)) == min(count, int(have.sum()))
        assert all(candidates[b, i] for b, i in chosen)
        per = torch.bincount(torch.tensor([b for b, _ in chosen], dtype=torch.long), minlength=6)
        # no question has two more than another that still had one to give
        for b in range(6):
            assert all(per[c] >= min(per[b] - 1, have[c]) for c in range(6))
            mine = [i for q, i in chosen if q == b]
            ranked = sorted((confidence[b, i].item(), i) for i in range(8) if candidates[b, i])
            assert mine == [i for _, i in ranked[: len(mine)]]
    assert select(confidence, candidates, -1) == []
    ties = select(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 3)
    assert ties == [(0, 0), (1, 0), (0, 1)]


def test_a9_ranking_reads_the_call_alone_and_means_probabilities():
    think, tool = [0.9] * 5, [0.1] * 2
    other_think, other_tool = [0.2] * 5, [0.8] * 2
    logs = lambda p: [math.log(x) for x in p]  # noqa: E731
    assert mean_probability(logs(tool)) < mean_probability(logs(other_tool))
    assert mean_probability(logs(think + tool)) > mean_probability(logs(other_think + other_tool))
    assert mean_probability(logs([1.0, 0.01])) == pytest.approx(0.505)
    assert mean_probability(logs([1.0, 0.01])) > mean_probability(logs([0.3, 0.3])) == pytest.approx(0.3)
    assert mean_probability([]) == 1


def test_a10_proposition_1():
    q, p, n = 0.3, 0.1, 4
    assert 1 - (1 - p) ** n == pytest.approx(0.3439) and 1 - (1 - q * p) ** n == pytest.approx(0.1147, abs=5e-5)


@pytest.mark.parametrize(("advantage", "ratio", "plain", "dual"), [
    (1, 1.41, 0, 0), (1, 1.39, 1, 1), (-1, 0.5, 0, 0), (-1, 1.5, -1, -1), (-1, 3.5, -1, 0),
])  # fmt: skip
def test_a10_clip(advantage, ratio, plain, dual):
    """d surrogate / d ratio of the library's objectives at 0.2 / 0.4; the dual clip changes ratios above 3 alone."""
    clip = {"low": 0.2, "high": 0.4}
    for objective, want in ((objectives.dapo(**clip), plain), (objectives.ppo_clip(**clip), dual)):
        z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)  # p = 1/2, d logp / d z_0 = 1/2
        inputs = {"advantages": t(advantage), "old_logp": t(math.log(0.5) - math.log(ratio))}
        loss = row_loss(z, torch.zeros(1, dtype=torch.long), objective, inputs=inputs)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert -grad[0, 0].item() / (0.5 * ratio) == pytest.approx(want, abs=1e-9)


def test_token_weights_are_both_norms():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    loss = torch.arange(12.0).view(3, 4)
    assert (token_weights(mask, "token_mean", 2) * loss).sum() == pytest.approx((0 + 1 + 4 + 5 + 6 + 7) / 6)
    assert (token_weights(mask, "row", 2) * loss).sum() == pytest.approx(((0 + 1) / 2 + (4 + 5 + 6 + 7) / 4) / 2)
    assert token_weights(torch.zeros(2, 3), "token_mean", 2).sum() == 0
    with pytest.raises(ValueError, match="axpo_norm must be one of token_mean, row; got 'rows'"):
        token_weights(mask, "rows", 2)


def test_ablations():
    rewards = torch.stack([group(2), group(0)])
    chosen, resampled = [(0, 3), (1, 1), (0, 6)], torch.stack([group(1, 4), group(0, 4), group(0, 4)])
    full = credit(rewards, chosen, resampled, Rules())
    assert full.prefix.tolist() == pytest.approx([1.207615, 0, -0.540062], abs=1e-5) and full.group == {}
    assert prefix_rewards(resampled).tolist() == [1, 0, 0]
    for rules in (Rules(prefix_credit=False), Rules(fix_prefix=False), Rules(subgroup="no_tool")):
        other = credit(rewards, chosen, resampled, rules)
        assert other.prefix is None and other.group == {} and torch.equal(other.resampled, full.resampled)
    merged = credit(rewards, chosen, resampled, Rules(merge_groups=True, eps=0.0))
    pool = rewards[0].clone()
    pool[3] = 1  # recovered; 6 was not
    pool = normalise(torch.cat([pool, resampled[0], resampled[2]]), **EXACT)
    torch.testing.assert_close(merged.group[0], pool[:8])
    torch.testing.assert_close(merged.resampled[[0, 2]].flatten(), pool[8:])
    assert merged.prefix.tolist() == pytest.approx([pool[3].item(), 0, pool[6].item()])
    assert not merged.group[1].any() and set(merged.group) == {0, 1}
    uncredited = credit(rewards, chosen, resampled, Rules(merge_groups=True, prefix_credit=False, eps=0.0))
    assert uncredited.prefix is None
    torch.testing.assert_close(
        uncredited.group[0], normalise(torch.cat([rewards[0], resampled[0], resampled[2]]), **EXACT)[:8]
    )


def test_nothing_selected():
    given = credit(torch.zeros(2, 8), [], torch.zeros(0, 4), Rules())
    assert given.prefix is None and given.resampled.shape == (0, 4) and given.group == {}


@pytest.mark.parametrize(("call", "text"), [
    (lambda: check_rewards(torch.zeros(3, 0)), r"no group empty; got shape \(3, 0\)"),
    (lambda: check_rewards(t(1, 0)), r"got shape \(2,\)"),
    (lambda: check_rewards(t(1, math.nan).view(1, 2)), "question 0, rollout 1 is not a number: nan"),
    (lambda: check_rewards(t(1, math.inf).view(1, 2)), "not a number: inf"),
    (lambda: check_rewards(t(1, 0.5).view(1, 2)), "are 0 or 1, right or wrong; question 0, rollout 1 has 0.5"),
    (lambda: normalise(t(1)), r"needs two rewards for its std; got shape \(1,\)"),
    (lambda: normalise(t(1, 0), std="bessel"), "std must be one of sample, population; got 'bessel'"),
    (lambda: credit(torch.zeros(1, 4), [(0, 1)], torch.zeros(1, 3), Rules()), r"resampled must be \(1, 4\)"),
    (lambda: credit(torch.zeros(1, 4), [(0, 1)], t(0, 0, 2, 0).view(1, 4), Rules()), "has 2"),
    (lambda: select(torch.zeros(1, 2), torch.ones(1, 3).bool(), 1), r"confidence \(1, 2\) and candidates \(1, 3\)"),
    (lambda: select(t(math.nan, 0).view(1, 2), torch.ones(1, 2).bool(), 1), "confidence has NaN at a candidate"),
    (lambda: Rules(budget=-1), "resample_budget must be a number >= 0; got -1"),
    (lambda: Rules(budget=math.nan), "resample_budget must be a number >= 0; got nan"),
    (lambda: Rules(resamples=1), "num_resamples must be a whole number >= 2; got 1"),
    (lambda: Rules(subgroup="tools"), "resample_subgroup must be one of tool, no_tool; got 'tools'"),
    (lambda: Rules(std="n"), "std must be one of"),
    (lambda: Rules(eps=-1), "eps must be >= 0"),
])  # fmt: skip
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
