"""Where the data of a run lie: at the paths of its options; of a folder with several splits, the files of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llmq_jax.command_line import refuse_idle
from llmq_jax.errors import BadInput

USES = {"train": "to learn", "validation": "held out", "test": "to test on"}
"""{split: what its files are for}"""


class Sources(NamedTuple):
    """What readers read: paths, or files of folders (`FolderFiles`)."""

    training: Any
    """None: Python's standard library, or tokens that are prepared."""
    validation: Any = None
    """None: a part of what is learned, or nothing."""
    test: Any = None


def sources_of(options: Any, files_of: Callable[[str], list[Path]], hold_out: bool = True) -> Sources:
    """The data of a run. Of a --data with several splits the files of training are learned, those of validation held
    out, and those of the test left out where a recipe has no --test-data; a line says which these are.

    files_of: the files at a path that the recipe's reader reads.
    hold_out: whether anything is held out at all.

    Raises BadInput for files of a split beside the option that gives others, and for options that choose a part of
    what is learned in the place of these files.
    """
    splits = [split for split in ("validation", "test") if hasattr(options, f"{split}_data")]
    own = by_split(options.data, ("train", *splits) if hold_out else ("train",), files_of)
    found = {}
    for split in splits:
        given = getattr(options, f"{split}_data")
        if split not in own:
            found[split] = one_split(given, split, files_of)
            continue
        found[split] = own[split]
        if given:
            raise BadInput(
                f"{options.data} has {split} files of its own, {_shown(own[split])}: leave --{split}-data out, or give "
                "the files to learn from in a folder of their own"
            )
        beside = f"beside the {split} files of {options.data}, {_shown(own[split])}"
        refuse_idle(options, [(f"{split}_fraction", True, beside)])
    if own.keys() & found.keys() and all(found.values()) and hasattr(options, "split_seed"):
        idle = not getattr(options, "balance", False)
        refuse_idle(options, [("split_seed", idle, f"where {options.data} has the files that are held out")])
    return Sources(own["train"], **found)


def one_split(path: str | None, split: str, files_of: Callable[[str], list[Path]]) -> Any:
    """What an option says to read that is for this split alone: of a folder with several its files, which a line
    says."""
    return by_split(path, (split,), files_of)[split]


def by_split(path: str | None, wanted: tuple[str, ...], files_of: Callable[[str], list[Path]]) -> dict[str, Any]:
    """{split: what to read}, of those wanted that there are. The first must be there, and has all of what is no folder
    with several splits."""
    from llmq_jax.data.folders import FolderFiles
    from llmq_jax.data.split_names import files_by_split

    if path is None or not Path(path).is_dir():
        return {wanted[0]: path}
    files = files_of(path)
    parts = files_by_split(Path(path), files)
    if not parts:
        return {wanted[0]: FolderFiles(Path(path), tuple(files))}
    if wanted[0] not in parts:
        others = " and ".join(f"{split} files ({_shown(part)})" for split, part in parts.items())
        raise BadInput(f"{path} holds {others} and no {wanted[0]} files: name the files to read, or a folder of them")
    uses = [f"{_shown(part)} {USES[split] if split in wanted else 'left out'}" for split, part in parts.items()]
    print(f"{path}: {', '.join(uses)}", flush=True)
    return {split: part for split, part in parts.items() if split in wanted}


def _shown(part: Any) -> str:
    """The files by their names, of several the first."""
    more = f" and {len(part.files) - 1} more" if len(part.files) > 1 else ""
    return f"{part.files[0].relative_to(part.folder)}{more}"
