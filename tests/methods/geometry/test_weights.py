"""Weight metrics against their formulas by SVD in fp64, the facts they obey, real adapters, memory, errors."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import tiny_models
import torch
from plain import profiles
from safetensors.torch import save_file

from burnish.methods.geometry import average, intruder_dimensions, weight_geometry
from burnish.ops.live_bytes import LiveBytes
from burnish.paths import LoRAScale, OFTGenerator

ALL = ("drift", "spectrum", "profiles", "subspace")
SHAPES = {"tall": (60, 24), "wide": (24, 60), "square": (33, 33)}
#: SmolLM2-135M's: a query, a key and a down projection.
SMOLLM2 = {"q": (576, 576), "k": (192, 576), "down": (576, 1536)}


def pair(shape, dtype=torch.float64, size=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g, dtype=torch.float64)
    return w.to(dtype), (w + size * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def one(w0, w1, **options):
    return weight_geometry({"w": w0}, {"w": w1}, **{"groups": ALL, "profiles": True, **options})["w"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*SHAPES, *SMOLLM2])
def test_against_svd(name, dtype):
    if name in SMOLLM2 and dtype != torch.float32:
        pytest.skip("one dtype of the large")
    w0, w1 = pair({**SHAPES, **SMOLLM2}[name], dtype)
    got = one(w0, w1, groups=ALL[:3])
    s, dp, e = profiles(w0.double(), w1.double())
    delta = w1.double() - w0.double()
    values = torch.linalg.svdvals(delta)
    # what plain torch loses when it does this in fp32, as the official code does
    s32, dp32, e32 = profiles(w0.float(), w1.float())
    assert got["rank"] == len(s)
    for key, exact, single in (("singular_values", s, s32), ("retention", dp, dp32), ("adaptation", e, e32)):
        error, plain = (got[key] - exact).abs().max(), (single.double() - exact).abs().max()
        assert error <= 0.05 * plain + 1e-12, (key, error, plain)
    for key, exact in (
        ("frobenius", delta.norm()), ("relative", delta.norm() / w0.double().norm()), ("spectral", values[0]),
        ("stable_rank", (values / values[0]).square().sum()), ("nuclear", values.sum()),
        ("retention_mean", dp.mean()), ("retention_max", dp.max()), ("adaptation_mean", e.mean()),
        ("adaptation_max", e.max()), ("adaptation_outside", 1 - e.square().sum() / delta.norm() ** 2),
        ("input_alignment",
         w0.shape[1] * (delta @ w0.double().T).norm() ** 2 / (w0.double().norm() * delta.norm()) ** 2),
    ):  # fmt: skip
        assert got[key] == pytest.approx(float(exact), rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("name", SHAPES)
def test_facts_of_the_profiles(name):
    """2.4, fact 5."""
    w0, w1 = pair(SHAPES[name])
    got = one(w0, w1)
    total = float((w1 - w0).square().sum())
    inside = float(got["adaptation"].square().sum())
    assert inside == pytest.approx(total * (1 - got["adaptation_outside"]), rel=1e-12)
    if name != "wide":  # the thin V is the full one
        assert inside == pytest.approx(total, rel=1e-12) and got["adaptation_outside"] < 1e-12
    else:
        assert 0.5 < got["adaptation_outside"] < 0.7  # 36 of 60 inputs
    assert (got["adaptation"] >= got["retention"] - 1e-12).all()
    scaled = one(w0, 1.25 * w0)
    assert torch.allclose(scaled["adaptation"], 0.25 * scaled["singular_values"], rtol=1e-10)
    assert torch.allclose(scaled["retention"], 0.25 * scaled["singular_values"], rtol=1e-10)
    assert scaled["overlap_left"] == pytest.approx(1) and scaled["angle_right"] < 1e-3
    low = one(w0, w0 + torch.randn(w0.shape[0], 3).double() @ torch.randn(3, w0.shape[1]).double())
    assert 1 <= low["stable_rank"] <= 3
    values = torch.linalg.svdvals(low["adaptation"].new_tensor(0) + w0)
    assert torch.allclose(low["singular_values"], values, rtol=1e-11)
    still = one(w0, w0)
    assert all(still[k] == 0 for k in ("frobenius", "relative", "stable_rank", "nuclear", "retention_max",
                                       "adaptation_max", "adaptation_outside", "input_alignment"))  # fmt: skip
    assert still["sva_right"] == pytest.approx(1, abs=1e-9) and still["overlap_left"] == pytest.approx(1, abs=1e-9)


def test_a_matrix_that_does_not_read_all_inputs():
    """Directions below rounding are no directions: their energy is outside."""
    g = torch.Generator().manual_seed(3)
    w0 = torch.randn(40, 5, generator=g).double() @ torch.randn(5, 30, generator=g).double()
    delta = torch.randn(40, 30, generator=g).double()
    got = one(w0, w0 + delta)
    v = torch.linalg.svd(w0).Vh[:5]
    assert got["rank"] == 5 == len(got["retention"])
    assert got["adaptation_outside"] == pytest.approx(1 - float((delta @ v.T).square().sum() / delta.square().sum()))
    zero = one(torch.zeros(6, 4), torch.ones(6, 4))
    assert zero["rank"] == 0 and zero["relative"] == float("inf") and zero["adaptation_outside"] == 1


def test_alignment_tells_where_the_update_reads():
    u, s, vh = torch.linalg.svd(torch.randn(30, 30).double())
    s = torch.linspace(3, 0.1, 30).double()
    w0 = u @ torch.diag(s) @ vh
    first, last = (one(w0, w0 + torch.outer(u[:, 3], vh[i]))["input_alignment"] for i in (0, -1))
    mean = float(s.square().mean())
    assert first == pytest.approx(9 / mean) and last == pytest.approx(0.01 / mean)


def test_subspaces_against_svd():
    for shape in SHAPES.values():
        w0, w1 = pair(shape, size=0.02)
        got = one(w0, w1, directions=4, gap=0.0)
        (u0, _, v0), (u1, _, v1) = (torch.linalg.svd(w, full_matrices=False) for w in (w0, w1))
        for side, a, b in (("left", u0, u1), ("right", v0.T, v1.T)):
            alone = (a * b).sum(0).abs()
            assert torch.allclose(got[f"sva_{side}_profile"], alone, atol=1e-9)
            assert torch.allclose(got[f"overlap_{side}_profile"], alone, atol=1e-9)  # clusters of one
            angles = torch.linalg.svdvals(a[:, :4].T @ b[:, :4]).clamp(max=1).arccos().rad2deg()
            assert got[f"angle_{side}"] == pytest.approx(float(angles.max()), rel=1e-6)
            assert got[f"angle_{side}_mean"] == pytest.approx(float(angles.mean()), rel=1e-4)


def test_inside_a_cluster_only_the_subspace_counts():
    """2.3, 4: equal singular values, another basis of theirs, the same matrix to 1e-6."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(20, 20, generator=g).double()).Q for _ in range(2))
    s = torch.tensor([8.0] * 6 + [4.0] * 6 + [2.0] * 8).double()
    w0 = u @ torch.diag(s * (1 + 1e-7 * torch.randn(20, generator=g).double())) @ v.T
    w1 = w0 + 1e-6 * torch.randn(20, 20, generator=g).double()
    got = one(w0, w1, directions=3)
    assert got["sva_right"] < 0.7 and got["sva_left"] < 0.7
    assert got["overlap_right"] > 1 - 1e-9 and got["overlap_left"] > 1 - 1e-9
    assert got["cluster"].tolist() == [0] * 6 + [1] * 6 + [2] * 8
    assert got["angle_right"] < 1e-3  # of six vectors: three of them alone would be some of the cluster


def adapted(config, seed=0, size=0.1):
    base = tiny_models.llama(seed)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return base, model


def test_an_orthogonal_adapter_turns_inputs_only():
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False)
    base, model = adapted(config)
    path = OFTGenerator.of(model)
    got = weight_geometry(base, path.at(1.0), groups=ALL)
    moved = {n for n, m in got.items() if m["frobenius"] > 0}
    assert moved == set(path.modules) and len(moved) == 4
    for n in moved:
        assert got[n]["overlap_left"] > 1 - 1e-5 and got[n]["sva_right"] < 0.99 and got[n]["angle_left"] < 1
    # a path's point is read as it is, not made whole
    half = weight_geometry(path.at(0), path.at(0.5), names=sorted(moved), groups=["drift"])
    assert all(0 < half[n]["frobenius"] < got[n]["frobenius"] for n in moved)


def test_lora_by_merge_by_path_and_from_directories(tmp_path):
    base, model = adapted(peft.LoraConfig(r=4, target_modules="all-linear"))
    merged = copy.deepcopy(model).merge_and_unload()
    want = weight_geometry(base, merged)
    assert len(want) == 7 * 2 + 2 and all(m["stable_rank"] <= 4 + 1e-4 for m in want.values())
    assert want["model.embed_tokens.weight"]["frobenius"] == 0
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    merged.save_pretrained(tmp_path / "tuned")
    assert weight_geometry(tmp_path / "base", tmp_path / "tuned") == want
    along = weight_geometry(base, LoRAScale.of(model).at(1.0))
    assert average(along)["relative"] == pytest.approx(average(want)["relative"], rel=1e-5)
    assert average(along, ["lm_head.weight"])["relative"] == 0
    json.dumps(want)  # nothing but numbers


def test_large_matrices_are_estimated():
    w0, w1 = pair((70, 90), torch.float32)
    exact, got = one(w0, w1, profiles=False), one(w0, w1, exact_below=50, probes=64)
    assert set(got) == {
        "frobenius", "relative", "spectral", "stable_rank", "input_alignment", "input_alignment_error"
    }  # fmt: skip
    for key in ("frobenius", "relative", "spectral", "stable_rank"):
        assert got[key] == pytest.approx(exact[key], rel=1e-5)
    error = got["input_alignment_error"]
    assert abs(got["input_alignment"] - exact["input_alignment"]) < 4 * error and 0 < error < 0.1
    many = [one(w0, w1, exact_below=0, probes=8, seed=i) for i in range(60)]
    values = torch.tensor([m["input_alignment"] for m in many])
    assert abs(float(values.mean()) - exact["input_alignment"]) < 4 * float(values.std()) / 60**0.5
    mean_error = sum(m["input_alignment_error"] for m in many) / 60
    assert float(values.std()) == pytest.approx(mean_error, rel=0.35)


def test_memory_is_two_tensors_blocks_and_small_squares(tmp_path):
    shape, r = (60000, 64), 64
    g = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tensors = {f"{i}.weight": torch.randn(shape, generator=g) for i in range(3)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    del tensors
    two, block, square = 2 * 4 * shape[0] * r, 8 << 19, 8 * r * r
    with LiveBytes() as live:
        weight_geometry(tmp_path / "a", tmp_path / "b", groups=ALL)
    assert live.peak <= two + 4 * block + 16 * square
    with LiveBytes() as live:
        intruder_dimensions(tmp_path / "a", tmp_path / "b")
    assert live.peak <= two + 4 * block + 16 * square
    with LiveBytes() as live:
        weight_geometry(tmp_path / "a", tmp_path / "b", groups=["drift"])
    assert live.peak <= two + 4 * block
    with LiveBytes() as live:
        weight_geometry(tmp_path / "a", tmp_path / "b", exact_below=0)
    assert live.peak <= max(two + 4 * block, two + 4 * 64 * (shape[0] + r) + block)  # and Lanczos' vectors


def test_empty_matrices_and_imports():
    for exact in (0, 10):
        got = weight_geometry({"w": torch.zeros(0, 4)}, {"w": torch.zeros(0, 4)}, groups=ALL, exact_below=exact)["w"]
        assert all(v == 0 for v in got.values())
    code = "import sys, burnish.methods.geometry; assert not {'transformers', 'trl', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_neither_model_is_written_to():
    w0, w1 = pair((20, 20))
    before = w0.clone(), w1.clone()
    for n in (0, 100):
        one(w0, w1, exact_below=n)
        intruder_dimensions({"w": w0}, {"w": w1})
    assert torch.equal(w0, before[0]) and torch.equal(w1, before[1])


def test_which_matrices():
    tied = tiny_models.llama(tied=True)
    other = copy.deepcopy(tied)
    got = weight_geometry(tied, other, groups=["drift"])
    assert "model.embed_tokens.weight" in got and "lm_head.weight" not in got and len(got) == 15
    asked = weight_geometry(tied, other, ["lm_head.weight"], groups=["drift"])
    assert list(asked) == ["lm_head.weight"]
    # stored once on one side
    stored = {n: x for n, x in other.state_dict().items() if n != "lm_head.weight"}
    assert list(weight_geometry(tied, stored, groups=["drift"])) == list(got)
    assert list(weight_geometry(stored, tied, groups=["drift"])) == list(got)
    _, model = adapted(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    base = tiny_models.llama()
    with pytest.raises(ValueError, match=r"is in the model after training and not in the one before: merge adapters"):
        weight_geometry(base, model)
    with pytest.raises(ValueError, match=r"q_proj.base_layer.weight is in the model after"):
        weight_geometry(base, model.get_base_model())
    fewer = {n: x for n, x in base.state_dict().items() if "down" not in n}
    with pytest.raises(ValueError, match=r"down_proj.weight is in the model before training, not after it"):
        weight_geometry(base, fewer)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"names": ["x"]}, "names: x is not in the model before"),
        ({"names": ["v"], "post": {"v": torch.zeros(3)}}, r"names: v is no matrix: its shape is \(3,\)"),
        ({"groups": ["drif"]}, "groups: 'drif' is none of drift, spectrum"),
        ({"window": 4}, "window must be odd"),
        ({"gap": 1.0}, r"gap must lie in \[0, 1\)"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"probes": 1}, "probes must be at least 2"),
        ({"post": {"w": torch.zeros(3, 4), "v": torch.zeros(3)}}, r"w: shape \(4, 3\) before training, \(3, 4\) after"),
        ({"post": {"w": torch.full((4, 3), float("nan")), "v": torch.zeros(3)}}, "w has values that are not finite"),
        ({"post": {"w": torch.full((4, 3), float("inf"))}, "exact_below": 0}, "not finite"),
        ({"post": {"w": torch.zeros(4, 3, dtype=torch.int8)}, "names": ["w"]}, "w: dtype torch.int8"),
        ({"pre": {"v": torch.zeros(3)}, "post": {"v": torch.zeros(3)}}, "no matrix of floating point"),
    ],
)
def test_errors(change, match):
    given = {"pre": {"w": torch.zeros(4, 3), "v": torch.zeros(3)}, "post": {"w": torch.ones(4, 3)}} | change
    with pytest.raises(ValueError, match=match):
        weight_geometry(**given)
    with pytest.raises(TypeError, match="a state dict is needed"):
        weight_geometry(3, given["pre"])
