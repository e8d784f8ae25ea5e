"""Each published form by hand, and what is refused."""

import json
import logging
from pathlib import Path

import pytest

from loadtest.errors import UsageError
from loadtest.send.trace import BLOCK_TOKENS, Arrival, read_trace

OWN = '{"time_s": 0.5, "prompt_tokens": 120, "output_tokens": 64}\n'
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 1025, "output_length": 52, "hash_ids": [46, 47, 2353]}\n'
    '{"timestamp": 30535, "input_length": 1024, "output_length": 26, "hash_ids": [46, 47]}\n'
)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def read(folder: Path, content: str) -> tuple[Arrival, ...]:
    path = folder / "trace"
    path.write_text(content)
    return read_trace(path)


@pytest.mark.parametrize(
    ("content", "arrivals"),
    [
        # The first request is at 0 wherever the file's times begin.
        (
            "5\n 5.5\n5.5\n2e1\n",
            [(0.0, None, None), (0.5, None, None), (0.5, None, None), (15.0, None, None)],
        ),
        (
            OWN + '{"output_tokens": 1, "prompt_tokens": 1, "time_s": 2}',
            [(0.0, 120, 64), (1.5, 1, 1)],
        ),
        (MOONCAKE, [(0.0, 1025, 52, (46, 47, 2353)), (3.053, 1024, 26, (46, 47))]),
        # Seven digits, and a midnight between.
        (
            AZURE + "2023-11-16 23:59:59.6805900,374,44\n2023-11-17 00:00:03.9951690,396,109",
            [(0.0, 374, 44), (4.314579, 396, 109)],
        ),
        # The traces of 2024 name UTC, and leave out a fraction of 0.
        (
            AZURE + "2024-05-12 00:00:00+00:00,2162,5\n2024-05-12 00:00:00.001163+00:00,76,15\n",
            [(0.0, 2162, 5), (0.001163, 76, 15)],
        ),
        (
            BURSTGPT + "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,417,276,693,API log\n",
            [(0.0, 472, 18), (40.5, 417, 276)],
        ),
        # Its third file has two more columns, not at the end.
        (
            BURSTGPT.replace("Model", "Session ID,Elapsed time,Model")
            + "19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log\n"
            + "19440161.0,,2,ChatGPT,36,29,65,API log\n",
            [(0.0, 906, 446), (51.0, 36, 29)],
        ),
    ],
)
def test_formats_by_hand(
    tmp_path: Path, content: str, arrivals: list[tuple[float, int | None, int | None]]
) -> None:
    assert read(tmp_path, content) == tuple(Arrival(*arrival) for arrival in arrivals)


def test_failures_of_the_original_system_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "1,GPT-4,300,0,300,API log\n3,GPT-4,417,276,693,API log\n4,GPT-4,5,6,11,API log\n"
    with caplog.at_level(logging.WARNING, "loadtest.send.trace"):
        # The failed one is first, so it must not set time 0.
        assert read(tmp_path, BURSTGPT + rows) == (Arrival(0.0, 417, 276), Arrival(1.0, 5, 6))
    assert "left out 1 of 3 requests (0 response tokens" in caplog.text
    with pytest.raises(UsageError, match="has no requests"):
        read(tmp_path, BURSTGPT + rows.splitlines()[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (AZURE, "has no requests"),
        ("0\n-1\n", "line 2: '-1' is not a number of seconds"),
        ("1\n0.5\n", "line 2: '0.5' is not a number of seconds, .* not before the line above"),
        ("a\n", "line 1: 'a'"),
        ("nan\n", "line 1: 'nan'"),
        ("inf\n", "line 1: 'inf'"),
        ("0\n\n1\n", "line 2: ''"),
        ("0\n1,5\n", "line 2: '1,5' is not a number of seconds"),
        ('{\n  "time_s": 1', "line 1: '{' is not a JSON object"),
        (OWN + "5\n", "line 2: '5' is not a JSON object"),
        (OWN + OWN.replace("0.5", "0.4"), "line 2: time_s 0.4 is not .* not before the line above"),
        (OWN.replace("0.5", "true"), "line 1: time_s True is not a number of seconds"),
        (OWN.replace("0.5", "1" + 400 * "0"), "line 1: time_s 1000"),
        (OWN.replace("120", "0"), "line 1: prompt_tokens 0 is not a whole number, 1 or more"),
        (OWN.replace("64", "64.0"), "line 1: output_tokens 64.0 is not a whole number"),
        (OWN.replace("64", "true"), "line 1: output_tokens True is not a whole number"),
        # Traces with times in seconds and blocks of 16 tokens have Mooncake's fields and more.
        (
            MOONCAKE.replace("}", ', "turn": 1}'),
            "line 1: fields timestamp, .*, turn are not those of a known trace; give time_s, .*; "
            "or timestamp, input_length, output_length, hash_ids; or TIMESTAMP, .*; or Timestamp, ",
        ),
        (MOONCAKE.replace("30535", "1"), "line 2: timestamp 1 is not a number of milliseconds"),
        # 1024 tokens are two blocks.
        (
            MOONCAKE.replace("[46, 47]", "[46, 47, 48]"),
            r"line 2: hash_ids \[46, 47, 48\] is not .*",
        ),
        (
            MOONCAKE.replace("[46, 47]", '["46"]'),
            "line 2: hash_ids .* whole numbers, at most 2 for",
        ),
        (AZURE + "2023-11-16,3\n", "line 2: '2023-11-16,3' has 2 values, but the header 3"),
        (AZURE + "16/11/2023,3,4\n", "line 2: TIMESTAMP '16/11/2023' is not a time such as 2023"),
        (
            AZURE + "2023-11-16 10:00:01,3,4\n2023-11-16 10:00:00,3,4\n",
            "line 3: TIMESTAMP '2023-11-16 10:00:00' is not .* not before the line above",
        ),
        (AZURE + "2023-11-16 10:00:00,3,0\n", "line 2: GeneratedTokens '0' is not a whole number"),
        # Requests with images are not these requests without.
        (
            AZURE.replace("ContextTokens", "NumImages,ContextTokens") + "2024-10-15,1,3,4\n",
            "line 2: fields TIMESTAMP, NumImages, ContextTokens, GeneratedTokens are not those",
        ),
        (BURSTGPT + "x,GPT-4,3,4,7,API log\n", "line 2: Timestamp 'x' is not a number of seconds"),
        (BURSTGPT + "1,GPT-4,0,4,4,API log\n", "line 2: Request tokens '0' is not a whole number"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"trace .*{message}"):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent cannot be read"):
        read_trace(tmp_path / "absent")
    (tmp_path / "trace").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="trace cannot be read"):
        read_trace(tmp_path / "trace")


def test_blocks_fill_a_prompt_up(tmp_path: Path) -> None:
    # The published traces have one id for each block that was begun.
    for tokens, num_blocks in ((1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2)):
        row = {"timestamp": 0, "input_length": tokens, "output_length": 1}
        lines = [json.dumps({**row, "hash_ids": [*range(n)]}) for n in range(num_blocks + 2)]
        assert [len(read(tmp_path, line)[0].blocks) for line in lines[:-1]] == [
            *range(num_blocks + 1)
        ]
        with pytest.raises(UsageError, match=f"at most {num_blocks} for blocks of 512 tokens"):
            read(tmp_path, lines[-1])
