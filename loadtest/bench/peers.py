"""Our model directories -> their TTFT and TPOT beside llama.cpp's, on one core.

The rival is llama.cpp with SmolLM2-135M, as llama-cpp-python's server and as its own decode, each
with files of several types (loadtest/bench/llama.py).

All are up at once on one core with a thread each, but only one is ever asked: in a round every one
gets the same prompts, one request at a time, and the order turns round from round to round. Servers
are asked straight and not by cast-loadtest: llama-cpp-python has no /health for our gateway, counts
no tokens in its streams, and knows no ignore_eos (a bias does the same). llama.cpp's own decode is
timed inside its process, without HTTP and without making tokens of the text: TTFT is the time of
the prompt's batch, TPOT that of each further token. So what it is spared counts against us. It
computes without a pause, so its share of the core tells whether anything else wanted the core.
A ratio above 1 favours the last of our models; its interval is a bootstrap over rounds.
"""

import asyncio
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from cast_serve import sse
from cast_serve.intervals import draws, ratio_of_quantiles
from cast_serve.latency import RequestTiming, Stopwatch
from loadtest.bench import llama
from loadtest.bench.llama import Decode, PeerError
from loadtest.provenance import hashes_of, machine, served_at, versions
from loadtest.send.connection import Pool
from loadtest.send.workload import Workload

ENDS = (0, 2, 4)  # SmolLM2's tokens that end a text for llama.cpp; min_tokens holds off one of them
MIN_CORE_SHARE = 0.95  # of llama.cpp's decode, or times are not comparable


@dataclass(frozen=True)
class Plan:
    """What is asked of every server.

    Attributes:
        core: the CPU that all servers share.
        context: tokens that a server holds, prompt and answer.
        rounds: measured ones; one before them warms up.
        prompts: in a round.
        prompt_words: of each prompt.
        output_tokens: of each answer.
        seed: of the prompts' opening numbers.
        vllm_flags: of our servers besides, separated by blanks.
    """

    core: int = 0
    context: int = 2048
    rounds: int = 8
    prompts: int = 4
    prompt_words: int = 128
    output_tokens: int = 64
    seed: int = 0
    vllm_flags: str = ""


@dataclass(frozen=True)
class Server:
    """A server of one model, under the model's name.

    Attributes:
        name: as requests have it.
        title: for people.
        url: its root.
        weight_bytes: of the files on disk.
        is_ours: whether it is vLLM's.
        extra: what its requests need besides.
    """

    name: str
    title: str
    url: str
    weight_bytes: int
    is_ours: bool
    extra: Mapping[str, Any]

    def body(self, prompt: str, num_tokens: int) -> dict[str, Any]:
        """A request for a completion of exactly so many tokens."""
        asked = {"model": self.name, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        return {**asked, **self.extra}

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens it takes the prompt for."""
        body, url = self.body(prompt, 1), f"{self.url}/v1/completions"
        answer = httpx.post(url, json=body, timeout=120, trust_env=False)
        return int(answer.raise_for_status().json()["usage"]["prompt_tokens"])

    async def ask(self, pool: Pool, prompt: str, num_tokens: int) -> RequestTiming:
        """Streams one completion. If it ends for its length, it has all its tokens.

        Raises:
            PeerError: if it does not.
        """
        watch, reader = Stopwatch(), sse.Reader()
        reasons: list[str | None] = []

        def feed(piece: bytes) -> None:
            for data in reader.feed(piece):
                if data != sse.DONE:
                    chunk = json.loads(data)
                    watch.observe(chunk)
                    reasons.extend(choice["finish_reason"] for choice in chunk["choices"])

        body = json.dumps({**self.body(prompt, num_tokens), "stream": True}).encode()
        response = await pool.exchange("POST", "/v1/completions", body, feed)
        if response.status != 200 or reasons[-1:] != ["length"]:
            raise PeerError(f"{self.name} gave {response.status}, ended by {reasons[-1:]}")
        return watch.finish(num_tokens)


Peer = Server | Decode


def compare(models: Sequence[tuple[str, Path]], plan: Plan) -> dict[str, Any]:
    """Runs all servers and measures them.

    Args:
        models: names, and directories or GGUF files; the name of a file as in loadtest/bench/llama.
        plan: what is asked of each.

    Returns:
        Where it is from, prompt_tokens of the first prompt by server, and what `summary` returns.

    Raises:
        PeerError: if a name is given twice, a server fails, or they count a prompt's tokens
            differently.
    """
    names = [name for name, _ in models]
    if len(set(names)) < len(names):
        raise PeerError(f"a name is given twice: {', '.join(names)}; give each its own")
    date, cpu = datetime.now(UTC).isoformat(timespec="seconds"), machine()
    load_average = os.getloadavg()[0]
    with ExitStack() as stack:
        peers = [stack.enter_context(running(name, path, plan)) for name, path in models]
        prompt = _prompt(Workload(plan.prompt_words), 0)
        lengths = {peer.name: peer.prompt_tokens(prompt) for peer in peers}
        if len(set(lengths.values())) > 1:
            raise PeerError(f"they count one prompt's tokens differently: {lengths}")
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {plan.core} or {plan.core})
        found = asyncio.run(measure(peers, plan))
        result = summary(peers, found)
        warn_of_others(result)
        served: dict[str, Any] = {}
        for peer in peers:
            if isinstance(peer, Server) and peer.is_ours:
                served.update(served_at(peer.url))
    return {
        "date": date,
        "machine": {**cpu, "load_average": [load_average, os.getloadavg()[0]]},
        "versions": versions(),
        "plan": asdict(plan),
        "peer": llama.PACKAGE,
        "llama_cpp": next((peer.system_info for peer in peers if isinstance(peer, Decode)), None),
        "models": files_of(models),
        "served": served,
        "prompt_tokens": lengths,
        **result,
    }


def running(name: str, model: Path, plan: Plan) -> AbstractContextManager[Peer]:
    """Runs what the name and the model ask for: a server, or llama.cpp's own decode."""
    if model.is_file() and llama.parse(name)[1]:
        return llama.decoding(name, model, plan.core, plan.context)
    return serving(name, model, plan)


@contextmanager
def serving(name: str, model: Path, plan: Plan) -> Iterator[Server]:
    """Runs a model's server on the core: llama.cpp's for a GGUF file, ours for a directory.

    Raises:
        PeerError: if it ends before it answers.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    llama.WORK.mkdir(parents=True, exist_ok=True)
    core, context, log = str(plan.core), str(plan.context), llama.WORK / f"{name}.log"
    is_ours = not model.is_file()
    if is_ours:
        command = [sys.executable, "-m", "cast_serve", "worker", str(model), "--name", name]
        command += ["--port", port, "--cores", core]
        command += ["--", "--max-model-len", context, *plan.vllm_flags.split()]
        extra: dict[str, Any] = {"ignore_eos": True}
        files = list(model.glob("*.safetensors"))
    else:
        command = [str(llama.PYTHON), "-m", "llama_cpp.server", "--model", str(model)]
        command += ["--model_alias", name, "--host", "127.0.0.1", "--port", port]
        command += ["--n_ctx", context, "--n_threads", "1", "--n_threads_batch", "1"]
        command += ["--logits_all", "False", "--verbose", "False"]
        # Unless told otherwise its repeat_penalty is 1.1.
        extra = {"logit_bias": {str(token): -100 for token in ENDS}, "repeat_penalty": 1.0}
        files = [model]
    words = ["taskset", "-c", core, *command]
    print("$", *words, file=sys.stderr)
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
    weight_bytes = sum(path.stat().st_size for path in files)
    title = f"vLLM, {name}" if is_ours else llama.title_of(name)
    server = Server(name, title, f"http://127.0.0.1:{port}", weight_bytes, is_ours, extra)
    try:
        while True:
            if process.poll() is not None:
                raise PeerError(f"{name} ended with {process.returncode}; see {log}")
            try:
                httpx.get(f"{server.url}/v1/models", timeout=5, trust_env=False)
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait()


async def measure(peers: Sequence[Peer], plan: Plan) -> dict[str, list[list[RequestTiming]]]:
    """By server, the timings of each round; a first round warms up and is left out.

    Raises:
        PeerError: if a request fails.
    """
    rng = random.Random(plan.seed)
    found: dict[str, list[list[RequestTiming]]] = {peer.name: [] for peer in peers}
    pools = {peer.name: Pool(peer.url, {}) for peer in peers if isinstance(peer, Server)}
    for number in range(plan.rounds + 1):
        # Each prompt opens with a number of its own: no prefix of it was seen before.
        prompts = [
            _prompt(Workload(plan.prompt_words, number, run_number=rng.randrange(10**9)), index)
            for index in range(plan.prompts)
        ]
        for peer in peers if number % 2 else peers[::-1]:
            timings = []
            for prompt in prompts:
                if isinstance(peer, Server):
                    timing = await peer.ask(pools[peer.name], prompt, plan.output_tokens)
                else:
                    timing = peer.ask(prompt, plan.output_tokens)
                timings.append(timing)
            found[peer.name].append(timings)
            tpot_ms = 1e3 * float(np.median(_sorted_s(timings, "tpot_s")))
            print(f"round {number}, {peer.name}: TPOT {tpot_ms:.2f} ms", file=sys.stderr)
    for pool in pools.values():
        pool.close()
    return {name: rounds[1:] for name, rounds in found.items()}


def summary(
    peers: Sequence[Peer], found: Mapping[str, Sequence[Sequence[RequestTiming]]]
) -> dict[str, Any]:
    """Medians of each server, and how many times faster the last of ours is than each other.

    llama.cpp's decode has its share of the core, too.
    """
    ours = next((peer for peer in reversed(peers) if peer.is_ours), peers[0])
    result: dict[str, Any] = {"compared": ours.name, "servers": {}}
    for peer in peers:
        about: dict[str, Any] = {"title": peer.title, "weight_bytes": peer.weight_bytes}
        for name in ("ttft_s", "tpot_s"):
            theirs_s = [_sorted_s(timings, name) for timings in found[peer.name]]
            ours_s = [_sorted_s(timings, name) for timings in found[ours.name]]
            ratio = ratio_of_quantiles(theirs_s, ours_s, draws(len(theirs_s)), 0.5)
            about[name] = float(np.median(np.concatenate(theirs_s)))
            about[f"{name[:4]}_speedup"] = ratio.about()
        if isinstance(peer, Decode):
            about["core_share"] = float(np.median(peer.core_shares))
        result["servers"][peer.name] = about
    return result


def warn_of_others(result: Mapping[str, Any]) -> None:
    """Prints a warning if llama.cpp's decode did not have the core for itself."""
    servers = result["servers"].values()
    share = min((server["core_share"] for server in servers if "core_share" in server), default=1)
    if share < MIN_CORE_SHARE:
        print(
            f"compare-peers: a process had only {share:.0%} of the core, which others used, too; "
            "times are not comparable: stop the others, and measure again",
            file=sys.stderr,
        )


def files_of(models: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """The sha256 of each file of our models, and of each GGUF file with its weights by type."""
    found: dict[str, Any] = {}
    for name, path in models:
        if path.is_dir():
            found[name] = hashes_of(path)
        elif path.name not in found:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.name] = {"sha256": sha256, "weights_by_type": llama.weights_by_type(path)}
    return found


def _sorted_s(timings: Sequence[RequestTiming], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.sort(np.array([getattr(timing, name) for timing in timings], np.float64))


def _prompt(workload: Workload, index: int) -> str:
    """A made-up prompt, which is a text and no chat."""
    prompt = workload.prompt(index)
    assert isinstance(prompt, str)
    return prompt
