"""QK-Restore on real hybrid classes and on disk: the facts of specs/post.md 1.4."""

import copy
import json

import hybrids
import pytest
import torch
from safetensors.torch import load_file

from burnish.methods.qk_restore import QKRestoreOptions, drift, principal_angles, restore, restore_path
from burnish.methods.qk_restore.restore import REPORT
from burnish.paths import Additive, as_tensors, everything
from burnish.paths.blend import parts as selected


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def load(folder):
    out = {}
    for file in folder.glob("*.safetensors"):
        out |= load_file(file)
    return out


@pytest.fixture(scope="module")
def pair():
    before = hybrids.model("granitemoehybrid").bfloat16()
    return before, hybrids.trained(before)


@pytest.fixture
def folders(pair, tmp_path):
    return saved(pair[0], tmp_path / "pre"), saved(pair[1], tmp_path / "post", max_shard_size="12KB")


@pytest.mark.parametrize("name", hybrids.HYBRIDS)
def test_a_perturbed_router_is_repaired_exactly(name, tmp_path):
    """Fact 7, for every hybrid class here, through the files on disk: only W_Q and W_K of softmax layers moved, and the
    restored model's logits are the first model's to the bit."""
    from transformers import AutoModelForCausalLM

    pre = hybrids.model(name)
    saved(pre, tmp_path / "pre")
    post = copy.deepcopy(pre)
    state, generator = post.state_dict(), torch.Generator().manual_seed(1)
    for tensor, selection in restore_path(pre, pre).selector.items():
        for rows in selected(state[tensor], selection):
            rows.add_(torch.randn(rows.shape, generator=generator))
    saved(post, tmp_path / "post")
    report = restore(tmp_path / "pre", tmp_path / "post", tmp_path / "out")
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n).eval() for n in ("pre", "post", "out")]
    with torch.no_grad():
        a, b, c = (m(input_ids=ids).logits for m in models)
    assert torch.equal(a, c) and not torch.equal(a, b)
    assert report.layers == hybrids.HYBRIDS[name][2]


def test_nothing_else_changes(pair, folders, tmp_path):
    """Fact 1: two tensors a softmax layer, bit for bit, in post's dtype; the rest is post's."""
    report = restore(*folders, tmp_path / "out")
    pre, post, out = (load(f) for f in (*folders, tmp_path / "out"))
    assert out.keys() == post.keys()
    changed = {n for n in out if not torch.equal(out[n], post[n])}
    assert changed == {f"model.layers.1.self_attn.{p}_proj.weight" for p in "qk"}
    assert all(torch.equal(out[n], pre[n]) for n in changed)
    assert all(out[n].dtype == post[n].dtype for n in out)
    differ = sum(int((post[n] != pre[n]).sum()) for n in changed)
    assert report.bytes_changed == 2 * differ > 0
    for row in report.tensors:
        want = (post[row.name].double() - pre[row.name].double()).norm() / pre[row.name].double().norm()
        assert row.relative == pytest.approx(float(want), rel=1e-12)
    note = json.loads((tmp_path / "out" / REPORT).read_text())
    assert note["bytes_changed"] == report.bytes_changed and note["layers"] == [1]
    assert note["options"]["alpha"] == 1 and note["field"] == "layer_types"
    assert "dry run" not in str(report) and "layer_types" in str(report) and "biases restored" in str(report)


def test_idempotent_and_identity(folders, tmp_path):
    pre, post = folders
    restore(pre, post, tmp_path / "once")
    again = restore(pre, tmp_path / "once", tmp_path / "twice")
    assert again.bytes_changed == 0
    one, two = load(tmp_path / "once"), load(tmp_path / "twice")
    assert all(torch.equal(one[n], two[n]) for n in one)
    same = restore(pre, pre, tmp_path / "same")
    assert same.bytes_changed == 0 and all(torch.equal(load(tmp_path / "same")[n], x) for n, x in load(pre).items())


def test_everything_is_the_model_before(pair):
    """Fact 2."""
    pre, post = pair
    path = Additive(pre, post, everything(as_tensors(post)))
    assert all(torch.equal(path.tensor(n, 0), x) for n, x in pre.state_dict().items())
    parts = restore_path(pre, post, options=QKRestoreOptions(parts=("q", "k", "v", "o"), layers="softmax"))
    attention = {n for n in pre.state_dict() if "layers.1.self_attn" in n}
    assert set(parts.selector) == attention
    assert all(torch.equal(parts.tensor(n, 0), pre.state_dict()[n]) for n in attention)


@pytest.mark.parametrize("parts", [("q",), ("k",), ("v",), ("v", "o")])
def test_ablations(pair, parts):
    got = restore_path(*pair, options=QKRestoreOptions(parts=parts))
    assert set(got.selector) == {f"model.layers.1.self_attn.{p}_proj.weight" for p in parts}


def test_alpha_goes_part_of_the_way(folders, tmp_path):
    report = restore(*folders, tmp_path / "half", alpha=0.5)
    pre, post, out = (load(f) for f in (*folders, tmp_path / "half"))
    for row in report.tensors:
        a, b = pre[row.name].double(), post[row.name].double()
        assert torch.equal(out[row.name], (b + 0.5 * (a - b)).float().bfloat16())
        assert row.changed == int((out[row.name] != post[row.name]).sum())
    none = restore(*folders, alpha=0.0)
    assert none.bytes_changed == 0 and none.tensors[0].relative > 0


def test_dry_run_writes_nothing(folders, tmp_path):
    before = sorted(p for p in tmp_path.rglob("*"))
    report = restore(*folders, angles=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert "dry run" in str(report) and report.out is None and report.bytes_changed > 0
    assert all(0 < t.angle <= 90 for t in report.tensors) and "°" in str(report)


def test_flags(tmp_path):
    """Sliding-window layers, q and k norms and biases: each only when asked, and printed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    base = {**hybrids.BASE, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    base |= {"sliding_window": 4, "use_sliding_window": True}
    torch.manual_seed(0)
    pre = Qwen2ForCausalLM(Qwen2Config(**base))
    picked = restore_path(pre, hybrids.trained(pre)).selector
    assert {n.rsplit(".", 1)[1] for n in picked} == {"weight", "bias"} and len(picked) == 4
    without = QKRestoreOptions(include_bias=False)
    assert len(restore_path(pre, pre, options=without).selector) == 2
    wide = QKRestoreOptions(include_swa=True)
    assert len(restore_path(pre, pre, options=wide).selector) == 8
    other = Qwen3ForCausalLM(Qwen3Config(**base, head_dim=8))
    assert len(restore_path(other, other).selector) == 2
    norms = QKRestoreOptions(include_qk_norm=True)
    assert len(restore_path(other, other, options=norms).selector) == 4
    saved(pre, tmp_path / "pre")
    said = str(restore(tmp_path / "pre", tmp_path / "pre", options=wide, include_bias=False))
    assert "biases kept, q and k norms kept, sliding-window layers restored" in said


def test_models_that_do_not_match(folders, tmp_path):
    pre, post = folders
    config = json.loads((pre / "config.json").read_text())

    def other(**changes):
        (pre / "config.json").write_text(json.dumps({**config, **changes}))
        return pre

    with pytest.raises(ValueError, match="model_type 'qwen3'"):
        restore(other(model_type="qwen3"), post)
    with pytest.raises(ValueError, match="differ in their layers' types"):
        restore(other(layer_types=["mamba", "mamba", "attention"]), post)
    with pytest.raises(ValueError, match="attention before training"):
        restore(other(num_attention_heads=8), post)
    assert any("rope_theta" in n for n in restore(other(rope_theta=5.0), post).notes)
    (pre / "config.json").unlink()
    assert any("not compared" in n for n in restore(pre, post).notes)
    with pytest.raises(ValueError, match="config: give the model's config"):
        restore_path(load(post), load(post))
    shapes = hybrids.config("granitemoehybrid")
    shapes.hidden_size = 64
    from transformers import GraniteMoeHybridForCausalLM

    shapes.mamba_n_heads, shapes.mamba_d_head = 8, 16
    saved(GraniteMoeHybridForCausalLM(shapes), tmp_path / "wide")
    with pytest.raises(ValueError, match="attention before training"):
        restore(tmp_path / "wide", post, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_notes_on_dtypes_and_on_what_is_kept(folders, tmp_path, pair):
    wide = copy.deepcopy(pair[0]).float()
    wide.resize_token_embeddings(70)
    saved(wide, tmp_path / "wide")
    report = restore(tmp_path / "wide", folders[1], tmp_path / "out")
    assert any("float32, after torch.bfloat16" in n for n in report.notes)
    assert any("of another shape before training: 2 tensors" in n for n in report.notes)
    out, pre = load(tmp_path / "out"), load(tmp_path / "wide")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(out[name], pre[name].bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie"), ({"alpha": float("nan")}, "alpha must lie"), ({"parts": ()}, "'nothing'"),
        ({"parts": ("x",)}, "'x' is none of"), ({"mode": "best"}, "mode must be"),
        ({"mode": "pro"}, "lam must be given"),
        ({"mode": "pro", "lam": -1.0}, "lam must be given"), ({"lam": 1.0}, "lam goes with"),
        ({"mode": "pro", "lam": 1.0, "parts": ("q",)}, "parts q and k"),
        ({"mode": "pro", "lam": 1.0, "include_qk_norm": True}, "include_qk_norm"), ({"convention": "C"}, "convention"),
    ],
)  # fmt: skip
def test_options(changes, message):
    with pytest.raises(ValueError, match=message):
        QKRestoreOptions(**changes).check()


def test_principal_angles():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, 16, generator=g, dtype=torch.float64)
    mix = torch.randn(4, 4, generator=g, dtype=torch.float64)
    assert principal_angles(a, mix @ a).max() < 1e-12  # the same space
    q = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64)).Q
    want = torch.tensor([1e-9, 0.3, 1.0, torch.pi / 2], dtype=torch.float64)
    b = torch.stack([q[i] * want[i].cos() + q[8 + i] * want[i].sin() for i in range(4)])
    assert torch.allclose(principal_angles(q[:4], b), want, atol=1e-13, rtol=1e-6)


def test_drift_of_rows():
    pre, post = {"w": torch.ones(4, 3)}, {"w": torch.ones(4, 3)}
    post["w"][1:3] = 2
    from burnish.paths import Selection

    (row,) = drift(as_tensors(pre), as_tensors(post), {"w": Selection(((1, 2),), part="q", heads=1)})
    assert row.relative == 1 and row.elements == row.changed == 3 and row.bytes_changed == 12
    (zero,) = drift(as_tensors({"w": torch.zeros(2)}), as_tensors({"w": torch.ones(2)}), {"w": Selection()})
    assert zero.relative == float("inf")


def test_the_report_is_json_where_a_drift_has_no_scale(folders, tmp_path):
    """A tensor that was zero before has infinite relative drift, for which JSON has no word."""
    from safetensors.torch import save_file

    pre = load(folders[0])
    pre["model.layers.1.self_attn.k_proj.weight"].zero_()
    save_file(pre, folders[0] / "model.safetensors", metadata={"format": "pt"})
    report = restore(*folders, tmp_path / "out", angles=True)
    assert {t.part: t.relative == float("inf") for t in report.tensors} == {"q": False, "k": True}
    text = (tmp_path / "out" / REPORT).read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert {t["part"]: t["relative"] is None for t in found["tensors"]} == {"q": False, "k": True}
    assert "inf" in str(report)


@pytest.mark.parametrize("field", ["num_attention_heads", "hidden_size", "layer_types", "num_hidden_layers"])
def test_configs_without_fields(field, folders, tmp_path):
    """A config that lacks what is needed is an error with the field's name, or does without."""
    config = json.loads((folders[1] / "config.json").read_text())
    config.pop("head_dim", None)
    for value in ("gone", None, 0):
        cut = {n: v for n, v in config.items() if n != field} | ({} if value == "gone" else {field: value})
        for folder in folders:
            (folder / "config.json").write_text(json.dumps(cut))
        if field == "num_hidden_layers" and value != 0:
            assert restore(*folders).layers == [1]
            continue
        message = {"hidden_size": "head_dim" if value != 0 else "head size"}.get(field, field)
        with pytest.raises(ValueError, match=message):
            restore(*folders)
    assert not (tmp_path / "out").exists()
