"""Several processes: what all must have alike, and tensors cut by rows (FSDP2) <-> whole ones.

Gradients are averaged, so copies of the parameters move alike. Whatever else depends on rounding
and then stays (the order of channels, a start, solved weights, scales, a frozen mask) would differ
between CPUs of unlike kinds for good. The first process alone computes it and the others take what
it found (`in_first`, `take_first`).

Between two forwards each process holds rows of every parameter; during a layer's forward it holds
that layer whole. The mask of a group is thus always chosen from all of its M weights. Optimisers
work on the rows alone, which is the same for all that treats weights one by one; AdamS ranks
groups, which rows keep whole.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from cast_serve.errors import UsageError
from cast_train.config import TrainConfig

Found = TypeVar("Found")


def rank() -> int:
    """This process's rank under torchrun, also before torch.distributed is initialised."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """The processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def in_first(compute: Callable[[], Found]) -> Found:
    """What `compute` returns in the first process, in all of them; the others do not call it.

    Every process must call; what is returned must be small and can be pickled.
    """
    if num_processes() == 1:
        return compute()
    found = [compute() if rank() == 0 else None]
    distributed.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


@torch.no_grad()
def take_first(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every other process with the first one's; every one must call.

    Args:
        tensors: whole ones, of the same shapes in the same order in every process.
    """
    if num_processes() == 1:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for tensor in tensors:
        sent = tensor.detach().to(device).contiguous()
        distributed.broadcast(sent, 0)
        tensor.copy_(sent)


def state_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, those that are not saved too, for `take_first`."""
    return [*module.parameters(), *module.buffers()]


def check(config: TrainConfig) -> None:
    """Refuses ``is_sharded`` in a single process.

    Raises:
        UsageError: naming the remedy.
    """
    if config.is_sharded and num_processes() < 2:
        raise UsageError(
            "is_sharded needs two processes or more, but this is the only one; start the run with "
            "torchrun --nproc-per-node 2 -m cast_train run ..., or set is_sharded = false"
        )


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole of a sharded one; then every process must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this process's rows of a sharded one, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor cut as `other` is; the tensor itself if that is whole."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded model, whole, on every process; every process must call."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
