import re
from pathlib import Path

import pytest

from cast_serve.settings import GatewaySettings

TABLE = re.compile(r"^\| `CAST_([A-Z_]+)` \|([^|]*)\|", re.MULTILINE)


def test_the_documentation_has_every_setting_with_its_default() -> None:
    text = (Path(__file__).parent.parent.parent / "docs/serving.md").read_text()
    documented = {name.lower(): default.strip() for name, default in TABLE.findall(text)}
    fields = GatewaySettings.model_fields
    assert set(documented) == set(fields)
    for name, field in fields.items():
        if field.default:
            assert documented[name] == f"{field.default}", name


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST_MAX_QUEUED", "3")
    monkeypatch.setenv("CAST_SPLIT", "a=dense:3,sparse:1; b=dense:1")
    settings = GatewaySettings()
    assert settings.max_queued == 3
    assert settings.split_weights == {"a": {"dense": 0.75, "sparse": 0.25}, "b": {"dense": 1.0}}
