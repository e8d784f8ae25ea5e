"""What `--text` names -> documents: text files, data sets, folders and globs of them, a hub's.

A UTF-8 file is one document. A data set, ``.jsonl`` or ``.parquet`` (``.jsonl.gz`` and
``.jsonl.zst`` too), has one in each row, in a field that is named. `datasets` reads those, file by
file and row by row, so memory does not grow with their size.
"""

import codecs
import glob
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.checkpoint import hub
from cast_serve.errors import UsageError

FIELD = "text"
TOKENS_JSON = "tokens.json"  # in a folder of tokens (tokens.py)
# Texts are tokenised in pieces cut at line ends: a book in one would show no progress.
PIECE_CHARS = 200_000
READ_BYTES = 1 << 20
# How `datasets` calls the readers of these files.
DATA_SETS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Source:
    """A file, or a hub's data set.

    Attributes:
        reader: ``text``, ``hub``, or how `datasets` calls it.
        name: the file's path, or ORG/NAME[@REVISION].
    """

    reader: str
    name: str

    @property
    def path(self) -> Path | None:
        return None if self.reader == "hub" else Path(self.name)

    @property
    def num_bytes(self) -> int:
        """Of a hub's data set 0."""
        return 0 if self.path is None else self.path.stat().st_size


@dataclass(frozen=True)
class Hub:
    """What of a hub's data set is read.

    Attributes:
        subset: its configuration; None: the only one.
        split: of that.
    """

    subset: str | None = None
    split: str = "train"


TRAIN_SPLIT = Hub()


def find(names: Sequence[str | Path]) -> list[Source]:
    """The sources that some names stand for, in their order.

    Args:
        names: files; globs; folders, of which all files of `DATA_SETS` and all ``.txt`` are read;
            or ORG/NAME[@REVISION], a data set of a hub.

    Raises:
        UsageError: naming what is none of these, or an empty folder or glob.
    """
    if not names:
        raise UsageError("no text file is given; name one with --text FILE")
    found: list[Source] = []
    for name in map(str, names):
        path = Path(name)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.is_file())
            files = [each for each in inside if each.suffix == ".txt" or _data_set(each)]
            if not files:
                wanted = ", ".join([".txt", *DATA_SETS])
                raise UsageError(f"the folder {path} holds no text: no file of {wanted}")
        elif glob.has_magic(name) and not path.exists():
            files = [Path(each) for each in sorted(glob.glob(name, recursive=True))]
            files = [each for each in files if each.is_file()]
            if not files:
                raise UsageError(f"no file matches {name}; check the path")
        elif not path.exists() and path.suffix == "" and hub.is_name(name.partition("@")[0]):
            found.append(Source("hub", name))
            continue
        else:
            try:
                path.stat()
            except OSError as error:
                raise UsageError(f"cannot read the text {path}: {error.strerror}") from error
            files = [path]
        found += [Source(_data_set(file) or "text", str(file)) for file in files]
    return found


def weighted(names: Sequence[str | Path]) -> tuple[list[Path], list[float] | None]:
    """``NAME=WEIGHT`` of all names, or of none -> names, and their weights; None: none has one.

    Raises:
        UsageError: if some have one, or a weight is not above 0.
    """
    if not any("=" in Path(name).name and not Path(name).exists() for name in names):
        return [Path(name) for name in names], None
    parts = [str(name).rpartition("=") for name in names]
    for name, (_, equals, weight) in zip(names, parts, strict=True):
        if not equals:
            raise UsageError(f"{name} has no weight and another text has one; write {name}=1")
        try:
            is_right = 0 < float(weight) < math.inf
        except ValueError:
            is_right = False
        if not is_right:
            raise UsageError(
                f"{name}: the weight {weight!r} is not a number above 0; write NAME=0.3"
            )
    return [Path(name) for name, _, _ in parts], [float(weight) for _, _, weight in parts]


def _data_set(path: Path) -> str | None:
    """How `datasets` calls a file's reader; None: it is text."""
    ends = (reader for suffix, reader in DATA_SETS.items() if path.name.endswith(suffix))
    return next(ends, None)


class Documents:
    """The documents of some sources, in pieces, from a position on.

    Iterating gives a piece, and whether a document begins with it. Rows without text are left out.

    Args:
        sources: of `find`.
        field: of the data sets' rows.
        position: of an earlier reader of the same sources; None: the beginning.
        of_hub: what of a hub's data sets is read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        field: str = FIELD,
        position: Mapping[str, Any] | None = None,
        of_hub: Hub = TRAIN_SPLIT,
    ) -> None:
        self.sources = sources
        self.field = field
        self.of_hub = of_hub
        began = position or {"source": 0, "pieces": 0, "state": None}
        self._source: int = began["source"]
        self._pieces: int = began["pieces"]
        self._state: Mapping[str, Any] | None = began["state"]
        self._rows: Any = None

    def position(self) -> dict[str, Any]:
        """Where reading goes on after the last piece that was given, as JSON has it."""
        state = None if self._rows is None else self._rows.state_dict()
        return {"source": self._source, "pieces": self._pieces, "state": state}

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        """The pieces that are left.

        Raises:
            UsageError: naming the file, row or field that is wrong.
        """
        while self._source < len(self.sources):
            source = self.sources[self._source]
            read = self._of_text if source.reader == "text" else self._of_data_set
            yield from read(source)
            self._source, self._pieces = self._source + 1, 0
            self._state = self._rows = None

    def _of_text(self, source: Source) -> Iterator[tuple[str, bool]]:
        passed, self._pieces = self._pieces, 0
        is_empty = True
        for piece in _pieces(Path(source.name)):
            is_empty = is_empty and not piece.strip()
            self._pieces += 1
            if self._pieces > passed:
                yield piece, self._pieces == 1
        if is_empty:
            raise UsageError(f"{source.name} is empty")

    def _of_data_set(self, source: Source) -> Iterator[tuple[str, bool]]:
        remedy = "name the field that holds the text: cast-train tokenize --text-field NAME"
        for row in self._rows_of(source):
            self._pieces += 1
            if self.field not in row:
                fields = ", ".join(sorted(row))
                raise UsageError(
                    f"{source.name} has no field {self.field!r}, only {fields}; {remedy}"
                )
            document = row[self.field]
            if document is not None and not isinstance(document, str):
                raise UsageError(
                    f"{source.name}: row {self._pieces} has {document!r:.60} as {self.field!r}, "
                    f"which is not text; {remedy}"
                )
            if document and document.strip():
                yield document, True

    def _rows_of(self, source: Source) -> Iterator[dict[str, Any]]:
        """A data set's rows, as `datasets` streams them.

        Raises:
            UsageError: if it cannot be read.
        """
        import datasets  # here: it takes seconds, and texts do without it

        datasets.disable_progress_bars()
        asked: dict[str, Any] = {"split": "train", "streaming": True}
        try:
            if source.path is None:
                name, _, revision = source.name.partition("@")
                asked |= {"split": self.of_hub.split, "revision": revision or None}
                self._rows = datasets.load_dataset(name, self.of_hub.subset, **asked)
            else:
                self._rows = datasets.load_dataset(source.reader, data_files=source.name, **asked)
            if self._state is not None:
                self._rows.load_state_dict(self._state)
            rows = iter(self._rows)
            while (row := next(rows, None)) is not None:
                yield row
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UsageError(f"cannot read the data set {source.name}: {error}") from error


def _pieces(path: Path) -> Iterator[str]:
    """A UTF-8 file's text, cut at line ends."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    text, is_read, num_bytes = "", False, 0
    try:
        with path.open("rb") as file:
            while text or not is_read:
                while len(text) < PIECE_CHARS and not is_read:
                    read = file.read(READ_BYTES)
                    num_bytes, is_read = num_bytes + len(read), not read
                    text += decoder.decode(read, final=is_read)
                end = text.rfind("\n", 0, PIECE_CHARS) + 1 or PIECE_CHARS
                if text:
                    yield text[:end]
                text = text[end:]
    except UnicodeDecodeError as error:
        at = num_bytes - len(error.object) + error.start
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {at}") from error
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror}") from error
