"""The flags of `cast-train study` -> the study, its table, and one line of JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.studies import report, study
from cast_serve.options import option
from cast_train.config import read_toml

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    model: Annotated[
        Path,
        option("MODEL", "Dense model: a directory, or ORG/NAME or ORG/NAME@REVISION on a hub."),
    ],
    text: Annotated[list[Path], option("FILE", "UTF-8 text; repeatable.", name="--text")],
    heldout: Annotated[Path, option("FILE", "Text to measure on, never trained on.")],
    out: Annotated[Path, option("DIR", "Folder to write; an unfinished study in it is resumed.")],
    config: Annotated[
        Path | None, option("FILE", "TOML file of settings that all ways share.", "none")
    ] = None,
    ways: Annotated[
        str | None,
        option(
            "WAYS",
            "Ways to compare, separated by ';', each with KEY=VALUE for any setting of the run, "
            "such as 'ste;soft_topk;soft_topk penalty_weight=1'.",
            "all",
        ),
    ] = None,
    seeds: Annotated[int, option("N", "Runs per way.", min=1)] = 3,
    first_seed: Annotated[
        int, option("N", "Seed of the first run; later runs count up from it.", min=0)
    ] = 0,
    choices: Annotated[
        list[Path] | None,
        option("FILE", "Multiple-choice questions for every model, JSONL; repeatable.", "none"),
    ] = None,
    rival: Annotated[
        list[Path] | None,
        option("DIR", "Model pruned by other means, to measure too; repeatable.", "none"),
    ] = None,
) -> None:
    """Compare ways of learning the pattern at equal tokens."""
    settings = read_toml(config) if config is not None else {}
    result = study.run(
        *(model, text, heldout, out, settings),
        ways=study.ways_of(ways),
        seeds=range(first_seed, first_seed + seeds),
        choices=choices or [],
        rivals=rival or [],
    )
    print(report.table_of(result))
    print(json.dumps({"out": str(out), "summary": result["summary"]}), flush=True)


def main(arguments: Sequence[str]) -> None:
    """Raises what `study.run` raises; wrong flags are told by the command that called."""
    app(arguments, prog_name="cast-train study", standalone_mode=False)
