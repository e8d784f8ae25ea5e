"""Loads, and a server or directories to serve -> a record of each load, written as it is measured.

With several launches of the servers every load is measured in each, and what was measured in all of
them becomes one record. Quality is measured first, and in the first launch only.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from cast_serve.questions import Question
from loadtest.quality import agreement, choices
from loadtest.record import Recorder, Request
from loadtest.send.client import Client, UnreachableError
from loadtest.send.launches import LaunchError, served
from loadtest.send.paired import Plan, run_paired, worst
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
        choices_file: the questions' file.
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
    choices_file: Path | None
    url: str | None
    models: Mapping[str, Path]
    num_launches: int
    vllm_flags: Sequence[str]


def measure(
    job: Job,
    about: Mapping[str, Any],
    told_by: Callable[[str], Mapping[str, Any]],
    recorder_of: Callable[[Load, Mapping[str, Any]], Recorder],
) -> Iterator[Load]:
    """Measures each load; it comes as soon as its record is complete, or something ends the run.

    Args:
        job: what and where.
        about: what run.json says that is known before: the limits, and where the record is from.
        told_by: URL -> what run.json says of the server there.
        recorder_of: a load, and what its run.json says from the start -> what writes its record.

    Raises:
        UnreachableError: if the server does not have both variants.
        QualityError: if quality cannot be measured.
        LaunchError: if servers do not start.
        RecordError: if a record cannot be written.
    """
    loads = list(job.loads)
    recorders: list[Recorder] = []
    harnesses: list[list[Mapping[str, Any]]] = [[] for _ in loads]
    try:
        for number in range(job.num_launches):
            server = served(job.models, number, job.vllm_flags)
            with server if job.url is None else nullcontext(job.url) as url:
                asyncio.run(_check_served(job, url))
                if number == 0:
                    about = {**about, **told_by(url), **_quality(job, url)}
                for place, load in enumerate(loads):
                    if number == 0:
                        recorders.append(recorder_of(load, {**about, **_begun(job, about)}))
                    recorder = recorders[place]
                    recorder.begin_launch()
                    harness = asyncio.run(_run(job, url, load, recorder, harnesses[place]))
                    harnesses[place].append(harness)
                    # The first launch whose warm-up succeeds settles the size of a block.
                    loads[place] = replace(load, plan=Plan(**recorder.about["plan"]))
                    if number == job.num_launches - 1:
                        recorder.complete(_ended(recorder.about))
                        yield load
    except (LaunchError, ChildProcessError, UnreachableError, KeyboardInterrupt):
        for load, recorder in zip(loads, recorders, strict=False):
            if recorder.num_requests and not recorder.about["is_complete"]:
                yield load
        raise


def _ended(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the end of a load adds to its run.json."""
    averages = [*about["machine"]["load_average"], os.getloadavg()[0]]
    return {"machine": {**about["machine"], "load_average": averages}}


def _begun(job: Job, about: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of a load from its begin."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**about["machine"], "load_average": [os.getloadavg()[0]]},
        "num_launches": job.num_launches,
        "timeout_s": job.timeout_s,
    }


async def _check_served(job: Job, url: str) -> None:
    plan = job.loads[0].plan
    async with Client(url, timeout_s=job.timeout_s, api_key=job.api_key) as client:
        known = await client.variants()
    for variant in (plan.baseline, plan.candidate):
        if variant not in known:
            raise UnreachableError(
                f"variant {variant!r} is not served at {url}; it serves: {', '.join(known)}"
            )


async def _run(
    job: Job, url: str, load: Load, recorder: Recorder, earlier: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Measures a load in one launch; returns how the harness kept up, as in those before."""
    plan, workload = load.plan, replace(job.workload, run_number=new_run_number())

    def record(requests: Sequence[Request], sending: Mapping[str, Any]) -> None:
        harness = worst([*earlier, sending["harness"]])
        recorder.add(requests, {**sending, "harness": harness, "workload": workload.about()})

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(load.name or "requests", total=plan.num_requests)
        async with (
            Client(url, timeout_s=job.timeout_s, api_key=job.api_key)
            if job.num_processes == 1
            else Processes(job.num_processes, url, timeout_s=job.timeout_s, api_key=job.api_key)
        ) as sender:
            sent = await run_paired(
                sender,
                plan,
                workload,
                lambda: progress.advance(task),
                load.schedule,
                lambda sized: progress.update(task, total=sized.num_requests),
                record,
            )
    harness: Mapping[str, Any] = sent.about["harness"]
    return harness


def _quality(job: Job, url: str) -> dict[str, Any]:
    agreements = asyncio.run(_agreements(job, url))
    chosen = asyncio.run(_choices(job, url))
    return {
        "quality": agreements,
        "quality_source": job.quality_workload.source if agreements else None,
        "choices": choices.about(job.choices_file, chosen) if job.choices_file else None,
    }


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
