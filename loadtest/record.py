"""The requests of a paired run, and what is known about it -> two files, and back without loss.

run.json        what is not per request: plan, workload, schedule, harness, url, date, versions, and
                the limits that the run is judged by
requests.jsonl  one line a request; times in seconds from the run's start

What sends requests returns them in this form, and statistics, verdict and reports read a run only
in this form. So the two files are enough to compute everything again.

They are written during the run, block by block (`Recorder`), so a run that is stopped leaves a
record too: `is_complete` in run.json is then false, and only whole block pairs are read.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cast_serve.latency import RequestTiming
from loadtest.errors import RecordError, UsageError

FORMAT_VERSION = 1
RUN_FILE = "run.json"
REQUESTS_FILE = "requests.jsonl"


@dataclass(frozen=True)
class Request:
    """What became of one request; times in seconds, in a record from the run's start.

    As the client returns it, before it has a place in a run, times are those of time.perf_counter.

    Attributes:
        block: its block's place in the order run; None = warm-up.
        block_pair: the pair of blocks that shares its prompt; None = warm-up.
        variant: the name asked for.
        prompt_index: which prompt of the workload.
        error: error class; None for a complete response.
        prompt_tokens: as the server counted them; None if it did not.
        output_tokens: likewise; None for a failed request.
        intended_send_s: when it should have left.
        sent_s: when it left: was written to an open connection, or began to open one.
        token_events_s: arrival of each token event; empty for a failed request.
        last_s: when the output was complete; None for a failed request.
        ended_s: when the response was over, or had failed.
        launch: which launch of the servers it was sent to; 0 is the first.
        turn: its place in its conversation, from 0.
        asked_tokens: what the answer should have had, or at most; 0: not known.
    """

    block: int | None
    block_pair: int | None
    variant: str
    prompt_index: int
    error: str | None
    prompt_tokens: int | None
    output_tokens: int | None
    intended_send_s: float
    sent_s: float
    token_events_s: tuple[float, ...]
    last_s: float | None
    ended_s: float
    launch: int = 0
    turn: int = 0
    asked_tokens: int = 0

    @cached_property
    def timing(self) -> RequestTiming | None:
        """Its time stamps; None exactly if `error` is set."""
        if self.last_s is None:
            return None
        return RequestTiming(
            self.intended_send_s, self.token_events_s, self.last_s, self.output_tokens
        )

    def placed(self, block: int | None, block_pair: int | None, start_s: float) -> "Request":
        """The same request in a block, with times counted from `start_s`."""
        return replace(
            self,
            block=block,
            block_pair=block_pair,
            intended_send_s=self.intended_send_s - start_s,
            sent_s=self.sent_s - start_s,
            token_events_s=tuple(event_s - start_s for event_s in self.token_events_s),
            last_s=None if self.last_s is None else self.last_s - start_s,
            ended_s=self.ended_s - start_s,
        )


@dataclass(frozen=True)
class Block:
    """The requests that one variant got in its half of a block pair."""

    block_pair: int
    variant: str
    requests: tuple[Request, ...]

    @property
    def started_s(self) -> float:
        """First intended send."""
        return min(request.intended_send_s for request in self.requests)

    @property
    def launch(self) -> int:
        """Which launch of the servers it was sent to."""
        return self.requests[0].launch

    @property
    def wall_s(self) -> float:
        """First intended send to the end of the last request, failed ones included."""
        return max(request.ended_s for request in self.requests) - self.started_s

    @property
    def arrival_s(self) -> float:
        """First intended send to the last one; in an open loop, how long requests arrived."""
        return max(request.intended_send_s for request in self.requests) - self.started_s

    def output_tokens_until(self, end_s: float) -> float:
        """Tokens of complete responses that came up to then, on the record's clock.

        A token event may carry several tokens, so a response's tokens are spread evenly over them.
        """
        tokens = 0.0
        for request in self.requests:
            events_s = request.token_events_s
            if request.output_tokens and events_s:
                num_come = sum(event_s <= end_s for event_s in events_s)
                tokens += request.output_tokens * num_come / len(events_s)
        return tokens

    @property
    def output_tokens(self) -> int:
        """Tokens of complete responses."""
        return sum(request.output_tokens or 0 for request in self.requests)


@dataclass(frozen=True)
class Recorded:
    """A run.

    Attributes:
        about: what run.json holds.
        requests: in the order of requests.jsonl, warm-up included.
    """

    about: Mapping[str, Any]
    requests: tuple[Request, ...]

    @property
    def variants(self) -> tuple[str, str]:
        """Baseline, candidate."""
        return str(self.about["plan"]["baseline"]), str(self.about["plan"]["candidate"])

    @property
    def warmup(self) -> list[Request]:
        """Requests that were sent before anything was counted."""
        return [request for request in self.requests if request.block is None]

    @cached_property
    def blocks(self) -> list[Block]:
        """In the order run; empty if the warm-up failed."""
        grouped: dict[int, list[Request]] = {}
        for request in self.requests:
            if request.block is not None:
                grouped.setdefault(request.block, []).append(request)
        return [
            Block(found[0].block_pair or 0, found[0].variant, tuple(found))
            for _, found in sorted(grouped.items())
        ]

    def blocks_of(self, variant: str) -> list[Block]:
        """A variant's, in the order run."""
        return [block for block in self.blocks if block.variant == variant]

    @cached_property
    def pairs(self) -> list[tuple[Block, Block]]:
        """(baseline's block, candidate's block) of every block pair."""
        sides: dict[int, dict[str, Block]] = {}
        for block in self.blocks:
            sides.setdefault(block.block_pair, {})[block.variant] = block
        for number, both in sides.items():
            if len(both) < 2:
                raise UsageError(f"block pair {number} has only one block")
        baseline, candidate = self.variants
        return [(both[baseline], both[candidate]) for _, both in sorted(sides.items())]

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end; records of 2026-11-28 and before did."""
        return bool(self.about.get("is_complete", True))

    @property
    def num_planned_pairs(self) -> int:
        """Block pairs in all launches, had the run not been stopped."""
        if "num_launches" not in self.about:  # records of 2026-11-28 and before
            return len(self.pairs)
        return int(self.about["num_launches"] * self.about["plan"]["num_block_pairs"])

    def write(self, directory: Path) -> None:
        """Writes both files into a directory that exists."""
        self.write_about(directory)
        (directory / REQUESTS_FILE).write_text(lines_of(self.requests), encoding="utf-8")

    def write_about(self, directory: Path) -> None:
        """Writes run.json alone, in one step: a crash must not cost an old one."""
        partial = directory / f".{RUN_FILE}"
        about = json.dumps(self.about, indent=2, allow_nan=False)
        partial.write_text(about + "\n", encoding="utf-8")
        partial.replace(directory / RUN_FILE)

    @classmethod
    def read(cls, directory: Path) -> "Recorded":
        """Reads both files; of a run that was stopped, the block pairs that are whole.

        Raises:
            UsageError: if one is missing or does not hold what `write` puts there.
        """
        path = directory / RUN_FILE
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            version = about["format_version"]
            if version != FORMAT_VERSION:
                raise UsageError(f"format_version {version!r}, but only {FORMAT_VERSION} is known")
            asked, is_complete = cls(about, ()).variants, cls(about, ()).is_complete
            path = directory / REQUESTS_FILE
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            if not is_complete and lines and not lines[-1].endswith("\n"):
                del lines[-1]  # it was stopped while it wrote
            requests = [parsed(line, n, asked) for n, line in enumerate(lines, start=1)]
            if not is_complete:
                sent = Counter((r.block_pair, r.variant) for r in requests)
                requests = [
                    r
                    for r in requests
                    if r.block is None or len({sent[r.block_pair, v] for v in asked}) == 1
                ]
            # Records of 2026-11-30 and before ask all answers for the plan's number.
            same_tokens = about["plan"].get("output_tokens", 0)
            if not any(request.asked_tokens for request in requests):
                requests = [replace(request, asked_tokens=same_tokens) for request in requests]
            recorded = cls(about, tuple(requests))
            if is_complete and not recorded.pairs and not recorded.warmup:
                raise UsageError("it holds no requests")
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read: {error.strerror}; name a directory that "
                "`cast-loadtest run --out` made"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"{path} is not a record of a run: {reason}; run it again") from error
        return recorded


class Recorder:
    """A record that grows with its run.

    Numbers of blocks and block pairs continue from launch to launch, and so does the clock, without
    the time between launches.

    `directory` is made with what is added first; `about` is what run.json says from the start.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        self.directory = directory
        self.about: dict[str, Any] = {**about, "is_complete": False}
        self.num_requests = 0
        self._launch = -1
        self._first_block = self._first_pair = 0  # of this launch
        self._num_blocks = self._num_pairs = 0
        self._start_s = self._end_s = 0.0

    def begin_launch(self) -> None:
        """Counts what is added from now on as sent to the next launch of the servers."""
        self._launch += 1
        self._first_block, self._first_pair = self._num_blocks, self._num_pairs
        self._start_s = self._end_s

    def add(self, requests: Sequence[Request], about: Mapping[str, Any]) -> None:
        """Appends a warm-up or a block, with places and times in its launch.

        `about` is what run.json says from now on.

        Raises:
            RecordError: if they cannot be written.
        """
        placed = []
        for request in requests:
            block, pair = request.block, request.block_pair
            if block is not None and pair is not None:
                block, pair = block + self._first_block, pair + self._first_pair
                self._num_blocks = max(self._num_blocks, block + 1)
                self._num_pairs = max(self._num_pairs, pair + 1)
            later = replace(request.placed(block, pair, -self._start_s), launch=self._launch)
            self._end_s = max(self._end_s, later.ended_s)
            placed.append(later)
        self.num_requests += len(placed)
        self.about |= about
        self._write(placed)

    def complete(self, about: Mapping[str, Any]) -> None:
        """Marks the run as complete; otherwise as `add` without requests."""
        self.about |= {**about, "is_complete": True}
        self._write(())

    def discard_if_empty(self) -> None:
        """Removes a record that holds nothing, so that its directory can be used again."""
        if not (self.num_requests or self.about["quality"] or self.about["choices"]):
            for name in (RUN_FILE, REQUESTS_FILE):
                (self.directory / name).unlink(missing_ok=True)
            with suppress(OSError):  # not made yet
                self.directory.rmdir()

    def _write(self, requests: Sequence[Request]) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / REQUESTS_FILE).open("a", encoding="utf-8") as file:
                file.write(lines_of(requests))
            Recorded(self.about, ()).write_about(self.directory)
        except OSError as error:
            raise RecordError(
                f"{self.directory} could not be written: {error.strerror}; free some space, or "
                "name another place"
            ) from error


def lines_of(requests: Iterable[Request]) -> str:
    """Requests as requests.jsonl has them."""
    return "".join(json.dumps(asdict(each), allow_nan=False) + "\n" for each in requests)


def parsed(line: str, number: int, variants: Collection[str]) -> Request:
    """A line of `lines_of`, of one of the variants.

    Raises:
        UsageError: naming the line's number.
    """
    try:
        fields = json.loads(line)
        request = Request(**{**fields, "token_events_s": tuple(fields["token_events_s"])})
        if request.variant not in variants:
            raise UsageError(f"variant {request.variant!r} is not one of {', '.join(variants)}")
        if (request.timing is None) != (request.error is not None):
            raise UsageError("a request has either an error or a last_s")
    except KeyError as error:
        raise UsageError(f"line {number}: {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"line {number}: {error}") from None
    return request
