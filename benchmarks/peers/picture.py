"""What `compare` returned -> a picture: perplexity against bytes, and against TPOT, of each server.

Down and left is better in both. A server that tells no perplexity is left out, and named.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZE_INCHES = (11.0, 4.8)


def write_png(found: Mapping[str, Any], path: Path) -> None:
    """Draws the picture.

    Raises:
        ValueError: if no server has a perplexity.
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure  # an optional extra

    servers = [each for each in found["servers"].values() if "perplexity" in each]
    if not servers:
        raise ValueError("no server has a perplexity; measure with --text FILE --blocks NUMBER")
    figure = Figure(SIZE_INCHES, layout="constrained")
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    for server in servers:
        is_ours = server["title"].startswith("vLLM")
        marker, color = ("o", "tab:blue") if is_ours else ("s", "tab:orange")
        for axes, value in (
            (by_bytes, server["weight_bytes"] / 1e6),
            (by_time, server["tpot_ms"]),
        ):
            axes.plot(value, server["perplexity"], marker, color=color)
            axes.annotate(
                server["title"].removesuffix(", flash attention"),
                (value, server["perplexity"]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
    by_bytes.set(xlabel="files of weights, MB", ylabel=_perplexity(found["plan"]))
    by_time.set(xlabel="TPOT, ms, one request at a time")
    for axes in (by_bytes, by_time):
        axes.set_xlim(0, 1.35 * axes.get_xlim()[1])  # with room for the names
        axes.grid(alpha=0.3)
    machine = found["machine"]  # a virtual one may hide the name, but not family and model
    cpu = f"{machine['cpu']} (family {machine['family']}, model {machine['model']})"
    title = f"{found['shape']}, {found['cores']} core(s) of {cpu}, {found['date'][:10]}"
    left_out = [s["title"] for s in found["servers"].values() if "perplexity" not in s]
    if left_out:
        title += f"\ntell no perplexity, not drawn: {'; '.join(left_out)}"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _perplexity(plan: Mapping[str, Any]) -> str:
    num_tokens = plan["blocks"] * (plan["block_size"] - 1)
    return f"perplexity, first {num_tokens:,} tokens"
