"""Returns and weights: the published numbers (D2 to D9), limits of beta, and what is refused."""

import math

import numpy as np
import pytest
import torch
from drift_cases import episode, episodes, records

from burnish import linear_loss, objectives
from burnish.methods.drift import Episode, WeightOptions, episode_return, read_episodes, softmax_weights, weigh
from burnish.methods.drift.returns import concentration

RNG = np.random.default_rng(0)


def one(returns, beta=0.1):
    return softmax_weights(returns, ["x"] * len(returns), beta)


@pytest.mark.parametrize("beta", [0.03, 0.1, 1.0, 10.0])
def test_d2_identities(beta):
    r = RNG.normal(size=16)
    w = one(r, beta)
    raised = np.exp((r - r.max()) / beta)
    assert w == pytest.approx(16 * raised / raised.sum(), abs=1e-12)
    assert w.sum() == pytest.approx(16, abs=1e-12)
    assert one(r + 3.7, beta) == pytest.approx(w, abs=1e-10)
    order = RNG.permutation(16)
    assert one(r[order], beta) == pytest.approx(w[order], abs=1e-12)
    assert one(5 * r, 5 * beta) == pytest.approx(w, abs=1e-10)


def test_d2_groups_need_not_be_neighbours_nor_alike():
    groups = ["a", 3, "a", "b", 3, "a"]
    r = RNG.normal(size=6)
    w = softmax_weights(r, groups)
    for g, size in (("a", 3), (3, 2), ("b", 1)):
        mine = [i for i, x in enumerate(groups) if x == g]
        assert w[mine] == pytest.approx(one(r[mine]), abs=1e-14) and w[mine].sum() == pytest.approx(size)
    assert softmax_weights(r, groups, norm="dataset") == pytest.approx(one(r), abs=1e-14)


@pytest.mark.parametrize("s, high, low", [
    (1, 15.989111, 7.259e-4), (4, 3.999455, 1.816e-4), (8, 1.999909, 9.080e-5), (15, 1.066663, 4.843e-5),
])  # fmt: skip
def test_d3_successes_of_sixteen(s, high, low):
    w = one([1.0] * s + [0.0] * (16 - s))
    assert w[0] == pytest.approx(high, abs=1e-6) and w[-1] == pytest.approx(low, rel=2e-4)


def test_d4_two_betas():
    r = [1.0, 0.9, -0.1, -0.4]
    assert one(r) == pytest.approx([2.92419683, 1.0757519, 4.884e-5, 2.43e-6], abs=5e-9)
    assert one(r, 1.0) == pytest.approx([1.61010796, 1.45688593, 0.53595838, 0.39704773], abs=1e-8)


def test_d5_turn_of_success():
    r = [episode_return([0.0] * t + [1.0], [str(i) for i in range(t + 1)]) for t in range(5)]
    w = one(r)
    assert w == pytest.approx([3.093903, 1.138183, 0.462751, 0.205858, 0.099304], abs=1e-6)
    assert w[1:] / w[:-1] == pytest.approx([0.3679, 0.4066, 0.4449, 0.4824], abs=5e-5)


def test_d6_equation_12():
    assert episode_return([0.0] * 5, ["7"] * 5) == pytest.approx(-0.4, abs=1e-15)
    assert episode_return([0.0] * 5, list("12345")) == 0.0
    assert episode_return([0.0, 0.0, 1.0], ["1", "1", "2"]) == pytest.approx(0.81 - 0.5 / 3, abs=1e-15)
    # a turn without an answer is a turn, and no answer
    assert episode_return([0.0] * 4, ["1", None, None, "1"], format_penalty=-0.1) == pytest.approx(-0.375 - 0.2)
    assert episode_return([1.0, 0.0], ["1", "2"]) == 0.0  # only the last turn is asked
    assert episode_return([0.5], ["1"]) == 0.0 and episode_return([1.5], ["1"]) == 1.0


def test_the_codes_return():
    code = {"return_form": "code"}
    # L counts the answers found, an empty one too; E compares without white space and case
    assert episode_return([0.0] * 4, ["A b", "ab", "", None], **code) == pytest.approx(-0.5 * (1 - 1 / 3))
    assert episode_return([0.0] * 4, ["A b", "ab", "", None]) == pytest.approx(-0.5 * (1 - 3 / 4))
    assert episode_return([0.2, 0.0, 1.0], ["1", "2", "3"], **code) == pytest.approx(0.2 + 0.81)
    assert episode_return([0.0, 0.0], [None, None], format_penalty=-0.1, **code) == pytest.approx(-0.2)
    for turns in range(1, 6):  # stopping at success, both forms discount alike
        r, a = [0.0] * (turns - 1) + [1.0], [str(i) for i in range(turns)]
        assert episode_return(r, a, **code) == pytest.approx(episode_return(r, a), abs=1e-15)


def test_d7_large_beta_is_reinforce_with_a_mean_baseline():
    r = np.array([1.0, 0.9, 0.0, -0.4])
    assert 1e4 * (one(r, 1e4) - 1) == pytest.approx([0.625, 0.525, -0.375, -0.775], abs=3e-5)
    assert one(r, math.inf).tolist() == [1.0] * 4


@pytest.mark.parametrize("beta", [0.0, 5e-324, 1e-300, 1e-4])
def test_d8_small_beta_is_the_best_alone(beta):
    with np.errstate(all="raise", under="ignore"):
        assert one([1.0, 0.9, 1.0, -1e300], beta).tolist() == [2.0, 0.0, 2.0, 0.0]
        assert one([-5.0, -5.0], beta).tolist() == [1.0, 1.0]


def test_d9_the_weighted_optimum_is_the_tilted_policy():
    """All trajectories of an enumerable policy, each as often as it is likely: the weights are exact, and the minimum
    of the weighted likelihood through burnish.linear_loss is p_ref exp(R / beta) / Z."""
    beta, counts = 0.5, np.array([10, 20, 5, 40, 25])
    r = np.array([1.0, 0.2, 0.9, -0.3, 0.0])
    reference = counts / counts.sum()
    target = torch.from_numpy(np.repeat(np.arange(5), counts))
    weight = torch.from_numpy(softmax_weights(np.repeat(r, counts), ["x"] * 100, beta))
    logits = torch.zeros(5, 1, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(100, 1, dtype=torch.float64)
    solver = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        solver.zero_grad()
        loss = linear_loss(hidden, logits, target, objectives.weighted_nll(), token_weight=weight)
        loss.backward()
        return loss

    solver.step(closure)
    z = (reference * np.exp(r / beta)).sum()
    tilted = reference * np.exp(r / beta) / z
    assert logits.detach().softmax(0)[:, 0].numpy() == pytest.approx(tilted, abs=4e-6)
    p = RNG.dirichlet(np.ones(5))  # Theorem 2, of any policy
    objective = (p * r).sum() - beta * (p * np.log(p / reference)).sum()
    assert objective == pytest.approx(beta * math.log(z) - beta * (p * np.log(p / tilted)).sum(), abs=1e-15)


def test_concentration():
    entropy, size = concentration(np.array([1.0, 1.0, 4.0, 0.0]), ["a", "a", "b", "b"])
    assert entropy == pytest.approx(math.log(2) / 2) and size == pytest.approx(36 / (4 * 18))
    assert concentration(np.ones(4), "aabb") == (pytest.approx(math.log(2)), 1.0)
    assert concentration(np.zeros(2), "ab") == (0.0, 0.0)


def test_weighing_episodes():
    found = weigh(episodes())
    assert found.weights.sum() == pytest.approx(9) and found.kept.all()
    # an all-wrong prompt keeps its whole weight, most of it on its most varied trajectories
    wrong = found.weights[3:6]
    assert wrong.sum() == pytest.approx(3) and wrong[1] < wrong[0] == wrong[2]
    s = found.statistics
    assert (s["prompts"], s["episodes"]) == (3, 9)
    assert s["solved"] == pytest.approx(5 / 9) and s["all_failed"] == s["all_solved"] == pytest.approx(1 / 3)
    dropped = weigh(episodes(), WeightOptions(drop_all_failed=True))
    assert dropped.kept.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert dropped.weights.tolist() == found.weights.tolist()
    rejection = weigh(episodes(), WeightOptions(weighting="rejection"))
    assert rejection.weights[rejection.kept].tolist() == [1.0] * 5
    assert all(e.solved for e, k in zip(episodes(), rejection.kept, strict=True) if k)
    assert weigh(episodes(), WeightOptions(weighting="uniform")).weights.tolist() == [1.0] * 9


def test_the_published_programs_files_are_read():
    record = {
        "prompt_id": "p", "messages": records()[1]["messages"], "turn_rewards": {"t1": 0.0, "t2": 1.0},
        "answer_norms": ["a", "a"], "format_penalty": -0.1,
    }  # fmt: skip
    (e,) = read_episodes([record])
    assert (e.rewards, e.answers, e.trajectory) == ([0.0, 1.0], ["a", "a"], 0)
    found = weigh([e], WeightOptions(return_form="code", format_penalty=-5.0))
    assert found.returns.tolist() == pytest.approx([0.9 - 0.25 - 0.1])  # its own penalty, in the place of ours


GOOD = records()[0]
BAD = {
    "missing column 'prompt_id'": {"prompt_id": None},
    "missing column 'messages'": {"messages": None},
    "missing column 'rewards'": {"rewards": None},
    "missing column 'answers'": {"answers": None},
    r"rewards\[0\] must be a finite number; got nan": {"rewards": [math.nan]},
    r"rewards\[0\] must be a finite number; got '1'": {"rewards": ["1"]},
    r"rewards\[0\] must be a finite number; got True": {"rewards": [True]},
    r"rewards\[0\] must be a finite number; got None": {"rewards": [None]},
    "rewards is empty": {"rewards": [], "answers": []},
    "2 answers for 1 rewards": {"answers": ["1", "2"]},
    "2 rewards, but 1 assistant messages": {"rewards": [0, 1], "answers": ["1", "2"]},
    "answers must be a list of texts": {"answers": [4]},
    r"messages\[0\] must have a role and a content": {"messages": [{"role": "user"}]},
    "must have the keys t1, t2": {"rewards": None, "turn_rewards": {"t2": 1}, "answer_norms": []},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_episodes_are_named(message, tmp_path):
    with pytest.raises(ValueError, match=f"episode 1: .*{message}"):
        read_episodes([GOOD, {**GOOD, **BAD[message]}])


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "e.jsonl"
    with pytest.raises(ValueError, match="no such file"):
        read_episodes(file)
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match="there are none"):
        read_episodes(file)
    for line, message in ((b"{", "not a line of JSON"), (b"\xff", "not a line of JSON"), (b"[1]", "a JSON object")):
        file.write_bytes(episodes()[0].line() + line + b"\n")
        with pytest.raises(ValueError, match=f"e.jsonl:2: .*{message}"):
            read_episodes(file)


@pytest.mark.parametrize("name, value", [
    ("drift_beta", -0.1), ("drift_beta", math.nan), ("drift_beta", "0.1"), ("gamma", 1.1), ("gamma", True),
    ("repetition_penalty", -1.0), ("repetition_penalty", math.inf), ("format_penalty", 0.1), ("weight_norm", "batch"),
    ("supervise", "first"), ("weighting", "ppo"), ("return_form", "eq12"), ("drop_all_failed", 1),
])  # fmt: skip
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        weigh(episodes(), WeightOptions(**{name: value}))


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="finite; got nan at 1"):
        one([0.0, math.nan])
    with pytest.raises(ValueError, match="one length"):
        softmax_weights([0.0], ["a", "b"])
    with pytest.raises(ValueError, match="beta"):
        one([0.0], math.nan)
    with pytest.raises(ValueError, match="at least one"):
        episode_return([], [])
    with pytest.raises(ValueError, match="empty group"):
        weigh([])
    failed = [e for e in episodes() if not e.solved]
    for options in ({"weighting": "rejection"}, {"drop_all_failed": True}):
        with pytest.raises(ValueError, match="none of 4 episodes is solved"):
            weigh(failed, WeightOptions(**options))
    assert isinstance(episode("p", 0, ["1"], True), Episode) and softmax_weights([], []).shape == (0,)
