"""docs/security.md: each statement names a test, and each of these tests is there."""

import ast
import re

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/security.md").read_text()
ROW = re.compile(r"^\| (?!statement|---)(.+) \| (.+) \|$", re.M)
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_each_statement_is_held_by_tests_that_are_there() -> None:
    rows = ROW.findall(PAGE)
    assert len(rows) > 20
    for statement, tests in rows:
        named = NAMED.findall(tests)
        assert named, statement
        assert NAMED.sub("", tests).strip(", ") == "", statement
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            found = {node.name for node in tree.body if isinstance(node, functions)}
            assert name in found, f"{file}::{name}"
