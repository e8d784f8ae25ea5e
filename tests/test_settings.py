"""docs/settings.md is what the code says, and has every setting."""

import re
import subprocess
import sys
from pathlib import Path

from cast_serve.gateway.settings import GatewaySettings
from cast_train.config import METHODS

ROOT = Path(__file__).parent.parent


def test_the_page_is_what_the_code_says() -> None:
    check = [sys.executable, str(ROOT / "scripts/settings"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_has_every_setting_with_a_meaning() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| ([^|]+) \| (.+) \|$", page, re.MULTILINE)
    names = {name for name, *_ in rows}
    assert {name for config in METHODS.values() for name in config.model_fields} <= names
    assert set(GatewaySettings.model_fields) <= names
    assert {"--url", "--api-key"} <= names
    assert all(all(cells) for cells in rows)


def test_the_page_has_every_variable_of_a_worker() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    reads = re.compile(r"""(?:getenv\(|environ(?:\.get\(|\[))"(CAST_\w+)""")
    files = [
        path
        for folder in ("kernels", "engine")
        for path in (ROOT / "cast_serve" / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    ]
    found = {name for path in files for name in reads.findall(path.read_text())}
    found -= {"CAST_PARENT_PID"}  # which a gateway sets for its workers
    assert found
    missing = {name for name in found if f"| `{name}` |" not in page}
    assert not missing
