"""QK-Pro: the small form is the paper's, its ends, conventions, grouped heads; and the gauge that makes it one of
many."""

import copy

import hybrids
import pytest
import torch

from burnish.methods.qk_restore import QKRestoreOptions, nearest_rotation, qk_pro, restore, restore_path
from burnish.methods.qk_restore.pro import switch

D, H = 12, 4


@pytest.fixture
def weights():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(H, D, generator=g, dtype=torch.float64) for _ in range(4)]  # q pre, q post, k pre, k post


@pytest.mark.parametrize("lam", [1e-3, 0.1, 1.0, 30.0])
def test_small_form_is_the_literal_one(weights, lam):
    """Fact 4: the d x d inverse of the paper, in both conventions."""
    q_pre, q_post, k_pre, _ = weights
    a, b, k = q_pre.T, q_post.T, k_pre.T  # convention A: d x d_h
    inverse = torch.linalg.inv(k @ k.T + lam * torch.eye(D, dtype=torch.float64))
    literal = b + (a @ k.T - b @ k.T) @ inverse @ k
    assert (qk_pro(q_pre, q_post, k_pre, lam) - literal.T).abs().max() < 2e-13 * max(1, 1 / lam)
    a, b, k = q_pre, q_post, k_pre  # convention B: as stored, d_h x d
    inverse = torch.linalg.inv(k @ k.T + lam * torch.eye(H, dtype=torch.float64))
    literal = b + (a @ k.T - b @ k.T) @ inverse @ k
    assert (qk_pro(q_pre, q_post, k_pre, lam, "B") - literal).abs().max() < 2e-13


def test_ends_and_spectral_form(weights):
    q_pre, q_post, k_pre, _ = weights
    assert (qk_pro(q_pre, q_post, k_pre, 1e-6) - q_pre).abs().max() < 1e-5
    assert torch.allclose(qk_pro(q_pre, q_post, k_pre, 0.0), q_pre, atol=1e-13, rtol=0)
    assert (qk_pro(q_pre, q_post, k_pre, 1e6) - q_post).abs().max() < 1e-4
    u, s, _ = torch.linalg.svd(k_pre, full_matrices=False)
    lam = 0.7
    spectral = q_post + u @ torch.diag(s**2 / (s**2 + lam)) @ u.T @ (q_pre - q_post)
    assert (qk_pro(q_pre, q_post, k_pre, lam) - spectral).abs().max() < 1e-13
    # a key that reads less than d_h directions: at lam = 0 only those are restored
    thin = k_pre.clone()
    thin[3] = thin[0] + thin[1]
    form = switch(thin, 0.0)
    assert torch.allclose(form @ form, form, atol=1e-12) and round(float(form.trace())) == 3
    assert torch.allclose(qk_pro(q_pre, q_post, thin, 0.0).T @ thin, q_pre.T @ thin, atol=1e-12)


def test_convention_b_does_not_keep_the_routing_form(weights):
    q_pre, q_post, k_pre, _ = weights
    want = q_pre.T @ k_pre
    error = {c: float((qk_pro(q_pre, q_post, k_pre, 1e-9, c).T @ k_pre - want).norm() / want.norm()) for c in "AB"}
    assert error["A"] < 1e-8 and error["B"] > 0.5


def softmax_logits(q, k, x):
    return (x @ q.T) @ (x @ k.T).T / H**0.5


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotary(x):
    t = torch.arange(len(x), dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack([even * t.cos() - odd * t.sin(), even * t.sin() + odd * t.cos()], -1).flatten(1)


def test_gauge(weights):
    """Fact 5: (A Q, A^-T K) has the same logits in a plain head; a norm or a rotary position sees the difference,
    unless A is orthogonal (norm) or commutes with the rotations."""
    q, _, k, _ = weights
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, D, generator=g, dtype=torch.float64)
    mix = torch.randn(H, H, generator=g, dtype=torch.float64) + 2 * torch.eye(H, dtype=torch.float64)
    orthogonal = torch.linalg.qr(mix).Q
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    commuting = torch.block_diag(turn, turn.T)

    def logits(a, through):
        return through(x @ (a @ q).T) @ through(x @ (torch.linalg.inv(a).T @ k).T).T

    one = torch.eye(H, dtype=torch.float64)
    for a in (mix, orthogonal, commuting):
        assert (logits(a, lambda y: y) - logits(one, lambda y: y)).abs().max() < 1e-11
    assert (logits(mix, rms) - logits(one, rms)).abs().max() > 0.1
    assert (logits(orthogonal, rms) - logits(one, rms)).abs().max() < 1e-11
    assert (logits(orthogonal, rotary) - logits(one, rotary)).abs().max() > 0.1
    assert (logits(commuting, rotary) - logits(one, rotary)).abs().max() < 1e-11


def test_nearest_rotation(weights):
    """Fact 6: nearer to the fine-tuned pair than plain restore, with the same routing form."""
    q_pre, q_post, k_pre, k_post = weights
    a = nearest_rotation(q_pre, k_pre, q_post, k_post)
    assert (a @ a.T - torch.eye(H, dtype=torch.float64)).abs().max() < 1e-13

    def distance(q, k):
        return float((q - q_post).square().sum() + (k - k_post).square().sum())

    best = distance(a @ q_pre, a @ k_pre)
    assert best < distance(q_pre, k_pre)
    assert ((a @ q_pre).T @ (a @ k_pre) - q_pre.T @ k_pre).abs().max() < 2e-13
    g = torch.Generator().manual_seed(2)
    for _ in range(50):
        other = torch.linalg.qr(torch.randn(H, H, generator=g, dtype=torch.float64)).Q
        assert best <= distance(other @ q_pre, other @ k_pre) + 1e-12
        near = torch.linalg.matrix_exp(0.05 * (other - other.T)) @ a
        assert best <= distance(near @ q_pre, near @ k_pre) + 1e-12


@pytest.mark.parametrize("name", ["granitemoehybrid", "qwen3_next", "jamba"])
@pytest.mark.parametrize("lam", [0.05, 2.0])
def test_checkpoints_head_by_head(name, lam, tmp_path):
    """Grouped heads share their key's form; the gate of a gated query stays; K is before's."""
    pre = hybrids.model(name)
    post = hybrids.trained(pre)
    path = restore_path(pre, post, options=QKRestoreOptions(mode="pro", lam=lam))
    a, b = pre.state_dict(), post.state_dict()
    got = dict(path.at(0))
    sizes = (4, 2, 8)
    for layer in hybrids.HYBRIDS[name][2]:
        at = f"model.layers.{layer}.self_attn."
        assert torch.equal(got[at + "k_proj.weight"], a[at + "k_proj.weight"])
        gated = 2 if name == "qwen3_next" else 1
        q = [s[at + "q_proj.weight"].view(sizes[0], gated * sizes[2], -1) for s in (a, b, got)]
        k = a[at + "k_proj.weight"].view(sizes[1], sizes[2], -1)
        for h in range(sizes[0]):
            want = qk_pro(q[0][h, : sizes[2]], q[1][h, : sizes[2]], k[h // 2], lam)
            assert torch.allclose(q[2][h, : sizes[2]].double(), want, atol=1e-6, rtol=0)
            assert torch.equal(q[2][h, sizes[2] :], q[1][h, sizes[2] :])
    names = {n for n in got if not torch.equal(got[n], b[n])}
    assert names == set(path.selector)


def test_pro_ends_at_restore_on_disk_and_alpha(tmp_path):
    pre = hybrids.model("granitemoehybrid").double()
    post = hybrids.trained(pre)
    pre.save_pretrained(tmp_path / "pre")
    post.save_pretrained(tmp_path / "post")
    report = restore(tmp_path / "pre", tmp_path / "post", tmp_path / "pro", mode="pro", lam=1e-9)
    plain = restore_path(pre, post)
    from safetensors.torch import load_file

    out = load_file(tmp_path / "pro" / "model.safetensors")
    for n in plain.selector:
        assert torch.allclose(out[n], plain.tensor(n, 0), atol=1e-7)
    assert "QK-Pro, lambda 1e-09, convention A" in str(report)
    pro = restore_path(pre, post, options=QKRestoreOptions(mode="pro", lam=0.5))
    for n in plain.selector:
        halfway = (pro.tensor(n, 0) + post.state_dict()[n]) / 2
        assert torch.allclose(pro.tensor(n, 0.5), halfway, atol=1e-13)
        assert torch.equal(pro.tensor(n, 1), post.state_dict()[n])


@pytest.mark.parametrize("fused", [False, True])
def test_biases_are_one_more_input(fused):
    """Augmented with an input of 1, weight and bias are one matrix; fused or not."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM

    base = {**hybrids.BASE, "num_hidden_layers": 1, "num_key_value_heads": 4}
    torch.manual_seed(0)
    if fused:
        base.pop("num_key_value_heads")
        pre = GPTNeoXForCausalLM(GPTNeoXConfig(**base))
    else:
        pre = Qwen2ForCausalLM(Qwen2Config(**base))
    hybrids_post = hybrids.trained(pre)
    pre = hybrids.trained(copy.deepcopy(pre), seed=3)  # biases that are not zero
    lam = 0.3
    path = restore_path(pre, hybrids_post, options=QKRestoreOptions(mode="pro", lam=lam, layers="all"))
    got = dict(path.at(0))

    def parts(state):
        if fused:
            w, b = (state[f"gpt_neox.layers.0.attention.query_key_value.{x}"] for x in ("weight", "bias"))
            w = torch.cat([w, b[:, None]], 1).view(4, 3, 8, -1)
            return w[:, 0], w[:, 1], w[:, 2]
        return [
            torch.cat([state[f"model.layers.0.self_attn.{p}_proj.weight"],
                       state[f"model.layers.0.self_attn.{p}_proj.bias"][:, None]], 1).view(4, 8, -1)
            for p in "qkv"
        ]  # fmt: skip

    a, b, c = (parts(s) for s in (pre.state_dict(), hybrids_post.state_dict(), got))
    for h in range(4):
        assert torch.allclose(c[0][h].double(), qk_pro(a[0][h], b[0][h], a[1][h], lam), atol=1e-6)
        assert torch.equal(c[1][h], a[1][h]) and torch.equal(c[2][h], b[2][h])
    with pytest.raises(ValueError, match="convention B has no meaning for a bias"):
        restore_path(pre, hybrids_post, options=QKRestoreOptions(mode="pro", lam=lam, layers="all", convention="B"))
    options = QKRestoreOptions(mode="pro", lam=lam, layers="all", convention="B", include_bias=False)
    got = parts(dict(restore_path(pre, hybrids_post, options=options).at(0)))
    for h in range(4):
        want = qk_pro(a[0][h, :, :-1], b[0][h, :, :-1], a[1][h, :, :-1], lam, "B")
        assert torch.allclose(got[0][h, :, :-1].double(), want, atol=1e-6)
        assert torch.equal(got[0][h, :, -1], b[0][h, :, -1])


@pytest.mark.parametrize("name", ["bailing_hybrid", "zamba2"])
def test_what_has_no_pro(name):
    model = hybrids.model(name)
    with pytest.raises(ValueError, match="QK-Pro needs one"):
        restore_path(model, model, options=QKRestoreOptions(mode="pro", lam=1.0))
