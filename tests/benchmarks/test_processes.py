import json
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.tables import benches
from tests.benchmarks.conftest import LoadOf


def test_two_processes_are_gone_on_with_by_one(
    llama_dir: Path, text_file: Path, load_of: LoadOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"1": processes.Way(1), "2, then 1": processes.Way(2, number_after=1)}
    monkeypatch.setattr(processes, "METHODS", {"fixed": {"block_size": 32}})
    monkeypatch.setattr(processes, "WAYS", ways)
    done: list[None] = []
    check_stamp = load_of(done)
    found = processes.measure(llama_dir, text_file, 80, lambda: done.append(None))
    assert len(done) == 2
    check_stamp(found)
    alone, shared = (found["methods"]["fixed"][name] for name in ways)
    assert alone["launches"] == [0]
    assert shared["launches"][0] == 0
    assert shared["launches"][1] >= 4
    assert shared["nats"] == pytest.approx(alone["nats"], abs=1e-3)
    assert len(alone["nats"]) == 5
    *_, line = benches.processes([found])
    assert line.startswith(f"| fixed | {alone['nats'][-1]:.4f} | 0.000")
    assert json.loads(json.dumps(found)) == found


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)failed:.*nowhere"):
        processes.measure(tmp_path / "nowhere", tmp_path / "text", 4)
    with pytest.raises(ValueError, match="5 steps have no four quarters"):
        processes.measure(tmp_path, tmp_path, 5)
