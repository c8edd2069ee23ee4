"""How a parity check is shown: tables of differences, what is known of the first one, one line in the end.

Numbers above the tolerance are red and have a star, which remains where a file has no colours; where rounding explains
them they are yellow and have a tilde.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from convert.parity_check import Distribution
from convert.parity_trace import First, Place
from convert.parity_weights import Difference, Gradient, Unmatched

NUMBER = len("*1.0e-06")
LISTED = 8
"""Names shown of a long list."""
BESIDE = 4
"""Places shown on either side of the first that differs."""


def show_hidden_states(console: Console, places: Sequence[Place], tolerance: float, first: First | None) -> None:
    """Layers as rows, the places inside a block as columns; a cell is "absolute relative", or one above the other.

    The cell that is, or holds, the first difference is marked.
    """
    blocks: dict[int, tuple[Place | None, dict[tuple[str, ...], Place]]] = {}
    for place in places:
        if place.layer is not None:
            block, parts = blocks.get(place.layer, (None, {}))
            parts |= {part.path: part for part in (place.parts if not place.path else (place,))}
            blocks[place.layer] = (block if place.path else place), parts
    columns = list(dict.fromkeys(path for _, parts in blocks.values() for path in parts))
    separator = " " if console.width >= len("embeddings") + (len(columns) + 1) * (2 * NUMBER + 2) else "\n"

    def cell(place: Place | None) -> Text | str:
        if place is None:
            return ""
        numbers = _number(place.output, tolerance)
        is_block = place.layer is not None and not place.path  # its parts have cells of their own
        if first and (place is first.place if is_block else _holds(place, first.place)):
            numbers.stylize("reverse")
        return Text.assemble((f"{place.output.absolute:.1e}{separator}", "dim"), numbers)

    table = _table("layer")
    for path in columns:
        table.add_column(" ".join(path).replace("_", " "), justify="right", min_width=NUMBER)
    table.add_column("output", justify="right", min_width=NUMBER)
    shown = set()
    for place in places:
        if place.layer is None:
            table.add_row(place.name, *("" for _ in columns), cell(place))
        elif place.layer not in shown:
            shown.add(place.layer)
            block, parts = blocks[place.layer]
            table.add_row(str(place.layer), *(cell(parts.get(path)) for path in columns), cell(block))
    order = "absolute and relative" if separator == " " else "absolute above relative"
    _show(console, "hidden states", f"largest difference, {order}", table)


def show_gradients(console: Console, gradients: Sequence[Gradient], tolerance: float) -> None:
    """Parameters as rows, layers as columns; as many tables, one below the other, as the layers need."""
    rows: dict[tuple[str, str], dict[int | None, Difference]] = {}
    for gradient in gradients:
        row = rows.setdefault(_split(gradient), {})
        found = row.get(gradient.layer)  # experts of a layer share a row: the worst is shown
        if found is None or not gradient.difference.relative <= found.relative:
            row[gradient.layer] = gradient.difference
    layers = sorted({gradient.layer for gradient in gradients if gradient.layer is not None})
    names = max((len(name) + 2 * bool(prefix) for prefix, name in rows), default=0)
    room = max(1, (console.width - names) // (NUMBER + 1))
    # The first page also has the columns of the largest over all layers.
    pages = [layers[: room - 2]] + [layers[i : i + room] for i in range(max(room - 2, 0), len(layers), room)]
    for page, shown in enumerate(pages):
        table = _table("parameter", padding=(0, 1, 0, 0))
        for title in (*(("absolute", "relative") if page == 0 else ()), *map(str, shown)):
            table.add_column(title, justify="right", min_width=NUMBER)
        heading = ""
        for (prefix, name), row in rows.items():
            if prefix and prefix != heading:
                table.add_row(Text(prefix, style="dim"))
            heading = prefix
            if page and not prefix:
                continue
            worst = _worst(row.values(), tolerance)
            totals = (Text(f"{worst.absolute:.1e}", style="dim"), _number(worst, tolerance)) if page == 0 else ()
            cells = (_number(row[layer], tolerance) if layer in row else "" for layer in shown)
            table.add_row("  " * bool(prefix) + name, *totals, *cells)
        what = "the largest over the layers, then relative by layer" if layers else ""
        _show(console, "gradients" if page == 0 else "", what if page == 0 else "", table)


def show_noisy(console: Console, places: Sequence[Place], gradients: Sequence[Gradient], tolerance: float) -> None:
    """Differences above the tolerance that are no fault: rounding explains them."""
    named = [(place.name, place.output) for place in _inside_out(places)]
    named += [(f"input of {place.name}", place.input) for place in _inside_out(places) if place.input is not None]
    named += [(f"gradient of {gradient.key}", gradient.difference) for gradient in gradients]
    noisy = [(found, name) for name, found in named if _is_noisy(found, tolerance)]
    if noisy:
        found, name = max(noisy, key=lambda pair: pair[0].relative)
        console.print()
        console.print(
            f"~ above the tolerance, and no more than rounding: {len(noisy)} in all, the largest {name}, "
            f"{found.relative:.1e}, where rounding explains {found.rounding:.1e}",
            style="yellow",
            soft_wrap=True,
        )


def show_first(console: Console, first: First, tolerance: float, weights: Mapping[str, float]) -> None:
    """The places around the first difference. `weights` says how far apart the parameters themselves are, by name."""
    place = first.place
    at = first.among.index(place)
    beside = first.among[max(0, at - BESIDE) : at + BESIDE + 1]
    if len(beside) > 1 or place.input is not None:
        table = _table("place", "in transformers")
        table.add_column("in", justify="right")
        table.add_column("out", justify="right")
        for other in beside:
            given = "" if other.input is None else _number(other.input, tolerance)
            style = "bold" if other is place else ""
            table.add_row(Text(other.name, style=style), other.theirs, given, _number(other.output, tolerance))
        _show(console, "around the first difference", "relative, of what goes in and what comes out", table)
    console.print()
    if first.before:
        console.print(f"What goes into {place.name} differs, and what comes before agrees: look between.")
        return
    if place.parts:
        console.print(f"The parts of {place.name} agree: look at what it makes of them.")
        return
    if place.input is not None:
        console.print(f"The same goes into {place.name}, and something else comes out.")
    known = [key for key in place.keys if key in weights]
    if known:
        console.print("It reads:")
    lines = []
    for key in known:
        same = ("the same on both sides", "dim")
        verdict = same if weights[key] == 0 else (f"differs by up to {weights[key]:.1e}", "bold red")
        lines.append(Text.assemble(f"{key}  ", verdict))
    _list(console, lines)


def show_unmatched(console: Console, unmatched: Unmatched) -> None:
    for title, names in (
        ("parameters that transformers has and we do not", unmatched.theirs),
        ("parameters that we have and transformers does not", unmatched.ours),
        ("parameters whose shapes do not fit", unmatched.other_shape),
    ):
        if names:
            console.print()
            console.print(f"{title} ({len(names)})", style="bold red")
            _list(console, names)


def show_distributions(console: Console, distributions: Sequence[Distribution]) -> None:
    table = _table("")
    for title in ("mean KL", "largest KL", "same top-1"):
        table.add_column(title, justify="right")
    for found in distributions:
        table.add_row(found.name, f"{found.mean:.1e}", f"{found.largest:.1e}", f"{found.agreement:.1%}")
    _show(console, "next-token distributions", "KL divergence from transformers in float32, in nats", table)


def _list(console: Console, lines: Sequence[str | Text]) -> None:
    for line in lines[:LISTED]:
        console.print(Text("  ").append(line), soft_wrap=True)
    if len(lines) > LISTED:
        console.print(f"  and {len(lines) - LISTED} more")


def _table(*titles: str, **options) -> Table:
    return Table(*titles, box=None, header_style="bold", pad_edge=False, **options)


def _show(console: Console, title: str, explanation: str, table: Table) -> None:
    console.print()
    if title:
        console.print(Text.assemble((title, "bold cyan"), (f"  {explanation}", "dim")))
    console.print(table)


def _holds(place: Place, first: Place) -> bool:
    return place is first or any(_holds(part, first) for part in place.parts)


def _inside_out(places: Sequence[Place]) -> Iterator[Place]:
    for place in places:
        yield from _inside_out(place.parts)
        yield place


def _is_noisy(difference: Difference, tolerance: float) -> bool:
    return difference.relative > tolerance and not difference.above(tolerance)


def _number(difference: Difference, tolerance: float) -> Text:
    if difference.above(tolerance):
        return Text(f"*{difference.relative:.1e}", style="bold red")
    if _is_noisy(difference, tolerance):
        return Text(f"~{difference.relative:.1e}", style="yellow")
    return Text(f"{difference.relative:.1e}", style="yellow" if difference.above(tolerance / 10) else "green")


def _worst(differences: Collection[Difference], tolerance: float) -> Difference:
    """The largest difference; those above the tolerance come before those that rounding explains, and NaN is the
    largest of all."""

    def size(value: float) -> float:
        return math.inf if math.isnan(value) else value

    worst = max(differences, key=lambda found: (found.above(tolerance), size(found.relative)))
    return worst._replace(absolute=max((found.absolute for found in differences), key=size))


def _split(gradient: Gradient) -> tuple[str, str]:
    """A parameter's name as ("transformer.h.N", "mlp.c_fc.weight"), the same in all layers; ("", name) outside them."""
    if gradient.layer is None:
        return "", gradient.key
    parts = gradient.key.split(".")
    at = parts.index(str(gradient.layer))
    rest = ("*" if part.isdecimal() else part for part in parts[at + 1 :])
    return ".".join([*parts[:at], "N"]), ".".join(rest)
