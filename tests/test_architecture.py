"""docs/architecture.md names the files that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("cast_train", "cast_serve", "loadtest", "benchmarks")
LINE = re.compile(r"^( *)(?:(\w+)/)? *(.*)$")


def modules_in_tree() -> dict[str, set[str]]:
    """The modules that the page's tree names, by folder."""
    tree = (ROOT / "docs/architecture.md").read_text().split("## The file tree")[1].split("```")[1]
    found: dict[str, set[str]] = {}
    around: list[str] = []  # the folders that the line lies in
    for line in tree.strip().splitlines():
        match = LINE.match(line)
        assert match is not None
        depth = len(match[1]) // 2
        if depth == 0:
            around = [str(match[2])]
            continue
        if around[0] not in PACKAGES:
            continue
        if match[2] is not None:
            around = [*around[:depth], match[2]]
        names = match[3].split(",")[0].split()  # after a comma: what is no module
        found.setdefault("/".join(around[: depth + (match[2] is not None)]), set()).update(names)
    return found


def test_the_tree_names_every_module_and_no_other() -> None:
    on_disk: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                folder = path.parent.relative_to(ROOT).as_posix()
                on_disk.setdefault(folder, set()).add(path.stem)
    assert modules_in_tree() == on_disk


def test_each_way_in_architecture_names_a_file_once() -> None:
    *sections, tree = (ROOT / "docs/architecture.md").read_text().split("\n## ")[1:]
    assert tree.startswith("The file tree")
    assert len(sections) == 4
    for section in sections:
        named = re.findall(r"`((?:\w+/)+\w+\.py)`", section)
        assert named
        assert [path for path in named if not (ROOT / path).is_file()] == []
        assert len(set(named)) == len(named), section.splitlines()[0]
