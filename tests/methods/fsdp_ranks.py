"""Run by torchrun on 2 gloo ranks: loss and gradients under FSDP2 equal those of one process."""

import copy
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny_models as tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import burnish
from burnish.methods import fuse_lm_head
from burnish.methods.processes import fill_from_first

#: The head inside the root's unit, as a unit of its own, or with its neighbours as accelerate groups them.
LAYOUTS = {
    "root": lambda m: [],
    "own": lambda m: [[m.lm_head]],
    "tail": lambda m: [[m.model.norm, m.lm_head]],
    "tied tail": lambda m: [[m.model.norm, m.model.embed_tokens, m.lm_head]],
}


def check(layout: str, tied: bool, dtype: torch.dtype) -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    whole, sharded, teacher = tiny.llama(tied=tied), tiny.llama(tied=tied), tiny.llama(1).to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    objective = burnish.objectives.target_sft(0.5)
    for p in whole.parameters():  # and no buffer, as under the policy
        p.data = p.data.to(dtype)
    fuse_lm_head(whole, objective, teacher_model=copy.deepcopy(teacher))
    fuse_lm_head(sharded, objective, teacher_model=teacher)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for unit in LAYOUTS[layout](sharded):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    expected = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in whole.named_parameters()}
    for step in range(2):  # gradients accumulate; a second forward meets what the first left of the units
        batch = tiny.batch(step, size=4)
        count = (batch["labels"][:, 1:] != -100).sum()
        losses = []
        for r in range(2):  # rank by rank, as each rounds its own gradient to dtype
            share = {k: v[2 * r : 2 * r + 2] for k, v in batch.items()}
            whole.zero_grad()
            loss = whole(**share, num_items_in_batch=count).loss
            loss.backward()
            losses.append(loss.detach())
            for name, p in whole.named_parameters():
                expected[name] += p.grad.float()
            if r == rank:
                mine = share
        loss = sharded(**mine, num_items_in_batch=count).loss
        (loss * 2).backward()  # FSDP averages over the ranks
        torch.testing.assert_close(loss.detach(), losses[rank], rtol=1e-5, atol=1e-6)
    for name, p in sharded.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-5, atol=1e-6, msg=f"{layout} {name}")
        assert p.grad.dtype == torch.float32


def check_teacher_is_filled() -> None:
    """accelerate's default: only the first process reads the weights, and the others' are nothing to rely on."""
    teacher, truth = tiny.llama(tied=True), tiny.llama(tied=True)
    if dist.get_rank() > 0:
        for p in teacher.parameters():
            p.data.zero_()
    fill_from_first(teacher)
    assert torch.equal(teacher.lm_head.weight, truth.lm_head.weight) == (dist.get_rank() == 0)
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    fill_from_first(teacher)
    for p, q in zip(teacher.parameters(), truth.parameters(), strict=True):
        assert torch.equal(p, q)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for layout, tied in (("root", False), ("root", True), ("own", False), ("tail", False), ("tied tail", True)):
        for dtype in (torch.float32, torch.bfloat16):
            check(layout, tied, dtype)
    check_teacher_is_filled()
    dist.destroy_process_group()
    print("equal")
