"""A model's directory -> our server of it on some cores, and what it answers.

It is asked straight and not by cast-loadtest, since it takes turns with programs without a server
(process.py).
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers import files
from benchmarks.peers.names import PeerError
from cast_serve import sse
from cast_serve.latency import RequestTiming, Stopwatch
from cast_serve.ports import free_port
from loadtest.send.connection import Pool, TransportError


@dataclass(frozen=True)
class Server:
    """A server of one model, under the model's name.

    Attributes:
        name: as requests have it.
        title: for people.
        url: its root.
        weight_bytes: of the files on disk.
        pid: of its first process.
        is_ours: yes.
        can_score: whether it tells the log probabilities of a given text: yes.
    """

    name: str
    title: str
    url: str
    weight_bytes: int
    pid: int
    is_ours: bool = True
    can_score: bool = True

    def body(self, prompt: str, num_tokens: int) -> dict[str, Any]:
        """A request for a completion of exactly so many tokens."""
        asked = {"model": self.name, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        return {**asked, "ignore_eos": True}

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens it takes the prompt for.

        Raises:
            PeerError: if it cannot be reached or refuses.
        """
        return int(self._complete(self.body(prompt, 1))["usage"]["prompt_tokens"])

    def nats_of(self, block: Sequence[int]) -> float:
        """The negative log likelihood of a block of tokens, without its first; by vLLM's API.

        Raises:
            PeerError: if it cannot be reached or refuses.
        """
        body = {"model": self.name, "prompt": list(block), "max_tokens": 1, "prompt_logprobs": 0}
        found = self._complete(body)["choices"][0]["prompt_logprobs"]
        return -sum(
            probabilities[str(token)]["logprob"]
            for token, probabilities in zip(block[1:], found[1:], strict=True)
        )

    def _complete(self, body: Mapping[str, Any]) -> Any:
        url = f"{self.url}/v1/completions"
        try:
            answer = httpx.post(url, json=body, timeout=120, trust_env=False)
        except httpx.HTTPError as error:
            raise PeerError(f"{self.name} did not answer: {error!r}") from error
        if answer.status_code != 200:
            raise PeerError(f"{self.name} gave {answer.status_code}: {answer.text[:300]}")
        return answer.json()

    async def ask(self, pool: Pool, prompt: str, num_tokens: int) -> RequestTiming:
        """Streams one completion. If it ends for its length, it has all its tokens.

        Raises:
            PeerError: if it does not, or cannot be reached.
        """
        watch, reader = Stopwatch(), sse.Reader()
        reasons: list[str | None] = []

        def feed(piece: bytes) -> None:
            for data in reader.feed(piece):
                if data != sse.DONE:
                    chunk = json.loads(data)
                    watch.observe(chunk)
                    reasons.extend(c["finish_reason"] for c in chunk.get("choices") or ())

        body = json.dumps({**self.body(prompt, num_tokens), "stream": True}).encode()
        try:
            response = await pool.exchange("POST", "/v1/completions", body, feed)
        except TransportError as error:
            raise PeerError(f"{self.name} did not answer: {error}") from error
        if response.status != 200 or reasons[-1:] != ["length"]:
            raise PeerError(f"{self.name} gave {response.status}, ended by {reasons[-1:]}")
        return watch.finish(num_tokens)

    async def ask_at_once(self, pool: Pool, prompts: Sequence[str], num_tokens: int) -> float:
        """Streams a completion of every prompt.

        Returns:
            Seconds until the last one ended.

        Raises:
            PeerError: as `ask`.
        """
        began_s = time.perf_counter()
        await asyncio.gather(*(self.ask(pool, prompt, num_tokens) for prompt in prompts))
        return time.perf_counter() - began_s


@contextmanager
def serving(
    name: str, model: Path, cores: Sequence[int], num_context: int, vllm_flags: Sequence[str]
) -> Iterator[Server]:
    """Runs a model's server on the cores.

    Args:
        name: of the model.
        model: its directory.
        cores: a thread runs on each.
        num_context: tokens that a sequence may have, prompt and answer.
        vllm_flags: more flags for the server.

    Raises:
        PeerError: if it ends before it answers.
    """
    port = str(free_port())
    files.WORK.mkdir(parents=True, exist_ok=True)
    cpus, threads, log = ",".join(map(str, cores)), str(len(cores)), files.WORK / f"{name}.log"
    command = [sys.executable, "-m", "cast_serve", "worker", str(model), "--name", name]
    command += ["--port", port, "--cores", cpus]
    command += ["--", "--max-model-len", str(num_context), *vllm_flags]
    # Before the process is there, since a file may be missing.
    weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    words = ["taskset", "-c", cpus, *command]
    files.show(words)
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
    server = Server(name, f"vLLM, {name}", f"http://127.0.0.1:{port}", weight_bytes, process.pid)
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
        try:
            process.wait()
        finally:  # after a Ctrl-C meanwhile too
            process.kill()
            process.wait()
