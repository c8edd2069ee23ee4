"""The recipe on two classes that a tiny model tells apart: it learns, leaves its figures, resumes, refuses."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer, read_labelled
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel, with_classifier
from llmq_jax.model_files import load, save
from llmq_jax.models import build, init

WORDS = {"ham": ["noon", "lunch", "see you", "ok"], "spam": ["WIN", "PRIZE", "CALL", "FREE"]}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A language model that knows nothing."""
    config = lq.Llama3Config(
        vocab_size=257,
        max_position_embeddings=48,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.1,
    )
    lm = LanguageModel(config, build(config), init(config, seed=1), ByteTokenizer())
    return save(lm, tmp_path_factory.mktemp("base") / "lm")


@pytest.fixture(scope="session")
def messages(tmp_path_factory):
    """60 ham and 30 spam, and five that come twice."""
    path = tmp_path_factory.mktemp("data") / "messages.csv"
    draw = random.Random(0)
    rows = [
        ("ham" if i % 3 else "spam", f"{i} " + " ".join(draw.choices(WORDS["ham" if i % 3 else "spam"], k=4)))
        for i in range(90)
    ]
    path.write_text("label,text\n" + "".join(f"{label},{text}\n" for label, text in rows + rows[:5]))
    return path


TINY = ["--train=all", "--learning-rate=2e-2", "--batch-size=8", "--log-every=1", "--sample-every=0", "--device=cpu"]
TINY += ["--checkpoint-every=20"]


@pytest.fixture
def classifier(program, monkeypatch, tmp_path, base, messages):
    """`classifier(*options)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*options, data=messages, model=base, tiny=TINY):
        return program("train.classifier", f"--data={data}", f"--init-from={model}", "--out=run", *tiny, *options)

    return call


def records():
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_what_it_promises(classifier, drawn):
    code, out, err = classifier("--epochs", 5, "--sample-every", 20, "--evaluate-every", 20)
    assert (code, err) == (0, "")
    assert "95 texts in" in out and "5 duplicates removed" in out
    assert "training:   63 texts (42 ham, 21 spam)" in out
    assert "validation: 9 texts (6 ham, 3 spam)" in out
    assert "test:       18 texts (12 ham, 6 spam)" in out
    assert "classes: ham, spam; the head is fresh" in out
    assert json.loads(Path("run/config.json").read_text())["options"]["steps"] == 40  # 5 times 8 batches
    first, *_, last = [r for r in records() if "accuracy" in r]
    assert last["loss"] < 0.2 < first["loss"]
    assert [r["step"] for r in records() if "validation_accuracy" in r] == [0, 20, 40]

    figures = json.loads(Path("run/test.json").read_text())
    assert figures["step"] == 40 and figures["texts"] == 18 and figures["accuracy"] > 0.9
    assert np.sum(figures["confusion"]["rows_true_columns_predicted"]) == 18
    assert set(figures["classes"]["spam"]) == {"precision", "recall", "f1", "texts"}
    assert f"test after step 40 on 18 texts: accuracy {figures['accuracy']:.4f}" in out and "true \\ predicted" in out
    errors = [json.loads(line) for line in Path("run/errors.jsonl").read_text().splitlines()]
    assert len(errors) == 18 - round(18 * figures["accuracy"])
    assert Path("run/confusion.png").exists() and Path("run/losses.png").exists()
    assert "spam 0." in Path("run/samples.txt").read_text() or "ham 0." in Path("run/samples.txt").read_text()

    lm = load("run")
    assert lm.config.labels == ("ham", "spam")
    assert lm.classify(["WIN A PRIZE CALL"])[0].argmax() == 1 and lm.classify(["see you at noon"])[0].argmax() == 0
    # The same command again finds it finished, and tests again.
    code, again, _ = classifier("--epochs", 5, "--sample-every", 20, "--evaluate-every", 20)
    assert code == 0 and "is finished already" in again and "on 18 texts" in again


@pytest.mark.exhaustive
@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(classifier, monkeypatch, train):
    options = ("--steps", 10, "--checkpoint-every", 4, "--evaluate-every", 5, f"--train={train}")
    classifier(*options)
    whole, figures = load("run").variables, json.loads(Path("run/test.json").read_text())
    losses = [r["loss"] for r in records() if "loss" in r]

    from llmq_jax.data.length_buckets import LabelledBatches

    get = LabelledBatches.__getitem__

    def fail_at_seven(self, index):
        if index == 7:
            raise KeyboardInterrupt
        return get(self, index)

    Path("run").rename("whole")
    monkeypatch.setattr(LabelledBatches, "__getitem__", fail_at_seven)
    assert classifier(*options)[0] == 130
    monkeypatch.setattr(LabelledBatches, "__getitem__", get)
    code, out, _ = classifier(*options)
    assert code == 0 and "resuming run from step" in out
    jax.tree.map(np.testing.assert_array_equal, load("run").variables, whole)
    assert [r["loss"] for r in records() if "loss" in r] == losses
    assert json.loads(Path("run/test.json").read_text()) == figures


@pytest.mark.exhaustive
@pytest.mark.parametrize("train", ["head", "blocks", "lora"])
def test_parts_of_the_model_train(classifier, train):
    code, out, err = classifier("--steps", 4, "--sample-every", 2, f"--train={train}")
    assert (code, err) == (0, "") and f"parameters ({train})" in out
    lm = load("run")
    assert lm.config.labels == ("ham", "spam") and lm.classify(["a", "bb"]).shape == (2, 2)
    figures = json.loads(Path("run/test.json").read_text())
    assert figures["texts"] == 18


ARCHITECTURES = {
    "gpt2": lq.GPT2Config(
        vocab_size=257, max_position_embeddings=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    ),
    "mixtral": lq.MixtralConfig(
        vocab_size=257,
        max_position_embeddings=48,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        num_local_experts=4,
    ),
}


@pytest.mark.exhaustive
def test_layers_that_are_cut_are_in_memory_once(classifier, beside_state):
    classifier("--train", "blocks")
    assert len(beside_state) == 1 and beside_state[0] < 0.2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures(classifier, architecture, tmp_path):
    """By what is the default: adapters, on experts too."""
    config = ARCHITECTURES[architecture]
    lm = LanguageModel(config, build(config), init(config, seed=1), ByteTokenizer())
    save(lm, tmp_path / "other")
    code, out, err = classifier("--steps", 3, model="other", tiny=[option for option in TINY if "train" not in option])
    assert (code, err) == (0, "") and "(lora)" in out
    assert json.loads(Path("run/test.json").read_text())["texts"] == 18
    trained = load("run")
    assert "lora" in trained.variables and trained.config.model_type == architecture
    before = with_classifier(lm, ("ham", "spam"), seed=0).params["score"]["kernel"]
    assert np.abs(np.asarray(trained.params["score"]["kernel"]) - before).max() > 1e-3


def test_classes_may_be_balanced_or_weighed(classifier, at_first_step):
    _, out, err = classifier("--balance")
    assert err == at_first_step
    assert "balanced to 60" in out and "training:   42 texts (21 ham, 21 spam)" in out
    _, out, err = classifier("--class-weights", "--out=other")
    assert err == at_first_step and "training:   63 texts (42 ham, 21 spam)" in out
    assert "class weights: ham 0.75, spam 1.5; losses are weighted by them, in training and validation\n" in out


@pytest.mark.exhaustive
def test_splits_follow_their_seed_alone(classifier, at_first_step):
    def digests(*options):
        assert classifier(*options)[2] == at_first_step
        config = json.loads(Path("run/config.json").read_text())
        for path in sorted(Path("run").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        Path("run").rmdir()
        return [config[f"{name}_sha256"] for name in ("training", "validation", "test")]

    first = digests()
    assert digests("--seed", 3) == first and digests("--split-seed", 3) != first
    assert digests("--validation-fraction", 0.2)[2] != digests("--max-length", 4)[2]


def test_files_of_their_own_for_validation_and_test(classifier, at_first_step, tmp_path):
    """Texts that are in them too are not learned."""
    (tmp_path / "validation.csv").write_text("label,text\nspam,WIN\nham,ok\n")
    (tmp_path / "test.csv").write_text("label,text\nspam,PRIZE\nham,noon\nham,lunch\n")
    (tmp_path / "all.csv").write_text("label,text\n" + "".join(f"ham,a{i}\nspam,b{i}\n" for i in range(9)) + "ham,ok\n")
    files = ("--validation-data", "validation.csv", "--test-data", "test.csv")
    _, out, err = classifier(*files, data="all.csv")
    assert err == at_first_step and "19 texts in all.csv; 1 that are in the other files removed" in out
    assert "training:   18 texts (9 ham, 9 spam)" in out and "test:       3 texts (2 ham, 1 spam)" in out


def test_a_folder_of_files(classifier, at_first_step, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.csv").write_text("label,text\n" + "".join(f"ham,a{i}\n" for i in range(9)))
    (tmp_path / "parts" / "b.tsv").write_text("label\ttext\n" + "".join(f"spam\tb{i}\n" for i in range(9)))
    _, out, err = classifier(data="parts")
    assert err == at_first_step and "18 texts in parts" in out and "classes: ham, spam" in out
    # Names are for the tables in it.
    for name in ("a.csv", "b.tsv"):
        path = tmp_path / "parts" / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    _, out, err = classifier("--columns", "label,text", "--out=other", data="parts")
    assert err == at_first_step and "18 texts in parts" in out


def test_a_folder_with_splits(classifier, tmp_path):
    """Its test files are the test."""
    (tmp_path / "parts" / "train").mkdir(parents=True)
    (tmp_path / "parts" / "valid.csv").write_text("label,text\nspam,WIN\nham,ok\n")
    (tmp_path / "parts" / "test.csv").write_text("label,text\nspam,PRIZE\nham,noon\nham,lunch\n")
    for name in ("ham", "spam"):
        rows = "".join(f"{name},{name[0]}{i}\n" for i in range(9))
        (tmp_path / "parts" / "train" / f"{name}.csv").write_text(f"label,text\n{rows}ham,ok\n")
    code, out, err = classifier("--steps", 2, data="parts")
    assert (code, err) == (0, "") and "20 texts in parts (train); 1 duplicate removed; 1 that are in the other" in out
    assert "parts: train/ham.csv and 1 more to learn, valid.csv held out, test.csv to test on\n" in out
    assert "training:   18 texts (9 ham, 9 spam)" in out and "on 3 texts: " in out
    files = ("--validation-data", "parts/valid.csv", "--test-data", "parts/test.csv")
    code, out, err = classifier("--steps", 2, *files, data="parts/train")
    assert (code, err) == (0, "") and "run is finished already" in out
    # Without validation files, a part of each class that is learned is.
    (tmp_path / "parts" / "valid.csv").unlink()
    code, out, err = classifier("--steps", 1, "--out=other", data="parts")
    assert (code, err) == (0, "") and "validation: 2 texts (1 ham, 1 spam)\ntest:       3 texts (2 ham, 1 spam)" in out


def test_no_text_is_in_two_parts_or_twice_in_one(classifier, at_first_step, tmp_path):
    (tmp_path / "validation.csv").write_text("label,text\nspam,WIN\nham,ok\nham,ok\nham,noon\nspam,x\nham,x\n")
    (tmp_path / "test.csv").write_text("label,text\nspam,PRIZE\nham,noon\nham,noon\n")
    rows = "".join(f"ham,a{i}\nspam,b{i}\n" for i in range(9))
    (tmp_path / "all.csv").write_text(f"label,text\n{rows}ham,ok\nspam,x\nham,a1\n")
    files = ("--validation-data", "validation.csv", "--test-data", "test.csv")
    _, out, err = classifier(*files, data="all.csv")
    assert err == at_first_step and "3 texts in test.csv; 1 duplicate removed\n" in out
    removed = "1 duplicate removed; 2 under several labels removed; 1 that are in the other files removed"
    assert f"6 texts in validation.csv; {removed}\n" in out
    assert "21 texts in all.csv; 1 duplicate removed; 2 that are in the other files removed\n" in out
    assert "training:   18 texts (9 ham, 9 spam)" in out and "validation: 2 texts (1 ham, 1 spam)" in out
    code, _, err = classifier("--steps", 1, "--test-data", "all.csv", "--out=other", data="all.csv")
    assert code == 2 and "all.csv: no text is left; give texts that are not in the other files" in err
    (tmp_path / "few.csv").write_text("label,text\nham,ok then\nham,b\nspam,PRIZE\n")
    code, _, err = classifier("--steps", 1, "--test-data", "test.csv", "--out=other", data="few.csv")
    assert code == 2 and "few.csv: no text of class 'spam' is left to learn; give some, or leave it out" in err


def test_columns_without_a_header(classifier, at_first_step, tmp_path):
    (tmp_path / "m.tsv").write_text("".join(f"ham\ta{i}\nspam\tb{i}\n" for i in range(10)))
    _, out, err = classifier("--columns", "label,text", data="m.tsv")
    assert err == at_first_step and "20 texts in m.tsv" in out
    # Names are for the tables among the files.
    (tmp_path / "t.jsonl").write_text('{"text": "c", "label": "ham"}\n{"text": "d", "label": "spam"}\n')
    options = ("--columns", "label, text", "--test-data", "t.jsonl", "--out=other")
    _, out, err = classifier(*options, data="m.tsv")
    assert err == at_first_step and "2 texts in t.jsonl" in out


def test_a_file_without_a_header_and_names_for_it(classifier, tmp_path):
    (tmp_path / "m.tsv").write_text("".join(f"ham\t{'long ' * 500}a{i}\nspam\tb{i}\n" for i in range(10)))
    code, _, err = classifier(data="m.tsv")
    assert code == 2 and err.count("\n") == 1 and len(err) < 300
    assert "m.tsv: the header has no field 'text' (fields found: ham, long long" in err
    assert "or, if the file has no header, name its columns: --columns label,text" in err


def test_a_misspelt_column_is_found_before_the_model_is_loaded(classifier):
    code, _, err = classifier("--text-field", "body", model="nowhere")
    assert code == 2 and "has no field 'body'" in err


def test_a_classifier_goes_on_with_its_head_and_its_order(classifier, base, tmp_path, monkeypatch):
    """And its head, which trains, is not rounded to the type of what stays frozen. Samples and test compute as training
    does."""
    computed, classify_rows = [], LanguageModel.classify_rows

    def watched(lm, rows, *arguments, **named):
        computed.append((lm.model.dtype, lm.model.attention))
        return classify_rows(lm, rows, *arguments, **named)

    monkeypatch.setattr(LanguageModel, "classify_rows", watched)
    before = save_hf(with_classifier(load(base), ["spam", "ham"]), tmp_path / "started")
    how = ("--steps", 1, "--sample-every", 1, "--dtype", "bfloat16", "--attention", "masked")
    frozen = ("--train", "lora", "--base-dtype", "bfloat16", "--learning-rate", 1e-30)
    code, out, _ = classifier(*how, *frozen, model="started")
    assert code == 0 and "classes: spam, ham; the head goes on" in out
    after = load("run")
    assert after.config.labels == ("spam", "ham")
    np.testing.assert_array_equal(after.params["score"]["kernel"], load(before).params["score"]["kernel"])
    assert after.params["token_embedding"]["embedding"].dtype == "bfloat16"
    assert computed == [(jnp.bfloat16, "masked")] * 2


@pytest.mark.parametrize("labels", [("spam", "eggs", "ham"), ("eggs", "ham")])
def test_a_head_is_kept_if_it_knows_all_classes(classifier, base, labels, tmp_path):
    save(with_classifier(load(base), labels), tmp_path / "started")
    code, out, err = classifier("--steps", 1, "--class-weights", model="started")
    assert (code, err) == (0, "")
    if "spam" in labels:
        assert "classes: spam, eggs, ham; the head goes on" in out
        assert "training:   63 texts (21 spam, 0 eggs, 42 ham)" in out and load("run").config.labels == labels
        assert "class weights: spam 1.5, eggs 1, ham 0.75" in out
    else:
        assert "classes: ham, spam; the head is fresh; the one for eggs, ham is discarded" in out
        assert load("run").config.labels == ("ham", "spam")


def test_long_texts_are_cut_and_counted(classifier):
    _, out, _ = classifier("--steps", 1, "--max-length", 5)
    assert "training: 63 of 63 texts cut to --max-length 5" in out
    assert 'llmq classify run --max-length 5 --text "..."\n' in out
    assert "llmq classify run --max-length 5 --data FILE --out classified.jsonl\n" in out


def test_tokens_are_those_of_the_texts(classifier, messages):
    _, out, _ = classifier("--steps", 2, "--batch-size", 63)
    assert 'llmq classify run --text "..."' in out
    training, _, _ = read_labelled(messages).without_duplicates().kept.stratified_split((0.7, 0.1, 0.2))
    assert next(r["tokens"] for r in records() if "loss" in r) == sum(map(len, training.texts))


def test_labels_may_hold_anything(classifier, tmp_path):
    (tmp_path / "money.csv").write_text("label,text\n" + "".join(f"a$b,x{i}\n$^,y{i}\n" for i in range(9)))
    code, out, err = classifier("--steps", 1, data="money.csv")
    assert (code, err) == (0, "") and "classes: $^, a$b; the head is fresh" in out
    for name in ("test.json", "errors.jsonl", "confusion.png"):
        assert Path("run", name).exists()


def test_the_figures_are_there_even_if_nothing_can_be_drawn(classifier, monkeypatch):
    from llmq_jax.training import classification_report

    def fail(report, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(classification_report, "plot_confusion", fail)
    code, _, err = classifier("--steps", 1)
    assert code == 2 and "No space left" in err
    assert json.loads(Path("run/test.json").read_text())["texts"] == 18 and Path("run/errors.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 2, "--steps", 3], "--epochs has no effect beside --steps"),
        (["--columns", "label,text"], "messages.csv: line 1 is a header; leave out --columns"),
        (["--data", "x.jsonl", "--columns", "a,b"], "--columns has no effect without a .csv or .tsv file"),
        (["--sample-prompt", " ", "--sample-every", 1], "--sample-prompt holds no text"),
        (["--epochs", 0], "--epochs is 0.0 and must be positive"),
        (["--balance", "--class-weights"], "--class-weights has no effect beside --balance"),
        (["--max-length", 49], "--max-length 49 exceeds the model's context, 48"),
        (["--max-length", 0], "--max-length is 0 and must be at least 1"),
        (["--validation-fraction", 0.6, "--test-fraction", 0.5], "0.6 and --test-fraction 0.5 leave no texts to learn"),
        (["--test-fraction", 0.9], "--validation-fraction 0.1 and --test-fraction 0.9 leave no texts to learn"),
        (["--validation-data", "x.csv", "--test-fraction", 1.5], "--test-fraction is 1.5 and must lie between 0 and 1"),
        (["--validation-fraction", "nan"], "--validation-fraction is nan and must lie between 0 and 1"),
        (["--keep-last", 2, "--checkpoint-every", 0], "--keep-last has no effect with --checkpoint-every 0; leave it"),
        (["--test-fraction", 0], "--test-fraction is 0.0 and must lie between 0 and 1"),
        (["--test-data", "x.csv", "--test-fraction", 0.1], "--test-fraction has no effect beside --test-data"),
        (["--label-field", "class"], "has no field 'class' (fields found: label, text): choose one with --label-field"),
        (["--text-field", "body"], "has no field 'body'"),
        (["--lora-rank", 4], "--lora-rank has no effect without --train lora"),
        (["--sample-prompt", "a"], "--sample-prompt has no effect with --sample-every 0"),
        (["--split-seed", -1], "--split-seed is -1 and must not be negative"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(classifier, options, message):
    code, _, err = classifier(*options)
    assert code == 2 and err.count("\n") == 1 and message in err and not Path("run").exists()


def test_a_model_without_a_tokenizer(classifier, base, tmp_path):
    save(load(base).replace(tokenizer=None), tmp_path / "mute")
    code, _, err = classifier(model="mute")
    assert code == 2 and err.count("\n") == 1 and "holds no tokenizer" in err
