import re
from pathlib import Path

from cast_serve.gateway.settings import GatewaySettings

TABLE = re.compile(r"^\| `CAST_([A-Z_]+)` \|([^|]*)\|", re.MULTILINE)


def test_the_documentation_has_every_setting_with_its_default() -> None:
    text = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    documented = {name.lower(): default.strip() for name, default in TABLE.findall(text)}
    fields = GatewaySettings.model_fields
    assert set(documented) == set(fields)
    for name, field in fields.items():
        if field.default:
            assert documented[name] == f"{field.default}", name


def test_a_split_is_shares_that_sum_to_1() -> None:
    settings = GatewaySettings(split="a=dense:3,sparse:1; b=dense:1")
    assert settings.split_weights == {"a": {"dense": 0.75, "sparse": 0.25}, "b": {"dense": 1.0}}
