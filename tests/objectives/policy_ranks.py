"""One of two ranks with half of a batch each; run by test_policy.py, held to one process with all of it.

python policy_ranks.py RANK WORLD STORE
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_policy as one

from burnish import objectives
from burnish.objectives import count_items


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    hidden, weight, target, inputs = one.problem()
    # unequal numbers of tokens, and on the second rank a sequence without any; two micro-batches each
    mine = [slice(2 * rank, 2 * rank + 1), slice(2 * rank + 1, 2 * rank + 2)]
    for name in [*one.POLICIES, "weighted_nll"]:
        for how in objectives.AGGREGATES:
            options = {} if name == "weighted_nll" else {"beta": 0.1, "entropy": 0.01}
            o = one.policy(name, aggregate=how, **options)
            more = {"token_weight": inputs["advantages"].exp()} if name == "weighted_nll" else {}
            want = one.gradients([slice(0, one.B)], o, inputs, hidden, weight, target, None, **more)
            items = count_items([target[p] for p in mine], o, group=dist.group.WORLD)
            got = one.gradients(mine, o, inputs, hidden, weight, target, items, **more)
            for a, b in zip(got, want, strict=True):
                dist.all_reduce(a)
                one.close(a / world, b, 1e-12)  # as DDP and FSDP average
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
