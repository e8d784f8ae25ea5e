"""A count of things to do -> a progress bar on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn


@contextmanager
def progress(
    name: str, total: int | None
) -> Iterator[tuple[Callable[[], None], Callable[[int | None], None]]]:
    """Shows the bar meanwhile: what advances it, and what changes its total (None: unknown)."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name, total=total)
        yield lambda: bars.advance(task), lambda new: bars.update(task, total=new)
