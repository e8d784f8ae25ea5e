"""A Markdown page -> its fenced blocks, so that tests run what a reader types and no copy of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    *sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.md")),
)
# A fenced block, or a heading that lies in none.
PART = re.compile(
    r"^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$|^###? (?P<heading>[^\n]+)$", re.M | re.S
)
WORDS = re.compile(r"\b(DENSE_DIR|DIR|TRAIN\.txt|HELDOUT\.txt|FILE)\b")


@dataclass(frozen=True)
class Block:
    """Code of a page, and the nearest heading above it ("" where there is none)."""

    heading: str
    language: str
    code: str

    def filled(self, places: Mapping[str, object]) -> "Block":
        """With each word of `places` replaced; no word for a path may be left."""
        code = self.code
        for word, place in places.items():
            code = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", str(place), code)
        assert WORDS.search(code) is None, code
        return replace(self, code=code)

    @property
    def commands(self) -> list[str]:
        """A shell's lines, without comments, each with those that continue it; Python whole."""
        if self.language == "python":
            return [self.code]
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for text in lines if (line := re.sub(r"(^| +)#.*", "", text).strip())]


def blocks(page: str) -> Iterator[Block]:
    heading = ""
    for part in PART.finditer((ROOT / page).read_text()):
        if part["heading"]:
            heading = part["heading"]
        else:
            yield Block(heading, part["language"], dedent(part["code"]))
