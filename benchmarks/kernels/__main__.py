"""Layer shapes and token counts -> the sparse op's times beside other ops': table, JSON, picture.

    .venv/bin/python -m benchmarks.kernels [--shapes llama-1b] [--tokens 1,4,8,16,64] [--threads 1]
        [--device cpu|cuda] [--weights bf16|int8|int4|int4-64|int4-32]
        [--sparsity 2:4|32:64] [--out DIR]

`cast-loadtest kernels` is the same. How it is measured: cpu.py and gpu.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from benchmarks.kernels.shapes import check_weights, parse_sparsity, parse_tokens, shapes_of
from cast_serve.options import option
from loadtest.report import commands
from loadtest.report.directory import check_out

app = typer.Typer(add_completion=False)


@app.command()
def kernels(
    shapes: Annotated[
        str, option("NAME", "Model whose linears to time: smollm2-135m, llama-1b or llama-8b.")
    ] = "llama-1b",
    tokens: Annotated[str, option("N,N", "Tokens per call.")] = "1,4,8,16,64",
    threads: Annotated[int, option("N", "CPU threads.", min=1)] = 1,
    device: Annotated[str, option("cpu|cuda", "Device to run the op on.")] = "cpu",
    weights: Annotated[
        str, option("NAME", "Weights of the sparse op: bf16, int8, int4, int4-64 or int4-32.")
    ] = "bf16",
    sparsity: Annotated[
        str, option("N:M", "Pattern; on a CPU any with M dividing 64, which is timed beside 2:4.")
    ] = "2:4",
    out: Annotated[
        Path | None, option("DIR", "New folder for result.json and, on CPUs, report.png.", "none")
    ] = None,
) -> None:
    """Time the sparse op against others, interleaved, without a server.

    On a CPU against vLLM's dense op and torch's, with int8 or int4 also vLLM's int8 op; on a GPU
    against cuBLAS, and with bf16 also torch's 2:4 products or with int8 the bf16 2:4 op.
    """
    try:
        linears = shapes_of(shapes)
        counts = parse_tokens(tokens)
        if device not in ("cpu", "cuda"):
            raise ValueError(f"--device {device} is unknown; choose cpu or cuda")
        check_weights(weights, device)
        kept = parse_sparsity(sparsity, device)
        if out is not None:
            check_out(out)
    except ValueError as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    bench: Any  # a benchmark's needs are met only where it runs
    if device == "cuda":
        from benchmarks.kernels import gpu as bench
    else:
        import torch

        from benchmarks.kernels import cpu as bench

        torch.set_num_threads(threads)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("shapes x tokens", total=len(linears) * len(counts))
        try:
            more = {} if kept is None else {"kept": kept}
            result = bench.run(linears, counts, lambda: progress.advance(task), weights, **more)
        except (RuntimeError, ValueError) as error:
            print(f"benchmarks.kernels: {error}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    failures = []
    if out is not None:
        failures = commands.attempt(f"--out {out}", lambda: bench.write_out(out, result))
    console = Console()
    console.width = max(console.width, bench.TABLE_WIDTH)
    console.print(bench.table_of(result))
    commands.finish(result, failures)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process with the exit code.

    Args:
        arguments: None for those of this process.
    """
    app(arguments, prog_name="python -m benchmarks.kernels")


if __name__ == "__main__":
    main()
