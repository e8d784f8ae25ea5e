"""Requests that were made to hurt: what a gateway on the open internet meets in its first week.

`requests(models)` yields (what it is, method, path, headers, body); none of them may bring a status
of 500 or above, or a worker down. `heavy(model)` yields (what it is, path, body): bodies of the
default limit's size that are dear to check, which may hold up nobody else.
"""

import json
from collections.abc import Iterator
from typing import Any

Hostile = tuple[str, str, str, dict[str, str], bytes]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = 10**30
# Values that are wrong for nearly every field.
WRONG: list[Any] = [
    *(-1, 0, HUGE, -HUGE, 1e308, 0.5, True, "", "x", "\u0000", "x" * 5000, [], {}, [[]], [None]),
]
FIELDS = (
    *("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "logprobs", "prompt_logprobs"),
    *("stop", "stop_token_ids", "logit_bias", "seed", "stream", "stream_options", "echo", "user"),
    *("frequency_penalty", "min_tokens", "repetition_penalty", "response_format", "model"),
)
PROMPTS: dict[str, Any] = {
    "token beyond the vocabulary": [10**6],
    "token at the edge of int32": [2**31 - 1],
    "token beyond int64": [2**70],
    "negative token": [-1],
    "a million tokens": [1] * 10**6,
    "a thousand prompts": ["a"] * 1000,
    "prompts in prompts": [["a"]],
    "mixed prompts": ["a", [1]],
    "fractions": [1.5],
    "booleans": [True],
    "null": None,
    "an object": {"a": 1},
    "empty text": "",
    "empty list": [],
    "empty prompt in a list": ["a", ""],
    "empty tokens in a list": [[1], []],
    "a megabyte of one letter": "a" * 10**6,
    "control characters": "\u0000\u0001\u001b[2J",
    "right-to-left marks": "\u202e\u2066abc\u2069",
    "half a surrogate pair": "\ud800",
    "combining marks": "a" + "\u0300" * 10000,
    "special tokens": "<|im_start|>system\n<|im_end|><|endoftext|>" * 50,
    "a template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a format string": "%s%n{0}{}" * 100,
    "a path": "../../../../etc/passwd",
    "a million nulls": "\u0000" * 10**6,
}
RAW: dict[str, bytes] = {
    "nothing": b"",
    "white space": b"   \n",
    "null": b"null",
    "a number": b"1",
    "a string": b'"x"',
    "a list": b"[]",
    "broken": b'{"model": ',
    "two objects": b"{}{}",
    "not UTF-8": b'{"model": "dense", "prompt": "\xff\xfe"}',
    "UTF-16": '{"model": "dense", "prompt": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model": "dense", "prompt": "x"}',
    "half a surrogate pair": b'{"model": "dense", "prompt": "\\ud800"}',
    "half a surrogate pair in bytes": b'{"model": "dense", "prompt": "\xed\xa0\x80"}',
    "UTF-16 without a mark": '{"model": "dense", "prompt": "x"}'.encode("utf-16-le"),
    "UTF-32": '{"model": "dense", "prompt": "x"}'.encode("utf-32"),
    "NaN": b'{"model": "dense", "prompt": "x", "temperature": NaN}',
    "infinity": b'{"model": "dense", "prompt": "x", "temperature": Infinity}',
    "a number of 5000 digits": b'{"model": "dense", "prompt": "x", "seed": ' + b"1" * 5000 + b"}",
    "an exponent": b'{"model": "dense", "prompt": "x", "temperature": 1e999999}',
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
    "closed lists in lists": b"[" * 50_000 + b"]" * 50_000,
    "a deep field": b'{"model": "dense", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "10 MB": b'{"model": "dense", "prompt": "' + b"x" * (10 << 20) + b'"}',
    "10 MB of white space": b" " * (10 << 20),
    "a key of 1 MB": b'{"model": "dense", "prompt": "x", "' + b"k" * (1 << 20) + b'": 1}',
    "100,000 keys": json.dumps({f"k{i}": i for i in range(100_000)}).encode(),
    "a form": b"model=dense&prompt=x",
    "XML": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>",
    "gzip that is none": b"\x1f\x8b\x08\x00",
}
HEADERS: dict[str, dict[str, str]] = {
    "another host": {"Host": "evil.example"},
    "a probe as host": {"Host": "x/livez"},
    "an address as host": {"Host": "169.254.169.254"},
    "no host": {"Host": ""},
    "a forwarded path": {"X-Original-URL": "/livez", "X-Rewrite-URL": "/metrics"},
    "a forwarded host": {"X-Forwarded-Host": "evil.example", "X-Forwarded-For": "127.0.0.1"},
    "a claimed encoding": {"Content-Encoding": "gzip"},
    "a claimed charset": {"Content-Type": "application/json; charset=utf-16"},
    "no type": {"Content-Type": ""},
    "a form's type": {"Content-Type": "multipart/form-data; boundary=x"},
    "a long id": {"X-Request-Id": "x" * 5000},
    "an id with quotes": {"X-Request-Id": "\"'<script>"},
    "a trace that is none": {"traceparent": "00-zz-zz-zz"},
    "a timeout in words": {"X-Request-Timeout": "forever"},
    "an endless timeout": {"X-Request-Timeout": "inf"},
    "a negative timeout": {"X-Request-Timeout": "-1"},
    "a key with nothing in it": {"Authorization": "Bearer "},
    "a key of 20 kB": {"Authorization": "Bearer " + "k" * 20_000},
    "a range": {"Range": "bytes=0-"},
    "an upgrade": {"Connection": "Upgrade", "Upgrade": "websocket"},
    "200 headers": {f"X-H{i}": "x" * 50 for i in range(200)},
}
MESSAGES: dict[str, Any] = {
    "none": [],
    "no role": [{"content": "x"}],
    "an unknown role": [{"role": "root", "content": "x"}],
    "content of another kind": [{"role": "user", "content": 1}],
    "an unknown part": [{"role": "user", "content": [{"type": "exec", "cmd": "ls"}]}],
    "an empty part": [{"role": "user", "content": [{}]}],
    "an image by address": [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
        }
    ],
    "an image from a file": [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
        }
    ],
    "audio": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    "a thousand messages": [{"role": "user", "content": "x"}] * 1000,
    "a tool's answer without a call": [{"role": "tool", "content": "x", "tool_call_id": "y"}],
    "null content": [{"role": "user", "content": None}],
    "a template": [{"role": "user", "content": "{% for i in range(10**9) %}x{% endfor %}"}],
    "a text": "hello",
}
BODIES: dict[str, dict[str, Any]] = {
    "a template of the client's": {"chat_template": "{{ cycler.__init__.__globals__ }}"},
    "arguments of a template": {"chat_template_kwargs": {"x": "y"}},
    "a tool": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "a tool that is none": {"tools": [{}]},
    "10,000 tools": {"tools": [{"type": "function", "function": {"name": "f"}}] * 10_000},
    "a forced tool": {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    "many top logprobs": {"logprobs": True, "top_logprobs": 10**6},
    "a schema that refers to itself": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"$ref": "#"}},
        }
    },
    "a schema that refers on and on": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {
                    "$ref": "#/$defs/0",
                    "$defs": {
                        **{f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(400)},
                        "400": {"type": "integer"},
                    },
                },
            },
        }
    },
    "a schema with a slow pattern": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(a+)+$"}},
        }
    },
    "a schema that is none": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "wizard"}},
        }
    },
    **{
        f"structured outputs: {name}": {"structured_outputs": asked}
        for name, asked in {
            "nothing": {},
            "a text": "a",
            "two constraints": {"regex": "a", "choice": ["a"]},
            "another backend": {"_backend": "outlines", "regex": "a"},
            "what may be or not 60 times": {"regex": ".?" * 60},
            "anything 300 times": {"regex": ".*" * 300},
            "8,000 brackets": {"regex": "(" * 8000 + "a" + ")" * 8000},
            "an open bracket": {"regex": "(((("},
            "a look ahead": {"regex": "(?=a)b"},
            "a reference back": {"regex": r"(a)\1"},
            "a NUL": {"regex": "a\0"},
            "2**31 repetitions": {"regex": "a{1,2147483647}"},
            "a schema that is none": {"json": {"type": "wizard"}},
            "a schema in a text": {"json": '{"type":'},
            "a schema with unique items": {"json": {"type": "array", "uniqueItems": True}},
            "10**9 items": {"json": {"type": "array", "minItems": 10**9}},
            "10**30 characters": {"json": {"type": "string", "minLength": 10**30}},
            "a range of integers": {"json": {"type": "integer", "minimum": -(10**30)}},
            "a schema 80 deep": {"json": json.loads('{"items":' * 80 + "{}" + "}" * 80)},
            "empty choices": {"choice": ["", "a"]},
            "100,000 choices": {"choice": ["a"] * 100_000},
            "choices with quotes": {"choice": ['"', "\\", "\n", "| a"]},
            "a grammar without a root": {"grammar": 'a ::= "b"'},
            "a grammar of itself": {"grammar": "root ::= root"},
            "an ambiguous grammar": {"grammar": 'root ::= a a a a a a a a\na ::= "" | [^x]'},
            "a grammar 8,000 deep": {"grammar": "root ::= " + "(" * 8000 + '"a"' + ")" * 8000},
            "10**9 repetitions": {"grammar": 'root ::= "a"{1,1000000000}'},
            "repeated repetitions": {"grammar": 'root ::= (("a"{1,1000}){1,1000}){1,1000}'},
            "a schema in a grammar": {"grammar": 'start: %json {"minItems": 1000000000}'},
            "a file in a grammar": {"grammar": '%import "/etc/passwd"\nstart: "a"'},
            "a tag of nothing": {"structural_tag": "{}"},
            "a tag without a trigger": {
                "structural_tag": '{"structures": [{"begin": "a", "schema": {}, "end": "b"}]}'
            },
            "a tag of a new form": {
                "structural_tag": '{"type": "structural_tag", "format": {"type": "any_text"}}'
            },
        }.items()
    },
    "a format without its schema": {"response_format": {"type": "json_schema"}},
    "fields without effect": {"metadata": {"a": [{}]}, "store": "x" * 5000, "verbosity": -1},
    "embeddings for a prompt": {"prompt_embeds": "AAAA"},
    "a beam search": {"use_beam_search": True, "n": 8},
    "a transfer of the cache": {"kv_transfer_params": {"remote_host": "evil.example"}},
    "arguments for the engine": {"vllm_xargs": {"a": "b"}},
    "a priority": {"priority": -(2**63)},
    "an id": {"request_id": "x" * 10_000},
}
PATHS = (
    *("/", "//", "/v1", "/v1/", "/v1/completions/", "/v1/completions/../models", "/V1/COMPLETIONS"),
    *("/%2e%2e/etc/passwd", "/v1/completions%00", "/.env", "/admin", "/invocations", "/docs"),
    *("/collective_rpc", "/reset_prefix_cache", "/sleep", "/load_lora_adapter", "/v1/embeddings"),
    *("/dashboard/../../settings.py", "/dashboard/%2e%2e/%2e%2e/settings.py", "/" + "a" * 5000),
)
METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE")


def requests(models: tuple[str, ...]) -> Iterator[Hostile]:
    """All of them; `models` are the names that the gateway serves."""
    base = {"model": models[0], "prompt": "a", "max_tokens": 1}
    chat = {"model": models[0], "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}

    def post(name: str, path: str, body: Any, **headers: str) -> Hostile:
        return name, "POST", path, headers, json.dumps(body).encode()

    for field in FIELDS:
        for value in WRONG:
            yield post(f"{field} = {str(value)[:20]!r}", COMPLETIONS, {**base, field: value})
    for name, prompt in PROMPTS.items():
        yield post(f"prompt: {name}", COMPLETIONS, {**base, "prompt": prompt})
        yield post(f"tokenize: {name}", "/tokenize", {"model": models[0], "prompt": prompt})
        yield post(f"detokenize: {name}", "/detokenize", {"model": models[0], "tokens": prompt})
    for name, messages in MESSAGES.items():
        yield post(f"messages: {name}", CHAT, {**chat, "messages": messages})
    for name, more in BODIES.items():
        yield post(f"chat with {name}", CHAT, {**chat, **more})
        yield post(f"completion with {name}", COMPLETIONS, {**base, **more})
    for name, content in RAW.items():
        for path in (COMPLETIONS, "/v1/compare"):
            yield f"{path}: {name}", "POST", path, {}, content
    for name, headers in HEADERS.items():
        yield f"header: {name}", "POST", COMPLETIONS, headers, json.dumps(base).encode()
    for path in PATHS:
        yield f"path {path[:40]}", "GET", path, {}, b""
        yield f"POST to {path[:40]}", "POST", path, {}, b"{}"
    for method in METHODS:
        yield f"{method} {COMPLETIONS}", method, COMPLETIONS, {}, b""


def heavy(model: str) -> Iterator[tuple[str, str, bytes]]:
    """Each just below 4 MB."""

    def repeated(item: bytes, size: int = 4_100_000) -> bytes:
        return b",".join([item] * (size // (len(item) + 1)))

    def chained(num: int) -> bytes:
        names = {f"{number}": {"$ref": f"#/$defs/{number + 1}"} for number in range(num)}
        schema = {"$ref": "#/$defs/0", "$defs": {**names, f"{num}": {}}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return json.dumps({**base, "response_format": form}).encode()

    base = {"model": model, "prompt": "a", "max_tokens": 1}
    completion = json.dumps(base).encode()[:-1]
    chat = f'{{"model": "{model}", "messages": ['.encode()
    keys = b",".join(b'"%07x": 0' % number for number in range(300_000))
    # Each reference holds the whole path, so that resolving one is dear too.
    path = "/".join(["#", *["a"] * 2000])
    deep = {"schema": {"items": [{"$ref": f"{path}/{number}"} for number in range(900)]}}
    form = {"type": "json_schema", "json_schema": {"name": "x", **deep}}
    bodies = {
        "empty prompts": completion + b', "prompt": [' + repeated(b'""') + b"]}",
        "empty lists for prompts": completion + b', "prompt": [' + repeated(b"[]") + b"]}",
        "objects for prompts": completion + b', "prompt": [' + repeated(b'{"":0}') + b"]}",
        "texts among token ids": completion + b', "prompt": [1,' + repeated(b'""') + b"]}",
        "negative token ids": completion + b', "prompt": [' + repeated(b"-1") + b"]}",
        "token ids": completion + b', "prompt": [' + repeated(b"1") + b"]}",
        "empty stops": completion + b', "stop": [' + repeated(b'""') + b"]}",
        "texts for stop_token_ids": completion + b', "stop_token_ids": [' + repeated(b'""') + b"]}",
        "biases": completion + b', "logit_bias": {' + keys + b"}}",
        "unknown fields": completion + b"," + keys + b"}",
        "unknown options": completion + b', "stream_options": {' + keys + b"}}",
        "lists in lists": completion + b', "prompt": [' + repeated(b"[" * 100 + b"]" * 100) + b"]}",
        "a chain of 1,850 references": chained(1850),
        "a chain of 90,000 references": chained(90_000),
        "references with long paths": json.dumps({**base, "response_format": form}).encode(),
        "a schema of empty lists": completion
        + b', "response_format": {"type": "json_schema", "json_schema": {"name": "x", '
        + b'"schema": {"a": ['
        + repeated(b"[]")
        + b"]}}}}",
    }
    for name, body in bodies.items():
        yield name, COMPLETIONS, body
    yield "numbers for messages", CHAT, chat + repeated(b"0") + b"]}"
    yield "messages", CHAT, chat + repeated(b'{"role":"user"}', 1_600_000) + b"]}"
    yield "empty messages", CHAT, chat + repeated(b"{}") + b"]}"
    yield "parts", CHAT, chat + b'{"role":"user","content":[' + repeated(b"0") + b"]}]}"
    yield "tools", CHAT, chat + b'{"role":"user"}], "tools": [' + repeated(b"0") + b"]}"
    tokens = f'{{"model": "{model}", "tokens": ['.encode()
    yield "texts for tokens", "/detokenize", tokens + repeated(b'""') + b"]}"
