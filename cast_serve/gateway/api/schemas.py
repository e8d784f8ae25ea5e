"""What a client may send -> checked bodies: the fields we pass on to vLLM, with their limits.

vLLM ignores unknown fields, and accepts some values that make its engine fail; so a body is checked
here, before it takes a place in the queue. An unknown field is an error that names it. Of the
fields that vLLM would ignore, those that leave an answer what it is (`WithoutEffect`) are taken out
again, and all others are errors too. /openapi.json shows the same types.

Fixed limits are in the types below; those that depend on the settings or on the model are in
limits.py. A list's length and type are checked before its items, and the first wrong item ends the
check: pydantic would otherwise keep an error for each of a million wrong items.
"""

import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic import ValidationError as PydanticError
from pydantic_core import PydanticCustomError

from cast_serve.gateway.api.errors import APIError, bad_request

INT64 = 2**63 - 1
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_IDS = 1024  # token ids in a list that is not a prompt
MAX_MESSAGES = 4096  # of a chat, and parts of a message
MAX_TOOLS = 1024
MAX_CHOICES = 1000  # texts of a choice; llguidance follows 2,000 alternatives at once
MAX_CONTAINERS = 100_000  # lists and objects in a body: Python needs up to 200 bytes for each
MAX_DEPTH = 256  # of them in each other: the limit of recursion, 1,000 calls, counts each as one


def _check_length_first(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_IDS:
        raise PydanticCustomError(
            "too_long", f"holds {len(value)} items, above the limit of {MAX_IDS}"
        )
    return value


Number = StrictFloat | StrictInt
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Ids = Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]
Text = Annotated[StrictStr, Field(min_length=1)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Count = Annotated[StrictInt, Field(ge=1)]
Logprobs = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[Number, Field(ge=-2, le=2, allow_inf_nan=False)]


class Closed(BaseModel):
    """An object without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, value: Any) -> Any:
        """Ends at the first unknown field; pydantic's own check keeps an error for each."""
        if isinstance(value, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in value:
                if key not in known:
                    raise PydanticCustomError("extra_forbidden", "unknown", {"field": key})
        return value


class Body(Closed):
    """What all bodies have in common."""

    model: StrictStr = Field(description="a variant's name, or a split's")


class StreamOptions(Closed):
    """OpenAI's `stream_options`."""

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None
    include_obfuscation: StrictBool | None = Field(None, description="accepted, has no effect")


class JSONSchema(Closed):
    """OpenAI's `json_schema`: a name and the schema itself."""

    name: StrictStr
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Closed):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(Closed):
    """vLLM's `structured_outputs`: exactly one constraint, in vLLM's own form."""

    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: (
        Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None
    ) = None
    grammar: Text | None = None
    json_object: Literal[True] | None = None
    structural_tag: Text | None = None


class WithoutEffect(Body):
    """OpenAI's fields that do not change an answer here: accepted, and not passed on."""

    metadata: Any = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None


class Generating(WithoutEffect):
    """What completions and chat completions share: OpenAI's fields, then vLLM's sampling fields."""

    n: Count | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[StrictInt, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[StrictStr, Field(pattern=r"^\d{1,9}$")],
                Annotated[Number, Field(ge=-100, le=100, allow_inf_nan=False)],
            ],
            BeforeValidator(_check_length_first),
        ]
        | None
    ) = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    stop_token_ids: Ids | None = None
    allowed_token_ids: Annotated[Ids, Field(min_length=1)] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    spaces_between_special_tokens: StrictBool | None = None
    prompt_logprobs: Logprobs | None = None
    add_special_tokens: StrictBool | None = None
    return_token_ids: StrictBool | None = None


class CompletionBody(Generating):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | Tokens
        | Annotated[list[Text], Field(fail_fast=True)]
        | Annotated[list[Tokens], Field(fail_fast=True)]
    )
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None  # 0: to score a prompt
    echo: StrictBool | None = None
    logprobs: Logprobs | None = None
    best_of: Literal[1] | None = Field(None, description="vLLM has no best_of; use n")
    suffix: None = Field(None, description="not supported")


class Message(BaseModel):
    """A chat message; content is text, or OpenAI's list of parts, which limits.py checks."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        StrictStr
        | Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatBody(Generating):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Logprobs | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = (
        None
    )
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(None, description="given to the model's chat template, which may not know it")
    )
    include_reasoning: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt or messages."""

    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    return_token_strs: StrictBool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class CompareBody(Closed):
    """POST /v1/compare: one prompt for every variant, greedy unless told otherwise."""

    prompt: Text
    max_tokens: Annotated[StrictInt, Field(ge=2, le=512)] = 64
    temperature: Annotated[Number, Field(ge=0, le=2, allow_inf_nan=False)] = 0
    seed: Annotated[StrictInt, Field(ge=-INT64 - 1, le=INT64)] | None = None
    ignore_eos: StrictBool = False


BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/compare": CompareBody,
}


def take_without_effect(body: dict[str, Any]) -> list[str]:
    """Takes the fields without effect out of a body that was parsed.

    Returns:
        The names of those that were given.
    """
    found = [name for name in _WITHOUT_EFFECT if body.pop(name, None) is not None]
    if (body.get("stream_options") or {}).pop("include_obfuscation", None) is not None:
        found.append("stream_options.include_obfuscation")
    return found


_WITHOUT_EFFECT = sorted(set(WithoutEffect.model_fields) - set(Body.model_fields))
_MARK = re.compile(r"[][{}]")
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"')


def read_json(content: bytes | bytearray) -> Any:
    """A body's bytes as JSON.

    Raises:
        APIError: 400 if they are not UTF-8 or JSON, hold half a surrogate pair, a number beyond
            float64, or more than `MAX_CONTAINERS` lists and objects, or nest them deeper than
            `MAX_DEPTH`.
    """
    try:
        text = content.decode("utf-8-sig")  # strict, while json.loads takes UTF-16 and surrogates
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_containers(_STRING.sub("", text))
        body = json.loads(text, parse_constant=refuse_constant, parse_float=read_float)
        if "\\u" in text:  # perhaps half a surrogate pair, which is not text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}"[:300]) from None
    return body


def _check_containers(outside: str) -> None:
    """Counts lists and objects in what is outside of a body's strings."""
    if (count := outside.count("[") + outside.count("{")) > MAX_CONTAINERS:
        raise ValueError(f"{count} lists and objects, the limit is {MAX_CONTAINERS}")
    depth = 0
    for mark in _MARK.findall(outside):
        depth += 1 if mark in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"lists and objects nested more than {MAX_DEPTH} deep")


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_float(text: str) -> float:
    """A number of JSON; ValueError beyond float64, which could not be passed on."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{shortened(text)} is beyond float64")
    return number


def parse(route: str, body: Any, max_prompts: int) -> BaseModel:
    """Checks each field for itself.

    Args:
        route: a key of `BODIES`.
        body: of `read_json`.
        max_prompts: how many prompts one request may hold.

    Raises:
        APIError: 400, naming the field, its value and the limit.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the request body is a JSON {type(body).__name__}, not an object")
    for field, remedy in _REFUSED.items():
        if body.get(field) is not None and field not in BODIES[route].model_fields:
            raise bad_request(f"{field} is not accepted: {remedy}", field, "unsupported_field")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > max_prompts and not isinstance(prompt[0], int):
        raise bad_request(
            f"prompt is {len(prompt)}, above the limit of {max_prompts}; send fewer at once",
            "prompt",
        )
    try:
        return BODIES[route].model_validate(body)
    except PydanticError as error:
        raise _described(error, body) from None


_REFUSED = {
    "best_of": "this route has no such field; use n",
    "chat_template": "a template runs as code; leave it out, the model's own is used",
    "chat_template_kwargs": "a template runs as code; leave it out, the model's own is used",
    "prompt_embeds": "send text or token ids",
    "audio": "text is the only modality here",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "moderation": "nothing is moderated here",
    "web_search_options": "web search is not available here",
    "kv_transfer_params": "it controls the engine; leave it out",
    "priority": "the queue is first come, first served; leave it out",
    "request_id": "send the header X-Request-Id",
}


def _described(error: PydanticError, body: dict[str, Any]) -> APIError:
    first = error.errors(include_url=False)[0]
    if first["type"] == "extra_forbidden":
        return unknown_field(".".join(map(str, [*first["loc"], first["ctx"]["field"]]))[:200])
    where = [part for part in first["loc"] if isinstance(part, int) or part in body]
    field = str(first["loc"][0])
    name = ".".join(map(str, where)) or field
    if first["type"] == "missing":
        return bad_request(f"{field} is missing", field, "missing_field")
    return bad_request(f"{name}: {first['msg']}; got {shortened(first['input'])}", field)


def unknown_field(name: str) -> APIError:
    return bad_request(
        f"unrecognized field {name!r}: it would be ignored; leave it out", name, "unknown_field"
    )


def shortened(value: Any) -> str:
    text = (
        repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    )
    return text if len(text) <= 80 else f"{text[:77]}..."
