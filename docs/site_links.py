"""Pages of docs/ -> the site's: `docs/serving.md`, as pages name each other, becomes a link.

Hooks of MkDocs (mkdocs.yml). What is linked must exist, or `mkdocs build --strict` fails.
benchmarks/log.md becomes a page beside the others.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?<![\w/(\[])((?:docs|benchmarks)/([\w/-]+\.(?:md|html)))")
LOG = Path(__file__).resolve().parents[1] / "benchmarks/log.md"


def on_files(files: Files, config: Any) -> Files:
    """Called by MkDocs with what it found in docs/."""
    content = LOG.read_text(encoding="utf-8").replace("](../docs/", "](")
    files.append(File.generated(config, LOG.name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page's text; all pages lie in docs/ itself."""
    parts = CODE.split(markdown)
    parts[::2] = [NAMED.sub(r"[\1](\2)", text) for text in parts[::2]]
    return "".join(parts)
