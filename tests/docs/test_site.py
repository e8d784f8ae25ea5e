"""The site of docs/ builds strictly, and what README and the pages name is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

# No pattern of names.
NAMED = re.compile(r"(?<![\w/])(?:docs|benchmarks)/[\w/.-]*\w(?![\w/.-]*[*{])")
OTHER_HOST = re.compile(r"""(?:src|href)=["']?(?:https?:)?//[^"' >]+|url\(["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # else Material advertises
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_that_name_each_other_are_linked(site: Path) -> None:
    start = (site / "index.html").read_text()
    for name in ("serving", "python", "troubleshooting", "deploy"):
        assert f'href="{name}.html">docs/{name}.md</a>' in start
    assert 'href="#deploy"' in start
    assert 'id="deploy"' in start
    for page in PAGES[1:]:
        place = page.removeprefix("docs/").replace(".md", ".html")
        assert f'href="{place}" class="md-nav__link' in start, page
    there = (site / "benchmarks/log.html").read_text()
    assert 'href="quality.html">benchmarks/quality.md</a>' in there


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = [*site.glob("*.html"), *site.glob("benchmarks/*.html")]
    assert len(pages) >= len(PAGES) - 1  # README is none of them
    for path in (*pages, *site.rglob("*.css")):
        links = re.sub(r"<a [^>]*>", "", path.read_text())  # a reader follows those
        assert not OTHER_HOST.search(links), path


@pytest.mark.parametrize("page", PAGES)
def test_files_of_docs_that_a_page_names_are_there(page: str) -> None:
    for name in NAMED.findall((ROOT / page).read_text()):
        assert (ROOT / name).exists(), name
