"""Additive paths: the arithmetic, the ends, rows, layers, and loading into a model."""

import math

import pytest
import torch

from burnish.paths import Additive, Selection, everything, whole_layers
from burnish.paths.blend import BLOCK, blend_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_are_the_models_bit_for_bit(state, dtype):
    pre, post = state(0, dtype), state(1, dtype)
    path = Additive(pre, post)
    for t, want in ((0.0, pre), (1.0, post)):
        got = dict(path.at(t))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_between_is_rounded_once(state, dtype):
    """The nearest number of the dtype to pre + t (post - pre), within what fp32 itself loses."""
    pre, post = state(0, dtype), state(1, dtype)
    for t in (0.01, 0.37, 0.99):
        for name in pre:
            if not pre[name].is_floating_point():
                continue
            exact = pre[name].double() + t * (post[name].double() - pre[name].double())
            got = Additive(pre, post).tensor(name, t)
            assert got.dtype == dtype
            unit = torch.finfo(dtype).eps / 2
            inside = 0 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
            scale = torch.maximum(pre[name].double().abs(), post[name].double().abs())
            assert ((got.double() - exact).abs() <= unit * exact.abs() + (inside + 4e-16) * scale).all()


def test_bf16_arithmetic_would_round_otherwise():
    """Fact 10.  A step of a hundredth is lost on most entries of a bf16 tensor in bf16 arithmetic; in fp32, rounded
    once, each entry is the nearest number that bf16 has, which bf16 arithmetic misses on many."""
    g = torch.Generator().manual_seed(0)
    pre, post = (torch.randn(1 << 14, generator=g).bfloat16() for _ in range(2))
    small = (post.float() * (1 + 0.02 * torch.randn(1 << 14, generator=g))).bfloat16()
    assert (post + 0.01 * (small - post) == post).float().mean() > 0.9
    naive = post + 0.01 * (pre - post)
    ours = blend_(post.clone(), pre, 0.99, Selection())
    nearest = (post.double() + 0.01 * (pre.double() - post.double())).float().bfloat16()
    assert (ours != nearest).float().mean() < 5e-4  # fp32's own error, where two numbers are all but equally near
    assert (naive != nearest).float().mean() > 0.01


def test_blocks_do_not_show():
    g = torch.Generator().manual_seed(0)
    shape = (3, BLOCK // 2 + 11)
    pre, post = (torch.randn(shape, generator=g) for _ in range(2))
    whole = pre + 0.25 * (post - pre)
    assert torch.equal(blend_(post.clone(), pre, 0.25, Selection()), whole)
    columns = blend_(post.clone(), pre, 0.25, Selection(((5, BLOCK // 2 + 3),), axis=1))
    assert torch.equal(columns[:, 5 : BLOCK // 2 + 3], whole[:, 5 : BLOCK // 2 + 3])
    assert torch.equal(columns[:, :5], post[:, :5]) and torch.equal(
        columns[:, BLOCK // 2 + 3 :], post[:, BLOCK // 2 + 3 :]
    )


def test_only_selected_rows_move(state):
    pre, post = state(0), state(1)
    name = "model.layers.0.self_attn.q_proj.weight"
    path = Additive(pre, post, {name: Selection(((0, 2), (5, 6)))})
    got = dict(path.at(0))
    keep = [2, 3, 4]
    move = [0, 1, 5]
    assert torch.equal(got[name][keep], post[name][keep]) and torch.equal(got[name][move], pre[name][move])
    assert all(torch.equal(got[n], post[n]) for n in post if n != name)
    assert path.kept(name, 1) and not path.kept(name, 0) and path.kept("model.norm.weight", 0)
    assert len(path.at(0)) == len(post)
    with pytest.raises(KeyError):
        path.at(0)["nothing"]


def test_layer_wise(state):
    pre, post = state(0), state(1)
    path = Additive(pre, post)
    got = dict(path.at({0: 0.0, 1: 0.5, None: 1.0}))
    for name in post:
        t = {"0": 0.0, "1": 0.5}.get(name.split(".")[2] if "layers" in name else "", 1.0)
        assert torch.equal(got[name], path.tensor(name, t)), name
    with pytest.raises(ValueError, match=r"tensors of no layer \(None\)"):
        dict(path.at({0: 0.0, 1: 0.5}))
    with pytest.raises(ValueError, match="nothing for layer 1"):
        dict(path.at({0: 0.0, None: 0.5}))
    # a tensor that does not move needs no t
    dict(Additive(pre, post, whole_layers(path.template, {"num_hidden_layers": 2}, [0])).at({0: 0.3}))
    with pytest.raises(ValueError, match="no layer 7"):
        whole_layers(path.template, {"num_hidden_layers": 2}, [7])


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan, math.inf])
def test_t_lies_between(state, t):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        Additive(state(0), state(1)).tensor("model.norm.weight", t)


def test_models_that_do_not_match(state):
    pre, post = state(0), state(1)
    missing = {n: x for n, x in pre.items() if n != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"model.norm.weight is in the model after"):
        Additive(missing, post)
    with pytest.raises(ValueError, match=r"model.norm.weight: shape \(5,\) before training, \(4,\) after"):
        Additive(pre | {"model.norm.weight": torch.zeros(5)}, post)
    with pytest.raises(ValueError, match="ghost and 0 more"):
        Additive(pre, post, {"ghost": Selection()})
    # what is not selected need not match
    Additive(missing, post, {"model.embed_tokens.weight": Selection()})
    with pytest.raises(ValueError, match="cannot be interpolated"):
        Additive(pre | {"model.steps": torch.tensor(5)}, post).tensor("model.steps", 0.5)
    assert Additive(pre | {"model.steps": torch.tensor(5)}, post).tensor("model.steps", 0) == 5


def test_no_number_is_lost_to_nan(state):
    """A NaN stays where it is; an overflow of the difference in fp16 does not happen in fp32."""
    pre, post = {"w": torch.tensor([60000.0, 1.0]).half()}, {"w": torch.tensor([-60000.0, float("nan")]).half()}
    got = Additive(pre, post).tensor("w", 0.5)
    assert got[0] == 0 and got[1].isnan()


def test_dtypes_of_the_two_models_may_differ(state):
    pre, post = state(0, torch.float32), state(1, torch.bfloat16)
    got = dict(Additive(pre, post).at(0))
    assert all(got[n].dtype == post[n].dtype and torch.equal(got[n], pre[n].to(post[n].dtype)) for n in post)


def test_load_into_a_model_with_tied_weights():
    import copy

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    pre = LlamaForCausalLM(config)
    post = copy.deepcopy(pre)
    with torch.no_grad():
        for p in post.parameters():
            p.add_(torch.randn_like(p))
    ends = [{k: v.clone() for k, v in m.state_dict().items() if k != "lm_head.weight"} for m in (pre, post)]
    path = Additive(*ends)
    path.load_into(post, 0.5)
    want = dict(path.at(0.5))
    assert all(torch.equal(post.state_dict()[n], want[n]) for n in want)
    assert torch.equal(post.lm_head.weight, want["model.embed_tokens.weight"])
    other = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="the path has no tensor"):
        path.load_into(other, 0.5)
    smaller = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="the model has no tensor"):
        path.load_into(smaller, 0.5)
    assert everything(path.template).keys() == want.keys()


def tied(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    ))  # fmt: skip


@pytest.mark.parametrize("kind", ["directory", "state dict"])
def test_tied_tensors_are_one_where_a_model_meets_a_file(kind, tmp_path):
    """A file has the embedding once; the model has it as its head too."""
    before, after = tied(0), tied(1)
    before.save_pretrained(tmp_path / "before")
    source = tmp_path / "before"
    if kind == "state dict":
        source = {n: x for n, x in before.state_dict().items() if n != "lm_head.weight"}
    path = Additive(source, after)
    end = dict(path.at(0))
    assert set(end) == set(before.state_dict()) and all(torch.equal(end[n], x) for n, x in before.state_dict().items())
    path.load_into(after, 0)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_half_of_a_tie_cannot_move():
    """Written last, the head would undo what was done to the embedding."""
    before, after = tied(0), tied(1)
    for half in ("model.embed_tokens.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match="are one tensor: select the same of both"):
            Additive(before, after, {half: Selection()})
    names = ("model.embed_tokens.weight", "lm_head.weight")
    with pytest.raises(ValueError, match="are one tensor"):
        Additive(before, after, {n: Selection(((0, i + 1),)) for i, n in enumerate(names)})
    rows = {n: Selection(((0, 2),)) for n in names}
    want = after.lm_head.weight.detach().clone()
    Additive(before, after, rows).load_into(after, 0)
    assert torch.equal(after.lm_head.weight[:2], before.lm_head.weight[:2])
    assert torch.equal(after.lm_head.weight[2:], want[2:])
