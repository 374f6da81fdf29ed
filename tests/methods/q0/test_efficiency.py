"""The data-efficiency rule against the published pairs."""

from __future__ import annotations

import pytest

from burnish.methods.q0.efficiency import SLOWRUN, data_efficiency, equivalent_tokens


@pytest.mark.parametrize(
    ("loss", "times"), [(3.402, 3.81), (3.126, 7.92), (3.048, 9.95), (3.003, 12.79), (3.001, 12.92), (2.987, 13.83)]
)
def test_published_pairs(loss, times):
    assert data_efficiency(loss) == pytest.approx(times, abs=0.006)


def test_points_and_lines():
    for tokens, loss in SLOWRUN:
        assert equivalent_tokens(loss) == pytest.approx(tokens)
    assert equivalent_tokens((3.703 + 3.370) / 2) == pytest.approx(300e6)
    assert data_efficiency(3.2, tokens=300e6) == pytest.approx(2.0)
    assert equivalent_tokens(1.5, ((10, 2.0), (30, 1.0))) == pytest.approx(20)


def test_errors():
    for call, message in (
        (lambda: data_efficiency(2.5), r"loss must lie in the table's \[2.892, 3.703\]; got 2.5"),
        (lambda: data_efficiency(3.8), "got 3.8"),
        (lambda: data_efficiency(float("nan")), "got nan"),
        (lambda: data_efficiency(3.0, tokens=0), "tokens must be > 0"),
        (lambda: equivalent_tokens(1.0, ((1, 1.0),)), "table must be two points or more"),
        (lambda: equivalent_tokens(1.0, ((1, 1.0), (2, 1.5))), "losses falling"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
