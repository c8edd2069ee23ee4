"""Which files of a folder are learned, held out and tested on, and what then has no effect."""

from types import SimpleNamespace

import pytest

from llmq_jax.data.folders import FolderFiles
from llmq_jax.data.records import record_files
from llmq_jax.errors import BadInput
from train.sources import one_split, sources_of

INSTRUCT = {"validation_data": None, "validation_fraction": None, "split_seed": None}
CLASSIFIER = INSTRUCT | {"test_data": None, "test_fraction": None, "balance": False}
PRETRAIN = {"validation_data": None, "validation_fraction": None}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`folder(*names)` makes files in the folder "data" of an empty one."""
    monkeypatch.chdir(tmp_path)

    def make(*names, inside="data"):
        for name in names:
            path = tmp_path / inside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")

    return make


def found(recipe=INSTRUCT, hold_out=True, data="data", **given):
    """{source: its path, or the names of its files}"""
    sources = sources_of(SimpleNamespace(data=data, **recipe | given), record_files, hold_out)

    def shown(source):
        if not isinstance(source, FolderFiles):
            return source
        return [str(file.relative_to(source.folder)) for file in source.files]

    return {name: shown(source) for name, source in sources._asdict().items()}


ALL = ("train-0-of-2.jsonl", "train-1-of-2.jsonl", "validation.jsonl", "test.jsonl")


@pytest.mark.parametrize("recipe", [INSTRUCT, PRETRAIN])
def test_each_split_has_its_use(folder, capsys, recipe):
    folder(*ALL)
    assert found(recipe) == {"training": [*ALL[:2]], "validation": ["validation.jsonl"], "test": None}
    line = "data: train-0-of-2.jsonl and 1 more to learn, validation.jsonl held out, test.jsonl left out\n"
    assert capsys.readouterr().out == line


def test_a_recipe_that_tests_has_the_test_files(folder, capsys):
    folder(*ALL)
    expected = {"training": [*ALL[:2]], "validation": ["validation.jsonl"], "test": ["test.jsonl"]}
    assert found(CLASSIFIER) == expected
    assert capsys.readouterr().out.endswith("validation.jsonl held out, test.jsonl to test on\n")


def test_where_nothing_is_held_out_validation_files_are_not_learned_either(folder, capsys):
    folder(*ALL)
    assert found(hold_out=False) == {"training": [*ALL[:2]], "validation": None, "test": None}
    assert "validation.jsonl left out, test.jsonl left out" in capsys.readouterr().out


def test_without_validation_files_a_part_of_the_training_files_is_held_out(folder, capsys):
    """Never the test's."""
    folder("train.jsonl", "test.jsonl")
    options = {"validation_fraction": 0.2, "split_seed": 3}
    assert found(**options) == {"training": ["train.jsonl"], "validation": None, "test": None}
    assert capsys.readouterr().out == "data: train.jsonl to learn, test.jsonl left out\n"
    assert found(CLASSIFIER, **options) == {"training": ["train.jsonl"], "validation": None, "test": ["test.jsonl"]}
    # Unless the user says so.
    given = "data/test.jsonl"
    assert found(validation_data=given) == {"training": ["train.jsonl"], "validation": given, "test": None}


@pytest.mark.parametrize("names", [("a.jsonl", "b.jsonl"), ("test.jsonl",), ("dev_1.jsonl", "dev_2.jsonl")])
def test_a_folder_of_one_split_is_what_the_user_gave(folder, capsys, names):
    folder(*names)
    assert found(validation_fraction=0.2) == {"training": [*names], "validation": None, "test": None}
    folder("x.jsonl", inside="more")
    assert found(data="more", validation_data="data")["validation"] == [*names]
    assert found(CLASSIFIER, data="more", test_data="data")["test"] == [*names]
    assert capsys.readouterr().out == ""


def test_what_is_no_folder_is_as_it_is(folder):
    folder("train.jsonl")
    expected = {"training": "data/train.jsonl", "validation": "nowhere", "test": None}
    assert found(data="data/train.jsonl", validation_data="nowhere") == expected
    assert found(data=None) == {"training": None, "validation": None, "test": None}


def test_an_option_for_one_split_takes_the_files_of_that_split(folder, capsys):
    """As in the folder of another data set."""
    folder(*ALL)
    folder("a.jsonl", inside="mine")
    assert found(data="mine", validation_data="data")["validation"] == ["validation.jsonl"]
    assert capsys.readouterr().out == (
        "data: train-0-of-2.jsonl and 1 more left out, validation.jsonl held out, test.jsonl left out\n"
    )
    assert found(CLASSIFIER, data="mine", test_data="data")["test"] == ["test.jsonl"]
    assert len(one_split("data", "train", record_files).files) == 2
    assert one_split(None, "train", record_files) is None


def test_a_folder_that_lacks_what_is_asked_of_it(folder):
    folder("validation.jsonl", "test-1.jsonl", "test-2.jsonl")
    advice = "name the files to read, or a folder of them"
    with pytest.raises(BadInput) as error:
        found()
    assert str(error.value) == (
        f"data holds validation files (validation.jsonl) and test files (test-1.jsonl and 1 more) and no train files: "
        f"{advice}"
    )
    folder("train.jsonl", "test.jsonl", inside="other")
    with pytest.raises(BadInput, match=r"^other holds train .* and test files \(test\.jsonl\) and no validation files"):
        found(data="data/test-1.jsonl", validation_data="other")


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (
            INSTRUCT,
            {"validation_data": "x.jsonl"},
            "data has validation files of its own, validation.jsonl: leave --validation-data out, or give the files to "
            "learn from in a folder of their own",
        ),
        (
            CLASSIFIER,
            {"test_data": "data/test.jsonl"},
            "data has test files of its own, test.jsonl: leave --test-data ",
        ),
        (
            INSTRUCT,
            {"validation_fraction": 0.1},
            "--validation-fraction has no effect beside the validation files of data, validation.jsonl; leave it out",
        ),
        (PRETRAIN, {"validation_fraction": 0.0}, "--validation-fraction has no effect beside the validation files"),
        (CLASSIFIER, {"test_fraction": 0.1}, "--test-fraction has no effect beside the test files of data, test.jsonl"),
        (INSTRUCT, {"split_seed": 0}, "--split-seed has no effect where data has the files that are held out; leave"),
        (CLASSIFIER, {"split_seed": 1}, "--split-seed has no effect where data has the files that are held out"),
    ],
)
def test_what_has_no_effect(folder, recipe, given, message):
    folder(*ALL)
    with pytest.raises(BadInput) as error:
        found(recipe, **given)
    assert str(error.value).startswith(message)


def test_what_still_has_an_effect(folder):
    """A classifier chooses by the seed what is balanced, and what is held out of a folder that has the test alone."""
    folder(*ALL)
    assert found(CLASSIFIER, split_seed=1, balance=True)["test"] == ["test.jsonl"]
    folder("train.jsonl", "test.jsonl", inside="two")
    assert found(CLASSIFIER, data="two", split_seed=1, validation_fraction=0.1)["validation"] is None
    with pytest.raises(BadInput, match=r"^--split-seed has no effect where two has the files that are held out"):
        found(CLASSIFIER, data="two", split_seed=1, validation_data="data/validation.jsonl")
