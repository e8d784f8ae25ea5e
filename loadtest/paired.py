"""A plan, a workload and a client -> blocks of outcomes, baseline and candidate in ABBA order.

Machines drift: they warm up, throttle and get busy. If one variant ran after the other, drift would
look like speed-up. So the run is cut into block pairs. Both blocks of a pair send the same prompts,
one to each variant, close together in time; the pair after it turns the order round:

    pair        0                    1                    2  ...
    blocks   baseline candidate   candidate baseline   baseline candidate ...

Each block is a closed loop: `concurrency` requests are in flight, and the next one leaves when one
comes back. Its intended send time is therefore the moment at which its place became free.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from loadtest.client import Client, Outcome
from loadtest.workload import Workload


@dataclass(frozen=True)
class Plan:
    """What to send; every default of the command line is written here.

    Attributes:
        baseline: name of the variant compared against.
        candidate: name of the variant that should be better.
        concurrency: requests in flight.
        num_prompts: prompts in a block.
        num_block_pairs: block pairs; even, so that each variant goes first equally often.
        num_warmup: requests to each variant before anything is counted.
        output_tokens: tokens that every response must have.
    """

    baseline: str = "dense"
    candidate: str = "sparse"
    concurrency: int = 1
    num_prompts: int = 8
    num_block_pairs: int = 4
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

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens of complete responses over the block's wall time."""
        return self.output_tokens / self.wall_s

    @property
    def output_tokens(self) -> int:
        """Tokens of complete responses."""
        return sum(o.timing.output_tokens or 0 for o in self.outcomes if o.timing)

    @property
    def wall_s(self) -> float:
        """First send to last response."""
        return self.ended_s - self.started_s


@dataclass(frozen=True)
class PairedRun:
    """Everything that was sent. Without blocks, the warm-up failed and nothing was measured."""

    plan: Plan
    started_s: float
    warmup: tuple[Outcome, ...]
    blocks: tuple[Block, ...]

    def unequal_lengths(self) -> list[Outcome]:
        """Measured responses whose length is not the one asked for: they compare unequal work."""
        return [
            outcome
            for block in self.blocks
            for outcome in block.outcomes
            if outcome.timing and outcome.timing.output_tokens != self.plan.output_tokens
        ]


async def run_paired(
    client: Client,
    plan: Plan,
    workload: Workload,
    on_response: Callable[[], None] = lambda: None,
) -> PairedRun:
    """Warms both variants up, then runs every block.

    Args:
        client: connected to the server that has both variants.
        plan: what to send.
        workload: where prompts come from; a block pair shares its prompts, no other does.
        on_response: called after each request, for a progress bar.
    """

    async def send(variant: str, prompt_indices: Sequence[int]) -> tuple[Outcome, ...]:
        outcomes: dict[int, Outcome] = {}
        waiting = iter(prompt_indices)

        async def place() -> None:
            for index in waiting:
                outcomes[index] = await client.complete(
                    variant, index, workload.prompt(index), plan.output_tokens
                )
                on_response()

        async with asyncio.TaskGroup() as places:
            for _ in range(plan.concurrency):
                places.create_task(place())
        return tuple(outcomes[index] for index in prompt_indices)

    started_s = time.perf_counter()
    numbers = count()
    warmup_indices = [next(numbers) for _ in range(plan.num_warmup)]
    warmup = await send(plan.baseline, warmup_indices) + await send(plan.candidate, warmup_indices)
    if any(outcome.error for outcome in warmup):
        return PairedRun(plan, started_s, warmup, ())

    prompt_indices = [
        [next(numbers) for _ in range(plan.num_prompts)] for _ in range(plan.num_block_pairs)
    ]
    blocks = []
    for pair, variant in plan.block_order():
        block_started_s = time.perf_counter()
        outcomes = await send(variant, prompt_indices[pair])
        blocks.append(Block(pair, variant, block_started_s, time.perf_counter(), outcomes))
    return PairedRun(plan, started_s, warmup, tuple(blocks))
