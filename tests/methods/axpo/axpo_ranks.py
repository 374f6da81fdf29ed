"""One of two gloo ranks; run by test_axpo_ranks.py: one rank's questions all trigger, the other's never.

python axpo_ranks.py RANK WORLD STORE
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import axpo_tiny as toy
from test_axpo_trainer import Recording

from burnish.methods.axpo import batch as rows
from burnish.methods.axpo.plan import token_weights


class Lopsided(toy.Script):
    """Calls of the first rank's questions go wrong, the other's are right."""

    def answer(self, prompt):
        number = int(prompt.rsplit("Q", 1)[1].split("+")[0]) - 10
        self.right = float(number // 2 % 2)
        return super().answer(prompt)


def check(folder, model, norm: str, accumulate: int) -> None:
    world = dist.get_world_size()
    made = {"axpo_norm": norm, "num_resamples": 3, "resample_budget": 1.0, "shuffle_dataset": False, "tool": 0.9}
    tool = made.pop("tool")
    t = toy.trainer(folder, model, kind=Recording, script=Lopsided(None, tool=tool), num_iterations=2, max_steps=4,
                    gradient_accumulation_steps=accumulate, ddp_find_unused_parameters=False, **made)  # fmt: skip
    t.model.train()
    t.current_gradient_accumulation_steps = accumulate
    batch = t._generate_and_score_completions(toy.generation_batch(t))
    ordinary = 8 * accumulate
    # one global budget, the same plan everywhere, the work dealt evenly though the sources are one rank's
    assert 0 < len(t.selected) <= 2 * ordinary // 3
    every = [None] * world
    dist.all_gather_object(every, (t.selected, rows.row_count(batch), batch["num_items_in_batch"].item()))
    assert every[0] == every[1], every
    if accumulate == 1:  # 16 rows of four questions: the first two are rank 0's
        assert all(b < 2 for b, _ in t.selected)
    share = -(-len(t.selected) * 3 // world)
    assert rows.row_count(batch) == -(-(ordinary + share) // accumulate) * accumulate
    dist.all_gather_object(every, {k: v for k, v in batch.items() if k != "num_items_in_batch"})
    whole = rows.join(every[0], every[1], t._tokenizer.pad_token_id)
    mask = (whole["completion_mask"] * whole["tool_mask"]).float()
    assert mask.sum() == batch["num_items_in_batch"]
    continued = [i for i in range(len(mask)) if i % (len(mask) // 2) >= ordinary and mask[i].any()]
    assert len(continued) == 3 * len(t.selected)
    # DDP's average of the ranks' gradients is the plan's on all rows
    batch["old_per_token_logps"] -= 0.1
    whole["old_per_token_logps"] -= 0.1
    t._generate_and_score_completions = lambda _: batch
    weight = t.model.lm_head.weight
    losses = []
    for t._step in range(accumulate):
        losses.append(t._compute_loss(t.model, t._prepare_inputs([])))
    (got,) = torch.autograd.grad(sum(losses), weight)
    dist.all_reduce(got)
    logp = t._get_per_token_logps_and_entropies(
        t.model, torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1),
        torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1), whole["completion_ids"].shape[1],
    )[0]  # fmt: skip
    ratio, a = (logp - whole["old_per_token_logps"]).exp(), whole["advantages"][:, None]
    d = logp - whole["ref_per_token_logps"]
    token = -torch.min(ratio * a, ratio.clamp(0.8, 1.4) * a) + 1e-3 * ratio * ((-d).exp() - 1 + d)
    (want,) = torch.autograd.grad((token_weights(mask, norm, 2 * ordinary) * token).sum(), weight)
    assert (got / world - want).norm() <= 1e-4 * want.norm(), (norm, got.norm() / world, want.norm())
    del t._generate_and_score_completions
    t._step, t._buffered_inputs = 0, None
    t.train()
    logs = [e for e in t.state.log_history if "loss" in e]
    assert len(logs) == 4 and sum(e.get("axpo/resampled_rows", 0) for e in logs) > 0
    total = torch.cat([p.detach().flatten() for p in t.model.parameters()])
    other = [torch.empty_like(total) for _ in range(world)]
    dist.all_gather(other, total)
    assert torch.equal(*other)


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU="true",
                      MASTER_ADDR="localhost", MASTER_PORT="0")  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    folder = Path(store).parent
    if rank == 0:
        toy.save(folder / "model")
    dist.barrier()
    for norm, accumulate in (("token_mean", 1), ("row", 2)):
        check(folder / str(rank), str(folder / "model"), norm, accumulate)
    dist.barrier()
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
