"""Our model directories -> their TTFT and TPOT beside llama.cpp's, on one core.

The rival is llama-cpp-python's OpenAI server with SmolLM2-135M: the 4-bit file that scripts/data
makes the demo's dense model of, and what llama.cpp's own quantiser makes of that file. So bf16 has
the dense model's weights, and q8_0 is rounded twice: a measure of speed, not of what 8 bits keep.
The first run builds it from source into build/llama-cpp (10 minutes on one core).

All servers are up at once on one core with a thread each, but only one is ever asked: in a round
every server gets the same prompts, one request at a time, and the order turns round from round to
round. They are asked straight and not by cast-loadtest: llama-cpp-python has no /health for our
gateway, counts no tokens in its streams, and knows no ignore_eos (a bias does the same).
A ratio above 1 favours the last of our models; its interval is a bootstrap over rounds.
"""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from cast_serve import sse
from cast_serve.intervals import draws, ratio_of_quantiles
from cast_serve.latency import RequestTiming, Stopwatch
from loadtest.send.connection import Pool
from loadtest.send.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "llama-cpp-python[server]==0.3.36"
PYTHON = ROOT / "build/llama-cpp/bin/python"
WORK = ROOT / "build/peers"
SOURCE = "q4_1"  # the type of the file that the others are made of
FTYPES = {"q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16"}
ENDS = (0, 2, 4)  # SmolLM2's tokens that end a text for llama.cpp; min_tokens holds off one of them
QUANTISE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.allow_requantize = 1, True
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


class PeerError(RuntimeError):
    """A server, or what it needs, failed; the message names the log."""


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
        url: its root.
        weight_bytes: of the files on disk.
        is_ours: whether it is vLLM's.
        extra: what its requests need besides.
    """

    name: str
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


def install() -> None:
    """Builds llama-cpp-python in an environment of its own, unless it is there.

    Raises:
        PeerError: if that fails.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    environment = PYTHON.parent.parent
    if not PYTHON.exists():
        _call(sys.executable, "-m", "venv", environment)
    if not list(environment.glob("lib/*/site-packages/llama_cpp")):
        _call(PYTHON, "-m", "pip", "install", PACKAGE)


def gguf(name: str) -> Path:
    """The demo model's file of that type; it is fetched or made if it is not there.

    Raises:
        PeerError: if that fails, or the type is not known.
    """
    if name not in (SOURCE, *FTYPES):
        raise PeerError(f"{name!r} is no type of peer; choose from {', '.join([SOURCE, *FTYPES])}")
    path = WORK / f"{name}.gguf"
    if not path.exists() and name == SOURCE:
        _call(sys.executable, ROOT / "scripts/data", "--gguf", path)
    elif not path.exists():
        new = path.with_suffix(".new")
        _call(PYTHON, "-c", QUANTISE, gguf(SOURCE), new, FTYPES[name])
        new.rename(path)
    return path


def compare(models: Sequence[tuple[str, Path]], plan: Plan) -> dict[str, Any]:
    """Runs all servers and measures them.

    Args:
        models: names, and directories or GGUF files.
        plan: what is asked of each.

    Returns:
        prompt_tokens of the first prompt by server, and what `summary` returns.

    Raises:
        PeerError: if a server fails, or they count a prompt's tokens differently.
    """
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(name, path, plan)) for name, path in models]
        prompt = _prompt(Workload(plan.prompt_words), 0)
        lengths = {server.name: server.prompt_tokens(prompt) for server in servers}
        if len(set(lengths.values())) > 1:
            raise PeerError(f"they count one prompt's tokens differently: {lengths}")
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {plan.core} or {plan.core})
        found = asyncio.run(measure(servers, plan))
    return {"prompt_tokens": lengths, **summary(servers, found)}


@contextmanager
def serving(name: str, model: Path, plan: Plan) -> Iterator[Server]:
    """Runs a model's server on the core: llama.cpp's for a GGUF file, ours for a directory.

    Raises:
        PeerError: if it ends before it answers.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    core, context, log = str(plan.core), str(plan.context), WORK / f"{name}.log"
    is_ours = not model.is_file()
    if is_ours:
        command = [sys.executable, "-m", "cast_serve", "worker", str(model), "--name", name]
        command += ["--port", port, "--cores", core]
        command += ["--", "--max-model-len", context, *plan.vllm_flags.split()]
        extra: dict[str, Any] = {"ignore_eos": True}
        files = list(model.glob("*.safetensors"))
    else:
        command = [str(PYTHON), "-m", "llama_cpp.server", "--model", str(model)]
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
    server = Server(name, f"http://127.0.0.1:{port}", weight_bytes, is_ours, extra)
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


async def measure(servers: Sequence[Server], plan: Plan) -> dict[str, list[list[RequestTiming]]]:
    """By server, the timings of each round; a first round warms up and is left out.

    Raises:
        PeerError: if a request fails.
    """
    rng = random.Random(plan.seed)
    found: dict[str, list[list[RequestTiming]]] = {server.name: [] for server in servers}
    pools = {server.name: Pool(server.url, {}) for server in servers}
    for number in range(plan.rounds + 1):
        # Each prompt opens with a number of its own: no prefix of it was seen before.
        prompts = [
            _prompt(Workload(plan.prompt_words, number, run_number=rng.randrange(10**9)), index)
            for index in range(plan.prompts)
        ]
        for server in servers if number % 2 else servers[::-1]:
            pool = pools[server.name]
            timings = [await server.ask(pool, prompt, plan.output_tokens) for prompt in prompts]
            found[server.name].append(timings)
            tpot_ms = 1e3 * float(np.median(_sorted_s(timings, "tpot_s")))
            print(f"round {number}, {server.name}: TPOT {tpot_ms:.2f} ms", file=sys.stderr)
    for pool in pools.values():
        pool.close()
    return {name: rounds[1:] for name, rounds in found.items()}


def summary(
    servers: Sequence[Server], found: Mapping[str, Sequence[Sequence[RequestTiming]]]
) -> dict[str, Any]:
    """Medians of each server, and how many times faster the last of ours is than each other."""
    ours = next((server for server in reversed(servers) if server.is_ours), servers[0])
    result: dict[str, Any] = {"compared": ours.name, "servers": {}}
    for server in servers:
        about: dict[str, Any] = {"weight_bytes": server.weight_bytes}
        for name in ("ttft_s", "tpot_s"):
            theirs_s = [_sorted_s(timings, name) for timings in found[server.name]]
            ours_s = [_sorted_s(timings, name) for timings in found[ours.name]]
            ratio = ratio_of_quantiles(theirs_s, ours_s, draws(len(theirs_s)), 0.5)
            about[name] = float(np.median(np.concatenate(theirs_s)))
            about[f"{name[:4]}_speedup"] = ratio.about()
        result["servers"][server.name] = about
    return result


def _sorted_s(timings: Sequence[RequestTiming], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.sort(np.array([getattr(timing, name) for timing in timings], np.float64))


def _prompt(workload: Workload, index: int) -> str:
    """A made-up prompt, which is a text and no chat."""
    prompt = workload.prompt(index)
    assert isinstance(prompt, str)
    return prompt


def _call(*command: object) -> None:
    words, log = [str(word) for word in command], WORK / "setup.log"
    print("$", " ".join(words)[:90], file=sys.stderr)
    with log.open("ab") as file:
        if subprocess.run(words, stdout=file, stderr=file).returncode:
            raise PeerError(f"this failed; see {log}")
