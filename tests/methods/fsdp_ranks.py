"""Run by torchrun on 2 gloo ranks: loss and gradients under FSDP2 equal those of one process."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny_models as tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import burnish
from burnish.methods import fuse_lm_head


def check(own_unit: bool, tied: bool) -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    whole, sharded, teacher = tiny.llama(tied=tied), tiny.llama(tied=tied), tiny.llama(1)
    objective = burnish.objectives.target_sft(0.5)
    fuse_lm_head(whole, objective, teacher_model=copy.deepcopy(teacher))
    fuse_lm_head(sharded, objective, teacher_model=teacher)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_unit:  # then its weight is still sharded in the model's forward
        fully_shard(sharded.lm_head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    batch = tiny.batch(size=4)
    expected = whole(**batch).loss
    expected.backward()
    count = (batch["labels"][:, 1:] != -100).sum()
    share = {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}
    loss = sharded(**share, num_items_in_batch=count).loss
    (loss * 2).backward()  # FSDP averages over the ranks
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for own_unit, tied in ((False, False), (False, True), (True, False)):
        check(own_unit, tied)
    dist.destroy_process_group()
    print("equal")
