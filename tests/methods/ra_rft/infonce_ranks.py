"""One of several gloo processes: the loss's gradient, averaged as DDP does, is that of one process with all rows."""

import sys

import torch
import torch.distributed as dist

from burnish.methods.ra_rft.infonce import gather
from burnish.methods.ra_rft.retriever import Embedded, InfoNCELoss

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
# rows of all processes: the first has more of them, and longer texts; questions and documents come twice
labels = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 3], [1, 4], [3, 0], [2, 3]])
known = [(0, 0), (0, 1), (1, 1), (2, 3), (1, 4), (3, 0), (3, 3), (0, 4)]
rows, tokens = [slice(0, 4), slice(4, 7)], [5, 3]
questions, documents = (torch.randn(n, 5, 6, generator=g, dtype=torch.float64) for n in (4, 5))


def loss_of(leaf, late, multi, rows, length):
    loss = InfoNCELoss(None, known, 5, late_interaction=late, multi_positive=multi)
    mine = labels[rows]
    texts = [(questions[mine[:, 0]] @ leaf), (documents[mine[:, 1]] @ leaf)]
    texts = [torch.nn.functional.normalize(x, dim=-1) for x in texts]
    if not late:
        return loss.of_embeddings(*(Embedded(x[:, 0]) for x in texts), mine)
    # tokens past the third are padding, which only the first process has
    mask = (torch.arange(5) < 3).expand(len(mine), 5)
    return loss.of_embeddings(*(Embedded(x[:, :length], mask[:, :length]) for x in texts), mine)


for late in (False, True):
    for multi in (True, False):
        leaf = torch.eye(6, dtype=torch.float64).requires_grad_()
        ours = loss_of(leaf, late, multi, rows[rank], tokens[rank])
        (grad,) = torch.autograd.grad(ours, leaf)
        dist.all_reduce(grad)
        grad /= world  # DDP's mean
        mean = ours.detach().clone()
        dist.all_reduce(mean)
        dist.barrier()
        group = dist.is_initialized
        dist.is_initialized = lambda: False  # alone
        try:
            alone = loss_of(leaf, late, multi, slice(0, 7), 5)
            (want,) = torch.autograd.grad(alone, leaf)
        finally:
            dist.is_initialized = group
        torch.testing.assert_close(mean / world, alone.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)
        assert want.abs().max() > 1e-3
x = torch.full((rank + 1, 2 + rank), float(rank))
assert gather(x).shape == (3, 3) and gather(x)[0].tolist() == [0, 0, 0] and gather(x)[1:].eq(1).all()
dist.destroy_process_group()
print("equal")
