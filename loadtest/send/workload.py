"""A seed, with ready prompts, a text or neither -> prompts whose openings no server has seen.

A prefix cache keeps what it has seen, so a prompt sent twice measures the cache. Every prompt
therefore opens with a line of digits: a number drawn for each run, then the number of the
pass over the prompts, then the prompt's own. The rest depends on the seed alone, so two passes and
two runs differ only in that line, and a server behind both variants has no prompt in its cache.
"""

import json
import random
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loadtest.errors import UsageError

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
class Workload:
    """Prompts of `prompt_words` words, or ready ones.

    Attributes:
        prompt_words: words in a prompt, not counting the opening line; ready prompts keep theirs.
        seed: the same seed gives the same words, or the same order of ready prompts.
        text: words to cut prompts from, at places drawn from the seed.
        prompts: ready prompts; they start over when they run out. With neither these nor a text,
            prompts are random words.
        source: where text or prompts come from, for the record.
        run_number: opens every prompt; drawn at random unless given.
    """

    prompt_words: int = 128
    seed: int = 0
    text: tuple[str, ...] = field(default=(), repr=False)
    prompts: tuple[Prompt, ...] = field(default=(), repr=False)
    source: str = "synthetic"
    run_number: int = field(default_factory=new_run_number)

    def __post_init__(self) -> None:
        if self.prompt_words < 1:
            raise UsageError(f"prompt words {self.prompt_words} must be 1 or more")
        if self.text and self.prompts:
            raise UsageError("both a text and ready prompts are given; give one of them")
        if self.text and len(self.text) < self.prompt_words:
            raise UsageError(
                f"the text has {len(self.text)} words, fewer than one prompt of "
                f"{self.prompt_words}; give a longer text or ask for fewer prompt words"
            )

    def about(self) -> dict[str, Any]:
        """What identifies this workload, for run.json."""
        return {
            "source": self.source,
            "prompt_words": None if self.prompts else self.prompt_words,
            "seed": self.seed,
            "run_number": self.run_number,
        }

    @cached_property
    def _order(self) -> list[int]:
        return random.Random(self.seed).sample(range(len(self.prompts)), len(self.prompts))

    def prompt(self, index: int, pass_number: int = 0) -> Prompt:
        """One prompt; all openings have the same length.

        Args:
            index: from 0, in a pass.
            pass_number: from 0; the same `index` has the same text in each pass.
        """
        opening = f"{self.run_number:09d} {pass_number:04d} {index:06d}\n"
        if self.prompts:
            ready = self.prompts[self._order[index % len(self.prompts)]]
            if isinstance(ready, str):
                return opening + ready
            first, *more = ready
            return [{**first, "content": opening + first["content"]}, *more]
        rng = random.Random(f"{self.seed}/{index}")
        if self.text:
            start = rng.randrange(len(self.text) - self.prompt_words + 1)
            words = list(self.text[start : start + self.prompt_words])
        else:
            words = rng.choices(_VOCABULARY.split(), k=self.prompt_words)
        return opening + " ".join(words)


def read_prompts(name: str) -> tuple[Prompt, ...]:
    """Reads one of PACKAGED from data/prompts, or a file.

    Args:
        name: one of PACKAGED, or the path of a UTF-8 file with a line of JSON a prompt:
            {"prompt": TEXT} or {"messages": [{"role": ROLE, "content": TEXT}, ...]}.

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


def _parse(line: str, where: str) -> Prompt:
    """Reads a line of a prompt file; `where` opens the error message."""
    try:
        given = json.loads(line)
        if isinstance(given, dict) and given.keys() == {"prompt"}:
            prompt: Prompt = given["prompt"]
            texts = [prompt]
        else:
            prompt = [
                {"role": said["role"], "content": said["content"]} for said in given["messages"]
            ]
            texts = [text for said in prompt for text in said.values()]
        if texts and all(isinstance(text, str) and text for text in texts):
            return prompt
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f'{where}: {line[:80]!r} is neither {{"prompt": TEXT}} nor {{"messages": [{{"role": ROLE, '
        '"content": TEXT}, ...]}'
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
