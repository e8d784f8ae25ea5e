"""Imports run one way, and what vLLM's workers load stays light."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    path.relative_to(ROOT)
    for package in ("cast_train", "cast_serve", "loadtest")
    for path in sorted((ROOT / package).rglob("*.py"))
]
ONLY_THESE_IMPORT_VLLM = {
    f"cast_serve/{name}.py" for name in ("plugin", "sparse24", "warmup", "worker")
}
IN_WORKERS = ("cast_serve/plugin.py", "cast_serve/sparse24.py", "cast_serve/kernels/")
# A leaf may be used by all; elsewhere a module imports only what stands earlier in this list.
LEAVES = ("nm", "bitmask", "latency")
ORDER = (
    *("nm", "bitmask", "convert", "kernels", "sparse24", "plugin", "warmup", "worker"),
    *("settings",),
    *("errors", "requests", "keys", "request_log", "tracing", "probes", "replicas", "watcher"),
    *("variants", "admission", "latency", "comparison", "shadow", "metrics", "proxy", "openapi"),
    *("dashboard", "gateway", "__main__"),
)


def imported(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(module: Path, package: str) -> set[str]:
    """What a module imports of one of our packages, by room name."""
    parts = (name.split(".") for name in imported(module))
    return {part[1] for part in parts if part[0] == package and len(part) > 1}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_one_way(module: Path) -> None:
    names = set(imported(module))
    tops = {name.split(".")[0] for name in names}
    package = module.parts[0]
    if package != "cast_serve":
        allowed = {"nm", "bitmask"} if package == "cast_train" else {"latency", "kernels"}
        assert rooms(module, "cast_serve") <= allowed
        assert not tops & ({"cast_train", "loadtest"} - {package})
        return
    assert not tops & {"cast_train", "loadtest"}
    assert "vllm" not in tops or str(module) in ONLY_THESE_IMPORT_VLLM
    if str(module).startswith(IN_WORKERS):
        assert not tops & {"fastapi", "prometheus_client", "pydantic_settings"}
    own = module.parts[1].removesuffix(".py")
    if own in ORDER:
        earlier = set(ORDER[: ORDER.index(own) + 1]) | set(LEAVES)
        assert {room for room in rooms(module, "cast_serve") if room in ORDER} <= earlier
