import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmq_jax.data import iterate_documents, read_documents
from llmq_jax.data.sources import text_files
from llmq_jax.errors import BadInput

TEXTS = ["first", "second, with a comma\nand a line", "drîtter 😀"]


def csv_of(texts):
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return "id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(quoted))


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
FILES = {
    "objects.json": json.dumps(RECORDS),
    "strings.json": json.dumps(TEXTS, ensure_ascii=False),
    "objects.jsonl": "\n".join(json.dumps(record) for record in RECORDS),
    "blank_lines.jsonl": "\r\n\n".join(json.dumps(text) for text in TEXTS) + "\n\n",
    "bom.jsonl": "\ufeff" + "\n".join(json.dumps(record) for record in RECORDS),
    "table.csv": csv_of(TEXTS),
    "BOM.CSV": "\ufeff" + csv_of(TEXTS).replace("id,", "id,", 1),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_formats(tmp_path, name, suffix):
    assert read_documents(write(tmp_path / (name + suffix), FILES[name])) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.unknown", "README", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name):
    text = "line\r\n\tä\n\n"
    assert read_documents(write(tmp_path / name, text)) == [text], "to the byte, line ends included"
    assert read_documents(str(write(tmp_path / name, "\ufeff" + text))) == [text]


def test_one_json_object(tmp_path):
    assert read_documents(write(tmp_path / "a.json", '{"body": "x"}'), text_field="body") == ["x"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_nothing_quotes_in_tsv(tmp_path, suffix):
    """People's messages have quotation marks of their own, and not always two of them."""
    texts = ['"first" of all', "it's 5\" wide", '"', "drîtter 😀"]
    lines = "".join(f"{i}\t{text}\r\n" for i, text in enumerate(texts))
    assert read_documents(write(tmp_path / f"a.tsv{suffix}", "id\ttext\n" + lines + "\n")) == texts


def test_long_csv_field(tmp_path):
    assert read_documents(write(tmp_path / "a.csv", "text\n" + "x" * 300_000)) == ["x" * 300_000]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
    texts = [f"text {i}" for i in range(5000)]
    pq.write_table(pa.table({"n": range(5000), "text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == texts


def test_folder(tmp_path, caplog):
    for folder in ("b", ".git", "b/deep"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "b" / "deep" / "z.txt", "4")
    write(tmp_path / "b" / "a.jsonl", '"2"\n"3"\n')
    write(tmp_path / "a.py", "1")
    write(tmp_path / "c.csv.gz", "text\n5\n")
    write(tmp_path / ".hidden", "no")
    write(tmp_path / ".git" / "config", "no")
    write(tmp_path / "__init__.py", "")
    write(tmp_path / "picture.png", b"\x89PNG\r\n\0\0")
    write(tmp_path / "latin1.dat", "é".encode("latin-1") * 100)
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    with caplog.at_level(logging.WARNING):
        assert read_documents(tmp_path) == ["1", "2", "3", "4", "5"]
    assert "read 4 files, skipped 2 binary, 1 empty, 2 hidden, 1 special" in caplog.text


def test_json_lines_by_their_other_name_are_no_text(tmp_path):
    write(tmp_path / "a.ndjson", '{"text": "x\\ny"}\n')
    write(tmp_path / "b.ndjson.gz", '{"text": "z"}\n')
    assert read_documents(tmp_path) == ["x\ny", "z"]


def test_folders_that_links_lead_to(tmp_path):
    """Each is read once, and a link upwards leads nowhere."""
    for folder in ("disk/shards", "data/b", "data/.hidden", "beside"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "disk" / "shards" / "x.txt", "linked")
    write(tmp_path / "data" / "b" / "y.txt", "own")
    write(tmp_path / "outside.txt", "no")
    write(tmp_path / "beside" / "outside.txt", "no")
    links = {"b/up": "data", "c/above": ".", "a": "data/b", "c/train": "disk/shards", "again": "disk", ".hidden/h": "."}
    (tmp_path / "data" / "c").mkdir()
    for link, target in links.items():
        (tmp_path / "data" / link).symlink_to(tmp_path / target, target_is_directory=True)
    assert read_documents(tmp_path / "data") == ["linked", "own"]
    assert text_files(tmp_path / "data")[1] == tmp_path / "data" / "b" / "y.txt"
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    assert read_documents(tmp_path / "linked") == ["linked", "own"]


def test_a_character_cut_through_by_sniffing_is_no_binary(tmp_path):
    write(tmp_path / "a.txt", "x" * 8190 + "😀")
    assert len(read_documents(tmp_path)) == 1


BAD = [
    ("empty.txt", "", r"empty\.txt is empty"),
    ("blank.txt", " \n ", r"blank\.txt holds no text"),
    ("latin1.txt", b"abc\xe9d", r"latin1\.txt: byte 3 \(0xe9\) is not UTF-8"),
    ("utf16.txt", "a text".encode("utf-16-le"), r"utf16\.txt has zero bytes near its start, as UTF-16 .* have: only"),
    ("utf16.py", "a text".encode("utf-16-be"), r"utf16\.py has zero bytes near its start"),
    ("latin1.jsonl", b'"ab"\n"c\xe9"', r"latin1\.jsonl: byte 7 \(0xe9\) is not UTF-8"),
    (
        "latin1.csv",
        b"text\nc\xe9",
        r"byte 6 \(0xe9\) is not UTF-8 \(if it is from Windows: iconv -f WINDOWS-1252 -t UTF-8\): convert",
    ),
    ("utf16.csv", "text\nx".encode("utf-16"), r"is not UTF-8 \(if it is from Windows: iconv -f UTF-16 -t UTF-8\): con"),
    (
        "a.json",
        '[{"text": "x"}, {"prompt": 1, "completion": 2}]',
        r"row 2 has no field 'text' \(fields found: prompt, compl",
    ),
    ("a.json", '[{"text": "x"}, {"text": 5}]', r"row 2: field 'text' must be a string, not a number"),
    ("a.json", '["x", null]', r"row 2 must be a string, not null"),
    ("a.json", "7", r"must hold a list of objects or strings, or one object, not a number"),
    ("a.json", "[]", r"holds no text"),
    ("a.json", '[\n"x",\n}', r"broken JSON at line 3, column 1"),
    ("a.json", '{"text": "x"}\n{"text": "y"}', r"broken JSON at line 2.*name it \.jsonl"),
    ("a.json", "[" * 100_000, r"nested too deeply"),
    ("a.json", "[" * 101 + "]" * 101, r"nested too deeply"),
    ("a.json", '["\\ud800"]', r"row 1: half a surrogate pair at character 0"),
    ("a.jsonl", '{"text": "x"}\n\n{"txt": "y"}', r"line 3 has no field 'text' \(fields found: txt\)"),
    ("a.jsonl", '{"text": "x"}\n{"text": "y"', r"broken JSON at line 2"),
    ("a.jsonl", '{"text": ["x"]}', r"line 1: field 'text' must be a string, not a list"),
    ("a.jsonl", "[" * 100_000, r"line 1: JSON .* nested too deeply"),
    ("a.csv", "id,body\n1,x\n", r"the header has no field 'text' \(fields found: id, body\)"),
    ("a.csv", "id,text\n1,x\n2,y,z\n", r"ends at line 3 has 3 fields and the header 2"),
    ("a.csv", "id;text\n1;x\n", r"a\.csv: the columns of the header 'id;text' are not separated by commas: save"),
    ("a.csv", "id\ttext\n1\tx\n", r"a\.csv: the columns of the header 'id text' are not separated by commas: save"),
    ("a.tsv", "id;text\n1;x\n", r"a\.tsv: the columns of the header 'id;text' are not separated by tabs: save"),
    (
        "a.csv",
        '"id";"text"\n"1";"x"\n',
        r"a\.csv: the columns of the first line '\"id\";\"text\"' are not separated by",
    ),
    ("a.csv", 'text\n"x', r"broken CSV at line 2"),
    ("a.tsv", "id\ttext\n1\tx\ty\n", r"ends at line 2 has 3 fields and the header 2: a text may not hold a tab"),
    ("a.csv", "text,text\nx,y\n", r"two columns are called 'text'"),
    ("a.csv", "text\n", r"holds no text"),
    ("a.parquet", b"PAR1 but not really", r"is no Parquet file or is damaged"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(BadInput, match=message) as caught:
        read_documents(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "not gzip"])
def test_damaged_gzip(tmp_path, name, damage):
    line = "x\n" if name.startswith("a.txt") else '"x"\n'
    header = "text\n" if name.startswith("a.csv") else ""
    content = bytearray(gzip.compress((header + line * 10_000).encode()))
    if damage == "torn":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-8] ^= 1  # the checksum
    else:
        content = b"text\n"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=r"damaged or cut short \(.+\): fetch"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["x"]}, r"no field 'text' \(fields found: body\)"),
        ({"text": [1, 2]}, "column 'text' must hold strings, not int64"),
        ({"text": ["x", None]}, "row 2: column 'text' must be a string, not null"),
    ],
)
def test_bad_parquet(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=message):
        read_documents(tmp_path / "a.parquet")


def test_torn_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(5000)]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[200:400] = os.urandom(200)
    for bad in (content, content[:-10]):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="damaged"):
            read_documents(path)


def test_parquet_with_bytes_that_are_not_utf8(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_documents(tmp_path / "a.parquet")


def test_missing_paths_and_folders_without_text(tmp_path):
    command = r'hf download --repo-type dataset org/name --local-dir name --include "\*\.parquet"$'
    with pytest.raises(BadInput, match=rf"; if it is a data set on the hub, .*: {command}"):
        read_documents("org/name")
    with pytest.raises(BadInput, match="there is no file or folder"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(BadInput, match="holds no readable file; put one there, or name another path"):
        read_documents(tmp_path)
    write(tmp_path / ".hidden", "x")
    with pytest.raises(BadInput, match=r"no readable file \(skipped: 1 hidden\); put one there"):
        read_documents(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """Its files are not left out without a word. Tests may run as root, who may list all."""

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(BadInput, match=r"cannot be read \(Permission denied\)$"):
        read_documents(tmp_path)


def test_documents_come_one_by_one(tmp_path):
    """The first document of a file arrives before its broken end is reached: nothing is read ahead."""
    documents = iterate_documents(write(tmp_path / "a.jsonl", '"x"\n' * 3 + "broken"))
    assert [next(documents) for _ in range(3)] == ["x"] * 3
    with pytest.raises(BadInput, match="line 4"):
        next(documents)
