"""Several processes: what all must have alike, and tensors cut by rows (FSDP2) <-> whole ones.

Gradients are averaged, so copies of the parameters move alike. Whatever else depends on rounding
and then stays (the order of channels, a start, solved weights, scales, a frozen mask) would differ
between CPUs of unlike kinds for good. The first process alone computes it and the others take what
it found (`in_first`, `take_first`).

A sharded model is never whole. Between two forwards each process has rows of every parameter, and
during a layer's forward that layer. Rows keep groups whole and are pruned, solved and ranked by
themselves, so each process does that for its own, and no other has them to differ in.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from cast_serve.errors import UsageError
from cast_train.config import TrainConfig

Found = TypeVar("Found")


def rank() -> int:
    """This process's rank under torchrun, also before torch.distributed is initialised."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """The processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leave() -> None:
    """Ends what connects the processes, and every process but the first; all call it when done.

    DTensor's caches keep the group, and so gloo's threads, until Python has ended; a thread that
    lets go of a tensor only then aborts its process. So the others end at once, as a process of
    `multiprocessing` does. Not for errors: others may wait in a collective, and all would hang.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    distributed.destroy_process_group()
    if rank() != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
    for tensor in tensors:
        sent = tensor.detach().to(device()).contiguous()
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


def whole_of(rows: Tensor, other: Tensor) -> Tensor:
    """The whole of what each process has rows of, cut as `other` is; every process must call.

    Args:
        rows: of this process; if `other` is whole, all of them.
    """
    if not isinstance(other, DTensor):
        return rows
    return DTensor.from_local(
        rows, other.device_mesh, other.placements, shape=other.shape, stride=other.stride()
    ).full_tensor()


def own_rows(tensor: Tensor) -> slice:
    """Which rows of a tensor this process has."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    mesh = tensor.device_mesh
    first = -(-len(tensor) // mesh.size()) * mesh.get_local_rank()  # as torch.chunk cuts
    return slice(first, first + len(tensor.to_local()))


def summed(tensor: Tensor, like: Tensor) -> Tensor:
    """Adds up, in place, what each process found in its rows of `like`; every one must call.

    Args:
        tensor: of one shape in all processes; what is returned.
        like: if it is whole, nothing is added.
    """
    if isinstance(like, DTensor):
        distributed.all_reduce(tensor)
    return tensor


@contextmanager
def with_head(model: nn.Module) -> Iterator[None]:
    """A sharded model's embeddings, output layer and last norm are whole; every process enters."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shard(model: Any) -> None:
    """Cuts all parameters by rows over the processes, in place; a decoder layer is a unit.

    Args:
        model: a transformers model, best of meta tensors, which stay such.
    """
    mesh = init_device_mesh(device().type, (num_processes(),))
    layers = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    # torch leaves the outermost unit whole until its backward, which not every forward has.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
