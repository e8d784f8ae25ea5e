"""docs/index.md and docs/python.md on a compressed directory: vLLM answers by the 2:4 kernels."""

import json
import re
from pathlib import Path

import httpx
import pytest

from cast_serve.ports import free_port
from tests.docs.pages import ROOT, blocks
from tests.story.newcomer import Newcomer, check

pytestmark = [pytest.mark.model, pytest.mark.server]

ACTIVE = re.compile(r"2:4 is active: 210 linears run cast::linear24 on \w+")
STUB = """\
#!/bin/bash
echo "$(basename "$0") $*" | tee -a typed
case "$(basename "$0") $*" in
    *serve | *" up "*)
        python3 -m http.server {port} --bind 127.0.0.1 --directory {folder} &
        trap "kill $!; wait $!" INT  # else it may still answer for the next one
        wait ;;
    make* | cast-*) echo "{{}}" ;;
esac
"""


def test_every_way_answers_from_the_compressed_directory(
    twins: dict[str, Path], tmp_path: Path
) -> None:
    port = free_port()
    places = {
        "DIR": twins["sparse"],
        "8000": port,
        # What makes a test short.
        "vllm serve": f"vllm serve --enforce-eager --port {port}",
        "max_model_len=1024": "max_model_len=1024, enforce_eager=True",
    }
    given = [block for block in blocks("docs/index.md") if block.heading == "Serve a model"]
    given += [block for block in blocks("docs/python.md") if "LLM(" in block.code]
    found = dict(Newcomer(ROOT, port, tmp_path).follow(given, places))
    for typed, written in found.items():
        check(typed, written)
    inspected, curl, client, server, llm = found.values()
    assert json.loads(inspected)["num_sparse_layers"] == 210
    assert ACTIVE.search(server)
    assert ACTIVE.search(llm)
    answer = json.loads(curl)["choices"][0]["text"]
    assert f"{answer}\n" in client
    assert f"{answer}\n" in llm  # among the log's lines


def test_readme_s_commands_are_typed_in_order(tmp_path: Path) -> None:
    """With stubs in place of the programs: what newcomer.py takes from the page, and stops."""
    port = free_port()
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "health").touch()
    names = ("make", "curl", "cast-serve", "cast-loadtest")
    for stub in (
        *(programs / name for name in names),
        *(tmp_path / "scripts" / name for name in ("setup", "train-and-convert")),
    ):
        stub.write_text(STUB.format(port=port, folder=tmp_path))
        stub.chmod(0o755)
    places = {"8000": port, "DENSE_DIR": "dense", "FILE...": "a.txt b.txt", "DIR": "out"}
    newcomer = Newcomer(tmp_path, port, tmp_path)
    typed = [command for command, _ in newcomer.follow(blocks("README.md"), places)]
    assert len(typed) == len((tmp_path / "typed").read_text().splitlines())
    assert typed.index("make demo") < typed.index("make serve")
    (metrics,) = (command for command in typed if command.endswith("/metrics"))
    assert typed.index(metrics) < typed.index("make serve")  # which ends after it
    (trained,) = (command for command in typed if "train-and-convert" in command)
    assert trained.split()[1:] == ["--model", "dense", "--text", "a.txt", "b.txt", "--out", "out"]
    served = ".venv/bin/cast-serve up --variant dense=dense --variant sparse=out"
    assert f"{served} -- --max-model-len 2048" in typed
    with pytest.raises(httpx.ConnectError):
        httpx.get(newcomer.url)
