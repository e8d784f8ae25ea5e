import json
from typing import Any

import pytest

from cast_serve.gateway.api import limits, schemas
from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.settings import GatewaySettings

COMPLETION = "/v1/completions"
OBJECT = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TAG = {
    "structures": [{"begin": "<a>", "schema": OBJECT, "end": "</a>"}],
    "triggers": ["<a>"],
}


def check(**more: Any) -> None:
    settings = GatewaySettings(max_constraint_characters=5000)
    checked = schemas.parse(COMPLETION, {"model": "dense", "prompt": "a", **more}, 32)
    limits.check(checked, settings, max_model_len=64, vocabulary_size=100)


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    "asked",
    [
        {"json": OBJECT},
        {"json": json.dumps(OBJECT)},
        {"json": OBJECT, "regex": None},
        {"regex": r"\d{1,99999}"},
        {"choice": ["yes", "no"]},
        {"grammar": 'root ::= "90210" [a-z]{1,8}'},
        {"json_object": True},
        {"structural_tag": json.dumps(TAG)},
    ],
)
def test_one_constraint_passes(asked: dict[str, Any]) -> None:
    check(structured_outputs=asked)
    check(structured_outputs=asked, response_format={"type": "text"})
    with pytest.raises(APIError, match="both given"):
        check(structured_outputs=asked, response_format={"type": "json_object"})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "holds 0 constraints; give one of json, regex, choice, grammar, json_object"),
        ({"json": OBJECT, "regex": "a"}, "holds 2 constraints"),
        ({"json": "{"}, "structured_outputs.json is not valid JSON"),
        ({"json": "[" * 4000}, "structured_outputs.json is not valid JSON"),
        ({"json": "1"}, "is a JSON int, not an object"),
        ({"json": 1}, "structured_outputs: Input should be"),
        ({"json": "x" * 5001}, "more than 5000 characters; .* CAST_MAX_CONSTRAINT_CHARACTERS"),
        ({"json": {"enum": ["x" * 2501, "y" * 2500]}}, "more than 5000 characters"),
        ({"regex": "a" * 5001}, "regex holds more than 5000 characters"),
        ({"regex": "a\0"}, "NUL"),
        ({"regex": 3}, "structured_outputs: Input should be"),
        ({"choice": []}, "structured_outputs: List should have at least 1"),
        ({"choice": [""]}, "structured_outputs.*: String should have"),
        ({"choice": ["a"] * 1001}, "structured_outputs: List should have at most 1000"),
        ({"choice": ["x" * 2501, "y" * 2500]}, "choice holds more than 5000 characters"),
        ({"grammar": ""}, "structured_outputs: String should have"),
        ({"grammar": 'root ::= "a"{1,10001}'}, "number '10001', above the limit of 10000"),
        ({"grammar": 'root ::= "a"{' + "9" * 4000 + "}"}, "above the limit of 10000"),
        ({"grammar": "start: a ~ 1..1000000"}, "number '1000000'"),
        ({"grammar": 'start: %json {"minItems": 1e9}'}, "holds %json, a language inside"),
        ({"json_object": False}, "structured_outputs: Input should be True"),
        ({"structural_tag": "a"}, "structural_tag is not valid JSON"),
        ({"structural_tag": json.dumps({"a": [{"minItems": 10**9}]})}, "add up to more"),
        ({"json": '{"minItems": Infinity}'}, "Infinity is not a JSON number"),
        ({"whitespace_pattern": " "}, "unrecognized field 'structured_outputs.whitespace_pattern'"),
        ({"_backend": "outlines"}, "unrecognized field"),
    ],
)
def test_what_vllm_would_refuse_late_or_be_slow_at_is_named(
    asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(APIError, match=message) as caught:
        check(structured_outputs=asked)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}},
        {"items": [{"$ref": "#/$defs/a"}] * 3, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {}}},
        {"type": "array", "minItems": 5000, "maxItems": 5000},
        {"properties": {"minItems": {"type": "integer"}}},
        {"properties": {"$ref": {"type": "string"}}},
        {"$ref": "#/$defs/a~1b~0", "$defs": {"a/b~": {}}},
        {"$ref": "#/$defs/~01", "$defs": {"~1": {}}},
        {"items": {"$ref": "#/anyOf/1"}, "anyOf": [{}, {"type": "string"}]},
    ],
)
def test_a_schema_passes(schema: dict[str, Any]) -> None:
    check(response_format=formatted(schema))
    check(structured_outputs={"json": schema})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#"}, "leads nowhere or back to itself"),
        ({"$ref": "#/$defs/a"}, "leads nowhere"),
        ({"$ref": "http://x/y"}, "leads nowhere"),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a~1b": {}}}, "leads nowhere"),
        ({"items": {"$ref": "#/anyOf/2"}, "anyOf": [{}, {}]}, "leads nowhere"),
        ({"items": {"$ref": "#/anyOf/01"}, "anyOf": [{}, {}]}, "leads nowhere"),
        ({"items": {"$ref": f"#/anyOf/{'9' * 5000}"}, "anyOf": [{}]}, "leads nowhere"),
        ({"enum": [0] * 10_001}, "holds more than 10000 values"),
        ({f"{i}": {"$ref": f"#/{(i + 1) % 9}"} for i in range(9)}, "back to itself"),
        (
            {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
            "back to itself",
        ),
        ({"items": [{"minItems": 6000}, {"maxItems": 4001}]}, "add up to more than 10000"),
        ({"minItems": 1e300}, "add up to more than 10000"),
        ({"minItems": -(10**400), "maxItems": 1}, "add up to more than 10000"),
        ({"minItems": 10**400, "maxItems": 1.5}, "add up to more than 10000"),
    ],
)
def test_a_schema_that_is_dear_or_leads_nowhere_is_refused(
    schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(APIError, match=message) as caught:
        check(response_format=formatted(schema))
    assert caught.value.body["error"]["param"] == "response_format"
    with pytest.raises(APIError, match=message) as caught:
        check(structured_outputs={"json": schema})
    assert caught.value.body["error"]["param"] == "structured_outputs.json"


def test_a_json_schema_must_be_there() -> None:
    with pytest.raises(APIError, match="json_schema is missing"):
        check(response_format={"type": "json_schema"})
