"""One of two gloo ranks; run by test_policy_head.py: below DDP and FSDP2 the policy head has one process's gradients.

python policy_head_ranks.py RANK WORLD STORE
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import tiny_models as tiny
from trl.trainer.utils import add_fused_lm_head

from burnish.methods.policy_head import _ScoringHead


def model(tied: bool):
    one = tiny.llama(tied=tied)
    add_fused_lm_head(one, temperature=0.7, outputs=("log_probs", "entropy"))
    _ScoringHead(one, temperature=0.7, entropy=True, fp32=False, budget=None, backend="auto")
    return one


def loss_of(policy, batch, advantages):
    out = policy(**batch, fused_lm_head=True)
    ratio = (out.log_probs - out.log_probs.detach()).exp()
    return -(ratio * advantages[:, None] * out.label_mask).sum() - 0.1 * out.entropy.sum()


def check(kind: str, tied: bool) -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    whole, shared = model(tied), model(tied)
    if kind == "ddp":
        shared = DistributedDataParallel(shared)
    else:
        for layer in shared.model.layers:
            fully_shard(layer, mesh=mesh)
        if kind == "own":
            fully_shard(shared.lm_head, mesh=mesh)
        fully_shard(shared, mesh=mesh)
    for step in range(2):  # gradients accumulate
        batch, advantages = tiny.batch(step, size=4), torch.tensor([1.0, -0.5, 2.0, 0.3])
        if step:
            batch["labels"][2:] = -100  # the second rank has no token that counts
        loss_of(whole, batch, advantages).backward()
        mine = slice(2 * rank, 2 * rank + 2)
        loss = loss_of(shared, {k: v[mine] for k, v in batch.items()}, advantages[mine])
        (loss * 2).backward()  # both average over the ranks
    want = dict(whole.named_parameters())
    for name, p in shared.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        expected = want[name.removeprefix("module.")].grad
        assert (grad - expected).norm() <= 1e-5 * expected.norm(), f"{kind} {name}"


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for kind, tied in (("ddp", False), ("root", True), ("own", False)):
        check(kind, tied)
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
