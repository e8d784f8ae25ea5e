"""Record of benchmarks.peers -> perplexity against bytes, and against TPOT, of each server.

Down and left is better in both. Servers without a perplexity are left out.
"""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.tables.records import read


def frontier(records: Path) -> Figure:
    found = read(records / "peers-intel.json")
    figure = Figure(figsize=(8, 3.4))
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    for server in found["servers"].values():
        if "perplexity" not in server:
            continue
        title = server["title"].removesuffix(", flash attention").replace("'s decode", "")
        colour = "C0o" if title.startswith("vLLM") else "C1s"
        for axes, value in (
            (by_bytes, server["weight_bytes"] / 1e6),
            (by_time, server["tpot_ms"]),
        ):
            axes.plot(value, server["perplexity"], colour)
            place = (value, server["perplexity"])
            axes.annotate(title, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    plan = found["plan"]
    num_tokens = plan["blocks"] * (plan["block_size"] - 1)
    by_bytes.set(xlabel="weights, MB", ylabel=f"perplexity, first {num_tokens:,} tokens")
    by_time.set(xlabel="TPOT, ms, one request at a time")
    for axes in (by_bytes, by_time):
        axes.set_xlim(0, 1.4 * axes.get_xlim()[1])  # with room for the names
        axes.margins(y=0.12)
    machine = found["machine"]  # a virtual one may hide the name, but not family and model
    cpu = f"{machine['cpu']} (family {machine['family']}, model {machine['model']})"
    figure.suptitle(f"SmolLM2-135M, {found['cores']} core of {cpu}", fontsize=10)
    return figure


PLOTS: dict[str, Callable[[Path], Figure]] = {"peers": frontier}
