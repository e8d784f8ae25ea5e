from pathlib import Path

import pytest

from loadtest.bench import decode
from loadtest.bench.peers.names import PeerError
from loadtest.bench.peers.server import Server
from tests.conftest import Opened

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
    server = Server("dense", "dense", "http://127.0.0.1:9", 1, True, {})
    with pytest.raises(PeerError):
        decode._look(server, [1, 2], [0], 8, 1.0, tmp_path)
    assert len(opened) == 2
    opened.check_closed()
