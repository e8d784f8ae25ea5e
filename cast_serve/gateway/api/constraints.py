"""A checked body's response_format or structured_outputs -> nothing, or 400: what it may hold.

vLLM checks a constraint in its HTTP server and follows it in its engine, between the steps of all
requests. llguidance, which `cast-serve worker` asks for, bounds its own work on a regex or a
grammar, but writes out the repetitions of a schema or grammar; so these are counted here.
"""

import json
import re
from typing import Any

from cast_serve.gateway.api.errors import APIError, bad_request
from cast_serve.gateway.api.schemas import (
    Generating,
    StructuredOutputs,
    refuse_constant,
    shortened,
)

MAX_SCHEMA_NODES = 10_000  # values in a JSON schema, all levels together
MAX_REPETITIONS = 10_000  # minItems and maxItems of a schema together, one number in a grammar
# A grammar may hold further languages, whose limits are not ours.
_NESTED = re.compile(r"%(json|regex|lark|llguidance)\b")
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")  # of a list, in a JSON pointer
_REPEATED = re.compile(r"(?:[{,~]|\.\.)\s*(\d{5,})")  # a{1,10000}, and Lark's a ~ 1..10000


def check(body: Generating, max_characters: int) -> None:
    """Checks the one constraint that a body may have.

    Args:
        body: of `parse`.
        max_characters: of text in a constraint.

    Raises:
        APIError: 400.
    """
    form, asked = body.response_format, body.structured_outputs
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise bad_request(
                "response_format is of type json_schema, but json_schema is missing",
                "response_format",
            )
        _check_schema(form.json_schema.schema_, "response_format", max_characters)
    if asked is None:
        return
    if form is not None and form.type != "text":
        raise bad_request(
            "response_format and structured_outputs are both given; leave one out",
            "structured_outputs",
        )
    _check_asked(asked, max_characters)


def _check_asked(asked: StructuredOutputs, max_characters: int) -> None:
    given = [name for name in asked.model_fields_set if getattr(asked, name) is not None]
    if len(given) != 1:
        kinds = [field.alias or name for name, field in StructuredOutputs.model_fields.items()]
        raise bad_request(
            f"structured_outputs holds {len(given)} constraints; give one of {', '.join(kinds)}",
            "structured_outputs",
        )
    if isinstance(asked.json_, dict):
        _check_schema(asked.json_, "structured_outputs.json", max_characters)
    for name, text in (
        ("json", asked.json_ if isinstance(asked.json_, str) else None),
        ("regex", asked.regex),
        ("choice", "".join(asked.choice or ())),
        ("grammar", asked.grammar),
        ("structural_tag", asked.structural_tag),
    ):
        if text is None:
            continue
        field = f"structured_outputs.{name}"
        if len(text) > max_characters:
            raise _too_long(field, max_characters)
        if "\0" in text:
            raise bad_request(f"{field} holds a NUL character; leave it out", field)
        if name in ("json", "structural_tag"):
            _check_schema(_read(text, field), field, max_characters)
        if name == "grammar":
            _check_grammar(text, field)


def _read(text: str, field: str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{field} is not valid JSON: {error}"[:300], field) from None
    if not isinstance(found, dict):
        raise bad_request(f"{field} is a JSON {type(found).__name__}, not an object", field)
    return found


def _check_grammar(text: str, field: str) -> None:
    if nested := _NESTED.search(text):
        raise bad_request(
            f"{field} holds {nested[0]}, a language inside the grammar, which is not accepted; "
            "write rules, or send json or regex instead",
            field,
        )
    for number in _REPEATED.findall(text):
        if len(number) > 9 or int(number) > MAX_REPETITIONS:
            raise bad_request(
                f"{field} holds the number {shortened(number)}, above the limit of "
                f"{MAX_REPETITIONS} repetitions; repeat less",
                field,
            )


def _check_schema(schema: dict[str, Any], field: str, max_characters: int) -> None:
    """Its size, and that every $ref leads, within the schema, to something else than a $ref to it.

    Each value is looked at once and each reference followed once, whatever refers to it: a chain of
    references costs no more than its length.
    """
    sound: set[str] = set()  # references that lead to something
    todo: list[Any] = [schema]
    num_nodes, num_characters = 1, 0
    num_repetitions = 0.0
    while todo:
        node = todo.pop()
        children: list[Any] = []
        if isinstance(node, dict):
            children = list(node.values())
            num_characters += sum(map(len, node))
            num_repetitions += _repetitions(node)
            if _refers(node):
                _follow(node, schema, sound, field)
        elif isinstance(node, list):
            children = node
        elif isinstance(node, str):
            num_characters += len(node)
        num_nodes += len(children)
        if num_nodes > MAX_SCHEMA_NODES:
            raise bad_request(
                f"{field}: the schema holds more than {MAX_SCHEMA_NODES} values; write a smaller "
                "one",
                field,
            )
        todo += children
    if num_characters > max_characters:
        raise _too_long(field, max_characters)
    if num_repetitions > MAX_REPETITIONS:
        raise bad_request(
            f"{field}: minItems and maxItems add up to more than {MAX_REPETITIONS}; ask for fewer "
            "items",
            field,
        )


def _repetitions(node: dict[str, Any]) -> float:
    bounds = (node.get(key) for key in ("minItems", "maxItems"))
    numbers = (each for each in bounds if isinstance(each, int | float))
    return sum(min(abs(each), MAX_REPETITIONS + 1) for each in numbers)  # they may be huge


def _follow(node: Any, schema: dict[str, Any], sound: set[str], field: str) -> None:
    """Adds a node's reference, and those that it leads over, to `sound`."""
    chain: set[str] = set()
    while _refers(node):
        where = node["$ref"]
        if where in sound:
            break
        node = None if where in chain else _resolve(schema, where)
        if node is None:
            raise bad_request(
                f"{field}: $ref {shortened(where)} leads nowhere or back to itself; write it as "
                "#/$defs/NAME and define NAME",
                field,
            )
        chain.add(where)
    sound |= chain


def _refers(node: Any) -> bool:
    """Whether it is a reference; in a map of properties, $ref is a name with a schema."""
    return isinstance(node, dict) and "$ref" in node and isinstance(node["$ref"], str)


def _resolve(schema: dict[str, Any], where: str) -> Any:
    """What a JSON pointer (RFC 6901) after # leads to; None if nothing."""
    if not where.startswith("#"):
        return None
    node: Any = schema
    for part in filter(None, where[1:].split("/")):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and _INDEX.fullmatch(key) and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def _too_long(field: str, limit: int) -> APIError:
    return bad_request(
        f"{field} holds more than {limit} characters; write less, or raise "
        "CAST_MAX_CONSTRAINT_CHARACTERS",
        field,
    )
