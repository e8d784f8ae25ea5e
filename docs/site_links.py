"""Pages of docs/ -> the site's: `docs/serving.md`, as pages name each other, becomes a link.

A hook of MkDocs (mkdocs.yml). What it links must exist, or `mkdocs build --strict` fails.
"""

import re
from typing import Any

CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?<![\w/(\[])docs/([\w/-]+\.(?:md|html))")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page's text; all pages lie in docs/ itself."""
    parts = CODE.split(markdown)
    parts[::2] = [NAMED.sub(r"[docs/\1](\1)", text) for text in parts[::2]]
    return "".join(parts)
