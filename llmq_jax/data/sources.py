"""Readers of training text: single files and folders of them.

They are as strict as the readers of records (records.py), which they are built on.
"""

from collections.abc import Iterator
from pathlib import Path

from llmq_jax.data.folders import DataPath, FolderFiles, files_in, looked_in
from llmq_jax.data.records import (
    checked_text,
    file_bytes,
    format_of,
    holds_records,
    is_blank,
    iterate_records,
    json_rows,
    no_field,
    read_text,
)
from llmq_jax.errors import BadInput

_SNIFFED_BYTES = 8192


def read_documents(path: DataPath, text_field: str = "text") -> list[str]:
    """All documents of a file or folder, in order; raises BadInput when there is no text in them.

    Any UTF-8 text is one document; .json holds a list of objects or strings, or one object; .jsonl one a line; .csv and
    .tsv have a header; .parquet has columns; all but Parquet may be gzipped (.gz). A folder is read recursively in
    sorted order; its hidden, binary and empty files are skipped, and their number is logged.

    text_field: the key or column that holds the text.
    """
    documents = list(iterate_documents(path, text_field))
    if all(map(is_blank, documents)):
        raise BadInput(f"{path} holds no text")
    return documents


def iterate_documents(path: DataPath, text_field: str = "text") -> Iterator[str]:
    """The documents of a file or folder one by one, as `read_documents`, for data that does not fit into memory."""
    return iter(Documents(path, text_field))


class Documents:
    """The documents of a file or folder, as `read_documents`, read anew on each iteration."""

    def __init__(self, path: DataPath, text_field: str = "text"):
        self.path, self.text_field = path, text_field
        self.files = text_files(path)

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            yield from _documents_of(file, self.text_field)

    def count(self) -> int:
        """The number of documents, which takes reading them all; BadInput when there is no text in them."""
        total, text = 0, False
        for document in self:
            total += 1
            text = text or not is_blank(document)
        if not text:
            raise BadInput(f"{self.path} holds no text")
        return total


def text_files(path: DataPath) -> list[Path]:
    """The files that `read_documents` reads at a path: itself or, of a folder, those below it in their order."""
    if isinstance(path, FolderFiles):
        return list(path.files)
    path = Path(path)
    if path.is_dir():
        return files_in(path, _passed_over, "readable file")
    if not path.exists():
        raise BadInput(f"there is no file or folder {path}{looked_in(path)}")
    if path.is_file() and path.stat().st_size == 0:
        raise BadInput(f"{path} is empty; write something into it, or name another file")
    if path.is_file() and not holds_records(path) and b"\0" in _start_of(path):
        raise BadInput(
            f"{path} has zero bytes near its start, as UTF-16 and binary files have: only text in UTF-8 is read "
            "(iconv -f UTF-16LE -t UTF-8 converts it)"
        )
    return [path]


def _documents_of(file: Path, text_field: str) -> Iterator[str]:
    if not holds_records(file):
        yield read_text(file)
    elif format_of(file) in (".json", ".jsonl"):
        for where, value in json_rows(file):
            if isinstance(value, dict):
                if text_field not in value:
                    raise BadInput(no_field(where, text_field, value, "--text-field"))
                where, value = f"{where}: field {text_field!r}", value[text_field]
            yield checked_text(value, where)
    else:
        for record in iterate_records(file, texts=(text_field,)):
            yield record.fields[text_field]


def has_fields(path: str | Path) -> bool:
    """Whether a path may hold records, of whose fields one is the text: a file of records, or a folder."""
    return Path(path).is_dir() or holds_records(Path(path))


def is_jsonl(path: str | Path) -> bool:
    """Whether a path names a file with one JSON value per line."""
    return format_of(Path(path)) == ".jsonl"


def _start_of(path: Path) -> bytes:
    with file_bytes(path) as stream:
        return stream.read(_SNIFFED_BYTES)


def _passed_over(path: Path) -> str | None:
    return "binary" if not holds_records(path) and _is_binary(path) else None


def _is_binary(path: Path) -> bool:
    """Whether the start of a file has a zero byte or is not UTF-8."""
    start = _start_of(path)
    if b"\0" in start:
        return True
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start < len(start) - 3  # the last character may be cut through
    return False
