"""The toy: its world is what its docstring says, and a short run reports what happened."""

import json

import pytest
import torch

from burnish.cli import main
from burnish.methods.axpo import demo
from burnish.methods.axpo.demo_options import AXPODemoOptions
from burnish.methods.axpo.plan import Rules


def test_the_world():
    world, g = demo.World(3), torch.Generator().manual_seed(0)
    asked = torch.arange(demo.QUESTIONS).repeat(4000)
    right = world.draw(asked, g).view(4000, -1)
    usual = (right == world.usual).float().mean(0)
    assert (usual - world.share).abs().max() < 0.03
    assert (world.share == 0.9).sum() == (world.share == 0.15).sum() == 12
    assert right.min() == 0 and right.max() == 5


class Fixed(torch.nn.Module):
    """Always the same token after a position's last, by table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids):
        logits = torch.full((*input_ids.shape, demo.PAD + 1), -30.0)
        for at in range(input_ids.shape[1]):
            for row, token in enumerate(input_ids[:, at].tolist()):
                logits[row, at, self.table(at, token, row)] = 30.0
        return type("Out", (), {"logits": logits})


def policy(world, tool, argument, read=True):
    def table(at, token, row):
        if at == 0:
            return demo.THINK
        if at == 1:
            return demo.TOOL if tool else demo.NO_TOOL
        if at == 2:
            return demo.ARGUMENT + argument if tool else demo.ANSWER + int(world.usual[0])
        return demo.ANSWER + (token - demo.SHOWN if read and token >= demo.SHOWN else 0)

    return Fixed(table)


def test_episodes():
    world, g = demo.World(0), torch.Generator().manual_seed(0)
    ask = torch.zeros(4, 1, dtype=torch.long)
    right = torch.tensor([0, 1, 2, int(world.usual[0])])
    good = int(world.argument[0])
    works = demo.roll(policy(world, True, good), world, ask, right, g)
    assert works.rewards.tolist() == [1, 1, 1, 1] and works.called.all()
    assert works.own[0].tolist() == [0, 1, 1, 1, 0, 1]  # what the tool shows is not the policy's
    assert works.tokens[:, 4].tolist() == (demo.SHOWN + right).tolist()
    fails = demo.roll(policy(world, True, (good + 1) % 6), world, ask, right, g)
    assert not fails.rewards.any() and fails.own[0].tolist() == [0, 1, 1, 1, 0, 0]
    guess = demo.roll(policy(world, False, 0), world, ask, right, g)
    assert guess.rewards.tolist() == (right == world.usual[0]).float().tolist() and not guess.called.any()
    assert guess.own[0].tolist() == [0, 1, 1, 1, 0, 0]
    begun = torch.tensor([[0, demo.THINK + 2, demo.TOOL]] * 4)
    again = demo.roll(policy(world, False, good), world, begun, right, g)
    assert torch.equal(again.tokens[:, :3], begun) and again.called.all()


def test_a_step():
    """AXPO's rows: resampled ones begin with a source's prefix, whose own row trains the prefix alone."""
    world, model = demo.World(0), demo.make_model(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.0)  # uniform over 49 tokens: hardly anything is right
    g = torch.Generator().manual_seed(2)
    base = model.lm_head.weight.shape[0]
    assert base == demo.PAD + 1
    table = torch.tensor([demo.TOOL, demo.NO_TOOL])
    bias = torch.zeros(base)
    bias[table] = 3.0
    own = model.forward
    model.forward = lambda **k: type("Out", (), {"logits": own(**k).logits + bias})
    arm = demo.Arm("x", rules=Rules(budget=0.5))
    tokens, masks, advantages, log = demo.step_rows(model, world, arm, g)
    ordinary = demo.QUESTIONS * 8
    assert log["extra"] == len(tokens) - ordinary > 0 and log["extra"] % 4 == 0
    assert log["extra"] <= 0.5 * ordinary
    extra = masks[ordinary:]
    assert not extra[:, : demo.PREFIX].any() and extra[:, 3].all()
    assert (tokens[ordinary:, 2] == demo.TOOL).all()
    sources = [i for i in range(ordinary) if tokens[i, 2] == demo.TOOL and not masks[i, 3]]
    assert len(sources) == log["extra"] // 4
    assert (masks[sources][:, 1:3] == 1).all() and not masks[sources][:, 3:].any()
    assert {tuple(r) for r in tokens[ordinary:, :3].tolist()} <= {tuple(r) for r in tokens[sources, :3].tolist()}
    g.manual_seed(2)
    plain = demo.step_rows(model, world, demo.ARMS["grpo"], g)
    keep = torch.ones(ordinary, dtype=torch.bool)
    keep[sources] = False
    assert torch.equal(plain[2][keep], advantages[:ordinary][keep]) and torch.equal(plain[0], tokens[:ordinary])


def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "FIT_STEPS", 3)
    monkeypatch.setattr(demo, "DRAWS", 2)
    out = tmp_path / "demo"
    assert main(["demo", "axpo", "--seeds", "2", "--steps", "3", "--output", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["seeds"]) == 2 and set(results["seeds"][0]["arms"]) == set(demo.ARMS)
    assert (out / "curves.png").stat().st_size > 5000
    text = capsys.readouterr().out
    assert all(arm.name in text for arm in demo.ARMS.values()) and "±" in text
    assert demo.table(results) in text  # what is printed is what the file holds
    assert main(["demo", "axpo", "--seeds", "0", "--output", str(tmp_path / "x")]) == 2
    assert "seeds must be at least 1; got 0" in capsys.readouterr().err


@pytest.mark.parametrize(("values", "want"), [
    ([0.5], "0.500"), ([1.0, None], "1.000"), ([None], "-"), ([0.0, 1.0], "0.500 ± 6.353"),
    ([0.1, 0.2, 0.3, 0.4, 0.5], "0.300 ± 0.196"), ([0.1, 0.3, None], "0.200 ± 1.271 (2)"),
])  # fmt: skip
def test_intervals(values, want):
    assert demo.shown(values) == want


def test_options():
    assert AXPODemoOptions().check() == AXPODemoOptions()
