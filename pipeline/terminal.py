"""What every command shows on the terminal: on standard error, because standard output may carry JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def progress(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A bar for long work: (start with the total, advance by one). Shown on terminals only."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda total: bar.update(task, total=total), lambda: bar.advance(task)
