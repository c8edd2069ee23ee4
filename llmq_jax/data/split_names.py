"""The splits of a data set that the names of its files tell: train.jsonl and test.jsonl,
train-00000-of-00002.parquet, the folders train/ and validation/.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from llmq_jax.data.folders import FolderFiles
from llmq_jax.data.records import format_of, holds_records
from llmq_jax.errors import BadInput

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
"""{split: the words that name it}: a whole name of a file or folder, its beginning before - _ . or a digit, or its end
(of a file's, before its suffix and the number of a shard) after - _ or a dot."""

_WORDS = {word: split for split, words in SPLITS.items() for word in words}
_ANY = "|".join(_WORDS)
_NAMED = re.compile(rf"^({_ANY})(?=[-_.0-9]|$)|[-_.]({_ANY})(?=(?:-\d+-of-\d+)?(?:\.[a-z]+)*$)", re.IGNORECASE)
_ADVICE = "name the files to read, or give one folder per split"
_log = logging.getLogger(__name__)


def files_by_split(folder: Path, files: Sequence[Path]) -> dict[str, FolderFiles]:
    """{split: its files}, in the order of SPLITS, of a folder whose files belong to several splits; empty where all
    belong to one, or their names tell no split.

    files: those below the folder that are read. Their own names count, and those of the folders between.
    Raises BadInput where some files name a split and others none, and for a file of records whose path names two.
    Source code has such names for other reasons (test_tools.py). So where not all files name a split, and those that do
    are neither files of records nor a .txt that names the training split, the names are ignored, which is logged.
    """
    named = {}
    for file in files:
        words = [word for part in file.relative_to(folder).parts for word in _NAMED.finditer(part)]
        splits = {_WORDS[word[0].strip("-_.").lower()] for word in words}
        if len(splits) == 1:
            named[file] = splits.pop()
        elif splits and holds_records(file):
            both = " and ".join(split for split in SPLITS if split in splits)
            raise BadInput(f"{folder}: {file.relative_to(folder)} names the splits {both}: {_ADVICE}")
    unnamed = next((file for file in files if file not in named), None)
    if named and unnamed is not None:
        for file, split in named.items():
            if holds_records(file) or (split == "train" and format_of(file) == ".txt"):
                name, other = file.relative_to(folder), unnamed.relative_to(folder)
                raise BadInput(f"{folder}: {name} names the split {split}, and {other} names none: {_ADVICE}")
        example = next(iter(named)).relative_to(folder)
        _log.warning(
            "%s: all files are read alike, though %d of %d have the name of a split, as %s",
            *(folder, len(named), len(files), example),
        )
        return {}
    parts = {
        split: FolderFiles(folder, tuple(file for file in files if named[file] == split), split)
        for split in SPLITS
        if split in named.values()
    }
    return parts if len(parts) > 1 else {}
