"""llama.cpp's own decode, its library a fake."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers import files, process


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of both libraries is ours, and finds the fakes."""
    library, work = tmp_path / "library", tmp_path / "work"
    library.mkdir()
    work.mkdir()
    for name in ("llama_cpp", "openvino_genai"):
        shutil.copy(Path(__file__).with_name(f"fake_{name}.py"), library / f"{name}.py")
    (library / "openvino.py").write_text('def get_version(): return "9.9"\n')
    monkeypatch.setenv("PYTHONPATH", str(library))
    for name in files.PYTHONS:
        monkeypatch.setitem(files.PYTHONS, name, Path(sys.executable))
    monkeypatch.setattr(files, "WORK", work)


@pytest.fixture
def core() -> int:
    return min(os.sched_getaffinity(0))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "q8_0.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def decode(fake_library: None, model: Path, core: int) -> Iterator[process.Process]:
    """llama.cpp's decode of a model: three sequences of 256 tokens."""
    with process.running("q8_0:native", model, [core], 256, 3) as running:
        yield running
