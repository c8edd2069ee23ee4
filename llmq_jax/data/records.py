"""Readers of records: rows of named fields from .csv, .tsv, .json, .jsonl and .parquet.

The readers are strict: whatever is not as it should be raises BadInput with the file and the row, line or byte. A
reader that skips bad rows unasked trains on something else than the user believes (`bad_rows.usable` is asked to).
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmq_jax.counts import counted
from llmq_jax.data.folders import DataPath, FolderFiles, files_in, looked_in
from llmq_jax.errors import BadInput
from llmq_jax.json_text import half_surrogate, parse_json

FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
TABLES = (".csv", ".tsv")
SHOWN_NAMES, SHOWN_CHARACTERS = 20, 30


class Record(NamedTuple):
    """One row of a file."""

    where: str
    """ "file: line 3" or, where rows have no lines, "file: row 3"; both count from 1."""
    fields: dict[str, Any]

    def text(self, name: str, option: str | None = None) -> str:
        """The text in a field. BadInput: there is no such field (`option` is the one that chooses another), or it holds
        no text."""
        if name not in self.fields:
            raise BadInput(no_field(self.where, name, self.fields, option))
        return checked_text(self.fields[name], f"{self.where}: field {name!r}")


def read_records(
    path: DataPath, columns: Sequence[str] | None = None, needed: Mapping[str, str] | None = None
) -> list[Record]:
    """All rows of a file, or of a folder's files, in order; raises BadInput when there is none.

    .json holds a list of objects, or one object; .jsonl one a line; .csv and .tsv have a header; .parquet has columns;
    all but Parquet may be gzipped (.gz). In .tsv no character quotes: every tab separates, every line is a row. White
    space around the names in a header is no part of them. A folder is read recursively in sorted order; what it holds
    beside files of these formats is skipped, and its number is logged.

    columns: names for a .csv or .tsv without a header, whose first line is a row then; in a folder for all of these.
    needed: {field: the option that chooses another one}; a table without such a column is refused before its first row.
    """
    records = list(iterate_records(path, columns, needed=needed))
    if not records:
        raise BadInput(f"{path} holds no record")
    return records


def renamed(records: Sequence[Record], names: Mapping[str, str] | None) -> Sequence[Record]:
    """The records with fields renamed: {"output": "response"} makes "output" of the field "response", in the place of
    any field of that name. BadInput: no record has such a field."""
    if not names:
        return records
    for theirs in names.values():
        if not any(theirs in record.fields for record in records):
            raise BadInput(no_field(records[0].where, theirs, records[0].fields, "--fields"))

    def fields(record: Record) -> dict[str, Any]:
        others = {name: value for name, value in record.fields.items() if name not in names.values()}
        return others | {ours: record.fields[theirs] for ours, theirs in names.items() if theirs in record.fields}

    return [record._replace(fields=fields(record)) for record in records]


def iterate_records(
    path: DataPath,
    columns: Sequence[str] | None = None,
    texts: Collection[str] | None = None,
    needed: Mapping[str, str] | None = None,
    string_field: str | None = None,
) -> Iterator[Record]:
    """The rows of a file or folder one by one, as `read_records`, for data that does not fit into memory.

    texts: the fields that are wanted, all of them text: a table that lacks one is refused before its first row, and of
    Parquet no other columns are read.
    string_field: where JSON has a string in place of an object, the field that it becomes; None refuses such a string.
    """
    if isinstance(path, FolderFiles) or Path(path).is_dir():
        files = record_files(path)
        if columns is not None and not any(map(is_table, files)):
            raise BadInput(f"{path} holds no .csv or .tsv file, which names of columns are for")
        for file in files:
            yield from iterate_records(file, columns if is_table(file) else None, texts, needed, string_field)
        return
    path = Path(path)
    if not path.exists():
        raise BadInput(f"there is no file or folder {path}{looked_in(path)}")
    kind = format_of(path)
    if kind not in FORMATS:
        raise BadInput(f"{path} holds no records: give a file that ends in {', '.join(FORMATS)}, or a folder of such")
    if columns is not None and kind not in TABLES:
        raise BadInput(f"{path} has names for its fields already; names of columns are for .csv and .tsv")
    if not path.is_file():
        raise BadInput(f"{path} is not a file; name a file, or a folder of files")
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty; write something into it, or name another file")
    if kind in (".json", ".jsonl"):
        for where, value in json_rows(path):
            if isinstance(value, str) and string_field is not None:
                value = {string_field: value}
            if not isinstance(value, dict):
                hint = f": {LIST}" if kind == ".jsonl" and isinstance(value, list) else ""
                raise BadInput(f"{where} must be an object with fields, not {_type_name(value)}{hint}")
            yield Record(where, value)
    elif kind == ".parquet":
        yield from _parquet_rows(path, texts, needed or {})
    else:
        yield from _table_rows(path, kind, columns, texts or (), needed or {})


def record_files(path: DataPath) -> list[Path]:
    """The files that `read_records` reads at a path: itself or, of a folder, those below it in their order."""
    if isinstance(path, FolderFiles):
        return list(path.files)
    path = Path(path)
    if not path.is_dir():
        return [path]

    def passed_over(file: Path) -> str | None:
        return None if holds_records(file) else "of another format"

    return files_in(path, passed_over, f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} file")


def is_table(path: str | Path) -> bool:
    """Whether a file has columns that may lack names: .csv, .tsv."""
    return format_of(Path(path)) in TABLES


def holds_records(path: Path) -> bool:
    """Whether a file's name is that of a file of records."""
    return format_of(path) in FORMATS


def format_of(path: Path) -> str:
    """The suffix that names the format: `.jsonl` for `x.jsonl`, for `x.jsonl.gz`, and for `x.ndjson`, another name."""
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix


# Fields


def checked_text(value: object, where: str) -> str:
    """The value, if it is valid text; else BadInput, which calls its place `where`."""
    if not isinstance(value, str):
        raise BadInput(f"{where} must be a string, not {_type_name(value)}")
    if (place := half_surrogate(value)) is not None:
        raise BadInput(f"{where}: half a surrogate pair at character {place}: not valid Unicode")
    return value


def is_blank(text: str) -> bool:
    """Whether a text is empty, or white space alone."""
    return not text or text.isspace()


def no_field(where: str, name: str, found: Iterable[object], option: str | None = None) -> str:
    """The error message for a missing field; `option` is the option that chooses another field."""
    advice = f": choose one with {option}" if option else ""
    return f"{where} has no field {name!r} (fields found: {_shown_names(found)}){advice}"


def _shown_names(names: Iterable[object]) -> str:
    """Names of fields for a message, shortened: what was taken for a header may be a row of long texts."""
    texts = [" ".join(str(name).split()) for name in names]
    short = [text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…" for text in texts]
    more = f" and {len(texts) - SHOWN_NAMES} more" if len(texts) > SHOWN_NAMES else ""
    return ", ".join(short[:SHOWN_NAMES]) + more or "none"


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


# Bytes and lines


@contextlib.contextmanager
def file_bytes(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, unzipped if its name ends in .gz; trouble in reading becomes BadInput."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path} is damaged or cut short ({error}): fetch or compress it again") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error})") from None


def decoded(content: bytes, source: str | Path, offset: int = 0) -> str:
    """UTF-8 text without a byte order mark. source: what errors call its origin. offset: where in it the content
    begins."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        byte = f"0x{content[error.start]:02x}"
        encoding = "UTF-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "WINDOWS-1252"
        how = f"if it is from Windows: iconv -f {encoding} -t UTF-8"
        raise BadInput(
            f"{source}: byte {at} ({byte}) is not UTF-8 ({how}): convert it to UTF-8, or unpack it"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def decoded_lines(stream: Iterable[bytes], source: str | Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its line break) of a stream of bytes, of which it reads a line at a time."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        yield number, decoded(line, source, offset)
        offset += len(line)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with file_bytes(path) as stream:
        yield from decoded_lines(stream, path)


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file, whatever its name ends in (but for .gz, which is unzipped)."""
    with file_bytes(Path(path)) as stream:
        return decoded(stream.read(), path)


# JSON


LIST = "a .jsonl file has one record a line, a .json file one list of them"


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of everything in a .json file's list, or on the lines of a .jsonl file."""
    if format_of(path) == ".jsonl":
        yield from ((f"{path}: line {number}", value) for number, value in json_lines(path))
        return
    try:
        content = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        hint = ": name it .jsonl if every line is a record" if error.msg == "Extra data" else ""
        where = f"line {error.lineno}, column {error.colno}"
        raise BadInput(f"{path}: broken JSON at {where} ({error.msg}){hint}") from None
    except ValueError as error:
        raise BadInput(f"{path}: JSON that cannot be read: {error}") from None
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadInput(f"{path} must hold a list of objects or strings, or one object, not {_type_name(content)}")
    yield from ((f"{path}: row {number}", value) for number, value in enumerate(content, start=1))


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of a .jsonl file that is not blank."""
    return json_values(_lines(Path(path)), str(path))


def json_values(lines: Iterable[tuple[int, str]], source: str) -> Iterator[tuple[int, Any]]:
    """As `json_lines`, from numbered lines; `source` is what errors call their origin."""
    for number, line in lines:
        if line.isspace():
            continue
        try:
            record = parse_json(line.rstrip())
        except json.JSONDecodeError as error:
            hint = f": {LIST}" if number == 1 and line.lstrip().startswith("[") else ""
            raise BadInput(
                f"{source}: broken JSON at line {number}, column {error.colno} ({error.msg}){hint}"
            ) from None
        except ValueError as error:
            raise BadInput(f"{source}: line {number}: JSON that cannot be read: {error}") from None
        yield number, record


# Tables


def _table_rows(
    path: Path, kind: str, columns: Sequence[str] | None, texts: Collection[str], needed: Mapping[str, str]
) -> Iterator[Record]:
    rows = _csv_rows(path) if kind == ".csv" else _tsv_rows(path)
    if columns is None:
        _, _, names = next(rows, (1, 1, []))
        if len(names) == 1 and names[0] not in texts:
            _refuse_separated(f"{path}: the columns of the header", names[0], kind)
        names = [name.strip() for name in names]
        whose = f"the header {len(names)}"
    else:
        names, whose = list(columns), f"{len(columns)} columns were named"
        rows = _without_header(rows, path, names)
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise BadInput(f"{path}: two columns are called {repeated[0]!r}; give each its own name")
    for name in texts:
        if name not in names:
            raise BadInput(no_field(f"{path}: the header", name, names, "--text-field"))
    for name, option in needed.items():
        if name not in names:
            if columns is not None:
                raise BadInput(no_field(f"--columns {','.join(columns)}", name, names, option))
            advice = "or, if the file has no header, name its columns: --columns label,text"
            raise BadInput(f"{no_field(f'{path}: the header', name, names, option)} {advice}")
    for start, end, values in rows:
        if len(values) != len(names):
            if len(values) == 1:
                _refuse_separated(f"{path}: the columns of line {start}", values[0], kind)
            hint = "quote text that holds the delimiter" if kind == ".csv" else "a text may not hold a tab"
            number = counted(len(values), "field")
            raise BadInput(f"{path}: the row that ends at line {end} has {number} and {whose}: {hint}")
        yield Record(f"{path}: line {start}", dict(zip(names, values, strict=True)))


def _without_header(
    rows: Iterator[tuple[int, int, list[str]]], path: Path, columns: list[str]
) -> Iterator[tuple[int, int, list[str]]]:
    """The rows; BadInput if the first is a header of these columns."""
    for number, row in enumerate(rows):
        if number == 0 and sorted(value.strip().lower() for value in row[2]) == sorted(map(str.lower, columns)):
            raise BadInput(f"{path}: line {row[0]} is a header; leave out --columns")
        yield row


def _refuse_separated(where: str, line: str, kind: str) -> None:
    """BadInput for a line that holds a separator of other tables."""
    separator, others = ("commas", ";\t") if kind == ".csv" else ("tabs", ";")
    if any(other in line for other in others):
        raise BadInput(
            f"{where} {_shown_names([line])!r} are not separated by {separator}: save the table with {separator}, or "
            "as JSON lines"
        ) from None


def _csv_rows(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, values) of every row that is not blank."""
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 128 KiB
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    end = 0
    try:
        for row in rows:
            start, end = end + 1, rows.line_num
            if row:
                yield start, end, row
    except csv.Error as error:
        _, first = next(iter(_lines(path)))
        if end == 0 and any(f'"{other}"' in first for other in ";\t"):
            _refuse_separated(f"{path}: the columns of the first line", first.strip(), ".csv")
        raise BadInput(f"{path}: broken CSV at line {rows.line_num} ({error})") from None


def _tsv_rows(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """As `_csv_rows`, but quotation marks are characters like any others: they quote nothing."""
    for number, line in _lines(path):
        if line := line.rstrip("\r\n"):
            yield number, number, line.split("\t")


def _parquet_rows(path: Path, texts: Collection[str] | None, needed: Mapping[str, str]) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if twice := [name for name in schema.names if schema.names.count(name) > 1]:
                raise BadInput(f"{path}: two columns are called {twice[0]!r}; rename one")
            for name, option in {**needed, **dict.fromkeys(texts or (), "--text-field")}.items():
                if name not in schema.names:
                    raise BadInput(no_field(str(path), name, schema.names, option))
            for name in texts or ():
                kind = schema.field(name).type
                value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                if value_kind not in (pa.string(), pa.large_string(), pa.string_view()):
                    raise BadInput(f"{path}: column {name!r} must hold strings, not {kind}")
            for batch in file.iter_batches(batch_size=1024, columns=None if texts is None else list(texts)):
                nested = [column for column in batch.schema if pa.types.is_nested(column.type) or _is_json(column.type)]
                for fields in batch.to_pylist():
                    row += 1
                    fields |= {column.name: _as_written(path, row, column, fields[column.name]) for column in nested}
                    for name in texts or ():
                        if fields[name] is None:
                            raise BadInput(f"{path}: row {row}: column {name!r} must be a string, not null")
                    yield Record(f"{path}: row {row}", fields)
    except BadInput:
        raise
    except UnicodeDecodeError:
        raise BadInput(f"{path}: row {row + 1} or one soon after holds text that is not UTF-8") from None
    # The last three are raised for dates that Python cannot represent.
    except (pa.ArrowException, OSError, OverflowError, LookupError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path} is no Parquet file or is damaged ({reason})") from None


OF_TEMPLATES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools")
"""Columns that chat templates read. For these a null key is not the same as an absent one."""


def _as_written(path: Path, row: int, column: Any, value: Any) -> Any:
    """A value of a nested column as its row was written. JSON, which `datasets` stores where rows differ in their keys,
    is parsed. The structs of a list have each other's keys too, with null values: in OF_TEMPLATES null keys are left
    out."""
    import pyarrow as pa

    def written(value: Any, kind: Any, in_list: bool) -> Any:
        if value is None:
            return None
        if _is_json(kind):
            return parse_json(value)
        if pa.types.is_struct(kind):
            found = {part.name: written(value[part.name], part.type, in_list) for part in kind}
            return {name: part for name, part in found.items() if part is not None} if in_list else found
        if isinstance(value, list) and not pa.types.is_map(kind):
            return [written(item, kind.value_type, column.name in OF_TEMPLATES) for item in value]
        return value

    try:
        return written(value, column.type, in_list=False)
    except ValueError as error:
        raise BadInput(f"{path}: row {row}: column {column.name!r} holds broken JSON ({error})") from None


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"
