"""docs/python.md: its blocks run, in their order, on a model of two layers."""

import ast
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from cast_serve.checkpoint.inspect import inspect
from cast_serve.model import SparseLinear
from cast_serve.ports import free_port
from cast_train.checkpoint.models import kind_of
from tests.cast_serve.gateway import fake_worker
from tests.cast_serve.gateway.stack import wait_until
from tests.cast_train.conftest import llama_dir
from tests.docs.pages import ROOT, blocks

__all__ = ["llama_dir"]

PAGE = "docs/python.md"
LAST = "Serve"  # its blocks run in processes of their own, the first in tests/story
# Every worker is one that only says that it is there.
FAKE_WORKERS = f"""
import sys
from cast_serve.gateway.upstream import replica

replica.worker_command = lambda started: [sys.executable, "-c", '''
import sys
sys.path.insert(0, "{ROOT}")
import uvicorn
from {fake_worker.__name__} import create_app
uvicorn.run(create_app("%s"), host="127.0.0.1", port=%s)
''' % (started.variant, started.url.rpartition(":")[2])]
"""


def test_train_convert_load_evaluate(
    llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 3000)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(text.read_text() + "The end.\n")
    places = {"DENSE_DIR": llama_dir, "TRAIN.txt": text, "HELDOUT.txt": heldout}
    code = [block.filled(places).code for block in blocks(PAGE) if block.heading != LAST]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(code):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
    said = capsys.readouterr().out.splitlines()

    work = tmp_path / names["work"]
    kinds = {folder.name: kind_of(folder) for folder in work.iterdir()}
    compressed = dict.fromkeys(("int8", "sparse"), "compressed")
    assert kinds == {"gated": "gated", "wanda": "pruned", **compressed}
    assert names["record"]["steps"] == 20
    assert (names["in_bf16"]["bits_per_weight"], inspect(work / "int8")["quantized"]) == (9, "int8")
    assert sum(isinstance(module, SparseLinear) for module in names["model"].modules()) == 14
    figures = names["figures"]
    assert figures["nats_above_reference"] < 0 < figures["kl_nats_per_token"]
    assert figures["perplexity"] > 1
    assert len(names["block_losses"]) == figures["num_tokens"] // (figures["context_tokens"] - 1)
    assert any(line.startswith("The capital of France is") for line in said)


def test_serve(tmp_path: Path) -> None:
    """With workers that are no vLLM: tests/story has those."""
    (gateway,) = (b for b in blocks(PAGE) if b.heading == LAST and "serve(" in b.code)
    for name in ("dense", "sparse"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    port = free_port()
    places = {"DENSE_DIR": tmp_path / "dense", "DIR": tmp_path / "sparse", "8000": port}
    script = tmp_path / "script.py"
    script.write_text(FAKE_WORKERS + gateway.filled(places).code)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or is_ready(url), 60)
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            found = httpx.get(f"{url}/v1/models").json()["data"]
            assert {model["id"] for model in found} == {"dense", "sparse"}
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()  # nothing, once it has ended
    assert process.returncode == 0, said


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def test_the_page_has_no_block_that_is_not_run() -> None:
    served = [block.code for block in blocks(PAGE) if block.heading == LAST]
    assert [("LLM(" in code, "serve(" in code) for code in served] == [(True, False), (False, True)]
    assert {block.language for block in blocks(PAGE)} == {"python"}
    for block in blocks(PAGE):
        ast.parse(block.code)
