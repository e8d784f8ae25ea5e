from pathlib import Path

import pytest

from benchmarks import train_step
from cast_train.config import Gates
from tests.benchmarks.conftest import LoadOf

CONFIG = Gates(steps=1000, block_size=32)


def test_all_ways_over_the_same_rounds(llama_dir: Path, text_file: Path, load_of: LoadOf) -> None:
    done: list[None] = []
    check_stamp = load_of(done)
    patterns = ("2:4", "16:32")
    found = train_step.measure(llama_dir, text_file, 2, CONFIG, patterns, lambda: done.append(None))
    assert len(done) == 3  # the first is not counted
    check_stamp(found)
    assert found["num_tokens"] == CONFIG.batch_blocks * 32
    names = ["plain", "soft 2:4", "exact 2:4", "soft 16:32", "exact 16:32"]
    assert list(found["ways"]) == names
    plain, soft, exact, soft_wide, _ = found["ways"].values()
    assert plain["over_plain"] == plain["over_plain_min"] == plain["over_plain_max"] == 1.0
    assert plain["trained_parameter_bytes"] == exact["trained_parameter_bytes"] - gate_bytes()
    assert plain["kept_bytes"] < soft["kept_bytes"]
    assert soft["over_first"] == 1.0 != soft_wide["over_first"]
    for way in (soft, exact, soft_wide):
        assert way["step_s"] > 0
        assert way["over_plain_min"] <= way["over_plain"] <= way["over_plain_max"]
    first, *_ = lines = train_step.text_of(found).splitlines()
    assert first.startswith("plain: ")
    assert "1.00 (1.00 to 1.00) times plain, " in first
    assert len(lines) == len(names)


def gate_bytes() -> int:
    """Of the tiny model's two layers: a float32 logit beside every weight of a target."""
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    return 2 * per_layer * 4


def test_no_rounds_are_refused(llama_dir: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match="0 rounds measure nothing; ask for 1 or more"):
        train_step.measure(llama_dir, text_file, 0)
