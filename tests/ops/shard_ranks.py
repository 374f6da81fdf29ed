"""One rank of a head whose rows are sharded; run by test_shards.py, held to one process on the whole head.

python shard_ranks.py RANK WORLD STORE
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))
import cases

from burnish import LoRAHead, Teacher, linear_loss, linear_stats, objectives

N, V, H = 11, 43, 8
#: Values that no sum touches, or that a maximum or a choice decides: equal to the bit.
EXACT = ("label", "hit", "top_entropy", "ids")
STATS = (
    "lse", "logp", "mean", "square", "uniform", "mix", "mix_lse", "cross", "other", "jsd", "teacher_logp",
    "teacher_entropy",
)  # fmt: skip


def sizes(world: int) -> list[int]:
    """Uneven shares of V rows, one of them empty where there are three ranks."""
    return {2: [30, 13], 3: [25, 0, 18]}[world]


def close(name, got, want, rtol=1e-11):
    if not torch.allclose(got, want, rtol=rtol, atol=1e-13):
        raise AssertionError(f"{name}: {(got - want).abs().max():.2e}")


def part_of_teacher(teacher, mine):
    """This rank's rows of a teacher's head or logits."""
    if teacher is None or teacher.kind == "topk":
        return teacher
    if teacher.kind == "logits":
        return dataclasses.replace(teacher, logits=teacher.logits[:, mine])
    bias = None if teacher.bias is None else teacher.bias[mine]
    return dataclasses.replace(teacher, weight=teacher.weight[mine], bias=bias)


def every_objective(mine):
    for ident, name, arguments in cases.all_objectives():
        o, hidden, weight, bias, target, extra = cases.problem(name, arguments, n=N, v=V)
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        want, metrics = linear_loss(*whole[:2], target, o, bias=whole[2], metrics=("hit", "entropy"), **extra)
        dx, dw, db = torch.autograd.grad(want, whole)
        local = [x.clone().requires_grad_() for x in (hidden, weight[mine], bias[mine])]
        own = {**extra, "teacher": part_of_teacher(extra.get("teacher"), mine)}
        got, found = linear_loss(
            *local[:2], target, o, bias=local[2], metrics=("hit", "entropy"), group=dist.group.WORLD, **own
        )
        close(ident, got, want)
        close(f"{ident} entropy", found["entropy"], metrics["entropy"])
        assert torch.equal(found["hit"], metrics["hit"]), ident
        wanted = (dx, dw[mine], db[mine])
        for label, a, b in zip(("dX", "dW", "db"), torch.autograd.grad(got, local), wanted, strict=True):
            close(f"{ident} {label}", a, b, 1e-10)


def statistics(mine, mesh):
    g = torch.Generator().manual_seed(0)
    # quarters: products are exact, whatever their order, so that what follows can be equal to the bit
    hidden, weight, t = (torch.randint(-9, 9, s, generator=g).double() / 4 for s in ((N, H), (V, H), (N, V)))
    weight[7] = weight[31]  # a tie across ranks: the lowest column wins
    hidden[0] = 50 * weight[7]
    target = torch.randint(0, V, (N,), generator=g)
    target[0], target[1] = 7, -100
    ids = torch.randint(-1, V, (N, 3), generator=g)
    options = {"alpha": 0.5, "eta": 0.5, "top_k": 20, "temperature": 1.3, "softcap": 20.0}
    topk = Teacher(ids=torch.arange(4).expand(N, 4) * 9, logp=torch.full((N, 4), -2.0), tail="student")
    cases_ = {"logits": (Teacher(logits=t), Teacher(logits=t[:, mine])), "topk": (topk, topk)}
    for kind, (all_of_it, mine_of_it) in cases_.items():
        names = (*EXACT, *STATS)
        w = weight.clone().requires_grad_()
        x = hidden.clone().requires_grad_()
        want = linear_stats(x, w, target, stats=names, teacher=all_of_it, ids=ids, **options)
        lw, lx = weight[mine].clone().requires_grad_(), hidden.clone().requires_grad_()
        got = linear_stats(lx, lw, target, stats=names, teacher=mine_of_it, ids=ids, group=dist.group.WORLD, **options)
        for name in names:
            a, b = getattr(got, name), getattr(want, name)
            if name in EXACT:
                assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)), (kind, name)
            else:
                close(f"{kind} {name}", a, b)
            gathered = [torch.empty_like(a) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, a.detach())
            assert all(torch.equal(a.nan_to_num(nan=7.0), r.nan_to_num(nan=7.0)) for r in gathered), name
        loss = lambda s: (s.jsd * s.logp + s.cross * s.square).sum() + s.ids.nan_to_num().sum()  # noqa: E731
        dx, dw = torch.autograd.grad(loss(want), (x, w))
        got_x, got_w = torch.autograd.grad(loss(got), (lx, lw))
        close(f"{kind} dX", got_x, dx, 1e-9)
        close(f"{kind} dW", got_w, dw[mine], 1e-9)
    # a DTensor: its own shares, the gradient a DTensor with the same placement
    sharded = distribute_tensor(weight.clone(), mesh, [Shard(0)]).requires_grad_()
    x = hidden.clone().requires_grad_()
    bias = torch.arange(V, dtype=torch.float64) / 7
    # the hidden states as a DTensor that every rank has whole, and a bias sharded as the head is
    rows = DTensor.from_local(x, mesh, [Replicate()])
    loss = linear_loss(rows, sharded, target, objectives.nll(), bias=distribute_tensor(bias.clone(), mesh, [Shard(0)]))
    loss.backward()
    whole, wx = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
    linear_loss(wx, whole, target, objectives.nll(), bias=bias).backward()
    assert isinstance(sharded.grad, DTensor)
    assert sharded.grad.placements == (Shard(0),)
    close("DTensor dW", sharded.grad.full_tensor(), whole.grad)
    close("DTensor dX", x.grad, wx.grad)
    try:
        linear_loss(hidden, distribute_tensor(weight.clone(), mesh, [Shard(1)]), target, objectives.nll())
    except ValueError as error:
        assert "must be Shard(0) on a mesh of one dimension" in str(error)
    else:
        raise AssertionError("a head sharded along H was taken")


def adapter(mine):
    g = torch.Generator().manual_seed(2)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, weight, a, b, m = make(N, H), make(V, H), make(2, H), make(V, 2), make(V)
    target = torch.arange(N) % V
    whole = [x.clone().requires_grad_() for x in (hidden, a, b, m)]
    want = linear_loss(whole[0], LoRAHead(weight, *whole[1:3], 0.5, whole[3]), target, objectives.dft())
    local = [x.clone().requires_grad_() for x in (hidden, a, b[mine], m[mine])]
    head = LoRAHead(weight[mine], *local[1:3], 0.5, local[3])
    got = linear_loss(local[0], head, target, objectives.dft(), group=dist.group.WORLD)
    close("adapter", got, want)
    dx, da, db, dm = torch.autograd.grad(want, whole)
    for name, x, y in zip("xabm", torch.autograd.grad(got, local), (dx, da, db[mine], dm[mine]), strict=True):
        close(f"adapter d{name}", x, y, 1e-10)


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    share = sizes(world)
    mine = slice(sum(share[:rank]), sum(share[: rank + 1]))
    every_objective(mine)
    statistics(mine, init_device_mesh("cpu", (world,)))
    adapter(mine)
    subgroup(rank, world)
    dist.barrier()
    dist.destroy_process_group()
    # names of groups come back: a later group is another one
    dist.init_process_group("gloo", init_method=f"file://{store}{rank}", rank=0, world_size=1)
    z = torch.arange(6, dtype=torch.float64)[:, None]
    alone = linear_stats(torch.ones(2, 1, dtype=torch.float64), z, stats=("lse",), group=dist.group.WORLD)
    close("a later group", alone.lse, z[:, 0].logsumexp(0).expand(2))
    dist.destroy_process_group()
    print("equal")


def subgroup(rank: int, world: int) -> None:
    """The last two ranks alone: their places are counted within their group."""
    group = dist.new_group([world - 2, world - 1])
    if rank < world - 2:
        return
    w = torch.arange(10, dtype=torch.float64)[:, None]
    mine = slice(0, 4) if rank == world - 2 else slice(4, 10)
    s = linear_stats(torch.ones(3, 1, dtype=torch.float64), w[mine], torch.tensor([9, 2, 4]), stats=("logp", "hit"),
                     group=group)  # fmt: skip
    close("subgroup", s.logp, w[:, 0].log_softmax(0)[[9, 2, 4]])
    assert s.hit.tolist() == [1.0, 0.0, 0.0]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
