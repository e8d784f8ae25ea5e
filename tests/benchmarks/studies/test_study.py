import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.studies import report, study
from cast_serve.provenance import versions
from cast_train.__main__ import app
from cast_train.errors import StoppedError
from tests.conftest import Opened

ROWS: list[dict[str, Any]] = [
    {"way": "magnitude", "seed": None, "perplexity": 80.0},
    {"way": "wanda", "seed": None, "perplexity": 40.0},
    {"way": "before", "seed": None, "perplexity": 10.0},
    *(
        {
            "way": "ste",
            "seed": seed,
            "tokens": 1000,
            "perplexity": perplexity,
            "perplexity_soft": perplexity / 1.01,
            "flipped_share": 0.1,
            "step_s": 0.5,
            "cpu_s": 80.0 + 20 * seed,
            "peak_memory_mb": 100.0 + seed,
            "curve": [{"tokens": 500, "perplexity": 30.0}, {"tokens": 1000, "perplexity": 20.0}],
        }
        for seed, perplexity in enumerate((19.0, 21.0))
    ),
]


def test_the_summary_by_hand() -> None:
    found = report.summarise(ROWS)
    assert found["wanda"] == {"perplexity": 40.0, "num_seeds": 0}
    ste = found["ste"]
    assert (ste["perplexity"], ste["perplexity_min"], ste["perplexity_max"]) == (20.0, 19.0, 21.0)
    assert ste["recovered"] == pytest.approx(math.log(2) / math.log(4))
    assert ste["soft_to_hard"] == pytest.approx(0.01)
    assert (ste["peak_memory_mb"], ste["num_seeds"]) == (101.0, 2)
    result = {"model": "m", "text": ["t"], "heldout": "h", "summary": found}
    lines = report.table_of(result).splitlines()[4:]
    names = [line.split("|")[1].strip() for line in lines]
    assert names == ["dense, as given", "ste", "one-shot wanda", "one-shot magnitude"]
    assert "20.00 (19.00 to 21.00, n=2)" in lines[1]
    without = {name: value for name, value in ROWS[3].items() if name != "cpu_s"}
    old = report.summarise([*ROWS[:3], without | {"step_s": None}])  # went on without a step
    assert "| 10.0% |  |  | 100" in report.table_of(result | {"summary": old})


def test_a_way_may_change_any_setting() -> None:
    assert study.ways_of(
        " ste ; fixed mask start=magnitude learning_rate=1e-4 include=['q_proj']"
    ) == {
        "ste": study.WAYS["ste"],
        "fixed mask start=magnitude learning_rate=1e-4 include=['q_proj']": {
            **study.WAYS["fixed mask"],
            "start": "magnitude",
            "learning_rate": 1e-4,
            "include": ["q_proj"],
        },
    }
    assert list(study.ways_of(None)) == list(study.WAYS)
    with pytest.raises(ValueError, match="'magic'; choose from"):
        study.ways_of("magic steps=3")


@pytest.fixture
def only_runs_have_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a study prunes and measures is done in this process, which has all imported."""
    call = study._call

    def called(*arguments: object) -> tuple[dict[str, Any], dict[str, float]]:
        if arguments[0] == "run":
            return call(*arguments)
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), {}

    monkeypatch.setattr(study, "_call", called)


@pytest.mark.usefixtures("only_runs_have_processes")
def test_a_study_runs_once_and_goes_on(
    llama_dir: Path,
    text_file: Path,
    heldout_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {"steps": 4, "batch_blocks": 4, "block_size": 32}
    settings |= {"heldout_blocks": 4, "calibration_blocks": 4, "learning_rate": 3e-3}
    settings |= {"evaluate_every": 2, "max_grad_norm": float("inf")}
    out = tmp_path / "study"
    rival = tmp_path / "twin"
    shutil.copytree(llama_dir, rival)
    questions = tmp_path / "sums.jsonl"
    questions.write_text(
        '{"question": "1 + 1", "choices": ["2", "3"], "answer": 0}\n'
        '{"question": "1 + 2", "choices": ["2", "3"], "answer": 1}\n'
    )
    more: dict[str, Any] = {"ways": {"ste": study.WAYS["ste"]}, "seeds": [0]}
    more |= {"choices": [questions], "rivals": [rival]}
    arguments = (llama_dir, [text_file], heldout_file, out, settings)
    for rivals in (["wanda"], ["ste"], ["one/twin", "two/twin"]):  # one-shot, a way, another rival
        taken = Path(rivals[-1]).name
        with pytest.raises(ValueError, match=f"a rival cannot be called {taken}, a row"):
            study.run(*arguments, **more | {"rivals": [tmp_path / name for name in rivals]})
    result = study.run(*arguments, **more)
    summary = result["summary"]
    assert summary["twin"] == summary["before"]
    assert summary["twin"]["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert summary["ste"]["kl_nats_per_token"] > 1e-6
    assert "sums acc_norm" in (out / "report.md").read_text()
    (row,) = [row for row in result["runs"] if row["seed"] is not None]
    assert (row["way"], row["tokens"]) == ("ste", 4 * 4 * 32)
    assert [point["tokens"] for point in row["curve"]] == [256, 512]
    assert 0 < row["step_s"] < row["cpu_s"]
    assert row["peak_memory_mb"] > 50
    assert json.loads((out / "result.json").read_text()) == result
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    names = {"study.json", "results.jsonl", "result.json", "report.md", "report.png"}
    assert {path.name for path in out.iterdir()} == names  # no weights left

    monkeypatch.setattr(study, "_call", lambda *_: pytest.fail("ran again"))
    assert study.run(*arguments, **more) == result
    with pytest.raises(ValueError, match="holds another study"):
        study.run(*arguments[:4], settings | {"steps": 5}, **more)


@pytest.fixture
def inputs(llama_dir: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A study's inputs in a folder of their own, to be changed, as `study.run` takes them."""
    folder = tmp_path / "inputs"
    for name in ("model", "rival"):
        shutil.copytree(llama_dir, folder / name)
    for name in ("train.txt", "heldout.txt"):
        (folder / name).write_text(f"{text_file.read_text()}{name}\n")
    questions = folder / "sums.jsonl"
    questions.write_text('{"question": "1 + 1", "choices": ["2", "3"], "answer": 0}\n')
    return {
        "model": folder / "model",
        "text_files": [folder / "train.txt"],
        "heldout": folder / "heldout.txt",
        "choices": [questions],
        "rivals": [folder / "rival"],
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Directories that a study measures; nothing is run for it."""
    found = []

    def call(command: str, *arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if command == "oneshot":
            Path(arguments[-1]).mkdir(parents=True)
            return {}, {}
        found.append(arguments[0].name)
        accuracy = dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"), 0.5)
        return {"perplexity": 9.0, "kl_nats_per_token": 0.0, "sums": accuracy}, {}

    monkeypatch.setattr(study, "_call", call)
    return found


def damage(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "model": (lambda of: damage(of["model"]), "sha256.model.model.safetensors is"),
    "text": (lambda of: of["text_files"][0].write_text("other\n"), r"sha256.text\[0\] is"),
    "choices": (
        lambda of: of["choices"][0].write_text(of["choices"][0].read_text() * 2),
        r"sha256.choices\[0\].sha256 is",
    ),
    "rival": (lambda of: damage(of["rivals"][0]), "rivals.rival.model.safetensors is"),
}


no_curves = pytest.mark.filterwarnings("ignore:No artists with labels found to put in legend")


@no_curves
@pytest.mark.parametrize("change", CHANGES)
def test_a_study_of_other_files_by_the_same_names_is_refused(
    change: str, inputs: dict[str, Any], measured: list[str], tmp_path: Path
) -> None:
    alter, message = CHANGES[change]
    common: dict[str, Any] = {"out": tmp_path / "study", "settings": {}, "ways": {}, "seeds": [0]}
    first = study.run(**inputs, **common)
    assert measured == ["model", "pruned", "pruned", "pruned", "rival"]
    assert study.run(**inputs, **common) == first
    alter(inputs)
    with pytest.raises(ValueError, match=f"holds another study .*{message}.*; choose another"):
        study.run(**inputs, **common)
    assert len(measured) == 5


@no_curves
def test_one_shot_prunings_follow_the_common_settings(
    inputs: dict[str, Any], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, call = [], study._call

    def listen(command: str, *arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append([command, *map(str, arguments)])
        return call(command, *arguments)

    monkeypatch.setattr(study, "_call", listen)
    settings = {"zeros": 0.4, "exclude": ["q_proj"]}
    study.run(**inputs, out=tmp_path / "study", settings=settings, ways={}, seeds=[0])
    oneshots = [" ".join(words) for words in asked if words[0] == "oneshot"]
    assert len(oneshots) == 3
    for words in oneshots:
        assert "--zeros 0.4 --exclude q_proj --text" in words


@no_curves
def test_a_study_says_where_each_row_came_from_and_what_was_trained(
    inputs: dict[str, Any], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained is not what a way's name says: the names' settings may change."""
    about = {"config": {"method": "gates"}, "effective": {"is_mask_learnt": False}}
    about["origins"] = [{"step": 0, "precision": "fp32"}]

    def call(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir()
        record = {**about, "gates": {}, "step_s": 0.5, "curve": []}
        (folder / "cast.json").write_text(json.dumps(record))
        keys = ("tokens_seen", "perplexity_hard", "perplexity_soft", "flipped_share")
        return dict.fromkeys(keys, 1.0), {"peak_memory_mb": 1.0}

    call_untrained = study._call
    monkeypatch.setattr(study, "_call", lambda *a: (call if a[0] == "run" else call_untrained)(*a))
    ways = {"fixed mask": study.WAYS["fixed mask"]}
    result = study.run(**inputs, out=tmp_path / "study", settings={}, ways=ways, seeds=[0])
    *untrained, trained = result["runs"]
    assert len(untrained) == 5
    for row in untrained:
        (launch,) = row["origins"]
        assert launch["versions"] == versions()
    assert {key: trained[key] for key in about} == about


@no_curves
def test_a_way_that_fails_does_not_keep_the_others_from_being_measured(
    inputs: dict[str, Any],
    measured: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = []

    def fail_ste(
        model: Path,
        text_files: list[Path],
        heldout: Path,
        out: Path,
        way: str,
        config: Any,
        measure: Any,
    ) -> dict[str, Any]:
        trained.append(way)
        if way == "ste":
            raise study.StudyError("cast-train run ended with 2")
        return ROWS[3] | {"way": way, "seed": config.seed}

    monkeypatch.setattr(study, "_train", fail_ste)
    common: dict[str, Any] = {"out": tmp_path / "study", "settings": {}, "seeds": [0]}
    ways = {name: study.WAYS[name] for name in ("ste", "fixed")}
    for _ in range(2):
        with pytest.raises(study.StudyError, match="ste, seed 0 failed, see above; .*report"):
            study.run(**inputs, **common, ways=ways)
    assert trained == ["ste", "fixed", "ste"]
    assert "study: cast-train run ended with 2" in capsys.readouterr().err
    assert "| fixed |" in (tmp_path / "study/report.md").read_text()


@no_curves
def test_a_row_that_was_cut_off_is_measured_again(
    inputs: dict[str, Any], measured: list[str], tmp_path: Path
) -> None:
    common: dict[str, Any] = {"out": tmp_path / "study", "settings": {}, "ways": {}, "seeds": [0]}
    first = study.run(**inputs, **common)
    rows = tmp_path / "study/results.jsonl"
    rows.write_text(rows.read_text()[:-9])
    again = study.run(**inputs, **common)
    for row in (*first["runs"], *again["runs"]):
        del row["origins"]  # of each when it was measured
    assert again == first
    assert len(measured) == 6
    rows.write_text("no row\n" + rows.read_text())
    with pytest.raises(ValueError, match="results.jsonl is damaged"):
        study.run(**inputs, **common)


def test_a_run_that_was_stopped_stops_the_study(tmp_path: Path) -> None:
    script = tmp_path / "run"
    script.write_text("#!/bin/sh\nexit 130\n")
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        with pytest.raises(StoppedError, match="run the study again to continue"):
            study._call("run")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_the_end_of_its_terminal_stops_a_study_but_under_nohup(
    handler: signal.Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "run"  # it still runs as the study takes the signal
    script.write_text("#!/bin/sh\nkill -HUP $PPID\nsleep 1\necho '{}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    before = signal.signal(signal.SIGHUP, handler)
    try:
        if handler == signal.SIG_IGN:
            assert study._call()[0] == {}
        else:
            with pytest.raises(SystemExit):
                study._call()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def run_until_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cast-train` for `study._call`, which ends at the second SIGTERM."""
    script = tmp_path / "run"
    script.write_text(
        f"#!{sys.executable} -S\n"
        "import os, signal, time\n"
        "signals = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: signals.append(1))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "while not signals: time.sleep(0.01)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "while len(signals) < 2: time.sleep(0.01)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_study_that_is_stopped_twice_waits_for_its_run(
    run_until_asked: None, opened: Opened
) -> None:
    with pytest.raises(SystemExit):
        study._call()
    assert len(opened) == 1
    opened.check_closed()


def test_a_study_that_is_stopped_as_it_starts_a_run_closes_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    script = tmp_path / "run"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    started = subprocess.Popen

    def start_and_stop(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        process = started(*arguments, **more)
        os.kill(os.getpid(), signal.SIGTERM)  # which is taken before `_call` has the process
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_stop)
    with pytest.raises(SystemExit):
        study._call()
    assert len(opened) == 1
    opened.check_closed()


def test_a_study_that_is_stopped_leaves_no_run_behind(tmp_path: Path, opened: Opened) -> None:
    run = tmp_path / "run"
    run.write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 600\n')
    run.chmod(0o755)
    start = f"sys.executable = {str(run)!r}; study._call()"
    code = f"import sys; from benchmarks.studies import study; {start}"
    parent = subprocess.Popen([sys.executable, "-c", code])
    assert opened == [parent]  # which is ended, should this fail
    file = tmp_path / "run.pid"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=60) == 128 + signal.SIGTERM
    pid = int(file.read_text())
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the run outlived the study")
