from pathlib import Path

import pytest

from benchmarks import big_text
from benchmarks.tables import benches


def test_a_small_text(llama_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} " + "and so on " * 15 for number in range(9)), "utf-8")
    folder = tmp_path / "made"
    found = big_text.measure(llama_dir, text, folder, 300_000, steps=2)
    lines = (folder / "text.txt").read_text("utf-8").splitlines()
    assert found["text_bytes"] >= 300_000
    assert len(set(lines)) > len(lines) / 2
    assert found["num_tokens"] > 0
    assert len(found["wait_s"]) == len(found["step_s"]) == 2
    assert 0 < found["wait_share"] < 1
    assert all(sample["own_bytes"] > 0 for sample in found["tokenize_memory"])
    *_, line = benches.big_text([found])
    assert line.startswith(f"| 0.00 | {found['num_tokens']:,} | 0 | ")
    assert line.endswith(f"{found['wait_share']:.2%} of 2 |")


def test_a_folder_with_something_in_it_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="exists"):
        big_text.measure(llama_dir, tmp_path / "text.txt", tmp_path, 1000, steps=1)
