"""C++ sources -> a loaded op library: the wheel's, else the cache's, else compiled there once.

A wheel of `make wheel` brings the library in `PREBUILT`. The cache folder is
``$CAST_KERNEL_CACHE`` or ``~/.cache/cast_serve/kernels``. Both file a library under a hash of its
sources, flags and torch version, the cache also of the compiler, so a stale one is never loaded.
``python -m cast_serve.kernels.cpu.build`` builds ahead of time (set-up does), with
``--into-package`` into `PREBUILT` of the installed package (the image does).
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from cast_serve.errors import KernelBuildError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
COMMON_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-DNDEBUG", "-Wall", "-Wno-psabi"]
AVX512_FLAGS = ["-mavx512f", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
VNNI_FLAGS = [
    *AVX512_FLAGS,
    *(f"-mavx512{extension}" for extension in ("vnni", "vbmi", "vbmi2", "bw", "vl", "dq")),
    "-mbmi2",
    "-mgfni",
]
BF16_FLAGS = [*VNNI_FLAGS, "-mavx512bf16"]
ISA_FLAGS = {
    "ops": [],
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512vnni": VNNI_FLAGS,
    "avx512bf16": BF16_FLAGS,
    "amx": [*BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    "amx_emulated": BF16_FLAGS,
}


def load() -> None:
    """Registers ``torch.ops.cast``, building the library first if it is in no cache.

    Raises:
        KernelBuildError: if there is no compiler or the compiler fails.
    """
    if not hasattr(torch.ops.cast, "cpu_isas"):
        library = build()
        torch.ops.load_library(str(library))
        logger.info("CPU kernels: %s", library)


def build() -> Path:
    """Returns the library's path, compiling it if neither the wheel nor the cache has it.

    Raises:
        KernelBuildError: if there is no compiler, the compiler fails or the cache cannot be
            written.
    """
    if (prebuilt := PREBUILT / prebuilt_name()).exists():
        return prebuilt
    compiler = os.environ.get("CXX", "g++")
    library = cache_folder() / f"cast_kernels-{_compiled_hash(compiler)}.so"
    if library.exists():
        return library
    try:
        with locked_cache():
            if not library.exists():
                logger.warning("building the CPU kernels once, about half a minute: %s", library)
                _compile(compiler, library)
    except OSError as error:
        raise KernelBuildError(
            f"the CPU kernels cannot be compiled into {library.parent} ({error}); set "
            "CAST_KERNEL_CACHE to a writable folder, or install a wheel that includes them (made "
            "by `make wheel`)"
        ) from error
    return library


def into_package() -> Path:
    """Returns the library's path in `PREBUILT`, where no compiler and no cache is asked for it.

    Raises:
        KernelBuildError: if there is no compiler or the compiler fails.
        OSError: if the package cannot be written to.
    """
    library, prebuilt = build(), PREBUILT / prebuilt_name()
    if library != prebuilt:
        PREBUILT.mkdir(exist_ok=True)
        partial = prebuilt.with_suffix(".partial")
        shutil.copy(library, partial)
        os.replace(partial, prebuilt)  # what is there is taken to be whole
    return prebuilt


def cache_folder() -> Path:
    """Where libraries and measured settings are kept; it need not exist."""
    return Path(os.environ.get("CAST_KERNEL_CACHE") or Path.home() / ".cache/cast_serve/kernels")


@contextlib.contextmanager
def locked_cache() -> Iterator[Path]:
    """The cache folder, made if it is missing, for one process at a time: workers start together.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def units() -> list[str]:
    """The sources in `SOURCES`, without their suffix, that are compiled on this kind of CPU."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return list(ISA_FLAGS) if is_x86 else ["ops", "portable"]


def prebuilt_name() -> str:
    """What a wheel's library for these sources and this torch is called.

    The library uses torch's C++ interface and not Python's, so that any Python can load it, and
    any build of the torch release that it was compiled for.
    """
    release = ".".join(torch.__version__.split(".")[:2])
    return f"cast_kernels-torch{release}-{_hash(release)}.so"


def _compiled_hash(compiler: str) -> str:
    found = shutil.which(compiler)
    said = subprocess.run([found, "--version"], capture_output=True).stdout if found else b""
    return _hash(torch.__version__, repr(compiler).encode(), said)


def _hash(torch_version: str, *more: bytes) -> str:
    """Of the sources, how they are compiled, and more."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    for part in (torch_version, platform.machine(), COMMON_FLAGS, ISA_FLAGS):
        digest.update(repr(part).encode())
    for each in more:
        digest.update(each)
    return digest.hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    if shutil.which(compiler) is None:
        raise KernelBuildError(
            f"no C++ compiler {compiler!r} found, which builds the CPU kernels; install it "
            "(Debian and Ubuntu: apt-get install g++), name another in CXX, or install a wheel "
            f"that includes them for torch {torch.__version__} (made by `make wheel`)"
        )
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    torch_libs = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compile_unit(unit: str) -> str:
            out = f"{folder}/{unit}.o"
            flags = [*COMMON_FLAGS, *ISA_FLAGS[unit], *(includes if unit == "ops" else [])]
            _run([compiler, *flags, "-c", str(SOURCES / f"{unit}.cpp"), "-o", out])
            return out

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_unit, units()))
        linked = f"{folder}/{library.name}"
        libs = [f"-L{torch_libs}", "-lc10", "-ltorch", "-ltorch_cpu"]
        _run([compiler, "-shared", "-fopenmp", *objects, *libs, "-o", linked])
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelBuildError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--into-package"]:
        into_package()
    elif sys.argv[1:]:
        sys.exit("usage: python -m cast_serve.kernels.cpu.build [--into-package]")
    load()
    print(f"CPU kernels: {build()} (this CPU runs {', '.join(torch.ops.cast.cpu_isas())})")
