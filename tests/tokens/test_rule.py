"""Which layer does what: the published rule and the adaptive one, without a model."""

import pytest
import torch

from burnish.tokens import AdaptiveRule, LayerRule, Layout, Probe
from burnish.tokens.rule import normalised_entropy

# figure 4 of arXiv 2605.23892, VGGT, read off the plot
FIGURE = [.99, .995, .95, .93, .94, .94, .93, .94, .97, .905, .92, .73, .86, .655, .73, .74, .88, .92, .99, .98, .995,
          .915, 1.00, .995]  # fmt: skip


def kinds(rule, entropies):
    state, out = rule.begin(), []
    for layer, h in enumerate(entropies):
        probed = state.probe is not None
        out.append(state.decide(layer, torch.tensor(h, dtype=torch.float64) if probed else None))
    return out


def test_the_published_rule():
    assert kinds(LayerRule(), FIGURE) == ["local"] * 2 + ["stride"] * 7 + ["frames"] * 15
    assert kinds(LayerRule(0, 0), FIGURE[:3]) == ["frames"] * 3
    assert kinds(LayerRule(3, 3), FIGURE[:4]) == ["local"] * 3 + ["frames"]
    assert LayerRule().begin().probe is None


def test_the_adaptive_rule_goes_one_way():
    """0.95 and 0.90 on the paper's own entropies; layers 18 to 23 rise again and stay FRAMES."""
    assert kinds(AdaptiveRule(), FIGURE) == ["local"] * 3 + ["stride"] * 8 + ["frames"] * 13
    assert kinds(AdaptiveRule(0.97, 0.92), FIGURE) == ["local"] * 2 + ["stride"] * 7 + ["frames"] * 15
    # both thresholds crossed at once; and never
    assert kinds(AdaptiveRule(), [0.99, 0.5, 0.99]) == ["local", "frames", "frames"]
    assert kinds(AdaptiveRule(), [0.99] * 3) == ["local"] * 3
    # LOCAL is not come back to, nor is a threshold missed by equality
    assert kinds(AdaptiveRule(0.95, 0.9), [0.95, 0.94, 0.99, 0.9, 0.89, 1.0]) == [
        "local", "stride", "stride", "stride", "frames", "frames",
    ]  # fmt: skip


def test_probing_ends_with_frames():
    state = AdaptiveRule().begin()
    seen = []
    for h in (0.99, 0.93, 0.4, 0.99):
        seen.append(state.probe is not None)
        state.decide(0, torch.tensor(h) if state.probe is not None else None)
    assert seen == [True, True, True, False]


def test_where_a_probe_looks():
    layout = Layout(frames=7, height=28, width=37, special=5)
    middle = Probe().token_rows(layout)
    assert len(middle) == 32 and middle[0] == 3 * 1041 and middle[-1] == 4 * 1041 - 1
    assert middle.tolist() == [3 * 1041 + i * 1040 // 31 for i in range(32)]
    everywhere = Probe(queries=50, where="all").token_rows(layout)
    assert everywhere.tolist() == [i * (7 * 1041 - 1) // 49 for i in range(50)]
    assert Probe().head_rows(16) == [0, 5, 10, 15] and Probe(heads=4).head_rows(3) == [0, 1, 2]
    small = Layout(frames=3, height=2, width=2)
    assert Probe().token_rows(small).tolist() == [4, 5, 6, 7] and Probe(queries=1).token_rows(small).tolist() == [4]


def test_entropy_is_normalised_by_the_number_of_keys():
    from burnish.ops.attention_entropy import attention_entropy

    k = torch.randn(2, 3, 50, 8)
    flat = attention_entropy(torch.zeros(2, 3, 4, 8), k)
    torch.testing.assert_close(normalised_entropy(flat, 50), torch.tensor(1.0))
    q = torch.randn(2, 3, 4, 8)
    p = (q.double() @ k.double().mT / 8**0.5).softmax(-1)
    want = -(p * p.log()).sum(-1).mean() / torch.tensor(50.0).log()
    torch.testing.assert_close(normalised_entropy(attention_entropy(q, k), 50).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: LayerRule(-1, 2), "local must be at least 0; got -1"),
        (lambda: LayerRule(4, 2), "sample must be at least local = 4; got 2"),
        (lambda: AdaptiveRule(1.5, 0.9), r"tau1 must be in \[0, 1\]; got 1.5"),
        (lambda: AdaptiveRule(0.8, 0.9), r"tau2 must be at most tau1 = 0.8; got 0.9"),
        (lambda: Probe(heads=0), "heads must be at least 1; got 0"),
        (lambda: Probe(where="last"), "where must be one of middle, all; got 'last'"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
