"""Where a run's data are: at the paths of its options and, in a folder with several splits, in the files of each
split; and which records are held out where there is no file of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.options import default_is, refuse_idle
from train.options import split_of


@dataclass(frozen=True)
class RecordOptions:
    fields: Annotated[str | None, default_is("as --data says")] = None
    """What fields are called in the files, where that is not as --data says: instruction=problem,output=solution."""
    bad_rows: Annotated[Literal["error", "drop"] | None, default_is("error")] = None
    """What to do with rows that cannot be used, such as those with an empty answer: end with an error that names the
    first and counts the others, or leave them out (drop) and tell the same."""

    def field_names(self) -> dict[str, str] | None:
        """{our name: its name in the files}. BadInput for what is no pair of names, or has a name twice."""
        if self.fields is None:
            return None
        pairs = [tuple(name.strip() for name in part.split("=")) for part in self.fields.split(",")]
        if not all(len(pair) == 2 and all(pair) for pair in pairs):
            raise BadInput(
                f"--fields is {self.fields!r} and must be pairs of names: instruction=problem,output=solution"
            )
        for names in zip(*pairs, strict=True):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise BadInput(f"--fields {self.fields} names {twice!r} twice; give each field one name")
        return dict(pairs)

    def left_out(self) -> list[BadInput] | None:
        """A list for the errors of rows that are left out; None: such rows end the run."""
        return [] if self.bad_rows == "drop" else None


def tell_left_out(left_out: Sequence[BadInput] | None) -> None:
    """Print how many rows were left out, and why the first was."""
    if left_out:
        print(f"{counted(len(left_out), 'row')} left out, which cannot be used; the first: {left_out[0]}")


USES = {"train": "to learn", "validation": "held out", "test": "to test on"}
"""{split: what its files are for}"""
FilesOf = Callable[[str], list[Path]]
"""The files at a path that a reader reads."""


class Sources(NamedTuple):
    """What the data's readers are given: paths, or files of folders (`FolderFiles`)."""

    training: Any
    """None: Python's standard library, or prepared tokens."""
    validation: Any = None
    """None: a part of the training data is held out, or nothing is."""
    test: Any = None


def sources_of(options: Any, files_of: FilesOf | None = None, hold_out: bool = True) -> Sources:
    """The data of a run. Where --data is a folder with several splits, its training files are learned, its validation
    files held out, and its test files left out unless the recipe has --test-data; a line is printed that names them.

    files_of: the files at a path that the recipe's reader reads; None: those of records.
    hold_out: whether anything is held out at all.

    Raises BadInput where the folder has files of a split, and an option gives other files for it or chooses a part of
    the training data in their place.
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


def held_out_apart(
    options: Any, sources: Sources, read: Callable[[Any], list], identity: Callable[[Any], str], noun: str
) -> tuple[list, list]:
    """(training, validation) records, none of which is in both; prints how many are not learned for that reason. With
    --evaluate-every 0 all are learned.

    read: gives the records of a source. identity: equal for equal records. noun: what messages call one.
    """
    from llmq_jax.data import split_documents

    everything = read(sources.training)
    if options.evaluate_every == 0:
        return everything, []
    if sources.validation:
        validation, learned_once = read(sources.validation), len(everything)
    else:
        distinct = list({identity(record): record for record in everything}.values())
        if len(distinct) < 2:
            raise BadInput(
                f"{sources.training} holds no two different {noun}s, and some are held out: give more, or "
                "--validation-data"
            )
        _, validation = split_documents(distinct, *split_of(options))
        learned_once = len(everything) - len(validation)
    held_out = set(map(identity, validation))
    training = [record for record in everything if identity(record) not in held_out]
    if not training:
        raise BadInput(f"{sources.training}: every {noun} is in {sources.validation} too; give others to learn")
    if len(training) < learned_once:
        print(f"not learned, since they are held out too: {counted(learned_once - len(training), noun)}")
    return training, validation


def one_split(path: str | None, split: str, files_of: FilesOf | None = None) -> Any:
    """What to read for an option that is for one split alone: its path or, in a folder with several splits, that
    split's files; a printed line then names them."""
    return by_split(path, (split,), files_of)[split]


def by_split(path: str | None, wanted: tuple[str, ...], files_of: FilesOf | None) -> dict[str, Any]:
    """{split: what to read}, for the wanted splits that are there. The first must be there; where the path is no folder
    with several splits, all of it belongs to the first."""
    from llmq_jax.data.folders import FolderFiles
    from llmq_jax.data.records import record_files
    from llmq_jax.data.split_names import files_by_split

    if path is None or not Path(path).is_dir():
        return {wanted[0]: path}
    files = (files_of or record_files)(path)
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
    """The name of the file; of several, that of the first and how many more there are."""
    more = f" and {len(part.files) - 1} more" if len(part.files) > 1 else ""
    return f"{part.files[0].relative_to(part.folder)}{more}"
