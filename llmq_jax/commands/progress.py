"""A bar that shows how far a command has come."""

from collections.abc import Generator
from typing import Any


def with_progress(items: Any, title: str, total: int | None = None) -> Generator[Any, None, None]:
    """The items, with a bar on a terminal's stderr that is gone when they are; `total`: their number, where they
    have no length.

    Nothing may be written to stdout meanwhile: rich takes it over for as long as the bar stands.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, title, total, console=console, transient=True, disable=not console.is_terminal)
