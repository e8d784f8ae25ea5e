from pathlib import Path

import pytest
import torch

from cast_serve.errors import KernelBuildError
from cast_serve.kernels.cpu import build


def test_a_missing_compiler_names_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"'no-such-compiler' .* apt-get install g\+\+"):
        build.build()
    assert not list(tmp_path.glob("*.so"))


def test_a_failing_compiler_leaves_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(KernelBuildError, match="failed"):
        build.build()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_written_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(KernelBuildError, match="set CAST_KERNEL_CACHE to a writable folder"):
        build.build()


def test_the_library_is_found_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build.build()
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path))
    (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled although cached"))
    assert build.build() == tmp_path / path.name


def test_a_wheels_library_comes_first_if_it_is_of_these_sources_and_this_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = build.build()
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    (tmp_path / "cast_kernels-torch2.13-0123456789abcdef.so").touch()
    assert build.build() == cached
    prebuilt = tmp_path / build.prebuilt_name()
    prebuilt.touch()
    assert build.build() == prebuilt
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert build.prebuilt_name() != prebuilt.name


def test_the_library_goes_into_the_package_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = build.build()
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    inside = build.into_package()
    assert inside.read_bytes() == cached.read_bytes()
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled although there"))
    assert build.build() == inside
    assert build.into_package() == inside
