"""Readers of training text: single files and folders of them.

The readers are strict: whatever is not as it should be raises BadInput with the file and the row, line or byte. A
reader that skips bad rows trains on something else than the user believes.
"""

import csv
import gzip
import io
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmq_jax.errors import BadInput

_log = logging.getLogger(__name__)

_SNIFFED_BYTES = 8192


def read_documents(path: str | Path, text_field: str = "text") -> list[str]:
    """All documents of a file or folder, in order; raises BadInput when there is no text in them.

    Any UTF-8 text is one document; .json holds a list of objects or strings, or one object; .jsonl one a line; .csv and
    .tsv have a header; .parquet has columns; all but Parquet may be gzipped (.gz). A folder is read recursively in
    sorted order; its hidden, binary and empty files are skipped, and their number is logged.

    text_field: the key or column that holds the text.
    """
    documents = list(iterate_documents(path, text_field))
    if not any(document and not document.isspace() for document in documents):
        raise BadInput(f"{path} holds no text")
    return documents


def iterate_documents(path: str | Path, text_field: str = "text") -> Iterator[str]:
    """The documents of a file or folder one by one, as `read_documents`, for data that does not fit into memory."""
    path = Path(path)
    if path.is_dir():
        files = _files_in(path)
    elif path.exists():
        if _is_empty(path):
            raise BadInput(f"{path} is empty")
        files = [path]
    else:
        raise BadInput(f"there is no file or folder {path}")
    for file in files:
        yield from _reader(file)(file, text_field)


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    return _READERS.get(_suffix(path), _read_text)


def has_fields(path: str | Path) -> bool:
    """Whether what is there may hold several fields, one of which is the text: a file of records, or a folder."""
    return Path(path).is_dir() or _suffix(Path(path)) in _READERS


def is_jsonl(path: str | Path) -> bool:
    """Whether a name is that of a file with one JSON value a line."""
    return _suffix(Path(path)) == ".jsonl"


def _suffix(path: Path) -> str:
    """The suffix that names the format: `.jsonl` for `x.jsonl` and for `x.jsonl.gz`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


# Folders


def _files_in(folder: Path) -> list[Path]:
    """Readable files under a folder, sorted by path; logs what is skipped."""
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    for where, folders, names in os.walk(folder, onerror=_cannot_list):
        skipped["hidden"] += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(where, name) for name in names if not name.startswith(".")):
            if not path.is_file():  # a broken link, a socket
                skipped["special"] += 1
            elif _is_empty(path):
                skipped["empty"] += 1
            elif _reader(path) is _read_text and _is_binary(path):
                skipped["binary"] += 1
            else:
                files.append(path)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()) if count)
    if not files:
        raise BadInput(f"{folder} holds no readable file" + (f" (skipped: {counts})" if counts else ""))
    if counts:
        _log.warning("%s: read %d files, skipped %s", folder, len(files), counts)
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _cannot_list(error: OSError) -> None:
    raise BadInput(f"{error.filename} cannot be read ({error.strerror})")


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _is_binary(path: Path) -> bool:
    """A zero byte near the start, or no UTF-8 there: not a text file."""
    with _Bytes(path) as stream:
        start = stream.read(_SNIFFED_BYTES)
    if b"\0" in start:
        return True
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start < len(start) - 3  # the last character may be cut through
    return False


# Bytes and lines


class _Bytes:
    """A file's bytes, unzipped if its name ends in .gz; trouble in reading becomes BadInput."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> io.BufferedIOBase:
        try:
            opener = gzip.open if self._path.suffix.lower() == ".gz" else open
            self._stream = opener(self._path, "rb")
        except OSError as error:
            raise BadInput(f"{self._path} cannot be read ({error.strerror})") from None
        return self._stream

    def __exit__(self, kind, error, trace) -> None:
        self._stream.close()
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
            raise BadInput(f"{self._path} is damaged or cut short ({error}): fetch or compress it again") from None
        if isinstance(error, OSError):
            raise BadInput(f"{self._path} cannot be read ({error})") from None


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    """UTF-8 text without a byte order mark. offset: where in the file the content begins."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise BadInput(f"{path}: byte {at} (0x{content[error.start]:02x}) is not UTF-8: convert it to UTF-8") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its line break) without reading the whole file at once."""
    with _Bytes(path) as stream:
        offset = 0
        for number, line in enumerate(stream, start=1):
            yield number, _decode(line, path, offset)
            offset += len(line)


# Formats


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    yield read_text(path)


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file, whatever its name ends in (but for .gz, which is unzipped)."""
    with _Bytes(Path(path)) as stream:
        return _decode(stream.read(), Path(path))


def _read_json(path: Path, text_field: str) -> Iterator[str]:
    with _Bytes(path) as stream:
        text = _decode(stream.read(), path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ": name it .jsonl if every line is a record" if error.msg == "Extra data" else ""
        where = f"line {error.lineno}, column {error.colno}"
        raise BadInput(f"{path}: broken JSON at {where} ({error.msg}){hint}") from None
    except RecursionError:
        raise BadInput(f"{path}: JSON is nested too deeply") from None
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadInput(f"{path} must hold a list of objects or strings, or one object, not {_type_name(content)}")
    for number, record in enumerate(content, start=1):
        yield _text_of(record, f"{path}: row {number}", text_field)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, record in json_lines(path):
        yield _text_of(record, f"{path}: line {number}", text_field)


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of a .jsonl file that is not blank."""
    return json_values(_lines(Path(path)), str(path))


def json_values(lines: Iterable[tuple[int, str]], source: str) -> Iterator[tuple[int, Any]]:
    """The same of numbered lines; `source` is what errors call the place that they come from."""
    for number, line in lines:
        if line.isspace():
            continue
        try:
            record = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise BadInput(f"{source}: broken JSON at line {number}, column {error.colno} ({error.msg})") from None
        except RecursionError:
            raise BadInput(f"{source}: line {number}: JSON is nested too deeply") from None
        yield number, record


def _text_of(record: object, where: str, text_field: str) -> str:
    if isinstance(record, dict):
        if text_field not in record:
            raise BadInput(_no_field(where, text_field, record))
        where, value = f"{where}: field {text_field!r}", record[text_field]
    else:
        value = record
    if not isinstance(value, str):
        raise BadInput(f"{where} must be a string, not {_type_name(value)}")
    # JSON can spell half of a surrogate pair (\ud800), which is no character.
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(f"{where}: half a surrogate pair at character {error.start}: not valid Unicode") from None
    return value


def _no_field(where: str, text_field: str, found) -> str:
    names = ", ".join(str(name) for name in list(found)[:20]) or "none"
    return f"{where} has no field {text_field!r} (fields found: {names}): choose one with --text-field"


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _read_csv(path: Path, text_field: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 128 KiB
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    rows = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if text_field not in header:
            raise BadInput(_no_field(f"{path}: the header", text_field, header))
        column = header.index(text_field)
        for row in rows:
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise BadInput(
                    f"{path}: the row that ends at line {rows.line_num} has {len(row)} fields and the header "
                    f"{len(header)}: quote text that holds the delimiter"
                )
            yield row[column]
    except csv.Error as error:
        raise BadInput(f"{path}: broken CSV at line {rows.line_num} ({error})") from None


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise BadInput(_no_field(str(path), text_field, schema.names))
            kind = schema.field(text_field).type
            value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
                raise BadInput(f"{path}: column {text_field!r} must hold strings, not {kind}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise BadInput(f"{path}: row {row}: column {text_field!r} must be a string, not null")
                    yield text
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path} is no Parquet file or is damaged ({reason})") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: row {row + 1} or one soon after: column {text_field!r} is not UTF-8") from None


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
