"""Model in memory -> a directory on disk, gated or pruned."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets

Save = Callable[..., Path]


@pytest.fixture
def save_gated(tmp_path: Path) -> Save:
    """`folder = save_gated(model, n=2, m=4)`: random gate logits beside every target's weight."""

    def save(model: PreTrainedModel, pattern: Pattern = TWO_FOUR, **more: Any) -> Path:
        folder = tmp_path / "gated"
        model.save_pretrained(folder)
        targets, _ = find_targets(model, pattern)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name in targets:
            tensors[f"{name}.gate"] = torch.randn(tensors[f"{name}.weight"].shape)
        save_file(tensors, file, metadata={"format": "pt"})
        cast = {
            "format_version": 1,
            "kind": "gated",
            "method": "gates",
            "n": pattern.n,
            "m": pattern.m,
            "targets": list(targets),
            "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()},
            **more,
        }
        (folder / "cast.json").write_text(json.dumps(cast))
        return folder

    return save


@pytest.fixture
def save_pruned(tmp_path: Path) -> Save:
    """`folder = save_pruned(model)`: an ordinary HF directory whose targets have the pattern."""

    def save(
        model: PreTrainedModel,
        max_shard_size: str = "1GB",
        pattern: Pattern = TWO_FOUR,
        is_on_record: bool = False,
    ) -> Path:
        for module in find_targets(model, pattern)[0].values():
            module.weight.data *= hard_mask(module.weight.data.float().abs(), pattern)
        folder = tmp_path / "pruned"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if is_on_record:
            n, m = pattern.n, pattern.m
            cast = {"format_version": 1, "kind": "pruned", "method": "magnitude", "n": n, "m": m}
            (folder / "cast.json").write_text(json.dumps(cast))
        return folder

    return save
