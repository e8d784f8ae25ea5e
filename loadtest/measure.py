"""Loads, and a server or directories to serve -> a record of each load, written as it is measured.

With several launches of the servers every load is measured in each, and what was measured in all of
them becomes one record. Quality is measured first, and in the first launch only.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.errors import LaunchError, UnreachableError
from loadtest.job import MAX_MINUTES, Job, Load
from loadtest.judge.verdict import is_open
from loadtest.progress import progress
from loadtest.provenance import acceptance_at, told_by
from loadtest.quality import agreement, choices
from loadtest.quality.ask import asking
from loadtest.record import Recorded, Recorder, Request
from loadtest.report.result import result_of
from loadtest.send.client import Client
from loadtest.send.launches import served
from loadtest.send.paired import Plan, part_of, run_paired, worst
from loadtest.send.processes import Processes
from loadtest.send.workload import Prompt, Workload, new_run_number


def measure(job: Job, about: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Measures each load: yields a record's directory when it is complete, or the run is ended.

    `about` is what is known before, for run.json: the limits, and where the record is from. Records
    are written into `folder`.

    Raises:
        UnreachableError: if the server does not have all variants.
        QualityError: if quality cannot be measured.
        LaunchError: if servers do not start.
        RecordError: if a record cannot be written.
    """
    options, loads, num_launches = job.options, list(job.loads), job.options.launches
    recorders: list[dict[str, Recorder]] = []  # by load, then by candidate
    harnesses: list[list[Mapping[str, Any]]] = [[] for _ in loads]
    folders = job.folders(folder)

    def every() -> list[Recorder]:
        return [recorder for own in recorders for recorder in own.values()]

    try:
        for number in range(num_launches):
            server = served(job.models, options.config, number, options.vllm_flags.split())
            with server if options.url is None else nullcontext(options.url) as url:
                asyncio.run(check_served(job, url))
                if number == 0:
                    about = {**about, **told_by(options.api_key, url)}
                    quality = {name: asyncio.run(_quality(job, url, name)) for name in folders}
                for place, load in enumerate(loads):
                    if number == 0:
                        begun = {**about, **_begun(job, about)}
                        recorders.append(
                            {
                                name: Recorder(out / (load.name or ""), {**begun, **quality[name]})
                                for name, out in folders.items()
                            }
                        )
                    own = recorders[place]
                    for recorder in own.values():
                        recorder.begin_launch()
                    harness, plan = asyncio.run(_run(job, url, load, own, harnesses[place]))
                    harnesses[place].append(harness)
                    # The first launch whose warm-up succeeds settles the size of a block.
                    loads[place] = replace(load, plan=plan)
                    if number == num_launches - 1:
                        accepted = {"draft_acceptance": acceptance_at(url, options.api_key)}
                        for recorder in own.values():
                            recorder.complete({**_ended(recorder.about), **accepted})
                            yield recorder.directory
    except (LaunchError, ChildProcessError, UnreachableError, KeyboardInterrupt):
        for recorder in every():
            if recorder.num_requests and not recorder.about["is_complete"]:
                yield recorder.directory
        raise
    finally:
        for recorder in every():
            recorder.discard_if_empty()


def _begun(job: Job, about: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of a load from its beginning."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**about["machine"], "load_average": [os.getloadavg()[0]]},
        "num_launches": job.options.launches,
        "timeout_s": job.options.timeout_s,
    }


def _ended(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the end of a load adds to its run.json."""
    averages = [*about["machine"]["load_average"], os.getloadavg()[0]]
    return {"machine": {**about["machine"], "load_average": averages}}


def sender_of(job: Job, url: str) -> Client | Processes:
    """What sends the job's load, from as many processes as it asks for."""
    options = job.options
    if options.processes == 1:
        return _client(job, url)
    return Processes(options.processes, url, timeout_s=options.timeout_s, api_key=options.api_key)


def _client(job: Job, url: str) -> Client:
    return Client(url, timeout_s=job.options.timeout_s, api_key=job.options.api_key)


async def check_served(job: Job, url: str) -> None:
    """Refuses a server without all variants.

    Raises:
        UnreachableError: as `Client.check_serves`.
    """
    async with _client(job, url) as client:
        await client.check_serves(job.variants)


async def _run(
    job: Job,
    url: str,
    load: Load,
    recorders: Mapping[str, Recorder],
    earlier: Sequence[Mapping[str, Any]],
) -> tuple[Mapping[str, Any], Plan]:
    """Measures a load in one launch; returns how the harness kept up, and the plan with its size.

    `recorders` by candidate; `earlier` is how it kept up in the launches before.
    """
    options, workload = job.options, replace(job.workload, run_number=new_run_number())

    def record(requests: Sequence[Request], sending: Mapping[str, Any]) -> None:
        harness = worst([*earlier, sending["harness"]])
        about = {**sending, "harness": harness, "workload": workload.about()}
        for name, recorder in recorders.items():
            recorder.add(*part_of(name, requests, about))

    began_s = time.monotonic()

    def goes_on() -> bool:
        most_s = 60 * (options.max_minutes or MAX_MINUTES)
        if options.until is None or time.monotonic() - began_s > most_s:
            return False
        read = [Recorded.read(recorder.directory) for recorder in recorders.values()]
        return any(
            is_open(result_of(Recorded({**one.about, "is_complete": True}, one.requests)))
            for one in read
        )

    sender = sender_of(job, url)
    with progress(load.name or "requests", load.plan.num_conversations) as (advance, resize):
        async with sender:
            sent = await run_paired(
                sender,
                load.plan,
                workload,
                advance,
                load.schedule,
                lambda sized: resize(sized.num_conversations),
                record,
                goes_on,
            )
    return sent.about["harness"], Plan(**sent.about["plan"])


async def _quality(job: Job, url: str, candidate: str) -> dict[str, Any]:
    options, agreements, chosen = job.options, None, None
    pair = (options.baseline, candidate)
    url, key, timeout_s = url.rstrip("/"), options.api_key, options.timeout_s
    if num := options.quality_prompts:
        prompts = [_text(job.quality_workload.prompt(number)) for number in range(num)]
        with progress("quality", num) as (advance, _):
            place, longest_s = url + agreement.PATH, agreement.NUM_ANSWERS * timeout_s
            async with asking(place, key, longest_s, agreement.REMEDY) as ask:
                agreements = await agreement.measure(
                    ask, prompts, *pair, _usual_tokens(job.workload), advance
                )
    if options.choices is not None:
        total = 2 * sum(len(question.choices) for question in job.questions)
        with progress("choices", total) as (advance, _):
            async with asking(url + choices.PATH, key, timeout_s, choices.REMEDY) as ask:
                each = await choices.measure(ask, job.questions, *pair, advance)
        chosen = choices.about(options.choices, each)
    source = job.quality_workload.source if agreements else None
    return {"quality": agreements, "quality_source": source, "choices": chosen}


def _usual_tokens(workload: Workload) -> int:
    """How many tokens answers have, to compare quality over as many."""
    if workload.output_tokens is None:
        return round(statistics.median(ready.output_tokens or 1 for ready in workload.prompts))
    return workload.output_tokens.middle


def _text(prompt: Prompt) -> str:
    """A chat's messages as one text, which is all that /v1/compare takes."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in prompt)
