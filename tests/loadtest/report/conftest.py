"""A browser to look at reports."""

from tests.browser import browser, watched

__all__ = ["browser", "watched"]
