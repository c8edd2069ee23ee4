"""Inputs that are almost right: valid ones with a few changes of the kinds that damage and malice make.

Bytes are flipped, cut off, put in, left out and copied from elsewhere; integers, in binary or in digits, become the
numbers at the ends of their types. JSON is changed as a value, too, so that what comes out parses: another type, a key
that is missing or unknown, a value that is there twice, numbers beyond all bounds, lists within lists.
"""

import copy
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

EXTREMES = (
    0,
    1,
    -1,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**30,
)
TEXTS = ("", "a", "null", "../../x", "/etc/passwd", "\0", "\ud800", "{{ 1 }}", "a" * 10_000, "ｅ́😀", "%s{0}", "\n")
NUMBERS = (*EXTREMES, -(2**31), -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf)
DEEP = 3_000  # lists within one another, more than Python's own limit on recursion
DIGITS = 5_000  # of an integer, more than Python's own limit


def mutated(rng: random.Random, content: bytes, is_json: bool) -> bytes:
    """The content with one to four changes; of JSON, half of the time, to its values."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = (_json_changed if is_json and rng.random() < 0.6 else _bytes_changed)(rng, content)
    return content


# Bytes


def _flip(rng: random.Random, data: bytearray, place: int) -> None:
    data[place] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, data: bytearray, place: int) -> None:
    del data[place:]


def _insert(rng: random.Random, data: bytearray, place: int) -> None:
    data[place:place] = rng.choice((rng.randbytes(rng.randint(1, 16)), b"\0" * 8, b"\xff" * 8, b"\n", b'"', b"{", b"["))


def _delete(rng: random.Random, data: bytearray, place: int) -> None:
    del data[place : place + rng.choice((1, 1, 4, 8, 64))]


def _splice(rng: random.Random, data: bytearray, place: int) -> None:
    """A piece from elsewhere, in place of what was there or before it."""
    source, size = rng.randrange(len(data)), rng.randint(1, 64)
    piece = data[source : source + size]
    data[place : place + rng.choice((0, len(piece)))] = piece


def _integer(rng: random.Random, data: bytearray, place: int) -> None:
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(EXTREMES) % 2 ** (8 * size)
    data[place : place + size] = number.to_bytes(size, rng.choice(("little", "little", "big")))


def _digits(rng: random.Random, data: bytearray, place: int) -> None:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if found:
        match = rng.choice(found)
        data[match.start() : match.end()] = str(rng.choice(NUMBERS)).encode()


CHANGES: tuple[Callable, ...] = (_flip, _truncate, _insert, _delete, _splice, _integer, _integer, _digits)


def _bytes_changed(rng: random.Random, content: bytes) -> bytes:
    if not content:
        return rng.randbytes(8)
    data = bytearray(content)
    rng.choice(CHANGES)(rng, data, rng.randrange(len(data)))
    return bytes(data)


# JSON


def _json_changed(rng: random.Random, content: bytes) -> bytes:
    """Of JSON lines one is changed; what does not parse any more is changed as bytes."""
    try:
        return _written(_value_changed(rng, json.loads(content)))
    except (ValueError, RecursionError):
        pass
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    try:
        lines[place] = _written(_value_changed(rng, json.loads(lines[place])))
    except (ValueError, RecursionError):
        return _bytes_changed(rng, content)
    return b"\n".join(lines)


def _written(value: Any) -> bytes:
    # What Python would not write itself.
    text = json.dumps(value).replace('"<deep>"', "[" * DEEP + "]" * DEEP)
    return text.replace('"<digits>"', "9" * DIGITS).encode()


def _value_changed(rng: random.Random, value: Any) -> Any:
    """One of the values inside, any as likely as another, is replaced, left out, doubled or moved."""
    whole = {"value": copy.deepcopy(value)}
    places = list(_places(whole))
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind <= 2:
        holder[key] = _other(rng, holder[key])
    elif kind == 3 and holder is not whole:
        del holder[key]
    elif kind == 4 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice((1, 1, 1000))
    elif kind == 4 and holder is not whole:
        holder[rng.choice(TEXTS)] = holder.pop(key)
    else:
        source, name = rng.choice(places)
        holder[key] = copy.deepcopy(source[name]) if source is not whole else [holder[key]]
    return whole["value"]


def _places(value: Any) -> Any:
    """(holder, key) of every value inside."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _other(rng: random.Random, value: Any) -> Any:
    kinds: list[Any] = [None, True, False, {}, [], rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(NUMBERS)]
    return rng.choice((*kinds, [value], {"value": value}, {"0": value}, str(value), "<deep>", "<digits>"))
