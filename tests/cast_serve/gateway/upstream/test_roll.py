"""Rolls: another directory under a variant that serves, and no request lost.

CAST_ROLLS=20 has the test under load roll so many times; without, 3.
"""

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cast_serve.gateway.stack import wait_until
from tests.cast_serve.gateway.upstream.rolled import (
    Rolled,
    processes,
    served,
)
from tests.cast_serve.gateway.upstream.scripted_worker import NUM_WORDS

NUM_ROLLS = int(os.environ.get("CAST_ROLLS", "3"))


def test_rolls_under_load_lose_no_request(stack: Rolled) -> None:
    is_over = threading.Event()
    ends: Counter[tuple[str, str]] = Counter()
    wrong: list[Any] = []

    def keep_asking(name: str) -> None:
        while not is_over.is_set():
            try:
                *words, last = stack.stream(name)
                if last != "[DONE]" or len(words) != NUM_WORDS or len(set(words)) != 1:
                    wrong.append((name, words, last))
                whole = stack.complete(name)
            except Exception as error:
                wrong.append((name, repr(error)))
                continue
            ends.update([(name, words[0]), (name, whole)])

    def keep_looking() -> None:
        while not is_over.is_set():
            for path in ("/metrics", "/v1/models", "/readyz", "/v1/comparison"):
                status = httpx.get(stack.url + path, timeout=30).status_code
                if status != 200:
                    wrong.append((path, status))

    models = [stack.model(f"new-{number}") for number in range(NUM_ROLLS)]
    with ThreadPoolExecutor(9) as pool:
        asking = [pool.submit(keep_asking, name) for name in ("dense", "sparse") * 4]
        asking.append(pool.submit(keep_looking))
        try:
            for before, model in zip([stack.folder / "sparse", *models], models, strict=False):
                done = stack.roll("sparse", model)
                assert stack.complete() == model.name
                assert not processes(before)
                assert (done["model"], done["before"]) == (str(model), str(before))
        finally:
            is_over.set()
        for each in asking:
            each.result()
    assert wrong == []
    assert {name for variant, name in ends if variant == "dense"} == {"dense"}
    answered_by = {name for variant, name in ends if variant == "sparse"}
    assert {"sparse", models[0].name} < answered_by <= {"sparse", *(m.name for m in models)}
    assert sum(ends.values()) > 8 * NUM_ROLLS
    assert (stack.counter("done"), stack.counter("failed")) == (NUM_ROLLS, 0)
    shown = httpx.get(f"{stack.url}/v1/comparison").json()
    assert shown["models"]["sparse"]["path"] == str(models[-1])


def test_the_old_worker_ends_after_its_requests_and_new_ones_do_not_wait(stack: Rolled) -> None:
    old, new = stack.folder / "sparse", stack.model("new")
    stack.complete()
    (old / "pause").touch()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(stack.stream)
        wait_until(lambda: stack.replica().num_outstanding == 1)
        roll = pool.submit(stack.roll, "sparse", new)
        wait_until(lambda: stack.replica().model == new, 30)
        assert [stack.complete() for _ in range(3)] == ["new"] * 3
        assert not roll.done()
        assert processes(old)
        with pytest.raises(ValueError, match="'sparse' is already being rolled"):
            stack.roll("dense")
        (old / "pause").unlink()
        assert long.result() == ["sparse"] * NUM_WORDS + ["[DONE]"]
        assert roll.result()["drained_requests"] == 1
    assert not processes(old)
    loading, serves = stack.said
    assert f"sparse: loading {new}, log " in loading
    assert "finishing 1 requests" in serves
    shown = httpx.get(f"{stack.url}/v1/comparison").json()["variants"]
    assert shown["sparse"]["e2e_s"]["n"] == 3  # the old worker's are forgotten or not counted


def test_the_same_directory_again(stack: Rolled) -> None:
    (before,) = processes(stack.folder / "sparse")
    done = stack.roll()
    assert done["model"] == done["before"] == str(stack.folder / "sparse")
    (after,) = processes(stack.folder / "sparse")
    assert before != after
    assert stack.complete() == "sparse"


# httpx leaves a connection to a killed process to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_does_not_start_leaves_the_old_one_serving(stack: Rolled) -> None:
    new = stack.model("new")
    (new / "fail").touch()
    with pytest.raises(
        RuntimeError, match=r"ended with 1; its log says:\nworker starts\nno such model\n"
    ) as error:
        stack.roll("sparse", new)
    assert str(error.value).endswith(f"{stack.folder / 'sparse'} is still being served")
    assert stack.complete() == "sparse"
    assert (stack.counter("done"), stack.counter("failed")) == (0, 1)
    assert stack.gateway.failure is None
    (new / "fail").unlink()
    assert stack.roll("sparse", new)["model"] == str(new)
    assert stack.complete() == "new"
    replica = stack.replica()
    os.kill(processes(new)[0], 9)  # the new one is watched as the old one was
    wait_until(lambda: replica.num_restarts == 1 and replica.is_up, 30)
    assert stack.complete() == "new"


def test_a_worker_that_does_not_come_up_in_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, monkeypatch, startup_timeout_s=8) as stack:
        new = stack.model("new")
        (new / "unhealthy").touch()
        with pytest.raises(RuntimeError, match="did not answer within"):
            stack.roll("sparse", new)
        assert not processes(new)
        assert stack.complete() == "sparse"


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("other", None, "variant 'other' does not exist; the variants are ['dense', 'sparse']"),
        (
            "sparse",
            "/nowhere",
            "variant sparse: /nowhere is neither a directory nor a model's name",
        ),
        ("sparse", "EMPTY", "holds no model (no config.json)"),
    ],
)
def test_what_cannot_be_rolled(stack: Rolled, name: str, model: str | None, message: str) -> None:
    if model == "EMPTY":
        (stack.folder / "empty").mkdir()
        model = str(stack.folder / "empty")
    with pytest.raises(ValueError, match=r".") as error:
        stack.roll(name, model)
    assert message in str(error.value)
    assert stack.complete() == "sparse"
