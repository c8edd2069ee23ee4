import gzip
import json
import logging
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmq_jax.data import Record, read_conversations, read_labelled, read_preferences, read_records
from llmq_jax.data.records import iterate_records
from llmq_jax.errors import BadInput

ROWS = [{"text": 'a "quoted" one', "label": "ham"}, {"text": "zwei, drî 😀", "label": "spam"}]


def write(path, content):
    path.write_bytes(gzip.compress(content.encode()) if path.suffix.lower() == ".gz" else content.encode())
    return path


def csv_line(row):
    return ",".join('"' + value.replace('"', '""') + '"' for value in row.values()) + "\n"


FILES = {
    "a.csv": ("text,label\n" + "".join(map(csv_line, ROWS)), ["line 2", "line 3"]),
    "a.tsv": ("text\tlabel\n" + "".join("\t".join(row.values()) + "\n" for row in ROWS), ["line 2", "line 3"]),
    "a.json": (json.dumps(ROWS), ["row 1", "row 2"]),
    "a.jsonl": ("\n" + "\n\n".join(map(json.dumps, ROWS)), ["line 2", "line 4"]),
}


@pytest.mark.parametrize("suffix", ["", ".GZ"])
@pytest.mark.parametrize("name", FILES)
def test_formats(tmp_path, name, suffix):
    content, places = FILES[name]
    path = write(tmp_path / (name + suffix), content)
    assert read_records(path) == [Record(f"{path}: {place}", row) for place, row in zip(places, ROWS, strict=True)]


def test_parquet_with_columns_of_several_types(tmp_path):
    path = tmp_path / "a.parquet"
    messages = [[{"role": "user", "content": "x"}], [{"role": "user", "content": "y"}]]
    rows = [{"text": "a", "label": 1, "messages": messages[0]}, {"text": None, "label": 0, "messages": messages[1]}]
    tags = [[("k", 1)], None]
    table = pa.Table.from_pylist(rows).append_column("tags", pa.array(tags, pa.map_(pa.string(), pa.int64())))
    pq.write_table(table, path)
    rows = [{**row, "tags": each} for row, each in zip(rows, tags, strict=True)]
    assert read_records(path) == [Record(f"{path}: row {number}", row) for number, row in enumerate(rows, start=1)]


def test_rows_of_several_lines_are_named_by_their_first(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text\n1,"two\nlines"\n\n2,x\n')
    assert [record.where for record in read_records(path)] == [f"{path}: line 2", f"{path}: line 5"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_columns_of_a_file_without_header(tmp_path, name, separator):
    path = write(tmp_path / name, f"ham{separator}x\nspam{separator}y\n")
    records = read_records(path, columns=["label", "text"])
    assert [record.fields for record in records] == [{"label": "ham", "text": "x"}, {"label": "spam", "text": "y"}]
    assert records[0].where == f"{path}: line 1"
    with pytest.raises(BadInput, match=r"line 1 has 2 fields and 3 columns were named"):
        read_records(path, columns=["a", "b", "c"])
    path = write(tmp_path / name, "ham;x\n")
    with pytest.raises(BadInput, match=r"the columns of line 1 'ham;x' are not separated by (commas|tabs): save the"):
        read_records(path, columns=["label", "text"])


@pytest.mark.parametrize("header", ["label,text", "text,label", "Label, text "])
def test_a_header_beside_columns_is_no_row(tmp_path, header):
    path = write(tmp_path / "a.csv", f"{header}\nham,x\n")
    with pytest.raises(BadInput, match=r"a\.csv: line 1 is a header; leave out --columns"):
        read_records(path, columns=["label", "text"])


def test_white_space_around_names_of_a_header(tmp_path):
    (record,) = read_records(write(tmp_path / "a.csv", "label, text \nham, x\n"))
    assert record.fields == {"label": "ham", "text": " x"}


NEEDED = {"text": "--text-field", "label": "--label-field"}


def test_a_table_without_a_needed_column_is_refused_at_its_header(tmp_path):
    """Also where the "header" is a row of long texts: the message stays short."""
    path = write(tmp_path / "a.tsv", "\t".join(["ham", "See you " * 300, *map(str, range(30))]) + "\nspam\n")
    with pytest.raises(BadInput) as caught:
        read_records(path, needed=NEEDED)
    assert len(str(caught.value)) < 350 + len(str(path))
    assert str(caught.value).startswith(f"{path}: the header has no field 'text' (fields found: ham, See you See you S")
    assert "…, 0, 1, " in str(caught.value) and ", 17 and 12 more): choose one with --text-field" in str(caught.value)
    assert "if the file has no header, name its columns: --columns label,text" in str(caught.value)
    with pytest.raises(BadInput, match=r"^--columns body,label has no field 'text' .*: choose one with --text-field$"):
        read_records(write(tmp_path / "b.csv", "x,y\n"), ["body", "label"], NEEDED)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(BadInput, match=r"c\.parquet has no field 'label' .*: choose one with --label-field$"):
        read_records(tmp_path / "c.parquet", needed=NEEDED)


def test_parquet_that_cannot_be_rows(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(BadInput, match="two columns are called 'text'; rename one"):
        read_records(tmp_path / "twice.parquet")
    pq.write_table(pa.table({"at": pa.array([10**15], pa.timestamp("ms"))}), tmp_path / "late.parquet")
    with pytest.raises(BadInput, match=r"late\.parquet is no Parquet file or is damaged"):
        read_records(tmp_path / "late.parquet")


def test_strings_in_json_may_stand_for_a_field(tmp_path):
    path = write(tmp_path / "a.json", '["x", {"text": "y", "id": 1}]')
    records = list(iterate_records(path, string_field="text"))
    assert [record.fields for record in records] == [{"text": "x"}, {"text": "y", "id": 1}]
    assert list(iterate_records(tmp_path, string_field="text")) == records


def test_the_text_of_a_field():
    record = Record("a.csv: line 3", {"text": "x", "number": 5})
    assert record.text("text") == "x"
    with pytest.raises(BadInput, match=r"^a\.csv: line 3: field 'number' must be a string, not a number$"):
        record.text("number")
    expected = r"^a\.csv: line 3 has no field 'body' \(fields found: text, number\): choose one with --text-field$"
    with pytest.raises(BadInput, match=expected):
        record.text("body", "--text-field")


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.txt", "x", None, r"a\.txt holds no records: give a file that ends in \.json, "),
        ("a.json", "[]", None, r"a\.json holds no record"),
        ("a.json", '["x"]', None, r"row 1 must be an object with fields, not a string"),
        ("a.json", '[{"x": 1}]', ["x"], r"a\.json has names for its fields already"),
        ("a.jsonl", '{"x": 1}\n5', None, r"line 2 must be an object with fields, not a number"),
        (
            "a.jsonl",
            '[{"x": 1}]',
            None,
            r"line 1 must be .*, not a list: a \.jsonl file has one record a line, a \.json",
        ),
        ("a.jsonl", '[\n{"x": 1}]', None, r"broken JSON at line 1, .*: a \.jsonl file has one record a line, a \.json"),
        ("a.tsv", "a\tb\n1\n", None, r"line 2 has 1 field and the header 2"),
        ("a.tsv", "a\ta\n1\t2\n", None, r"two columns are called 'a'"),
        ("a.csv", "a,b\n", None, r"holds no record"),
        ("a.csv", "", None, r"is empty"),
    ],
)
def test_bad_files(tmp_path, name, content, columns, message):
    with pytest.raises(BadInput, match=message) as caught:
        read_records(write(tmp_path / name, content), columns)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    for name in ("a.csv", "folder"):
        with pytest.raises(BadInput, match=rf"^there is no file or folder {tmp_path}/{name}$"):
            read_records(tmp_path / name)
    (tmp_path / "chats.jsonl").touch()
    with pytest.raises(BadInput, match=rf"^there is no file or folder .*; did you mean {tmp_path}/chats.jsonl\?$"):
        read_records(tmp_path / "chat.jsonl")
    os.mkfifo(tmp_path / "b.csv")
    with pytest.raises(BadInput, match=r"b\.csv is not a file"):
        read_records(tmp_path / "b.csv")


FOLDER = {"b.tsv": "a.tsv", "deep/a.jsonl.gz": "a.jsonl", "deep/z.csv": "a.csv", "e.json": "a.json"}


def test_a_folder_is_all_its_files_of_records_in_the_order_of_their_names(tmp_path, caplog):
    """Of whatever formats; what else is there is told."""
    (tmp_path / "deep").mkdir()
    for name, kind in FOLDER.items():
        write(tmp_path / name, FILES[kind][0])
    write(tmp_path / "README.md", "what this is")
    write(tmp_path / ".hidden.csv", "text\nno\n")
    write(tmp_path / "empty.jsonl", "")
    with caplog.at_level(logging.WARNING):
        records = read_records(tmp_path)
    assert f"{tmp_path}: read 4 files, skipped 1 empty, 1 hidden, 1 of another format" in caplog.text
    assert [record.fields for record in records] == ROWS * 4
    expected = [f"{tmp_path / name}: {place}" for name, kind in FOLDER.items() for place in FILES[kind][1]]
    assert [record.where for record in records] == expected


def test_a_folder_of_parquet(tmp_path):
    for part, row in enumerate(ROWS):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"train-0000{part}-of-00002.parquet")
    assert [record.fields for record in read_records(tmp_path)] == ROWS


def test_errors_in_a_folder_name_the_file(tmp_path):
    write(tmp_path / "a.csv", "text,label\nx,y\n")
    write(tmp_path / "b.jsonl", '{"text": "x"}\n5\n')
    with pytest.raises(BadInput, match=rf"^{tmp_path}/b\.jsonl: line 2 must be an object with fields, not a number$"):
        read_records(tmp_path)
    write(tmp_path / "b.csv", "label\nspam\n")
    with pytest.raises(BadInput, match=rf"^{tmp_path}/b\.csv: the header has no field 'text' \(fields found: label\)"):
        read_records(tmp_path, needed=NEEDED)


def test_names_of_columns_are_for_the_tables_of_a_folder(tmp_path):
    write(tmp_path / "b.jsonl", '{"text": "z", "label": "ham"}')
    with pytest.raises(BadInput, match=rf"^{tmp_path} holds no \.csv or \.tsv file, which names of columns are for$"):
        read_records(tmp_path, columns=["label", "text"])
    write(tmp_path / "a.tsv", "ham\tx\n")
    records = read_records(tmp_path, columns=["label", "text"])
    assert [record.fields for record in records] == [{"label": "ham", "text": "x"}, {"text": "z", "label": "ham"}]


def test_a_folder_without_records(tmp_path):
    expected = rf"^{tmp_path} holds no \.json, \.jsonl, \.csv, \.tsv or \.parquet file"
    advice = "; put one there, or name another path$"
    with pytest.raises(BadInput, match=expected + advice):
        read_records(tmp_path)
    write(tmp_path / "a.txt", "x")
    with pytest.raises(BadInput, match=expected + r" \(skipped: 1 of another format\)" + advice):
        read_records(tmp_path)
    write(tmp_path / "a.jsonl", "\n\n")
    with pytest.raises(BadInput, match=rf"^{tmp_path} holds no record$"):
        read_records(tmp_path)


def test_records_come_one_by_one(tmp_path):
    records = iterate_records(write(tmp_path / "a.csv", "id,text\n" + "1,x\n" * 3 + "1\n"))
    assert [next(records).fields["id"] for _ in range(3)] == ["1"] * 3
    with pytest.raises(BadInput, match="line 5"):
        next(records)


def test_any_text_without_tabs_and_line_breaks_survives_tsv(tmp_path):
    pieces = ['"', '""', "'", ",", ";", "\\", "\\t", " ", "x", "😀", "\u2028", "\x85", "\x0b"]
    draw = random.Random(0)
    texts = ["x" + "".join(draw.choices(pieces, k=draw.randint(0, 8))) for _ in range(300)]
    path = write(tmp_path / "a.tsv", "".join(f"{text}\t{text}\n" for text in texts))
    assert [record.fields["b"] for record in read_records(path, ["a", "b"])] == texts


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (read_conversations, {"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}),
        (read_preferences, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}),
        (read_labelled, {"text": "a", "label": "b"}, {"text": " ", "label": "c"}),
    ],
)
def test_it_is_said_how_many_records_are_refused(tmp_path, read, good, bad):
    """Alpaca's 52,002 have 28 without an output: to be told of one at a time is no way to clean a file."""
    path = tmp_path / "data.jsonl"
    drop = "; --bad-rows drop leaves such rows out"
    for count, said in (
        (1, ""),
        (2, "; 1 other row cannot be used either"),
        (3, "; 2 other rows cannot be used either"),
    ):
        path.write_text("".join(json.dumps(record) + "\n" for record in (good, *[bad, good] * count)))
        with pytest.raises(BadInput, match=r"data\.jsonl: line 2") as error:
            read(path)
        assert str(error.value).endswith(said + drop) and ("either" in str(error.value)) == bool(said)
