"""A seed, and a text file or nothing -> prompts, each with an opening that no server has seen.

A prefix cache keeps what it has seen, so a prompt sent twice measures the cache. Every prompt
therefore opens with a line of digits: a number drawn anew for every run, then the prompt's own. The
words after that line follow from the seed alone, so two runs differ in nothing else.
"""

import random
import secrets
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True)
class Workload:
    """Prompts of about `prompt_words` words.

    Attributes:
        prompt_words: words in a prompt, not counting the opening line.
        seed: the same seed gives the same words.
        text: words to cut prompts from, at places drawn from the seed; empty means made-up prompts.
        run_number: opens every prompt; drawn anew unless given.
    """

    prompt_words: int = 128
    seed: int = 0
    text: tuple[str, ...] = field(default=(), repr=False)
    run_number: int = field(default_factory=lambda: secrets.randbelow(10**9))

    def __post_init__(self) -> None:
        if self.prompt_words < 1:
            raise ValueError(f"prompt words {self.prompt_words} must be 1 or more")
        if self.text and len(self.text) < self.prompt_words:
            raise ValueError(
                f"the text has {len(self.text)} words, fewer than one prompt of "
                f"{self.prompt_words}; give a longer text or ask for fewer prompt words"
            )

    def prompt(self, index: int) -> str:
        """The prompt of that number. Numbers of equal length keep the token count alike."""
        rng = random.Random(f"{self.seed}/{index}")
        if self.text:
            start = rng.randrange(len(self.text) - self.prompt_words + 1)
            words = list(self.text[start : start + self.prompt_words])
        else:
            words = rng.choices(_VOCABULARY.split(), k=self.prompt_words)
        return f"{self.run_number:09d} {index:06d}\n" + " ".join(words)


def read_words(path: Path) -> tuple[str, ...]:
    """Reads a UTF-8 text file into words.

    Raises:
        ValueError: if the file cannot be read, is not UTF-8, or holds no words.
    """
    try:
        words = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text {path} cannot be read as UTF-8: {error}") from error
    if not words:
        raise ValueError(f"text {path} holds no words; give a file with some")
    return words
