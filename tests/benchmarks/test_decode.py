import os
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from benchmarks import decode
from benchmarks.peers.names import PeerError
from benchmarks.peers.server import Server
from loadtest.mock_server import MockVariant
from tests.benchmarks.conftest import LoadOf
from tests.conftest import Opened
from tests.loadtest.conftest import Serve

LOOP = "run_engine_core (core.py:1);EngineCoreProc.run_busy_loop (core.py:2)"
FORWARD = f"{LOOP};GPUModelRunner._model_forward (runner.py:3)"


def test_stacks_are_told_apart() -> None:
    stacks = {
        f"{FORWARD};Runner.call (x.py:4);OpOverload.__call__ (_ops.py:5)": "linears",
        f"{FORWARD};Runner.call (x.py:4)": "between the linears",
        f"{FORWARD};unified_kv_cache_update (attention.py:6);OpOverload.__call__ (_ops.py:5)": (
            "attention and its cache"
        ),
        f"{LOOP};LlamaForCausalLM.compute_logits (llama.py:7);OpOverload.__call__ (_ops.py:5)": (
            "head"
        ),
        f"{LOOP};Scheduler.schedule (scheduler.py:8)": "scheduling",
        f"{LOOP};MessageQueue.dequeue (shm.py:9);sched_yield (utils.py:1)": "waiting in a loop",
        "WorkerProc.worker_busy_loop (mp.py:1);MessageQueue.dequeue (shm.py:9)": (
            "waiting in a loop"
        ),
        f"{LOOP};put (queue.py:1)": decode.REST,
        "run_engine_core (core.py:1);process_output_sockets (core.py:3)": decode.REST,
        "main (__main__.py:1);run (asyncio.py:2)": decode.SERVER,
    }
    assert {stack: decode.part_of(stack) for stack in stacks} == stacks


def test_a_look_that_fails_leaves_no_watcher_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    watcher = tmp_path / "py-spy"
    watcher.write_text("#!/bin/sh\nexec sleep 600\n")
    watcher.chmod(0o755)
    monkeypatch.setattr(decode, "PY_SPY", watcher)
    server = Server("dense", "dense", "http://127.0.0.1:9", 1, os.getpid())
    with pytest.raises(PeerError):
        decode._look(server, [1, 2], [0], 8, 1.0, tmp_path)
    assert len(opened) == 2
    opened.check_closed()


def test_where_a_record_is_from_is_stamped_first(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_of: LoadOf
) -> None:
    url, app = serve(profiled=MockVariant(0.0, 0.001))
    server = Server("profiled", "profiled", url, 1, os.getpid())
    monkeypatch.setattr(decode, "serving", lambda *_: nullcontext(server))
    monkeypatch.setattr(decode, "PY_SPY", Path(__file__))
    monkeypatch.setattr(decode, "IDLE_S", 0)
    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [])
    check_stamp = load_of(app.state.requests)
    check_stamp(decode.profile(tmp_path, [0], 4))
