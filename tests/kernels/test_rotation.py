"""The block rotation of every backend, and the rotations themselves, against the definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from rotation_problems import EDGES, SHAPES, expected, expected_dr, problem

from burnish.kernels import dispatch, rotation, rotation_host, rotation_torch, rotation_triton
from burnish.paths.adapters import cayley_neumann
from burnish.reference.block_rotation import rotation as reference_rotation

TERMS = (None, 0, 1, 2, 3, 4, 5, 6, 9)


@pytest.fixture(params=["torch", "triton", "host"])
def kernels(request, monkeypatch, device):
    if request.param == "host" and device.type != "cpu":
        pytest.skip("the host backend serves the CPU")
    # several tiles, shares and groups in small problems
    monkeypatch.setattr(rotation_torch, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(rotation_triton, "tiles", lambda *_: (16, 16 if request.param == "triton" else 32, 4))
    monkeypatch.setattr(rotation_host, "GROUP_COLUMNS", 40)
    monkeypatch.setattr(rotation_host, "SHARE", 20)
    return dispatch.module("rotation", request.param)


def close(got, want, tol):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert bool(((got - want).abs() <= tol * max(1.0, float(want.abs().max()) if want.numel() else 0)).all())


def run(kernels, p, delta):
    return kernels.forward(p.x, delta), *kernels.backward(p.x, delta, p.dy, wanted=(True, True))


# The rotations


def skew_with_angle(theta: float, b: int = 6) -> torch.Tensor:
    """A packed generator whose Q has eigenvalues +-i theta alone."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(b, b, generator=g, dtype=torch.float64))[0]
    turn = torch.zeros(b, b, dtype=torch.float64)
    for i in range(0, b, 2):
        turn[i, i + 1], turn[i + 1, i] = theta, -theta
    rows, columns = torch.triu_indices(b, b, 1)
    return (basis @ turn @ basis.T)[rows, columns][None]


def rotation_of(generator, terms=5, correction=False):
    delta = rotation.make_delta(generator, terms, correction, generator.dtype)
    return delta + torch.eye(delta.shape[1], dtype=delta.dtype)


@pytest.mark.parametrize("correction", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("terms", TERMS)
def test_rotations_and_their_gradients_are_those_of_the_definition(terms, correction):
    p = problem((1, 3, 7), size=0.3)
    generator = p.generator.requires_grad_()
    want = reference_rotation(generator, terms=terms, correction=correction)
    got = rotation.make_delta(generator.detach(), terms, correction, torch.float64)
    close(got + torch.eye(7, dtype=torch.float64), want.detach(), 1e-13)
    up = torch.randn_like(want)
    found = rotation.generator_gradient(generator.detach(), up, terms, correction)
    if want.requires_grad:
        close(found, torch.autograd.grad(want, generator, up)[0], 1e-12)
    else:
        assert terms < 2 and not found.any()


def test_these_are_peft_s_rotations():
    from peft.tuners.oft.layer import OFTRotationModule

    generator = problem((1, 3, 6)).generator
    theirs = OFTRotationModule(3, 15, 6, 18).double()
    for terms in TERMS[1:]:
        close(rotation_of(generator, terms), theirs._cayley_batch(generator, 6, True, terms), 1e-14)
        q = rotation.skew(generator, 6, torch.float64)
        close(rotation_of(generator, terms), cayley_neumann(q, terms), 1e-14)  # what paths scale and rewind
    exact = theirs._cayley_batch(generator, 6, False)
    close(rotation_of(generator, None), exact, 1e-7)  # theirs has an identity in fp32
    # the series turns the other way
    many = rotation_of(generator, 60)
    close(many, exact.mT, 1e-7)
    assert (many - exact).abs().max() > 0.1


@pytest.mark.parametrize("theta", [0.5, 0.1, 0.05])
def test_singular_values(theta):
    """2.4.1 of the specification: |1 - theta^4| with 5 terms, sqrt(1 + theta^10) with 6, and 3 terms are 4."""
    generator = skew_with_angle(theta)

    def singular(**options):
        return torch.linalg.svdvals(rotation_of(generator, **options))

    ones = torch.ones(1, 6, dtype=torch.float64)
    close(singular(), ones * abs(1 - theta**4), 1e-14)
    close(singular(terms=6), ones * math.sqrt(1 + theta**10), 1e-14)
    assert torch.equal(rotation_of(generator, 3), rotation_of(generator, 4))
    close(singular(terms=None), ones, 1e-14)
    # a step of Newton-Schulz: s (3 - s^2) / 2, so that theta^4 becomes 3/2 theta^8
    s = 1 - theta**4
    close(singular(correction=True), ones * s * (3 - s * s) / 2, 1e-14)
    assert float((1 - singular(correction=True)).abs().max()) == pytest.approx(1.5 * theta**8, rel=0.1, abs=1e-15)


def test_scaled_generators_keep_singular_values_and_the_dense_path_does_not():
    """2.4.3: the generator's path is orthogonal; (1 - t) I + t R has sqrt(1 - 2t(1-t)(1 - cos phi))."""
    theta, t = 0.6, 0.3
    generator, one = skew_with_angle(theta), torch.eye(6, dtype=torch.float64)
    for scale in (0.1, 0.5, 1.0):
        close(torch.linalg.svdvals(rotation_of(generator * scale, None)), one.diagonal()[None], 1e-14)
    dense = torch.linalg.svdvals((1 - t) * one + t * rotation_of(generator, None))
    phi = 2 * math.atan(theta)
    close(dense, one.diagonal()[None] * math.sqrt(1 - 2 * t * (1 - t) * (1 - math.cos(phi))), 1e-14)


def test_a_small_rotation_keeps_its_digits():
    """R - I is made without subtracting I: exact in relative terms where R in fp32 has lost half of it."""
    generator = skew_with_angle(1e-5)
    exact = rotation.make_delta(generator, 5, False, torch.float64)
    got = rotation.make_delta(generator.float(), 5, False, torch.float32).double()
    naive = (rotation_of(generator.float()) - torch.eye(6)).double()
    assert (got - exact).norm() < 1e-6 * exact.norm() < (naive - exact).norm()


# Backends


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("shape", [*SHAPES, *EDGES], ids=str)
def test_values_and_gradients_are_those_of_the_definition(kernels, shape, shared, device, poison):
    p = problem(shape, shared=shared, device=device)
    delta = p.delta()
    y, dx, d_generator = expected(p)
    got, got_dx, dr = run(kernels, p, delta)
    close(got, y, 1e-13)
    close(got_dx, dx, 1e-13)
    close(dr, expected_dr(p), 1e-13)
    close(rotation.generator_gradient(p.generator, dr, 5, False), d_generator, 1e-12)


@pytest.mark.parametrize("b", [16, 20, 32, 64, 128])
def test_the_tiles_of_a_launch(b, device, poison):
    """Triton with its own tiles, in bf16 and fp32, several blocks to a tile and several tiles to a block."""
    for dtype in (torch.float32, torch.bfloat16):
        p = problem((70, 3, b), device=device, size=0.3 / b**0.5).to(dtype)
        exact = expected(p.to(torch.float64, torch.float64))
        y, dx, dr = run(rotation_triton, p, p.delta())
        eps = torch.finfo(dtype).eps
        assert (y.double() - exact[0]).norm() < eps * exact[0].norm()
        assert (dx.double() - exact[1]).norm() < eps * exact[1].norm()
        got = rotation.generator_gradient(p.generator, dr, 5, False)
        assert (got.double() - exact[2]).norm() < 1e-5 * exact[2].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3]], ids=str)
def test_low_precision_loses_no_more_than_torch(kernels, shape, dtype, device):
    """Against fp64 of the same rounded operands; and with fp32 sums, so that only the result is rounded."""
    p = problem(shape, device=device).to(dtype)
    exact, theirs = expected(p.to(torch.float64, torch.float64)), expected(p)
    y, dx, dr = run(kernels, p, p.delta())
    got = y, dx, rotation.generator_gradient(p.generator, dr, 5, False)
    for x, plain, truth in zip(got, theirs, exact, strict=True):
        error = (x.double() - truth).norm()
        assert error <= 1.5 * (plain.double() - truth).norm() + 2e-7 * truth.norm()
    half = torch.finfo(dtype).eps / 2 + 1e-6
    for x, truth in zip(got[:2], exact[:2], strict=True):
        assert x.dtype == dtype and ((x.double() - truth).abs() <= half * 1.1 * truth.abs() + 1e-5).all()
    assert got[2].dtype == torch.float32 and (got[2].double() - exact[2]).norm() < 1e-6 * exact[2].norm()


def test_a_small_rotation_is_not_lost_in_bf16(kernels, device):
    """A turn of 1e-3 is below bf16's step beside 1: in R it would vanish, in R - I it moves the sums it should."""
    p = problem((64, 4, 16), device=device, size=1e-3).to(torch.bfloat16)
    y = kernels.forward(p.x, p.delta()).double()
    exact = expected(p.to(torch.float64, torch.float64))[0]
    moved = exact - p.x.double()
    # each entry is rounded; their mean along the movement is not
    along = float(((y - p.x.double()) * moved).sum() / (moved * moved).sum())
    assert along == pytest.approx(1, abs=0.2)
    r = rotation_of(p.generator).bfloat16()
    assert torch.equal(r.diagonal(dim1=1, dim2=2).float(), torch.ones(4, 16))


def test_two_runs_have_the_same_bits_and_rows_do_not_depend_on_others(kernels, device):
    p = problem(SHAPES[2], device=device).to(torch.float32)
    delta = p.delta()
    first, second = run(kernels, p, delta), run(kernels, p, delta)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(kernels.forward(p.x[40:], delta), first[0][40:])


def test_only_what_is_wanted(kernels, device):
    p = problem(SHAPES[2], device=device)
    delta = p.delta()
    _, dx, dr = run(kernels, p, delta)
    got = kernels.backward(p.x, delta, p.dy, wanted=(True, False))
    assert got[1] is None and torch.allclose(got[0], dx, rtol=0, atol=1e-13)
    got = kernels.backward(p.x, delta, p.dy, wanted=(False, True))
    assert got[0] is None and torch.allclose(got[1], dr, rtol=0, atol=1e-13)
    assert kernels.backward(p.x, delta, p.dy, wanted=(False, False)) == (None, None)


def test_operands_of_any_row_stride(kernels, device):
    p = problem(SHAPES[2], device=device).to(torch.float32)
    want = run(kernels, p, p.delta())
    wide = torch.full((len(p.x), p.x.shape[1] + 3), torch.nan, device=device)
    wide[:, 3:] = p.x
    q = dataclasses.replace(p, x=wide[:, 3:], dy=p.dy[:1].expand_as(p.dy))
    assert torch.equal(kernels.forward(q.x, p.delta()), want[0])
    same = dataclasses.replace(p, dy=q.dy.contiguous())
    for a, b in zip(run(kernels, q, p.delta()), run(kernels, same, p.delta()), strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_row_and_block(kernels, device):
    p = problem((40, 3, 20), device=device).to(torch.float32)
    p.x[7, 25] = torch.nan
    bad = kernels.forward(p.x, p.delta()).isnan()
    assert bad[7, 20:40].all() and bad.sum() == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    p = problem((1100, 3, 20)).to(dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run(rotation_host, p, p.delta()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_operands_that_do_not_fit_are_named():
    p = problem(SHAPES[1])
    delta = p.delta()
    bad = [
        (ValueError, "unit stride", (p.x.T.contiguous().T, delta)),
        (ValueError, "x must be of 3 blocks of 6", (p.x[:, :12], delta)),
        (TypeError, "delta must be torch.float32", (p.x.float(), delta)),
        (ValueError, "delta must be", (p.x, delta[0])),
        (TypeError, "x must be floating", (p.x.long(), delta)),
        (ValueError, "delta must be on meta", (p.x.to("meta"), delta)),
    ]
    for error, match, operands in bad:
        with pytest.raises(error, match=match):
            rotation.check(*operands)
    with pytest.raises(ValueError, match="dy must be"):
        rotation.check_backward(p.x, delta, p.dy[:2])
    assert [rotation.block_size(n) for n in (0, 1, 3, 4, 120, 8128)] == [0, 2, 3, 0, 16, 128]
