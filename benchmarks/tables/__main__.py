"""Records in benchmarks/records and docs/example -> the tables of README, docs and benchmarks.

    .venv/bin/python -m benchmarks.tables [--check]

A table stands between two lines, and only what is between them is written:

    <!-- table: KIND RECORD... -->
    <!-- end of table -->

--check writes nothing and ends with 1 if a table is not what its records say.
"""

import argparse
import difflib
import sys
from pathlib import Path

from benchmarks.tables.pages import rewritten

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=lines[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    is_check = parser.parse_args().check
    differences: list[str] = []
    pages = [path for folder in ("docs", "benchmarks") for path in (ROOT / folder).glob("*.md")]
    for path in (ROOT / "README.md", *sorted(pages)):
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, ROOT)
        if before == after:
            continue
        differences += difflib.unified_diff(
            before.splitlines(), after.splitlines(), str(path), "by its records", lineterm="", n=0
        )
        if not is_check:
            path.write_text(after, encoding="utf-8")
    print("\n".join(differences) or "every table is what its records say")
    if is_check and differences:
        sys.exit(1)


if __name__ == "__main__":
    main()
