"""Reading checkpoints: what is in them, and what is said of broken ones."""

import json
import tracemalloc

import pytest
import torch

from burnish.ops.live_bytes import LiveBytes
from burnish.paths import Checkpoint, StateDict, as_tensors


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reads_what_safetensors_wrote(write, state, shards, dtype):
    want = state(0, dtype) | {"mask": torch.tensor([True, False]), "empty": torch.zeros(0, 4, dtype=dtype)}
    got = Checkpoint(write("a", want, shards))
    assert set(got) == set(want)
    assert sum(map(len, got.files.values())) == len(want) and len(got.files) == shards
    for name, x in want.items():
        y = got.tensor(name)
        assert y.dtype == x.dtype == got.dtype(name) and got.shape(name) == tuple(x.shape) and torch.equal(x, y)
        y.zero_()  # the caller's own
        assert torch.equal(got.tensor(name), x)


def test_reading_holds_the_tensor_and_nothing_else(write):
    folder = write("a", {"w": torch.randn(512, 1024), "other": torch.randn(512, 1024)})
    tracemalloc.start()
    with LiveBytes() as live:
        x = Checkpoint(folder).tensor("w")
    assert tracemalloc.get_traced_memory()[1] < 200_000  # no copy as bytes
    tracemalloc.stop()
    assert live.peak <= x.numel() * 4


def test_errors_name_what_is_wrong(write, state, tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        Checkpoint(tmp_path / "nothing")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*pytorch_model.bin must be converted"):
        Checkpoint(tmp_path / "bin")
    with pytest.raises(ValueError, match="no config\.json"):
        Checkpoint(write("noconfig", state(0))).config()
    folder = write("missing", state(0), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing 1 of 3 shards: model-00002-of-00003\.safetensors"):
        Checkpoint(folder)
    folder = write("short", state(0))
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut short"):
            Checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Checkpoint(folder)
    folder = write("absent", state(0), 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model.ghost .* in no shard"):
        Checkpoint(folder)
    folder = write("twice", state(0), 2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="too"):
        Checkpoint(folder)


def test_sources(state):
    own = state(0)
    source = as_tensors(own)
    assert isinstance(source, StateDict) and as_tensors(source) is source
    source.tensor("model.norm.weight").zero_()
    assert own["model.norm.weight"].abs().sum() > 0  # a copy
    assert set(as_tensors(torch.nn.Linear(2, 2))) == {"weight", "bias"}
    with pytest.raises(TypeError, match="got int"):
        as_tensors(3)
