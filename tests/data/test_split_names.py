"""Splits by names: which words count and where, what is ambiguous, and what readers make of a folder's parts."""

import logging
import re

import pytest

from llmq_jax.data import read_conversations, read_documents, read_labelled, read_preferences, read_records
from llmq_jax.data.folders import FolderFiles
from llmq_jax.data.prompts import read_prompts
from llmq_jax.data.records import record_files
from llmq_jax.data.sources import text_files
from llmq_jax.data.split_names import files_by_split
from llmq_jax.data.tokenizers import ByteTokenizer
from llmq_jax.errors import BadInput


def made(folder, *names, content='{"text": "x"}\n'):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def split(folder, files_of=record_files):
    """{split: names}"""
    parts = files_by_split(folder, files_of(folder))
    assert all((part.folder, part.split) == (folder, name) for name, part in parts.items())
    return {name: [str(file.relative_to(folder)) for file in part.files] for name, part in parts.items()}


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev", "eval", "Val", "DEV"])
@pytest.mark.parametrize("name", ["{}.jsonl", "{}-00000-of-00001.jsonl", "{}_1.jsonl", "{}2.jsonl", "{}.en.jsonl"])
def test_words_as_the_beginning_of_a_file_s_name(tmp_path, word, name):
    name = name.format(word)
    assert split(made(tmp_path, "training_part.jsonl", "TEST.jsonl", name)) == {
        "train": ["training_part.jsonl"],
        "validation": [name],
        "test": ["TEST.jsonl"],
    }


@pytest.mark.parametrize(
    "names",
    [
        ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
        ("a.train.jsonl.gz", "a-Test.en.jsonl"),
        ("alpaca-train-00000-of-00001.jsonl", "alpaca-test-00000-of-00001.jsonl"),
    ],
)
def test_words_as_the_end_of_a_file_s_name(tmp_path, names):
    assert split(made(tmp_path, *names)) == {"train": [names[0]], "test": [names[1]]}


def test_words_as_the_names_of_folders_however_deep(tmp_path):
    names = ("data/Train/en/b.jsonl", "data/test-1/a.jsonl", "data/train/a.jsonl")
    assert split(made(tmp_path, *names)) == {"train": [names[0], names[2]], "test": [names[1]]}
    # Both may say the same.
    made(tmp_path, "data/test-1/test.jsonl")
    assert split(tmp_path)["test"] == [names[1], "data/test-1/test.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        ("a.jsonl", "b.jsonl"),
        ("trains.jsonl", "tests.jsonl", "values.jsonl", "trainer/x.jsonl", "developed.jsonl"),
        ("gsm_train_1.jsonl", "gsm_test_1.jsonl"),  # neither at the beginning nor at the end
        ("train.jsonl",),
        ("train-0.jsonl", "training/b.jsonl"),
        ("test.jsonl", "test_b.jsonl"),
        ("val/a.jsonl", "dev/b.jsonl"),
    ],
)
def test_a_folder_of_one_split_or_none_has_no_parts(tmp_path, names):
    assert split(made(tmp_path, *names)) == {}


def test_the_name_of_the_folder_itself_and_those_above_it_do_not_count(tmp_path):
    made(tmp_path, "train/a.jsonl", "train/b.jsonl", "test/train.jsonl", "test/dev.jsonl")
    assert split(tmp_path / "train") == {}
    assert split(tmp_path / "test") == {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jsonl", "test.jsonl"), "test.jsonl names the split test, and a.jsonl names none"),
        (("train/a.csv", "x/b.csv"), "train/a.csv names the split train, and x/b.csv names none"),
        (("train.jsonl", "test.jsonl", "z.jsonl"), "test.jsonl names the split test, and z.jsonl names none"),
        (("train/validation.jsonl",), "train/validation.jsonl names the splits train and validation"),
        (("test/dev/train.csv",), "test/dev/train.csv names the splits train and validation and test"),
    ],
)
def test_what_is_ambiguous(tmp_path, names, message):
    advice = ": name the files to read, or give one folder per split"
    with pytest.raises(BadInput, match=f"^{re.escape(f'{tmp_path}: {message}{advice}')}$"):
        split(made(tmp_path, *names))


def test_what_is_not_read_is_not_looked_at(tmp_path):
    """Such as the README.md of a data set on the hub, where records are read."""
    made(tmp_path, "train.jsonl", "test.jsonl", "README.md", ".hidden.jsonl")
    assert split(tmp_path) == {"train": ["train.jsonl"], "test": ["test.jsonl"]}
    with pytest.raises(BadInput, match=r"test\.jsonl names the split test, and README\.md names none"):
        split(tmp_path, text_files)


def test_plain_text(tmp_path):
    parts = {"train": ["train.txt"], "validation": ["val.txt"]}
    assert split(made(tmp_path, "train.txt", "val.txt"), text_files) == parts
    made(tmp_path, "README.md")
    with pytest.raises(BadInput, match=r"train\.txt names the split train, and README\.md names none"):
        split(tmp_path, text_files)


@pytest.mark.parametrize(
    "names",
    [
        ("model.py", "train.py", "test.py"),
        ("tools.py", "test_tools.py", "train/loop.py", "train/test_loop.py"),
        ("CMakeLists.txt", "test/CMakeLists.txt", "requirements/dev.txt"),
    ],
)
def test_source_code_is_no_split_which_is_told(tmp_path, caplog, names):
    made(tmp_path, *names)
    with caplog.at_level(logging.WARNING):
        assert split(tmp_path, text_files) == {}
    assert (
        f"{tmp_path}: all files are read alike, though " in caplog.text and " have the name of a split" in caplog.text
    )
    assert len(read_documents(tmp_path)) == len(names)


def test_readers_take_a_part_in_the_place_of_a_folder(tmp_path):
    record = '{"text": "TEXT", "label": "a"}\n{"text": "TEXT 2", "label": "b"}\n'
    for name in ("train-1", "train-2", "test"):
        made(tmp_path, f"{name}.jsonl", content=record.replace("TEXT", name))
    parts = files_by_split(tmp_path, record_files(tmp_path))
    expected = ["train-1", "train-1 2", "train-2", "train-2 2"]
    assert [record.fields["text"] for record in read_records(parts["train"])] == expected
    assert read_documents(parts["train"]) == expected and read_documents(parts["test"]) == ["test", "test 2"]
    assert [found.messages[0]["content"] for found in read_conversations(parts["train"])] == expected
    assert read_labelled(parts["test"]).texts == ["test", "test 2"]
    prompts, _ = read_prompts(parts["train"], ByteTokenizer(), prompt_format="{text}:")
    assert [prompt.text for prompt in prompts] == [f"{text}:" for text in expected]
    # What is wrong with a part names it.
    with pytest.raises(BadInput, match=r"test\.jsonl: line 1 is no preference pair"):
        read_preferences(parts["test"])
    blank = made(tmp_path / "blank", "train.jsonl", "test.jsonl", content="\n")
    with pytest.raises(BadInput, match=rf"^{blank} \(test\) holds no record$"):
        read_records(files_by_split(blank, record_files(blank))["test"])
    everything = FolderFiles(tmp_path, tuple(record_files(tmp_path / "blank")))
    with pytest.raises(BadInput, match=rf"^{tmp_path} holds no text$"):
        read_documents(everything)
