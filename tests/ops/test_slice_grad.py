"""The gradients of row ranges against finite differences, in fp64, and as a registered op."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from burnish.ops.slice_grad import assemble, attach_embedding, attach_linear

pytestmark = pytest.mark.usefixtures("one_thread")


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def written(weight, leaf, start):
    """The weight with the leaf's numbers in its rows, as the leaf's memory would have it."""
    weight = weight.clone()
    weight[start : start + len(leaf)] = leaf.detach()
    return weight


@pytest.mark.parametrize("start, stop", [(0, 5), (1, 4), (2, 3), (3, 3), (0, 2)])
def test_linear(start, stop):
    x, w, b = rand(3, 2, 4).requires_grad_(), rand(5, 4), rand(5).requires_grad_()

    def run(x, leaf, b):
        return attach_linear(F.linear(x, written(w, leaf, start), b), x, leaf, start).tanh()

    assert gradcheck(run, (x, w[start:stop].clone().requires_grad_(), b))


def test_transposed():
    x, w = rand(3, 5).requires_grad_(), rand(5, 4)

    def run(x, leaf):
        return attach_linear(x @ written(w, leaf, 1), x, leaf, 1, transposed=True).tanh()

    assert gradcheck(run, (x, w[1:4].clone().requires_grad_()))


def test_embedding():
    w, tokens = rand(6, 3), torch.tensor([[0, 2, 2], [5, 3, 2]])

    def run(leaf, padding_idx=None):
        y = F.embedding(tokens, written(w, leaf, 1))
        return attach_embedding(y, tokens, leaf, 1, padding_idx=padding_idx).tanh()

    leaf = w[1:4].clone().requires_grad_()
    assert gradcheck(run, (leaf,))
    (grad,) = torch.autograd.grad(run(leaf, 2).sum(), leaf)
    assert not grad[1].any() and grad[2].any()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_cut_norm_of_inputs_that_are_not_centred(norm):
    """T11."""
    x, w = (rand(4, 6) + 2).requires_grad_(), rand(6) + 1

    def run(x, leaf):
        weight = assemble(leaf, written(w, leaf, 2), 2)
        return F.layer_norm(x, (6,), weight) if norm == "layer" else F.rms_norm(x, (6,), weight)

    assert gradcheck(run, (x, w[2:5].clone().requires_grad_()))


def test_the_row_sum_as_a_registered_op():
    from burnish.ops.slice_grad import _segment_sum_op

    rows, tokens = torch.randn(7, 3), torch.tensor([0, 4, 4, 9, 2, 3, 4])
    want = torch.zeros(3, 3).index_add_(0, torch.tensor([2, 2, 0, 1, 2]), rows[[1, 2, 4, 5, 6]])
    torch.testing.assert_close(_segment_sum_op(rows, tokens, 2, 5, None), want)
    torch.library.opcheck(_segment_sum_op, (rows, tokens, 2, 5, None))
    torch.library.opcheck(_segment_sum_op, (rows.bfloat16(), tokens, 2, 5, 4))
