"""Several processes, as ``accelerate launch`` or torchrun start them: what the libraries leave to their caller."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

#: What launchers tell a process of the others.
_LAUNCHER = frozenset((
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
))  # fmt: skip


def world_size() -> int:
    """Processes of this run, known before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the one of its machine that prints."""
    return int(os.environ.get("LOCAL_RANK", "0")) <= 0


def leave_it_to_the_first(seconds: float = 20.0) -> None:
    """Wait, in all processes of a machine but the first, until the launcher ends them along with that one.

    What is wrong with the input is wrong for all of them: the first says it.  Were another to exit before, the
    launcher would end the first unheard.  Whoever comes back from here has something of its own to say.
    """
    if not speaks():
        time.sleep(seconds)


def allow_sharding_on_cpu(arguments) -> None:
    """Let accelerate shard on CPUs where FSDP was asked for.

    accelerate turns FSDP on for the process groups of GPUs only, and on CPUs trains with DDP without a word.
    Nothing but that test stands in the way, so the group is given a GPU group's name until it has been passed; the
    device and gloo stay.
    """
    from accelerate import DistributedType

    asked = arguments.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    state = arguments.distributed_state
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def fill_from_first(model: nn.Module) -> nn.Module:
    """Give every process the first one's weights, where only that one has read them from disk.

    So it is under FSDP with ``cpu_ram_efficient_loading``, accelerate's default.  FSDP fills what it shards; a
    teacher is not sharded.
    """
    from transformers.integrations import is_fsdp_enabled

    if not is_fsdp_enabled():
        return model
    import torch

    for tensor in model.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)
    return model


def process_index() -> int:
    """This process's number among all of the run, known before the process group exists."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def meeting() -> Iterator[Callable[[], None]]:
    """Lends a function that waits until every process of the run is there, as often as it is called.

    A group that has to be made is made once, since a second one may meet what the first left, and is gone afterwards.
    """
    import torch.distributed as dist

    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo")
    try:
        yield dist.barrier
    finally:
        if made:
            dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it nothing tells this process of the others: a Trainer trains a model of its own, on a GPU of its own.

    Of several GPUs a process keeps the one of its number on the machine, from the first time on; nothing may have asked
    CUDA for its devices before.
    """
    names = [n for n in os.environ if n in _LAUNCHER or n.startswith(("TORCHELASTIC_", "ACCELERATE_"))]
    hidden = {n: os.environ.pop(n) for n in names}
    if int(hidden.get("LOCAL_WORLD_SIZE", "1")) > 1:
        visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        if len(visible) != 1:
            local = int(hidden["LOCAL_RANK"])
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if visible else str(local)
    try:
        yield
    finally:
        os.environ.update(hidden)
