"""Limits and two variants -> `cast-loadtest capacity`: the arrival rate that each of them carries.

Both variants are measured in block pairs, in ABBA order, each at the rate where its own answer is
open (judge/capacity.py). The blocks of a pair share their prompts and, scaled by the rate, their
Poisson arrivals. A block begins with an idle server: the one before is over when all have answered.

--out holds `requests.jsonl`, record.py's lines, written block by block, `capacity.json`: settings,
origin, the rate of each block, and the figures that the command prints, and report.png. `--from`
computes the figures and draws the picture again.
"""

import asyncio
import inspect
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cast_serve.options import option
from loadtest.errors import FailedError, RecordError, UsageError
from loadtest.job import Job, Options, flag_of
from loadtest.judge import capacity as judge
from loadtest.judge.capacity import Posterior, Seen
from loadtest.judge.statistics import MIN_BLOCK_PAIRS, meets
from loadtest.measure import check_served, sender_of
from loadtest.progress import progress
from loadtest.provenance import given_in, provenance, told_by
from loadtest.record import REQUESTS_FILE, Request, lines_of, parsed
from loadtest.report import figures
from loadtest.report.commands import STOPPED, attempt, finish, refuse
from loadtest.report.directory import check_matplotlib
from loadtest.report.words import limits_of
from loadtest.send.batch import Batch
from loadtest.send.client import Client, Sent
from loadtest.send.paired import Harness
from loadtest.send.processes import Processes
from loadtest.send.schedule import Schedule
from loadtest.send.workload import new_run_number

CAPACITY_FILE = "capacity.json"
MIN_COUNTED = 75  # requests a block; the intervals were not simulated with fewer
TABLE_WIDTH = 100
# Options of `run`.
SHARED = ["url", "baseline", "candidate", "slo_ttft_ms", "slo_tpot_ms", "block_s", "blocks"]
SHARED += ["output_tokens", "until_eos", "prompt_tokens", "text", "prompts", "seed", "processes"]
SHARED += ["timeout_s", "api_key", "out"]
DEFAULTS: dict[str, Any] = {"block_s": 30.0, "blocks": 10}  # where they are not those of `run`


def capacity(
    context: typer.Context,
    good: Annotated[
        float, option("SHARE", "Requests that must meet every limit.", min=0.5, max=0.999)
    ] = 0.95,
    max_rate: Annotated[
        float | None, option("RATE", "Highest rate to try.", "1024 times the lowest")
    ] = None,
    again: Annotated[
        Path | None, option("DIR", "Compute the result of an --out again.", "none", "--from")
    ] = None,
    **shared: Any,
) -> None:
    """Find the highest request rate that each variant carries within latency limits.

    Requests arrive at random (Poisson); one that fails meets no limit. Exit code 0: done, 1: void,
    or requests failed whatever the rate, 2: wrong use.
    """
    given, failures, code = given_in(context), [], 1
    try:
        if again is not None:
            if idle := given - {"again"}:
                flag = flag_of(min(idle))
                raise UsageError(f"--from {again} sends nothing, so {flag} has no effect; drop it")
            check_matplotlib()
            record = Record.read(again)
        else:
            job = _job(given, max_rate, shared)
            asyncio.run(check_served(job, str(job.options.url)))
            record = Record(job.options.out, _about(context, job, good, max_rate))
    except UsageError as error:
        refuse(error)
    if again is None:
        try:
            with progress("blocks", 2 * job.options.blocks) as (advance, resize):
                asyncio.run(_measure(job, record, advance, resize))
            record.about["is_complete"] = True
        except (FailedError, ChildProcessError, KeyboardInterrupt) as error:
            failures.append(str(error) or "stopped")
            code = STOPPED if isinstance(error, KeyboardInterrupt) else 1
    result = result_of(record)
    show(record.about, result)
    unwritten = attempt(f"--out {record.out}", lambda: record.write({"result": result}))
    if (folder := again or record.out) is not None:
        unwritten += attempt(f"{folder}", lambda: draw(folder, record, result))
    printed = {k: v for k, v in record.about.items() if k not in ("blocks", "result")}
    finish({**printed, **result}, failures + result["failures"] + unwritten, code)


# Typer reads a command's flags from its signature.
_signature, _fields = inspect.signature(capacity), inspect.signature(Options).parameters
_shared = [
    _fields[name].replace(
        kind=inspect.Parameter.KEYWORD_ONLY,
        default=DEFAULTS.get(name, _fields[name].default),
    )
    for name in SHARED
]
capacity.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[*list(_signature.parameters.values())[:-1], *_shared]
)
capacity.__annotations__ |= {name: Options.__annotations__[name] for name in SHARED}


class Record:
    """What a run knows so far, in memory and, with `out`, on disk.

    Attributes:
        out: the folder; None: nothing is written.
        about: what capacity.json holds; `blocks` has an entry a block, in the order run.
        requests: in the order sent, warm-up included.
    """

    def __init__(self, out: Path | None, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.requests: list[Request] = []

    def add(self, requests: Sequence[Request], about: Mapping[str, Any]) -> None:
        """Appends a warm-up or a block; `about` is what capacity.json says from now on.

        Raises:
            RecordError: if they cannot be written.
        """
        self.requests += requests
        try:
            if self.out is not None:
                self.out.mkdir(parents=True, exist_ok=True)
                with (self.out / REQUESTS_FILE).open("a", encoding="utf-8") as file:
                    file.write(lines_of(requests))
            self.write(about)
        except OSError as error:
            raise RecordError(f"--out {self.out} cannot be written: {error}") from error

    def write(self, about: Mapping[str, Any]) -> None:
        """Writes capacity.json alone, in one step; nothing before there are requests."""
        self.about |= about
        if self.out is not None and self.requests:
            partial = self.out / f".{CAPACITY_FILE}"
            text = json.dumps(self.about, indent=2, allow_nan=False) + "\n"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.out / CAPACITY_FILE)

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Reads both files; of a run that was stopped while it wrote, what came before.

        Raises:
            UsageError: if the folder does not hold what `add` wrote.
        """
        try:
            record = cls(None, json.loads((folder / CAPACITY_FILE).read_text(encoding="utf-8")))
            lines = (folder / REQUESTS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
            whole = lines if lines[-1].endswith("\n") else lines[:-1]
            variants = record.about["variants"]
            record.requests = [parsed(line, n, variants) for n, line in enumerate(whole, start=1)]
            result_of(record)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(
                f"--from {folder} cannot be read: {error!r}; name a folder that `cast-loadtest "
                "capacity --out` made"
            ) from error
        return record

    def rates(self, variant: str) -> tuple[float, float]:
        """Lowest and highest rate to try."""
        return judge.rates_of(self.about["request_s"][variant], self.about["max_rate_per_s"])

    def seen(self, variant: str, in_search: bool = False) -> list[Seen]:
        """A variant's blocks of the search, or those in pairs."""
        in_block: dict[int | None, list[Request]] = {}
        for request in self.requests:
            in_block.setdefault(request.block, []).append(request)
        found = []
        for number, block in enumerate(self.about["blocks"]):
            if block["variant"] == variant and (block["block_pair"] is None) == in_search:
                sent, from_s = in_block[number], block["counted_from_s"]
                counted = [each for each in sent if each.intended_send_s >= from_s] or sent
                num_good = sum(meets(each, self.about["slo"]) for each in counted)
                found.append(Seen(block["rate_per_s"], num_good, len(counted)))
        return found

    def centre(self, variant: str) -> float:
        """Where the search puts a variant's capacity."""
        return judge.centre_of(self.seen(variant, in_search=True), self.about["good"])


def _job(given: set[str], max_rate: float | None, shared: Mapping[str, Any]) -> Job:
    """The options of a run with a closed loop, which checks them."""
    options = Options(**shared, concurrency=str(shared["processes"]))
    if options.url is None:
        raise UsageError("give --url of a server that has both variants, or --from")
    if "," in options.candidate:
        raise UsageError(f"--candidate {options.candidate} is several; give one")
    if max_rate is not None and not 0 < max_rate < math.inf:
        raise UsageError(f"--max-rate {max_rate:g} is out of range; give a number above 0")
    if options.blocks < MIN_BLOCK_PAIRS:
        raise UsageError(f"--blocks {options.blocks} is too small; give at least {MIN_BLOCK_PAIRS}")
    job = Job.of(options, given)
    if job.terms["slo"] is None:
        raise UsageError("every rate is within no limit; give --slo-ttft-ms or --slo-tpot-ms")
    return job


def _about(context: typer.Context, job: Job, good: float, max_rate: float | None) -> dict[str, Any]:
    return {
        **provenance(context, {}),
        **told_by(job.options.api_key, str(job.options.url)),
        "is_complete": False,
        "variants": list(job.variants),
        "slo": job.terms["slo"],
        "good": good,
        "max_rate_per_s": max_rate,
        "block_s": job.options.block_s,
        "num_planned_pairs": job.options.blocks,
        "timeout_s": job.options.timeout_s,
        "harness": None,
        "request_s": {},
        "blocks": [],
    }


class _Session:
    """Sends to a server, and records what it sends."""

    def __init__(self, sender: Client | Processes, job: Job, record: Record) -> None:
        self.num_prompts = 0  # so far; those of a pair count once
        self._sender, self._record, self._seed = sender, record, job.options.seed
        self._plan = job.loads[0].plan
        self._workload = replace(job.workload, run_number=new_run_number())
        self._start_s: float | None = None
        self._blocks: list[Sent] = []

    async def _send(
        self, variant: str, first: int, num: int, due_s: tuple[float, ...] | None = None
    ) -> Sent:
        """Sends `num` prompts from `first` on, and waits for all answers."""
        workload, pass_number = self._workload, 0 if due_s is None else 1 + len(self._blocks)
        conversations = tuple(workload.conversation(first + n, pass_number) for n in range(num))
        sent = await self._sender.send(
            Batch(variant, conversations, self._plan.concurrency, due_s, workload.until_eos)
        )
        self._start_s = sent.started_s if self._start_s is None else self._start_s
        self.num_prompts = max(self.num_prompts, first + num)
        return sent

    def _add(self, sent: Sent, pair: int | None, about: Mapping[str, Any]) -> None:
        """Records what was sent.

        Raises:
            FailedError: if a request of the warm-up failed, or all of a block and not for lack of
                time.
        """
        start_s, number = self._start_s or 0.0, len(self._blocks) - 1 if self._blocks else None
        requests = [request.placed(number, pair, start_s) for request in sent.requests]
        self._record.add(requests, about)
        errors = Counter(request.error for request in requests if request.error is not None)
        all_failed = errors.total() == len(requests) and set(errors) != {"timeout"}
        if errors and (number is None or all_failed):
            classes = ", ".join(f"{num} {name}" for name, num in errors.items())
            where = "the warm-up" if number is None else f"block {number}"
            raise FailedError(
                f"{requests[0].variant}: of {len(requests)} requests in {where} failed: {classes}; "
                "see the server's log"
            )

    async def warm_up(self, variant: str) -> None:
        """Sends a few requests, and records how long one takes."""
        num = max(self._plan.num_warmup, self._plan.concurrency)
        sent = await self._send(variant, 0, num)
        times_s = [request.timing.e2e_s for request in sent.requests if request.timing]
        request_s = float(np.median(times_s)) if times_s else None
        about = {
            "request_s": {**self._record.about["request_s"], variant: request_s},
            "workload": self._workload.about(),
        }
        self._add(sent, None, about)

    async def block(
        self, variant: str, rate: float, seconds: float, first: int, pair: int | None = None
    ) -> None:
        """Sends for so many seconds; the number of its first prompt settles the arrivals."""
        usual = rate * seconds
        schedule = Schedule("poisson", rate, seed=(self._seed << 32) + first)
        due_s = schedule.times_s(math.ceil(usual + 6 * math.sqrt(usual)) + 10) or ()
        num = sum(time_s < seconds for time_s in due_s)
        num = max(num, judge.MIN_REQUESTS, self._sender.num_processes)
        sent = await self._send(variant, first, num, due_s[:num])
        self._blocks.append(sent)
        block = {
            "variant": variant,
            "block_pair": pair,
            "rate_per_s": rate,
            "counted_from_s": sent.started_s - (self._start_s or 0.0) + judge.FILL_SHARE * seconds,
        }
        blocks = [*self._record.about["blocks"], block]
        about = {"blocks": blocks, "harness": asdict(Harness.of(self._blocks))}
        self._add(sent, pair, about)


async def _measure(
    job: Job, record: Record, advance: Callable[[], None], resize: Callable[[int | None], None]
) -> None:
    """Warms up, searches and measures."""
    options, good = job.options, record.about["good"]
    sender = sender_of(job, str(options.url))
    search_s, num_blocks = options.block_s * judge.SEARCH_SHARE, 2 * options.blocks
    async with sender:
        session = _Session(sender, job, record)
        for variant in job.variants:
            await session.warm_up(variant)
        rates = {variant: record.rates(variant) for variant in job.variants}
        search = [rate for both in rates.values() for rate in judge.longest_search(both)]
        searching_s = sum(max(search_s, judge.MIN_REQUESTS / rate) for rate in search)
        minutes = (searching_s + num_blocks * options.block_s) / 60
        print(
            f"cast-loadtest: at most {len(search)} blocks of {search_s:.3g} s to search and "
            f"{num_blocks} of {options.block_s:g} s to measure: {minutes:.1f} minutes, or up to "
            "twice as long if the server falls behind; Ctrl-C keeps what is measured",
            file=sys.stderr,
        )
        for variant in job.variants:
            while True:
                seen = record.seen(variant, in_search=True)
                if (rate := judge.search_rate(seen, rates[variant], good)) is None:
                    break
                num_blocks += 1
                resize(num_blocks)
                await session.block(variant, rate, search_s, session.num_prompts)
                advance()
        first = session.num_prompts
        for number, (pair, variant) in enumerate(job.loads[0].plan.block_order()):
            if number % 2 == 0:  # the other block of a pair has the same prompts
                first = session.num_prompts
            seen, centre = record.seen(variant), record.centre(variant)
            rate = judge.next_rate(seen, centre, rates[variant], good)
            await session.block(variant, rate, options.block_s, first, pair)
            advance()


def result_of(record: Record) -> dict[str, Any]:
    """The figures that follow from a record.

    Returns:
        `variants`: by name the capacity in requests a second with its 95 % interval, or only `low`
        if the highest rate was good and only `high` if the lowest was not; the measured blocks
        next below and above it, and errors. `ratio`: the candidate's over the baseline's.
        `warnings`, and `failures`: why the figures mean nothing. Below MIN_BLOCK_PAIRS there are
        no capacities.
    """
    about, harness = record.about, record.about["harness"]
    failures = [f"VOID: {harness['why']}"] if harness and harness["is_void"] else []
    seen = {name: record.seen(name) for name in about["variants"]}
    num_pairs = min(map(len, seen.values()))
    rate_of = attrgetter("rate_per_s")
    variants, warnings, posteriors = {}, [], []
    for name, blocks in seen.items():
        value = low = high = None
        if num_pairs >= MIN_BLOCK_PAIRS:
            posteriors.append(Posterior(blocks[:num_pairs], record.centre(name), about["good"]))
            value, low, high = judge.capacity(posteriors[-1], record.rates(name))
        near = value or low or high or 0.0
        below = [block for block in blocks if block.rate_per_s <= near]
        above = [block for block in blocks if block.rate_per_s > near]
        requests = [r for r in record.requests if r.variant == name and r.block is not None]
        errors = Counter(request.error for request in requests if request.error is not None)
        variants[name] = {
            "capacity_per_s": value,
            "low": low,
            "high": high,
            "block_below": asdict(max(below, key=rate_of)) if below else None,
            "block_above": asdict(min(above, key=rate_of)) if above else None,
            "num_requests": len(requests),
            "errors": dict(errors),
        }
        num = float(np.median([block.num for block in blocks])) if blocks else math.inf
        if num < MIN_COUNTED:
            warnings.append(
                f"a block of {name} counts {num:g} requests, and intervals are only tested with "
                f"{MIN_COUNTED} or more; give --block-s "
                f"{math.ceil(about['block_s'] * MIN_COUNTED / num)}"
            )
        num_bad = sum(not meets(request, about["slo"]) for request in requests)
        if value is low is None and high is not None and errors.total() > num_bad / 2:
            failures.append(f"{name} failed at every rate: {dict(errors)}; see the server's log")
    ratio = None
    if all(found["capacity_per_s"] is not None for found in variants.values()):
        value, low, high = judge.ratio(posteriors[1], posteriors[0])
        ratio = {"ratio": value, "low": low, "high": high}
    return {
        "variants": variants,
        "ratio": ratio,
        "num_block_pairs": num_pairs,
        "warnings": warnings,
        "failures": failures,
    }


def show(about: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Prints a result for people."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    table = Table(title=f"{about['good']:.4g} of the requests within {limits_of(about['slo'])}")
    for column in ("variant", "requests/s", "95 % interval", "below", "above", "failed"):
        table.add_column(column)
    for name, found in result["variants"].items():
        value, low, high = found["capacity_per_s"], found["low"], found["high"]
        near = [found["block_below"], found["block_above"]]
        table.add_row(
            name,
            f"{value:.3g}" if value else f"at least {low:.3g}" if low else f"below {high or 0:.3g}",
            f"{low:.3g} to {high:.3g}" if value else "-",
            *(
                f"{b['num_good'] / b['num']:.1%} at {b['rate_per_s']:.3g}" if b else "-"
                for b in near
            ),
            f"{sum(found['errors'].values())} of {found['num_requests']}",
        )
    if result["num_block_pairs"] >= MIN_BLOCK_PAIRS:
        console.print(table)
    if result["ratio"] is not None:
        baseline, candidate = about["variants"]
        ratio, low, high = result["ratio"].values()
        text = f"{candidate} / {baseline}: {ratio:.3f} ({low:.3f} to {high:.3f})"
        console.print(text, markup=False, highlight=False)
    for text in result["warnings"]:
        console.print(f"warning: {text}", style="bold red", markup=False, highlight=False)


def draw(folder: Path, record: Record, result: Mapping[str, Any]) -> None:
    """Draws report.png, once there are enough blocks for figures."""
    if result["num_block_pairs"] < MIN_BLOCK_PAIRS:
        return
    blocks = {
        name: [
            (block.rate_per_s, block.num_good / block.num)
            for block in [*record.seen(name, in_search=True), *record.seen(name)]
        ]
        for name in result["variants"]
    }
    figures.write_capacity_png(folder / "report.png", record.about, result["variants"], blocks)
