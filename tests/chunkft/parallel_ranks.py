"""One rank of gloo replicas, of DDP, and of FSDP2, held to one process on the whole batch; run by test_parallel.py.

python parallel_ranks.py RANK WORLD STORE
"""

import copy
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from chunk_models import Net, loss_of, tokens

from burnish import ChunkAdamW

STEPS = 7  # two cycles of three chunks, and one chunk more
OPTIONS = {"num_chunks": 3, "lr": 1e-2, "weight_decay": 0.1}


def whole_run(world: int, steps=STEPS, dtype=torch.float32, **options):
    """One process: the mean over ranks of their gradients, by accumulation, and no group."""
    net = Net().to(dtype)
    with mock.patch.object(dist, "is_initialized", lambda: False):
        optimizer = ChunkAdamW(net, **{**OPTIONS, **options})
    for step in range(steps):
        for r in range(world):
            (loss_of(net, tokens(seed=step * world + r)) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def steps_of(net, optimizer, rank, world, steps=STEPS, start=0):
    for step in range(start, start + steps):
        loss_of(net, tokens(seed=step * world + rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(net):
    return {
        k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone()
        for k, v in net.named_parameters() if "active_slices" not in k
    }  # fmt: skip


def close(got, want, label):
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{label} {k}: {m}")


def equal_on_all_ranks(net, label):
    for key, value in weights(net).items():
        everybodys = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everybodys, value)
        assert all(torch.equal(x, value) for x in everybodys), f"{label} {key}"


def replicas(rank, world):
    for options in ({}, {"small": "chunk"}, {"max_grad_norm": 0.05}, {"order": "random", "seed": 2}):
        net = Net()
        if rank:  # whatever they began with, they go on from the first one's
            torch.nn.init.zeros_(net.head.weight)
        optimizer = ChunkAdamW(net, **{**OPTIONS, **options})
        steps_of(net, optimizer, rank, world)
        equal_on_all_ranks(net, f"replicas {options}")
        close(weights(net), weights(whole_run(world, **options)[0]), f"replicas {options}")


def reduces_the_chunk_alone(rank, world):
    net, sizes = Net(), []
    optimizer = ChunkAdamW(net, **OPTIONS)
    real = dist.all_reduce

    def count(x, *args, **kwargs):
        sizes.append(x.numel())
        return real(x, *args, **kwargs)

    loss_of(net, tokens(seed=rank)).backward()
    with mock.patch.object(dist, "all_reduce", count):
        optimizer.step()
    tile = 1024
    chunk = sum(-(-s.numel // tile) * tile for s in optimizer.plan.chunks[0])
    assert sizes == [chunk, sum(-(-s.numel // tile) * tile for s in optimizer.plan.always)], sizes


def wrapped_by_ddp(rank, world):
    net, plain = Net(), Net()
    optimizer = ChunkAdamW(net, **OPTIONS)
    outer = DistributedDataParallel(net)
    alone = ChunkAdamW(plain, **OPTIONS)
    for step in range(STEPS):
        for micro in range(2):  # no_sync is DDP's own affair: chunks are reduced in step()
            x = tokens(seed=(2 * step + micro) * world + rank)
            if micro == 0:
                with outer.no_sync():
                    loss_of(outer, x).backward()
            else:
                loss_of(outer, x).backward()
            loss_of(plain, x).backward()
        for o in (optimizer, alone):
            o.step()
            o.zero_grad()
    equal_on_all_ranks(net, "DDP")
    close(weights(net), weights(plain), "DDP")


def observes_alike(rank, world):
    """Losses differ between ranks; the order they decide must not."""
    optimizer = ChunkAdamW(Net(), 3, order="loss")
    for step in range(6):
        optimizer.observe(float(rank * (-1) ** step + step))
        loss_of(optimizer.slices.model, tokens(seed=rank)).backward()
        optimizer.step()
    orders = [None] * world
    dist.all_gather_object(orders, optimizer.rotation.turns)
    assert all(o == orders[0] for o in orders)


def skips_alike(rank, world):
    """One rank overflows: all skip."""
    net = Net()
    optimizer = ChunkAdamW(net, **OPTIONS)
    before = weights(net)
    loss = loss_of(net, tokens(seed=rank))
    (loss * (float("inf") if rank == 1 else 1.0)).backward()
    optimizer.found_inf = torch.tensor([float(rank == 1)])
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in weights(net).items()) and optimizer.updates == 0


def sharded(rank, world, dtype, **options):
    mesh = init_device_mesh("cpu", (world,))
    net = Net(blocks=2).to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    optimizer = ChunkAdamW(net, **{**OPTIONS, **options})
    steps_of(net, optimizer, rank, world, steps=4)
    state = copy.deepcopy(optimizer.state_dict())
    steps_of(net, optimizer, rank, world, steps=STEPS - 4, start=4)
    want, reference = whole_run(world, dtype=dtype, **options)
    if dtype == torch.float32:
        close(weights(net), weights(want), f"FSDP2 {options}")
    else:  # a step of bf16 either way
        for key, value in weights(want).items():
            off = (weights(net)[key].float() - value.float()).norm() / value.float().norm()
            assert off < 2e-2, (key, off)
    mine = sum(p.slab.memory.numel() for p in optimizer._parts)
    assert mine < 1.6 / world * sum(p.slab.memory.numel() for p in reference._parts)
    assert optimizer._flat.numel() < optimizer._full.numel()
    # resumed from the middle of a cycle: the same to the bit
    finished = weights(net)
    optimizer.detach()
    fresh = Net(blocks=2).to(dtype)
    for block in fresh.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(fresh, mesh=mesh, mp_policy=policy)
    first = ChunkAdamW(fresh, **{**OPTIONS, **options})
    steps_of(fresh, first, rank, world, steps=4)
    first.load_state_dict(state)
    steps_of(fresh, first, rank, world, steps=STEPS - 4, start=4)
    for key, value in weights(fresh).items():
        assert torch.equal(value, finished[key]), key


def refuses(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    net = Net()
    fully_shard(net.blocks[0], mesh=mesh)
    try:
        ChunkAdamW(net, 2)
    except ValueError as error:
        assert "shard all of them" in str(error), error
    else:
        raise AssertionError("a model sharded in part was taken")
    assert all(p.requires_grad for p in net.parameters())


def main():
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    replicas(rank, world)
    reduces_the_chunk_alone(rank, world)
    wrapped_by_ddp(rank, world)
    observes_alike(rank, world)
    skips_alike(rank, world)
    if world == 2:
        sharded(rank, world, torch.float32)
        sharded(rank, world, torch.float32, small="chunk", max_grad_norm=0.05)
        sharded(rank, world, torch.bfloat16)
        refuses(rank, world)
    dist.barrier()
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main()
