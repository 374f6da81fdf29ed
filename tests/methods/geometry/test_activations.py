"""Activation metrics against whole activations and SVDs, the facts they obey, hooks, modes, dtypes, memory, errors."""

import copy

import peft
import pytest
import tiny_models
import torch
from plain import activation

from burnish.methods.geometry import activation_geometry, capability_drift, input_moments
from burnish.methods.geometry.moments import Moments, PairMoments, Sample
from burnish.ops.live_bytes import LiveBytes
from burnish.paths import LoRAScale

D = 12


class Toy(torch.nn.Module):
    """x through some linear maps of its own: ``block`` and ``other`` are given the same x."""

    def __init__(self, weight, bias=None, calls=1):
        super().__init__()
        self.block = torch.nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
        self.other = torch.nn.Linear(weight.shape[1], 3).to(weight.dtype)
        self.ids = torch.nn.Embedding(4, 2)
        self.calls = calls
        with torch.no_grad():
            self.block.weight.copy_(weight)
            self.block.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x, attention_mask=None):
        for i in range(self.calls):
            y = self.block((i + 1) * x)
            y.mul_(0)  # what a hook saw may be written over
        return self.other(x)


def tokens(count=400, d=D, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(2, 0.1, d).double()
    return mean + torch.randn(count, d, generator=g, dtype=torch.float64) * spread


def rotation(d=D, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q


def compare(weight, bias=None, x=None, size=(5, 80), **options):
    """activation_geometry of an identity and of x W^T + b, on x in two batches; and what formulas say."""
    x = tokens() if x is None else x
    base, tuned = Toy(torch.eye(x.shape[1]).double()), Toy(weight, bias)
    batches = [{"x": part.reshape(1, -1, x.shape[1])} for part in x.split(150)]
    got = activation_geometry(base, tuned, batches, "block", **options)["block"]
    return got, activation(x, x @ weight.T + (0 if bias is None else bias), options.get("subspaces", ()))


def test_against_whole_activations():
    g = torch.Generator().manual_seed(9)
    weight = torch.eye(D).double() + 0.2 * torch.randn(D, D, generator=g).double()
    bias = torch.randn(D, generator=g).double()
    got, want = compare(weight, bias, subspaces=(3, 5))
    assert got.pop("tokens") == 400
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=2e-6 if key == "gram_cosine_dist" else 1e-9), key
    assert all(v > 0.01 for v in got.values())


def test_facts():
    """2.4, facts 6 and 7."""
    r = rotation()
    got, _ = compare(r, subspaces=(4,))
    assert got["proc_residual"] < 1e-6 and got["gram_cosine_dist"] < 1e-6
    assert got["linear_cka"] == pytest.approx(1, abs=1e-12)
    assert got["raw_residual"] > 0.5 and got["mean_cosine_drift"] > 0.5 and got["log_norm_ratio"] < 1e-12
    got, want = compare(r, torch.full((D,), 0.3).double(), subspaces=(4,))
    assert got["proc_residual"] < 1e-6 and got["linear_cka"] == pytest.approx(1, abs=1e-12)
    assert got["gram_cosine_dist"] == pytest.approx(want["gram_cosine_dist"], rel=1e-5) and want["shift"] > 0.2
    assert 0.2 < want["gram_cosine_dist"] < 0.6  # the specification's .43 is of other tokens
    got, _ = compare(2 * torch.eye(D).double(), subspaces=(4,))
    assert got["proc_residual"] == pytest.approx(1, abs=1e-9) == got["raw_residual"]
    assert got["linear_cka"] == pytest.approx(1, abs=1e-12)
    assert got["gram_cosine_dist"] < 1e-6 and got["mean_cosine_drift"] < 1e-12 and got["subspace_dist_4"] < 1e-7
    assert got["log_norm_ratio"] == pytest.approx(0.6931471805599453, rel=1e-12)
    got, _ = compare(torch.eye(D).double(), subspaces=(4,))
    assert got.pop("tokens") == 400 and got.pop("linear_cka") == pytest.approx(1)
    assert got.pop("proc_residual") < 1e-6
    assert all(abs(v) < 1e-7 for v in got.values())


def test_small_angles_keep_their_digits():
    """arccos of a cosine in fp64 cannot tell 1e-9 from 0."""
    turn = torch.eye(2).double()
    turn[0, 1], turn[1, 0] = -1e-9, 1e-9
    got, _ = compare(turn, x=tokens(d=2))
    assert got["angle_mean"] == pytest.approx(1e-9, rel=1e-6) == got["angle_median"]
    assert got["mean_cosine_drift"] == pytest.approx(5e-19, rel=1e-6)


def test_the_median_is_exact_and_zero_rows_count():
    x = tokens(7)
    x[2] = 0
    shear = torch.eye(D).double()
    shear[0] += 1
    for part in (x, x[:6]):
        got, _ = compare(shear, x=part)
        y = part @ shear.T
        cosines = (part * y).sum(1) / (part.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-300)
        angles = cosines.arccos().where(part.norm(dim=1) > 0, 0.0)
        assert got["angle_median"] == pytest.approx(float(angles.quantile(0.5)), rel=1e-9)
    got, _ = compare(shear, torch.ones(D).double(), x=x)  # zero becomes something: at a right angle, of no ratio
    y = x @ shear.T + 1
    ratios = [float((b.norm() / a.norm()).log().abs()) for a, b in zip(x, y, strict=True) if a.norm() > 0]
    assert got["log_norm_ratio"] == pytest.approx(sum(ratios) / 6)
    drift = [1 - float(a @ b / (a.norm() * b.norm())) if a.norm() > 0 else 1 for a, b in zip(x, y, strict=True)]
    assert got["mean_cosine_drift"] == pytest.approx(sum(drift) / 7)


@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_large_means_do_not_cancel(mean):
    x = tokens(3000, mean=mean)
    weight = torch.eye(D).double() + 0.1 * rotation()
    centred = x - x.mean(0)
    exact = activation(centred, centred @ weight.T, (4,))
    # a stream of sums of products would have lost this much
    raw = x.T @ x - len(x) * torch.outer(x.mean(0), x.mean(0))
    naive = float((raw - centred.T @ centred).norm() / raw.norm())
    moments, spread = PairMoments(), Moments()
    for part in x.split(37):
        moments.update(part, part @ weight.T)
        spread.update(part)
    assert moments.count == 3000 and torch.allclose(moments.means[0], x.mean(0), rtol=1e-14)
    y = x @ weight.T - (x @ weight.T).mean(0)
    for got, want in (
        (moments.s00, centred.T @ centred), (moments.s01, centred.T @ y), (moments.s11, y.T @ y),
        (torch.tensor(spread.square, dtype=torch.float64), centred.square().sum()),
    ):
        assert (got - want).norm() / want.norm() < 1e-4 * naive
    got, _ = compare(weight, x=x, subspaces=(4,))
    for key in ("raw_residual", "proc_residual", "linear_cka", "subspace_dist_4"):
        assert got[key] == pytest.approx(exact[key], rel=1e-7), key


def test_batches_padding_and_labels_change_nothing():
    x = tokens(120).reshape(4, 30, D)
    lengths = (30, 11, 0, 24)
    mask = torch.zeros(4, 30, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 30 - length :] = 1  # padding on the left
    kept = torch.cat([x[i, 30 - n :] for i, n in enumerate(lengths)])
    noisy = x.clone()
    noisy[mask == 0] = 1e30
    base, tuned = Toy(torch.eye(D).double()), Toy(rotation() + 0.3)
    want = activation_geometry(base, tuned, [{"x": kept[None]}], ["block"], sample=20, subspaces=(2,))["block"]
    for size in (1, 3, 4):
        batches = [
            {"x": a, "attention_mask": m} for a, m in zip(noisy.split(size), mask.split(size), strict=True)
        ]
        got = activation_geometry(base, tuned, iter(batches), ["block"], sample=20, subspaces=(2,))["block"]
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=1e-10), key
    # one dimension less: (B T, d) outputs have a row for each token as well
    other = activation_geometry(base, tuned, [{"x": kept[None]}], ["block"], sample=20, seed=1)["block"]
    assert other["gram_cosine_dist"] != want["gram_cosine_dist"] and other["angle_mean"] == want["angle_mean"]


def test_the_sample_is_uniform_and_follows_the_stream():
    counts = torch.zeros(50)
    for seed in range(400):
        held = {}
        sample, at = Sample(10, seed), 0
        for n in (3, 20, 1, 0, 26):
            slots, tokens_ = sample.update(n)
            held |= {int(s): at + int(t) for s, t in zip(slots, tokens_, strict=True)}
            at += n
        assert sorted(held) == list(range(10)) and len(set(held.values())) == 10
        counts[list(held.values())] += 1
        whole = Sample(10, seed).update(50)[1]
        assert set(held.values()) == set(whole.tolist())  # whatever the batches
    assert counts.sum() == 4000 and (counts - 80).abs().max() < 4.5 * (400 * 0.2 * 0.8) ** 0.5


def models(dtype=torch.float32, size=0.1):
    base = tiny_models.llama().to(dtype)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules="all-linear"))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return base, model


def outputs(model, batch, name):
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _m, _i, o: seen.append(o.detach()))
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return seen[0][batch["attention_mask"].bool()].double()


def test_a_peft_model_beside_its_base():
    base, model = models()
    batches = [tiny_models.batch(i, length=17) for i in range(3)]
    model.train()
    base.model.layers[1].train()
    base.model.layers[0].eval()
    modes = {n: m.training for n, m in (*base.named_modules(prefix="a"), *model.named_modules(prefix="b"))}
    got = activation_geometry(base, model, batches, ["layers.1.self_attn.q_proj", "down_proj"], subspaces=(8,))
    assert modes == {n: m.training for n, m in (*base.named_modules(prefix="a"), *model.named_modules(prefix="b"))}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*base.modules(), *model.modules()))
    names = ["model.layers.1.self_attn.q_proj", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))]
    assert list(got) == names
    for name in names:
        x0 = torch.cat([outputs(base, b, name) for b in batches])
        x1 = torch.cat([outputs(model, b, f"base_model.model.{name}") for b in batches])
        want = activation(x0, x1, (8,))
        for key, value in want.items():
            assert got[name][key] == pytest.approx(value, rel=1e-5), (name, key)
    paper = activation_geometry(base, model, batches)
    assert list(paper) == [
        f"model.layers.{i}.{n}" for i in (0, 1)
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    ]  # fmt: skip
    assert "subspace_dist_32" not in paper["model.layers.0.mlp.down_proj"]  # of 32 columns


def test_dtypes_may_differ_and_fp16_does_not_overflow():
    base, model = models()
    half = copy.deepcopy(base).to(torch.bfloat16)
    batches = [tiny_models.batch()]
    apart = activation_geometry(half, model, batches, "down_proj")
    same = activation_geometry(base, model, batches, "down_proj")
    for name in same:
        assert apart[name]["raw_residual"] == pytest.approx(same[name]["raw_residual"], rel=0.1)
    # 20000 squared is beyond fp16
    big, turned = Toy(torch.eye(4).half() * 100), Toy(rotation(4).half() * 100)
    found = activation_geometry(big, turned, [{"x": 200 * torch.ones(1, 3, 4).half()}], "block")["block"]
    assert found["log_norm_ratio"] < 0.01 and found["angle_mean"] > 0.1


def test_a_module_that_is_used_twice():
    twice, turned = Toy(torch.eye(D).double(), calls=2), Toy(rotation() * 1.5, calls=2)
    x = tokens(60)
    got = activation_geometry(twice, turned, [{"x": x[None]}], "block", subspaces=())["block"]
    both = torch.cat([x, 2 * x])
    want = activation(both, both @ (1.5 * rotation()).T)
    assert got["tokens"] == 120
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-5 if key == "gram_cosine_dist" else 1e-9, abs=1e-6), key
    with pytest.raises(ValueError, match="block: called less often in tuned than in base"):
        activation_geometry(twice, Toy(rotation()), [{"x": x[None]}], "block")
    with pytest.raises(ValueError, match="block: called more often in tuned than in base"):
        activation_geometry(Toy(rotation()), twice, [{"x": x[None]}], "block")
    assert not twice.block._forward_hooks


def test_memory_does_not_grow_with_tokens():
    d, batch = 64, 512
    base, tuned = Toy(torch.eye(d)), Toy(rotation(d).float())

    def peak(count):
        def batches():
            g = torch.Generator().manual_seed(0)
            for _ in range(count):
                yield {"x": torch.randn(1, batch, d, generator=g)}

        with LiveBytes() as live:
            activation_geometry(base, tuned, batches(), "block", sample=128)
        return live.peak

    few, many = peak(4), peak(40)
    assert many - few <= 8 * batch * 36 + 4096  # one fp64 a token, no more
    # a batch's x, outputs and the copy of base's; moments; the sample; a chunk's fp64 copies; the angles when joined
    assert many <= 6 * 4 * batch * d + 12 * 8 * d * d + 8 * 4 * 128 * d + 12 * 8 * 512 * d + 3 * 8 * batch * 40
    moments = input_moments(base, ({"x": torch.zeros(1, batch, d)} for _ in range(4)), "block")
    assert moments["block"].second.shape == (d, d)


def test_activation_errors_leave_no_hooks():
    base, tuned = Toy(torch.eye(D).double()), Toy(rotation())
    x = {"x": tokens(20)[None]}

    def run(match, a=base, b=tuned, batches=(x,), modules="block", **options):
        with pytest.raises(ValueError, match=match):
            activation_geometry(a, b, batches, modules, **options)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*a.modules(), *b.modules()))
        assert all(m.training for m in a.modules())

    run("base and tuned share block", b=base)
    _, model = models()
    run("base and tuned share model.layers.0", a=model.get_base_model().train(), b=model.train(), modules="down_proj")
    run("no numbered layers|has no q_proj", modules="paper8")
    run("modules: nothing is no module", modules=["nothing"])
    run("modules: none are given", modules=[])
    run("the other model has no other", b=torch.nn.ModuleDict({"block": torch.nn.Linear(2, 2)}), modules="other")
    run("ids: not called in the forward pass", modules="ids")
    run(r"block: outputs \(20, 12\) in base, \(20, 5\) in tuned", b=Toy(rotation()[:5]))
    run("block: 12 columns need 0.0 GB of moments", widest=11)
    run("block: 1 tokens; two are needed", batches=[{"x": tokens(1)[None]}])
    run("block: 0 tokens; two are needed", batches=[])
    run("block has outputs that are not finite", batches=[{"x": tokens(20)[None] * float("nan")}])
    run("sample must be at least 1", sample=0)
    run("subspaces must be at least 1", subspaces=(0,))
    run("no row for each token", batches=[{**x, "attention_mask": torch.ones(1, 19)}])
    run("attention_mask: ", batches=[{**x, "attention_mask": torch.ones(1, 1, 20)}])

    def broken(model, batch):
        model(**batch)
        raise RuntimeError("in the model")

    with pytest.raises(RuntimeError, match="in the model"):
        activation_geometry(base, tuned, [x], "block", forward=broken)
    assert not base.block._forward_hooks and base.training


def test_capability_drift_is_the_mean_over_tokens():
    base, model = models()
    after = copy.deepcopy(model).merge_and_unload()
    batches = [tiny_models.batch(i, length=17) for i in range(3)]
    moments = input_moments(base, batches, ["q_proj", "down_proj"])
    got = capability_drift(base, after, moments)
    assert len(got) == 4
    for name in got:
        seen = []
        handle = base.get_submodule(name).register_forward_hook(lambda _m, i, _o, seen=seen: seen.append(i[0].detach()))
        with torch.no_grad():
            for b in batches:
                base.eval()(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
        handle.remove()
        h = torch.cat([s[b["attention_mask"].bool()] for s, b in zip(seen, batches, strict=True)]).double()
        w0, w1 = (m.get_submodule(name).weight.detach().double() for m in (base, after))
        delta = w1 - w0
        moved, kept = ((h @ x.T).square().sum(1).mean() for x in (delta, w0))
        assert moments[name].tokens == len(h)
        assert got[name]["csd_abs"] == pytest.approx(float(moved), rel=1e-6)
        assert got[name]["csd_rel"] == pytest.approx(float(moved / kept), rel=1e-6)
        un = moved / (delta.square().sum() * h.square().sum(1).mean())
        assert got[name]["csd_un"] == pytest.approx(float(un), rel=1e-6)
    # along a path: the square of the distance
    half = capability_drift(base, LoRAScale.of(model).at(0.5), moments)
    for name in got:
        assert half[name]["csd_abs"] == pytest.approx(got[name]["csd_abs"] / 4, rel=1e-4)
        assert half[name]["csd_un"] == pytest.approx(got[name]["csd_un"], rel=1e-4)
    zero = capability_drift(base, base, moments)
    assert all(v == 0 for m in zero.values() for v in m.values())


def test_isotropic_inputs_and_gpt2():
    """2.4, fact 5: CSD_un d_in = 1; and a weight that is stored the other way."""
    h = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    base, after = Toy(rotation()[:7]), Toy(rotation(seed=6)[:7] * 3)
    moments = input_moments(base, [{"x": h[None]}], "block")
    assert capability_drift(base, after, moments)["block"]["csd_un"] * D == pytest.approx(1, rel=1e-9)
    gpt = tiny_models.gpt2()
    other = copy.deepcopy(gpt)
    name = "transformer.h.0.attn.c_attn"
    with torch.no_grad():
        other.get_submodule(name).weight.mul_(1.5)
    found = capability_drift(gpt, other, input_moments(gpt, [tiny_models.batch()], name))[name]
    assert found["csd_rel"] == pytest.approx(0.25, rel=1e-9)


def test_capability_errors():
    base = Toy(rotation()[:7])
    x = {"x": tokens(20)[None]}
    for match, call in (
        ("ids: a linear module is needed; got Embedding", lambda: input_moments(base, [x], "ids")),
        ("block: 12 inputs need 0.0 GB", lambda: input_moments(base, [x], "block", widest=5)),
        ("block: not called in the forward pass, or no tokens", lambda: input_moments(base, [], "block")),
        ("block has inputs that are not finite", lambda: input_moments(base, [{"x": x["x"] / 0}], "block")),
    ):
        with pytest.raises(ValueError, match=match):
            call()
        assert not base.block._forward_pre_hooks and base.training
    moments = input_moments(base, [x], "block")
    with pytest.raises(ValueError, match=r"post has no tensor block.weight"):
        capability_drift(base, {"w": torch.ones(2, 2)}, moments)
    with pytest.raises(ValueError, match="5 columns; the moments are of 12 inputs"):
        capability_drift({"block.weight": torch.ones(7, 5)}, {"block.weight": torch.ones(7, 5)}, moments)
