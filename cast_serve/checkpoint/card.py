"""A converted directory -> its model card, README.md: what it is, what it lost, how to serve it.

The source's own card, if it has one, stands below, and its front matter (licence, languages, tags)
is kept. Figures are those of cast.json; what was not measured is not said.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from cast_serve.checkpoint.declared import BITMASK_24, BITMASK_64
from cast_serve.checkpoint.record import CheckpointError

CARD = "README.md"
TITLE = "# A {}-sparse language model\n"
OUR_TITLE = re.compile(r"\s*# A [\d:-]+-sparse language model\n")
DENSE_CARD = "\n## The card of the dense model\n"
SERVING = """## How to serve it

Install cast-serve; vLLM finds its plugin by itself:

```
cast-serve vllm serve DIR
cast-serve up --variant dense=DENSE_DIR --variant sparse=DIR
```

In Python: `from cast_serve.model import load; model = load("DIR")`.
"""
BITS = {None: "", "int8": ", in 8 bits", "int4": ", in 4 bits"}
TAGS = ("sparse", "compressed-tensors")


def write_card(folder: Path, record: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes README.md; the source's, if there is one, has been copied there.

    Args:
        folder: the directory, complete but for its card.
        record: its cast.json.
        summary: what `inspect` says of it.

    Raises:
        CheckpointError: if the record or the source's card is not as they are written.
    """
    path = folder / CARD
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        text = _written(card, record, summary)
    except (AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            "no model card can be written from the source's cast.json and README.md "
            f"({error!r:.300}); correct or remove what another program wrote there"
        ) from error
    path.write_text(text, encoding="utf-8")


def _written(card: str, record: dict[str, Any], summary: dict[str, Any]) -> str:
    data, dense = _read(card)
    known = data.tags or []
    if "/" in (dense_model := (record.get("source") or {}).get("model", "")):
        data.base_model = dense_model  # a hub's name
    tags = (summary["pattern"], *TAGS)
    data.tags = [*known, *(tag for tag in tags if tag not in known)]
    parts = [_about(summary), _figures(summary), _training(record), SERVING]
    text = "\n".join(part for part in parts if part)
    if dense:
        text += f"{DENSE_CARD}\n{dense}\n"
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _read(card: str) -> tuple[Any, str]:
    """A card's front matter, and its text; of a card of our own, that of the dense model."""
    data: Any = ModelCardData()
    text = card
    if card.startswith("---"):
        with suppress(ValueError, yaml.YAMLError):  # front matter that cannot be read is text
            found = ModelCard(card, ignore_metadata_errors=True)
            data, text = found.data, found.text
    is_ours = OUR_TITLE.match(text)
    return data, (text.partition(DENSE_CARD)[2] if is_ours else text).strip()


def _about(summary: dict[str, Any]) -> str:
    pattern = summary["pattern"]
    form = BITMASK_24 if pattern == "2:4" else BITMASK_64
    n, _, m = pattern.partition(":")
    if pattern == "2:4":
        rule = "Two of every four consecutive weights along in_features are zero"
    elif "-" in n:
        kept = n.replace("-", " to ")
        rule = f"A linear keeps {kept} of every {m} consecutive weights along in_features"
    else:
        rule = f"{int(m) - int(n)} of every {m} consecutive weights along in_features are zero"
    return (
        f"{TITLE.format(pattern)}\n{rule} in {summary['num_sparse_layers']} linears; "
        f"{summary['num_dense_layers']} are dense. The kept weights are stored with a bitmask "
        f"(`{form}`){BITS[summary['quantized']]}. Made by cast-serve.\n"
    )


def _figures(summary: dict[str, Any]) -> str:
    quality = summary["quality"] or summary["quality_before_quantizing"]
    rows = [
        ("share of zeros in the pruned linears", f"{summary['zeros']:.1%}"),
        ("stored bits per weight in them", f"{summary['bits_per_weight']}"),
        ("their size, as a share of the dense model's", f"{summary['linear_bytes_ratio']}"),
        ("all weights, MB", f"{summary['total_weight_bytes'] / 1e6:.1f}"),
    ]
    if quality and "text" in quality:
        name = "perplexity" if summary["quality"] else "perplexity before the values were quantised"
        text = f"{quality['text']}, {quality['num_tokens']:,} tokens in contexts of "
        text += f"{quality['context_tokens']}"
        rows.append((f"{name} ({text})", f"{quality['perplexity_hard']:.2f}"))
    return "| | |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _training(record: dict[str, Any]) -> str:
    config = record.get("config")
    if not config:
        return ""
    return (
        "## How it was trained\n\n"
        f"{record['steps']:,} steps, {record['tokens_seen']:,} tokens, method "
        f"`{record['method']}`, learning rate {config['learning_rate']:g}, distillation from the "
        f"dense model {config['distillation_weight']:g}. `cast.json` has every setting and the "
        "sha256 of every input.\n"
    )
