"""One run in two processes, with copies of the parameters or shares of them: what one would do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cast_serve.checkpoint.record import verify
from cast_train.config import TrainConfig
from cast_train.training.run import train
from tests.cast_train.settings import changed, of_file

# `cast-train`, that ends in a step after the first checkpoint, or if it begins before it.
STOP_IF = """
import sys
from cast_train.__main__ import main
from cast_train.training.trainer import CastTrainer

compute_loss = CastTrainer.compute_loss

def stop(self, *args, **kwargs):
    if self.state.global_step {condition}:
        sys.exit("stopped")
    return compute_loss(self, *args, **kwargs)

CastTrainer.compute_loss = stop
main()
"""


def flags(config, out, model_dir, text_file, number):
    """Of `cast-train run`, with an equal part of a batch for each process."""
    shared = changed(config, batch_blocks=config.batch_blocks // number)
    lines = [f"{key} = {json.dumps(value)}" for key, value in shared.as_dict().items()]
    settings = out.with_suffix(".toml")
    settings.write_text("\n".join(lines))
    command = ["--model", str(model_dir), "--text", str(text_file)]
    return [*command, "--config", str(settings), "--out", str(out)]


def in_processes(
    config, out, model_dir, text_file, *more, program=("-m", "cast_train"), number=2, restarts=0
):
    """`cast-train run` under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), "--max-restarts", str(restarts), *program, "run"]
    command += [*flags(config, out, model_dir, text_file, number), *more]
    return subprocess.run(
        command,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "FOUND": str(out.parent),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as docs/method.md says
        },
        capture_output=True,
        text=True,
    )


def tensors_of(first, second):
    """Name and both tensors of two checkpoints, which must have the same names."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    return [(name, ours[name], theirs[name]) for name in ours]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"method": "gates"}),
        ("llama", {"method": "adams", "learning_rate": 0.01}),
        ("llama", {"method": "gates", "is_sharded": True, "precision": "bf16", "scale_parts": 2}),
        ("llama", {"method": "adams", "learning_rate": 0.01, "is_sharded": True}),
        ("gpt2", {"method": "ste", "is_sharded": True}),
        ("llama", {"method": "fixed", "is_sharded": True, "quantize": "int8", "zeros": 0.4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_two_processes_learn_what_one_does(
    family, settings, request, text_file, settings_file, tmp_path
):
    model_dir = request.getfixturevalue(f"{family}_dir")
    # bf16, which `auto` is on some CPUs, rounds half a batch in other places than a whole one.
    common = {"steps": 10, "evaluate_every": 5, "precision": "fp32"}
    config = of_file(settings_file, **{**common, **settings})
    alone = changed(config, is_sharded=False)
    one = train(model_dir, [text_file], tmp_path / "one", alone)
    done = in_processes(config, tmp_path / "two", model_dir, text_file)
    assert done.returncode == 0, done.stderr[-3000:]
    two = verify(tmp_path / "two")
    assert two["tokens_seen"] == one["tokens_seen"]
    rel = 1e-2 if config.precision == "bf16" else 1e-3
    for ours, theirs in zip(two["curve"], one["curve"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=rel)
    assert two["quality"]["perplexity_hard"] == pytest.approx(
        one["quality"]["perplexity_hard"], rel=rel
    )
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert first.keys() == second.keys()
    for name in first:  # AdamW's first steps are signs, so single small weights may differ,
        if first[name].ndim < 2:  # and so may biases whose true gradient is 0
            continue
        error = (first[name].float() - second[name].float()).norm() / first[name].float().norm()
        assert error < 3e-2, name


@pytest.fixture(scope="module", params=[False, True], ids=["copied", "sharded"])
def whole(request, llama_dir, text_file, settings_file, tmp_path_factory):
    """The configuration of a run, and what four processes make of it that nothing stops."""
    config = TrainConfig.from_toml(
        settings_file, steps=10, is_sharded=request.param, precision="fp32"
    )
    out = tmp_path_factory.mktemp("whole") / "out"
    done = in_processes(config, out, llama_dir, text_file, number=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return config, out


KILLED_ONCE = """
import os, signal
from pathlib import Path
from cast_train.__main__ import main
from cast_train.training.trainer import CastTrainer

compute_loss = CastTrainer.compute_loss

def die(self, *args, **kwargs):
    died = Path(os.environ["FOUND"]) / "died"
    if self.state.global_step == 6 and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_loss(self, *args, **kwargs)

CastTrainer.compute_loss = die
main()
"""


@pytest.mark.parametrize("whole", [True], indirect=True, ids=["sharded"])
def test_one_of_four_processes_is_killed(whole, llama_dir, text_file, tmp_path):
    config, expected = whole
    (tmp_path / "die.py").write_text(KILLED_ONCE)
    arguments = (config, tmp_path / "out", llama_dir, text_file, "--resume")
    program = [str(tmp_path / "die.py")]
    done = in_processes(*arguments, program=program, number=4, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    origins = verify(tmp_path / "out")["origins"]
    assert [launch["step"] for launch in origins] == [0, 4]
    for name, ours, theirs in tensors_of(expected, tmp_path / "out"):
        assert torch.equal(ours, theirs), name


SRUN = """#!/usr/bin/env bash
# Every node is this machine.
shift
for node in $(seq "$SLURM_NNODES"); do "$@" & done
for node in $(seq "$SLURM_NNODES"); do wait -n || exit 1; done
"""


def test_slurm_nodes_train_one_model(llama_dir, text_file, settings_file, tmp_path):
    config = TrainConfig.from_toml(settings_file, steps=4, precision="fp32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "bin").mkdir()
    # More names than a pipe holds, so that a reader of the first alone would break it.
    nodes = "#!/bin/sh\necho 127.0.0.1\nseq -f node%g 2 20000\n"
    for name, content in (("srun", SRUN), ("scontrol", nodes)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "CAST_RDZV_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).parents[3] / "deploy/train.slurm"
    arguments = flags(config, tmp_path / "two", llama_dir, text_file, 2)
    done = subprocess.run([script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = verify(tmp_path / "two")
    assert record["num_processes"] == 2
    one = train(llama_dir, [text_file], tmp_path / "one", config)
    assert record["quality"]["perplexity_hard"] == pytest.approx(
        one["quality"]["perplexity_hard"], rel=1e-3
    )


def test_a_run_of_four_processes_is_gone_on_with_by_two(whole, llama_dir, text_file, tmp_path):
    config, expected = whole
    out = tmp_path / "out"
    program = out.with_name("stop.py")
    program.write_text(STOP_IF.format(condition="== 6"))
    stopped = in_processes(config, out, llama_dir, text_file, program=[str(program)], number=4)
    assert stopped.returncode != 0
    assert "stopped" in stopped.stderr, stopped.stderr[-3000:]
    assert not out.exists()
    written, half = (tmp_path / "out.partial" / f"checkpoint-{step}" for step in (4, 6))
    shutil.copytree(written, half)  # as a kill in the midst of writing would leave it
    for file in ("complete", "trainer_state.json", "rng_state_1.pth"):
        (half / file).unlink(missing_ok=True)
    program = out.with_name("go-on.py")
    program.write_text(STOP_IF.format(condition="< 4"))
    done = in_processes(config, out, llama_dir, text_file, "--resume", program=[str(program)])
    assert done.returncode == 0, done.stderr[-3000:]
    for name, ours, theirs in tensors_of(expected, out):
        torch.testing.assert_close(ours, theirs, msg=name)


# `cast-train`, whose first checkpoint is written after two more steps, or fails to be.
LATE = """
import os, sys, threading, time
import torch.distributed.checkpoint as dcp
from cast_train.__main__ import main
from cast_train.training.trainer import CastTrainer

compute_loss, write_data = CastTrainer.compute_loss, dcp.FileSystemWriter.write_data
has_moved = threading.Event()

def step(self, *args, **kwargs):
    if self.state.global_step == 6:
        has_moved.set()
        while not self.has_written:
            time.sleep(0.01)
    if self.state.global_step == 7 and os.environ["RANK"] == "0":
        sys.exit("stopped")
    return compute_loss(self, *args, **kwargs)

def write(self, *args, **kwargs):
    assert has_moved.wait(60)
    if os.environ["RANK"] == "1" and {fails}:
        raise OSError(28, "No space left on device")
    return write_data(self, *args, **kwargs)

CastTrainer.compute_loss, dcp.FileSystemWriter.write_data = step, write
main()
"""


@pytest.mark.parametrize("whole", [True], indirect=True, ids=["sharded"])
@pytest.mark.parametrize("fails", [False, True], ids=["written", "disk-is-full"])
def test_checkpoints_are_written_beside_the_steps(fails, whole, llama_dir, text_file, tmp_path):
    config, expected = whole
    config, out = changed(config, checkpoint_async=True), tmp_path / "out"
    program = out.with_name("late.py")
    program.write_text(LATE.format(fails=fails))
    stopped = in_processes(config, out, llama_dir, text_file, program=[str(program)], number=4)
    assert stopped.returncode != 0
    complete = tmp_path / "out.partial" / "checkpoint-4" / "complete"
    assert complete.exists() is not fails, stopped.stderr[-3000:]
    if fails:
        assert "process 1 could not write to" in stopped.stderr
        assert "No space left on device; once that is mended, --resume" in stopped.stderr
        return
    assert "stopped" in stopped.stderr, stopped.stderr[-3000:]
    program.write_text(STOP_IF.format(condition="< 4"))
    arguments = (config, out, llama_dir, text_file, "--resume")
    done = in_processes(*arguments, program=[str(program)], number=4)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, ours, theirs in tensors_of(expected, out):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dense"},
        {"method": "fixed", "is_sharded": True},
        {"method": "fixed", "quantize": "int8", "channel_order": "auto", "zeros": 0.4},
        {"method": "gates", "masks_first": True, "quantize": "int4", "scale_group": 32},
        {"method": "gates", "selector": "generator", "zeros": 0.4},
        {"method": "gates", "is_sharded": True, "channel_order": "auto"},
        {"method": "ste", "is_sharded": True},
        {"method": "adams", "learning_rate": 0.01, "mask_every": 1},
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_processes_on_unlike_cpus_train_one_model(
    settings, llama_dir, text_file, settings_file, tmp_path
):
    """Whatever one process finds by its own rounding, and keeps, all must take from the first."""
    config = of_file(settings_file, steps=8, precision="fp32", **settings)
    program = [str(Path(__file__).with_name("unlike_cpus.py"))]
    done = in_processes(config, tmp_path / "out", llama_dir, text_file, program=program)
    assert done.returncode == 0, done.stderr[-3000:]
    for when in ("start", "end"):
        first, second = (torch.load(tmp_path / f"{when}-{rank}") for rank in (0, 1))
        assert first.keys() == second.keys()
        assert first
        for name in first:
            same = (
                torch.equal(first[name], second[name])
                if isinstance(first[name], torch.Tensor)
                else first[name] == second[name]
            )
            assert same, f"{when}: {name}"
