"""One of two gloo ranks; run by test_ranks_q0.py: a run under DDP is that of one process with the whole batch.

python q0_ranks.py RANK WORLD STORE
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import q0_tiny as q0


def main(rank: str, world: str, store: str) -> None:
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    t = q0.for_ranks(Path(store).parent / "two", 2)
    assert t.accelerator.num_processes == 2
    t.train()
    flat = torch.cat([p.detach().flatten() for p in t.model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both), "the ranks' weights differ: the noise was not the same"
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
