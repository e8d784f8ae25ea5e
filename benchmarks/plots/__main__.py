"""Records in benchmarks/records -> the plots of README, docs and benchmarks, in docs/plots.

    .venv/bin/python -m benchmarks.plots [NAME...]

Writes NAME.svg for light pages and NAME-dark.svg for dark ones; without a name, every plot.
"""

import argparse
from pathlib import Path

from benchmarks.plots.svg import PLOTS, files

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("python -m benchmarks.plots", description=lines[0])
    parser.add_argument("name", nargs="*", help=f"one of {', '.join(PLOTS)}")
    names = parser.parse_args().name or list(PLOTS)
    if unknown := set(names) - set(PLOTS):
        parser.error(f"no plot is named {', '.join(unknown)}; there are {', '.join(PLOTS)}")
    folder = ROOT / "docs/plots"
    folder.mkdir(exist_ok=True)
    for name in names:
        for file, text in files(name, ROOT / "benchmarks/records").items():
            (folder / file).write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(names)} to {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
