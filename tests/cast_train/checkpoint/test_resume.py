"""A run that was killed goes on as if it had not been, wherever the kill fell."""

import json
import logging
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from cast_serve.checkpoint.record import CheckpointError, verify
from cast_serve.provenance import machine, versions
from cast_train.checkpoint import models, resume
from cast_train.config import TrainConfig
from cast_train.errors import StoppedError
from cast_train.training.run import train
from cast_train.training.stopping import Checkpoints
from cast_train.training.trainer import CastTrainer
from tests.cast_train.settings import changed


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(settings_file, steps=10)


def assert_same_result(first, second):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    records = [verify(folder) for folder in (first, second)]
    for key in ("quality", "gates", "best_step"):
        assert records[0][key] == records[1][key]


def kill_while_writing(monkeypatch, step, where, run):
    """A kill when `where` of Trainer is reached in the checkpoint of a step."""
    write = getattr(Trainer, where)

    def stop(self, output_dir, *arguments, **more):
        if output_dir.endswith(f"checkpoint-{step}"):
            if where == "save_model":  # in the midst of the weights
                write(self, output_dir, *arguments, **more)
                file = os.path.join(output_dir, "model.safetensors")
                os.truncate(file, os.path.getsize(file) // 2)
            raise KeyboardInterrupt
        return write(self, output_dir, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, stop)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize(
    "where", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]
)
def test_a_checkpoint_that_was_being_written_is_not_gone_on_from(
    where, llama_dir, text_file, config, tmp_path, monkeypatch, begun_at
):
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    kill_while_writing(monkeypatch, 8, where, lambda: train(*arguments))
    assert (tmp_path / "out.partial" / "checkpoint-4").is_dir()
    assert (tmp_path / "out.partial" / "checkpoint-8").is_dir()
    train(*arguments, is_resume=True)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    assert begun_at == [None, "checkpoint-4", None]
    assert_same_result(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_record_says_where_each_launch_of_the_run_came_from(
    llama_dir, text_file, config, tmp_path, monkeypatch, train_until
):
    """Each stamp is of the launch's beginning, so a run that is killed has left its own."""
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    loads = iter([0.5, 7.0, 9.0])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    train_until(6, *arguments)
    killed = json.loads((tmp_path / "out.partial/run.json").read_text())["origins"]
    record = train(*arguments, is_resume=True)
    first, second = record["origins"]
    assert [first] == killed
    assert [launch["step"] for launch in (first, second)] == [0, 4]
    assert [launch["machine"]["load_average"] for launch in (first, second)] == [0.5, 7.0]
    for launch in (first, second):
        assert launch["versions"] == versions()
        assert launch["machine"] == {
            **machine(),
            "load_average": launch["machine"]["load_average"],
        }
        assert launch["num_threads"] == torch.get_num_threads()
        assert launch["precision"] in ("fp32", "bf16")
    assert verify(tmp_path / "out")["origins"] == record["origins"]
    assert train(*arguments)["origins"] == record["origins"]  # there is nothing to launch


def test_a_run_of_an_earlier_release_is_refused(
    llama_dir, text_file, config, tmp_path, train_until
):
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    train_until(6, *arguments)
    path = tmp_path / "out.partial/run.json"
    found = json.loads(path.read_text())
    found["layout"] = "out_features, in_features"  # of all weights
    path.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="begun by an earlier release.* finish it with that"):
        train(*arguments, is_resume=True)


def test_a_second_run_is_kept_out_of_the_first_ones_directory(
    llama_dir, text_file, config, tmp_path
):
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    refused = pytest.raises(CheckpointError, match="another process is working in .*out.partial")
    with resume.held(tmp_path / "out.partial", is_first=True), refused:
        train(*arguments, is_resume=True)
    assert list(tmp_path.iterdir()) == []  # it held nothing
    (tmp_path / "out.partial").mkdir()  # of one that was killed before it began
    assert train(*arguments)["steps"] == 10


def test_what_a_finished_run_could_not_remove_is_removed(llama_dir, text_file, config, tmp_path):
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    train(*arguments)
    record = verify(tmp_path / "out")
    partial = tmp_path / "out.partial"
    (partial / "checkpoint-8").mkdir(parents=True)
    identity = {key: record[key] for key in ("config", "num_processes", "source")}
    identity["layout"] = resume.LAYOUT
    (partial / "run.json").write_text(json.dumps(identity | {"num_processes": 7}))
    train(*arguments)
    assert partial.is_dir()  # of another run
    (partial / "run.json").write_text(json.dumps(identity))
    train(*arguments)
    assert not partial.exists()


def test_if_no_checkpoint_is_complete_the_run_starts(
    llama_dir, text_file, config, tmp_path, monkeypatch, begun_at
):
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    kill_while_writing(monkeypatch, 4, "_save_rng_state", lambda: train(*arguments))
    train(*arguments, is_resume=True)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    assert begun_at == [None, None, None]
    assert_same_result(tmp_path / "out", tmp_path / "whole")


def test_the_best_checkpoint_outlives_a_kill(
    llama_dir, text_file, config, tmp_path, monkeypatch, begun_at
):
    """Of the losses made up for steps 4, 6 and 8 that of 4 is the least."""
    evaluate = CastTrainer.evaluate

    def pretend(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        return metrics | {"eval_loss": {4: 1.0}.get(self.state.global_step, 2.0)}

    monkeypatch.setattr(CastTrainer, "evaluate", pretend)
    config = changed(
        config, steps=8, evaluate_every=2, checkpoint_every=2, keep_best=True, method="ste"
    )
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    kill_while_writing(monkeypatch, 8, "_save_rng_state", lambda: train(*arguments))
    left = {path.name for path in (tmp_path / "out.partial").glob("checkpoint-*")}
    assert left == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}
    record = train(*arguments, is_resume=True)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    assert begun_at == [None, "checkpoint-6", None]
    assert record["best_step"] == 4
    assert_same_result(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("stop_at", "goes_on_from"),
    [(5, "checkpoint-4"), (9, "checkpoint-8"), (None, "checkpoint-10")],
    ids=["at the step that makes it exact", "after it", "after the last step"],
)
@pytest.mark.parametrize(
    "way", [{"method": "ste"}, {"selector": "generator"}, {"method": "adams"}], ids=str
)
def test_the_mask_rests_as_it_was(
    way,
    stop_at,
    goes_on_from,
    llama_dir,
    text_file,
    config,
    tmp_path,
    train_until,
    begun_at,
    monkeypatch,
):
    """Gates that are computed are frozen after step 4, while the weights move on; AdamS's at the
    end."""
    config = changed(
        config,
        **way,
        learning_rate=2e-2,
        tau_end_fraction=0.4,
        hard_fraction=0.4,
        checkpoint_every=2,
        start="magnitude",
    )
    torch.manual_seed(0)  # of the generator's network, as in a process of its own
    whole = train(llama_dir, [text_file], tmp_path / "whole", config)
    written = load_file(tmp_path / "whole" / "model.safetensors")
    if way.get("method") == "ste":  # else the test could not fail
        ranks = [written[f"{name}.weight"].float().abs() for name in whole["targets"]]
        assert any(
            not torch.equal(rank.topk(2).indices, written[f"{name}.gate"].topk(2).indices)
            for rank, name in zip(ranks, whole["targets"], strict=True)
        )
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    torch.manual_seed(0)
    if stop_at is not None:
        train_until(stop_at, *arguments)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "write", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(*arguments)
    if stop_at is None:
        monkeypatch.setattr(CastTrainer, "compute_loss", None)  # all steps are done
    train(*arguments, is_resume=True)
    assert begun_at == [None, None, goes_on_from]
    assert_same_result(tmp_path / "out", tmp_path / "whole")


def interrupt(*_, **__):
    raise KeyboardInterrupt


class Clock:
    """In place of the module time."""

    seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def signalled(monkeypatch):
    """`train`, with signals that arrive while it computes the loss of a step, the first being 0.

    Whatever the tests were started by, or ran before, no signal is ignored: they have Python's own
    handlers.
    """

    def run(step, signals, *arguments):
        compute_loss = CastTrainer.compute_loss

        def send(self, *args, **kwargs):
            if self.state.global_step == step:
                for number in signals:
                    os.kill(os.getpid(), number)
                    time.sleep(0.1)  # until it is handled: two at once would be one
            return compute_loss(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(CastTrainer, "compute_loss", send)
            return train(*arguments)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_step_it_falls_in(
    number, llama_dir, text_file, config, tmp_path, signalled, begun_at, caplog
):
    caplog.set_level(logging.INFO)
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(
        StoppedError, match=r"stopped after step 3 of 10, saved in .*out\.partial; "
    ):
        signalled(2, [number], *arguments)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (tmp_path / "out").exists()
    train(*arguments, is_resume=True)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    assert begun_at == [None, "checkpoint-3", None]
    assert "resuming after step 3 of 10" in caplog.text
    assert_same_result(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_as_under_nohup_stops_nothing(
    number, llama_dir, text_file, config, tmp_path, signalled
):
    signal.signal(number, signal.SIG_IGN)
    record = signalled(2, [number], llama_dir, [text_file], tmp_path / "out", config)
    assert record["steps"] == 10


def test_a_second_signal_ends_at_once(llama_dir, text_file, config, tmp_path, signalled, begun_at):
    arguments = (llama_dir, [text_file], tmp_path / "out", config)
    with pytest.raises(KeyboardInterrupt):
        signalled(6, [signal.SIGINT] * 2, *arguments)
    train(*arguments, is_resume=True)
    assert begun_at == [None, "checkpoint-4"]


def test_a_signal_in_the_last_step_does_not_keep_it_from_ending(
    llama_dir, text_file, config, tmp_path, signalled
):
    record = signalled(9, [signal.SIGINT], llama_dir, [text_file], tmp_path / "out", config)
    assert record["steps"] == 10
    assert (tmp_path / "out").is_dir()


def test_by_default_checkpoints_come_by_time(llama_dir, text_file, config, tmp_path, monkeypatch):
    """On a clock on which every step takes 25 minutes."""
    saved = []
    on_save = Checkpoints.on_save

    def remember(self, args, state, control, **kwargs):
        saved.append(state.global_step)
        on_save(self, args, state, control, **kwargs)

    monkeypatch.setattr(Checkpoints, "on_save", remember)
    clock = Clock()
    monkeypatch.setattr("cast_train.training.stopping.time", clock)
    compute_loss = CastTrainer.compute_loss

    def slowly(self, *args, **kwargs):
        clock.seconds += 25 * 60
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(CastTrainer, "compute_loss", slowly)
    config = changed(config, steps=5, checkpoint_every=0, checkpoint_minutes=40)
    train(llama_dir, [text_file], tmp_path / "out", config)
    assert saved == [2, 4, 5]


def test_a_run_that_the_disk_cannot_hold_does_not_begin(
    llama_dir, text_file, config, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("cast_serve.checkpoint.record.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"for 2 checkpoints of this model, but 0\.0 GB are"):
        train(llama_dir, [text_file], tmp_path / "out", config)
    assert not list(tmp_path.iterdir())
