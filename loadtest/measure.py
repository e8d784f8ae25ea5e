"""Loads, and a server or directories to serve -> a record of each load.

With several launches of the servers every load is measured in each, and what was measured in all of
them becomes one record. Quality is measured first, and in the first launch only.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from cast_serve.questions import Question
from loadtest.quality import agreement, choices
from loadtest.record import Recorded, joined
from loadtest.send.client import Client, UnreachableError
from loadtest.send.launches import LaunchError, served
from loadtest.send.paired import run_paired, worst
from loadtest.send.processes import Processes
from loadtest.send.sweep import Load
from loadtest.send.workload import Prompt, Workload, new_run_number


@dataclass(frozen=True)
class Job:
    """What to measure, and where.

    Attributes:
        loads: at least one, of the same two variants.
        workload: where prompts come from; every run gets a number of its own.
        timeout_s: for one request.
        api_key: bearer token, or None.
        num_processes: client processes.
        quality_workload: where the prompts come from on which agreement is measured.
        num_quality_prompts: how many; 0: it is not measured.
        questions: on which accuracy is measured; none: it is not.
        url: of a server that has both variants; None: `models` are served.
        models: directory of each variant.
        num_launches: how often `models` are served.
        vllm_flags: for their vLLM servers.
    """

    loads: Sequence[Load]
    workload: Workload
    timeout_s: float
    api_key: str | None
    num_processes: int
    quality_workload: Workload
    num_quality_prompts: int
    questions: Sequence[Question]
    url: str | None
    models: Mapping[str, Path]
    num_launches: int
    vllm_flags: Sequence[str]


def measure(
    job: Job, provenance: Callable[[str, float], Mapping[str, Any]]
) -> Iterator[tuple[Load, Recorded]]:
    """Measures each load; it comes as soon as its last launch is done, or a later one fails or
    Ctrl-C ends it.

    Args:
        job: what and where.
        provenance: URL and the machine's load average before -> what run.json says about both.

    Raises:
        UnreachableError: if the server does not have both variants.
        LaunchError: if servers do not start.
    """
    runs: list[list[Recorded]] = [[] for _ in job.loads]
    said: list[Mapping[str, Any]] = [{} for _ in job.loads]
    abouts: list[dict[str, Any]] = [{} for _ in job.loads]
    try:
        for number in range(job.num_launches):
            server = served(job.models, number, job.vllm_flags)
            with server if job.url is None else nullcontext(job.url) as url:
                if number == 0:
                    agreements = asyncio.run(_agreements(job, url))
                    chosen = asyncio.run(_choices(job, url))
                for place, (load, launches) in enumerate(zip(job.loads, runs, strict=True)):
                    workload = replace(job.workload, run_number=new_run_number())
                    load_average = os.getloadavg()[0]
                    if launches:
                        load = replace(load, plan=replace(load.plan, **_settled(launches)["plan"]))
                    launches.append(asyncio.run(_run(job, url, load, workload)))
                    said[place] = said[place] or provenance(url, load_average)
                    abouts[place] = {
                        **_settled(launches),
                        **said[place],
                        "harness": worst([run.about["harness"] for run in launches]),
                        "workload": workload.about(),
                        "timeout_s": job.timeout_s,
                        "quality": agreements,
                        "quality_source": job.quality_workload.source if agreements else None,
                        "choices": chosen,
                    }
                    if number == job.num_launches - 1:
                        yield load, joined(launches, abouts[place])
    except (LaunchError, ChildProcessError, UnreachableError, KeyboardInterrupt):
        for load, launches, about in zip(job.loads, runs, abouts, strict=True):
            if job.num_launches > 1 and launches:  # what was measured before is not lost
                yield load, joined(launches, about)
        raise


def _settled(launches: Sequence[Recorded]) -> Mapping[str, Any]:
    """`about` of the first launch that was measured, which has settled the size of a block.

    If the warm-up failed in all of them, that of the first.
    """
    return next((run for run in launches if run.blocks), launches[0]).about


async def _run(job: Job, url: str, load: Load, workload: Workload) -> Recorded:
    plan = load.plan
    async with Client(url, timeout_s=job.timeout_s, api_key=job.api_key) as client:
        known = await client.variants()
    for variant in (plan.baseline, plan.candidate):
        if variant not in known:
            raise UnreachableError(
                f"variant {variant!r} is not served at {url}; it serves: {', '.join(known)}"
            )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(load.name or "requests", total=plan.num_requests)
        async with (
            Client(url, timeout_s=job.timeout_s, api_key=job.api_key)
            if job.num_processes == 1
            else Processes(job.num_processes, url, timeout_s=job.timeout_s, api_key=job.api_key)
        ) as sender:
            return await run_paired(
                sender,
                plan,
                workload,
                lambda: progress.advance(task),
                load.schedule,
                lambda sized: progress.update(task, total=sized.num_requests),
            )


async def _agreements(job: Job, url: str) -> list[dict[str, Any]] | None:
    if not job.num_quality_prompts:
        return None
    plan = job.loads[0].plan
    numbers = range(job.num_quality_prompts)
    prompts = [_text(job.quality_workload.prompt(number)) for number in numbers]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("quality", total=len(prompts))
        async with agreement.gateway(url, job.api_key, job.timeout_s) as compare:
            return await agreement.measure(
                compare,
                prompts,
                plan.baseline,
                plan.candidate,
                plan.output_tokens,
                lambda: progress.advance(task),
            )


async def _choices(job: Job, url: str) -> list[dict[str, Any]]:
    if not job.questions:
        return []
    plan = job.loads[0].plan
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = 2 * sum(len(question.choices) for question in job.questions)
        task = progress.add_task("choices", total=total)
        async with choices.server(url, job.api_key, job.timeout_s) as ask:
            return await choices.measure(
                ask, job.questions, plan.baseline, plan.candidate, lambda: progress.advance(task)
            )


def _text(prompt: Prompt) -> str:
    """A chat's messages as one text, which is all that /v1/compare takes."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in prompt)
