"""Our model directories and rivals -> TTFT, TPOT, throughput and perplexity of each, on some cores.

The rivals are llama.cpp's own decode and OpenVINO GenAI, each with GGUF files of several types
(names.py, files.py).

All are up at once on the same cores, with a thread on each, but only one is asked at a time. In a
round each gets the same prompts, one request at a time, then other prompts all at once; the order
is reversed from round to round. A rival's own decode is timed inside its process, without HTTP, and
llama.cpp's without tokenising: the work it is spared counts against us. llama.cpp computes without
a pause, so its share of the cores shows whether anything else used them.
A ratio above 1 favours the last of our models; its interval is a bootstrap over rounds.

Perplexity is measured on blocks of a held-out text's tokens, each block by itself, its first token
left out: through vLLM's API, and from llama.cpp's logits. OpenVINO GenAI reports none.
"""

import asyncio
import math
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers import files, process
from benchmarks.peers.names import PeerError
from benchmarks.peers.process import Process
from benchmarks.peers.server import Server, serving
from cast_serve.checkpoint.record import sha256
from cast_serve.cores import parse_cores
from cast_serve.intervals import draws, ratio_of_quantiles
from cast_serve.latency import RequestTiming
from cast_serve.provenance import origin
from loadtest.provenance import hashes_of, served_at
from loadtest.send.connection import Pool
from loadtest.send.distribution import Distribution
from loadtest.send.workload import Workload

MIN_CORE_SHARE = 0.95  # of llama.cpp's decode, or times are not comparable


@dataclass(frozen=True)
class Plan:
    """What is asked of every peer.

    Attributes:
        cores: the CPUs that all peers share, such as 0 or 0-1.
        context: most tokens in a sequence, prompt and answer.
        rounds: number measured; one more before them warms up.
        prompts: number sent one at a time, in a round.
        at_once: number sent at the same time, in a round; 0: none.
        prompt_words: of each prompt.
        output_tokens: of each answer.
        seed: of the prompts' opening numbers.
        vllm_flags: more flags for our servers, separated by blanks.
        blocks: number of blocks of text to measure perplexity on; 0: none.
        block_size: tokens of a block.
    """

    cores: str = "0"
    context: int = 2048
    rounds: int = 8
    prompts: int = 4
    at_once: int = 8
    prompt_words: int = 128
    output_tokens: int = 64
    seed: int = 0
    vllm_flags: str = ""
    blocks: int = 0
    block_size: int = 512

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rounds", self.rounds, 1),
            ("prompts", self.prompts, 1),
            ("at-once", self.at_once, 0),
            ("prompt-words", self.prompt_words, 1),
            ("output-tokens", self.output_tokens, 2),  # TPOT is of those after the first
            ("blocks", self.blocks, 0),
            ("block-size", self.block_size, 2),  # a block's first token has no likelihood
        ):
            if value < least:
                raise ValueError(f"--{name} {value} is too small; give at least {least}")
        if self.blocks and self.block_size >= self.context:  # vLLM is asked for one token more
            raise ValueError(
                f"--block-size {self.block_size} must be less than --context {self.context}; give "
                f"at most {self.context - 1}"
            )


@dataclass
class Found:
    """What was measured of one peer.

    Attributes:
        timings: by round, of each request sent alone.
        tokens_per_s: by round, over the prompts sent at once; 0 if there were none.
    """

    timings: list[list[RequestTiming]] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


Peer = Server | Process


def compare(
    models: Sequence[tuple[str, Path]],
    plan: Plan,
    blocks: Sequence[Sequence[int]] = (),
    on_round: Callable[[dict[str, Any]], object] = lambda summary: None,
) -> dict[str, Any]:
    """Runs all servers and measures them.

    Args:
        models: names, each with a directory or GGUF file; names.py has the names of files.
        plan: what is asked of each.
        blocks: of token ids, to measure perplexity on.
        on_round: called after each round with the summary so far and `num_rounds`.

    Returns:
        The record: commit and machine, plan, packages, files with their hashes, `prompt_tokens` of
        the first prompt by peer, and what `summary` returns, with perplexities added.

    Raises:
        PeerError: if a name is given twice, a server fails, or they count a prompt's tokens
            differently.
        ValueError: if this process may not use the cores.
    """
    names = [name for name, _ in models]
    if len(set(names)) < len(names):
        raise PeerError(f"a name is given twice: {', '.join(names)}; give each its own")
    cores = parse_cores(plan.cores)
    begun = origin()
    with ExitStack() as stack:
        peers = [stack.enter_context(running(name, path, cores, plan)) for name, path in models]
        prompt = _prompt(Workload(Distribution(str(plan.prompt_words))), 0)
        lengths = {peer.name: peer.prompt_tokens(prompt) for peer in peers}
        if len(set(lengths.values())) > 1:
            raise PeerError(
                f"the peers count the tokens of one prompt differently: {lengths}; give files of "
                "the same tokenizer"
            )
        os.sched_setaffinity(0, os.sched_getaffinity(0) - set(cores) or set(cores))
        begun_so_far = {**begun, "plan": asdict(plan), "prompt_tokens": lengths}

        def report(number: int, found: Mapping[str, Found]) -> None:
            so_far = summary(peers, found, plan.at_once)
            on_round({**begun_so_far, "num_rounds": number, **so_far})

        result = summary(peers, asyncio.run(measure(peers, plan, report)), plan.at_once)
        warn_of_others(result)
        for peer in peers:
            if blocks and peer.can_score:
                result["servers"][peer.name]["perplexity"] = perplexity(peer, blocks)
        served: dict[str, Any] = {}
        for peer in peers:
            if isinstance(peer, Server):
                served.update(served_at(peer.url))
    averages = [begun["machine"]["load_average"], os.getloadavg()[0]]
    return {
        **begun,
        "machine": {**begun["machine"], "load_average": averages},
        "num_launches": 1,
        "plan": asdict(plan),
        "cores": len(cores),
        "packages": files.PACKAGES,
        "libraries": {peer.name: peer.about for peer in peers if isinstance(peer, Process)},
        "models": files_of(models),
        "served": served,
        "prompt_tokens": lengths,
        **result,
    }


def running(
    name: str, model: Path, cores: Sequence[int], plan: Plan
) -> AbstractContextManager[Peer]:
    """Runs our server for a directory, or for a file the rival that its name asks for."""
    if model.is_file():
        return process.running(name, model, cores, plan.context, max(1, plan.at_once))
    return serving(name, model, cores, plan.context, plan.vllm_flags.split())


async def measure(
    peers: Sequence[Peer],
    plan: Plan,
    on_round: Callable[[int, Mapping[str, Found]], None] = lambda number, found: None,
) -> dict[str, Found]:
    """Measures each peer, by name; a first round warms up and is left out.

    Raises:
        PeerError: if a request fails.
    """
    rng = random.Random(plan.seed)
    found = {peer.name: Found() for peer in peers}
    pools = {peer.name: Pool(peer.url, {}) for peer in peers if isinstance(peer, Server)}
    for number in range(plan.rounds + 1):
        # Each prompt opens with a number of its own: no prefix of it was seen before.
        workload = Workload(
            Distribution(str(plan.prompt_words)), seed=number, run_number=rng.randrange(10**9)
        )
        prompts = [_prompt(workload, index) for index in range(plan.prompts + plan.at_once)]
        single, at_once = prompts[: plan.prompts], prompts[plan.prompts :]
        for peer in peers if number % 2 else peers[::-1]:
            pool = pools.get(peer.name)
            timings = [await _ask(peer, pool, prompt, plan.output_tokens) for prompt in single]
            tokens_per_s = 0.0
            if at_once:
                elapsed_s = await _ask_at_once(peer, pool, at_once, plan.output_tokens)
                tokens_per_s = len(at_once) * plan.output_tokens / elapsed_s
            if number > 0:
                found[peer.name].timings.append(timings)
                found[peer.name].tokens_per_s.append(tokens_per_s)
            tpot_ms = 1e3 * float(np.median(_sorted_s(timings, "tpot_s")))
            print(
                f"round {number}, {peer.name}: TPOT {tpot_ms:.2f} ms, "
                f"{tokens_per_s:.1f} tokens/s at once",
                file=sys.stderr,
            )
        if number > 0:
            on_round(number, found)
    for pool in pools.values():
        pool.close()
    return found


async def _ask(peer: Peer, pool: Pool | None, prompt: str, num_tokens: int) -> RequestTiming:
    if isinstance(peer, Process):
        return peer.ask(prompt, num_tokens)
    assert pool is not None
    return await peer.ask(pool, prompt, num_tokens)


async def _ask_at_once(
    peer: Peer, pool: Pool | None, prompts: Sequence[str], num_tokens: int
) -> float:
    if isinstance(peer, Process):
        return peer.ask_at_once(prompts, num_tokens)
    assert pool is not None
    return await peer.ask_at_once(pool, prompts, num_tokens)


def summary(peers: Sequence[Peer], found: Mapping[str, Found], at_once: int) -> dict[str, Any]:
    """Medians and memory of each peer, and how many times faster the last of our models is.

    With `at_once` they have tokens_per_s_{at_once}; llama.cpp's decode has its share of the cores.
    """
    ours = next((peer for peer in reversed(peers) if peer.is_ours), peers[0])
    result: dict[str, Any] = {"compared": ours.name, "servers": {}}
    for peer in peers:
        about: dict[str, Any] = {"title": peer.title, "weight_bytes": peer.weight_bytes}
        about["memory_bytes"] = memory_bytes(peer.pid)
        for name in ("ttft_s", "tpot_s"):
            theirs_s = [_sorted_s(timings, name) for timings in found[peer.name].timings]
            ours_s = [_sorted_s(timings, name) for timings in found[ours.name].timings]
            ratio = ratio_of_quantiles(theirs_s, ours_s, draws(len(theirs_s)), 0.5)
            about[f"{name[:4]}_ms"] = 1e3 * float(np.median(np.concatenate(theirs_s)))
            about[f"{name[:4]}_speedup"] = ratio.about()
        if at_once and all(found[peer.name].tokens_per_s):
            theirs = [np.array([value]) for value in found[peer.name].tokens_per_s]
            own = [np.array([value]) for value in found[ours.name].tokens_per_s]
            about[f"tokens_per_s_{at_once}"] = float(np.median(np.concatenate(theirs)))
            ratio = ratio_of_quantiles(own, theirs, draws(len(own)), 0.5)
            about["throughput_speedup"] = ratio.about()
        if isinstance(peer, Process) and peer.core_shares:
            about["core_share"] = float(np.median(peer.core_shares))
        result["servers"][peer.name] = about
    return result


def memory_bytes(pid: int) -> int:
    """What a process and its children hold now: pages that several share are divided among them."""
    process = psutil.Process(pid)
    own = [process, *process.children(recursive=True)]
    return sum(each.memory_full_info().pss for each in own)


def perplexity(peer: Peer, blocks: Sequence[Sequence[int]]) -> float:
    """Perplexity over the blocks, each by itself, its first token left out."""
    nats = 0.0
    for number, block in enumerate(blocks, 1):
        nats += peer.nats_of(block)
        print(f"perplexity, {peer.name}: {number} of {len(blocks)} blocks", file=sys.stderr)
    return math.exp(nats / sum(len(block) - 1 for block in blocks))


def warn_of_others(result: Mapping[str, Any]) -> None:
    """Prints a warning if llama.cpp's decode did not have the cores for itself."""
    servers = result["servers"].values()
    share = min((server["core_share"] for server in servers if "core_share" in server), default=1)
    if share < MIN_CORE_SHARE:
        print(
            f"benchmarks.peers: other processes used the cores: one peer had only {share:.0%} of "
            "them, so times are not comparable; stop the others and measure again",
            file=sys.stderr,
        )


def files_of(models: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """sha256 of each file of our models; of each GGUF file, sha256 and its weights by type."""
    found: dict[str, Any] = {}
    for name, path in models:
        if path.is_dir():
            found[name] = hashes_of(path)
        elif path.name not in found:
            by_type = files.weights_by_type(path)
            found[path.name] = {"sha256": sha256(path), "weights_by_type": by_type}
    return found


def _sorted_s(timings: Sequence[RequestTiming], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.sort(np.array([getattr(timing, name) for timing in timings], np.float64))


def _prompt(workload: Workload, index: int) -> str:
    """A prompt of random words."""
    prompt = workload.prompt(index)
    assert isinstance(prompt, str)  # a workload without ready prompts has no chats
    return prompt
