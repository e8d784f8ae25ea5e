"""A dense model + text -> every way of learning the pattern, at equal tokens and seeds, compared.

Each run is a `cast-train run` in a process of its own, so that its time and memory can be measured.
Its figures go to OUT/results.jsonl as soon as it ends, and its weights are removed. A study that
was stopped continues with the next run. At the end it writes

result.json    all figures, and their summary
report.md      the table
report.png     perplexity against tokens; for every way the last perplexities, the recovered share
               of the gap, step time and memory
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies import report
from cast_serve.checkpoint import hub
from cast_serve.errors import CheckpointError, FailedError, UsageError
from cast_train.checkpoint import identity
from cast_train.config import Gates, TrainConfig, of_method, parse_assignments
from cast_train.errors import StoppedError
from cast_train.evaluate.choices import check_names
from cast_train.origin import origin
from cast_train.pruning import oneshot
from loadtest.report.directory import check_matplotlib

# Name -> what it changes in the study's common settings.
# The baselines are undistilled, as published; to compare ste with soft_topk at equal distillation,
# use "ste distillation_weight=0.9". "fixed mask" solves no weights, other than the method `fixed`.
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "distillation_weight": 0.0},
    "fixed": {"method": "fixed"},
    "fixed mask": {
        "method": "gates",
        "start": "wanda",
        "hard_fraction": 0.0,
        "tau_end_fraction": 0.0,
        "blend_end_fraction": 0.0,
        "distillation_weight": 0.0,
    },
    "ste": {"method": "ste", "distillation_weight": 0.0},
    "soft_topk": {"method": "gates"},
    "gumbel": {"method": "gates", "selector": "gumbel"},
    "penalty": {
        "method": "gates",
        "selector": "penalty",
        "gate_learning_rate": 0.1,
        "hard_fraction": 0.5,
        "tau_end_fraction": 0.45,
    },
    "generator": {"method": "gates", "selector": "generator"},
    "adams": {"method": "adams", "scale_parts": 2, "distillation_weight": 0.33},
}


STOPPED = 130  # exit of a run that saved itself, see __main__.py


class StudyError(FailedError):
    """A run of the study failed."""


def ways_of(text: str | None) -> dict[str, dict[str, Any]]:
    """Parses ``ste;soft_topk;soft_topk start=magnitude``; None: all of WAYS.

    Returns:
        what each way changes in the common settings, by the way's text.

    Raises:
        ValueError: naming the known ones.
    """
    ways = {}
    for way in WAYS if text is None else (part.strip() for part in text.split(";")):
        words = way.split()
        name = " ".join(word for word in words if "=" not in word)
        if name not in WAYS:
            raise UsageError(
                f"--ways has {name!r}; choose from {'; '.join(WAYS)}, each with "
                "KEY=VALUE after it for any setting of the run"
            )
        ways[way] = WAYS[name] | parse_assignments([word for word in words if "=" in word])
    return ways


def run(
    model: Path,
    text_files: Sequence[Path],
    heldout: Path,
    out: Path,
    settings: Mapping[str, Any],
    ways: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    choices: Sequence[Path] = (),
    rivals: Sequence[Path] = (),
) -> dict[str, Any]:
    """Runs what is not in OUT/results.jsonl yet, and writes the report over all runs.

    Args:
        model: dense HF directory, or its name on a hub.
        text_files: training text, UTF-8.
        heldout: text to measure on.
        out: directory; may hold an unfinished study of the same settings and files, see
            identity.py. Ways, seeds and rivals may be added to it.
        settings: of TrainConfig, common to all ways.
        ways: what each changes in the settings, see `ways_of`.
        seeds: each way runs once per seed.
        choices: questions, JSONL, that every model answers; with any, KL to the dense model too.
        rivals: directories that other tools pruned, measured beside ours under their names.

    Raises:
        ValueError: for a wrong setting or name.
        CheckpointError: if out holds another study; it names what differs.
        StudyError: if runs fail, once the others are done and the report is written over them.
        StoppedError: if a run was stopped; the finished ones are kept.
    """
    # A way may name another method; one-shot pruning, measured beside, reorders nothing.
    settings = {"method": "gates", "channel_order": "given", **settings}
    configs = {
        (way, seed): TrainConfig.from_dict({**_common(settings, changes), **changes, "seed": seed})
        for way, changes in ways.items()
        for seed in seeds
    }
    if any(config.include for config in configs.values()):
        raise UsageError(
            "a study takes no include, which the one-shot prunings that it compares with do not "
            "support; exclude the other linears"
        )
    if any(config.is_sharded for config in configs.values()):
        raise UsageError("a study's runs are of one process each; set is_sharded to false")
    check_names(choices)
    taken = {"before", *oneshot.METHODS, *ways}
    for rival in rivals:
        if rival.name in taken:
            raise UsageError(f"a rival cannot be called {rival.name}, a row of its own; rename it")
        taken.add(rival.name)
    check_matplotlib()
    model = hub.fetch(model)
    source: dict[str, Any] = {
        "text": [identity.of_file(path) for path in text_files],
        "heldout": identity.of_file(heldout),
    }
    identity.check_texts(source)
    names = {
        "model": hub.name_of(model),
        "text": [text["name"] for text in source["text"]],
        "heldout": source["heldout"]["name"],
        "settings": dict(settings),
    }
    hashes = {
        "model": identity.of_directory(model),
        "text": [text["sha256"] for text in source["text"]],
        "heldout": source["heldout"]["sha256"],
        "choices": [identity.of_file(path) for path in choices],
    }
    _check_identity(out, {**names, "sha256": hashes}, rivals)
    done = {(row["way"], row["seed"]): row for row in _read_rows(out)}
    measure = _Measure(model, heldout, choices, settings)
    failed: list[str] = []
    for name in ("before", *oneshot.METHODS, *(rival.name for rival in rivals)):
        if (name, None) not in done:
            row = {"way": name, "seed": None, "origins": [origin()]}
            row |= _measure_untrained(name, text_files, out, measure, rivals)
            done[name, None] = _append(out, row)
    for number, ((way, seed), config) in enumerate(configs.items(), 1):
        if (way, seed) not in done:
            print(f"study: run {number} of {len(configs)}: {way}, seed {seed}", flush=True)
            try:
                row = _train(model, text_files, heldout, out, way, config, measure)
            except StudyError as error:
                print(f"study: {error}", file=sys.stderr, flush=True)
                failed.append(f"{way}, seed {seed}")
                continue
            done[way, seed] = _append(out, row)
    result = {
        **names,
        "runs": list(done.values()),
        "summary": report.summarise(list(done.values())),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(report.table_of(result), encoding="utf-8")
    report.draw(out / "report.png", result)
    if failed:
        raise StudyError(
            f"{'; '.join(failed)} failed, see above; {out}/report.md has the others. Run the "
            "study again to repeat what failed"
        )
    return result


def _check_identity(out: Path, wanted: Mapping[str, Any], rivals: Sequence[Path]) -> None:
    """Refuses another study's directory; writes study.json, with the rivals of all calls."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.json"
    found: dict[str, Any] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    elif any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no study; choose another --out")
    known = found.get("rivals", {})
    new = {rival.name: identity.of_directory(rival) for rival in rivals}
    if found:
        again = {name: files for name, files in new.items() if name in known}
        remedy = "choose another --out or remove it"
        identity.check(
            {**found, "rivals": {name: known[name] for name in again}},
            {**wanted, "rivals": again},
            f"{out} holds another study",
            remedy,
        )
    text = json.dumps({**wanted, "rivals": known | new}, indent=2) + "\n"
    partial = path.with_name(path.name + ".writing")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def _read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows that are whole: a full disk or a kill may have left part of the last, which goes."""
    path = out / "results.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove the line") from error


def _append(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _call(*arguments: object) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs `cast-train`: its last line, and what it took.

    CPU seconds are those of all threads, also while they wait for each other: compare them where
    OMP_WAIT_POLICY is passive. A run that went on from a checkpoint has those of its last process.
    """
    command = [sys.executable, "-m", "cast_train", *map(str, arguments)]
    began = time.monotonic()
    process: subprocess.Popen[str] | None = None
    is_stopped = False

    def stop(*_: object) -> None:
        nonlocal is_stopped
        is_asked_again, is_stopped = is_stopped, True
        if process is None:
            return  # see below: an exception inside Popen would leave its process
        if is_asked_again:
            process.terminate()  # the run ends unsaved, and is waited for below
        else:
            sys.exit(128 + signal.SIGTERM)

    handlers = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # nohup: it outlives its terminal
    }
    try:
        # In a group of its own, so that Ctrl-C, or the end of the terminal, reaches it once, by
        # `terminate` below: a run takes the second signal for leave to end unsaved.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
        if is_stopped:
            sys.exit(128 + signal.SIGTERM)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        if process is not None:
            process.terminate()  # a study that is stopped leaves no run behind
            process.wait()
        raise
    finally:
        if process is not None and process.stdout is not None:
            process.stdout.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == STOPPED or process.returncode < 0:  # by a signal
        raise StoppedError(
            f"{' '.join(command)} was stopped ({process.returncode}); run the study again to "
            "continue"
        )
    if process.returncode:
        raise StudyError(f"{' '.join(command)} ended with {process.returncode}")
    took = {
        "elapsed_s": time.monotonic() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_memory_mb": usage.ru_maxrss / 1024,
    }
    return json.loads(printed.splitlines()[-1]), took


def _common(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all ways that a way's method has."""
    return of_method({**settings, "method": changes.get("method", settings["method"])})


@dataclass(frozen=True)
class _Measure:
    """`cast-train eval` as the study calls it."""

    model: Path
    heldout: Path
    choices: Sequence[Path]
    settings: Mapping[str, Any]

    @property
    def config(self) -> Gates:
        """What all ways have in common; models that are not trained have no method of their own."""
        config = TrainConfig.from_dict(of_method({**self.settings, "method": "gates"}))
        assert isinstance(config, Gates)
        return config

    def __call__(self, directory: Path) -> dict[str, Any]:
        """The directory's perplexity and, if there are choices, its KL and accuracies."""
        config = self.config
        tokens = config.heldout_blocks * config.block_size
        command: list[object] = ["eval", directory, "--text", self.heldout]
        command += ["--context", config.block_size, "--tokens", tokens]
        if self.choices:
            command += ["--reference", self.model]
            for path in self.choices:
                command += ["--choices", path]
        found, _ = _call(*command)
        figures: dict[str, Any] = {
            "perplexity": found.get("perplexity_hard", found.get("perplexity"))
        }
        if self.choices:
            figures["kl_nats_per_token"] = found["kl_nats_per_token"]
            figures["choices"] = {path.stem: found[path.stem] for path in self.choices}
        return figures


def _measure_untrained(
    name: str, text_files: Sequence[Path], out: Path, measure: _Measure, rivals: Sequence[Path]
) -> dict[str, Any]:
    """Measures the dense model ("before"), a one-shot pruning of it, or a rival."""
    if name == "before":
        return measure(measure.model)
    if name not in oneshot.METHODS:
        return measure(next(rival for rival in rivals if rival.name == name))
    folder = out / "pruned"
    shutil.rmtree(folder, ignore_errors=True)
    config = measure.config
    command: list[object] = ["oneshot", "--model", measure.model, "--method", name]
    command += ["--sparsity", config.sparsity, "--zeros", config.zeros]
    for expression in config.exclude:
        command += ["--exclude", expression]
    if name != "magnitude" or config.zeros != 1:
        command += ["--text", *text_files]
    _call(*command, "--out", folder)
    figures = measure(folder)
    shutil.rmtree(folder)
    return figures


def _train(
    model: Path,
    text_files: Sequence[Path],
    heldout: Path,
    out: Path,
    way: str,
    config: TrainConfig,
    measure: _Measure,
) -> dict[str, Any]:
    folder = out / f"{re.sub('[^a-z0-9_.]+', '-', way)}-{config.seed}"
    settings = folder.with_name(folder.name + ".toml")
    lines = [f"{key} = {_in_toml(value)}\n" for key, value in config.as_dict().items()]
    settings.write_text("".join(lines), encoding="utf-8")
    command: list[object] = ["run", "--model", model, "--text", *text_files, "--heldout", heldout]
    command += ["--config", settings, "--out", folder, "--resume"]
    figures, took = _call(*command)
    record = json.loads((folder / "cast.json").read_text(encoding="utf-8"))
    answers = measure(folder) if measure.choices else {}
    shutil.rmtree(folder)
    settings.unlink()
    gates = record["gates"]
    return {
        **answers,
        **{key: gates[key] for key in ("reach", "mean_gap") if key in gates},
        "way": way,
        "seed": config.seed,
        "tokens": figures["tokens_seen"],
        "perplexity": figures["perplexity_hard"],
        "perplexity_soft": figures["perplexity_soft"],
        "flipped_share": figures["flipped_share"],
        "step_s": record["step_s"],
        **took,
        "curve": record["curve"],
        **{key: record[key] for key in ("config", "effective", "origins")},
    }


def _in_toml(value: Any) -> str:
    """A setting; TOML writes texts, numbers and lists as JSON does, but infinity otherwise."""
    return "inf" if value == math.inf else json.dumps(value, ensure_ascii=False)
