"""What a client may send -> checked bodies: the fields we pass on to vLLM, with their limits.

vLLM drops what it does not know, and lets some values through that hurt it; so a body is checked
here, before a place in the queue is taken. An unknown field, or one that vLLM would ignore, is an
error that names it. What is checked is also what /openapi.json shows.

The limits that no setting moves stand in the types below; those that depend on the settings or on
the model (choices, prompts, context, vocabulary) in `check_limits`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic import ValidationError as PydanticError

from cast_serve.errors import APIError, bad_request
from cast_serve.settings import GatewaySettings

INT64 = 2**63 - 1
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_IDS = 1024  # token ids in a list that is no prompt

Number = StrictFloat | StrictInt
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(max_length=MAX_IDS)]
Text = Annotated[StrictStr, Field(min_length=1)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Count = Annotated[StrictInt, Field(ge=1)]
Logprobs = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[Number, Field(ge=-2, le=2, allow_inf_nan=False)]


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: StrictStr = Field(description="a variant's name, or a split's")


class StreamOptions(BaseModel):
    """OpenAI's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class JSONSchema(BaseModel):
    """A name and the schema itself, as OpenAI has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: StrictStr
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class Generating(Body):
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
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[StrictStr, Field(pattern=r"^\d{1,9}$")],
                Annotated[Number, Field(ge=-100, le=100, allow_inf_nan=False)],
            ],
            Field(max_length=MAX_IDS),
        ]
        | None
    ) = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None
    response_format: ResponseFormat | None = None

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

    prompt: StrictStr | Tokens | list[Text] | list[Tokens]
    echo: StrictBool | None = None
    logprobs: Logprobs | None = None
    best_of: Literal[1] | None = Field(None, description="vLLM has no best_of; ask for n")
    suffix: None = Field(None, description="not supported")


class Message(BaseModel):
    """A chat message; content is text, or OpenAI's list of text parts."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[dict[str, Any]] | None = None


class ChatBody(Generating):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Logprobs | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt or messages."""

    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    return_token_strs: StrictBool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[TokenId]


class CompareBody(BaseModel):
    """POST /v1/compare: one prompt for every variant, greedy unless told otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


def parse(route: str, body: Any) -> BaseModel:
    """Checks what no setting moves.

    Args:
        route: a key of `BODIES`.
        body: parsed JSON.

    Raises:
        APIError: 400, naming the field, its value and the limit.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the request body is a JSON {type(body).__name__}, not an object")
    for field, remedy in _REFUSED.items():
        if body.get(field) is not None and field not in BODIES[route].model_fields:
            raise bad_request(f"{field} is not accepted: {remedy}", field, "unsupported_field")
    try:
        return BODIES[route].model_validate(body)
    except PydanticError as error:
        raise _described(error, body) from None


_REFUSED = {
    "best_of": "it is no field of this route; ask for n",
    "chat_template": "a template runs as code; the model's own is used",
    "chat_template_kwargs": "a template runs as code; the model's own is used",
    "prompt_embeds": "only text and token ids are",
    "structured_outputs": "write response_format",
    "kv_transfer_params": "it steers the engine",
    "priority": "the queue is first come, first served",
    "request_id": "send the header X-Request-Id",
}


def _described(error: PydanticError, body: dict[str, Any]) -> APIError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = [part for part in first["loc"] if isinstance(part, int) or part in body]
    field = str(first["loc"][0])
    name = ".".join(map(str, where)) or field
    if first["type"] == "extra_forbidden":
        name = ".".join(str(part) for part in first["loc"])[:200]
        return bad_request(
            f"unrecognized field {name!r}: it would be ignored; leave it out", name, "unknown_field"
        )
    if first["type"] == "missing":
        return bad_request(f"{field} is missing", field, "missing_field")
    return bad_request(f"{name}: {first['msg']}; got {_shortened(first['input'])}", field)


def _shortened(value: Any) -> str:
    text = (
        repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    )
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_limits(
    body: BaseModel,
    settings: GatewaySettings,
    max_model_len: int | None,
    vocabulary_size: int | None,
) -> None:
    """Checks what depends on the settings and the model, before admission.

    Args:
        body: of `parse`.
        settings: `max_choices`, `max_prompts`.
        max_model_len: the variant's context in tokens; None: not known, vLLM checks it.
        vocabulary_size: the variant's number of token ids; None: not known.

    Raises:
        APIError: 400.
    """
    if isinstance(body, DetokenizeBody):
        _check_ids("tokens", body.tokens, vocabulary_size)
    if not isinstance(body, Generating):
        return
    if body.n is not None and body.n > settings.max_choices:
        raise _above("n", body.n, settings.max_choices, "ask for fewer choices")
    _check_ids("stop_token_ids", body.stop_token_ids or (), vocabulary_size)
    _check_ids("allowed_token_ids", body.allowed_token_ids or (), vocabulary_size)
    _check_ids("logit_bias", [int(key) for key in body.logit_bias or ()], vocabulary_size)
    if body.response_format is not None and body.response_format.json_schema is not None:
        _check_references(body.response_format.json_schema.schema_)
    asked = body.max_tokens or 0
    if isinstance(body, ChatBody):
        asked = max(asked, body.max_completion_tokens or 0)
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise bad_request("prompt_logprobs cannot be streamed; leave stream out", "prompt_logprobs")
    if body.min_tokens and asked and body.min_tokens > asked:
        raise _above("min_tokens", body.min_tokens, asked, "it cannot exceed max_tokens")
    if max_model_len is not None and asked > max_model_len:
        raise _above("max_tokens", asked, max_model_len, "that is the model's context")
    if isinstance(body, CompletionBody):
        _check_prompts(body, asked, settings, max_model_len, vocabulary_size)


def _check_references(schema: dict[str, Any]) -> None:
    """Every $ref must lead, within the schema, to something else than a $ref back to itself."""
    todo: list[Any] = [schema]
    while todo:
        node = todo.pop()
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        seen: list[Any] = []
        while isinstance(node, dict) and "$ref" in node:
            where = node["$ref"]
            target = _resolve(schema, where)
            if target is None or where in seen or target is schema and "$ref" in schema:
                raise bad_request(
                    f"response_format: $ref {_shortened(where)} leads nowhere or back to itself; "
                    "write it as #/$defs/NAME and define NAME",
                    "response_format",
                )
            seen.append(where)
            node = target


def _resolve(schema: dict[str, Any], where: Any) -> Any:
    if not isinstance(where, str) or not where.startswith("#"):
        return None
    node: Any = schema
    for part in filter(None, where[1:].split("/")):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _check_prompts(
    body: CompletionBody,
    asked: int,
    settings: GatewaySettings,
    max_model_len: int | None,
    vocabulary_size: int | None,
) -> None:
    if isinstance(body.prompt, str):
        if not body.prompt:
            raise bad_request("prompt is empty; send some text or token ids", "prompt")
        return
    if not body.prompt:
        raise bad_request("prompt is an empty list; send some text or token ids", "prompt")
    is_one = isinstance(body.prompt[0], int)
    prompts: list[Any] = [body.prompt] if is_one else list(body.prompt)
    if len(prompts) > settings.max_prompts:
        raise _above("prompt", len(prompts), settings.max_prompts, "send fewer prompts at once")
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        _check_ids("prompt", prompt, vocabulary_size)
        if max_model_len is not None and len(prompt) + max(asked, 1) > max_model_len:
            raise bad_request(
                f"prompt has {len(prompt)} tokens and max_tokens is {asked or 'not given'}, but "
                f"the model's context is {max_model_len} tokens; shorten one of them",
                "prompt",
                "context_length_exceeded",
            )


def _check_ids(field: str, ids: Any, vocabulary_size: int | None) -> None:
    if vocabulary_size is None or not ids:
        return
    if (highest := max(ids)) >= vocabulary_size:
        raise bad_request(
            f"{field} holds token id {highest}, but the vocabulary ends at {vocabulary_size - 1}",
            field,
            "token_id_out_of_range",
        )


def _above(field: str, value: int, limit: int, remedy: str) -> APIError:
    return bad_request(
        f"{field} is {_shortened(value)}, above the limit of {limit}; {remedy}", field
    )
