"""The flags of `cast-loadtest run` -> what to measure, checked before anything is sent."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from cast_serve.guard import Guard
from cast_serve.options import option
from cast_serve.questions import Question, read_questions
from loadtest.errors import UsageError
from loadtest.judge.statistics import AT_EVERY_LOOK, MIN_BLOCK_PAIRS
from loadtest.report.directory import check_out
from loadtest.send.distribution import lengths, numbers
from loadtest.send.launches import parse_variants, read_config
from loadtest.send.paired import Plan, check_fit
from loadtest.send.schedule import KINDS, Schedule
from loadtest.send.trace import read_trace
from loadtest.send.workload import PACKAGED, Workload, read_prompts, read_words

MAX_MINUTES = 30.0  # of a load with --until


@dataclass(frozen=True)
class Options:
    """Every flag, with its help text."""

    url: Annotated[str | None, option("URL", "Server root, without /v1.", "none")] = None
    variant: Annotated[
        list[str] | None,
        option("NAME=DIR", "All models, instead of --url: `cast-serve up` serves them.", "none"),
    ] = None
    config: Annotated[
        Path | None,
        option(
            "FILE", "Instead of --variant: for `cast-serve up --config` (docs/serving.md).", "none"
        ),
    ] = None
    launches: Annotated[
        int, option("N", "Launches of the servers; with --variant their cores alternate.", min=1)
    ] = 1
    vllm_flags: Annotated[
        str, option("FLAGS", "For the vLLM servers that it launches, as one argument.", "none")
    ] = ""
    baseline: Annotated[str, option("NAME", "Variant to compare against.")] = Plan.baseline
    candidate: Annotated[
        str,
        option("NAME,NAME", "Variant expected to be better; several: each against the baseline."),
    ] = Plan.candidate
    concurrency: Annotated[
        str,
        option("N,N", "Closed loop: requests, or conversations, at a time; 1,4,16: one run each."),
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
        int | None, option("N", "Burst: requests sent at once, every BURST/RATE s.", "none")
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
            "LENGTH", "Per answer: 32, 16-256, lognormal:MEDIAN:SIGMA, or own (from --prompts)."
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
        option("NAME", "Ready-made: sharegpt, gsm8k, or a .jsonl of prompts or messages.", "none"),
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
        option("N", "Prompts to measure agreement and KL on: --prompts or --text, else ShareGPT."),
    ] = 0
    choices: Annotated[
        Path | None, option("FILE", "Questions to measure accuracy on before the load.", "none")
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


@dataclass(frozen=True)
class Job:
    """What to measure, and where.

    Attributes:
        options: as given.
        loads: at least one, of the same variants.
        workload: where prompts come from; every run gets a number of its own.
        quality_workload: where the prompts come from on which agreement is measured.
        questions: on which accuracy is measured; none: it is not.
        models: directory of each variant, to be served; empty with --url and --config.
        terms: the limits that a run is judged by, and --config's variants, as run.json has them.
    """

    options: Options
    loads: Sequence[Load]
    workload: Workload
    quality_workload: Workload
    questions: Sequence[Question]
    models: Mapping[str, Path]
    terms: Mapping[str, Any]

    @property
    def variants(self) -> tuple[str, ...]:
        """Baseline, candidates."""
        return self.loads[0].plan.variants

    def folders(self, out: Path) -> dict[str, Path]:
        """By candidate: where its run or sweep is written; several have sub-directories."""
        _, *names = self.variants
        return {name: out / quote(name, safe="") if names[1:] else out for name in names}

    @classmethod
    def of(cls, options: Options, given: Collection[str]) -> "Job":
        """Reads the files that the options name.

        Args:
            options: with their defaults.
            given: names of those on the command line, even if their values are the defaults.

        Raises:
            UsageError: if an option is wrong, has no effect, or does not go with another.
        """
        if [options.url, options.variant, options.config].count(None) != 2:
            raise UsageError(
                "give one of --url, --variant NAME=DIR for each variant, and --config FILE"
            )
        _check_ranges(options)
        loads = _loads(options)
        has_own_lengths = loads[0].schedule.has_lengths
        _check_effects(options, given, has_own_lengths)
        names = loads[0].plan.variants
        models = parse_variants(options.variant, names) if options.variant else {}
        workload = quality_workload = _workload(options, has_own_lengths)
        # Made-up words say nothing about quality: a model that reads them repeats itself.
        if options.quality_prompts and not (options.prompts or options.text):
            real = read_prompts(PACKAGED[0])
            quality_workload = replace(workload, prompts=real, source=PACKAGED[0])
        if options.out is not None:
            check_out(options.out)
        terms = _terms(options, has_turns=workload.turns.high > 1)
        if options.config is not None:
            terms["servers"] = read_config(options.config, names)
        questions = (
            read_questions(options.choices, options.choices_limit) if options.choices else []
        )
        return cls(options, loads, workload, quality_workload, questions, models, terms)


def flag_of(name: str, value: object = "") -> str:
    """An option as a user writes it."""
    text = f"{value:g}" if isinstance(value, float) else value
    return f"--{name.replace('_', '-')} {text}".rstrip()


def _check_ranges(options: Options) -> None:
    """Refuses numbers that nothing else checks."""
    for name in ("timeout_s", "slo_ttft_ms", "slo_tpot_ms", "max_minutes"):
        value = getattr(options, name)
        if value is not None and not 0 < value < inf:
            raise UsageError(f"{flag_of(name, value)} is out of range; give a number above 0")
    least = {"shared_prefix": 0, "prefix_groups": 1, "quality_prompts": 0, "choices_limit": 1}
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            raise UsageError(f"{flag_of(name, value)} is too small; give {limit} or more")


def _check_effects(options: Options, given: Collection[str], has_own_lengths: bool) -> None:
    """Refuses a flag that another one, given or missing, leaves without effect."""
    is_sized = options.num_prompts or options.trace
    is_chat = lengths("--turns", options.turns, 1).high > 1
    on_trace = f"on trace {options.trace}, which has lengths of its own; leave one of them out"
    for names, is_idle, why in (
        ("launches vllm_flags", options.url, "on the servers at --url; have them launched instead"),
        ("block_s", is_sized, "where --num-prompts or --trace size a block; leave one of them out"),
        ("output_tokens prompt_tokens turns shared_prefix", has_own_lengths, on_trace),
        ("prompts text", has_own_lengths, on_trace),
        ("prompt_tokens", options.prompts, "on the prompts of --prompts; leave one of them out"),
        ("think_s", not is_chat, "with one turn; give --turns 2"),
        ("prefix_groups", not options.shared_prefix, "without --shared-prefix; give both"),
        ("choices_limit", not options.choices, "without --choices; give both"),
        ("max_minutes", not options.until, "without --until certain; give both"),
    ):
        for name in names.split():
            if is_idle and name in given:
                raise UsageError(f"{flag_of(name, getattr(options, name))} has no effect {why}")


def _loads(options: Options) -> list[Load]:
    """One load for each concurrency, or for each rate."""
    places = _numbers("--concurrency", options.concurrency, int)
    rates = [None] if options.rate is None else _numbers("--rate", options.rate, float)
    if len(places) > 1 and (len(rates) > 1 or options.schedule != "closed"):
        raise UsageError(
            f"--concurrency {options.concurrency} is a sweep of closed loops; give one number, or "
            "leave out --schedule and --rate"
        )
    candidate, *others = options.candidate.split(",")
    trace = read_trace(options.trace) if options.trace else ()
    loads = []
    for place, rate in product(places, rates):
        name = f"rate-{rate:g}" if len(rates) > 1 else None
        plan = Plan(
            baseline=options.baseline,
            candidate=candidate,
            others=tuple(others),
            concurrency=place,
            num_prompts=options.num_prompts,
            block_s=options.block_s,
            num_block_pairs=options.blocks,
            num_warmup=options.warmup,
        )
        schedule = Schedule(
            options.schedule, rate, options.rate_to, options.burst, trace, options.seed
        )
        check_fit(plan, schedule, options.processes)
        loads.append(Load(f"concurrency-{place}" if len(places) > 1 else name, plan, schedule))
    return loads


def _numbers(flag: str, text: str, kind: type[int] | type[float]) -> list[Any]:
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
    return found


def _workload(options: Options, has_own_lengths: bool) -> Workload:
    """Where prompts come from, and how long they and their answers are."""
    is_own = options.output_tokens == "own"
    return Workload(
        prompt_words=lengths("--prompt-tokens", options.prompt_tokens, 1),
        output_tokens=None if is_own else lengths("--output-tokens", options.output_tokens, 2),
        seed=options.seed,
        text=read_words(options.text) if options.text else (),
        prompts=read_prompts(options.prompts) if options.prompts else (),
        turns=lengths("--turns", options.turns, 1),
        think_s=numbers("--think-s", options.think_s),
        prefix_words=options.shared_prefix,
        prefix_groups=options.prefix_groups,
        until_eos=options.until_eos,
        trace=str(options.trace) if options.trace else None,
        has_own_lengths=has_own_lengths,
        source=str(options.prompts or options.text or Workload.source),
    )


def _terms(options: Options, has_turns: bool) -> dict[str, Any]:
    """The limits, which must all be of something that is measured."""
    slo_ms = {"ttft_s": options.slo_ttft_ms, "tpot_s": options.slo_tpot_ms}
    slo = {name: limit_ms and limit_ms / 1e3 for name, limit_ms in slo_ms.items()}
    has_slo = any(slo.values())
    guard = Guard() if options.guard is None else Guard.read(options.guard)
    speed = {**guard.min_speedup, **guard.max_slowdown}
    limits = {**guard.about(), **speed}
    for name, is_measured, flag in (
        ("min_token_agreement", options.quality_prompts, "--quality-prompts"),
        ("max_accuracy_loss", options.choices, "--choices"),
        ("goodput", has_slo, "--slo-ttft-ms or --slo-tpot-ms"),
    ):
        if limits.get(name) is not None and not is_measured:
            raise UsageError(
                f"guard {options.guard} limits {name}, but nothing measures it; give {flag}, or "
                "drop the limit"
            )
    is_ramp = options.schedule == "ramp"
    if has_turns and options.schedule != "closed" and (is_ramp or has_slo):
        flag = "--schedule ramp" if is_ramp else "--slo-ttft-ms and --slo-tpot-ms"
        raise UsageError(
            f"{flag} count requests by when they leave, but on a timetable only first turns do; "
            "leave out --turns, or --schedule"
        )
    _check_speed(options, speed, has_turns)
    return {
        "guard": guard.about(),
        "slo": slo if has_slo else None,
        "is_aa": options.same_model,
        "until": options.until,
    }


def _check_speed(options: Options, speed: Collection[str], has_turns: bool) -> None:
    """Refuses limits that would stay open, and a run that no limit would end."""
    if options.until not in (None, "certain"):
        raise UsageError(f"--until {options.until} is unknown; give certain")
    if options.until and options.launches > 1:
        raise UsageError(
            f"--until certain adds block pairs to one launch; drop --launches {options.launches}"
        )
    if options.until and not speed:
        raise UsageError(
            "--until certain needs a limit to decide; give --guard with min_speedup or max_slowdown"
        )
    unequal = {"e2e", "throughput", "goodput"} | ({"ttft"} if has_turns else set())
    num_pairs = options.blocks * options.launches
    for name in speed:
        if options.until and name not in AT_EVERY_LOOK:
            raise UsageError(
                f"--until certain cannot decide {name} of guard {options.guard}, which has no "
                f"value for each block pair; limit one of {', '.join(AT_EVERY_LOOK)}, or leave "
                "out --until"
            )
        if options.until_eos and name.partition("_")[0] in unequal:
            what = "answers and histories" if has_turns else "answers"
            raise UsageError(
                f"guard {options.guard} limits {name}, but with --until-eos the variants' {what} "
                "have different lengths; limit tpot or itl, or leave out --until-eos"
            )
        if num_pairs < MIN_BLOCK_PAIRS:
            raise UsageError(
                f"guard {options.guard} limits {name}, but {num_pairs} block pairs give no "
                f"interval; give --blocks {MIN_BLOCK_PAIRS} or more"
            )
