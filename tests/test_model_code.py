"""A model directory is data: none of its Python and pickles runs, whichever command reads it."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.model import load
from cast_train.checkpoint.models import load_dense, load_tokenizer

Reader = Callable[[Path, Path], Any]  # of a model directory; the second is free to be written
# What reads a whole model, or only what says of which class it is.
MODEL_READERS: dict[str, Reader] = {
    "load_dense": lambda model, out: load_dense(model),
    "convert": convert,
    "inspect": lambda model, out: inspect(model),
    "load": lambda model, out: load(model),
}
VLLM = """
import sys
from cast_serve.engine import worker
from vllm.engine.arg_utils import AsyncEngineArgs
flags = worker.all_flags(sys.argv[1], "x", "127.0.0.1", 8001, ["--enforce-eager"])
AsyncEngineArgs.from_cli_args(worker._arguments(flags)).create_model_config()
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Would be there if any of the directory's code had run."""
    return tmp_path / "it-ran"


@pytest.fixture
def with_code(tmp_path: Path, trace: Path) -> Path:
    """A directory whose config and tokenizer name Python files in it."""
    folder = tmp_path / "code"
    folder.mkdir()
    run = f"open({str(trace)!r}, 'w')\n"
    (folder / "own.py").write_text(run + "class Config: ...\nclass Model: ...\nclass Tokens: ...\n")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = {"model_type": "own", "architectures": ["Model"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["own.Tokens", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file({"a.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    return folder


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


@pytest.fixture
def with_pickle(tmp_path: Path, trace: Path) -> Path:
    """A directory of which the weights are a pickle."""
    folder = tmp_path / "pickle"
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}
    more = {"num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps({**config, **more, "intermediate_size": 64}))
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps({"lm_head.weight": Payload(trace)}))
    return folder


def test_the_payloads_would_run(with_code: Path, with_pickle: Path, trace: Path) -> None:
    pickle.loads((with_pickle / "pytorch_model.bin").read_bytes())["lm_head.weight"].close()
    assert trace.exists()
    trace.unlink()
    subprocess.run([sys.executable, with_code / "own.py"], check=True)
    assert trace.exists()


@pytest.mark.parametrize("reader", [*MODEL_READERS])
def test_no_code_of_a_directory_runs(
    reader: str, with_code: Path, tmp_path: Path, trace: Path
) -> None:
    with pytest.raises(ValueError, match=r"(?i)custom code|trust_remote_code|dense|model type"):
        MODEL_READERS[reader](with_code, tmp_path / "out")
    assert not trace.exists()


def test_no_code_of_a_tokenizer_runs(with_code: Path, trace: Path) -> None:
    with pytest.raises(ValueError, match=r"(?i)custom code|trust_remote_code"):
        load_tokenizer(with_code)
    assert not trace.exists()


@pytest.mark.parametrize("reader", [*MODEL_READERS])
def test_no_pickle_is_read(reader: str, with_pickle: Path, tmp_path: Path, trace: Path) -> None:
    with pytest.raises(ValueError, match=r"safetensors"):
        MODEL_READERS[reader](with_pickle, tmp_path / "out")
    assert not trace.exists()


def test_a_worker_starts_on_neither(with_code: Path, with_pickle: Path, trace: Path) -> None:
    pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):  # before vLLM is asked
        count_sparse(with_pickle)
    assert count_sparse(with_code) == (0, False)
    command = [sys.executable, "-c", VLLM, str(with_code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "custom code" in done.stderr
    assert not trace.exists()
