"""One run in two processes: the same losses as in one, with the same sequences per step."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cast_train import checkpoint
from cast_train.config import TrainConfig
from cast_train.run import train


@pytest.mark.parametrize("method", ["gates", "adams"])
def test_two_processes_learn_what_one_does(method, llama_dir, text_file, settings_file, tmp_path):
    rate = 0.01 if method == "adams" else 3e-3
    config = TrainConfig.from_toml(
        settings_file, method=method, steps=10, learning_rate=rate, evaluate_every=5
    )
    one = train(llama_dir, [text_file], tmp_path / "one", config)

    halved = dataclasses.replace(config, batch_blocks=config.batch_blocks // 2)
    lines = [f"{key} = {json.dumps(value)}" for key, value in halved.as_dict().items()]
    (tmp_path / "two.toml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "cast_train", "run", "--model", str(llama_dir)]
    command += ["--text", str(text_file), "--config", str(tmp_path / "two.toml")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = checkpoint.verify(tmp_path / "two")
    assert two["tokens_seen"] == one["tokens_seen"]
    for ours, theirs in zip(two["curve"], one["curve"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    for name in first:  # AdamW's first steps are signs, so single small weights may differ
        error = (first[name].float() - second[name].float()).norm() / first[name].float().norm()
        assert error < 2e-2, name
    assert torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
