"""Rows that cannot be used: the first ends a recipe, or all are left out, and told (--bad-rows)."""

import json

import pytest

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer, read_conversations, read_prompts, tokenize_conversations
from llmq_jax.data.bad_rows import usable
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.errors import BadInput
from llmq_jax.language_model import LanguageModel, with_classifier
from tests.programs import ended

ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def converse(*messages):
    return {"messages": [*messages]}


GOOD = [converse(user(f"Say {word}."), assistant(word)) for word in ("a", "b", "ab", "ba", "abc", "cab")]
TWO_QUESTIONS = converse(user("Say a."), user("Say b."), assistant("ab"))
PAIRS = [{"prompt": f"Say {word}.", "chosen": word, "rejected": f"not {word}"} for word in "abcdefgh"]
TWICE_ASKED = {"prompt": [user("a"), user("b")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
LISTED = [{**pair, "prompt": [user(pair["prompt"])]} for pair in PAIRS]
ROWS = {
    "instruct": [*GOOD[:3], converse(user("Say c."), assistant("")), *GOOD[3:], TWO_QUESTIONS],
    "dpo": [*LISTED, {**LISTED[0], "chosen": ""}, TWICE_ASKED],
    "reward": [*LISTED, {**LISTED[0], "chosen": ""}, TWICE_ASKED],
    "grpo": [*({"prompt": [user(word)], "answer": word} for word in "abcdef"), {"prompt": "", "answer": "a"}],
    "classifier": [*({"text": f"{label} {n}", "label": label} for label in "xy" for n in range(6)), {"text": " "}],
}
FIRST = {
    "instruct": ("data.jsonl: line 4", "2 rows left out", "line 8"),
    "dpo": ("data.jsonl: line 9", "2 rows left out", "line 10"),
    "reward": ("data.jsonl: line 9", "2 rows left out", "line 10"),
    "grpo": ("data.jsonl: line 7", "1 row left out", None),
    "classifier": ("data.jsonl: line 13", "1 row left out", None),
}
"""{recipe: (the first bad row, how many there are, a row that the chat template refuses once all are read)}"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a tiny model "base" whose chat template wants roles to alternate."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = lq.GPT2Config(vocab_size=257, max_position_embeddings=128, **sizes)
    tokenizer = ByteTokenizer().with_chat_template(ALTERNATING)
    lq.save(LanguageModel(config, lq.build(config), lq.init(config, seed=0), tokenizer), "base")
    return tmp_path


@pytest.mark.parametrize("recipe", ROWS)
def test_each_recipe_ends_at_the_first_or_leaves_all_out(folder, capsys, at_first_step, recipe):
    row, count, refused = FIRST[recipe]
    data = folder / "data.jsonl"

    def without(*lines):
        return [each for number, each in enumerate(ROWS[recipe], 1) if f"line {number}" not in lines]

    write(data, ROWS[recipe])
    options = ["--data=data.jsonl", "--init-from=base", "--train=all", "--steps=2", "--batch-size=2"]
    if recipe == "grpo":
        options = [*options[:-1], "--prompts-per-step=2", "--group-size=2", "--max-new-tokens=4", "--reward=length:8"]

    def run(out, *others):
        code = ended(f"train.{recipe}", *options, f"--out={out}", *others)
        return code, *capsys.readouterr()

    for others in ((), ("--bad-rows=error",)):
        code, _, err = run("run", *others)
        assert code == 2 and err.startswith(f"error: {row}") and not (folder / "run").exists()
        assert err.endswith("; --bad-rows drop leaves such rows out\n")
    if refused is not None:
        write(data, without(row.split(": ")[1]))
        _, _, err = run("run")
        assert "roles must alternate" in err and err.endswith("; --bad-rows drop leaves such rows out\n")
        write(data, ROWS[recipe])
    code, out, err = run("run", "--bad-rows=drop")
    assert err == at_first_step
    assert f"{count}, which cannot be used; the first: {row}" in out
    assert json.loads((folder / "run" / "config.json").read_text())["bad_rows"] == "drop"

    # The same rows are learned, and the same are held out, as if the first had never been there.
    write(data, without(row.split(": ")[1]))
    code, out, err = run("alone", "--bad-rows=drop")
    assert err == at_first_step and ("cannot be used" in out) == (refused is not None)
    digests = [json.loads((folder / name / "config.json").read_text())["training_sha256"] for name in ("run", "alone")]
    assert digests[0] == digests[1]


def test_dpo_ends_well_where_a_held_out_pair_is_refused(folder, capsys):
    """Its prompts are asked once more at the end, for the distance to the reference."""
    write(folder / "data.jsonl", LISTED[1:])
    write(folder / "held_out.jsonl", [TWICE_ASKED, LISTED[0]])
    options = ["--data=data.jsonl", "--validation-data=held_out.jsonl", "--init-from=base", "--train=all", "--out=run"]
    options += ["--steps=1", "--batch-size=2", "--evaluate-every=0", "--sample-every=0", "--bad-rows=drop"]
    code = ended("train.dpo", *options)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "1 row left out, which cannot be used; the first: held_out.jsonl: line 1" in out
    assert "KL to the reference" in out


def test_old_pairs_of_a_judged_reward_model_are_left_out_too(folder, capsys, at_first_step):
    lm = lq.load("base")
    lq.save(with_classifier(lm, ["reward"], seed=0), "judged")
    write(folder / "data.jsonl", ROWS["grpo"][:-1])
    write(folder / "old.jsonl", ROWS["dpo"])
    options = ["--data=data.jsonl", "--init-from=base", "--train=all", "--steps=2", "--out=run", "--max-new-tokens=4"]
    options += ["--prompts-per-step=2", "--group-size=2", "--reward=judged", "--judge=length:8"]
    options += ["--steps-per-iteration=1", "--replay-data=old.jsonl"]
    ended("train.grpo", *options, "--bad-rows=drop")
    out, err = capsys.readouterr()
    assert err == at_first_step
    assert "2 rows left out, which cannot be used; the first: old.jsonl: line 9" in out


def test_a_run_goes_on_with_another_choice_for_the_same_rows(folder, capsys, at_first_step):
    """What is learned is compared by its digest."""
    write(folder / "data.jsonl", GOOD)
    options = ["--data=data.jsonl", "--init-from=base", "--train=all", "--steps=2", "--batch-size=2", "--out=run"]
    for choice in (["--bad-rows=drop"], [], ["--bad-rows=error"]):
        ended("train.instruct", *options, *choice)
        out, err = capsys.readouterr()
        assert err == at_first_step and "begun anew" not in out


def test_no_row_at_all_can_be_used(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, [converse(user("a"), assistant(""))] * 3)
    with pytest.raises(BadInput, match=r"line 1.*is empty.*; 2 other rows cannot be used either; no row is left$"):
        read_conversations(path, [])
    write(path, [converse(user("a"), assistant(""))])
    with pytest.raises(BadInput, match=r"line 1.*is empty.*; no row is left$") as one:
        read_conversations(path, [])
    assert "other rows" not in str(one.value)
    # Where all begin alike, leaving out what cannot be used is no advice.
    with pytest.raises(BadInput, match=r"line 1") as first:
        read_conversations(path)
    assert "--bad-rows" not in str(first.value)


def test_prompts_with_other_fields_than_most(tmp_path):
    """Rewards are given a column of each field. Which fields there are, most rows say, not the first."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": word, "answer": word} for word in "abcd"]
    write(path, [{"prompt": "x"}, *rows, {"prompt": "y", "answer": "y", "level": 1}])
    prompts, _ = read_prompts(path, ByteTokenizer(), left_out=(errors := []))
    assert [prompt.text for prompt in prompts] == [*"abcd"]
    assert [str(error) for error in errors] == [
        f"{path}: line {line} has the fields {names} beside the prompt, and {path}: line 2 answer: give all the same"
        for line, names in ((1, "none"), (6, "answer, level"))
    ]
    with pytest.raises(BadInput, match=r"line 1 has.*; 1 other row cannot be used either; --bad-rows drop leaves such"):
        read_prompts(path, ByteTokenizer())


def test_errors_are_listed_in_order():
    def half(number):
        if number % 2:
            raise BadInput(f"{number} is odd")
        return number // 2

    left_out = []
    assert list(usable(half, range(6), left_out)) == [0, 1, 2]
    assert [str(error) for error in left_out] == ["1 is odd", "3 is odd", "5 is odd"]
    for count, others in (
        (2, ""),
        (4, "; 1 other row cannot be used either"),
        (6, "; 2 other rows cannot be used either"),
    ):
        with pytest.raises(BadInput, match=f"^1 is odd{others}; --bad-rows drop leaves such rows out$"):
            list(usable(half, range(count)))
    assert list(usable(half, [])) == [] == list(usable(half, [], []))
    with pytest.raises(TypeError):  # a fault of the program is none of the data's
        list(usable(half, ["a"], []))


def test_both_stages_fill_one_list(tmp_path):
    write(tmp_path / "data.jsonl", ROWS["instruct"])
    left_out = []
    found = read_conversations(tmp_path / "data.jsonl", left_out)
    tokenizer = ByteTokenizer().with_chat_template(ALTERNATING)
    assert isinstance(tokenizer.chat_template, ChatTemplate)
    options = {"template": "chat", "context": 64}
    examples = tokenize_conversations(found, tokenizer, **options, left_out=left_out)
    assert len(examples) == len(GOOD) and len(left_out) == 2
    with pytest.raises(BadInput, match="tokens and the context 8"):  # of another option
        tokenize_conversations(found, tokenizer, template="chat", context=8, too_long="error", left_out=left_out)
    write(tmp_path / "data.jsonl", [*GOOD, TWO_QUESTIONS])
    write(tmp_path / "prompts.jsonl", ROWS["grpo"])
    prompts, longer = read_prompts(tmp_path / "prompts.jsonl", tokenizer, longest=64, left_out=(errors := []))
    assert (len(prompts), longer, len(errors)) == (6, 0, 1)


def test_results_come_one_by_one():
    """Long rows are cut as they come, not after all are there."""
    asked = []
    results = usable(lambda row: asked.append(row) or row, range(3))
    assert next(results) == 0 and asked == [0]
    assert list(results) == [1, 2]
