"""The demonstration's model and data."""

import itertools

import pytest
import torch

from burnish.methods.qk_restore import DistanceProbe, toy
from burnish.paths import as_tensors, attention


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("repeats", [None, 6])
def test_recall_is_answerable_and_labelled_where_it_is_asked(repeats):
    ids, labels = toy.recall(50, 48, generator(), repeats)
    questions = repeats or toy.PAIRS
    assert ids.shape == labels.shape == (50, 48) and int((labels != -100).sum()) == 50 * questions
    often = 0
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        body = row[: 48 - 3 * questions]
        pairs = {k: v for k, v in itertools.pairwise(body) if toy.KEY <= k < toy.VALUE}
        assert len(pairs) == toy.PAIRS
        for at in range(len(body), 48, 3):
            assert row[at] == toy.ASK and pairs[row[at + 1]] == row[at + 2] == label[at + 2]
            assert label[at] == label[at + 1] == -100
        asked = row[len(body) + 1 :: 3]
        often += len(set(asked)) < toy.PAIRS
    # once each, unless drawn with repetition: then what is left over says nothing
    assert often > 10 if repeats else often == 0


@pytest.mark.parametrize("other", [False, True])
def test_chain_is_local(other):
    ids, labels = toy.chain(50, generator(), other=other)
    key, value = (toy.FILLER + 10, toy.FILLER) if other else (toy.KEY, toy.VALUE)
    assert int(ids.max()) < toy.VOCABULARY and int((labels != -100).sum()) == 50 * toy.CHAIN
    for at in range(3, ids.shape[1], 2):
        step = (ids[:, at - 2] - value + ids[:, at - 1] - key) % 10
        assert torch.equal(ids[:, at] - value, step) and torch.equal(labels[:, at], ids[:, at])
    touched = set(ids.flatten().tolist()) & set(range(toy.KEY, toy.FILLER))
    assert bool(touched) != other


@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_blocks_of_linear_attention_are_its_sum(length):
    g = generator()
    q, k, v = (torch.randn(2, 3, length, d, dtype=torch.float64, generator=g) for d in (4, 4, 5))
    rate = torch.tensor([2.0, 0.5, 0.01], dtype=torch.float64)
    far = torch.arange(length, dtype=torch.float64)
    far = far[:, None] - far
    decay = torch.exp(-rate[:, None, None] * far.clamp_min(0)).tril()
    torch.testing.assert_close(toy.decayed(q, k, v, rate), (q @ k.mT * decay) @ v, rtol=1e-12, atol=1e-12)


def test_the_model_is_causal_and_its_softmax_layers_see_no_positions():
    net = toy.model(0).eval()
    ids, labels = toy.recall(4, 200, generator())
    whole = net(ids).logits
    torch.testing.assert_close(net(ids[:, :150]).logits, whole[:, :150], rtol=1e-4, atol=1e-5)
    want = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(net(ids, labels).loss, want)
    assert 0.1e6 < sum(p.numel() for p in net.parameters()) < 0.3e6
    mixer = net.model.layers[1].self_attn
    x = torch.randn(2, 12, 64)
    shuffled = x[:, torch.cat([torch.randperm(11, generator=generator()), torch.tensor([11])])]
    torch.testing.assert_close(mixer(shuffled)[:, -1], mixer(x)[:, -1], rtol=1e-4, atol=1e-6)
    linear = net.model.layers[0].self_attn
    assert float((linear(shuffled)[:, -1] - linear(x)[:, -1]).abs().max()) > 1e-3


def test_the_layout_is_hypenets(tmp_path):
    """By name queries and keys are in four layers, by the config in two; files keep everything."""
    net = toy.model(0)
    named = [n for n in as_tensors(net) if n.endswith(("q_proj.weight", "k_proj.weight"))]
    chosen = attention(as_tensors(net), net.config)
    assert len(named) == 8 and sorted({s.layer for s in chosen.values()}) == [1, 3] and len(chosen) == 4
    net.save_pretrained(tmp_path / "net")
    again = toy.Hybrid.from_pretrained(tmp_path / "net")
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in net.state_dict().items())


def test_it_can_be_probed():
    net = toy.model(0)
    ids, labels = toy.recall(2, 60, generator())
    with DistanceProbe(net) as probe:
        loss = net(ids, labels).loss
        loss.backward()
    torch.testing.assert_close(loss, net(ids, labels).loss)
    profile = probe.profile()
    # the last position has no label, and so the largest distance no gradient
    assert set(profile.mean_distance) == {1, 3} and float(profile.absolute[1:-1].min()) > 0
