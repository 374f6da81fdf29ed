"""``block_rotation``: orthogonal fine-tuning's rotation of a layer's input, forward and backward in one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels import rotation as contract
from ..kernels.launch import accumulator
from .core import without_autocast
from .inputs import check_float


def block_rotation(
    x: Tensor, generator: Tensor, *, terms: int | None = 5, correction: bool = False, backend: str = "auto"
) -> Tensor:
    r"""Each block of b features of x, as a row, times a rotation R(Q) of its own.

        y[..., r] = x[..., r] R_r,    r = 1 ... d / b

    Q is skew, with the generator's row above its diagonal and minus that below.  R is what HF PEFT's OFT makes of it:

        terms = 5     (I + Q)^2 (I + Q^2) = I + 2Q + 2Q^2 + 2Q^3 + Q^4, Cayley-Neumann: near (I + Q)(I - Q)^-1, with
                      singular values 1 - theta^4 where Q has eigenvalues +-i theta
        terms = n     I + 2Q + ... + 2Q^(n-2) + Q^(n-1); 3 is what 4 is, 2 is I + 2Q, less is I
        terms = None  (I - Q)(I + Q)^-1, the exact Cayley transform by a solve.  It turns the other way: with None the
                      generator of an adapter that was trained with terms must be negated

    R is made in fp32 once a pass, and held as R - I: small rotations keep their digits beside x of any dtype.  Forward
    reads x and writes y; backward makes R again and reads x and dy once for both gradients.  Kept for backward: x and
    the generator, nothing else.  Two runs have the same bits.

    Args:
        x: (..., d), fp32, bf16, fp16 or fp64; d a multiple of b.
        generator: (d / b, b(b-1)/2) or (1, b(b-1)/2) for all blocks, any of these dtypes: an HF PEFT adapter's
            ``oft_R.weight`` as it is (there (1, ...) is block_share).
        terms: as above.
        correction: a step of Newton-Schulz, R <- R (3I - R^T R) / 2: an error of orthogonality theta^4 becomes about
            theta^8.  Not in HF PEFT.
        backend: "triton", "host", "torch" or "auto".

    Returns x's shape and dtype; sums are fp32 (fp64 for fp64), rounded once.  Gradients have the dtype of what they are
    of.  Autocast changes nothing.  A second derivative is refused.

    Raises: TypeError or ValueError naming the argument.

    Source: arXiv 2306.07280 (OFT), arXiv 2506.19847 (Cayley-Neumann).
    """
    check_float("x", x)
    check_float("generator", generator)
    if terms is not None and (isinstance(terms, bool) or not isinstance(terms, int) or terms < 0):
        raise ValueError(f"terms must be a whole number >= 0, or None for the exact transform; got {terms!r}")
    b = contract.block_size(generator.shape[1]) if generator.ndim == 2 else 0
    if not b:
        raise ValueError(f"generator must be (blocks, b(b-1)/2), b at least 2; got {tuple(generator.shape)}")
    blocks = generator.shape[0]
    if x.ndim < 1 or x.shape[-1] % b or (blocks not in (1, x.shape[-1] // b)) or not x.shape[-1]:
        raise ValueError(
            f"x must be (..., d) with d = {blocks} blocks of {b}, or a multiple of {b} for a generator of one row; got "
            f"{tuple(x.shape)}"
        )
    if generator.device != x.device:
        raise ValueError(f"generator must be on {x.device}, as x is; got {generator.device}")
    return _block_rotation(x, generator, -1 if terms is None else terms, bool(correction), backend)


def _rows(x: Tensor) -> Tensor:
    """(N, d) with unit stride along d."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _kernels(backend: str, device: torch.device):
    return dispatch.module("rotation", dispatch.resolve(backend, device))


def _terms(terms: int) -> int | None:
    return None if terms < 0 else terms


@torch.library.custom_op("burnish::block_rotation", mutates_args=())
@without_autocast
def _block_rotation(x: Tensor, generator: Tensor, terms: int, correction: bool, backend: str) -> Tensor:
    delta = contract.make_delta(generator, _terms(terms), correction, accumulator(x.dtype))
    return _kernels(backend, x.device).forward(_rows(x), delta).view(x.shape)


@_block_rotation.register_fake
def _(x, generator, terms, correction, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("burnish::block_rotation_backward", mutates_args=())
@without_autocast
def _block_rotation_backward(
    x: Tensor, generator: Tensor, dy: Tensor, terms: int, correction: bool, of_x: bool, of_generator: bool, backend: str
) -> tuple[Tensor, Tensor]:
    delta = contract.make_delta(generator, _terms(terms), correction, accumulator(x.dtype))
    dx, dr = _kernels(backend, x.device).backward(_rows(x), delta, _rows(dy), wanted=(of_x, of_generator))
    if dr is not None:
        dr = contract.generator_gradient(generator, dr, _terms(terms), correction).to(generator.dtype)
    return x.new_empty(0) if dx is None else dx.view(x.shape), generator.new_empty(0) if dr is None else dr


@_block_rotation_backward.register_fake
def _(x, generator, dy, terms, correction, of_x, of_generator, backend):
    return tuple(y.new_empty(y.shape if asked else 0) for y, asked in ((x, of_x), (generator, of_generator)))


def _keep(ctx, inputs, output):
    x, generator, ctx.terms, ctx.correction, ctx.backend = inputs
    # dx alone needs no x
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, generator)


def _gradients(ctx, dy):
    x, generator = ctx.saved_tensors
    asked = ctx.needs_input_grad[:2]
    if dy is None or not any(asked):
        return (None,) * 5
    given = (dy if x is None else x, generator, dy, ctx.terms, ctx.correction, *asked, ctx.backend)
    dx, d_generator = _block_rotation_backward(*given)
    return dx if asked[0] else None, d_generator if asked[1] else None, None, None, None


_block_rotation.register_autograd(_gradients, setup_context=_keep)
