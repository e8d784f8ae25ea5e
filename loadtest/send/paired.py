"""A plan, a workload and a client -> a recorded run, baseline and candidate in ABBA order.

Machines drift: they warm up, throttle and get busy. If one variant ran after the other, drift would
look like speed-up. So the run is cut into block pairs. Both blocks of a pair send the same prompts
by the same timetable, one to each variant, close together in time; the next pair has the reverse
order:

    pair        0                    1                    2  ...
    blocks   baseline candidate   candidate baseline   baseline candidate ...

Several candidates share the baseline's block: baseline, one, other; other, one, baseline; ...

A closed loop keeps `concurrency` requests in flight: the next one leaves when one comes back, so
its intended send time is the moment at which its place became free. In an open loop the timetable
says when a request leaves (schedule.py), also when the server falls behind. Warm-up is always a
closed loop.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from loadtest.errors import UsageError
from loadtest.record import FORMAT_VERSION, Recorded, Request
from loadtest.send.batch import Batch
from loadtest.send.client import Client, Sent
from loadtest.send.processes import Processes
from loadtest.send.schedule import Schedule
from loadtest.send.workload import Workload

MAX_SLIP_S = 0.010
MAX_SLIP_SHARE = 0.05  # of the median TTFT, if that is more
MAX_CPU_SHARE = 0.9
MIN_PROMPTS = 8  # in a block whose size follows from its length in seconds


@dataclass(frozen=True)
class Plan:
    """What to send; every default of the command line is written here.

    Attributes:
        baseline: name of the variant compared against.
        candidate: name of the variant that should be better.
        others: more candidates, each of them compared with the same blocks of the baseline.
        concurrency: requests in flight in a closed loop and in the warm-up.
        num_prompts: conversations in a block; None: as many as `block_s` needs.
        block_s: seconds for which a block keeps up its load, by what the warm-up took.
        num_block_pairs: block pairs; even, so that each variant goes first equally often.
        num_warmup: conversations with each variant before anything is counted.
    """

    baseline: str = "dense"
    candidate: str = "sparse"
    others: tuple[str, ...] = ()
    concurrency: int = 1
    num_prompts: int | None = None
    block_s: float = 20.0
    num_block_pairs: int = 6
    num_warmup: int = 2

    def __post_init__(self) -> None:
        twice = [name for name, times in Counter(self.variants).items() if times > 1]
        if twice:
            raise UsageError(
                f"baseline and candidates have {twice[0]!r} twice; to measure one model against "
                "itself, serve it under two names"
            )
        num_prompts = self.concurrency if self.num_prompts is None else self.num_prompts
        for name, value, least in (
            ("concurrency", self.concurrency, 1),
            ("num-prompts", num_prompts, self.concurrency),
            ("blocks", self.num_block_pairs, 2),
            ("warmup", self.num_warmup, 1),
        ):
            if value < least:
                why = " to keep --concurrency busy" if name == "num-prompts" and least > 1 else ""
                raise UsageError(f"--{name} {value} is too small; give at least {least}{why}")
        if not 0 < self.block_s < math.inf:
            raise UsageError(f"--block-s {self.block_s:g} is out of range; give a number above 0")
        if self.num_block_pairs % 2:
            raise UsageError(
                f"--blocks {self.num_block_pairs} is odd, so one variant would go first more "
                f"often; give {self.num_block_pairs + 1}"
            )

    @property
    def variants(self) -> tuple[str, ...]:
        """Baseline, candidates."""
        return self.baseline, self.candidate, *self.others

    @property
    def num_conversations(self) -> int | None:
        """Of the run, warm-up included; None as long as a block has no size."""
        if self.num_prompts is None:
            return None
        return len(self.variants) * (self.num_warmup + self.num_block_pairs * self.num_prompts)

    def block_order(self) -> list[tuple[int, str]]:
        """(block pair, variant) in the order in which the blocks run."""
        order = []
        for pair in range(self.num_block_pairs):
            order += [(pair, variant) for variant in self.variants[:: -1 if pair % 2 else 1]]
        return order


@dataclass(frozen=True)
class Harness:
    """Whether the harness itself kept up, over all measured blocks.

    Attributes:
        num_processes: client processes.
        slip_p99_s: 99th percentile of how late requests left.
        cpu_share: CPU time over wall time of the busiest client process; 1 = one core.
        is_void: it did not keep up, so the run says as much about it as about the server.
        why: what was too much, and what helps; None if nothing was.
    """

    num_processes: int
    slip_p99_s: float
    cpu_share: float
    is_void: bool
    why: str | None

    @classmethod
    def of(cls, blocks: Sequence[Sent]) -> "Harness":
        """Judges a run by what was sent in its blocks, at least one."""
        requests = [request for block in blocks for request in block.requests]
        slips_s = [request.sent_s - request.intended_send_s for request in requests]
        slip_s = float(np.percentile(slips_s, 99))
        cpu_s = np.sum([block.cpu_s for block in blocks], axis=0)
        cpu_share = float(cpu_s.max() / sum(block.wall_s for block in blocks))
        timings = [request.timing for request in requests]
        ttfts_s = [timing.ttft_s for timing in timings if timing and timing.ttft_s is not None]
        ttft_s = float(np.median(ttfts_s)) if ttfts_s else 0.0
        limit_s = max(MAX_SLIP_S, MAX_SLIP_SHARE * ttft_s)
        why = []
        if slip_s > limit_s:
            why.append(
                f"1 request in 100 left {1e3 * slip_s:.1f} ms late, limit {1e3 * limit_s:.1f}"
            )
        if cpu_share > MAX_CPU_SHARE:
            why.append(f"a client process used {cpu_share:.2f} of a core, limit {MAX_CPU_SHARE}")
        remedy = f"; raise --processes above {len(cpu_s)}, lower the load, or free the machine"
        return cls(
            num_processes=len(cpu_s),
            slip_p99_s=slip_s,
            cpu_share=cpu_share,
            is_void=bool(why),
            why=" and ".join(why) + remedy if why else None,
        )


def part_of(
    candidate: str, requests: Sequence[Request], about: Mapping[str, Any]
) -> tuple[list[Request], dict[str, Any]]:
    """What compares one of several candidates with the baseline, as if no other had been measured.

    Takes and returns requests and what run.json says, as `on_sent` of `run_paired` has them; blocks
    keep their numbers, so those of the others are left out.
    """
    plan = about["plan"]
    others = [name for name in (plan["candidate"], *plan["others"]) if name != candidate]
    own = [request for request in requests if request.variant not in others]
    return own, {**about, "plan": {**plan, "candidate": candidate, "others": others}}


def worst(harnesses: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of several launches' `Harness` the one that kept up worst."""
    return max(harnesses, key=lambda one: (one["is_void"], one["slip_p99_s"]))


def check_fit(plan: Plan, schedule: Schedule, num_processes: int) -> None:
    """Refuses what does not go together, before anything is sent.

    Raises:
        UsageError: if a trace is shorter than a block, or a client process would have no requests.
    """
    num_prompts = plan.num_prompts
    if schedule.kind == "trace" and num_prompts and len(schedule.trace) < num_prompts:
        raise UsageError(
            f"--num-prompts {num_prompts} is more than the {len(schedule.trace)} times of "
            f"the trace; give at most {len(schedule.trace)}"
        )
    most = plan.concurrency if schedule.kind == "closed" else num_prompts
    if most is not None and num_processes > most:
        option = "--concurrency" if schedule.kind == "closed" else "--num-prompts"
        raise UsageError(
            f"--processes {num_processes} is more than {option} {most}, so some would be idle; "
            f"give at most {most}"
        )


def sized(plan: Plan, schedule: Schedule, warmups: Sequence[Sent]) -> Plan:
    """The plan with as many prompts as keep up a block's load for `block_s`.

    In a closed loop that follows from how long the faster variant's warm-up requests took.
    """
    if plan.num_prompts is not None:
        return plan
    if schedule.kind == "trace":
        return replace(plan, num_prompts=len(schedule.trace))
    if schedule.mean_rate_per_s is not None:
        num_prompts = plan.block_s * schedule.mean_rate_per_s
    else:
        num_prompts = plan.block_s * plan.concurrency / min(map(_usual_s, warmups))
    return replace(plan, num_prompts=max(math.ceil(num_prompts), MIN_PROMPTS, plan.concurrency))


def _usual_s(warmup: Sent) -> float:
    """How long a conversation takes, thinking included: the median of the later half.

    The earlier half may have filled caches.
    """
    spans: dict[int, tuple[float, float]] = {}
    for request in warmup.requests:
        begun_s, _ = spans.get(request.prompt_index, (request.intended_send_s, 0.0))
        spans[request.prompt_index] = begun_s, request.ended_s
    durations_s = [ended_s - begun_s for begun_s, ended_s in spans.values()]
    return float(np.median(durations_s[len(durations_s) // 2 :]))


async def run_paired(
    client: Client | Processes,
    plan: Plan,
    workload: Workload,
    on_response: Callable[[], None] = lambda: None,
    schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_sent: Callable[[Sequence[Request], Mapping[str, Any]], None] = lambda requests, about: None,
    goes_on: Callable[[], bool] = lambda: False,
) -> Recorded:
    """Warms all variants up, then runs every block; if a warm-up request fails, none.

    A block pair shares its prompts, no other does, and every block is a pass of its own.

    Args:
        client: connected to the server that has all variants.
        plan: what to send.
        workload: where prompts come from.
        on_response: called after each conversation.
        schedule: when requests leave.
        on_plan: called once the size of a block is known.
        on_sent: called with requests and what run.json says about the sending so far: before the
            first with none, then with those of the warm-up, and of each block when it is over.
        goes_on: asked once all blocks are over: whether to add two block pairs to the plan, after
            which it is asked again.

    Returns:
        All requests; `about` holds what run.json says about the sending: plan, schedule, rate and
        harness.

    Raises:
        UsageError: if plan, schedule and client do not fit together.
    """
    check_fit(plan, schedule, client.num_processes)

    def batch(
        variant: str, indices: Sequence[int], pass_number: int, due_s: tuple[float, ...] | None
    ) -> Batch:
        arrivals = schedule.trace or (None,)  # the warm-up may be longer than a trace
        conversations = tuple(
            workload.conversation(index, pass_number, arrivals[place % len(arrivals)])
            for place, index in enumerate(indices)
        )
        return Batch(variant, conversations, plan.concurrency, due_s, workload.until_eos)

    if plan.num_prompts is None:  # how long a request takes depends on how many are in flight
        plan = replace(plan, num_warmup=max(plan.num_warmup, plan.concurrency))
    if workload.prefix_words:  # each group's prefix is in the cache before anything is counted
        plan = replace(plan, num_warmup=max(plan.num_warmup, 2 * workload.prefix_groups))
    blocks: list[Sent] = []

    def about() -> dict[str, Any]:
        idle = Harness(client.num_processes, 0.0, 0.0, False, None)
        return {
            "format_version": FORMAT_VERSION,
            "plan": asdict(plan),
            "schedule": schedule.kind,
            "rate_per_s": schedule.mean_rate_per_s,
            "harness": asdict(Harness.of(blocks) if blocks else idle),
        }

    on_sent([], about())
    numbers = count()
    indices = [next(numbers) for _ in range(plan.num_warmup)]
    warmups = [
        await client.send(batch(variant, indices, 0, None), on_response)
        for variant in plan.variants
    ]
    start_s = warmups[0].started_s
    requests = [
        request.placed(None, None, start_s) for sent in warmups for request in sent.requests
    ]
    is_warm = not any(request.error for request in requests)
    if is_warm:
        plan = sized(plan, schedule, warmups)
        on_plan(plan)
    on_sent(requests, about())
    if is_warm:
        num_prompts = plan.num_prompts or 0
        pairs: list[list[int]] = []
        while len(blocks) < len(order := plan.block_order()):
            number = len(blocks)
            pair, variant = order[number]
            if pair == len(pairs):
                pairs.append([next(numbers) for _ in range(num_prompts)])
            due_s = schedule.times_s(num_prompts)
            sent = await client.send(batch(variant, pairs[pair], number + 1, due_s), on_response)
            in_block = [request.placed(number, pair, start_s) for request in sent.requests]
            requests += in_block
            blocks.append(sent)
            on_sent(in_block, about())
            if len(blocks) == len(order) and goes_on():
                plan = replace(plan, num_block_pairs=plan.num_block_pairs + 2)
                on_plan(plan)
    return Recorded(about(), tuple(requests))
