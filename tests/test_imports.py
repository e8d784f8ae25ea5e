"""Imports run one way, and what vLLM's workers load stays light.

All of it is read from the sources, so that no new module can be left out.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cast_train", "cast_serve", "loadtest", "benchmarks")


def name_of(path: Path) -> str:
    """`cast_serve/kernels/__init__.py` -> `cast_serve.kernels`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}
# Only this folder imports vLLM.
ENGINE = "cast_serve.engine."
# vLLM loads the first two into each of its processes; `convert` runs where no gateway is installed.
ROOTS_WITHOUT_HTTP = {
    *(f"cast_serve.engine.{name}" for name in ("plugin", "config", "report", "worker")),
    "cast_serve.checkpoint.convert",
}
HTTP = {"fastapi", "starlette", "uvicorn", "pydantic_settings"}
# What another package may use of cast_serve; benchmarks may use all of the three.
ALLOWED = {
    "cast_train": {
        *("sparsity", "checkpoint", "intervals", "questions", "options", "provenance", "errors"),
    },
    "loadtest": {
        *("latency", "sse", "intervals", "anytime", "guard", "questions", "options", "provenance"),
        *("dtypes", "errors", "ports"),
    },
}


def imported(module: str, *, at_top: bool = False) -> Iterator[str]:
    """The names that a module imports, or only those it does as soon as it is imported itself."""
    tree = ast.parse(MODULES[module].read_text())
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write the whole name, which can be read here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names
            if not all(name in MODULES for name in names):  # else it only leads to them
                yield str(node.module)


def ours(module: str, *, at_top: bool = False) -> set[str]:
    """Those of our modules that it imports."""
    return {name for name in imported(module, at_top=at_top) if name in MODULES}


def tops(module: str, *, at_top: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imported(module, at_top=at_top)}


def reached(roots: set[str], *, at_top: bool = False) -> set[str]:
    """The modules themselves, the packages they lie in, what both import of ours, and so on."""
    found: set[str] = set()
    waiting = set(roots)
    while waiting:
        found |= waiting
        around = {name.rpartition(".")[0] for name in waiting if "." in name}
        loaded = {name for each in waiting for name in ours(each, at_top=at_top)}
        waiting = (around | loaded) - found
    return found


def test_imports_make_no_circle() -> None:
    order = list(TopologicalSorter({name: ours(name) for name in MODULES}).static_order())
    assert set(order) == set(MODULES)


def folders(module: str, depth: int) -> str:
    """The folder that a module lies in, or the one around it; a module beside folders is its own.

    Args:
        depth: how many folders below the package count: 1 takes a folder with all that is in it.
    """
    parts = MODULES[module].parent.relative_to(ROOT).parts
    return ".".join(parts[: depth + 1]) if len(parts) > 1 else module


@pytest.mark.parametrize("depth", [1, 2])
def test_imports_between_folders_run_one_way(depth: int) -> None:
    """Folders inside a folder: among themselves; with the one around them they make up a whole."""
    needs: dict[str, set[str]] = {}
    for module in MODULES:
        own = folders(module, depth)
        for other in (folders(name, depth) for name in ours(module)):
            is_around = f"{own}.".startswith(f"{other}.") or f"{other}.".startswith(f"{own}.")
            needs.setdefault(own, set()).update([] if is_around else [other])
    order = list(TopologicalSorter(needs).static_order())
    assert set(order) >= set(needs)
    assert len(needs) > 10


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_one_way(module: str) -> None:
    package = module.split(".")[0]
    if package == "benchmarks":
        return
    assert "benchmarks" not in tops(module)  # commands of a source tree: `of_source_tree`
    if package == "cast_serve":
        assert not tops(module) & {"cast_train", "loadtest"}
        assert "vllm" not in tops(module) or module.startswith(ENGINE)
        return
    rooms = {name.split(".")[1] for name in ours(module) if name.startswith("cast_serve.")}
    assert rooms <= ALLOWED[package]
    assert not tops(module) & ({"cast_train", "loadtest"} - {package})


def test_what_is_below_the_gateway_knows_no_http() -> None:
    rooms = tuple(f"cast_serve.{room}" for rooms in ALLOWED.values() for room in rooms)
    shared = {name for name in MODULES if name.startswith(rooms)}
    below = reached(ROOTS_WITHOUT_HTTP | shared)
    assert len(below) > len(ROOTS_WITHOUT_HTTP | shared)
    assert not {name for name in below if tops(name) & HTTP}


def test_vllms_processes_load_no_metrics_library() -> None:
    """At the top; the worker itself imports it where it publishes."""
    for name in reached({"cast_serve.engine.plugin", "cast_serve.engine.config"}):
        assert "prometheus_client" not in tops(name), name
    for name in reached({"cast_serve.engine.worker"}, at_top=True):
        assert "prometheus_client" not in tops(name, at_top=True), name
