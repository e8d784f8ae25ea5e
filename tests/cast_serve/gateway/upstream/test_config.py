import re
from pathlib import Path
from typing import get_args

import pytest

from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.config import PATHS, check_name, read_config, settings_of

ROOT = Path(__file__).parents[4]


def test_the_documentations_example_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.+?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    (tmp_path / "serve.toml").write_text(example)
    for name in ("dense", "sparse"):
        (tmp_path / "models" / name).mkdir(parents=True)
    config = read_config(tmp_path / "serve.toml")
    settings = settings_of(config.gateway, {}, [])
    assert (settings.port, settings.max_queued) == (8000, 64)
    assert settings.log_dir == tmp_path / "logs"
    dense, sparse = config.variant["dense"], config.variant["sparse"]
    assert (dense.dir, dense.cores, dense.port) == (tmp_path / "models/dense", "0", None)
    assert dense.vllm == ("--max-model-len", "2048")
    assert (sparse.dir, sparse.cores, sparse.port) == (tmp_path / "models/sparse", None, 8011)
    other = config.variant["llama"]
    assert (other.dir, other.command[0], "{port}" in other.command) == (None, "llama-server", True)


def test_a_draft_lies_beside_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text("[variant.a]\ndir = 'x'\ndraft = 'y'\ndraft_tokens = 16\n")
    found = read_config(tmp_path / "serve.toml").variant["a"]
    assert (found.dir, found.draft, found.draft_tokens) == (tmp_path / "x", tmp_path / "y", 16)


def test_every_path_may_be_relative_to_the_file() -> None:
    fields = GatewaySettings.model_fields.items()
    assert set(PATHS) == {name for name, field in fields if Path in get_args(field.annotation)}


def test_what_is_no_directory_beside_the_file_may_be_a_hubs_name(tmp_path: Path) -> None:
    (tmp_path / "org/here").mkdir(parents=True)
    names = ("org/here", "org/there@v1", "/org/there", "there")
    tables = (f"[variant.v{i}]\ndir = '{name}'\n" for i, name in enumerate(names))
    (tmp_path / "serve.toml").write_text("".join(tables))
    found = [worker.dir for worker in read_config(tmp_path / "serve.toml").variant.values()]
    beside = [tmp_path / "org/here", Path("org/there@v1"), Path("/org/there"), tmp_path / "there"]
    assert found == beside


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[variants.a]\ndir = 'x'", "unknown key variants; the nearest is variant"),
        ("[variant.a]\ndirr = 'x'", r", \[variant.a\]: unknown key dirr; .* dir$"),
        ("[variant.a]\ndir = 'x'\ncore = '0'", r"\[variant.a\]: unknown key core; .* is cores"),
        ("[variant.a]\ncommand = 'x'", r"\[variant.a\]: command is 'x': it must be a .*list"),
        ("[variant.a]\ndir = 'x'\ncores = 'all'", "cores is 'all': .*is not a list of CPU ids"),
        (
            "[variant.a]\ndir = 'x'\nvllm = '--seed 3'",
            "vllm is '--seed 3': it must be a .*list",
        ),
        ("[variant.a]\ndir = 'x'\ndraft_tokens = 17", "draft_tokens is 17: it must be less than"),
        ("[variant.a]\ndir = 'x'\ndraft_requests = 0", "draft_requests is 0: it must be greater"),
        ("[variant.a]\ndir = 'x'\nport = 0", "port is 0: it must be greater than or equal to 1"),
        ("[variant]\na = 'x'", r"\[variant\]: a is 'x': it must be"),
        ("[gateway]\nmax_queue = 1", r"\[gateway\]: unknown key max_queue; .* is max_queued"),
        ("[gateway]\nzzz = 1", r"unknown key zzz; there are host, port, "),
        ("gateway = 1", "gateway is 1: it must be a valid dictionary"),
        ("[variant.a", "cannot be read"),
        ("[variant.'稀疏']\ndir = 'x'", r"\[variant.稀疏\]: '稀疏' cannot be"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "serve.toml")


@pytest.mark.parametrize("name", ["稀疏", "a\r\nb", " a", "a ", "", "\x7f"])
def test_a_name_that_no_header_can_carry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"here: {name!r} cannot be")):
        check_name(name, "here")


def test_other_names_are_taken() -> None:
    for name in ("dense", "a/b", "légère", "2:4 int8"):
        check_name(name, "here")


def test_a_wrong_value_of_the_gateway_is_named(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text("[gateway]\nport = 0\napi_keys_file = 3\n")
    given = read_config(tmp_path / "serve.toml").gateway
    with pytest.raises(ValueError, match=r"\[gateway\] port of --config is 0: Input should be"):
        settings_of(given, {}, [])
    with pytest.raises(ValueError, match=r"\[gateway\] api_keys_file of --config is 3: "):
        settings_of(given, {"port": 1}, [])
    with pytest.raises(ValueError, match="--set port is '70000': Input should be less"):
        settings_of(given, {"port": 1}, ["port=2", "port=70000"])
