"""The load test and the gateway run where torch is not installed; what needs it says so."""

import contextlib
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
HIDE_TORCH = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
RUN = "sys.argv[:] = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
CLIENT = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "loadtest").rglob("*.py"))
    if path.name != "__init__.py"
]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", HIDE_TORCH + code, *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_the_client_and_the_gateway_import() -> None:
    assert {"loadtest.send.client", "loadtest.report.html", "loadtest.__main__"} <= set(CLIENT)
    modules = [*CLIENT, "cast_serve.gateway.app", "cast_serve.gateway.upstream.supervisor"]
    done = run("for name in sys.argv[1:]: __import__(name)", *modules)
    assert done.returncode == 0, done.stderr
    done = run(RUN, "loadtest", "run", "--help")
    assert "--baseline" in done.stdout


def test_the_gateway_runs() -> None:
    """It answers before any worker does, having imported nothing that its image lacks."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ["cast_serve", "gateway", "--variant", "dense=http://127.0.0.1:9"]
    command = [sys.executable, "-c", HIDE_TORCH + RUN, *words, "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as gateway:
        try:
            assert answer(f"http://127.0.0.1:{port}/livez", gateway).is_success
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 503
        finally:
            gateway.terminate()
        _, said = gateway.communicate(timeout=30)
    assert "Traceback" not in said


def answer(url: str, process: subprocess.Popen[str]) -> httpx.Response:
    for _ in range(600):
        assert process.poll() is None, process.communicate()[1]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url)
        time.sleep(0.1)
    pytest.fail(f"{url} does not answer")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("loadtest kernels", "cast-serve[cpu]"),
        ("cast_serve inspect .", "cast-serve[cpu]"),
        ("cast_train eval . --text README.md", "cast-serve[train]"),
    ],
)
def test_a_command_that_needs_torch_names_the_extra(words: str, remedy: str) -> None:
    done = run(RUN, *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert "No module named 'torch'" in done.stderr
    assert f"pip install '{remedy}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_torch_comes_with_the_extras_that_compute() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    have_torch = {
        extra
        for extra, wanted in extras.items()
        if "torch" in {Requirement(w).name for w in wanted}
    }
    assert have_torch == {"cpu", "gpu", "train"}
