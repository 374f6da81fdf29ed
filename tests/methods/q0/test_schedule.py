"""The cycle's multipliers, batches over cycles, and the scheduler on optimizers of several kinds."""

import numpy as np
import pytest
import tiny_models as tiny
import torch

from burnish.methods.q0 import CycleScheduler, MuonAdamW, batch_sizes, lr_mult, wd_mult


def test_the_published_cycle_of_ten_steps():
    lr, wd = ([f(s, 10) for s in range(10)] for f in (lr_mult, wd_mult))
    assert lr == pytest.approx([1, 0.908, 0.816, 0.724, 0.632, 0.54, 0.448, 0.356, 0.264, 0.172], abs=1e-12)
    assert wd == pytest.approx([0.70, 0.73, 0.76, 0.79, 0.82, 0.85, 0.88, 0.91, 0.94, 0.97], abs=1e-12)
    assert np.corrcoef(lr, wd)[0, 1] == pytest.approx(-1, abs=1e-12)
    assert lr[0] * wd[0] == pytest.approx(0.70) and lr[-1] * wd[-1] == pytest.approx(0.16684)


def test_warm_up_and_warm_down():
    form = {"floor": 0.1, "warmup": 0.2, "warmdown": 0.3}
    lr = [lr_mult(s, 10, **form) for s in range(10)]
    assert lr[:3] == pytest.approx([0.1, 0.55, 1.0])  # f + (1 - f) s / W, then the peak
    assert lr[3:7] == pytest.approx([0.1 + 0.9 * (1 - i / 5) for i in range(1, 5)])
    assert lr[7:] == pytest.approx([0.1, 0.1 * 0.75, 0.1 * 0.25])  # f (1 + cos(pi p)) / 2 at p = 0, 1/3, 2/3
    wd = [wd_mult(s, 10, floor=0.7, lr_floor=0.1, warmup=0.2, warmdown=0.3) for s in range(10)]
    assert np.corrcoef(lr, wd)[0, 1] == pytest.approx(-1)
    assert wd[0] == pytest.approx(1) and 1 < wd[-1] < 0.7 + 0.3 / 0.9
    assert [wd_mult(s, 5, floor=1.0) for s in range(5)] == [1.0] * 5


def test_batches_are_whole_in_the_middle_half_of_the_cycles():
    found = batch_sizes(96, 8, 0.75)
    assert found[:24] == [6] * 24 and found[24:72] == [8] * 48 and found[72:] == [6] * 24
    assert batch_sizes(4, 8, 1.0) == [8] * 4 and batch_sizes(1, 8, 0.5) == [8]
    assert batch_sizes(4, 8, 0.75) == [6, 8, 8, 6] and batch_sizes(3, 1, 0.1) == [1, 1, 1]


def optimizers():
    model = tiny.llama()
    yield torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.25)
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(model.parameters())]
    yield torch.optim.AdamW(groups, lr=0.5)
    yield torch.optim.Rprop(model.parameters(), lr=0.5)  # has no decay
    yield MuonAdamW(model, lr=0.5, weight_decay=0.25)


@pytest.mark.parametrize("optimizer", optimizers(), ids=lambda o: type(o).__name__)
def test_every_group_follows_and_a_resumed_one_goes_on(optimizer):
    start = [dict(g) for g in optimizer.param_groups]
    scheduler = CycleScheduler(optimizer, [4, 3])
    want = [(s, n) for n in (4, 3) for s in range(n)] + [(2, 3)]  # behind the last step its values stay
    state = None
    for count, (s, n) in enumerate(want):
        for group, before in zip(optimizer.param_groups, start, strict=True):
            assert group["lr"] == pytest.approx(before["lr"] * lr_mult(s, n))
            if "weight_decay" in before:
                assert group["weight_decay"] == pytest.approx(before["weight_decay"] * wd_mult(s, n))
            else:
                assert "weight_decay" not in group
        assert scheduler.place() == (int(count >= 4), s)
        if count == 2:
            state = optimizer.state_dict(), scheduler.state_dict()
        optimizer.step()
        scheduler.step()
    optimizer.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * lr_mult(3, 4))
    if "weight_decay" in start[-1]:
        assert optimizer.param_groups[-1]["weight_decay"] == pytest.approx(start[-1]["weight_decay"] * wd_mult(3, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lr_mult(10, 10), "s must be a step of a cycle of 10, from 0; got 10"),
        (lambda: lr_mult(0, 10, floor=1.0), "lr_floor must lie in [0, 1); got 1.0"),
        (lambda: lr_mult(0, 10, warmup=0.6, warmdown=0.6), "at most 1 together; got 0.6 and 0.6"),
        (lambda: lr_mult(0, 10, warmup=-0.1), "warmup must be a share of the cycle, in [0, 1]; got -0.1"),
        (lambda: wd_mult(0, 10, floor=1.5), "wd_floor must lie in [0, 1]; got 1.5"),
        (lambda: batch_sizes(4, 8, 0.0), "batch_floor must lie in (0, 1]; got 0.0"),
        (lambda: CycleScheduler(torch.optim.SGD([torch.zeros(1)]), [3, 0]), "at least one step; got [3, 0]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
