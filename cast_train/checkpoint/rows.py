"""A model directory <-> a model cut by rows over the processes, which none of them holds whole.

Every process builds the model without weights and reads its own rows of the directory's tensors.
As a directory is written, the tensors are put together one by one, in the first process, and go to
the disk with their shard.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoModelForCausalLM

from cast_serve.checkpoint.architecture import attention_of, empty_model
from cast_serve.checkpoint.declared import quantization_of, structure_of
from cast_serve.checkpoint.linear import PARTS, CompressedLinear
from cast_serve.checkpoint.record import CheckpointError, read_json, shards
from cast_serve.checkpoint.shard import opened
from cast_train import sharding
from cast_train.checkpoint import conv1d

MAX_SHARD_SIZE = "4GB"
STATE = "state"  # in a checkpoint of an unfinished run


def load(directory: Path, dtype: torch.dtype) -> Any:
    """The sharded model of an ordinary directory or a compressed one; every process must call.

    Args:
        directory: dense, pruned or compressed, not quantised.
        dtype: of all parameters.

    Raises:
        CheckpointError: if a weight is missing or of another shape.
    """
    model = _without_weights(lambda: empty_model(directory, dtype))
    sharding.shard(model)
    allocate(model)
    with ExitStack() as stack:
        stored = _Stored(directory, model, stack)
        for name, tensor in _on_disk(model).items():
            stored.read(name, tensor)
    return model


def _on_disk(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that are saved; others are computed."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def another(model: Any) -> Any:
    """The model of a sharded one's configuration, fp32, not sharded yet; with meta parameters."""
    settings = model.config
    found = _without_weights(
        lambda: AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, attn_implementation=attention_of(settings)
        )
    )
    found.generation_config = model.generation_config
    return found


def _without_weights(build: Callable[[], Any]) -> Any:
    """What `build` returns, a transformers model, with meta tensors for parameters."""
    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()
    return conv1d.to_linears(model)


def allocate(model: nn.Module) -> None:
    """Gives this process's rows of all parameters memory, which holds anything; buffers stay."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=sharding.device())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def move(model: nn.Module, gated: nn.Module) -> None:
    """Moves a sharded model's parameters into the same model with gates, and frees them."""
    places = dict(gated.named_parameters())
    for name, parameter in model.named_parameters():
        linear = name.removesuffix(".weight")
        place = places.get(name, places.get(f"{linear}.parametrizations.weight.original"))
        assert place is not None, name
        sharding.local(place.data).copy_(sharding.local(parameter.data))
        sharding.local(parameter.data).untyped_storage().resize_(0)
    places = dict(gated.named_buffers())
    for name, buffer in model.named_buffers():
        places[name].copy_(buffer)


class _Stored:
    """A directory's tensors by name; a row is read where it is asked for."""

    def __init__(self, directory: Path, model: Any, stack: ExitStack) -> None:
        self.directory = directory
        self.structure = structure_of(
            directory, quantization_of(directory, read_json(directory / "config.json"))
        )
        self.prefix = f"{model.base_model_prefix}."
        self.transposed = conv1d.names_of_transposed(model)
        self.shard_of: dict[str, Any] = {}
        for path in shards(directory):
            shard = stack.enter_context(opened(path))
            self.shard_of |= dict.fromkeys(shard.keys(), shard)

    @torch.no_grad()
    def read(self, name: str, tensor: Tensor) -> None:
        """Reads this process's rows of a tensor of the model."""
        rows, local = sharding.own_rows(tensor), sharding.local(tensor)
        if not local.numel():
            return
        linear = name.removesuffix(".weight")
        if f"{linear}.bitmask" in self.shard_of:
            found = self._decompressed(linear, rows, tensor.shape[1])
        else:
            stored = self._slice(name)
            shape = stored.get_shape()
            is_transposed = name in self.transposed
            wanted = list(tensor.shape)[::-1] if is_transposed else list(tensor.shape)
            if shape != wanted:
                raise CheckpointError(
                    f"{self.directory}: {name} is {shape}, but its config.json asks for {wanted}; "
                    "copy the whole directory again"
                )
            found = stored[:, rows].t() if is_transposed else stored[rows]
        local.copy_(found)

    def _slice(self, name: str) -> Any:
        """A tensor under its name, or that which a model without its head has it under."""
        for each in (name, name.removeprefix(self.prefix)):
            if each in self.shard_of:
                return self.shard_of[each].get_slice(each)
        raise CheckpointError(
            f"{self.directory} lacks {name}; a sharded run reads rows by the names that "
            "transformers writes: load the model and save it again with save_pretrained"
        )

    def _decompressed(self, linear: str, rows: slice, in_features: int) -> Tensor:
        assert self.structure is not None
        parts = {part: self._slice(f"{linear}.{part}")[rows] for part in PARTS if part != "shape"}
        parts["shape"] = torch.tensor([len(parts["bitmask"]), in_features])
        return CompressedLinear.from_parts(linear, parts, self.structure.of(linear)).dense()


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: distributed.ProcessGroup | None = None,
) -> Future[Any] | None:
    """Writes an unfinished run's parameters and moments, each process its rows; all must call.

    Args:
        folder: of the checkpoint.
        model: sharded.
        optimizer: of the model.
        group: of all processes, by gloo, used for nothing else: a thread of each process then
            writes a copy in host memory, and this returns as soon as the copy is made.

    Returns:
        of the thread, for `wait_for`; None without a group.

    Raises:
        CheckpointError: as `wait_for` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    if group is None:
        with _failing_in_words(folder):
            dcp.save(state, checkpoint_id=folder / STATE)
        return None
    writing = dcp.async_save(state, checkpoint_id=folder / STATE, process_group=group)
    assert isinstance(writing, Future)
    return writing


def wait_for(writing: Future[Any], folder: Path) -> None:
    """Waits for a thread of `save_state`; when the first process's has ended, all have.

    Raises:
        CheckpointError: if a process could not write its rows to the folder.
    """
    with _failing_in_words(folder):
        writing.result()


@contextmanager
def _failing_in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(
            f"process {rank} could not write to {folder}: {reason}; once that is mended, --resume "
            "continues from the last complete checkpoint"
        ) from error


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads what `save_state` wrote, also with another number of processes; all must call.

    Raises:
        CheckpointError: if an earlier release wrote the checkpoint, in another form.
    """
    if not (folder / STATE).is_dir():
        raise CheckpointError(
            f"{folder} was written by an earlier release, which saved sharded runs in another "
            f"form; finish it with that release, or remove {folder.parent} and start again"
        )
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / STATE)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def save(folder: Path | None, model: Any, gate_tensors: Mapping[str, Tensor]) -> None:
    """Writes config.json, generation_config.json and the shards; every process must call.

    Args:
        folder: where to; None: in all processes but the first, which writes the others' rows too,
            and holds one shard meanwhile.
        model: sharded; its parameters are written in bf16.
        gate_tensors: what is stored beside the weights, in its own dtype.
    """
    dtype = torch.bfloat16
    tensors = {**_on_disk(model), **gate_tensors}
    num_bytes = {
        id(tensor): tensor.nbytes if name in gate_tensors else tensor.numel() * dtype.itemsize
        for name, tensor in tensors.items()
    }
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: num_bytes[id(tensor)],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = sharding.whole(tensors[name].detach())
            if folder is not None:
                shard[name] = tensor.cpu() if name in gate_tensors else tensor.to("cpu", dtype)
        if folder is not None:
            save_file(conv1d.transposed(model, shard), folder / file, {"format": "pt"})
    if folder is None:
        return
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
