"""A peer's name -> the type of its file, and the program that runs it.

q8_0:native     llama.cpp's own decode in a process of its own, without a server
q8_0:native+fa  the same with flash attention
q8_0:openvino   OpenVINO GenAI in a process of its own, without a server
file:native     llama.cpp's own decode of the very GGUF file that --peers-of names
"""

SOURCE = "q4_1"  # the type of the file that the demo's model comes in
FTYPES = {  # of llama.cpp's quantiser
    "q4_0": "MOSTLY_Q4_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "q3_k_s": "MOSTLY_Q3_K_S",
    "q2_k": "MOSTLY_Q2_K",
    "q8_0": "MOSTLY_Q8_0",
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
}
GIVEN = "file"  # of whatever types the given GGUF file has
TYPES = (SOURCE, *FTYPES, GIVEN)
WAYS = {  # what stands after the colon -> the title
    "native": "llama.cpp's decode, {}",
    "native+fa": "llama.cpp's decode, {}, flash attention",
    "openvino": "OpenVINO GenAI, {}",
}
DEFAULT = "q8_0:native+fa,q4_0:native+fa,q4_k_m:native+fa,q8_0:openvino,q4_0:openvino"


class PeerError(RuntimeError):
    """A peer, or what it needs, failed; the message names the log."""


def parse(name: str) -> tuple[str, str]:
    """A peer's name -> one of `TYPES`, and one of `WAYS`.

    Raises:
        PeerError: if either is not known.
    """
    kind, _, way = name.partition(":")
    check_kind(kind)
    if way not in WAYS:
        ways = ", ".join(f"{kind}:{known}" for known in WAYS)
        raise PeerError(f"peer {name!r} is not known; write one of {ways}")
    return kind, way


def check_kind(kind: str) -> None:
    """Raises PeerError if it is none of `TYPES`."""
    if kind not in TYPES:
        raise PeerError(f"{kind!r} is not a type of peer; choose from {', '.join(TYPES)}")


def title_of(name: str) -> str:
    """The peer's name for people."""
    kind, way = parse(name)
    return WAYS[way].format(kind)
