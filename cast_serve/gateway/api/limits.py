"""A checked body + the settings + the variant's limits -> nothing, or 400: what no type can say.

`schemas.parse` has checked each field for itself; here are the limits that the settings or the
model set (choices, prompts, context, vocabulary), and fields against each other.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from cast_serve.gateway.api import constraints
from cast_serve.gateway.api.errors import APIError, bad_request
from cast_serve.gateway.api.schemas import (
    ChatBody,
    CompareBody,
    CompletionBody,
    DetokenizeBody,
    Generating,
    Message,
    TokenizeBody,
    shortened,
    unknown_field,
)
from cast_serve.gateway.settings import GatewaySettings

# The fields of each type of part, as OpenAI and vLLM have them. An assistant's refusal is text.
TEXT_PARTS = {"text": ("text",), "refusal": ("refusal",)}
MEDIA_PARTS = {
    "image_url": ("image_url", "uuid"),
    "input_audio": ("input_audio", "uuid"),
    "audio_url": ("audio_url", "uuid"),
    "video_url": ("video_url", "uuid"),
}


def check(
    body: BaseModel,
    settings: GatewaySettings,
    max_model_len: int | None,
    vocabulary_size: int | None,
) -> None:
    """Checks what depends on the settings and the model, before admission.

    Args:
        body: of `parse`.
        settings: `max_choices`, `max_constraint_characters` and `media_parts`.
        max_model_len: the variant's context in tokens; None: not known, vLLM checks it.
        vocabulary_size: the variant's number of token ids; None: not known.

    Raises:
        APIError: 400.
    """
    if isinstance(body, DetokenizeBody):
        _check_ids("tokens", body.tokens, vocabulary_size)
    if isinstance(body, CompareBody):
        _check_asked(body.max_tokens, max_model_len)
    if isinstance(body, ChatBody | TokenizeBody):
        _check_parts(body.messages or (), settings.media_parts)
    if not isinstance(body, Generating):
        return
    if body.n is not None and body.n > settings.max_choices:
        raise _above("n", body.n, settings.max_choices, "ask for fewer choices")
    _check_ids("stop_token_ids", body.stop_token_ids or (), vocabulary_size)
    _check_ids("allowed_token_ids", body.allowed_token_ids or (), vocabulary_size)
    _check_ids("logit_bias", [int(key) for key in body.logit_bias or ()], vocabulary_size)
    constraints.check(body, settings.max_constraint_characters)
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
    _check_asked(asked, max_model_len)
    if isinstance(body, CompletionBody):
        if body.max_tokens == 0 and not body.echo:
            raise bad_request(
                "max_tokens is 0, which returns nothing unless echo is true; ask for 1 or more",
                "max_tokens",
            )
        _check_prompts(body, asked, max_model_len, vocabulary_size)


def _check_parts(messages: Sequence[Message], has_media: bool) -> None:
    """Each part of a message is text, or media where that is admitted.

    Workers open the addresses of media, with whatever reaches them from there. Embeddings would
    bypass what the model makes of its input.
    """
    types = {**TEXT_PARTS, **(MEDIA_PARTS if has_media else {})}
    for number, message in enumerate(messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            where = f"messages.{number}.content.{place}"
            kind = part.get("type")
            if not isinstance(kind, str) or kind not in types:
                remedy = "" if has_media else "; media need the setting CAST_MEDIA_PARTS"
                raise bad_request(
                    f"{where}.type is {shortened(kind)}, but must be one of "
                    f"{', '.join(types)}{remedy}",
                    "messages",
                    "unsupported_content",
                )
            if kind in TEXT_PARTS and not isinstance(part.get(kind), str):
                raise bad_request(f"{where}.{kind} must be text", "messages")
            if unknown := sorted(part.keys() - {"type", *types[kind]}):
                raise unknown_field(f"{where}.{unknown[0]}"[:200])


def _check_asked(max_tokens: int, max_model_len: int | None) -> None:
    if max_model_len is not None and max_tokens > max_model_len:
        raise _above("max_tokens", max_tokens, max_model_len, "that is the model's context")


def _check_prompts(
    body: CompletionBody,
    asked: int,
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
        f"{field} is {shortened(value)}, above the limit of {limit}; {remedy}", field
    )
