"""A test's settings, varied: what a varied method does not have is left out."""

from pathlib import Path
from typing import Any

from cast_train.config import TrainConfig, of_method, read_toml


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(of_method({**config.as_dict(), **changes}))


def of_file(path: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(of_method({**read_toml(path), **changes}))
