"""A rival without a server -> a process that is asked by JSON lines.

The process runs llama_decode.py or openvino_decode.py in the environment of that library
(files.py), on the given cores with a thread each. A request is
    {"prompts": [TEXT, ...], "output_tokens": NUMBER}
for all of them at once, and its answer
    {"prompt_tokens": [NUMBER, ...], "times_s": [...]}
with the times at which tokens were known, from the call that reads the prompts; llama.cpp's has
"tokens" and "core_share" too, and answers {"blocks": [[TOKEN, ...], ...]} with {"nats": [...]}.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import files
from benchmarks.peers.names import PeerError, parse, title_of
from cast_serve.latency import RequestTiming


@dataclass(frozen=True)
class Process:
    """One model in a process of its own.

    Attributes:
        name: as in --peers.
        title: for people.
        weight_bytes: of the file.
        about: what the library says of its build and this CPU.
        process: reads and writes JSON lines.
        log: what it writes to stderr.
        core_shares: how much of its cores' time the process had, by request of one prompt.
        is_ours: no.
    """

    name: str
    title: str
    weight_bytes: int
    about: str
    process: "subprocess.Popen[str]"
    log: Path
    core_shares: list[float] = field(default_factory=list)
    is_ours: bool = False

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid

    @property
    def can_score(self) -> bool:
        """Whether it tells the log probabilities of a given text."""
        return parse(self.name)[1] != "openvino"

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens it takes the prompt for.

        Raises:
            PeerError: if the process ends.
        """
        return int(self.answer(prompts=[prompt], output_tokens=1)["prompt_tokens"][0])

    def ask(self, prompt: str, num_tokens: int) -> RequestTiming:
        """Writes exactly so many tokens; timed inside the process, from its reading of the prompt.

        Raises:
            PeerError: if the process ends.
        """
        answer = self.answer(prompts=[prompt], output_tokens=num_tokens)
        if "core_share" in answer:
            self.core_shares.append(answer["core_share"])
        times_s = tuple(answer["times_s"])
        return RequestTiming(0.0, times_s, times_s[-1], len(times_s))

    def ask_at_once(self, prompts: Sequence[str], num_tokens: int) -> float:
        """Writes exactly so many tokens for every prompt.

        Returns:
            Seconds until all were written.

        Raises:
            PeerError: if the process ends.
        """
        return float(self.answer(prompts=list(prompts), output_tokens=num_tokens)["times_s"][-1])

    def nats_of(self, block: Sequence[int]) -> float:
        """The negative log likelihood of a block of tokens, without its first.

        Raises:
            PeerError: if the process ends.
        """
        return float(self.answer(blocks=[list(block)])["nats"][0])

    def answer(self, **request: Any) -> dict[str, Any]:
        """One request's answer, as the module's docstring has them.

        Raises:
            PeerError: if the process ends.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # then nothing can be read either
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return _read_line(self.name, self.process, self.log)


@contextmanager
def running(
    name: str, model: Path, cores: Sequence[int], num_context: int, num_sequences: int = 1
) -> Iterator[Process]:
    """Runs a rival's own decode of a GGUF file.

    Args:
        name: the peer's, which says which and how.
        model: the file.
        cores: the CPUs that it may use, a thread each.
        num_context: tokens that a sequence may have, prompt and answer.
        num_sequences: most prompts at once.

    Raises:
        PeerError: if the process ends before the model is loaded.
    """
    log = files.WORK / f"{name}.log"
    way = parse(name)[1]
    library = "openvino" if way == "openvino" else "llama"
    script = Path(__file__).with_name(f"{library}_decode.py")
    words = ["taskset", "-c", ",".join(map(str, cores)), str(files.PYTHONS[library]), str(script)]
    words += [str(model), "--threads", str(len(cores))]
    if library == "llama":
        words += ["--context", str(num_context), "--sequences", str(num_sequences)]
        words += ["--flash-attention"] if way == "native+fa" else []
    files.show(words)
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
        )
    with process:
        try:
            about = str(_read_line(name, process, log)["about"])
            yield Process(name, title_of(name), model.stat().st_size, about, process, log)
        finally:
            process.terminate()
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # a request that a dead process did not take
                process.stdin.close()


def _read_line(name: str, process: "subprocess.Popen[str]", log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise PeerError(f"{name} ended with {process.wait()}; see {log}")
    return dict(json.loads(line))
