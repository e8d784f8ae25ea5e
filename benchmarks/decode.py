"""A model directory -> where the time of a decode step goes, in `cast-serve worker` on some cores.

    .venv/bin/python -m benchmarks.decode MODEL... [--cores 0] [--tokens 256]
        [--vllm-flags "--distributed-executor-backend mp"] [--out FILE]

Two requests are asked for, one after the other. Of the first, the time per token and the CPU time
of each process of the server are measured. During the second py-spy looks at the stacks, 200 times
a second; a process's CPU time is distributed by what it was then found at. The parts are told by
vLLM's own functions (`PARTS`), so another vLLM may show a large rest. Before the second, the CPU
time of a server that nobody asks is measured, and of one that is asked for a token each second; the
gateway asks an idle worker for one every 5 seconds, to see that it lives. py-spy needs root where
ptrace is restricted.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.names import PeerError
from benchmarks.peers.server import Server, serving
from cast_serve.cores import parse_cores
from cast_serve.provenance import origin
from loadtest.report.directory import check_file
from loadtest.send.connection import Pool

PROMPT = "The capital of France is"
RATE = 200  # looks a second
IDLE_S = 20  # vLLM logs its statistics every 10 s
PY_SPY = Path(sysconfig.get_path("scripts")) / "py-spy"

# The first that fits a stack: functions of which one is in it, and the start of its innermost
# frame ("" is any).
PARTS: dict[str, tuple[frozenset[str], str]] = {
    "attention and its cache": (
        frozenset({"unified_attention_with_output", "unified_kv_cache_update"}),
        "",
    ),
    "head": (frozenset({"compute_logits"}), ""),
    "linears": (frozenset({"_model_forward"}), "OpOverload.__call__"),
    "between the linears": (frozenset({"_model_forward"}), ""),
    "preparing the inputs": (
        frozenset(
            {"_prepare_inputs", "_preprocess", "_build_attention_metadata", "_update_states"}
        ),
        "",
    ),
    "sampling": (frozenset({"sample_tokens"}), ""),
    "scheduling": (frozenset({"schedule", "update_from_output"}), ""),
    "waiting in a loop": (frozenset({"dequeue", "acquire_read"}), ""),
}
REST = "rest of the engine"
SERVER = "HTTP server"


def profile(
    model: Path, cores: Sequence[int], num_tokens: int, vllm_flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Serves the model and measures.

    Args:
        model: dense or compressed directory.
        cores: CPU ids of the server. py-spy gets the others, if there are any.
        num_tokens: of each of the two answers.
        vllm_flags: more flags for the vLLM server.

    Returns:
        ``tpot_ms``: of the first answer. ``parts_ms``: CPU ms a token by part; the last one,
        ``not on a core``, is what is left of tpot_ms. ``idle_percent`` of a core that all its
        processes take without a request, ``canary_percent`` with one of a token each second.

    Raises:
        PeerError: if the server ends, or does not answer.
        RuntimeError: if py-spy is missing, or cannot look at a process.
    """
    if not PY_SPY.is_file():
        raise RuntimeError(f"{PY_SPY} is missing; pip install py-spy")
    begun = origin()
    with serving("profiled", model, cores, num_tokens + 64, vllm_flags) as server:
        processes = psutil.Process().children(recursive=True)
        asyncio.run(_ask(server, 16))
        before = {process.pid: _cpu_s(process) for process in processes}
        tpot_ms = asyncio.run(_ask(server, num_tokens))
        used_ms = {
            process.pid: (_cpu_s(process) - before[process.pid]) / num_tokens * 1e3
            for process in processes
        }
        idle_percent = _idle_percent(server, processes, has_canary=False)
        canary_percent = _idle_percent(server, processes, has_canary=True)
        with tempfile.TemporaryDirectory() as folder:
            stacks = _look(server, list(used_ms), cores, num_tokens, tpot_ms, Path(folder))
    parts: dict[str, float] = {}
    for pid, total_ms in used_ms.items():
        for part, part_ms in _distributed(stacks[pid], total_ms).items():
            parts[part] = parts.get(part, 0.0) + part_ms
    parts["not on a core"] = max(0.0, tpot_ms - sum(parts.values()))
    return {
        **begun,
        "num_launches": 1,
        "model": model.name,
        "vllm_flags": " ".join(vllm_flags),
        "num_cores": len(cores),
        "num_tokens": num_tokens,
        "tpot_ms": tpot_ms,
        "parts_ms": parts,
        "idle_percent": idle_percent,
        "canary_percent": canary_percent,
    }


def part_of(stack: str) -> str:
    """The part that a stack belongs to.

    Args:
        stack: frames from the outermost on, ``function (file:line)``, separated by ``;``.
    """
    frames = stack.split(";")
    functions = {frame.partition(" ")[0].rpartition(".")[2] for frame in frames}
    if not functions & {"run_busy_loop", "worker_busy_loop"}:
        return REST if "run_engine_core" in functions else SERVER
    for part, (inside, innermost) in PARTS.items():
        if functions & inside and frames[-1].startswith(innermost):
            return part
    return REST


def _distributed(stacks: Mapping[str, int], total_ms: float) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for stack, count in stacks.items():
        counts[part_of(stack)] += count
    return {part: total_ms * count / counts.total() for part, count in counts.items()}


def _look(
    server: Server,
    pids: Sequence[int],
    cores: Sequence[int],
    num_tokens: int,
    tpot_ms: float,
    folder: Path,
) -> dict[int, dict[str, int]]:
    """The stacks of each process, and how often each was seen, while an answer is written."""
    others = sorted(os.sched_getaffinity(0) - set(cores)) or sorted(cores)
    duration_s = max(1, int(0.8 * num_tokens * tpot_ms / 1e3))
    outs = {pid: folder / str(pid) for pid in pids}
    watchers = []
    found = {}
    with ExitStack() as stack:
        for pid, out in outs.items():
            words = ["taskset", "-c", ",".join(map(str, others)), str(PY_SPY), "record"]
            words += ["--pid", str(pid), "--rate", str(RATE), "--duration", str(duration_s)]
            words += ["--nonblocking", "--format", "raw", "--output", str(out)]
            watcher = stack.enter_context(
                subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
            stack.callback(watcher.kill)  # nothing, once it has ended
            watchers.append(watcher)
        asyncio.run(_ask(server, num_tokens))
        for (pid, out), watcher in zip(outs.items(), watchers, strict=True):
            said, _ = watcher.communicate()
            if watcher.returncode:
                raise RuntimeError(f"py-spy record --pid {pid} failed; try as root: {said.strip()}")
            lines = out.read_text(encoding="utf-8").splitlines()
            found[pid] = {s: int(n) for s, _, n in (line.rpartition(" ") for line in lines)}
    return found


async def _ask(server: Server, num_tokens: int) -> float:
    """Milliseconds per token of one streamed answer."""
    pool = Pool(server.url, {})
    try:
        tpot_s = (await server.ask(pool, PROMPT, num_tokens)).tpot_s
    finally:
        pool.close()
    assert tpot_s is not None
    return tpot_s * 1e3


def _idle_percent(server: Server, processes: Sequence[psutil.Process], has_canary: bool) -> float:
    """CPU time of all processes in percent of a core, over IDLE_S."""
    began_s, before_s = time.monotonic(), sum(map(_cpu_s, processes))
    for _ in range(IDLE_S):
        time.sleep(1)
        if has_canary:
            server.prompt_tokens(PROMPT)  # asks for one token
    used_s = sum(map(_cpu_s, processes)) - before_s
    return 100 * used_s / (time.monotonic() - began_s)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its servers are ended too
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="a directory")
    parser.add_argument("--cores", default="0", help="CPU ids of the server (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens per request (default: %(default)s)"
    )
    parser.add_argument("--vllm-flags", default="", help="more flags for the vLLM server")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    if args.tokens < 32:
        parser.error(f"--tokens {args.tokens} is too few; give 32 or more")
    for model in args.models:
        if not (model / "config.json").is_file():
            parser.error(f"{model} is not a model directory: there is no config.json")
    try:
        cores = parse_cores(args.cores)
        if args.out is not None:
            check_file("--out", args.out)
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "benchmarks.decode", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "profiles": []}
    try:
        for model in args.models:
            flags = shlex.split(args.vllm_flags)
            result["profiles"].append(profile(model, cores, args.tokens, flags))
            if args.out is not None:  # after each, so that a later one's failure costs none
                args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (PeerError, RuntimeError) as error:
        sys.exit(f"benchmarks.decode: {error}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
