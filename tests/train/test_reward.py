"""The recipe on answers that a tiny model tells apart: it learns, resumes, holds prompts out, exports, refuses."""

import json
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from convert import to_hf
from llmq_jax.data import ByteTokenizer, FileTokenizer, read_preferences, tokenize_preferences
from llmq_jax.data.preference_batches import PreferenceBatches
from llmq_jax.errors import BadInput
from llmq_jax.language_model import LanguageModel, with_classifier
from llmq_jax.model_files import load, save
from llmq_jax.models import build, init
from llmq_jax.objectives.reward import model_rewards
from train import dpo
from train.chat_templates import with_text_options

SIZES = {
    "max_position_embeddings": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}
KINDS = {"num_key_value_heads": 1, "intermediate_size": 24}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A language model that knows nothing."""
    config = lq.Llama3Config(vocab_size=257, **SIZES, **KINDS)
    lm = LanguageModel(config, build(config), init(config, seed=1), ByteTokenizer())
    return save(lm, tmp_path_factory.mktemp("base") / "lm")


def pairs(count=60):
    """Answers in capitals are better; the prompts come twice each."""
    draw = random.Random(0)
    words = ["noon", "lunch", "see you", "ok"]
    found = []
    for i in range(count):
        chosen, rejected = (" ".join(draw.choices(words, k=2)) for _ in range(2))
        found.append({"prompt": f"{i // 2}:", "chosen": f" {chosen.upper()}", "rejected": f" {rejected}"})
    return found


def write(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    equal = [{"prompt": "x", "chosen": "a", "rejected": "a"}] * 3
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs() + equal)


TINY = ["--train=all", "--learning-rate=1e-2", "--batch-size=8", "--log-every=1", "--sample-every=0", "--device=cpu"]
TINY += ["--checkpoint-every=20"]


@pytest.fixture
def reward(program, monkeypatch, tmp_path, base, data):
    """`reward(*options)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*options, data=data, model=base):
        return program("train.reward", f"--data={data}", f"--init-from={model}", "--out=run", *TINY, *options)

    return call


def records():
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_what_it_promises(reward, drawn):
    options = ("--epochs", 5, "--sample-every", 20, "--evaluate-every", 20)
    code, out, err = reward(*options)
    assert (code, err) == (0, "")
    assert "60 pairs in" in out and "3 of two equal answers left out" in out
    assert "54 pairs to learn, 6 held out (template: plain); an epoch is 7 steps" in out
    assert "a fresh scalar head\n" in out
    lines = records()
    first, *_, last = (line for line in lines if "accuracy" in line)
    assert last["loss"] < 0.2 < first["loss"]
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"} < set(last)
    assert last["min_reward"] < last["mean_reward"] < last["max_reward"] and last["margin"] > 1
    validated = [line for line in lines if "validation_accuracy" in line]
    assert [line["step"] for line in validated] == [0, 20, 35]
    final = validated[-1]
    assert final["validation_accuracy"] == 1.0
    assert (
        f"\n6 pairs held out: accuracy 1.0000, margin {final['validation_margin']:.4f}, "
        f"loss {final['validation_loss']:.4f}; rewards from {final['validation_min_reward']:.3f} to" in out
    )
    samples = Path("run/samples.txt").read_text()
    assert " chosen   " in samples and " rejected " in samples
    lm = load("run")
    assert lm.config.labels == ("reward",)
    good, bad = lm.classify(["1: LUNCH NOON", "1: lunch noon"])[:, 0]
    assert good > bad + 1
    # The same command again finds it finished, and says the same.
    code, again, _ = reward(*options)
    assert code == 0 and "is finished already" in again
    told = next(line for line in out.splitlines() if line.startswith("6 pairs held out"))
    assert f"\n{told}\nnext:\n" in out and f"\n{told}\nnext:\n" in again


@pytest.mark.exhaustive
@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(reward, monkeypatch, train):
    options = ("--steps", 10, "--checkpoint-every", 4, "--evaluate-every", 5, f"--train={train}")
    reward(*options)
    whole = load("run").variables
    losses = [line["loss"] for line in records() if "loss" in line]
    get = PreferenceBatches.__getitem__

    def fail_at_seven(self, index):
        if index == 7:
            raise KeyboardInterrupt
        return get(self, index)

    Path("run").rename("whole")
    monkeypatch.setattr(PreferenceBatches, "__getitem__", fail_at_seven)
    assert reward(*options)[0] == 130
    monkeypatch.setattr(PreferenceBatches, "__getitem__", get)
    code, out, _ = reward(*options)
    assert code == 0 and "resuming run from step" in out
    jax.tree.map(np.testing.assert_array_equal, load("run").variables, whole)
    assert [line["loss"] for line in records() if "loss" in line] == losses


CHAT = [
    {side: [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record[side]}]
     for side in ("chosen", "rejected")}
    for record in pairs(12)
]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(("train", "pooling"), [("head", "last"), ("blocks", "mean"), ("lora", "mean")])
def test_parts_of_the_model_train(reward, train, pooling):
    code, out, err = reward("--steps", 3, "--sample-every", 2, f"--train={train}", f"--pooling={pooling}")
    assert (code, err) == (0, "") and f"parameters ({train})" in out
    assert "held out: accuracy" in out and load("run").config.labels == ("reward",)
    # transformers' model gives the last token's reward.
    assert ("convert.to_hf run run-hf" in out) == (pooling == "last")
    if pooling == "mean":
        with pytest.raises(BadInput, match="run: was trained with --pooling mean, which transformers does not compute"):
            to_hf.main(to_hf.Options("run", "run-hf"))


def with_chat_template(base, folder):
    lm = load(base)
    Path(folder).mkdir()
    lm.tokenizer.save(folder)
    Path(folder, "chat_template.jinja").write_text(CHATML)
    return lm.replace(tokenizer=FileTokenizer(folder))


@pytest.mark.parametrize(("template", "told"), [(None, True), ("plain", False)])
def test_texts_that_are_not_written_as_the_model_chats_are_told(base, tmp_path, capsys, template, told):
    (tmp_path / "pairs.json").write_text(json.dumps(pairs(1)))
    answers = [pair.chosen for pair in read_preferences(tmp_path / "pairs.json")]
    options = dpo.Options(data="pairs.json", init_from="base", out="run", template=template)
    options, _ = with_text_options(options, answers, with_chat_template(base, tmp_path / "files"))
    line = "answers that are texts are taken as they are; --template chat writes them as the model chats\n"
    assert (options.template, capsys.readouterr().out) == ("plain", line if told else "")


@pytest.mark.parametrize(
    ("train", "form"),
    [*(pytest.param(train, "strings", marks=pytest.mark.exhaustive) for train in ("all", "lora")), ("lora", "chat")],
)
def test_the_result_in_transformers(reward, program, base, train, form):
    """The exported model gives the rewards of the run, for a padded batch of the run's own tokens."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")

    model = base
    if form == "chat":
        lm = with_chat_template(base, "files")
        config = lq.Llama3Config(vocab_size=257, **{**SIZES, "max_position_embeddings": 200}, **KINDS)
        lm = LanguageModel(config, build(config), lm.variables, lm.tokenizer)
        model = save(lm, "base")
    everything = CHAT if form == "chat" else pairs(12)
    write("pairs.jsonl", everything[:8])
    write("held_out.jsonl", everything[8:])
    options = ("--steps", 6, f"--train={train}", "--validation-data", "held_out.jsonl")
    code, out, err = reward(*options, data="pairs.jsonl", model=model)
    assert (code, err) == (0, "")
    assert program("convert.to_hf", "run", "run-hf")[0] == 0

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained("run-hf").eval()
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.num_labels == 1
    ours = load("run")
    assert theirs.config.pad_token_id == ours.generation.pad_token_id
    template = "chat" if form == "chat" else "plain"
    found = tokenize_preferences(
        read_preferences("held_out.jsonl"), ours.tokenizer, template=template, context=200 if form == "chat" else 48
    )
    # As they are, the end of text included, which their model does not read where it pads with it.
    rows = [side.tokens for pair in found.pairs for side in (pair.chosen, pair.rejected)]
    width = max(map(len, rows)) + 1
    pad = theirs.config.pad_token_id
    padded = np.stack([np.pad(row, (0, width - len(row)), constant_values=pad) for row in rows])
    real = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    with torch.no_grad():
        expected = theirs(torch.tensor(padded), attention_mask=torch.tensor(real.astype(np.int64))).logits[:, 0].numpy()
    trimmed = [row[:-1] if row[-1] == pad else row for row in rows]
    lengths = np.array([len(row) for row in trimmed], np.int32)
    assert (lengths < [len(row) for row in rows]).all() == (form == "strings")
    tokens = jnp.asarray(np.stack([np.pad(row, (0, width - len(row))) for row in trimmed]), jnp.int32)
    rewards, _ = model_rewards(ours.model, ours.variables, tokens, jnp.asarray(lengths))
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
    assert expected.std() > 0.01
    np.testing.assert_allclose(rewards, ours.classify_rows([row.tolist() for row in trimmed])[:, 0], atol=1e-5)
    # And the run says the same of them.
    said = re.search(
        r"4 pairs held out: accuracy ([\d.]+), margin ([-\d.]+), .* rewards from ([-\d.]+) to ([-\d.]+)", out
    )
    chosen, rejected = expected.reshape(-1, 2).T
    figures = ((chosen > rejected).mean(), (chosen - rejected).mean(), expected.min(), expected.max())
    np.testing.assert_allclose([float(number) for number in said.groups()], figures, atol=1e-3)


def test_a_chat_template_for_a_model_that_has_none(reward):
    write("chats.jsonl", CHAT)
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    Path("own.jinja").write_text(template)
    code, out, err = reward("--steps", 2, "--chat-template", "own.jinja", data="chats.jsonl")
    assert (code, err) == (0, "") and "(template: chat)" in out
    assert load("run").tokenizer.chat_template.source == template
    Path("own.jinja").write_text(template + "{# the same #}")
    code, _, err = reward("--steps", 2, "--chat-template", "own.jinja", data="chats.jsonl")
    assert code == 2 and "other options: chat_template_sha256 " in err


def test_prompts_are_held_out(reward, at_first_step):
    """With all their pairs, by the split's seed alone; with a file for validation its prompts are not learned."""

    def digests(*options):
        assert reward(*options)[2] == at_first_step
        config = json.loads(Path("run/config.json").read_text())
        for path in sorted(Path("run").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        Path("run").rmdir()
        return [config[f"{name}_sha256"] for name in ("training", "validation")]

    first = digests()
    assert digests("--seed", 3) == first and digests("--split-seed", 3) != first
    write(
        "few.jsonl", [{"prompt": "0:", "chosen": "A", "rejected": "b"}, {"prompt": "x", "chosen": "A", "rejected": "b"}]
    )
    _, out, err = reward("--validation-data", "few.jsonl")
    assert err == at_first_step and "not learned, since their prompts are held out too: 2 pairs" in out
    assert "58 pairs to learn, 2 held out" in out
    write("same.jsonl", [{"prompt": "0:", "chosen": "A", "rejected": "c"}])
    code, _, err = reward("--out=other", "--validation-data", "few.jsonl", data="same.jsonl")
    assert code == 2 and "same.jsonl: every prompt is in few.jsonl too; give others to learn" in err


def test_evaluation_on_some_batches_and_at_the_end_on_all(reward, monkeypatch):
    from llmq_jax.data import PreferenceEvaluation

    sizes = []
    iterate = PreferenceEvaluation.__iter__

    def counted(self):
        sizes.append(len(self))
        return iterate(self)

    monkeypatch.setattr(PreferenceEvaluation, "__iter__", counted)
    options = ("--steps", 2, "--evaluate-every", 1, "--batch-size", 4, "--validation-fraction", 0.5)
    code, out, _ = reward(*options, "--evaluate-batches", 2)
    assert code == 0 and sizes[-1] == 8 and set(sizes[1:-1]) == {2}
    assert "30 pairs held out: accuracy" in out


@pytest.mark.exhaustive
def test_margins_and_centring_change_what_is_learned(reward):
    marked = write("marked.jsonl", [{**pair, "margin": 2.0} for pair in pairs()])
    losses = []
    for name, options, data in (("a", (), None), ("b", ("--center", 0.5), None), ("c", (), marked)):
        arguments = {} if data is None else {"data": data}
        code, _, err = reward("--steps", 2, *options, **arguments)
        assert (code, err) == (0, "")
        losses.append(next(record["loss"] for record in records() if "loss" in record))
        Path("run").rename(name)
    assert len({round(loss, 4) for loss in losses}) == 3 and losses[2] > losses[0] + 1


def test_a_scalar_head_goes_on_and_another_is_discarded(reward, base):
    save(with_classifier(load(base), ["score"]), "started")
    code, out, _ = reward("--steps", 1, model="started")
    assert code == 0 and "a scalar head (score), which goes on" in out and load("run").config.labels == ("score",)
    save(with_classifier(load(base), ["ham", "spam"]), "spam")
    code, out, _ = reward("--steps", 1, "--out=other", model="spam")
    assert code == 0 and "a fresh scalar head; the one for ham, spam is discarded" in out


def test_long_pairs_are_told(reward, at_first_step):
    _, out, err = reward("--context", 9)
    assert err == at_first_step
    said = re.search(
        r"to learn, within the context of 9 tokens: (\d+) pairs truncated, 0 left out \(--context, --", out
    )
    assert 40 < int(said[1]) <= 54
    code, _, err = reward("--out=other", "--context", 9, "--too-long", "error")
    assert code == 2 and "tokens and the context 9: shorten it" in err


def test_layers_that_are_cut_are_in_memory_once(reward, beside_state):
    reward("--train", "blocks")
    assert len(beside_state) == 1 and beside_state[0] < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 2, "--steps", 3], "--epochs has no effect beside --steps"),
        (["--epochs", 0], "--epochs is 0.0 and must be positive"),
        (["--sample-prompt", "a"], "--sample-prompt"),
        (["--context", 1], "--context is 1 and must be at least 2"),
        (["--context", 49], "--context 49 exceeds the model's, 48"),
        (["--center", -1], "--center is -1.0 and must not be negative"),
        (["--pooling", "max"], "--pooling"),
        (["--validation-fraction", 1], "--validation-fraction is 1.0 and must lie between 0 and 1"),
        (["--validation-data", "x", "--validation-fraction", 0.1], "--validation-fraction has no effect beside --val"),
        (["--validation-data", "x", "--split-seed", 1], "--split-seed has no effect beside --validation-data"),
        (["--split-seed", -1], "--split-seed is -1 and must not be negative"),
        (["--evaluate-batches", 0], "--evaluate-batches is 0 and must be at least 1"),
        (["--evaluate-batches", 1, "--evaluate-every", 0], "--evaluate-batches has no effect with --evaluate-every 0"),
        (["--template", "chat"], "has no chat template, so it cannot converse; give one with --chat-template FILE, or"),
        (["--template", "plain", "--chat-template", "a"], "--chat-template has no effect with --template plain; leave"),
        (["--lora-rank", 4], "--lora-rank has no effect without --train lora"),
        (["--data", "nowhere.jsonl"], "there is no file or folder nowhere.jsonl"),
        (["--data", "equal.jsonl"], "equal.jsonl: the chosen and the rejected answer are the same in every row"),
        (["--data", "one.jsonl"], "holding out pairs needs at least 2 different prompts, found 1"),
        (["--data", "texts.jsonl"], "texts.jsonl: line 1 is no preference pair (fields found: text)"),
        (["--learning-rate", 0], "--learning-rate is 0.0 and must be positive"),
        (["--learning-rate", "inf"], "--learning-rate is inf and must be positive and finite"),
        (["--weight-decay", "inf"], "--weight-decay is inf and must be finite and not negative"),
        (["--warmup-steps", -1], "--warmup-steps is -1 and must not be negative"),
        (["--schedule", "wsd", "--decay-steps", 9, "--steps", 9], "--decay-steps 9 does not fit: 9 steps less"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(reward, options, message):
    write("equal.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "a"}])
    write("one.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    write("texts.jsonl", [{"text": "x"}])
    code, _, err = reward(*options)
    assert code == 2 and message in err and err.count("\n") == 1 and not Path("run").exists()


def test_a_folder_with_splits(reward, at_first_step, tmp_path):
    """Is the files of each, by which the same run goes on as well."""
    (tmp_path / "data").mkdir()
    for name, part in {"train": pairs()[:40], "validation": pairs()[40:50], "test": pairs()[50:]}.items():
        write(tmp_path / "data" / f"{name}-00000-of-00001.jsonl", part)
    _, out, err = reward(data="data")
    assert err == at_first_step and "40 pairs to learn, 10 held out" in out
    assert "validation-00000-of-00001.jsonl held out, test-00000-of-00001.jsonl left out\n" in out
    files = ("data/train-00000-of-00001.jsonl", "--validation-data", "data/validation-00000-of-00001.jsonl")
    assert reward(*files[1:], data=files[0])[2] == at_first_step
    files = ("data/train-00000-of-00001.jsonl", "--validation-data", "data/test-00000-of-00001.jsonl")
    Path("run/metrics.jsonl").write_text('{"step": 1}\n')
    assert "run holds a run with other options: " in reward(*files[1:], data=files[0])[2]
