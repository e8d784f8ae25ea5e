"""Which settings the CPU kernels get, and that every setting gives the same products. No times."""

import contextlib
import errno
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cast_serve import kernels
from cast_serve.kernels.cpu import build, tuning
from cast_serve.kernels.cpu.tuning import Tuning
from tests.cast_serve.kernels import test_linear24, test_linear24_int8

DEFAULTS = Tuning(8, 4, 2, "t0")
MEASURED = Tuning(3, 5, 1, "none", 128, 32)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and the process's tuning set back afterwards."""
    kernels.load()
    library = build.build()
    before = tuning.current()
    monkeypatch.setenv("CAST_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "build", lambda: library)
    monkeypatch.delenv("CAST_CPU_TUNING", raising=False)
    tuning.use(DEFAULTS)
    yield tmp_path
    tuning.use(before)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Tuning]:
    """What was measured, by a `measure` that takes no time, on a CPU that has a choice."""
    done: list[Tuning] = []

    def measure() -> Tuning:
        done.append(MEASURED)
        return MEASURED

    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "_isa", lambda: "avx512_bf16")
    return done


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("few=0", Tuning(0, 4, 2, "t0")),
        ("few_int8=8", Tuning(8, 8, 2, "t0")),
        ("few_int4=0", Tuning(8, 4, 0, "t0")),
        ("prefetch=none", Tuning(8, 4, 2, "none")),
        ("few=4,few_int8=2,prefetch=t1", Tuning(4, 2, 2, "t1")),
        ("library=32", Tuning(8, 4, 2, "t0", 32, 0)),
        ("library=0,library_int8=65536", Tuning(8, 4, 2, "t0", 0, 65536)),
    ],
)
def test_a_forced_tuning_is_used(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: Tuning
) -> None:
    monkeypatch.setenv("CAST_CPU_TUNING", text)
    assert tuning.parse(text, DEFAULTS) == expected
    kernels.load(tune=True)
    assert tuning.current() == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("few=9", "few=9"),
        ("few=-1", "few=-1"),
        ("few_int8=x", "few_int8=x"),
        ("few_int4=9", "few_int4=9"),
        ("few=4,prefetch=t2", "prefetch=t2"),
        ("few=4 prefetch=t1", "few=4 prefetch=t1"),
        ("library=31", "library=31"),
        ("library_int8=65537", "library_int8=65537"),
        ("few=4,library=on", "library=on"),
        ("many=4", "many=4"),
        ("on", "on"),
        ("", ""),
    ],
)
def test_a_wrong_value_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str, part: str) -> None:
    monkeypatch.setenv("CAST_CPU_TUNING", text)
    with pytest.raises(ValueError, match=f"CAST_CPU_TUNING={text}: '{part}' is not understood"):
        kernels.load(tune=True)
    assert tuning.current() == DEFAULTS


def test_a_wrong_value_names_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST_CPU_TUNING", "library=on")
    allowed = (
        r"few, few_int8 and few_int4, 0\.\.8, prefetch=none\|t0\|t1, and library and library_int8, "
        r"0 or 32\.\.65536, is needed"
    )
    with pytest.raises(ValueError, match=allowed):
        kernels.load(tune=True)


def test_nothing_is_chosen_unless_asked(measurements: list[Tuning]) -> None:
    kernels.load()
    assert tuning.current() == DEFAULTS
    assert measurements == []


def test_off_keeps_the_defaults(
    monkeypatch: pytest.MonkeyPatch, cache: Path, measurements: list[Tuning]
) -> None:
    monkeypatch.setenv("CAST_CPU_TUNING", "off")
    assert tuning.tune() == DEFAULTS
    assert measurements == []
    assert list(cache.iterdir()) == []


def test_auto_measures_once_and_keeps_the_result(cache: Path, measurements: list[Tuning]) -> None:
    assert tuning.tune() == MEASURED
    assert tuning.current() == MEASURED
    (path,) = cache.glob("tuning-*.json")
    record = json.loads(path.read_text())
    assert record["tuning"] == {
        "few": 3,
        "few_int8": 5,
        "few_int4": 1,
        "prefetch": "none",
        "library": 128,
        "library_int8": 32,
    }
    assert record["isa"] == "avx512_bf16"
    assert record["library"] == build.build().stem
    tuning.use(DEFAULTS)
    assert tuning.tune() == MEASURED
    assert measurements == [MEASURED]


def test_what_is_kept_needs_no_lock(
    monkeypatch: pytest.MonkeyPatch, measurements: list[Tuning]
) -> None:
    """A cache may be read-only by then."""
    tuning.tune()
    monkeypatch.setattr(build, "locked_cache", lambda: pytest.fail("locked"))
    assert tuning.tune() == MEASURED
    assert measurements == [MEASURED]


def test_nothing_is_built_under_the_lock(
    monkeypatch: pytest.MonkeyPatch, measurements: list[Tuning]
) -> None:
    """Building takes the same lock, and would wait for itself."""
    locked_cache, library, locks = build.locked_cache, build.build(), []

    @contextlib.contextmanager
    def lock() -> Iterator[Path]:
        with locked_cache() as folder:
            locks.append(folder)
            monkeypatch.setattr(build, "build", lambda: pytest.fail("built under the lock"))
            yield folder
            monkeypatch.setattr(build, "build", lambda: library)

    monkeypatch.setattr(build, "locked_cache", lock)
    assert tuning.tune() == MEASURED
    assert len(locks) == 1


@pytest.mark.parametrize("changed", ["_cpu", "_isa", "library", "threads"])
def test_another_machine_or_library_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, measurements: list[Tuning], changed: str
) -> None:
    tuning.tune()
    if changed == "library":
        monkeypatch.setattr(build, "build", lambda: Path("cast_kernels-other.so"))
    elif changed == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    else:
        monkeypatch.setattr(tuning, changed, lambda: "avx512_vnni")
    tuning.tune()
    assert measurements == [MEASURED, MEASURED]


@pytest.mark.parametrize("text", ["", "[]", '{"tuning": {"few": 3}}'])
def test_a_damaged_record_is_measured_again(
    cache: Path, measurements: list[Tuning], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    tuning.tune()
    (path,) = cache.glob("tuning-*.json")
    whole = path.read_text()
    path.write_text(text)
    assert tuning.tune() == MEASURED
    assert measurements == [MEASURED, MEASURED]
    assert path.read_text() == whole
    assert f"{path} holds no settings of the CPU kernels" in caplog.text


@pytest.mark.parametrize(
    "error",
    [PermissionError("read-only"), OSError(errno.EROFS, "read-only")],
    ids=["owner", "mount"],
)
def test_a_cache_that_cannot_be_written_is_warned_of(
    error: OSError,
    monkeypatch: pytest.MonkeyPatch,
    measurements: list[Tuning],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(build, "locked_cache", refuse)
    with caplog.at_level(logging.WARNING):
        assert tuning.tune() == MEASURED
    assert "cannot be saved: " in caplog.text
    assert "read-only" in caplog.text


def test_the_emulated_kernel_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, measurements: list[Tuning]
) -> None:
    monkeypatch.setattr(tuning, "_isa", lambda: "amx_emulated")
    assert tuning.tune() == DEFAULTS
    assert measurements == []


def test_measuring_gives_a_tuning_and_sets_the_old_one_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "BUDGET_S", 0.0)
    monkeypatch.setattr(tuning, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(tuning, "CACHE_BYTES", (1, 1))
    monkeypatch.setattr(tuning, "OUT_FEATURES", 64)
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        measured = tuning.measure()
    finally:
        torch.set_default_dtype(torch.float32)
    assert tuning.current() == DEFAULTS
    assert 0 <= measured.few <= 8
    assert 0 <= measured.few_int8 <= 8
    assert 0 <= measured.few_int4 <= 8
    assert measured.prefetch in tuning.PREFETCHES
    assert measured.library in (0, *tuning.LIBRARY_TOKENS)
    assert measured.library_int8 in (0, *tuning.LIBRARY_TOKENS)
    tuning.use(measured)
    assert tuning.current() == measured


def test_the_fastest_candidates_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given times: t1 is the fastest, the kernel for few up to so many tokens, no library."""
    up_to = {"bf16": 6, "int8": 3, "int4": 8}

    def bests(cases: dict[tuple, tuple]) -> dict[tuple, float]:
        assert len(cases) in (18, 16, 4)
        if len(cases) == 4:
            return dict.fromkeys(cases, 1.0)
        if len(cases) == 18:
            return {key: 1.0 if key[0] == "t1" else 1.1 for key in cases}
        times = {}
        for (num_tokens, few), (_, _, kind) in cases.items():
            times[num_tokens, few] = 1.0 if (few > 0) == (num_tokens <= up_to[kind]) else 1.1
        return times

    monkeypatch.setattr(tuning, "_bests", bests)
    monkeypatch.setattr(tuning, "_layers", lambda kind: kind)
    monkeypatch.setattr(tuning, "_isa", lambda: "avx512_bf16")
    assert tuning.measure() == Tuning(6, 3, 8, "t1")


@pytest.mark.parametrize(
    ("at_three", "expected"),
    [(0.9, 8), (0.5, 2)],  # of the kernel for many, over the one for few, which is faster else
)
def test_where_neither_is_faster_throughout_the_least_product_decides(
    at_three: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bests(cases: dict[tuple, tuple]) -> dict[tuple, float]:
        of_many = {num_tokens: 1.1 for num_tokens in range(1, 9)} | {3: at_three}
        return {key: 1.0 if key[1] else of_many[key[0]] for key in cases}

    monkeypatch.setattr(tuning, "_bests", bests)
    assert tuning._crossover([], "t0") == expected


@pytest.mark.parametrize(
    ("library_s", "expected"),
    [
        ({32: 0.8, 128: 0.8}, 32),
        ({32: 1.0, 128: 0.8}, 128),
        ({32: 0.8, 128: 1.0}, 0),  # faster for fewer only
        ({32: 0.95, 128: 0.95}, 0),  # faster, but not by the margin
    ],
)
def test_the_library_is_chosen_by_time(
    monkeypatch: pytest.MonkeyPatch, library_s: dict[int, float], expected: int
) -> None:
    """With given times, of which our own kernel takes 1 s, on a CPU without another choice."""
    bf16_op, int8_op = [torch.relu], [torch.neg]

    def bests(cases: dict[tuple[int, int], tuple]) -> dict[tuple, float]:
        times = {}
        for (num_tokens, library), (candidate, _, ops) in cases.items():
            assert (candidate.library, candidate.library_int8) == (library, library)
            is_timed = library > 0 and ops is bf16_op
            times[num_tokens, library] = library_s[num_tokens] if is_timed else 1.0
        return times

    monkeypatch.setattr(tuning, "_bests", bests)
    monkeypatch.setattr(tuning, "_layers", lambda kind: bf16_op if kind == "bf16" else int8_op)
    monkeypatch.setattr(tuning, "_isa", lambda: "avx2")
    assert tuning.measure() == replace(DEFAULTS, library=expected)


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        ("avx2", "avx2 library=32,library_int8=0"),
        ("amx", "amx few=8,few_int8=4,few_int4=2,prefetch=t0,library=32,library_int8=0"),
    ],
)
def test_the_description_names_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, isa: str, expected: str
) -> None:
    monkeypatch.setattr(tuning, "_isa", lambda: isa)
    tuning.use(replace(DEFAULTS, library=32))
    assert tuning.description() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((9, 4, 2, "t0"), "takes 0 to 8 of them, not 9"),
        ((8, -1, 2, "t0"), "takes 0 to 8 of them, not -1"),
        ((8, 4, 9, "t0"), "takes 0 to 8 of them, not 9"),
        ((8, 4, 2, "t2"), 'prefetch is "t2"; none, t0 or t1 is needed'),
        ((8, 4, 2, "t0", 31, 0), "from 32 tokens on, or never, which is 0; not from 31"),
        ((8, 4, 2, "t0", 0, -1), "from 32 tokens on, or never, which is 0; not from -1"),
    ],
)
def test_the_op_refuses_what_is_out_of_range(values: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning.use(Tuning(*values))
    assert tuning.current() == DEFAULTS


@pytest.mark.parametrize("shape", [(129, 132), (40, 8192)], ids=str)
@pytest.mark.parametrize("prefetch", tuning.PREFETCHES)
@pytest.mark.parametrize("few", [0, 3, 8])
def test_every_tuning_gives_the_same_products(
    few: int, prefetch: str, shape: tuple[int, int]
) -> None:
    linears = [test_linear24_int8.make(kind, shape) for kind in test_linear24_int8.KINDS]
    weight16, packed16 = test_linear24.make(shape, torch.bfloat16)
    tuning.use(Tuning(few, few, few, prefetch))
    for num_tokens in range(1, 10):
        x = test_linear24_int8.exact_x(num_tokens, shape[1], torch.float32)
        for linear in linears:
            assert torch.equal(linear(x), linear.expected(x))
        x16 = torch.randn(num_tokens, shape[1]).bfloat16()
        out16 = kernels.linear24(x16, packed16, shape[0])
        test_linear24.assert_is_product(out16, x16, weight16)
