"""scripts/wheel: the wheel's kernels run where there is no compiler, and no benchmarks are in it.

The library is the cached one, so nothing is compiled here.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from cast_serve.kernels.cpu import build

ROOT = Path(__file__).parent.parent
LIBRARY = f"cast_serve/kernels/cpu/prebuilt/{build.prebuilt_name()}"
MULTIPLY = """
import torch
from cast_serve import kernels
from cast_serve.kernels.cpu import build
packed = kernels.pack(torch.ones(8, 32).bfloat16(), torch.full((8, 8), 0x33, dtype=torch.uint8))
assert kernels.linear24(torch.ones(1, 64).bfloat16(), packed, 8).eq(32).all()
print(build.build())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = map(str, (ROOT / "scripts/wheel", "--out", tmp_path_factory.mktemp("dist")))
    done = subprocess.run(
        [sys.executable, *words], env=environment(ROOT), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = Path(json.loads(done.stdout.splitlines()[-1])["wheel"])
    assert list(made.parent.iterdir()) == [made]
    return made


def environment(packages: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(packages)}


def test_its_tag_is_this_platforms_and_any_pythons(wheel: Path) -> None:
    tag = rf"py3-none-manylinux_2_\d+_{os.uname().machine}"
    assert re.fullmatch(rf"cast_serve-{re.escape(version('cast-serve'))}-{tag}\.whl", wheel.name)
    with ZipFile(wheel) as archive:
        (facts,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        text = archive.read(facts).decode()
    assert "Root-Is-Purelib: false" in text
    assert re.findall("^Tag: (.+)$", text, flags=re.MULTILINE) == re.findall(tag, wheel.name)


def test_it_holds_one_library_that_knows_no_python(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [name for name in names if ".so" in name] == [LIBRARY]
        library = archive.read(LIBRARY)
    assert library == build.build().read_bytes()
    assert b"libtorch_cpu.so" in library
    assert not re.search(rb"libtorch_python|libpython|\0_?Py\w*_\w+\0", library)
    sources = {f"cast_serve/kernels/cpu/csrc/{path.name}" for path in build.SOURCES.iterdir()}
    assert sources <= set(names)  # what is compiled with another torch
    assert "loadtest/report/report.css" in names


def test_its_kernels_run_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    installed, cache = tmp_path / "installed", tmp_path / "cache"
    with ZipFile(wheel) as archive:
        archive.extractall(installed)
    bare = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "CAST_KERNEL_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", MULTIPLY],
        cwd=tmp_path,
        env={**environment(installed), **bare},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / LIBRARY
    assert not cache.exists()


@pytest.mark.parametrize(
    ("words", "module"),
    [
        ("loadtest kernels", "benchmarks.kernels"),
        ("loadtest coverage", "benchmarks.coverage"),
        ("cast_train study", "benchmarks.studies"),
    ],
)
def test_benchmarks_stay_in_the_source_tree(
    wheel: Path, tmp_path: Path, words: str, module: str
) -> None:
    with ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("benchmarks")]
        archive.extractall(tmp_path)
    command = [sys.executable, "-m", *words.split(), "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert module in done.stderr
    assert "it needs the source tree" in done.stderr
