"""This CPU -> the settings of its kernels, measured once per machine and kept in the kernel cache.

Three things differ from CPU to CPU more than a table by vendor could say (benchmarks/log.md): up to
how many tokens the kernel for few tokens is the faster one, whether that kernel should prefetch
weights, into L1 (t0) or L2 (t1), and from how many tokens on a library's dense product of expanded
weights (csrc/library.h) is faster than our kernel for many. ``CAST_CPU_TUNING`` says who chooses:

    auto                                  measured; the default
    off                                   the defaults in csrc/ops.cpp
    few=8,few_int8=4,few_int4=4,prefetch=t1,library=32,library_int8=0
                                          these, any of them; the others are the defaults

`measure` times random weights that together are larger than the last-level cache, in turn, since a
decoding model reads every weight from memory. All candidates are interleaved, and each one's best
time is compared, which other work on the machine disturbs least.
Only the AVX-512 kernels with VBMI and GFNI and AMX's have a kernel for few tokens.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cast_serve.errors import UsageError
from cast_serve.kernels.cpu import build
from cast_serve.kernels.reference import pack
from cast_serve.kernels.reference_int4 import pack_int4

logger = logging.getLogger(__name__)

PREFETCHES = ("none", "t0", "t1")
MOST_FEW_TOKENS = 8
LEAST_LIBRARY_TOKENS, MOST_LIBRARY_TOKENS = 32, 65536
FEW_KEYS = {"bf16": "few", "int8": "few_int8", "int4": "few_int4"}  # of each kind of weight
FEW_ISAS = ("amx", "avx512_bf16", "avx512_vnni")
LIBRARY_TOKENS = (LEAST_LIBRARY_TOKENS, 128)  # from which on the library may be chosen
LIBRARY_MARGIN = 0.9  # the most of our kernel's time that it may take then
OUT_FEATURES, IN_FEATURES = 2048, 4096
SCALE_GROUP = 128  # of 4-bit weights
BUDGET_S = 0.4  # for each of up to six comparisons
LEAST_ROUNDS = 7
CACHE_BYTES = (32 << 20, 256 << 20)  # no fewer, and no more, of weights in turn

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tuning:
    """Which CPU kernel runs for how many tokens.

    few, few_int8, few_int4: up to how many tokens the kernel for few runs, by kind of weight.
    prefetch: of `PREFETCHES`.
    library, library_int8: from how many tokens on, at least 32, the library multiplies; 0: never.
        4-bit weights go by library_int8.
    """

    few: int
    few_int8: int
    few_int4: int
    prefetch: str
    library: int = 0
    library_int8: int = 0


def description() -> str:
    """The CPU kernel in use and the settings that change it: ``avx2 library=32,...``."""
    settings = asdict(current())
    if _isa() not in FEW_ISAS:
        for key in (*FEW_KEYS.values(), "prefetch"):
            del settings[key]
    return f"{_isa()} " + ",".join(f"{key}={value}" for key, value in settings.items())


def current() -> Tuning:
    """What the kernels of this process use. The library must be loaded."""
    return Tuning(*torch.ops.cast.cpu_tuning())


def use(tuning: Tuning) -> None:
    """Makes the kernels of this process use it, from the next call on.

    Raises:
        UsageError: if a value is out of range.
    """
    torch.ops.cast.set_cpu_tuning(*astuple(tuning))


def tune() -> Tuning:
    """Chooses as ``CAST_CPU_TUNING`` says, and uses the choice. The library must be loaded.

    Raises:
        UsageError: if the variable has no such value.
    """
    wanted = os.environ.get("CAST_CPU_TUNING", "auto")
    if wanted == "auto":
        tuning = _cached_or_measured()
    elif wanted == "off":
        tuning = current()
    else:
        tuning = parse(wanted, current())
    use(tuning)
    logger.info("CPU kernels %s: %s (CAST_CPU_TUNING=%s)", _isa(), tuning, wanted)
    return tuning


def parse(text: str, defaults: Tuning) -> Tuning:
    """``few=8,prefetch=t1`` -> a Tuning, with the defaults for what is not named.

    Raises:
        UsageError: if it is no such text.
    """
    values = asdict(defaults)
    for part in text.split(","):
        key, _, value = part.partition("=")
        tokens = int(value) if value.isdecimal() else -1
        is_few = key in FEW_KEYS.values() and 0 <= tokens <= MOST_FEW_TOKENS
        is_library = key in ("library", "library_int8") and (
            tokens == 0 or LEAST_LIBRARY_TOKENS <= tokens <= MOST_LIBRARY_TOKENS
        )
        if is_few or is_library:
            values[key] = tokens
        elif key == "prefetch" and value in PREFETCHES:
            values[key] = value
        else:
            raise UsageError(
                f"CAST_CPU_TUNING={text}: {part!r} is not understood; auto, off, or a list of "
                f"few, few_int8 and few_int4, 0..{MOST_FEW_TOKENS}, "
                f"prefetch={'|'.join(PREFETCHES)}, and library and library_int8, 0 or "
                f"{LEAST_LIBRARY_TOKENS}..{MOST_LIBRARY_TOKENS}, is needed, such as "
                "few=8,prefetch=t1"
            )
    return Tuning(**values)


def measure() -> Tuning:
    """Times the candidates on this machine with torch's number of threads; in a few seconds.

    The process's tuning is changed meanwhile and set back, so no other thread may multiply.
    """
    before = current()
    try:
        layers = {kind: _layers(kind) for kind in FEW_KEYS}
        tuning = before
        if _isa() in FEW_ISAS:
            tuning = _few(layers, before)
        return replace(
            tuning,
            library=_library_from(layers["bf16"], tuning),
            library_int8=_library_from(layers["int8"], tuning),
        )
    finally:
        use(before)


def _few(layers: dict[str, list[Linear]], defaults: Tuning) -> Tuning:
    """The settings of the kernels for few tokens; `defaults`: of bf16 where there is none."""
    if _isa() == "avx512_vnni":
        layers = {kind: ops for kind, ops in layers.items() if kind != "bf16"}
    prefetch = _fastest_prefetch(layers)
    few = {FEW_KEYS[kind]: _crossover(ops, prefetch) for kind, ops in layers.items()}
    return replace(defaults, prefetch=prefetch, **few)


def _always_few(prefetch: str) -> Tuning:
    return Tuning(MOST_FEW_TOKENS, MOST_FEW_TOKENS, MOST_FEW_TOKENS, prefetch)


def _fastest_prefetch(layers: dict[str, list[Linear]]) -> str:
    """The prefetch with the least product of times over the kinds of weights, 1 and 4 tokens."""
    cases: dict[tuple[str, int, str], tuple[Tuning, int, list[Linear]]] = {}
    for prefetch in PREFETCHES:
        for num_tokens in (1, 4):
            for kind, ops in layers.items():
                cases[prefetch, num_tokens, kind] = (_always_few(prefetch), num_tokens, ops)
    times = _bests(cases)
    product = dict.fromkeys(PREFETCHES, 1.0)
    for (prefetch, _, _), seconds in times.items():
        product[prefetch] *= seconds * 1e3
    return min(PREFETCHES, key=product.__getitem__)


def _crossover(ops: list[Linear], prefetch: str) -> int:
    """Up to how many tokens the kernel for few runs, so that the product of times is the least."""
    cases = {}
    for num_tokens in range(1, MOST_FEW_TOKENS + 1):
        cases[num_tokens, 0] = (Tuning(0, 0, 0, prefetch), num_tokens, ops)
        cases[num_tokens, MOST_FEW_TOKENS] = (_always_few(prefetch), num_tokens, ops)
    times = _bests(cases)

    def product(few_tokens: int) -> float:
        return math.prod(
            times[num_tokens, MOST_FEW_TOKENS if num_tokens <= few_tokens else 0] * 1e3
            for num_tokens in range(1, MOST_FEW_TOKENS + 1)
        )

    return min(range(MOST_FEW_TOKENS + 1), key=product)


def _library_from(ops: list[Linear], tuning: Tuning) -> int:
    """From how many tokens on the library is the faster one by a margin; 0: from none."""
    cases = {}
    for num_tokens in LIBRARY_TOKENS:
        for library in (0, LEAST_LIBRARY_TOKENS):
            candidate = replace(tuning, library=library, library_int8=library)
            cases[num_tokens, library] = (candidate, num_tokens, ops)
    times = _bests(cases)
    least = 0
    for num_tokens in reversed(LIBRARY_TOKENS):
        own = times[num_tokens, 0]
        if times[num_tokens, LEAST_LIBRARY_TOKENS] > LIBRARY_MARGIN * own:
            break
        least = num_tokens
    return least


def _bests(cases: dict[Any, tuple[Tuning, int, list[Linear]]]) -> dict[Any, float]:
    """Best seconds of each case: a tuning, a number of tokens, and one op on many weights."""
    seconds: dict[Any, list[float]] = {key: [] for key in cases}
    began = time.perf_counter()
    num_calls = 0
    while len(seconds[next(iter(cases))]) < LEAST_ROUNDS or time.perf_counter() - began < BUDGET_S:
        for key, (tuning, num_tokens, ops) in cases.items():
            use(tuning)
            x = torch.ones(num_tokens, IN_FEATURES, dtype=torch.bfloat16)
            start = time.perf_counter()
            ops[num_calls % len(ops)](x)
            seconds[key].append(time.perf_counter() - start)
            num_calls += 1
    return {key: min(times) for key, times in seconds.items()}


def _layers(kind: str) -> list[Linear]:
    """One random weight of that kind many times over in memory, behind its op."""
    generator = torch.Generator().manual_seed(0)
    largest = 7 if kind == "int4" else 127
    size = (OUT_FEATURES, IN_FEATURES // 2)
    values = torch.randint(-largest, largest + 1, size, generator=generator)
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)
    pairs = nibbles[torch.randint(6, (2, OUT_FEATURES, IN_FEATURES // 8), generator=generator)]
    bitmask = pairs[0] | pairs[1] << 4
    scale = torch.ones(OUT_FEATURES, dtype=torch.float32)  # vLLM loads with another default
    if kind == "int4":
        scales = torch.ones(OUT_FEATURES, -(-IN_FEATURES // SCALE_GROUP), dtype=torch.bfloat16)
        packed = pack_int4(values.to(torch.int8), bitmask, scales, SCALE_GROUP)
    else:
        packed = pack(values.to(torch.int8 if kind == "int8" else torch.bfloat16), bitmask)

    def linear(copy: Tensor) -> Linear:
        if kind == "int4":
            return lambda x: torch.ops.cast.linear24_int4(x, copy, SCALE_GROUP, OUT_FEATURES)
        if kind == "int8":
            return lambda x: torch.ops.cast.linear24_int8(x, copy, scale, OUT_FEATURES)
        return lambda x: torch.ops.cast.linear24(x, copy, OUT_FEATURES)

    least, most = CACHE_BYTES
    total = min(max(2 * _last_level_cache_bytes(), least), most)
    return [linear(packed.clone()) for _ in range(-(-total // packed.nbytes))]


def _last_level_cache_bytes() -> int:
    """0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) << 10 for text in texts if text.endswith("K")), default=0)


def _cached_or_measured() -> Tuning:
    if _isa() == "amx_emulated":  # for tests; it takes minutes
        return current()
    library = build.build().stem  # before the lock, which building takes
    path = build.cache_folder() / f"tuning-{_machine_hash(library)}.json"
    try:
        if kept := _kept(path):
            return kept
        with build.locked_cache():  # one worker at a time, or they disturb each other
            if kept := _kept(path):
                return kept
            tuning = _measured()
            _write(path, tuning, library)
    except OSError as error:  # a container's file system is often read-only
        logger.warning("measured settings of the CPU kernels cannot be saved: %s", error)
        tuning = _measured()
    return tuning


def _measured() -> Tuning:
    began = time.perf_counter()
    tuning = measure()
    seconds = time.perf_counter() - began
    logger.warning("measured the CPU kernels once, in %.1f s: %s", seconds, tuning)
    return tuning


def _kept(path: Path) -> Tuning | None:
    """What was measured before; None if nothing was, or a power cut left the file damaged."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())["tuning"]
        return Tuning(
            int(values["few"]),
            int(values["few_int8"]),
            int(values["few_int4"]),
            str(values["prefetch"]),
            int(values["library"]),
            int(values["library_int8"]),
        )
    except (ValueError, KeyError, TypeError):
        logger.warning("%s holds no settings of the CPU kernels: they are measured again", path)
        return None


def _write(path: Path, tuning: Tuning, library: str) -> None:
    record = {"cpu": _cpu(), "isa": _isa(), "library": library, "tuning": asdict(tuning)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def _machine_hash(library: str) -> str:
    parts = (_cpu(), _isa(), library, torch.get_num_threads(), "by best times")
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Vendor, name and numbers of the CPU, as far as the system says."""
    keys: tuple[str, ...] = ("vendor_id", "cpu family", "model", "model name", "stepping")
    keys += ("CPU implementer", "CPU variant", "CPU part", "CPU revision")  # of ARM
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            found.setdefault(key.strip(), value.strip())
    return ", ".join(f"{key} {found[key]}" for key in keys if key in found)


def _isa() -> str:
    return str(torch.ops.cast.cpu_isas()[0])
