"""What cannot be sharded is refused; that sharding changes nothing is test_processes.py's."""

import pytest
import torch

from cast_train import sharding
from cast_train.config import TrainConfig
from cast_train.training.run import train


def test_one_process_has_nobody_to_share_with(llama_dir, text_file, settings_file, tmp_path):
    config = TrainConfig.from_toml(settings_file, steps=2, is_sharded=True)
    with pytest.raises(ValueError, match="is_sharded needs two processes.*torchrun"):
        train(llama_dir, [text_file], tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_tensor_is_its_own_share():
    tensor = torch.ones(3)
    for same in (sharding.whole, sharding.local, lambda t: sharding.whole_of(t, t)):
        assert same(tensor) is tensor
