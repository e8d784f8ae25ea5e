from pathlib import Path

import pytest

from cast_serve.kernels.cpu import build


def test_a_missing_compiler_names_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(
        build.KernelBuildError, match=r"'no-such-compiler' .* apt-get install g\+\+"
    ):
        build.build()
    assert not list(tmp_path.glob("*.so"))


def test_a_failing_compiler_leaves_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(build.KernelBuildError, match="failed"):
        build.build()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_library_is_found_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build.build()
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path))
    (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled although cached"))
    assert build.build() == tmp_path / path.name
