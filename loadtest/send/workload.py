"""A seed, with ready prompts, a text or neither -> conversations, most of them of one turn.

A prefix cache keeps what it has seen, so a prompt sent twice measures the cache. Every prompt
therefore opens with a line of digits: a number drawn for each run, then the number of the
pass over the prompts, then the prompt's own. The rest depends on the seed alone, so two passes and
two runs differ only in that line, and a server behind both variants has no prompt in its cache.

What is to be cached opens without the prompt's own number: a prefix that the prompts of a group
share with the run's number and the group's, so that the warm-up can fill the cache; a trace's
blocks with the run's and the pass's.
"""

import json
import random
import secrets
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loadtest.errors import UsageError
from loadtest.send.distribution import Distribution
from loadtest.send.trace import BLOCK_TOKENS, Arrival

Prompt = str | list[dict[str, str]]
"""A text for /v1/completions, or messages for /v1/chat/completions."""

PACKAGED = ("sharegpt", "gsm8k")
"""Prompts that scripts/data fetches."""

_VOCABULARY = """
about above after again answer before begin between book bridge build carry city clear close cold
colour corner could country course cross draw early earth every field figure final follow force
found garden great green ground group hand heavy history house island keep large learn letter light
little machine mark measure morning mountain never night north number often open order other paper
people place plain plant point power question quick reach record river round school second seven
short side simple small sound south stand start stone story street strong surface table teach thing
think through time town travel under until value voice watch water weight wheel while wind winter
wonder wood word work world write year young
"""


def new_run_number() -> int:
    """A number that almost certainly no earlier run had."""
    return secrets.randbelow(10**9)


@dataclass(frozen=True)
class Turn:
    """A request.

    Attributes:
        prompt: of the first turn all of it; of a later one what the user says next.
        output_tokens: asked for.
        think_s: seconds between the answer before and this turn.
    """

    prompt: Prompt
    output_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """One turn, or a chat that carries its own answers along.

    Attributes:
        index: its number in the workload.
        turns: at least one; with several, the prompts are texts.
        is_chat: whether texts are sent as messages, as of all conversations if some have several
            turns.
    """

    index: int
    turns: tuple[Turn, ...]
    is_chat: bool = False


@dataclass(frozen=True)
class Ready:
    """A prompt of a file, and how many tokens its answer had; None: not said."""

    prompt: Prompt
    output_tokens: int | None = None


@dataclass(frozen=True)
class Workload:
    """Conversations of made-up prompts, or of ready ones.

    Attributes:
        prompt_words: words in a prompt, not counting the opening line; ready prompts keep theirs.
        output_tokens: of an answer; None: those that each ready prompt says.
        seed: the same seed gives the same words and numbers, or the same order of ready prompts.
        text: words to cut prompts from, at places drawn from the seed.
        prompts: ready prompts; they start over when they run out. With neither these nor a text,
            prompts are random words.
        turns: of a conversation.
        think_s: seconds between an answer and the next turn.
        prefix_words: words of the prefix that the prompts of a group share; 0: none.
        prefix_groups: groups; conversations take turns in them.
        until_eos: whether answers end by themselves, with output_tokens at most.
        trace: the file whose arrivals are sent; None: there is none.
        has_own_lengths: whether each of its arrivals says how many tokens prompt and answer have.
        source: where text or prompts come from, for the record.
        run_number: opens every prompt; drawn at random unless given.
    """

    prompt_words: Distribution = Distribution("128")
    output_tokens: Distribution | None = Distribution("32")
    seed: int = 0
    text: tuple[str, ...] = field(default=(), repr=False)
    prompts: tuple[Ready, ...] = field(default=(), repr=False)
    turns: Distribution = Distribution("1")
    think_s: Distribution = Distribution("0")
    prefix_words: int = 0
    prefix_groups: int = 1
    until_eos: bool = False
    trace: str | None = None
    has_own_lengths: bool = False
    source: str = "synthetic"
    run_number: int = field(default_factory=new_run_number)

    def __post_init__(self) -> None:
        if self.text and self.prompts:
            raise UsageError("both a text and ready prompts are given; give one of them")
        if self.text and len(self.text) < self.prompt_words.high:
            raise UsageError(
                f"the text has {len(self.text)} words, fewer than one prompt of "
                f"{self.prompt_words.high:g}; give a longer text or ask for fewer prompt words"
            )
        has_tokens = bool(self.prompts) and all(ready.output_tokens for ready in self.prompts)
        if self.output_tokens is None and not has_tokens:
            raise UsageError(
                "--output-tokens own needs --prompts FILE whose lines all have output_tokens; give "
                "such a file, or a number"
            )
        has_messages = any(not isinstance(ready.prompt, str) for ready in self.prompts)
        if has_messages and (self.turns.high > 1 or self.prefix_words):
            flag = "--turns" if self.turns.high > 1 else "--shared-prefix"
            raise UsageError(
                f"{flag} needs prompts that are texts, but {self.source} has messages; give "
                "another file"
            )

    def about(self) -> dict[str, Any]:
        """What identifies this workload, for run.json."""
        found: dict[str, Any] = {
            "source": self.source,
            "prompt_words": None if self.prompts else self.prompt_words.about(),
            "output_tokens": self.output_tokens.about() if self.output_tokens else "own",
            "seed": self.seed,
            "run_number": self.run_number,
        }
        if self.has_own_lengths:
            found |= {"prompt_words": "trace", "output_tokens": "trace"}
        if self.trace:
            found["trace"] = self.trace
        if self.turns.high > 1:
            found |= {"turns": self.turns.about(), "think_s": self.think_s.about()}
        if self.until_eos:
            found["until_eos"] = True
        if self.prefix_words:
            found |= {"prefix_words": self.prefix_words, "prefix_groups": self.prefix_groups}
        return found

    def prompt(self, index: int, pass_number: int = 0) -> Prompt:
        """The first prompt of a conversation."""
        return self.conversation(index, pass_number).turns[0].prompt

    def conversation(
        self, index: int, pass_number: int = 0, arrival: Arrival | None = None
    ) -> Conversation:
        """One conversation; all openings have the same length.

        Args:
            index: from 0, over the whole run.
            pass_number: from 0; the same `index` has the same texts and numbers in each pass.
            arrival: whose lengths and blocks take the place of the workload's.
        """
        opening = f"{self.run_number:09d} {pass_number:04d} {index:06d}\n"
        num_turns = self.turns.whole(f"{self.seed}/{index}/turns")
        first, *later = (
            self._turn(index, number, num_turns, "" if number else opening, arrival)
            for number in range(num_turns)
        )
        if isinstance(first.prompt, str):
            shared = self._prefix(index)
            if arrival is not None and arrival.blocks:
                shared = self._blocks(arrival, pass_number)
            first = replace(first, prompt=shared + first.prompt)
        return Conversation(index, (first, *later), is_chat=self.turns.high > 1)

    def _turn(
        self, index: int, number: int, num_turns: int, opening: str, arrival: Arrival | None
    ) -> Turn:
        seed = f"{self.seed}/{index}" + (f"/{number}" if number else "")
        if self.prompts:
            place = (index * num_turns + number) % len(self.prompts)
            ready = self.prompts[self._order[place]]
            prompt, own_tokens = _opened(ready.prompt, opening), ready.output_tokens
        else:
            prompt, own_tokens = opening + self._words(seed, arrival), None
        if arrival is not None and arrival.output_tokens is not None:
            own_tokens = arrival.output_tokens
        elif self.output_tokens is not None:
            own_tokens = self.output_tokens.whole(f"{seed}/output")
        think_s = self.think_s.number(f"{seed}/think") if number else 0.0
        return Turn(prompt, own_tokens or 1, think_s)

    @cached_property
    def _order(self) -> list[int]:
        return random.Random(self.seed).sample(range(len(self.prompts)), len(self.prompts))

    def _words(self, seed: str, arrival: Arrival | None) -> str:
        """A made-up prompt, or one cut from the text."""
        num = self.prompt_words.whole(f"{seed}/prompt")
        if arrival is not None and arrival.prompt_tokens is not None:
            num = max(arrival.prompt_tokens - BLOCK_TOKENS * len(arrival.blocks), 0)
        rng = random.Random(seed)
        if self.text:
            start = rng.randrange(len(self.text) - num + 1)
            return " ".join(self.text[start : start + num])
        return " ".join(rng.choices(_VOCABULARY.split(), k=num))

    def _prefix(self, index: int) -> str:
        if not self.prefix_words:
            return ""
        group = index % self.prefix_groups
        words = random.Random(f"{self.seed}/group/{group}").choices(
            _VOCABULARY.split(), k=self.prefix_words
        )
        return f"{self.run_number:09d} {group:06d}\n{' '.join(words)}\n"

    def _blocks(self, arrival: Arrival, pass_number: int) -> str:
        """The beginning that a trace's requests with the same first ids share."""
        words: list[str] = []
        for name in arrival.blocks:
            rng = random.Random(f"{self.seed}/block/{name}")
            words += rng.choices(_VOCABULARY.split(), k=BLOCK_TOKENS)
        shared = " ".join(words[: arrival.prompt_tokens])  # the last block may be shorter
        return f"{self.run_number:09d} {pass_number:04d}\n{shared}\n"


def _opened(ready: Prompt, opening: str) -> Prompt:
    """A ready prompt behind an opening line."""
    if isinstance(ready, str):
        return opening + ready
    first, *more = ready
    return [{**first, "content": opening + first["content"]}, *more]


def read_prompts(name: str) -> tuple[Ready, ...]:
    """Reads one of PACKAGED from data/prompts, or a file.

    Args:
        name: one of PACKAGED, or the path of a UTF-8 file with a line of JSON a prompt:
            {"prompt": TEXT} or {"messages": [{"role": ROLE, "content": TEXT}, ...]}, and with
            either, if it is known, "output_tokens": how many its answer had.

    Raises:
        UsageError: if the file cannot be read or holds something else.
    """
    path = Path(f"data/prompts/{name}.jsonl") if name in PACKAGED else Path(name)
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"prompts {path} cannot be read: {error}; name a .jsonl file, or one of "
            f"{', '.join(PACKAGED)} after running scripts/data"
        ) from error
    if not lines:
        raise UsageError(f"prompts {path} is empty; give one line of JSON per prompt")
    return tuple(_parse(line, f"prompts {path}, line {n}") for n, line in enumerate(lines, 1))


def _parse(line: str, where: str) -> Ready:
    """Reads a line of a prompt file; `where` opens the error message."""
    try:
        given = json.loads(line)
        output_tokens = given.pop("output_tokens", None)
        is_sound = output_tokens is None or (type(output_tokens) is int and output_tokens > 0)
        if given.keys() == {"prompt"}:
            prompt: Prompt = given["prompt"]
            texts = [prompt]
        else:
            prompt = [
                {"role": said["role"], "content": said["content"]} for said in given["messages"]
            ]
            texts = [text for said in prompt for text in said.values()]
        if is_sound and texts and all(isinstance(text, str) and text for text in texts):
            return Ready(prompt, output_tokens)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(
        f'{where}: {line[:80]!r} is neither {{"prompt": TEXT}} nor {{"messages": [{{"role": ROLE, '
        '"content": TEXT}, ...]}, either with "output_tokens": NUMBER or without'
    )


def read_words(path: Path) -> tuple[str, ...]:
    """Reads a UTF-8 text file into words.

    Raises:
        UsageError: if the file cannot be read, is not UTF-8, or holds no words.
    """
    try:
        words = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"text {path} cannot be read as UTF-8: {error}") from error
    if not words:
        raise UsageError(f"text {path} holds no words; give a file with some")
    return words
