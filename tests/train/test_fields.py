"""Fields that have other names in the files (--fields)."""

import json

import pytest

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer, Record, read_conversations, read_preferences, read_prompts
from llmq_jax.data.records import renamed
from llmq_jax.errors import BadInput
from llmq_jax.language_model import LanguageModel
from tests.programs import ended

WORDS = ("a", "b", "ab", "ba", "abc", "cab")
DOLLY = [{"instruction": f"Say {word}.", "context": word * 2, "response": word} for word in WORDS]
AS_ALPACA = [{"instruction": f"Say {word}.", "input": word * 2, "output": word} for word in WORDS]
ORCA = [{"question": f"Say {word}.", "chosen": word, "rejected": "no", "source": "x"} for word in WORDS]
MATH = [{"problem": f"{n} + 1", "solution": str(n + 1), "level": 1} for n in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_readers_take_other_names(tmp_path):
    path = tmp_path / "data.jsonl"
    found = read_conversations(write(path, DOLLY), fields={"output": "response", "input": "context"})
    assert found == read_conversations(write(path, AS_ALPACA))
    pairs = read_preferences(write(path, ORCA), fields={"prompt": "question"})
    plain = [{**row, "prompt": row["question"]} for row in ORCA]
    assert pairs == read_preferences(write(path, [{k: v for k, v in row.items() if k != "question"} for row in plain]))
    names = {"prompt": "problem", "answer": "solution"}
    prompts, _ = read_prompts(write(path, MATH), ByteTokenizer(), fields=names)
    assert [prompt.text for prompt in prompts] == [row["problem"] for row in MATH]
    assert [prompt.columns for prompt in prompts] == [{"level": 1, "answer": row["solution"]} for row in MATH]
    # A format reads the fields by their new names.
    prompts, _ = read_prompts(path, ByteTokenizer(), prompt_format="Q: {prompt}", fields=names)
    assert prompts[0].text == "Q: 0 + 1"


def test_a_field_takes_the_place_of_one_with_its_new_name():
    rows = [Record("f: row 1", {"a": 1, "b": 2}), Record("f: row 2", {"a": 3})]
    assert [row.fields for row in renamed(rows, {"a": "b"})] == [{"a": 2}, {"a": 3}]
    assert [row.fields for row in renamed(rows, {"a": "b", "b": "a"})] == [{"a": 2, "b": 1}, {"b": 3}]
    assert renamed(rows, None) is rows and rows[0].fields == {"a": 1, "b": 2}
    with pytest.raises(BadInput, match=r"f: row 1 has no field 'c' \(fields found: a, b\): choose one with --fields"):
        renamed(rows, {"a": "c"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a tiny model "base"."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = lq.GPT2Config(vocab_size=257, max_position_embeddings=256, **sizes)
    lq.save(LanguageModel(config, lq.build(config), lq.init(config, seed=0), ByteTokenizer()), "base")
    return tmp_path


OPTIONS = ("--data=data.jsonl", "--init-from=base", "--train=all", "--steps=2")
GRPO = ("--prompts-per-step=2", "--group-size=2", "--max-new-tokens=4", "--reward=answer")


@pytest.mark.parametrize(
    ("recipe", "rows", "fields", "plain", "others"),
    [
        ("instruct", DOLLY, "output=response, input=context", AS_ALPACA, ()),
        ("dpo", ORCA, "prompt=question", [{"prompt": row.pop("question"), **row} for row in map(dict, ORCA)], ()),
        ("reward", ORCA, "prompt=question", [{"prompt": row.pop("question"), **row} for row in map(dict, ORCA)], ()),
        (
            "grpo",
            MATH,
            "prompt=problem,answer=solution",
            [{"level": 1, "prompt": row["problem"], "answer": row["solution"]} for row in MATH],
            GRPO,
        ),
    ],
)
def test_recipes_learn_the_same(folder, capsys, at_first_step, recipe, rows, fields, plain, others):
    validation = ("--validation-data=held_out.jsonl",)
    write(folder / "data.jsonl", rows[:-1])
    write(folder / "held_out.jsonl", rows[-1:])
    assert ended(f"train.{recipe}", *OPTIONS, *others, *validation, "--out=run", f"--fields={fields}") == 2
    assert capsys.readouterr().err == at_first_step
    write(folder / "data.jsonl", plain[:-1])
    write(folder / "held_out.jsonl", plain[-1:])
    assert ended(f"train.{recipe}", *OPTIONS, *others, *validation, "--out=plain") == 2
    assert capsys.readouterr().err == at_first_step
    configs = [json.loads((folder / name / "config.json").read_text()) for name in ("run", "plain")]
    for part in ("training_sha256", "validation_sha256"):
        assert configs[0][part] == configs[1][part]
    assert configs[0]["fields"] == fields and configs[1]["fields"] is None
    # A run goes on from the same data under other names.
    assert ended(f"train.{recipe}", *OPTIONS, *others, *validation, "--out=run") == 2
    captured = capsys.readouterr()
    assert captured.err == at_first_step and "begun anew" not in captured.out


@pytest.mark.parametrize("recipe", ["instruct", "dpo", "reward", "grpo"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("response", "--fields is 'response' and must be pairs of names"),
        ("output=a=b", "must be pairs of names"),
        ("=response", "must be pairs of names"),
        ("output=a,output=b", "names 'output' twice"),
        ("output=a,input=a", "names 'a' twice"),
    ],
)
def test_what_is_no_pair_of_names(folder, capsys, recipe, fields, message):
    assert ended(f"train.{recipe}", *OPTIONS[:-1], "--out=run", f"--fields={fields}") == 2
    assert message in capsys.readouterr().err and not (folder / "run").exists()


def test_a_name_that_no_row_has(folder, capsys):
    write(folder / "data.jsonl", DOLLY)
    assert ended("train.instruct", *OPTIONS, "--out=run", "--fields=output=respond") == 2
    expected = "has no field 'respond' (fields found: instruction, context, response): choose one with --fields\n"
    assert capsys.readouterr().err.endswith(expected)
    assert ended("train.instruct", *OPTIONS, "--out=run") == 2
    assert "; --fields says what they are called in the file, as in output=response;" in capsys.readouterr().err


def test_a_classifier_has_options_of_its_own(folder, capsys):
    assert ended("train.classifier", *OPTIONS, "--out=run", "--fields=text=review") == 2
    assert (
        "--fields has no effect in classification, which reads --text-field and --label-field"
        in capsys.readouterr().err
    )
