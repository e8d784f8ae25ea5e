"""cast-serve on the command line: a user's mistake is one line on stderr and exit 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cast_serve import __main__ as cli
from cast_serve.errors import FailedError, UsageError
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.control import default_path
from cast_serve.gateway.upstream.replica import Variant
from cast_serve.ports import free_port
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama
from tests.fake_hub import TOKEN, FakeHub

Call = Callable[..., tuple[int, str, str]]  # exit status, stdout, stderr


@pytest.fixture
def cast_serve(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["cast-serve", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_convert_then_inspect(cast_serve: Call, save_gated: Save, tmp_path: Path) -> None:
    code, out, _ = cast_serve("convert", save_gated(tiny_llama()), tmp_path / "out")
    assert code == 0
    converted = json.loads(out.splitlines()[-1])
    code, out, err = cast_serve("inspect", tmp_path / "out")
    assert (code, json.loads(out.splitlines()[-1])) == (0, converted)
    assert "14 sparse and 1 dense linear layers" in err


def test_convert_quantises(cast_serve: Call, save_gated: Save, tmp_path: Path) -> None:
    words = ["convert", save_gated(tiny_llama()), tmp_path / "out", "--quantize", "int8"]
    code, out, err = cast_serve(*words)
    assert code == 0
    converted = json.loads(out.splitlines()[-1])
    assert (converted["quantized"], converted["head"]) == ("int8", "int8")
    assert "bits per weight), int8 values and an int8 head" in err
    for same in ([], ["--head", "int8"]):
        assert cast_serve(*words, *same, "--resume")[0] == 0
    code, out, err = cast_serve(*words, "--head", "none", "--resume")
    assert (code, out, "with --head int8, but none is asked for" in err) == (2, "", True)


def test_convert_leaves_the_head_alone_if_told(
    cast_serve: Call, save_gated: Save, tmp_path: Path
) -> None:
    words = ["convert", save_gated(tiny_llama()), tmp_path / "out", "--quantize", "int8"]
    code, out, _ = cast_serve(*words, "--head", "none")
    converted = json.loads(out.splitlines()[-1])
    assert (code, converted["quantized"], converted["head"]) == (0, "int8", None)


def test_convert_puts_the_head_into_4_bits(
    cast_serve: Call, save_gated: Save, tmp_path: Path
) -> None:
    words = ["convert", save_gated(tiny_llama(64)), tmp_path / "out", "--quantize", "int8"]
    words += ["--head", "int4"]
    code, out, err = cast_serve(*words)
    assert (code, out, "64 is not a multiple of --scale-group 128" in err) == (2, "", True)
    words += ["--scale-group", "64"]
    code, out, err = cast_serve(*words)
    converted = json.loads(out.splitlines()[-1])
    assert (code, converted["quantized"], converted["head"]) == (0, "int8", "int4")
    assert "int8 values and an int4 head" in err
    assert cast_serve(*words, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantize", "int2"], "'int2' is not one of 'int8', 'int4'"),
        (["--quantize", "int8", "--scale-group", "64"], "--scale-group 64 is not served"),
        (["--quantize", "int8", "--head", "bf16"], "'bf16' is not one of 'int8', 'int4', 'none'"),
        (["--head", "int8"], "--head int8 needs --quantize int8"),
        (["--head", "int4"], "--head int4 needs --quantize int8"),
    ],
)
def test_quantisation_that_there_is_not(
    flags: list[str], message: str, cast_serve: Call, save_gated: Save, tmp_path: Path
) -> None:
    code, out, err = cast_serve("convert", save_gated(tiny_llama()), tmp_path / "out", *flags)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_conversion_is_kept_if_it_is_of_the_same_source(
    cast_serve: Call, save_gated: Save, tmp_path: Path
) -> None:
    words = ("convert", save_gated(tiny_llama()), tmp_path / "out")
    twin = ("--dense-twin", tmp_path / "twin")
    code, first, _ = cast_serve(*words, *twin)
    assert code == 0
    written = (tmp_path / "out/cast.json").stat().st_mtime_ns
    assert cast_serve(*words, *twin, "--resume")[:2] == (0, first)
    assert (tmp_path / "out/cast.json").stat().st_mtime_ns == written
    code, out, err = cast_serve(*words)
    assert (code, out, "out exists already" in err) == (2, "", True)
    shutil.rmtree(tmp_path / "twin")
    assert cast_serve(*words, *twin, "--resume")[:2] == (2, "")  # one of the two is missing
    model = tiny_llama()
    torch.manual_seed(1)
    save_gated(model)  # trained anew: other gates under the same name
    code, out, err = cast_serve(*words, "--resume")
    assert (code, out, "was not converted from what" in err) == (2, "", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere"], "nowhere holds no model"),
        (
            ["convert", "nowhere", "out"],
            "nowhere is neither a directory nor a model's name on a hub",
        ),
        (
            ["convert", "org/nowhere", "out"],
            "org/nowhere is not a directory here, and it is not in",
        ),
        (["convert", ".", "out", "--private"], "--private needs --push-to-hub ORG/NAME"),
        (["convert", ".", "out", "--dense-twin", "out"], "out cannot be its own dense twin"),
        (["convert", ".", "out", "--dense-twin", "out/twin"], "out/twin is inside out; name a"),
        (["worker", "nowhere", "--name", "x"], "nowhere is neither a directory nor a model's name"),
        (["worker", "nowhere", "--name", "x", "--cores", "a"], "'a' is not a list of CPU ids"),
        (["worker", "nowhere", "--name", "x", "--cores", "4096"], "cores 4096 are not available"),
        (["worker", "nowhere", "--name", "x", "--cores", "0-99999999999"], "are not available"),
        (["worker", "nowhere", "--name", "x", "--cores", "1-0"], "cores 1-0 are not available"),
        (
            ["worker", "nowhere", "--name", "x", "--draft", "x", "--draft-tokens", "17"],
            "should be less than or equal to 16",
        ),
        (
            ["worker", "nowhere", "--name", "x", "--draft", "x", "--draft-requests", "0"],
            "should be greater than or equal to 1",
        ),
        (["up"], "nothing to serve; give --variant NAME=DIR, or --config FILE"),
        (["up", "--config", "gone.toml"], "--config gone.toml cannot be read"),
        (
            ["gateway", "--variant", "a=http://x", "--set", "max_queue=1"],
            "--set: unknown key max_queue; the nearest is max_queued",
        ),
        (
            ["gateway", "--variant", "a=http://x", "--set", "max_queued=many"],
            "--set max_queued is 'many': Input should be a valid integer",
        ),
        (
            ["gateway", "--variant", "a=http://x", "--set", "worker_key=x"],
            "--set worker_key would show the key in `ps`; set CAST_WORKER_KEY",
        ),
        (["gateway", "--variant", "a=http://x", "--set", "port"], "'port' is not KEY=VALUE"),
        (["up", "--variant", "dense"], "'dense' is not NAME=DIR"),
        (["roll", "=dir"], "'=dir' is not NAME or NAME=DIR; write sparse=PATH"),
        (["roll", "sparse="], "'sparse=' is not NAME or NAME=DIR"),
        (["roll", "sparse", "--socket", "s"], "no `cast-serve up` of this user answers at s ("),
        (
            ["up", "--variant", "a=nowhere"],
            "variant a: nowhere is neither a directory nor a model's name",
        ),
        (["up", "--variant", "a=b+"], "--variant a=b+ is not NAME=MODEL+DRAFT; name both"),
        (["gateway", "--variant", "a=b"], "'b' is not a URL"),
        (["gateway", "--variant", "稀疏=http://x"], "'稀疏' cannot be an HTTP header's value"),
        (["up", "--variant", "a=x", "--variant", "a=y"], "is given twice"),
        (["gateway", "--variant", "a=http://x", "--fallback", "a"], "is not VARIANT=VARIANT"),
        (["gateway", "--variant", "a=http://x", "--split", "b=c:1"], "names 'c'"),
    ],
)
def test_wrong_use(
    cast_serve: Call,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAST_PORT", str(free_port()))
    code, out, err = cast_serve(*words)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_from_a_hub_and_to_it(
    cast_serve: Call,
    save_pruned: Save,
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("org/pruned", save_pruned(tiny_llama()))
    words = ("convert", "org/pruned", tmp_path / "out", "--push-to-hub", "tester/sparse")
    code, out, err = cast_serve(*words, "--private")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["pushed_to"] == f"{hub.url}/tester/sparse"
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repos["tester/sparse"] == written
    assert {"config.json", "cast.json", "README.md", "model.safetensors"} <= set(written)
    assert hub.private == {"tester/sparse"}


def test_a_directory_outlives_a_push_that_fails(
    cast_serve: Call,
    save_pruned: Save,
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, made = save_pruned(tiny_llama()), tmp_path / "out"
    words = ("convert", source, made, "--push-to-hub", "tester/sparse")
    code, out, err = cast_serve(*words)
    assert (code, out, "needs a token; set HF_TOKEN" in err) == (2, "", True)
    assert not made.exists()  # it was seen before the conversion
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, _ = cast_serve(*words, "--dry-run")
    assert (code, json.loads(out)) == (0, {"path": str(made), "dry_run": True})
    assert not made.exists()
    hub.refuses_commits = True
    code, out, err = cast_serve(*words)
    assert (code, out) == (1, "")
    assert f"push it later: hf upload tester/sparse {made}" in err
    assert cast_serve("inspect", made)[0] == 0
    hub.refuses_commits = False
    assert cast_serve(*words, "--resume")[0] == 0
    assert set(hub.repos["tester/sparse"]) == {path.name for path in made.iterdir()}


def test_a_worker_takes_a_hubs_name(cast_serve: Call, save_gated: Save, hub: FakeHub) -> None:
    hub.add("org/gated", save_gated(tiny_llama()))
    code, out, err = cast_serve("worker", "org/gated", "--name", "x")
    assert (code, out, "is gated: convert it first" in err) == (2, "", True)


# Of every setting a value that is not its default, as the environment has it.
ENVIRONMENT = {
    **{"host": "127.0.0.2", "port": "47123", "api_keys": "one", "api_keys_file": "keys"},
    **{"worker_key": "two", "worker_key_file": "key"},
    **{"control_socket": "sock", "log_level": "warning", "log_dir": "logs"},
    **{"max_constraint_characters": "1", "strict_fields": "True", "media_parts": "True"},
    **{"max_body_bytes": "1", "max_held_body_bytes": "1"},
    **{"max_header_bytes": "1", "max_connections": "1", "max_answer_bytes": "1"},
    **{"body_timeout_s": "1.5", "request_timeout_s": "1.5", "max_choices": "1"},
    **{"max_prompts": "1", "max_running": "1", "max_queued": "1"},
    **{"split": "both=a:1,b:1", "canary": "both=a:0.5", "canary_guard": "guard"},
    **{"canary_interval_s": "1.5"},
    **{"fallback": "a=b", "shadow_fraction": "0.5", "shadow_concurrency": "2"},
    **{"comparison_window": "2", "startup_timeout_s": "1.5", "health_interval_s": "1.5"},
    **{"hang_timeout_s": "1.5", "drain_delay_s": "1.5", "shutdown_grace_s": "1.5"},
}


def test_the_command_line_leaves_every_setting_to_the_environment(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(ENVIRONMENT) == set(GatewaySettings.model_fields)
    served: list[GatewaySettings] = []

    async def serve(_: object, settings: GatewaySettings) -> None:
        served.append(settings)

    monkeypatch.setattr("cast_serve.gateway.app.serve", serve)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(f"CAST_{name.upper()}", value)
    code, _, err = cast_serve("gateway", "--variant", "a=http://x", "--variant", "b=http://y")
    assert (code, len(served)) == (0, 1)
    assert {name: str(getattr(served[0], name)) for name in ENVIRONMENT} == ENVIRONMENT
    assert "gateway: http://127.0.0.2:47123" in err
    words = ("--port", 47124, "--split", "both=a:1,b:3")
    assert (
        cast_serve("gateway", "--variant", "a=http://x", "--variant", "b=http://y", *words)[0] == 0
    )
    assert (served[1].port, served[1].split, served[1].max_queued) == (47124, "both=a:1,b:3", 1)


def test_up_serves_what_a_file_says_and_flags_win(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[tuple[list[Variant], GatewaySettings]] = []

    async def serve(variants: list[Variant], settings: GatewaySettings) -> None:
        served.append((variants, settings))

    monkeypatch.setattr("cast_serve.gateway.app.serve", serve)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    for name in ("dense", "sparse", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    port, of_worker = free_port(), free_port()
    file = tmp_path / "serve.toml"
    file.write_text(
        f'[gateway]\nport = {port}\nmax_queued = 7\nmax_running = 7\nlog_dir = "logs/here"\n'
        '[variant.dense]\ndir = "dense"\nvllm = ["--seed", 3]\n'
        f'[variant.sparse]\ndir = "sparse"\ncores = 1\nport = {of_worker}\n'
    )
    monkeypatch.setenv("CAST_MAX_QUEUED", "1")
    words = ["up", "--config", file, "--variant", f"sparse={tmp_path / 'other'}"]
    code, _, err = cast_serve(*words, "--set", "max_running=8", "--", "--enforce-eager")
    assert (code, len(served)) == (0, 1), err
    variants, settings = served[0]
    dense, sparse = (variant.replicas[0] for variant in variants)
    assert (dense.model, sparse.model) == (tmp_path / "dense", tmp_path / "other")
    assert (dense.cores, sparse.cores) == ((0, 2), (1,))
    assert dense.vllm_flags == ("--seed", "3", "--enforce-eager")
    assert sparse.vllm_flags == ("--enforce-eager",)
    assert sparse.url == f"http://127.0.0.1:{of_worker}"
    found = (settings.port, settings.max_queued, settings.max_running)
    assert found == (int(port), 7, 8)
    assert settings.log_dir == tmp_path / "logs/here"
    assert settings.log_dir.is_dir()
    code, _, err = cast_serve(*words, "--log-dir", file)
    assert (code, f"log directory {file} cannot be made" in err) == (2, True)
    code, _, err = cast_serve(*words, "--port", of_worker)
    assert (code, "gateway and variants need different ports" in err) == (2, True)


def test_a_variable_that_is_almost_a_setting_is_named(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(_: object) -> None:
        """In place of a server that would run until it is stopped."""

    monkeypatch.setattr("uvicorn.Server.serve", serve)
    port = str(free_port())
    for name, value in (("CAST_FALBACK", "a=b"), ("CAST_PORT", port), ("CAST_OWN", "1")):
        monkeypatch.setenv(name, value)
    _, _, err = cast_serve("gateway", "--variant", "a=http://x")
    assert "CAST_FALBACK in the environment is not a setting; the nearest is CAST_FALLBACK" in err
    assert "CAST_OWN" not in err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CAST_PORT", "tcp://10.0.0.1:80", "CAST_PORT, or --port, is 'tcp://10.0.0.1:80': "),
        ("CAST_MAX_QUEUED", "many", "CAST_MAX_QUEUED is 'many': "),
        ("CAST_API_KEYS", ",", "CAST_API_KEYS is ',', which holds no API key"),
        ("CAST_API_KEYS", " ", "CAST_API_KEYS is ' ', which holds no API key"),
    ],
)
def test_a_wrong_environment_is_named(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    async def serve(_: object) -> None:
        """In place of a server that would run until it is stopped."""

    monkeypatch.setattr("uvicorn.Server.serve", serve)
    monkeypatch.setenv("CAST_PORT", str(free_port()))
    monkeypatch.setenv(name, value)
    code, out, err = cast_serve("gateway", "--variant", "a=http://x")
    assert (code, out) == (2, "")
    assert message in err


def test_a_torchaudio_for_cuda_is_to_be_removed(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError("Could not load this library: torchaudio/lib/_torchaudio.abi3.so")

    monkeypatch.setattr("cast_serve.checkpoint.inspect.inspect", fail)
    code, out, err = cast_serve("inspect", "DIR")
    assert (code, out) == (2, "")
    assert "pip uninstall torchaudio torchcodec" in err


@pytest.mark.parametrize("fault", [ValueError, OSError, RuntimeError, KeyError])
def test_a_fault_of_ours_is_not_taken_for_wrong_use(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    """Python shows an exception that leaves `main` with its traceback, and exits with 1."""

    def fail(folder: Path) -> None:
        raise fault("ours")

    monkeypatch.setattr("cast_serve.checkpoint.inspect.inspect", fail)
    monkeypatch.setattr("sys.argv", ["cast-serve", "inspect", "DIR"])
    with pytest.raises(fault, match="ours"):
        cli.main()


@pytest.mark.parametrize(("error", "code"), [(UsageError, 2), (FailedError, 1)])
def test_the_exit_code_says_whose_error_it_is(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: int
) -> None:
    def fail(folder: Path) -> None:
        raise error("theirs")

    monkeypatch.setattr("cast_serve.checkpoint.inspect.inspect", fail)
    assert cast_serve("inspect", "DIR") == (code, "", "cast-serve: theirs\n")


def test_everything_listens_on_loopback_unless_told(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CAST_HOST", raising=False)
    (tmp_path / "config.json").write_text("{}")
    served: list[tuple[list[Variant], GatewaySettings]] = []

    async def serve(variants: list[Variant], settings: GatewaySettings) -> None:
        served.append((variants, settings))

    monkeypatch.setattr("cast_serve.gateway.app.serve", serve)
    assert cast_serve("up", "--variant", f"a={tmp_path}", "--port", free_port())[0] == 0
    ((variants, settings),) = served
    assert settings.host == "127.0.0.1"
    assert variants[0].replicas[0].url.startswith("http://127.0.0.1:")
    hosts: list[object] = []
    monkeypatch.setattr("cast_serve.engine.worker.run", lambda *given: hosts.append(given[2]))
    assert cast_serve("worker", tmp_path, "--name", "a", "--port", free_port())[0] == 0
    assert hosts == ["127.0.0.1"]


def test_a_variants_draft_follows_its_model(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("a", "b", "a+b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    served: list[list[Variant]] = []

    async def serve(variants: list[Variant], settings: GatewaySettings) -> None:
        served.append(variants)

    monkeypatch.setattr("cast_serve.gateway.app.serve", serve)
    monkeypatch.chdir(tmp_path)
    for text in ("a+b", "a+../" + tmp_path.name + "/b"):  # the first is a directory
        assert cast_serve("up", "--variant", f"x={text}", "--port", free_port())[0] == 0
    whole, pair = (variants[0].replicas[0] for variants in served)
    assert (whole.model, whole.worker_flags) == (Path("a+b"), ())
    assert pair.model == Path("a")
    assert pair.worker_flags == ("--draft", f"../{tmp_path.name}/b")
    code, _, err = cast_serve("up", "--variant", "x=a+gone", "--port", free_port())
    assert (code, "variant x: gone is neither a directory" in err) == (2, True)


def test_roll_asks_the_gateway_of_the_port(
    cast_serve: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Path, str, str | None]] = []

    def request_roll(path: Path, variant: str, model: str | None, say: object) -> dict[str, str]:
        asked.append((path, variant, model))
        return {"variant": variant}

    monkeypatch.setattr("cast_serve.gateway.upstream.control.request_roll", request_roll)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    code, out, _ = cast_serve("roll", "sparse=new", "--port", "8123")
    assert (code, json.loads(out)) == (0, {"variant": "sparse"})
    monkeypatch.setenv("CAST_CONTROL_SOCKET", "/run/s")
    for word in ("sparse", "sparse=org/name", "sparse=a/b/c"):
        assert cast_serve("roll", word)[0] == 0
    assert asked == [
        (default_path(8123), "sparse", str(tmp_path / "new")),
        (Path("/run/s"), "sparse", None),
        (Path("/run/s"), "sparse", "org/name"),
        (Path("/run/s"), "sparse", str(tmp_path / "a/b/c")),
    ]
