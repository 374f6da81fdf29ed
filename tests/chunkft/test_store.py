"""State at rest: exact size, streamed through a ring whose order is proven, to the same bits as in place."""

import pytest
import torch
from chunk_models import Net, loss_of, tokens

from burnish import ChunkAdamW
from burnish.chunkft import optimizer as module
from burnish.chunkft.store import Ring, Slab, buckets, layout, state_bytes
from burnish.kernels.adamw import QUANT_BLOCK, TILE
from burnish.ops.streams import COMPUTE, COPY, FETCH, HOST, RecordedStreams

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.mark.parametrize("moments, each", [("fp32", 8), ("8bit", 2 + 8 / QUANT_BLOCK)])
@pytest.mark.parametrize("master", [False, True])
def test_a_slab_is_exactly_as_long_as_its_state(moments, each, master):
    slab = Slab(3, master=master, moments=moments, device=CPU, pinned=False)
    size = 3 * TILE * (each + 4 * master)
    assert slab.memory.numel() == slab.memory.untyped_storage().nbytes() == size
    assert size == state_bytes(3, master=master, moments=moments)
    assert set(slab.parts) == slab.fresh == set(layout(3, master=master, moments=moments))
    slab.memory.zero_()
    views = slab.views(1, 3)
    assert sum(x.numel() * x.element_size() for x in views.values()) * 3 == 2 * size
    for name, x in views.items():
        x.fill_(7)
        assert (slab.parts[name] == 7).sum() * 3 == 2 * slab.parts[name].numel()


def test_buckets_cover_a_range_once():
    assert list(buckets(2, 9, 3)) == [(2, 5), (5, 8), (8, 9)]
    assert list(buckets(4, 4, 3)) == []


class Offloaded(ChunkAdamW):
    """As on a GPU: state apart from the weights, through a ring of two small buckets, here on recorded streams."""

    def __init__(self, *args, streams, **options):
        self.streams = streams
        super().__init__(*args, bucket_bytes=TILE * 8 * 2, slots=2, **options)

    def _at_rest(self, part):
        return part is not self._always

    def _new_ring(self, **options):
        return Ring(**options, streams=self.streams)


@pytest.fixture(autouse=True)
def slabs_are_not_pinned(monkeypatch):
    monkeypatch.setattr(module, "Slab", lambda *a, pinned, **k: Slab(*a, pinned=False, **k))


def train(optimizer, steps):
    net = optimizer.slices.model
    for step in range(steps):
        loss_of(net, tokens(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.detach().clone() for k, v in net.named_parameters() if "active" not in k}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {"num_chunks": 2}, {"num_chunks": 1}, {"num_chunks": 2, "moments": "8bit"},
    {"num_chunks": 2, "state_policy": "reset"}, {"num_chunks": 2, "steps_per_chunk": 3, "state_policy": "keep_v"},
])  # fmt: skip
def test_streamed_updates_are_those_in_place_and_no_two_accesses_race(options, dtype):
    streams = RecordedStreams()
    streamed = Offloaded(Net().to(dtype), lr=1e-2, streams=streams, **options)
    got = train(streamed, 5)
    want = train(ChunkAdamW(Net().to(dtype), lr=1e-2, **options), 5)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert any(streams.pending[side] for side in (COPY, FETCH)), "copies were not put off: the test proves nothing"
    state = streamed.state_dict()
    for part in state["parts"][:-1]:
        if part["memory"] is not None:
            streams.run(HOST, lambda: None, reads=[part["memory"]])
    assert streams.check() == []
    fetches = options.get("state_policy") != "reset" or dtype != torch.float32  # masters stay
    assert {a.stream for a in streams.accesses} == {COMPUTE, COPY, HOST, *([FETCH] if fetches else [])}
    slots = streamed._ring.slots
    assert len({x.data_ptr() for slot in slots for x in slot.values()}) == 2 * len(slots[0])


WAITS = {"compute for fetch": (COMPUTE, FETCH), "copy for compute": (COPY, COMPUTE), "fetch for copy": (FETCH, COPY),
         "host for copy": (HOST, COPY)}  # fmt: skip


@pytest.mark.parametrize("forgotten", WAITS)
def test_the_recorder_sees_each_wait_that_is_left_out(forgotten):
    class Careless(RecordedStreams):
        def wait(self, name, event):
            if (name, event.stream) != WAITS[forgotten]:
                super().wait(name, event)

    streams = Careless()
    optimizer = Offloaded(Net(), 2, lr=1e-2, streams=streams)
    train(optimizer, 5)
    for part in optimizer.state_dict()["parts"][:-1]:
        streams.run(HOST, lambda: None, reads=[part["memory"]])
    assert streams.check()


def test_the_ring_is_made_once_and_nothing_is_allocated_after_a_cycle():
    streams = RecordedStreams()
    optimizer = Offloaded(Net(), 3, streams=streams)
    train(optimizer, 3)
    ring, slabs = optimizer._ring, [part.slab for part in optimizer._parts]
    train(optimizer, 6)
    assert optimizer._ring is ring and [part.slab for part in optimizer._parts] == slabs
