"""Pages of docs/ and benchmarks/ -> the site's, where `docs/serving.md` in a text becomes a link.

Hooks of MkDocs (mkdocs.yml). What is linked must exist, or `mkdocs build --strict` fails. The pages
of benchmarks/ stand in a folder of that name.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?<![\w/(\[])((?:docs|benchmarks)/[\w/-]+\.(?:md|html))")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def on_files(files: Files, config: Any) -> Files:
    """Called by MkDocs with what it found in docs/."""
    for path in sorted(BENCHMARKS.glob("*.md")):
        content = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
        files.append(File.generated(config, f"benchmarks/{path.name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Called by MkDocs with each page's text."""
    up = "../" if page.file.src_uri.startswith("benchmarks/") else ""
    parts = CODE.split(markdown)
    parts[::2] = [
        NAMED.sub(lambda found: f"[{found[1]}]({up}{found[1].removeprefix('docs/')})", text)
        for text in parts[::2]
    ]
    return "".join(parts)
