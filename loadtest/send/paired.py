"""A plan, a workload and a client -> blocks of outcomes, baseline and candidate in ABBA order.

Machines drift: they warm up, throttle and get busy. If one variant ran after the other, drift would
look like speed-up. So the run is cut into block pairs. Both blocks of a pair send the same prompts
by the same timetable, one to each variant, close together in time; the pair after it turns the
order round:

    pair        0                    1                    2  ...
    blocks   baseline candidate   candidate baseline   baseline candidate ...

A closed loop keeps `concurrency` requests in flight: the next one leaves when one comes back, so
its intended send time is the moment at which its place became free. In an open loop the timetable
says when a request leaves (schedule.py); when the server falls behind, nobody waits for it. Warm-up
is always a closed loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from loadtest.send.batch import Batch
from loadtest.send.client import Client, Outcome
from loadtest.send.processes import Processes
from loadtest.send.schedule import Schedule
from loadtest.send.workload import Workload

MAX_SLIP_S = 0.010
MAX_SLIP_SHARE = 0.05  # of the median TTFT, if that is more
MAX_CPU_SHARE = 0.9


@dataclass(frozen=True)
class Plan:
    """What to send; every default of the command line is written here.

    Attributes:
        baseline: name of the variant compared against.
        candidate: name of the variant that should be better.
        concurrency: requests in flight in a closed loop and in the warm-up.
        num_prompts: prompts in a block.
        num_block_pairs: block pairs; even, so that each variant goes first equally often.
        num_warmup: requests to each variant before anything is counted.
        output_tokens: tokens that every response must have.
    """

    baseline: str = "dense"
    candidate: str = "sparse"
    concurrency: int = 1
    num_prompts: int = 8
    num_block_pairs: int = 6
    num_warmup: int = 2
    output_tokens: int = 32

    def __post_init__(self) -> None:
        if self.baseline == self.candidate:
            raise ValueError(
                f"baseline and candidate are both {self.baseline!r}; to measure one model against "
                "itself, serve it under two names"
            )
        for name, value, least in (
            ("concurrency", self.concurrency, 1),
            ("num-prompts", self.num_prompts, self.concurrency),
            ("blocks", self.num_block_pairs, 2),
            ("warmup", self.num_warmup, 1),
            ("output-tokens", self.output_tokens, 2),
        ):
            if value < least:
                why = " to keep --concurrency busy" if name == "num-prompts" and least > 1 else ""
                raise ValueError(f"--{name} {value} is too small; give at least {least}{why}")
        if self.num_block_pairs % 2:
            raise ValueError(
                f"--blocks {self.num_block_pairs} is odd, so one variant would go first more "
                f"often; give {self.num_block_pairs + 1}"
            )

    @property
    def num_requests(self) -> int:
        """All requests of the run, warm-up included."""
        return 2 * (self.num_warmup + self.num_block_pairs * self.num_prompts)

    def block_order(self) -> list[tuple[int, str]]:
        """(block pair, variant) in the order in which the blocks run."""
        order = []
        for pair in range(self.num_block_pairs):
            both = (self.baseline, self.candidate)
            order += [(pair, variant) for variant in (both if pair % 2 == 0 else both[::-1])]
        return order


@dataclass(frozen=True)
class Block:
    """One variant's half of a block pair; times on the clock of the outcomes' time stamps."""

    block_pair: int
    variant: str
    started_s: float
    ended_s: float
    outcomes: tuple[Outcome, ...]


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
    def of(cls, blocks: Sequence[Block], cpu_s: Sequence[Sequence[float]]) -> "Harness":
        """Judges a run with blocks.

        Args:
            blocks: what was measured.
            cpu_s: for each block, the CPU time of each client process.
        """
        outcomes = [outcome for block in blocks for outcome in block.outcomes]
        slip_s = float(np.percentile([o.sent_s - o.intended_send_s for o in outcomes], 99))
        wall_s = sum(block.ended_s - block.started_s for block in blocks)
        cpu_share = float(np.sum(cpu_s, axis=0).max() / wall_s)
        ttfts_s = [o.timing.ttft_s for o in outcomes if o.timing and o.timing.ttft_s is not None]
        ttft_s = float(np.median(ttfts_s)) if ttfts_s else 0.0
        limit_s = max(MAX_SLIP_S, MAX_SLIP_SHARE * ttft_s)
        why = []
        if slip_s > limit_s:
            why.append(
                f"1 request in 100 left {1e3 * slip_s:.1f} ms late, limit {1e3 * limit_s:.1f}"
            )
        if cpu_share > MAX_CPU_SHARE:
            why.append(f"a client process used {cpu_share:.2f} of a core, limit {MAX_CPU_SHARE}")
        num_processes = len(cpu_s[0])
        remedy = f"; raise --processes above {num_processes}, lower the load, or free the machine"
        return cls(
            num_processes, slip_s, cpu_share, bool(why), " and ".join(why) + remedy if why else None
        )


@dataclass(frozen=True)
class PairedRun:
    """Everything that was sent. Without blocks, the warm-up failed and nothing was measured."""

    plan: Plan
    started_s: float
    warmup: tuple[Outcome, ...]
    blocks: tuple[Block, ...]
    harness: Harness
    schedule: str = Schedule.kind
    rate_per_s: float | None = None


def check_fit(plan: Plan, schedule: Schedule, num_processes: int) -> None:
    """Refuses what does not go together, before anything is sent.

    Raises:
        ValueError: if a trace is shorter than a block, or a client process would have no requests.
    """
    if schedule.kind == "trace" and len(schedule.trace_s) < plan.num_prompts:
        raise ValueError(
            f"--num-prompts {plan.num_prompts} is more than the {len(schedule.trace_s)} times of "
            f"the trace; give at most {len(schedule.trace_s)}"
        )
    most = plan.concurrency if schedule.kind == "closed" else plan.num_prompts
    if num_processes > most:
        option = "--concurrency" if schedule.kind == "closed" else "--num-prompts"
        raise ValueError(
            f"--processes {num_processes} is more than {option} {most}, so some would have nothing "
            f"to do; give at most {most}"
        )


async def run_paired(
    client: Client | Processes,
    plan: Plan,
    workload: Workload,
    on_response: Callable[[], None] = lambda: None,
    schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
) -> PairedRun:
    """Warms both variants up, then runs every block.

    Args:
        client: connected to the server that has both variants.
        plan: what to send.
        workload: where prompts come from; a block pair shares its prompts, no other does, and every
            block is a pass of its own.
        on_response: called after each request, for a progress bar.
        schedule: when requests leave.

    Raises:
        ValueError: if plan, schedule and client do not fit together.
    """
    check_fit(plan, schedule, client.num_processes)

    def batch(
        variant: str, indices: Sequence[int], pass_number: int, due_s: tuple[float, ...] | None
    ) -> Batch:
        prompts = tuple((index, workload.prompt(index, pass_number)) for index in indices)
        return Batch(variant, prompts, plan.output_tokens, plan.concurrency, due_s)

    numbers = count()
    indices = [next(numbers) for _ in range(plan.num_warmup)]
    warmups = [
        await client.send(batch(variant, indices, 0, None), on_response)
        for variant in (plan.baseline, plan.candidate)
    ]
    warmup = tuple(outcome for sent in warmups for outcome in sent.outcomes)
    started_s = warmups[0].started_s
    about = (schedule.kind, schedule.mean_rate_per_s)
    if any(outcome.error for outcome in warmup):
        idle = Harness(client.num_processes, 0.0, 0.0, False, None)
        return PairedRun(plan, started_s, warmup, (), idle, *about)

    pairs = [[next(numbers) for _ in range(plan.num_prompts)] for _ in range(plan.num_block_pairs)]
    blocks, cpu_s = [], []
    for pass_number, (pair, variant) in enumerate(plan.block_order(), start=1):
        due_s = schedule.times_s(plan.num_prompts, pair)
        sent = await client.send(batch(variant, pairs[pair], pass_number, due_s), on_response)
        ended_s = max(outcome.ended_s for outcome in sent.outcomes)
        blocks.append(Block(pair, variant, sent.started_s, ended_s, sent.outcomes))
        cpu_s.append(sent.cpu_s)
    return PairedRun(plan, started_s, warmup, tuple(blocks), Harness.of(blocks, cpu_s), *about)
