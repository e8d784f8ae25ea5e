"""OpenVINO GenAI as a process that is asked by lines; its library is a fake here."""

from pathlib import Path

import pytest

from benchmarks.peers import process
from benchmarks.peers.names import PeerError

pytestmark = pytest.mark.usefixtures("fake_library")


def test_it_times_every_token_of_one_prompt_and_the_end_of_several(model: Path, core: int) -> None:
    with process.running("q8_0:openvino", model, [core], 256, 8) as peer:
        timing = peer.ask("Hello", 5)
        assert (timing.output_tokens, len(timing.token_events_s)) == (5, 5)
        assert peer.ask_at_once(["Hello", "a"], 3) > 0
        assert peer.prompt_tokens("Hello") == 5
        assert (peer.about, peer.title, peer.can_score) == (
            "OpenVINO 9.9",
            "OpenVINO GenAI, q8_0",
            False,
        )
        lines = peer.log.read_text().splitlines()
    assert lines[0] == "made: CPU {'INFERENCE_NUM_THREADS': 1}"
    asked = "('apply_chat_template', False), ('do_sample', False), ('ignore_eos', True)"
    assert lines[1] == f"asked: 'Hello' [{asked}, ('max_new_tokens', 5)]"
    assert lines[2] == f"asked: ['Hello', 'a'] [{asked}, ('max_new_tokens', 3)]"


def test_an_answer_that_is_not_whole_is_refused(model: Path, core: int) -> None:
    with process.running("q8_0:openvino", model, [core], 256) as peer:
        with pytest.raises(PeerError, match="q8_0:openvino ended with 1; see"):
            peer.ask("short", 5)
        assert "4 tokens were written where 5 were asked for" in peer.log.read_text()
