"""The flags of `cast-loadtest run` -> what to measure, checked before anything is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from cast_serve.options import option
from cast_serve.questions import Question, read_questions
from loadtest.errors import UsageError
from loadtest.judge.statistics import AT_EVERY_LOOK, MIN_BLOCK_PAIRS
from loadtest.judge.verdict import Guard
from loadtest.report.directory import check_out
from loadtest.send.distribution import lengths, numbers
from loadtest.send.launches import parse_variants
from loadtest.send.paired import Plan, check_fit
from loadtest.send.schedule import KINDS, Schedule
from loadtest.send.trace import Arrival, read_trace
from loadtest.send.workload import PACKAGED, Ready, Workload, read_prompts, read_words

MAX_MINUTES = 30.0  # of a load with --until


@dataclass(frozen=True)
class Options:
    """Every flag, with its help text."""

    url: Annotated[str | None, option("URL", "Server root, without /v1.", "none")] = None
    variant: Annotated[
        list[str] | None,
        option("NAME=DIR", "Both models, instead of --url: `cast-serve up` serves them.", "none"),
    ] = None
    launches: Annotated[
        int, option("N", "With --variant: number of launches; cores alternate.", min=1)
    ] = 1
    vllm_flags: Annotated[
        str,
        option("FLAGS", "With --variant: flags for both vLLM servers, as one argument.", "none"),
    ] = ""
    baseline: Annotated[str, option("NAME", "Variant to compare against.")] = Plan.baseline
    candidate: Annotated[str, option("NAME", "Variant expected to be better.")] = Plan.candidate
    concurrency: Annotated[
        str,
        option(
            "N,N", "Closed loop: requests, or conversations, at a time; 1,4,16 makes one run each."
        ),
    ] = str(Plan.concurrency)
    schedule: Annotated[str, option("NAME", f"When to send requests: {', '.join(KINDS)}.")] = (
        Schedule.kind
    )
    rate: Annotated[
        str | None,
        option("RATE,RATE", "Requests, or conversations, per second; 1,2,4: one run each.", "none"),
    ] = None
    rate_to: Annotated[
        float | None, option("RATE", "Ramp: rate at the end of a block.", "none")
    ] = None
    burst: Annotated[
        int | None,
        option("N", "Burst: requests sent at once, every BURST/RATE s.", "none"),
    ] = None
    trace: Annotated[
        Path | None,
        option("FILE", "Trace: times, and lengths if it has them (docs/loadtest.md).", "none"),
    ] = None
    processes: Annotated[
        int, option("N", "Client processes, if one cannot keep up with the load.", min=1)
    ] = 1
    num_prompts: Annotated[
        int | None, option("N", "Prompts, or conversations, per block.", "enough for --block-s")
    ] = None
    block_s: Annotated[float, option("SECONDS", "Duration of a block's load.")] = Plan.block_s
    blocks: Annotated[int, option("N", "Block pairs, in ABBA order; even.")] = Plan.num_block_pairs
    until: Annotated[
        str | None,
        option(
            "NAME", "certain: add block pairs until each speed limit of --guard is decided.", "none"
        ),
    ] = None
    max_minutes: Annotated[
        float | None,
        option("MINUTES", "With --until: add no block pairs after that.", f"{MAX_MINUTES:g}"),
    ] = None
    warmup: Annotated[int, option("N", "Uncounted requests to each variant first.")] = (
        Plan.num_warmup
    )
    output_tokens: Annotated[
        str,
        option(
            "LENGTH",
            "Tokens of an answer: 32, 16-256, lognormal:MEDIAN:SIGMA, or own: as --prompts has it.",
        ),
    ] = "32"
    until_eos: Annotated[
        bool, typer.Option("--until-eos", help="Answers may end before --output-tokens.")
    ] = False
    prompt_tokens: Annotated[
        str, option("LENGTH", "Tokens of a prompt, counted in words, as for --output-tokens.")
    ] = "128"
    turns: Annotated[
        str, option("N", "Turns of a conversation, as for --output-tokens; a chat if above 1.")
    ] = "1"
    think_s: Annotated[
        str, option("SECONDS", "Between an answer and the next turn, as for --output-tokens.")
    ] = "0"
    shared_prefix: Annotated[
        int, option("N", "Tokens, counted in words, with which all prompts of a group begin.")
    ] = Workload.prefix_words
    prefix_groups: Annotated[
        int, option("N", "Groups of prompts, each with a --shared-prefix of its own.")
    ] = Workload.prefix_groups
    text: Annotated[Path | None, option("FILE", "Text to cut prompts from.", "made-up prompts")] = (
        None
    )
    prompts: Annotated[
        str | None,
        option(
            "NAME",
            "Ready-made prompts: sharegpt, gsm8k, or a .jsonl of prompts or messages.",
            "none",
        ),
    ] = None
    seed: Annotated[int, option("N", "Same seed, same prompts and send times.")] = Workload.seed
    timeout_s: Annotated[float, option("SECONDS", "Time limit per request.")] = 120.0
    api_key: Annotated[
        str | None, option("KEY", "Bearer token.", "none", envvar="CAST_LOADTEST_API_KEY")
    ] = None
    guard: Annotated[
        Path | None, option("FILE", "TOML file of guard rails.", "no failure, not void")
    ] = None
    slo_ttft_ms: Annotated[
        float | None, option("MS", "Goodput: longest TTFT of a good request.", "none")
    ] = None
    slo_tpot_ms: Annotated[
        float | None, option("MS", "Goodput: longest TPOT of a good request.", "none")
    ] = None
    quality_prompts: Annotated[
        int,
        option(
            "N",
            "Prompts to measure agreement and KL on before the load: --prompts or --text, else "
            "ShareGPT (scripts/data).",
        ),
    ] = 0
    choices: Annotated[
        Path | None,
        option("FILE", "Questions to measure accuracy on before the load.", "none"),
    ] = None
    choices_limit: Annotated[int | None, option("N", "Ask only the first N questions.", "all")] = (
        None
    )
    same_model: Annotated[
        bool,
        typer.Option("--same-model", help="A/A: both names serve one model, so ratios must be 1."),
    ] = False
    out: Annotated[
        Path | None, option("DIR", "New folder for the record, result and reports.", "none")
    ] = None


@dataclass(frozen=True)
class Load:
    """One paired run of a sweep.

    Attributes:
        name: of its sub-directory; None when it is the only one.
        plan: what to send.
        schedule: when.
    """

    name: str | None
    plan: Plan
    schedule: Schedule

    def out(self, out: Path) -> Path:
        """Where it is written to: a sweep has a sub-directory for each load."""
        return out / self.name if self.name else out


@dataclass(frozen=True)
class Job:
    """What to measure, and where.

    Attributes:
        options: as given.
        loads: at least one, of the same two variants.
        workload: where prompts come from; every run gets a number of its own.
        quality_workload: where the prompts come from on which agreement is measured.
        questions: on which accuracy is measured; none: it is not.
        models: directory of each variant, to be served; empty with --url.
        terms: the limits that a run is judged by, as run.json has them.
    """

    options: Options
    loads: Sequence[Load]
    workload: Workload
    quality_workload: Workload
    questions: Sequence[Question]
    models: Mapping[str, Path]
    terms: Mapping[str, Any]

    @property
    def variants(self) -> tuple[str, str]:
        """Baseline, candidate."""
        return self.options.baseline, self.options.candidate

    @classmethod
    def of(cls, options: Options) -> "Job":
        """Reads the files that the options name.

        Raises:
            UsageError: if an option is wrong, has no effect, or does not go with another.
        """
        if (options.url is None) == (options.variant is None):
            raise UsageError("give either --url, or --variant NAME=DIR for both variants")
        if options.url is not None and (options.launches > 1 or options.vllm_flags):
            raise UsageError("--launches and --vllm-flags start servers; give --variant, not --url")
        loads = _loads(options)
        names = (options.baseline, options.candidate)
        models = parse_variants(options.variant, names) if options.variant else {}
        workload = _workload(options, loads[0].schedule.trace)
        if (options.num_prompts or options.trace) and options.block_s != Plan.block_s:
            raise UsageError(
                f"--block-s {options.block_s:g} has no effect where --num-prompts or --trace say "
                "how many prompts a block has; leave one of them out"
            )
        # Made-up words say nothing about quality: a model that reads them repeats itself.
        quality_workload = workload
        if options.quality_prompts > 0 and not (options.prompts or options.text):
            real = read_prompts(PACKAGED[0])
            quality_workload = replace(workload, prompts=real, source=PACKAGED[0])
        if options.timeout_s <= 0:
            raise UsageError(f"--timeout-s {options.timeout_s:g} is too small; give more than 0")
        if options.out is not None:
            check_out(options.out)
        terms, limit = _terms(options), options.choices_limit
        if options.choices is None and limit is not None:
            raise UsageError(f"--choices-limit {limit} has no effect without --choices; give both")
        if limit is not None and limit < 1:
            raise UsageError(f"--choices-limit {limit} is too small; give 1 or more")
        questions = read_questions(options.choices, limit) if options.choices else []
        return cls(options, loads, workload, quality_workload, questions, models, terms)


def _loads(options: Options) -> list[Load]:
    """One load for each concurrency, or for each rate."""
    places = [int(number) for number in _numbers("--concurrency", options.concurrency, int)]
    rates = [] if options.rate is None else _numbers("--rate", options.rate, float)
    if len(places) > 1 and (len(rates) > 1 or options.schedule != "closed"):
        raise UsageError(
            f"--concurrency {options.concurrency} is a sweep of closed loops; give one number, or "
            "leave out --schedule and --rate"
        )
    plan = Plan(
        baseline=options.baseline,
        candidate=options.candidate,
        concurrency=places[0],
        num_prompts=options.num_prompts,
        block_s=options.block_s,
        num_block_pairs=options.blocks,
        num_warmup=options.warmup,
    )
    schedule = Schedule(
        kind=options.schedule,
        rate_per_s=rates[0] if rates else None,
        rate_to_per_s=options.rate_to,
        burst=options.burst,
        trace=read_trace(options.trace) if options.trace else (),
        seed=options.seed,
    )
    loads = [Load(None, plan, schedule)]
    if len(places) > 1:
        loads = [
            Load(f"concurrency-{number}", replace(plan, concurrency=number), schedule)
            for number in places
        ]
    elif len(rates) > 1:
        loads = [Load(f"rate-{rate:g}", plan, replace(schedule, rate_per_s=rate)) for rate in rates]
    for load in loads:
        check_fit(load.plan, load.schedule, options.processes)
    return loads


def _numbers(flag: str, text: str, kind: type[int] | type[float]) -> list[float]:
    """Parses `4` or `1,4,16`."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(-inf < number < inf for number in found):
        of_whole = "whole " if kind is int else ""
        raise UsageError(f"{flag} {text} is not a list of {of_whole}numbers; write 4 or 1,4,16")
    if len(set(found)) < len(found):
        raise UsageError(f"{flag} {text} has a number twice; drop one")
    return list(found)


def _workload(options: Options, trace: Sequence[Arrival]) -> Workload:
    """Where prompts come from, and how long they and their answers are."""
    prompts = read_prompts(options.prompts) if options.prompts else ()
    turns = lengths("--turns", options.turns, 1)
    _check_ready(options, prompts)
    _check_trace(options, trace)
    own = options.output_tokens == "own"
    if own and not (prompts and all(ready.output_tokens for ready in prompts)):
        raise UsageError(
            "--output-tokens own needs --prompts FILE whose lines all have output_tokens; give "
            "such a file, or a number"
        )
    if turns.high == 1 and options.think_s != "0":
        raise UsageError(f"--think-s {options.think_s} has no effect with one turn; give --turns 2")
    for flag, value, least in (
        ("--shared-prefix", options.shared_prefix, 0),
        ("--prefix-groups", options.prefix_groups, 1),
    ):
        if value < least:
            raise UsageError(f"{flag} {value} is too small; give {least} or more")
    if options.prefix_groups > 1 and not options.shared_prefix:
        raise UsageError(
            f"--prefix-groups {options.prefix_groups} has no effect without --shared-prefix; give "
            "both"
        )
    return Workload(
        prompt_words=lengths("--prompt-tokens", options.prompt_tokens, 1),
        output_tokens=None if own else lengths("--output-tokens", options.output_tokens, 2),
        seed=options.seed,
        text=read_words(options.text) if options.text else (),
        prompts=prompts,
        turns=turns,
        think_s=numbers("--think-s", options.think_s),
        prefix_words=options.shared_prefix,
        prefix_groups=options.prefix_groups,
        until_eos=options.until_eos,
        trace=str(options.trace) if options.trace else None,
        has_own_lengths=_has_lengths(trace),
        source=str(options.prompts or options.text or Workload.source),
    )


def _check_ready(options: Options, prompts: Sequence[Ready]) -> None:
    """Refuses what ready prompts would not show."""
    if not prompts:
        return
    if options.prompt_tokens != Options.prompt_tokens:
        raise UsageError(
            f"--prompt-tokens {options.prompt_tokens} has no effect on the prompts of --prompts; "
            "leave one of them out"
        )
    is_chat = any(not isinstance(ready.prompt, str) for ready in prompts)
    for flag, is_given in (
        ("--turns", options.turns != "1"),
        ("--shared-prefix", options.shared_prefix),
    ):
        if is_chat and is_given:
            raise UsageError(
                f"{flag} needs prompts that are texts, but {options.prompts} has messages; give "
                "another file"
            )


def _check_trace(options: Options, trace: Sequence[Arrival]) -> None:
    """Refuses what a trace with lengths of its own has no room for."""
    if not _has_lengths(trace):
        return
    for flag, is_given in (
        ("--output-tokens", options.output_tokens != Options.output_tokens),
        ("--prompt-tokens", options.prompt_tokens != Options.prompt_tokens),
        ("--turns", options.turns != Options.turns),
        ("--shared-prefix", options.shared_prefix),
        ("--prompts", options.prompts),
        ("--text", options.text),
    ):
        if is_given:
            raise UsageError(
                f"{flag} has no effect: trace {options.trace} has lengths of its own, for made-up "
                "prompts; leave one of them out"
            )


def _has_lengths(trace: Sequence[Arrival]) -> bool:
    return bool(trace) and trace[0].prompt_tokens is not None


def _terms(options: Options) -> dict[str, Any]:
    """The limits, which must all be of something that is measured."""
    slo_ms = {"ttft_s": options.slo_ttft_ms, "tpot_s": options.slo_tpot_ms}
    for name, limit_ms in slo_ms.items():
        if limit_ms is not None and limit_ms <= 0:
            flag = f"--slo-{name.removesuffix('_s')}-ms"
            raise UsageError(f"{flag} {limit_ms:g} is too small; give more than 0")
    if options.quality_prompts < 0:
        raise UsageError(
            f"--quality-prompts {options.quality_prompts} is too small; give 0 or more"
        )
    limits = Guard() if options.guard is None else Guard.read(options.guard)
    speed = {**limits.min_speedup, **limits.max_slowdown}
    has_slo = slo_ms != dict.fromkeys(slo_ms)
    for name, limit, is_measured, flag in (
        (
            "min_token_agreement",
            limits.min_token_agreement,
            options.quality_prompts,
            "--quality-prompts",
        ),
        ("max_accuracy_loss", limits.max_accuracy_loss, options.choices, "--choices"),
        ("goodput", speed.get("goodput"), has_slo, "--slo-ttft-ms or --slo-tpot-ms"),
    ):
        if limit is not None and not is_measured:
            raise UsageError(
                f"guard {options.guard} limits {name}, but nothing measures it; give {flag}, or "
                "drop the limit"
            )
    _check_until(options, speed)
    _check_work(options, speed, has_slo)
    num_pairs = options.blocks * options.launches
    if speed and num_pairs < MIN_BLOCK_PAIRS:
        raise UsageError(
            f"guard {options.guard} limits {next(iter(speed))}, but {num_pairs} block pairs give "
            f"no interval; give --blocks {MIN_BLOCK_PAIRS} or more"
        )
    slo = {name: None if limit is None else limit / 1e3 for name, limit in slo_ms.items()}
    return {
        "guard": limits.about(),
        "slo": slo if has_slo else None,
        "is_aa": options.same_model,
        "until": options.until,
    }


def _check_work(options: Options, limits: Mapping[str, float], has_slo: bool) -> None:
    """Refuses limits on what compares different work, or is not defined."""
    has_turns = options.turns != Options.turns
    unequal = {"e2e", "throughput", "goodput"} | ({"ttft"} if has_turns else set())
    for name in limits:
        if options.until_eos and name.partition("_")[0] in unequal:
            what = "answers and histories" if has_turns else "answers"
            raise UsageError(
                f"guard {options.guard} limits {name}, but with --until-eos the variants' {what} "
                "have different lengths; limit tpot or itl, or leave out --until-eos"
            )
    if has_turns and options.schedule != "closed":
        for flag, is_given in (
            ("--schedule ramp", options.schedule == "ramp"),
            ("--slo-ttft-ms and --slo-tpot-ms", has_slo),
        ):
            if is_given:
                raise UsageError(
                    f"{flag} count requests by when they leave, but on a timetable only first "
                    "turns do; leave out --turns, or --schedule"
                )


def _check_until(options: Options, limits: Mapping[str, float]) -> None:
    """Refuses a run that nothing would end but its time, or whose time nothing asks for."""
    if options.until is None:
        if options.max_minutes is not None:
            raise UsageError(
                f"--max-minutes {options.max_minutes:g} has no effect without --until certain; "
                "give both"
            )
        return
    if options.until != "certain":
        raise UsageError(f"--until {options.until} is unknown; give certain")
    if options.max_minutes is not None and not 0 < options.max_minutes < inf:
        raise UsageError(
            f"--max-minutes {options.max_minutes:g} is out of range; give a number above 0"
        )
    if options.launches > 1:
        raise UsageError(
            f"--until certain adds block pairs to one launch, but --launches is {options.launches};"
            " leave one of them out"
        )
    if not limits:
        raise UsageError(
            "--until certain needs a limit to decide; give --guard with min_speedup or max_slowdown"
        )
    for name in limits:
        if name not in AT_EVERY_LOOK:
            raise UsageError(
                f"--until certain cannot decide {name} of guard {options.guard}, which has no "
                f"value for each block pair; limit one of {', '.join(AT_EVERY_LOOK)}, or leave "
                "out --until"
            )
