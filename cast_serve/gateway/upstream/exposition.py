"""A worker's /metrics -> the values that the gateway asks for, or its series with its name on them.

A worker may have megabytes of them, and all streams pass through the event loop that reads them. So
the text is read line by line, a slice at a time, and goes out as it came but for two more labels:
it takes no parser and no object for each sample. What Prometheus would refuse is refused here, or
one worker's fault would cost the series of all.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Collection, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from cast_serve.gateway.upstream.client import Client, pieces

SLICE_BYTES = 1 << 14  # well below a millisecond's work
# Each worker has these of its own; vllm's and cast's matter.
HIDDEN_PREFIXES = (b"python_", b"process_", b"http_")
TYPES = (b"counter", b"gauge", b"histogram", b"summary", b"untyped")
SUFFIXES = (b"", b"_bucket", b"_sum", b"_count")  # of a family's samples

_NAME = re.compile(rb"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = rb'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\["\\n])*"'
_LABELS = re.compile(rb'([a-zA-Z_][a-zA-Z0-9_]*)(="(?:[^"\\]|\\["\\n])*")')
_NUMBER = rb"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|(?i:inf|nan))"
_SAMPLE = re.compile(
    rb"(%b)(?:\{((?:%b,)*(?:%b)?)\})?[ \t]+((%b)(?:[ \t]+-?\d+)?)[ \t]*"
    % (_NAME.pattern, _LABEL, _LABEL, _NUMBER)
)


class ExpositionError(ValueError):
    """A text that is not Prometheus's format."""


@dataclass
class Family:
    """A metric's lines: at most one HELP and one TYPE, and its samples."""

    about: dict[bytes, bytes] = field(default_factory=dict)
    samples: list[bytes] = field(default_factory=list)


async def read_sums(
    client: Client, url: str, names: Collection[str], timeout_s: float
) -> dict[str, float]:
    """The sum over its labels of each sample of these names that is there.

    Raises:
        WorkerError: if the worker does not answer in time, or with more than is read.
    """
    sums: dict[str, float] = {}
    wanted = {name.encode(): name for name in names}
    async with aclosing(_lines(client, url, timeout_s)) as slices:
        async for lines in slices:
            for line in lines:
                if (found := _SAMPLE.fullmatch(line)) and (name := wanted.get(found[1])):
                    sums[name] = sums.get(name, 0.0) + float(found[4])
    return sums


async def read_families(
    client: Client, url: str, labels: dict[str, str], timeout_s: float
) -> dict[bytes, Family]:
    """A worker's metrics by name, each sample with these labels in place of its own of the names.

    Raises:
        ExpositionError: with the first line that Prometheus would refuse.
        WorkerError: if the worker does not answer in time, or with more than is read.
    """
    families: dict[bytes, Family] = {}
    own = b",".join(f'{name}="{_escaped(text)}"'.encode() for name, text in labels.items())
    names = [name.encode() for name in labels]
    current = b""
    async with aclosing(_lines(client, url, timeout_s)) as slices:
        async for lines in slices:
            for line in lines:
                if line.startswith(b"#"):
                    current = _read_comment(line, families) or current
                elif line.strip():
                    current = _read_sample(line, families, current, own, names)
    return {
        name: family for name, family in families.items() if not name.startswith(HIDDEN_PREFIXES)
    }


def merged(workers: Iterable[dict[bytes, Family]]) -> bytes:
    """One text of several workers' metrics, each name once, described as the first one does."""
    families: dict[bytes, Family] = {}
    for worker in workers:
        for name, family in worker.items():
            into = families.setdefault(name, Family(family.about))
            into.samples += family.samples
    lines = [
        line
        for family in families.values()
        if family.samples
        for line in (*family.about.values(), *family.samples)
    ]
    return b"".join(b"%b\n" % line for line in lines)


async def _lines(client: Client, url: str, timeout_s: float) -> AsyncGenerator[list[bytes], None]:
    """The text's lines, slice by slice, with a turn of the event loop between two.

    None where the worker has no metrics, or not for the gateway.
    """
    async with client.asking(f"{url}/metrics", timeout_s) as upstream:
        if upstream.status != 200:
            return
        rest = b""
        async for piece in pieces(upstream, SLICE_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            yield lines
            await asyncio.sleep(0)
        yield [rest]


def _read_comment(line: bytes, families: dict[bytes, Family]) -> bytes:
    """Records a HELP or TYPE line; returns its metric, empty for another comment."""
    match line.split(None, 3):
        case [b"#", b"HELP" | b"TYPE" as kind, name, *rest]:
            is_type = kind == b"TYPE"
            if not _NAME.fullmatch(name) or (is_type and b"".join(rest).strip() not in TYPES):
                raise ExpositionError(_shown(line))
            _check_text(line)
            families.setdefault(name, Family()).about.setdefault(kind, line)
            return name
    return b""


def _read_sample(
    line: bytes, families: dict[bytes, Family], current: bytes, own: bytes, names: list[bytes]
) -> bytes:
    """Records a sample with the labels; returns the name of its family."""
    found = _SAMPLE.fullmatch(line)
    if found is None:
        raise ExpositionError(_shown(line))
    _check_text(line)
    name, labels, value = found[1], found[2] or b"", found[3]
    if not (current and name.startswith(current) and name[len(current) :] in SUFFIXES):
        current = name
    if any(each in labels for each in names):
        pairs = _LABELS.findall(labels)
        labels = b",".join(each + text for each, text in pairs if each not in names)
    comma = b"," if labels and not labels.endswith(b",") else b""
    series = b"%b{%b%b%b} %b" % (name, labels, comma, own, value)
    families.setdefault(current, Family()).samples.append(series)
    return current


def _check_text(line: bytes) -> None:
    if not line.isascii():
        try:
            line.decode()
        except UnicodeDecodeError:
            raise ExpositionError(_shown(line)) from None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _shown(line: bytes) -> str:
    return f"the line {line[:100]!r} is not Prometheus's text format"
