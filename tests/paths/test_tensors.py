"""Reading checkpoints: what is in them, and what is said of broken ones."""

import json
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

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
    with LiveBytes():  # what its first use imports is no copy
        Checkpoint(folder).tensor("other")
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


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HEADERS = {
    "overlap": {"a": entry(0, 8), "b": entry(4, 12), "c": entry(12, 16, (1,))},
    "hole": {"a": entry(0, 8), "b": entry(12, 16, (1,))},
    "backwards": {"a": entry(8, 0), "b": entry(8, 16)},
    "shape": {"a": entry(0, 8, (3,)), "b": entry(8, 16)},
    "dtype": {"a": entry(0, 8, dtype="BF16"), "b": entry(8, 16)},
    "before the data": {"a": entry(-8, 0), "b": entry(0, 16, (4,))},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(case, tmp_path):
    """Offsets decide what is copied and what is replaced: they must cover the data once, each as its shape says."""
    header = json.dumps(HEADERS[case]).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match=r"not a safetensors file: [abc] is at bytes"):
        Checkpoint(tmp_path)


def test_unknown_dtypes_are_carried_and_not_opened(tmp_path):
    header = json.dumps({"a": entry(0, 3, (5,), "F6_X"), "b": entry(3, 11)}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(11))
    found = Checkpoint(tmp_path)
    assert torch.equal(found.tensor("b"), torch.zeros(2))
    with pytest.raises(ValueError, match="a has dtype F6_X, which cannot be read"):
        found.tensor("a")


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", 7, None])
def test_shards_lie_beside_their_index(name, write, state):
    """A shard's name is written again below the new directory."""
    folder = write("model", state(0), 2)
    (folder / "sub").mkdir()
    for place in (folder.parent / "model.safetensors", folder / "sub" / "x.safetensors"):
        place.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index = {"weight_map": {n: name for n in state(0)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is not the name of a file|missing 1 of 1 shards"):
        Checkpoint(folder)


def test_a_whole_file_comes_before_an_index_as_in_transformers(write, state):
    folder = write("model", state(0), 2)
    save_file(state(1), folder / "model.safetensors")
    found = Checkpoint(folder)
    assert set(found.files) == {"model.safetensors"}
    assert torch.equal(found.tensor("model.norm.weight"), state(1)["model.norm.weight"])


def test_directories_without_weights_say_what_they_have(write, state, tmp_path):
    folder = write("model", state(0), 2)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="there are shards without an index"):
        Checkpoint(folder)
    (tmp_path / "adapter").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="it holds an adapter, not a model"):
        Checkpoint(tmp_path / "adapter")


def test_tied_names():
    own = torch.nn.Linear(3, 3, bias=False).weight.detach()
    found = StateDict({"a": own, "b": own, "c": own.clone(), "d": own[:2], "e": torch.empty(0), "f": torch.empty(0)})
    assert found.tied() == [["a", "b"]]
