"""Rows of safetensors: what a process reads of them, and what all of them write together."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import AutoModelForCausalLM

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.record import CheckpointError
from cast_train import sharding
from cast_train.checkpoint import rows
from cast_train.checkpoint.models import load_any
from cast_train.pruning.oneshot import write_pruned

TOKENS = torch.arange(32).view(1, 32)
LOAD = """
import sys
import torch
from pathlib import Path
from torch import distributed
from cast_train import sharding
from cast_train.checkpoint import rows

directory, out = map(Path, sys.argv[1:])
distributed.init_process_group("gloo")
model = rows.load(directory, torch.float32)
found = {name: sharding.whole(tensor.detach()) for name, tensor in model.named_parameters()}
own = sum(sharding.local(tensor).numel() for tensor in model.parameters())
torch.save({"found": found, "own": own}, out / f"{sharding.rank()}")
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.fixture
def alone():
    """A group of this process only, whose rows are all rows."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def named(model):
    return {name: sharding.whole(tensor.detach()) for name, tensor in model.named_parameters()}


def assert_same(found, directory):
    wanted = named(load_any(directory, torch.float32))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_read_as_transformers_reads_it(family, request, alone):
    directory = request.getfixturevalue(f"{family}_dir")
    model, whole = rows.load(directory, torch.float32), load_any(directory, torch.float32)
    assert_same(named(model), directory)
    with torch.no_grad():  # so the buffers are right, too
        assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)


def test_each_of_three_processes_has_a_third(llama_dir, tmp_path):
    (tmp_path / "load.py").write_text(LOAD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", tmp_path / "load.py", llama_dir, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [torch.load(tmp_path / str(rank)) for rank in range(3)]
    for part in parts:
        assert_same(part["found"], llama_dir)
    total = sum(tensor.numel() for tensor in parts[0]["found"].values())
    assert sum(part["own"] for part in parts) == total
    assert max(part["own"] for part in parts) < 0.4 * total  # 32 rows are 11, 11 and 10


def test_zeros_are_read_pruned_and_compressed(llama_dir, text_file, tmp_path, alone):
    write_pruned(llama_dir, [text_file], tmp_path / "pruned", "magnitude")
    convert(tmp_path / "pruned", tmp_path / "compressed")
    for folder in ("pruned", "compressed"):
        assert_same(named(rows.load(tmp_path / folder, torch.float32)), tmp_path / folder)


def test_names_without_the_head_s_prefix_are_found(gpt2_dir, tmp_path, alone):
    shutil.copytree(gpt2_dir, tmp_path / "bare")
    state = load_file(gpt2_dir / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    save_file(bare, tmp_path / "bare/model.safetensors", {"format": "pt"})
    assert_same(named(rows.load(tmp_path / "bare", torch.float32)), gpt2_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: {}, "lacks model.layers.1.mlp.up_proj.weight.*save_pretrained"),
        (
            lambda tensor: {"weight": tensor[:, 4:].contiguous()},
            r"is \[64, 28\], but .* \[64, 32\]",
        ),
    ],
    ids=["missing", "shape"],
)
def test_damage_is_named(change, message, llama_dir, tmp_path, alone):
    shutil.copytree(llama_dir, tmp_path / "damaged")
    path = tmp_path / "damaged/model.safetensors"
    state = load_file(path)
    name = "model.layers.1.mlp.up_proj"
    changed = change(state.pop(f"{name}.weight"))
    save_file(state | {f"{name}.{key}": tensor for key, tensor in changed.items()}, path)
    with pytest.raises(CheckpointError, match=message):
        rows.load(tmp_path / "damaged", torch.float32)


@pytest.mark.parametrize("size", ["4GB", "20KB"], ids=["one shard", "many shards"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_written_transformers_reads(family, size, request, tmp_path, alone, monkeypatch):
    directory = request.getfixturevalue(f"{family}_dir")
    monkeypatch.setattr(rows, "MAX_SHARD_SIZE", size)
    model = rows.load(directory, torch.float32)
    rows.save(tmp_path, model, {})
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wanted = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for (name, ours), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float()), name
    settings = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((directory / "config.json").read_text())
    assert settings == {**theirs, "dtype": "bfloat16"}


def test_a_checkpoint_of_an_earlier_release_is_refused(llama_dir, tmp_path, alone):
    model = rows.load(llama_dir, torch.float32)
    with pytest.raises(CheckpointError, match="written by an earlier release.*start again"):
        rows.load_state(tmp_path, model, torch.optim.AdamW(model.parameters()))
