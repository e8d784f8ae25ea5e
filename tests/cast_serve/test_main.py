"""cast-serve on the command line: a user's mistake is one line on stderr and exit 2."""

import json
from pathlib import Path

import pytest

from cast_serve import __main__ as cli
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama


@pytest.fixture
def cast_serve(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["cast-serve", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_convert_then_inspect(cast_serve, save_gated: Save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = cast_serve("convert", save_gated(tiny_llama()), tmp_path / "out")
    assert code == 0
    converted = json.loads(out.splitlines()[-1])
    code, out, err = cast_serve("inspect", tmp_path / "out")
    assert (code, json.loads(out.splitlines()[-1])) == (0, converted)
    assert "14 sparse and 1 dense linear layers" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere"], "nowhere holds no model"),
        (["convert", "nowhere", "out"], "nowhere holds no model"),
        (["worker", "nowhere", "--name", "x"], "nowhere holds no model"),
        (["worker", "nowhere", "--name", "x", "--cores", "a"], "'a' is no list of CPU ids"),
        (["worker", "nowhere", "--name", "x", "--cores", "4096"], "[4096] are not open"),
        (["up", "--variant", "dense"], "'dense' is not NAME=DIR"),
        (["up", "--variant", "a=nowhere"], "variant a: nowhere holds no model"),
        (["gateway", "--variant", "a=b"], "'b' is no URL"),
        (["up", "--variant", "a=x", "--variant", "a=y"], "is given twice"),
        (["gateway", "--variant", "a=http://x", "--fallback", "a"], "is not VARIANT=VARIANT"),
        (["gateway", "--variant", "a=http://x", "--split", "b=c:1"], "names 'c'"),
    ],
)
def test_wrong_use(  # type: ignore[no-untyped-def]
    cast_serve, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cast_serve(*words)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
