"""Tables that are printed without cutting any cell."""

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table with all that its cells hold. Where a terminal is narrower, or a pipe counts as narrower, its lines
    run on into the next: rich would cut the figures."""
    console = Console()
    whole = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, whole)
    console.print(table)
