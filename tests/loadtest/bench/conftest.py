"""The tiny random model, and text for it, that training's tests use; and llama.cpp with a fake."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.bench import llama
from tests.cast_train.conftest import llama_dir, text_file

__all__ = ["llama_dir", "text_file"]


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's Python is ours, and finds the fake library."""
    library, work = tmp_path / "library", tmp_path / "work"
    library.mkdir()
    work.mkdir()
    shutil.copy(Path(__file__).with_name("fake_llama_cpp.py"), library / "llama_cpp.py")
    monkeypatch.setenv("PYTHONPATH", str(library))
    monkeypatch.setattr(llama, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(llama, "WORK", work)


@pytest.fixture
def core() -> int:
    return min(os.sched_getaffinity(0))


@pytest.fixture
def decode(fake_library: None, tmp_path: Path, core: int) -> Iterator[llama.Decode]:
    """llama.cpp's decode of a model with a context of 256 tokens."""
    model = tmp_path / "q8_0.gguf"
    model.write_bytes(b"GGUF")
    with llama.decoding("q8_0:native", model, core, 256) as running:
        yield running
