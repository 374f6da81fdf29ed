"""Writing a point: bytes, memory, and directories that are there whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file

from burnish.ops.live_bytes import LiveBytes
from burnish.paths import Additive, Checkpoint, Selection, atomic_directory, save
from burnish.paths.blend import BLOCK


def load(folder):
    out = {}
    for file in folder.glob("*.safetensors"):
        out |= load_file(file)
    return out


@pytest.mark.parametrize("shards", [(1, 1), (3, 2), (1, 3)])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_written_point_is_the_path(write, state, tmp_path, shards, t):
    pre, post = state(0, torch.bfloat16), state(1, torch.bfloat16)
    a, b = write("a", pre, shards[0]), write("b", post, shards[1], {"model_type": "x"})
    (b / "tokenizer.json").write_text("{}")
    (b / "optimizer.pt").write_bytes(b"no")
    (b / "trainer_state.json").write_text("{}")
    (b / "checkpoint-7").mkdir()
    (b / "checkpoint-7" / "config.json").write_text("{}")
    (b / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "pytorch_model.bin"}}')
    picked = {"model.layers.1.self_attn.q_proj.weight": Selection(((1, 3), (4, 5))), "model.norm.weight": Selection()}
    path = Additive(a, b, picked)
    seen = []
    saved = save(path, t, tmp_path / "out", files={"note.json": "{}"}, progress=seen.append)
    got, want = load(tmp_path / "out"), dict(path.at(t))
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype
        if name not in picked:
            assert torch.equal(got[name], post[name])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in b.iterdir() if p.suffix == ".safetensors" or p.name == "model.safetensors.index.json"
    } | {"note.json", "config.json", "tokenizer.json"}
    assert saved.bytes == sum(p.stat().st_size for p in b.glob("*.safetensors")) == sum(seen)
    assert saved.computed == (0 if t == 1 else 2)
    # untouched shards are the template's files to the byte, headers too
    if t == 1:
        for file in b.glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    Checkpoint(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_is_two_tensors_and_blocks(write, tmp_path, dtype):
    """Neither model is ever whole in memory: of six tensors of 16 MB in bf16 a whole one is made in blocks, of one that
    moves in part two are held."""
    big = {f"model.layers.{i}.mlp.weight": torch.randn(2048, 4096).to(dtype) for i in range(6)}
    a = write("a", big, 2)
    b = write("b", {n: x + 1 for n, x in big.items()}, 3)
    largest = max(x.numel() * x.element_size() for x in big.values())
    del big
    with LiveBytes():  # what torch and Python import at the first of such calls is not memory of a save
        save(Additive(a, b, {"model.layers.0.mlp.weight": Selection()}), 0.5, tmp_path / "first")
    tracemalloc.start()
    with LiveBytes() as live:
        save(Additive(a, b), 0.5, tmp_path / "out")
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert live.peak <= 10 * BLOCK * 4 < largest
    assert python < 2_000_000
    with LiveBytes() as live:
        save(Additive(a, b, {"model.layers.3.mlp.weight": Selection(((0, 7),))}), 0.5, tmp_path / "rows")
    assert 2 * largest <= live.peak <= 2 * largest + 3 * BLOCK * 4


def test_in_memory_paths_are_not_saved(state, tmp_path):
    with pytest.raises(TypeError, match="in memory"):
        save(Additive(state(0), state(1)), 0.5, tmp_path / "out")


def test_copy_without_the_kernels_help(write, state, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    a, b = write("a", state(0)), write("b", state(1), 2)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    save(Additive(a, b, {"model.norm.weight": Selection()}), 0.0, tmp_path / "one")
    monkeypatch.delattr(os, "copy_file_range")
    save(Additive(a, b, {"model.norm.weight": Selection()}), 0.0, tmp_path / "two")
    for file in b.glob("*.safetensors"):
        assert (tmp_path / "one" / file.name).read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    want = state(1) | {"model.norm.weight": state(0)["model.norm.weight"]}
    assert all(torch.equal(x, want[n]) for n, x in load(tmp_path / "one").items())


def test_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        assert not (tmp_path / "out").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:  # an empty directory is replaced
        (folder / "whole").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o700 == 0o700
    with pytest.raises(ValueError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="exists already"), atomic_directory(tmp_path / "file"):
        pass
    with pytest.raises(OSError, match="GB are needed"), atomic_directory(tmp_path / "big", need=1 << 60):
        pass
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("where", ["copy", "compute"])
def test_a_full_disk_leaves_nothing(write, state, tmp_path, monkeypatch, where):
    from burnish.paths import save as function

    module = sys.modules[function.__module__]
    a, b = write("a", state(0)), write("b", state(1), 2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_copy" if where == "copy" else "_write", full)
    with pytest.raises(OSError, match="No space left"):
        save(Additive(a, b), 0.5, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


LIMITED = """
import resource, sys
from burnish.paths import Additive, save
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    save(Additive(sys.argv[1], sys.argv[2]), 0.5, sys.argv[3])
except OSError as error:
    print("refused", error.errno)
"""


def test_a_write_that_the_system_refuses_leaves_nothing(write, tmp_path):
    """The kernel's own refusal, in the middle of a shard."""
    big = {"a": torch.randn(1000, 100), "b": torch.randn(1000, 100)}
    a, b = write("a", big), write("b", big)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, a, b, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


SLOW = """
import sys, time
from burnish.paths import Additive, save
def wait(_):
    print("writing", flush=True)
    time.sleep(60)
save(Additive(sys.argv[1], sys.argv[2]), 0.5, sys.argv[3], progress=wait)
"""


def test_a_killed_process_leaves_no_output_and_the_next_cleans_up(write, state, tmp_path):
    a, b = write("a", state(0)), write("b", state(1))
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, a, b, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    (left,) = tmp_path.glob(".out.*")
    with atomic_directory(out):  # while the other is alive its directory is left alone
        assert left.exists()
    out.rmdir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left.exists() and not out.exists()
    started = time.monotonic()
    save(Additive(a, b), 0.5, out)
    assert time.monotonic() - started < 30
    assert (
        not left.exists()
        and json.loads((out / "config.json").read_text() if (out / "config.json").exists() else "{}") == {}
    )
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "out"}


def test_side_files_are_this_models(write, state, tmp_path):
    """A model kept in a directory of the model, a run's checkpoints and other weights' index are not its side files."""
    pre, post = write("pre", state(0)), write("post", state(1), config={"a": 1})
    for name in ("restored/config.json", "tokenizer/vocab.json", "checkpoint-3/config.json", "a/b/c.json", "notes.bin"):
        (post / name).parent.mkdir(parents=True, exist_ok=True)
        (post / name).write_text("{}")
    (post / "restored" / "model.safetensors").write_bytes((post / "model.safetensors").read_bytes())
    (post / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": "pytorch_model.bin"}}))
    save(Additive(pre, post), 0, tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"model.safetensors", "config.json", "tokenizer/vocab.json"}


@pytest.mark.parametrize("name", ["a[b]", "a*", "a b"])
def test_any_name_is_cleaned_up_after(name, tmp_path):
    """What a killed process left under a name with glob's own characters; a neighbour's is left alone."""
    stale = [tmp_path / f".{n}.x.partial" for n in (name, "a" + "c" * 3)]
    for folder in stale:
        folder.mkdir()
    with atomic_directory(tmp_path / name) as folder:
        (folder / "f").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, stale[1].name])
