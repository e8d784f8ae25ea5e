"""docs/troubleshooting.md quotes messages that the code has."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \|$", re.M)
OTHERS = {
    "vllm": (
        "config/model.py",
        "v1/core/kv_cache_utils.py",
        "v1/worker/cpu_worker.py",
    ),
    "torch": ("_inductor/exc.py",),
    "importlib.metadata": ("__init__.py",),
}
# The loader's, the kernel's and ZeroMQ's words, in no Python file.
NOT_PYTHON = (
    *("libnuma.so.1: cannot open shared object file", "No space left on device", "Killed"),
    *("libc10_cuda.so: cannot open shared object file", "Cannot allocate memory"),
    "is longer than 107 characters (sizeof(sockaddr_un.sun_path))",
    "No matching distribution found for torch==2.13.0+cpu",
)
# Made of parts.
SPELLED = {
    "torch._inductor.config.cpp.cxx": "No working C++ compiler found in",
    "found for vllm": "No package metadata was found for",
}


def texts_of(path: Path) -> list[str]:
    """The string literals of a Python file, joined where they are, `...` for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (
                part.value if isinstance(part, ast.Constant) else "..." for part in node.values
            )
            found.append("".join(map(str, parts)))
    return found


@pytest.fixture(scope="module")
def texts() -> str:
    found = [(ROOT / "scripts/setup").read_text()]
    for package in ("cast_serve", "cast_train"):
        for path in (ROOT / package).rglob("*.py"):
            found += texts_of(path)
    for package, files in OTHERS.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for name in files:
            found += texts_of(Path(spec.origin).parent / name)
    return "\n".join(found)


def test_every_quoted_message_is_one_of_the_code(texts: str) -> None:
    rows = ROW.findall((ROOT / "docs/troubleshooting.md").read_text())
    rows = [row for row in rows if row[0] not in ("shown", "---")]
    assert len(rows) > 30
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row[0])]
    assert len(quoted) > 30
    for text in quoted:
        for part in text.split("..."):
            part = next((SPELLED[end] for end in SPELLED if part.endswith(end)), part)
            assert text in NOT_PYTHON or part.strip() in texts, text
    assert set(NOT_PYTHON) <= set(quoted)
