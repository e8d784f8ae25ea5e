"""Our models and rivals' -> TTFT, TPOT, tokens/s and perplexity on the same cores, as JSON.

    .venv/bin/python -m benchmarks.peers --model dense=data/models/smollm2-135m-dense \\
        --model sparse=runs/demo/sparse [--peers q8_0:native+fa,q8_0:openvino] [--cores 0-1] \\
        [--text data/text/heldout-wiki.txt --blocks 32] [--out FILE]

A peer is TYPE:native (llama.cpp's own decode, no server), TYPE:native+fa (the same with flash
attention) or TYPE:openvino (OpenVINO GenAI), of the demo's model or of --peers-of PATH. An empty
--peers compares the models alone. How it is measured: benchmarks/peers/compare.py. The first run
with a peer builds llama.cpp from source.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers import compare, files, names
from benchmarks.peers.names import PeerError
from cast_serve.cores import parse_cores
from cast_train.tokens import read_tokens
from loadtest.report.directory import check_file

DEFAULT = compare.Plan()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its servers are ended too
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=lines[0])
    parser.add_argument("--model", action="append", default=[], help="NAME=DIR, repeatable")
    parser.add_argument(
        "--peers",
        default=names.DEFAULT,
        help=f"separated by commas, each TYPE:WAY; TYPE is {' or '.join(names.TYPES)}, "
        f"WAY {' or '.join(names.WAYS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--peers-of",
        type=Path,
        help="DIR of Llama's layout, or FILE.gguf (default: the demo's model)",
    )
    parser.add_argument("--text", type=Path, help="FILE whose perplexity --blocks asks for")
    for name, default in asdict(DEFAULT).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=type(default), default=default, help="(default: %(default)s)"
        )
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    models = [(name, Path(path)) for name, _, path in (x.partition("=") for x in args.model)]
    asked = [name for name in args.peers.split(",") if name]
    try:
        plan = compare.Plan(**{name: getattr(args, name) for name in asdict(DEFAULT)})
        if args.out is not None:
            check_file("--out", args.out)
        for name, path in models:
            if not path.is_dir():
                raise PeerError(f"--model {name}={path} is not a directory; give NAME=DIR")
        parse_cores(plan.cores)
        kinds = [names.parse(name)[0] for name in asked]
        blocks = blocks_of(args.text, models, plan)
    except (PeerError, ValueError) as error:
        parser.error(str(error))
    shape = "smollm2-135m"
    if args.peers_of is not None:
        whole = args.peers_of.resolve()
        shape = whole.stem if whole.is_file() else whole.parent.name
    command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])

    def result_of(found: dict[str, Any]) -> dict[str, Any]:
        """Writes it to --out too: after each round, so that a failure costs only the rest."""
        result = {"command": command, "shape": shape, **found}
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    try:
        files.install(asked)
        found_files = [files.file_of(kind, args.peers_of) for kind in kinds]
        peers = [*models, *zip(asked, found_files, strict=True)]
        result = result_of(compare.compare(peers, plan, blocks, result_of))
    except PeerError as error:
        sys.exit(f"benchmarks.peers: {error}")
    print(json.dumps(result))


def blocks_of(
    text: Path | None, models: Sequence[tuple[str, Path]], plan: compare.Plan
) -> list[list[int]]:
    """The blocks of tokens whose perplexity is measured; none where none is asked for.

    Raises:
        PeerError: if there is a text without a number of blocks or a model, or the other way round.
        ValueError: if the text cannot be read, or is too short.
    """
    if not plan.blocks and text is None:
        return []
    if not plan.blocks or text is None or not models:
        raise PeerError("perplexity needs --text FILE, --blocks NUMBER and a --model NAME=DIR")
    from transformers import AutoTokenizer  # seconds

    tokenizer = AutoTokenizer.from_pretrained(models[0][1])
    tokens = read_tokens([text], tokenizer, plan.blocks * plan.block_size)
    if len(tokens) < plan.blocks * plan.block_size:
        raise ValueError(
            f"{text} has {len(tokens)} tokens, but {plan.blocks} blocks of {plan.block_size} are "
            "asked for; give a longer text or fewer --blocks"
        )
    found: list[list[int]] = tokens.unflatten(0, (-1, plan.block_size)).tolist()
    return found


if __name__ == "__main__":
    main()
