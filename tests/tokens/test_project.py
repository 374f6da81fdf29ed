"""Gather-project: rows first, then projection, is projection first, then rows."""

import pytest
import torch
from mini_models import Attention, AttentionRope, Rotary2D, places
from torch import nn

from burnish.tokens.project import Form, Projection, take_rows

VGGT, PI3 = Form(("pos",), "pos"), Form(("attn_bias", "xpos"), "xpos", cast_first=True)


@pytest.fixture
def scene():
    u = torch.randn(2, 3 * 10, 24, dtype=torch.float64)
    where = places(6, 2, 4, 2).reshape(2, 30, 2)
    rows = torch.stack([torch.randperm(30)[:11].sort().values for _ in range(2)])
    return u, where, rows


class Wrapped(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear

    def forward(self, x):
        return self.base_layer(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind, form", [(Attention, VGGT), (AttentionRope, PI3)])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": False}, {"rope": None}, {"wrapped": True}])
def test_rows_then_projection_is_projection_then_rows(scene, kind, form, options):
    u, where, rows = scene
    wrapped = options.pop("wrapped", False)
    attn = kind(24, 3, **{"rope": Rotary2D(), **options}).double()
    if wrapped:
        attn.qkv = Wrapped(attn.qkv)
    projection = Projection(attn, form, 30)
    assert projection.plain is not wrapped
    want_q, want_k, want_v = attn.heads(u, where)
    k, v = projection.keys_values(take_rows(u, rows), take_rows(where, rows))
    for b in range(2):
        torch.testing.assert_close(k[b], want_k[b, :, rows[b]], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(v[b], want_v[b, :, rows[b]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projection.queries(u, where), want_q, rtol=1e-12, atol=1e-12)
    for one, other in zip(projection.all(u, where), (want_q, want_k, want_v), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projection.queries(u, where, [2, 0]), want_q[:, [2, 0]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projection.keys_of(u, where, [1]), want_k[:, [1]], rtol=1e-12, atol=1e-12)


def test_gradients_reach_weights_and_rows_and_no_others(scene):
    u, where, rows = scene
    attn = Attention(24, 3, rope=Rotary2D()).double()
    weight = torch.randn(2, 2, 3, 11, 8, dtype=torch.float64)
    got, want = [], []
    for out in (got, want):
        attn.zero_grad()
        x = u.clone().requires_grad_()
        if out is got:
            k, v = Projection(attn, VGGT, 30).keys_values(take_rows(x, rows), take_rows(where, rows))
        else:
            _, k, v = attn.heads(x, where)
            at = rows[:, None, :, None].expand(2, 3, 11, 8)
            k, v = k.gather(2, at), v.gather(2, at)
        (k * weight[0] + v * weight[1]).sum().backward()
        out += [x.grad, attn.qkv.weight.grad, attn.qkv.bias.grad, attn.k_norm.weight.grad]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    unseen = torch.ones(2, 30, dtype=torch.bool).scatter_(1, rows, False)
    assert (got[0][unseen] == 0).all() and (got[0][~unseen] != 0).any(-1).all()
    assert (got[1][:24] == 0).all()  # W_q


def test_one_list_of_rows_serves_every_scene(scene):
    u, _, rows = scene
    shared = take_rows(u, rows[:1])
    assert torch.equal(shared, u[:, rows[0]])
    assert torch.equal(take_rows(u, rows), torch.stack([u[b, rows[b]] for b in range(2)]))
    with pytest.raises(ValueError, match="rows must be for 1 or 2 scenes; got 3"):
        take_rows(u, rows[:1].expand(3, -1))


def test_q_and_k_take_the_value_dtype():
    attn = Attention(24, 3, rope=Rotary2D())
    attn.q_norm.register_forward_hook(lambda _, __, out: out.double())
    u, where = torch.randn(1, 10, 24), places(1, 2, 4, 2)
    for form in (VGGT, PI3):
        q, k, v = Projection(attn, form, 10).all(u, where)
        assert q.dtype == k.dtype == v.dtype == torch.float32


def test_each_family_casts_where_its_own_code_does():
    """VGGT's q and k are rotated as LayerNorm left them and cast by attention, pi3's cast and then rotated."""
    attn, u, where = Attention(24, 3, rope=Rotary2D()), torch.randn(1, 10, 24), places(1, 2, 4, 2) * 7
    attn.q_norm.register_forward_hook(lambda _, __, out: out.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (raw,) = Projection(attn, VGGT, 10).raw(u, "q")
        normed = attn.q_norm(raw)
        late, early = attn.rope(normed, where).bfloat16(), attn.rope(normed.bfloat16(), where).bfloat16()
        assert torch.equal(Projection(attn, VGGT, 10).queries(u, where), late)
        assert torch.equal(Projection(attn, PI3, 10).queries(u, where), early) and not torch.equal(late, early)


def test_temperatures_are_of_the_dense_length():
    """UniCeption's scalable softmax and entropy scaling read the sequence: pruning keys leaves them as they were."""
    attn = Attention(24, 3)
    u = torch.randn(1, 10, 24)
    plain = Projection(attn, VGGT, 500).queries(u, None)
    attn.use_scalable_softmax = True
    torch.testing.assert_close(Projection(attn, VGGT, 500).queries(u, None), plain * torch.tensor(500.0).log())
    attn.use_scalable_softmax, attn.use_entropy_scaling = False, True
    attn.entropy_scaling_growth_factor, attn.base_token_count_for_entropy_scaling = 1.4, 444
    want = plain * (1.4 * torch.tensor(500.0).log() / torch.tensor(444.0).log()).sqrt()
    torch.testing.assert_close(Projection(attn, VGGT, 500).queries(u, None), want)


def test_what_a_call_may_hold():
    pos = torch.zeros(1, 2, 2)
    assert VGGT.positions_of((pos,), {}) is pos and VGGT.positions_of((), {"pos": pos}) is pos
    assert PI3.positions_of((None,), {"xpos": pos}) is pos and PI3.positions_of((), {}) is None
    assert Form(("xpos",), "xpos").positions_of(([None, None],), {}) is None
    with pytest.raises(TypeError, match="attention takes x and pos; got 2 arguments"):
        VGGT.positions_of((pos, pos), {})
    with pytest.raises(TypeError, match="attention takes x and pos; got mask"):
        VGGT.positions_of((), {"mask": None})
    with pytest.raises(TypeError, match="attention takes x and pos; got pos"):
        VGGT.positions_of((pos,), {"pos": pos})
    with pytest.raises(ValueError, match="attn_bias must be None on an accelerated model; got Tensor"):
        PI3.positions_of((pos,), {})
