"""Singular values from Gram matrices and Lanczos, against torch.linalg.svd."""

import pytest
import torch

from burnish.methods.geometry import clusters, fluctuation, nuclear_norm, singular_values, spectral_norm
from burnish.methods.geometry.spectrum import gram_values, gram_vectors, smaller_gram


def matrix(m, n, values=None, seed=0):
    """An (m, n) matrix in fp64, with these singular values where they are given."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g, dtype=torch.float64)
    if values is None:
        return x
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ vh


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (31, 31), (1, 7), (7, 1), (1, 1)])
def test_all_values_and_vectors(shape):
    x = matrix(*shape)
    exact = torch.linalg.svdvals(x)
    for got in (gram_values(smaller_gram(x)), gram_vectors(smaller_gram(x))[0], singular_values(x)):
        assert torch.allclose(got, exact, rtol=1e-11, atol=0)
    assert nuclear_norm(x) == pytest.approx(float(exact.sum()), rel=1e-12)


def test_values_over_sixteen_decades_need_the_refinement():
    """The Gram matrix alone has half the digits: of what is 1e-9 s_1 nothing is left."""
    values = 10.0 ** -torch.arange(16, dtype=torch.float64)
    x = matrix(40, 16, values)
    exact = torch.linalg.svdvals(x)
    alone = (gram_values(smaller_gram(x)) - exact).abs().max()
    refined = (singular_values(x) - exact).abs().max()
    assert alone > 1e-9 and refined < 1e-14
    low = matrix(40, 16, torch.cat([values[:3], torch.zeros(13)]))
    assert nuclear_norm(low) == pytest.approx(1.11, rel=1e-13)
    assert float(gram_values(smaller_gram(low)).sum()) == pytest.approx(1.11, rel=1e-13)  # by its floor
    assert nuclear_norm(torch.zeros(4, 3)) == 0 and nuclear_norm(torch.zeros(4, 0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (5, 5), (1, 40)])
def test_spectral_norm(shape, dtype):
    x = matrix(*shape).to(dtype)
    exact = float(torch.linalg.svdvals(x.double())[0])
    got = spectral_norm(x)
    assert abs(got - exact) <= 4e-6 * exact and got <= exact * (1 + 4e-6)
    assert spectral_norm(x) == got


def test_spectral_norm_where_lanczos_is_slow_or_ends_early(monkeypatch):
    from burnish.methods.geometry import spectrum

    called = []
    real = spectrum.smaller_gram
    monkeypatch.setattr(spectrum, "smaller_gram", lambda x: called.append(1) or real(x))
    flat = matrix(200, 200, torch.linspace(1, 0.99, 200))
    assert spectral_norm(flat, steps=4, tol=1e-12) == pytest.approx(1.0, rel=1e-12)
    assert called  # four steps cannot do it: the Gram matrix did
    called.clear()
    assert spectral_norm(flat) == pytest.approx(1.0, rel=1e-5) and not called
    assert spectral_norm(torch.zeros(4, 6)) == 0
    assert spectral_norm(3 * torch.eye(50)) == pytest.approx(3, rel=1e-5)
    one = torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 31))
    assert spectral_norm(one) == pytest.approx(float(one.norm()), rel=1e-5) and not called
    with pytest.raises(ValueError, match="two dimensions"):
        spectral_norm(torch.ones(3))


def test_fluctuation_is_the_distance_to_a_moving_average():
    x = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
    padded = [4, 1, 3, 1, 4, 1, 5, 9, 2, 6, 2, 9]  # the ends without being repeated
    averages = [sum(padded[i : i + 5]) / 5 for i in range(8)]
    want = sum(abs(a - float(b)) for a, b in zip(averages, x, strict=True)) / 8
    assert fluctuation(x) == pytest.approx(want, rel=1e-12)
    assert fluctuation(torch.full((9,), 2.0)) == 0 and fluctuation(x[:2]) == 0 and fluctuation(x[:3]) > 0
    assert fluctuation(x, window=1) == 0
    with pytest.raises(ValueError, match="odd"):
        fluctuation(x, window=4)


def test_clusters_chain():
    values = torch.tensor([10.0, 9.995, 9.99, 5.0, 5.0, 1.0, 0.9995])
    assert clusters(values, 1e-3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert clusters(values, 0).tolist() == [0, 1, 2, 3, 3, 4, 5]
    assert clusters(values[:0], 0.1).tolist() == [] and clusters(values[:1], 0.1).tolist() == [0]
