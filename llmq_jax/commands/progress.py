"""A progress bar for commands."""

from collections.abc import Generator
from typing import Any


def with_progress(items: Any, title: str, total: int | None = None) -> Generator[Any, None, None]:
    """The items, with a progress bar on stderr if that is a terminal, which disappears after the last. `total`: their
    number, where they have no length.

    Nothing may be written to stdout meanwhile: rich takes it over as long as the bar is shown.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, title, total, console=console, transient=True, disable=not console.is_terminal)
