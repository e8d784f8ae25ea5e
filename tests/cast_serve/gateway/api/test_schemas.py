import json
import warnings
from types import ModuleType

import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import pytest
from pydantic import BaseModel

from cast_serve.gateway.api import limits, schemas
from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.settings import GatewaySettings

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def check(route: str, body: object) -> None:
    settings = GatewaySettings()
    checked = schemas.parse(route, body, settings.max_prompts)
    limits.check(checked, settings, max_model_len=64, vocabulary_size=100)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prompt": [1, 2, 3]},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2, 99]]},
        {"n": 8, "stream": True, "stream_options": {"include_usage": True}},
        {"stop": ["\n"] * 16, "logit_bias": {"99": -100}, "seed": -(2**63)},
        {"logprobs": 20, "echo": True, "max_tokens": 64, "best_of": 1, "suffix": None},
        {"ignore_eos": True, "min_tokens": 3, "top_k": -1, "temperature": 0, "user": "me"},
        {"metadata": {"a": "b"}, "store": False, "service_tier": "flex", "modalities": ["text"]},
        {"max_tokens": 0, "echo": True, "logprobs": 1},  # to score a prompt
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ],
)
def test_what_the_openai_client_and_vllms_users_send_passes(more: dict[str, object]) -> None:
    check(COMPLETION, {"model": "dense", "prompt": "a", **more})


@pytest.mark.parametrize(
    ("more", "message", "param"),
    [
        ({"best_of": 2}, "best_of: Input should be 1; got 2", "best_of"),
        ({"sufix": "x"}, "unrecognized field 'sufix'", "sufix"),
        ({"chat_template": "{{ 1 }}"}, "chat_template is not accepted", "chat_template"),
        ({"prompt_embeds": "x"}, "prompt_embeds is not accepted", "prompt_embeds"),
        ({"n": 9}, "n is 9, above the limit of 8", "n"),
        ({"n": 0}, "n: Input should be greater than or equal to 1; got 0", "n"),
        ({"n": True}, "n: Input should be a valid integer; got True", "n"),
        ({"n": 1.0}, "n: Input should be a valid integer", "n"),
        ({"max_tokens": 65}, "max_tokens is 65, above the limit of 64", "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens", "max_tokens"),
        ({"prompt": ""}, "prompt is empty", "prompt"),
        ({"prompt": []}, "prompt", "prompt"),
        ({"prompt": [1, "a"]}, "prompt", "prompt"),
        ({"prompt": [1] * 64}, "the model's context is 64 tokens", "prompt"),
        ({"prompt": [[1] * 10] * 33}, "prompt is 33, above the limit of 32", "prompt"),
        ({"prompt": [100]}, "prompt holds token id 100, but the vocabulary ends at 99", "prompt"),
        ({"prompt": [-1]}, "prompt", "prompt"),
        ({"stop_token_ids": [100]}, "stop_token_ids holds token id 100", "stop_token_ids"),
        ({"allowed_token_ids": [100]}, "allowed_token_ids holds token id 100", "allowed_token_ids"),
        ({"logit_bias": {"100": 1}}, "logit_bias holds token id 100", "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
        ({"stop": [""]}, "stop", "stop"),
        ({"stop": ["a"] * 17}, "stop", "stop"),
        ({"stop": "a" * 257}, "stop", "stop"),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20", "logprobs"),
        ({"temperature": -0.1}, "temperature", "temperature"),
        ({"seed": 2**63}, "seed", "seed"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean; got 'yes'", "stream"),
        ({"stream_options": {}}, "stream_options needs stream", "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "cannot be streamed", "prompt_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, above the limit of 4", "min_tokens"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
    ],
)
def test_what_would_be_ignored_or_fail_in_vllm_is_named(
    more: dict[str, object], message: str, param: str
) -> None:
    with pytest.raises(APIError) as caught:
        check(COMPLETION, {"model": "dense", "prompt": "a", **more})
    error = caught.value.body["error"]
    assert caught.value.status == 400
    assert message in error["message"]
    assert error["param"] == param
    assert len(error["message"]) < 300


def test_chat() -> None:
    check(CHAT, {"model": "dense", "messages": MESSAGES, "logprobs": True, "top_logprobs": 3})
    for body, message in (
        ({"messages": []}, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            r"messages\.0: Input should be .*; got 'wizard'",
        ),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": MESSAGES, "chat_template": "x"}, "the model's own is used"),
        ({"messages": MESSAGES, "max_completion_tokens": 65}, "above the limit of 64"),
        ({"messages": MESSAGES, "audio": {"voice": "a"}}, "text is the only modality"),
        ({"messages": MESSAGES, "modalities": ["audio"]}, "should be 'text'; got 'audio'"),
        ({"messages": MESSAGES, "web_search_options": {}}, "web search is not available"),
        ({"messages": MESSAGES, "functions": []}, "send tools"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ({"messages": MESSAGES, "reasoning_effort": "much"}, "reasoning_effort: Input should"),
    ):
        with pytest.raises(APIError, match=message):
            check(CHAT, {"model": "dense", **body})


def test_a_long_value_is_not_echoed() -> None:
    with pytest.raises(APIError) as caught:
        check(COMPLETION, {"model": "dense", "prompt": "a", "stream": "x" * 10_000})
    assert len(str(caught.value)) < 200
    with pytest.raises(APIError) as caught:
        check(COMPLETION, {"model": "dense", "prompt": "a", "y" * 10_000: 1})
    assert len(str(caught.value)) < 400


def test_without_the_models_limits_vllm_decides() -> None:
    asked = {"model": "m", "prompt": [10**9], "max_tokens": 10**6}
    body = schemas.parse(COMPLETION, asked, max_prompts=32)
    limits.check(body, GatewaySettings(), max_model_len=None, vocabulary_size=None)


def test_vllm_knows_every_field_that_we_pass_on() -> None:
    with warnings.catch_warnings():  # vLLM's imports are not clean
        warnings.simplefilter("ignore")
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for ours, theirs in (
        (schemas.CompletionBody, CompletionRequest),
        (schemas.ChatBody, ChatCompletionRequest),
    ):
        without_effect = set(schemas.WithoutEffect.model_fields) - {"model"}
        assert not without_effect & set(theirs.model_fields)
        ours_only = set(ours.model_fields) - without_effect - set(theirs.model_fields)
        assert ours_only <= {"best_of", "suffix"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (openai.types.chat.completion_create_params, schemas.ChatBody),
        (openai.types.completion_create_params, schemas.CompletionBody),
    ],
)
def test_every_field_of_the_openai_client_is_accepted_or_refused_with_a_reason(
    theirs: ModuleType, ours: type[BaseModel]
) -> None:
    params = theirs.CompletionCreateParamsStreaming
    names = {name for each in params.__orig_bases__ for name in each.__annotations__}
    names |= set(params.__annotations__)
    assert len(names) > 15
    (route,) = (route for route, body in schemas.BODIES.items() if body is ours)
    for name in names - set(ours.model_fields):
        with pytest.raises(APIError, match=f"{name} is not accepted: "):
            schemas.parse(route, {"model": "m", name: 1}, max_prompts=1)


def test_fields_without_effect_are_taken_out() -> None:
    body = {
        "model": "m",
        "messages": MESSAGES,
        "metadata": {"a": "b"},
        "store": False,
        "verbosity": None,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    schemas.parse(CHAT, body, max_prompts=1)
    found = schemas.take_without_effect(body)
    assert found == ["metadata", "store", "stream_options.include_obfuscation"]
    options = {"include_usage": True}
    assert body == {"model": "m", "messages": MESSAGES, "stream_options": options}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1e999", "'1e999' is beyond float64"),
        ("-1" + "0" * 400 + ".0", "is beyond float64"),
        ("[" * 300 + "]" * 300, "nested more than 256 deep"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested more than 256 deep"),
    ],
)
def test_what_could_not_be_passed_on_is_refused(value: str, message: str) -> None:
    """Python reads all of these, but does not write them, or not as deep in calls as a gateway."""
    body = f'{{"model": "m", "messages": [{{"role": "user", "x": {value}}}]}}'
    with pytest.raises(APIError, match=message) as caught:
        schemas.read_json(body.encode())
    assert caught.value.status == 400
    in_a_string = f'{{"prompt": {json.dumps(value)}}}'
    assert schemas.read_json(in_a_string.encode()) == {"prompt": value}
    flat = f'{{"tools": [{", ".join(["[]"] * 300)}]}}'
    assert len(schemas.read_json(flat.encode())["tools"]) == 300
