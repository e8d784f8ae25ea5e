import argparse
import os
from pathlib import Path

import pytest
import torch

from cast_serve.checkpoint.convert import convert
from cast_serve.engine import worker
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama


@pytest.mark.parametrize(
    ("cores", "given", "backend", "threads"),
    [
        ([2, 3], {}, "uni", "2"),
        (None, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "4"}, "uni", "4"),
        (None, {}, None, None),  # vLLM binds threads
        (None, {"VLLM_CPU_OMP_THREADS_BIND": "0-3"}, None, None),
    ],
)
def test_the_engine_computes_itself_where_its_threads_are_known(
    monkeypatch: pytest.MonkeyPatch,
    cores: list[int] | None,
    given: dict[str, str],
    backend: str | None,
    threads: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "environ", dict(given))
    args = argparse.Namespace(distributed_executor_backend=None)
    worker.compute_in_engine(args, cores)
    assert args.distributed_executor_backend == backend
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert os.environ.get("GOMP_CPU_AFFINITY") == ("2 3" if cores else None)
    assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == ("0" if backend else None)


def test_the_users_executor_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "environ", {})
    args = argparse.Namespace(distributed_executor_backend="mp")
    worker.compute_in_engine(args, [0])
    assert args.distributed_executor_backend == "mp"
    assert not os.environ


@pytest.mark.parametrize(
    ("name", "ours", "users"),
    [
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "glibc.malloc.check=1"),
        ("VLLM_USE_AOT_COMPILE", "0", "1"),
    ],
)
def test_defaults_of_the_environment_are_for_cpus_and_yield_to_the_users(
    monkeypatch: pytest.MonkeyPatch, name: str, ours: str, users: str
) -> None:
    for has_gpu, given, expected in (
        (False, {}, ours),
        (False, {name: users}, users),
        (True, {}, None),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        monkeypatch.setattr(os, "environ", dict(given))
        worker.set_cpu_defaults()
        assert os.environ.get(name) == expected


def test_a_flag_given_by_the_user_replaces_ours() -> None:
    given = ["--kv_cache_memory_bytes=5", "--port", "1"]
    flags = worker.all_flags(Path("m"), "sparse", "127.0.0.1", 8001, given)
    assert flags[-3:] == given
    assert "--kv-cache-memory-bytes" not in flags
    assert flags.count("--port") == 1
    assert flags[flags.index("--served-model-name") + 1] == "sparse"


def test_flags_of_a_file_replace_ours(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("kv-cache-memory-bytes: 8G\nmax_num_batched_tokens: 4096\nport: 1\n")
    for given in (["--config", str(file)], [f"--config={file}"]):
        flags = worker.all_flags(Path("m"), "sparse", "127.0.0.1", 8001, given)
        assert not {"--kv-cache-memory-bytes", "--max-num-batched-tokens"} & set(flags)
        assert flags[flags.index("--port") + 1] == "8001"  # which the gateway asks
        assert flags[-2:] == ["--config", str(file)]
    missing = ["--config", str(tmp_path / "missing.yaml")]
    assert "--port" in worker.all_flags(Path("m"), "sparse", "127.0.0.1", 8001, missing)


def test_a_share_of_the_gpus_memory_is_not_overridden() -> None:
    given = ["--gpu-memory-utilization", "0.9"]
    flags = worker.all_flags(Path("m"), "sparse", "127.0.0.1", 8001, given)
    assert "--kv-cache-memory-bytes" not in flags


@pytest.mark.parametrize("given", [[], ["--quantization", "compressed-tensors"]])
def test_stored_zeros_are_asked_for_unless_the_user_asks_otherwise(given: list[str]) -> None:
    flags = worker.all_flags(Path("m"), "sparse", "127.0.0.1", 8001, given, "cast_sparse24")
    assert flags.count("--quantization") == 1
    expected = given[-1] if given else "cast_sparse24"
    assert flags[flags.index("--quantization") + 1] == expected


def test_a_gated_directory_is_to_be_converted(save_gated: Save) -> None:
    folder = save_gated(tiny_llama())
    with pytest.raises(ValueError, match="is gated: convert it first .*cast-serve convert .*OUT"):
        worker.run(folder, "sparse")


def test_no_lora_is_put_on_sparse_linears(save_gated: Save, tmp_path: Path) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "out")
    with pytest.raises(
        ValueError, match="--enable-lora: vLLM cannot apply LoRA to the sparse linears of"
    ):
        worker.run(tmp_path / "out", "sparse", vllm_flags=["--enable-lora"])


def test_stored_zeros_are_said_to_be_served_dense(
    save_gated: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop() -> None:
        raise InterruptedError("before it serves")

    convert(save_gated(tiny_llama()), tmp_path / "out", tmp_path / "twin")
    monkeypatch.setattr(worker, "_end_with_parent", stop)
    with pytest.raises(InterruptedError):
        worker.run(tmp_path / "twin", "sparse")
    assert "twin stores its zeros, so it is served dense; convert" in capsys.readouterr().err


def test_a_draft_is_checked_before_vllm_starts(save_gated: Save, tmp_path: Path) -> None:
    model, gated = tmp_path / "model", save_gated(tiny_llama())
    tiny_llama().save_pretrained(model)
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "other")
    for draft, message in (
        (tmp_path / "gone", r"--draft: .*gone is neither a directory nor a model's name"),
        (tmp_path, "--draft: .* holds no model"),
        (gated, "--draft: .* is gated: convert it first"),
        (tmp_path / "other", r"other has a vocabulary of 64 tokens, but .*model has 96; name a"),
    ):
        with pytest.raises(ValueError, match=message):
            worker.run(model, "lossless", draft=draft)
    with pytest.raises(ValueError, match="--draft-tokens 2 has no effect without --draft"):
        worker.run(model, "lossless", draft_tokens=2)
    with pytest.raises(ValueError, match="--draft-requests 1 has no effect without --draft"):
        worker.run(model, "lossless", draft_requests=1)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        worker.run(tmp_path, "sparse")


def test_a_cpu_worker_without_a_compiler_is_known_before_vllm_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert worker.lacks_compiler(["--enforce-eager"])
    with pytest.raises(ValueError, match=r"--no-enforce-eager .* 'g\+\+', which was not found"):
        worker.lacks_compiler(["--no-enforce-eager"])
    (tmp_path / "g++").touch(0o755)
    assert not worker.lacks_compiler(["--no-enforce-eager"])
    monkeypatch.setenv("CXX", "clang++")
    assert worker.lacks_compiler([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not worker.lacks_compiler(["--no-enforce-eager"])
