"""config.json of a run, which holds all its options: read, compared with that of a command, and with those of other
runs."""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.json_text import parse_json

CONFIG = "config.json"
MARK = "run_format"
"""Field of config.json that tells a run folder from a model folder, which has a config.json too."""
CODE = "code"
"""Field of config.json with the digest of the code, which may change."""
BRANCH = "branched_from"
"""Field of config.json with the checkpoint that a branch of another run began with, which its options may name by the
other's folder."""


def read_run_config(path: Path) -> dict[str, Any] | None:
    """None where this is not the config of a run."""
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and MARK in config else None


def run_below(folder: Path) -> str:
    """For a message about a folder that is no run's: the runs right below it, as `train.arithmetic` leaves one."""
    configs = sorted(folder.glob(f"*/{CONFIG}"))
    runs = (str(path.parent) for path in configs if read_run_config(path) is not None)
    named = " or ".join(islice(runs, 3))  # no more configs are read than it takes
    return f", such as {named}" if named else ""


def differences(old: dict[str, Any], new: dict[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """ "name old -> new" for every field, in the order of the new config. A field that the old config lacks, from an
    older version, equals one that is unused in the new one (None or False). Options of the engine are named as they
    are given: `steps`, for `options.steps`."""
    old, new = _flat(old), _flat(new)
    names = [name for name in [*new, *(old.keys() - new.keys())] if not _within(name, may_change)]
    absent = "(not set)"

    def change(before: Any, after: Any) -> str:
        texts = [value if value is absent else text_of(value) for value in (before, after)]
        contents = " (other contents)" if all(map(is_digest, (before, after))) else ""
        return " -> ".join(texts if texts[0] != texts[1] else map(json.dumps, (before, after))) + contents

    pairs = [(name, old.get(name, absent), new.get(name, absent)) for name in names]
    return [
        f"{name.removeprefix('options.')} {change(before, after)}"
        for name, before, after in pairs
        if before != after
        and json.dumps(before) != json.dumps(after)  # NaN is no other than itself
        and not (before is absent and (after is None or after is False))
    ]


def is_digest(value: Any) -> bool:
    """Whether this is a SHA-256."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def text_of(value: Any) -> str:
    """A value of a config as JSON, for people: without rounding errors in the last digits of a number, and of a SHA-256
    the first twelve digits."""
    if is_digest(value):
        value = value[:12]

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return float(f"{value:.12g}") if isinstance(value, float) else value

    return json.dumps(rounded(value), ensure_ascii=False)


@functools.cache
def code_digest() -> str:
    """Twelve digits of the SHA-256 of the library's code and the running script's (with -m also that of the modules
    beside it), which tell whether either has changed. They depend on the files' names and contents, not on where the
    files are."""
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    library = Path(__file__).parents[1]
    files = {f"library/{file.relative_to(library).as_posix()}": file for file in library.rglob("*.py")}
    if script is not None and Path(script).is_file():  # else it was piped into Python, or has gone
        beside = Path(script).parent.glob("*.py") if main.__package__ else [Path(script)]
        files |= {f"script/{file.name}": file for file in beside}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name].read_bytes()).digest())
    return digest.hexdigest()[:12]


def what_differs(folders: Sequence[str | Path]) -> dict[str, list[str]]:
    """{option or field of the model: its value in each of these runs}, where these are not all the same; "" in a folder
    that has no config of a run, and a dash where it is not set. An option that sets a field of the model's config is
    left out, since the field says more: an option that is not given stands for the preset's value."""
    configs = [_flat(read_run_config(Path(folder) / CONFIG) or {}) for folder in folders]
    names = dict.fromkeys(name for config in configs for name in config)
    names = dict.fromkeys(name for name in names if f"model.{name}" not in names)

    def row(name: str, text: Callable[[Any], str]) -> list[str]:
        values = [config.get(name) for config in configs]
        texts = [value if isinstance(value, str) else "–" if value is None else text(value) for value in values]
        return [text if config else "" for text, config in zip(texts, configs, strict=True)]

    def differ(texts: list[str]) -> bool:
        return len({text for text in texts if text}) > 1

    exact = {name: row(name, json.dumps) for name in names}
    return {
        name: short if differ(short := row(name, text_of)) else exact[name] for name in names if differ(exact[name])
    }


def alike_but_for(option: str, folders: Sequence[Path]) -> list[list[Path]]:
    """The runs in groups of those that differ in this option alone, and in what it sets in the model, in their order;
    one without a config is alone. BadInput where there is no such option, or where no two runs are alike."""
    configs = [_flat(read_run_config(folder / CONFIG) or {}) for folder in folders]
    names = {name for config in configs for name in config}
    known = sorted({name.removeprefix("options.") for name in names} - {MARK})
    if option not in known:
        raise BadInput(f"no run has an option {option!r}; {did_you_mean(option, known)}")
    own = {option, f"options.{option}"}
    given = [(config, config[name]) for config in configs for name in own if config.get(name) is not None]
    if given:  # fields of the model that have its value wherever it is given, as those of dropout
        own |= {name for name in names if name.startswith("model.") and all(c.get(name) == v for c, v in given)}
    groups: dict[Any, list[Path]] = {}
    for folder, config in zip(folders, configs, strict=True):
        rest = {name: value for name, value in config.items() if name not in own}
        groups.setdefault(json.dumps(rest, sort_keys=True) if config else folder, []).append(folder)
    if len(groups) == len(folders):
        others = [name for name in what_differs(folders) if name not in own]
        also = f": they differ in {', '.join(others)} too" if others else ""
        raise BadInput(f"no two of the runs differ in {option} alone, so that there is nothing to average{also}")
    return list(groups.values())


def _within(name: str, fields: Collection[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, names joined by dots."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
