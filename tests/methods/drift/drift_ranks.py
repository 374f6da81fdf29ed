"""One of two gloo ranks; run by test_defects.py: the trainer's step is that of one process with the whole batch.

python drift_ranks.py RANK WORLD STORE
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from drift_cases import distance, reference_gradient, rows, step_gradient, trainer

WEIGHTS = [2.5, 0.0, 0.3, 1.0, 0.7, 4.0, 0.1, 0.9]
CASES = (
    (WEIGHTS, {}, {}),
    (WEIGHTS, {"length_norm": "mean", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4},
     {"mean": True}),
    ([w / 1000 for w in WEIGHTS], {"batch_weight_norm": True}, {"by_weight": True}),
    # the weights of one row only: whichever rank has it, the other has nothing
    ([0.0] * 7 + [3.0], {}, {}),
)  # fmt: skip


def check(weights: list[float], options: dict, kind: dict) -> None:
    data = rows(weights)
    loss, want = reference_gradient(data, **kind)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True, **options}
    one = trainer(tempfile.mkdtemp(), data, **options)
    assert one.accelerator.num_processes == 2
    error = distance(step_gradient(one), want)
    assert error < 2e-6, f"{options}: {error}"
    entry = one.state.log_history[0]
    assert abs(entry["loss"] - loss) <= 1e-5 * abs(loss), (entry["loss"], loss)
    assert abs(entry["weight_mean"] - sum(weights) / 8) < 1e-6, entry
    assert abs(entry["weight_max"] - max(weights)) < 1e-6, entry


def main(rank: str, world: str, store: str) -> None:
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    for case in CASES:
        check(*case)
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
