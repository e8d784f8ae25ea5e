"""What we use of vLLM, and what is said of a vLLM that is another."""

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

from cast_serve.checkpoint.convert import convert
from cast_serve.engine import interfaces, worker
from cast_serve.engine.interfaces import PLUGIN, SERVER, Used, differences
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ENGINE = Path(interfaces.__file__).parent
OF_THE_SERVER = {"worker", "draft", "resting", "sampling", "warmup", "vllm_cli", "report"}
OF_THE_PLUGIN = {path.stem for path in ENGINE.glob("*.py")} - OF_THE_SERVER | {"report"}


def test_the_vllm_that_we_are_tested_with_has_all() -> None:
    assert differences((*PLUGIN, *SERVER)) == []


@pytest.mark.parametrize(("listed", "modules"), [(PLUGIN, OF_THE_PLUGIN), (SERVER, OF_THE_SERVER)])
def test_every_import_is_listed(listed: Sequence[Used], modules: set[str]) -> None:
    imported = {
        f"{node.module}.{alias.name}"
        for path in ENGINE.glob("*.py")
        if path.stem in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm"
        for alias in node.names
    }
    assert len(imported) > 10
    assert imported <= {str(each) for each in listed}


@pytest.mark.parametrize(
    ("used", "message"),
    [
        (Used("vllm.nowhere", "f"), r"vllm\.nowhere\.f is missing"),
        (Used("vllm.inputs", "nothing"), r"vllm\.inputs\.nothing is missing"),
        (Used("vllm.inputs", "tokens_input", given=("nothing",)), "takes other arguments"),
        (Used("vllm.inputs", "tokens_input", given=(9,)), "takes other arguments"),
        (
            Used("vllm.inputs", "tokens_input", parameters=("a",)),
            r"tokens_input\(.*\) is not \(a\)",
        ),
        (
            Used(
                "vllm.model_executor.layers.linear", "LinearBase", sets=("output_size", "nothing")
            ),
            "LinearBase has no nothing",
        ),
    ],
)
def test_a_difference_is_named(used: Used, message: str) -> None:
    found = differences([used])
    assert len(found) == 1
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(found[0])


def test_an_attribute_may_be_set_outside_of_init(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    set_up = LinearBase.__init__
    monkeypatch.setattr(LinearBase, "__init__", lambda self, *sizes: set_up(self, *sizes))
    assert differences([Used(LinearBase.__module__, "LinearBase", sets=("input_size",))]) == []


def test_a_worker_on_another_server_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(worker, "count_sparse", lambda model: (0, False))
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setattr(worker, "SERVER", (Used("vllm.nowhere", "main"),))
    monkeypatch.setattr(
        worker, "PLUGIN", (Used("vllm.nowhere", "Linear"),)
    )  # of sparse models alone
    with pytest.raises(ValueError, match=r"^this worker .*nowhere\.main is missing .*vllm serve"):
        worker.run(tmp_path, "dense")


def test_a_sparse_directory_is_refused_before_vllm_starts(
    monkeypatch: pytest.MonkeyPatch, save_pruned: Save, tmp_path: Path
) -> None:
    convert(save_pruned(tiny_llama()), tmp_path / "sparse")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setattr(interfaces, "PLUGIN", (Used("vllm.nowhere", "Linear"),))
    monkeypatch.setattr(worker, "PLUGIN", interfaces.PLUGIN, raising=False)
    with pytest.raises(ValueError, match=r"sparse is sparse and cannot be served: .*") as caught:
        worker.run(tmp_path / "sparse", "sparse")
    text = str(caught.value)
    assert f"cast-serve's plugin was written for vLLM {interfaces.TESTED}; " in text
    assert "vllm.nowhere.Linear is missing" in text
    assert f"pip install vllm=={interfaces.TESTED}.0" in text
