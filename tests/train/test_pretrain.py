import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf_tokenizers

import llmq_jax as lq
from llmq_jax.data import read_documents
from llmq_jax.training import resuming
from tests.train.conftest import PRETRAINED
from train.options import completed
from train.pretrain import RUNS, Options, starting_options


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in metrics(folder) if "loss" in record]


def test_a_run_learns_and_leaves_what_it_promises(pretrain, drawn):
    code, out, err = pretrain(
        "--data", "TEXT", "--out", "run", "--steps", 60, "--evaluate-every", 30, "--checkpoint-every", 30
    )
    assert (code, err) == (0, "")
    first, *_, last = losses("run")
    assert first > 5 and last < 3.5
    records = metrics("run")
    assert [r["step"] for r in records if "validation_loss" in r] == [30, 60]
    assert records[-1]["tokens"] == 60 * 4 * 16
    for name in ("config.json", "samples.txt", "losses.png", "checkpoints", "tensorboard"):
        assert Path("run", name).exists()
    assert "llmq generate run --prompt" in out and "llmq evaluate run FILE" in out
    assert "python -m convert.to_hf run run-hf" in out


def test_validation_loss_is_that_of_the_whole_last_tenth(pretrained, text_file):
    lm = lq.load(pretrained / "run")
    tokens = list("".join(read_documents(text_file)).encode())
    held_out = tokens[int(0.9 * len(tokens)) :]
    windows = [held_out[start : start + 17] for start in range(0, len(held_out) - 1, 16)]
    rows = np.zeros((len(windows), 16), np.int32)
    for row, window in zip(rows, windows, strict=True):
        row[: len(window) - 1] = window[:-1]
    logits = np.asarray(lm.logits(rows), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = [-logprobs[row, i, target] for row, window in enumerate(windows) for i, target in enumerate(window[1:])]
    assert metrics(pretrained / "run")[-1]["validation_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_config_json_has_effective_values(pretrained):
    config = json.loads((pretrained / "run/config.json").read_text())
    expected = {"seed": 5, "context": 16, "tokenizer": "bytes", "warmup_steps": 0, "minimum_learning_rate": 1e-3}
    assert expected.items() <= config.items()
    assert config["model"]["hidden_size"] == 16 and config["model"]["intermediate_size"] is None
    assert config["options"]["steps"] == 6


def test_fields_of_the_models_config(pretrain):
    options = ("--sample-every", 0, "--steps", 1, "--config", "norm=dyt", "intermediate_size=24")
    _, out, _ = pretrain("--data", "TEXT", "--out", "run", *options)
    assert "llmq evaluate run FILE" in out and "convert.to_hf" not in out  # transformers has no such norm
    lm = lq.load("run")
    assert (lm.config.norm, lm.config.intermediate_size) == ("dyt", 24) and "embedding_scale" in lm.params


DEEPSEEK = (
    "--preset=deepseek-10m",
    "--num-hidden-layers=2",
    "--hidden-size=16",
    "--num-attention-heads=2",
    "--sample-every=0",
    "--config",
    "q_lora_rank=8",
    "kv_lora_rank=8",
    "qk_nope_head_dim=4",
    "qk_rope_head_dim=4",
    "v_head_dim=8",
    "intermediate_size=16",
    "moe_intermediate_size=8",
    "n_routed_experts=4",
    "n_group=1",
    "topk_group=1",
)


@pytest.mark.exhaustive
def test_multi_token_prediction(pretrain):
    """Its coefficient goes from one value to the other, which the last step has."""
    coefficients = ("--mtp-coefficient", 0.5, "--mtp-coefficient-end", 0.1)
    code, out, err = pretrain("--data", "TEXT", "--out", "run", *DEEPSEEK, *coefficients, "--log-every", 1)
    assert (code, err) == (0, "")
    records = [record for record in metrics("run") if "loss" in record]
    weight = 0.0001  # of the sequence-wise balance loss
    for record, coefficient in zip((records[0], records[-1]), (0.5, 0.1), strict=True):
        terms = record["next_token_loss"] + coefficient * record["mtp_1_loss"] + weight * record["sequence_loss"]
        assert record["loss"] == pytest.approx(terms, abs=1e-5)
        assert record["mtp_coefficient"] == pytest.approx(coefficient)
    # What people are shown is the loss that compares.
    assert f"training loss {records[-1]['next_token_loss']:.4f}" in out
    assert metrics("run")[-1]["validation_mtp_1_loss"] > 0
    assert lq.load("run").mtp_logits([[1, 2, 3]])[0].shape == (1, 2, 257)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mtp-coefficient", 0.3], "--mtp-coefficient has no effect on a model without num_nextn_predict_layers"),
        ([*DEEPSEEK, "--mtp-coefficient-end", -1], "--mtp-coefficient-end is -1.0 and must be at least 0"),
        (
            [*DEEPSEEK, "num_nextn_predict_layers=16"],
            "num_nextn_predict_layers=16 must be below --context 16",
        ),
    ],
)
def test_bad_options_of_multi_token_prediction(pretrain, options, message):
    code, _, err = pretrain("--data", "TEXT", "--out", "run", *options)
    assert code == 2 and err.count("\n") == 1 and message in err and not Path("run").exists()


def test_the_help_says_what_a_field_looks_like(pretrain):
    _, out, _ = pretrain("--help")
    assert "--config FIELD=VALUE ..." in out


def test_the_help_shows_the_sizes_of_a_preset(pretrain, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for preset, width in (("gpt2-124m", 768), ("demo", 96), ("none-such", "the preset's")):
        _, out, _ = pretrain("--preset", preset, "--help")
        assert f"Width of the model. (default: {width})" in out


def test_the_same_command_tells_that_the_run_is_finished(pretrain, pretrained):
    shutil.copytree(pretrained / "run", "run")
    before = Path("run/metrics.jsonl").read_bytes()
    code, out, err = pretrain(*PRETRAINED)
    assert (code, err) == (0, "") and "run is finished already" in out
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_equal_runs_are_equal_and_seeds_differ(pretrain, pretrained):
    for out, seed in (("a", 5), ("b", 2)):
        pretrain(*PRETRAINED, "--out", out, "--seed", seed)
    assert losses("a") == losses(pretrained / "run") != losses("b")


def test_accumulation_remat_and_unrolling_change_nothing(pretrain):
    shared = ("--data", "TEXT", "--sample-every", 0, "--evaluate-every", 0, "--steps", 3, "--num-hidden-layers", 2)
    options = ("--accumulate=2", "--remat=full", "--scan-layers", "--attention=masked")
    assert pretrain(*shared, "--out", "plain")[0] == pretrain(*shared, "--out", "all", *options)[0] == 0
    np.testing.assert_allclose(losses("all"), losses("plain"), rtol=1e-4)


def test_epochs_in_place_of_steps(pretrain):
    """The default text of `pretrain` in windows of 16, four in a step: as many steps as epochs have."""
    tiny = ["--context=16", "--batch-size=4", "--hidden-size=16", "--num-hidden-layers=1", "--num-attention-heads=2"]
    Path("my.txt").write_text("abcdefgh" * 80)
    options = ("--data", "my.txt", "--out", "run", "--sample-every", 0, "--evaluate-every", 0, "--epochs", 1.5)
    code, out, err = pretrain(*options, tiny=tiny)
    assert (code, err) == (0, "") and "640 tokens to learn, 0 held out" in out
    assert "finished: 15 steps" in out  # 39 windows, one less than fits for the offset: 9.75 steps an epoch
    recorded = json.loads(Path("run/config.json").read_text())["options"]
    assert recorded["steps"] == 15


def test_the_schedule_is_the_one_that_is_named(pretrain):
    options = ("--data", "TEXT", "--sample-every", 0, "--evaluate-every", 0, "--learning-rate", 1e-3)
    for name in ("constant", "linear"):
        assert pretrain(*options, "--schedule", name, "--out", name, "--steps", 5, "--warmup-steps", 0)[0] == 0
    rates = {name: [record["learning_rate"] for record in metrics(name)] for name in ("constant", "linear")}
    assert rates["constant"] == pytest.approx([1e-3] * 5)
    assert rates["linear"] == pytest.approx([1e-3, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4])


def test_muon_is_another_optimizer_and_resumes(pretrain):
    options = ("--data", "TEXT", "--sample-every", 0, "--evaluate-every", 0)
    for out, more in (("adamw", ()), ("muon", ("--optimizer", "muon"))):
        assert pretrain(*options, "--out", out, *more)[0] == 0
    first, *others = zip(losses("adamw"), losses("muon"), strict=True)
    assert first[0] == first[1] and all(one != other for one, other in others)
    assert losses("muon")[-1] < losses("muon")[0]
    whole = losses("muon")
    Path("muon/finished.json").unlink()
    shutil.rmtree("muon/checkpoints/00000006")
    code, out, _ = pretrain(*options, "--out", "muon", "--optimizer", "muon")
    assert code == 0 and "from step 3" in out and losses("muon") == whole
    code, _, err = pretrain(*options, "--out", "muon")
    assert code == 2 and 'optimizer "muon" -> null' in err


def test_a_run_that_goes_on_says_that_the_code_has_changed(pretrain, monkeypatch):
    options = ("--data", "TEXT", "--out", "run", "--sample-every", 0)
    assert "code" not in pretrain(*options)[1]
    for digest, told in ((None, False), ("0123456789ab", True)):
        if digest:
            monkeypatch.setattr(resuming, "code_digest", lambda digest=digest: digest)
        Path("run/finished.json").unlink()
        code, out, _ = pretrain(*options)
        assert code == 0 and "resuming run from step 6" in out
        assert ("the code has changed since this run began; results from here on may differ" in out) == told


def test_a_part_of_the_held_out_text_may_be_evaluated(pretrain):
    """The batches in the middle and at the ends are others, and so is their loss; the training is the same."""
    options = ("--data", "TEXT", "--sample-every", 0, "--validation-fraction", 0.5)
    for out, more in (("all", ()), ("some", ("--evaluate-batches", 1))):
        assert pretrain(*options, "--out", out, *more)[0] == 0
    assert losses("all") == losses("some")
    found = [[r["validation_loss"] for r in metrics(out) if "validation_loss" in r] for out in ("all", "some")]
    assert len(found[0]) == len(found[1]) and found[0] != found[1]


def test_documents_may_be_kept_apart(pretrain, monkeypatch):
    """The engine is given the same tokens, and where a document ends; objectives are tested to heed that."""
    given = []
    monkeypatch.setattr("llmq_jax.training.engine.run", lambda state, step, batches, *_, **__: given.append(batches[0]))
    Path("rows.jsonl").write_text("".join(json.dumps({"text": "abcdef" * n}) + "\n" for n in range(1, 30)))
    options = ("--data", "rows.jsonl", "--sample-every", 0, "--evaluate-every", 0, "--steps", 2)
    for out, more in (("joined", ()), ("apart", ("--separate-documents",))):
        pretrain(*options, "--out", out, *more)
    joined, apart = given
    np.testing.assert_array_equal(apart["tokens"], joined["tokens"])
    assert apart.keys() - joined.keys() == {"segment_ids", "positions"}
    ends = apart["tokens"] == 256
    assert ends[:, :-1].any()
    np.testing.assert_array_equal(np.diff(apart["segment_ids"], axis=1), ends[:, :-1])
    np.testing.assert_array_equal(apart["positions"][:, 1:] == 0, ends[:, :-1])
    assert not apart["mask"][ends].any()


def test_documents_that_begin_as_they_end_are_not_kept_apart(pretrain):
    """Their beginning would be taken for an end."""
    lq.ByteTokenizer().save("tokenizer")
    loaded = hf_tokenizers.Tokenizer.from_file("tokenizer/tokenizer.json")
    end = [("<|endoftext|>", 256)]
    loaded.post_processor = hf_tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=end)
    loaded.save("tokenizer/tokenizer.json")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": "abcdef" * n}) + "\n" for n in range(1, 30)))
    options = ("--data", "rows.jsonl", "--tokenizer", "tokenizer", "--out", "run", "--separate-documents")
    code, _, err = pretrain(*options)
    assert code == 2 and "begins texts with the token that ends them" in err and not Path("run").exists()


def test_data_that_have_moved_are_the_same(pretrain):
    Path("my.txt").write_text("abc " * 100)
    command = ("--out", "run", "--steps", 2, "--sample-every", 0)
    assert pretrain("--data", "my.txt", *command)[0] == 0
    Path("my.txt").rename("moved.txt")
    code, out, err = pretrain("--data", "moved.txt", *command)
    assert (code, err) == (0, "") and "finished already" in out


@pytest.mark.exhaustive
def test_bfloat16_stays_close(pretrain):
    for dtype in ("float32", "bfloat16"):
        pretrain("--data", "TEXT", "--out", dtype, "--sample-every", 0, "--dtype", dtype)
    assert losses("bfloat16") != losses("float32")
    np.testing.assert_allclose(losses("bfloat16"), losses("float32"), rtol=0.02)


@pytest.mark.exhaustive
def test_going_on_from_a_run_keeps_what_it_knew(pretrain):
    pretrain("--data", "TEXT", "--out", "first", "--steps", 60, "--sample-every", 0)
    reached = metrics("first")[-1]["validation_loss"]
    options = ("--data", "TEXT", "--out", "second", "--init-from", "first", "--steps", 4, "--sample-every", 0)
    code, _, err = pretrain(*options, "--evaluate-every", 1, tiny=["--batch-size=4", "--log-every=1"])
    assert (code, err) == (0, "")
    records = metrics("second")
    assert records[0] == {"step": 0, "tokens": 0, "validation_loss": pytest.approx(reached, abs=1e-5)}
    assert json.loads(Path("second/config.json").read_text())["model"]["hidden_size"] == 16


def test_going_on_from_weights_keeps_their_end_tokens(pretrain, tmp_path):
    config = lq.GPT2Config(
        vocab_size=257, max_position_embeddings=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    generation = lq.GenerationConfig(eos_token_id=(10, 256), other={"top_p": 0.9})
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config), lq.ByteTokenizer(), generation)
    lq.save_hf(lm, tmp_path / "hf", dtype="bfloat16")
    options = ("--data", "TEXT", "--init-from", "hf", "--out", "run", "--steps", 1, "--sample-every", 0)
    assert pretrain(*options, tiny=["--batch-size=4"])[0] == 0
    trained = lq.load("run")
    assert trained.generation.eos_token_id == (10, 256) and trained.generation.other["top_p"] == 0.9
    assert trained.params["final_norm"]["scale"].dtype == np.float32


def test_weights_go_on_with_other_fields_that_leave_them_as_they_are(pretrain, pretrained):
    options = ("--data", "TEXT", "--init-from", str(pretrained / "run"), "--steps", 1, "--sample-every", 0)
    tiny = ["--batch-size=4"]
    assert pretrain(*options, "--out", "run", "--config", "activation_function=relu2", tiny=tiny)[0] == 0
    lm = lq.load("run")
    assert (lm.config.activation_function, lm.config.hidden_size) == ("relu2", 16)
    code, _, err = pretrain(*options, "--out", "other", "--config", "norm=rms_norm", tiny=tiny)
    assert code == 2 and "the config has no place for final_norm/bias" in err and not Path("other").exists()


def test_a_plateau_is_cooled_down_by_a_branch(pretrain):
    """With the data in the order of the run that it branches off, and the rates from there."""
    shared = ("--data", "TEXT", "--sample-every", 0, "--warmup-steps", 1, "--checkpoint-every", 2, "--log-every", 1)
    tiny = ["--batch-size=4", "--context=16", "--hidden-size=16", "--num-hidden-layers=1", "--num-attention-heads=2"]
    plateau = ("--out", "plateau", "--schedule", "constant", "--steps", 4)
    cooled = ("--out", "cooled", "--schedule", "wsd", "--steps", 6, "--decay-steps", 2)
    assert pretrain(*shared, *plateau, tiny=tiny)[0] == 0
    code, out, err = pretrain(*shared, *cooled, "--branch-from", "plateau", tiny=tiny)
    assert (code, err) == (0, "") and "after step 4" in out
    rates = [record["learning_rate"] for record in metrics("cooled") if "loss" in record]
    np.testing.assert_allclose(rates, [3e-3 * 0.55, 3e-4], rtol=1e-5)
    assert pretrain(*shared, *cooled, "--out", "straight", tiny=tiny)[0] == 0
    assert [r["loss"] for r in metrics("straight") if "loss" in r][4:] == losses("cooled")
    code, _, err = pretrain(*shared, *plateau, "--out", "none", "--branch-from", "plateau", tiny=tiny)
    assert code == 2 and "--branch-from is plateau/checkpoints/00000004, the state after step 4, and steps is 4" in err
    muon = ("--out", "none", "--branch-from", "plateau", "--steps", 6, "--optimizer", "muon")
    code, _, err = pretrain(*shared, *muon, tiny=tiny)
    assert code == 2 and re.search(
        r"plateau/checkpoints/00000004 is of another optimizer, though of this model: optimizer_state/.*; use the "
        r"optimizer, .* that it was trained with, or begin a run with its weights alone \(--init-from,",
        err,
    )


def test_tokens_outside_the_vocabulary_name_the_file_or_the_option(pretrain, tmp_path):
    config = lq.GPT2Config(
        vocab_size=100, max_position_embeddings=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    lq.save_hf(lq.LanguageModel(config, lq.build(config), lq.init(config), lq.ByteTokenizer()), tmp_path / "hf")
    Path("low.txt").write_text("A" * 400)
    Path("high.txt").write_text("Az" * 200)
    options = ("--init-from", "hf", "--out", "run", "--sample-prompt", "A")
    for data, *more, named in (
        ("high.txt", "high.txt"),
        ("low.txt", "--validation-data", "high.txt", "high.txt"),
        ("low.txt", "--sample-prompt", "z", "--sample-prompt"),
    ):
        code, _, err = pretrain("--data", data, *options, *more, tiny=["--batch-size=4", "--steps=1"])
        assert (code, Path("run").exists()) == (2, False)
        assert err.startswith(f"error: {named}: token id ") and "outside the vocabulary of 100" in err


@pytest.mark.parametrize("prompt", ["", "x" * 15])
def test_prompts_at_both_ends_of_the_possible(pretrain, prompt):
    assert pretrain("--data", "TEXT", "--out", "run", "--steps", 1, f"--sample-prompt={prompt}")[0] == 0
    assert Path("run/samples.txt").read_text().startswith(f"step 1\n  {prompt}")


def test_samples_may_change_on_resume_and_data_may_not(pretrain, monkeypatch):
    Path("my.txt").write_text("abc " * 100)

    def failing(*arguments, **keywords):
        raise RuntimeError("no sample")

    command = ("--data", "my.txt", "--out", "run", "--checkpoint-every", 2)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no sample"):
        patched.setattr("llmq_jax.generation.generate", failing)
        pretrain(*command, "--sample-every", 2)
    Path("my.txt").write_text("abd " * 100)  # as many tokens, in both streams
    code, _, err = pretrain(*command, "--sample-every", 2)
    assert code == 2 and "training_sha256" in err and "validation_sha256" in err and "_tokens" not in err
    Path("my.txt").write_text("abc " * 100)
    code, out, err = pretrain(*command, "--sample-every", 3, "--sample-prompt", "c")
    assert (code, err) == (0, "") and "resuming run from step 2" in out


@pytest.mark.exhaustive
def test_a_run_begun_from_another_resumes_though_that_has_gone_on(pretrain, monkeypatch):
    pretrain("--data", "TEXT", "--out", "first", "--steps", 2, "--sample-every", 0)
    command = ("--data", "TEXT", "--out", "second", "--init-from", "first", "--steps", 2, "--sample-every", 0)
    assert pretrain(*command, tiny=["--batch-size=4"])[0] == 0
    Path("first/checkpoints/00000002").rename("first/checkpoints/00000007")
    code, out, err = pretrain(*command, tiny=["--batch-size=4"])
    assert (code, err) == (0, "") and "second is finished already" in out


def test_without_checkpoints_nothing_is_suggested_that_needs_one(pretrain):
    code, out, _ = pretrain(
        "--data", "TEXT", "--out", "run", "--sample-every", 0, "--checkpoint-every", 0, "--steps", 1
    )
    assert code == 0 and "finished:" in out and "next:" not in out and "llmq generate" not in out


def test_default_text_is_the_standard_library(pretrain, monkeypatch):
    modules = [("alpha", "def f(): pass\n" * 20), ("json", "import re\n" * 20), ("beta", "x = 1\n" * 20)]
    monkeypatch.setattr("llmq_jax.data.python_library_documents", lambda: modules)
    code, out, err = pretrain("--out", "run", "--sample-every", 0, "--steps", 1)
    assert (code, err) == (0, "")
    # json is held out by its name, the others are learned; each ends with the end-of-text token.
    assert f"{281 + 121:,} tokens to learn, 201 held out (tokenizer: bytes)" in out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("d.jsonl", '{"body": "%s"}\n{"body": "%s"}\n', marks=pytest.mark.exhaustive),
        pytest.param("d.json", '[{"body": "%s"}, {"body": "%s"}]', marks=pytest.mark.exhaustive),
        ("d.csv", "id,body\n1,%s\n2,%s\n"),
    ],
)
def test_fields_of_records(pretrain, name, content):
    Path(name).write_text(content % ("abc" * 30, "abd" * 30))
    code, out, err = pretrain("--data", name, "--text-field", "body", "--out", "run", "--sample-every", 0, "--steps", 1)
    assert (code, err) == (0, "")
    assert "91 tokens to learn, 91 held out" in out  # one document each, with its end-of-text token


def test_presets_hold_what_they_are_named_for():
    options = starting_options({"preset": "nanogpt-shakespeare-cpu"})
    assert options == RUNS["nanogpt-shakespeare-cpu"]
    sizes = (options.num_hidden_layers, options.num_attention_heads, options.hidden_size, options.context)
    assert sizes == (4, 4, 128, 64)
    assert (options.batch_size, options.steps, options.dropout) == (12, 2000, 0.0)
    assert (options.learning_rate, options.betas, options.weight_decay, options.clip) == (1e-3, (0.9, 0.99), 0.1, 1.0)
    assert starting_options({}) == RUNS["demo"]
    assert starting_options({"steps": "4000"}) == starting_options({"steps": "many"}) == RUNS["demo"]
    shorter = starting_options({"steps": "60"})  # whose curves have as many points
    assert (shorter.log_every, shorter.evaluate_every, shorter.sample_every) == (2, 30, 15)
    assert starting_options({"init_from": "x"}).preset is None
    assert starting_options({"preset": "gpt2-124m"}) == Options()


@pytest.mark.parametrize("preset", RUNS)
def test_a_shorter_run_of_a_preset_warms_up_for_a_twentieth_of_it(preset):
    assert completed(starting_options({"preset": preset})).warmup_steps == 100
    assert completed(replace(starting_options({"preset": preset, "steps": "60"}), steps=60)).warmup_steps == 3


# What it is, the options, what the message says. TEXT is the text file; the files of `bad_files` are there.
BAD = {
    "misspelt option": (["--data", "TEXT", "--step", "3"], "unknown option --step: did you mean --steps?"),
    "no number": (["--steps", "many"], "--steps takes an integer, not 'many'"),
    "no file": (["--data", "nothing.txt"], "there is no file or folder nothing.txt"),
    "empty file": (["--data", "empty.txt"], "empty.txt is empty"),
    "blank file": (["--data", "blank.txt"], "blank.txt holds no text"),
    "shorter than a context": (["--data", "TEXT", "--context", "100000"], "text.txt: the training text has"),
    "not UTF-8": (["--data", "latin.txt"], "is not UTF-8"),
    "no text field": (["--data", "rows.jsonl"], "rows.jsonl: line 2 has no field 'text' (fields found: body)"),
    "broken JSON": (["--data", "broken.jsonl"], "broken JSON at line 1"),
    "unknown preset": (["--preset", "gpt2-124"], "unknown preset 'gpt2-124': did you mean gpt2-124m"),
    "strange preset": (["--preset", "zzz"], "choose from demo, nanogpt-shakespeare-cpu, gpt2-124m"),
    "width and heads": (["--data", "TEXT", "--hidden-size", "17"], "heads is 2 and must divide --hidden-size 17"),
    "dropout": (["--data", "TEXT", "--dropout", "1"], "--dropout is 1.0 and must be at least 0 and below 1"),
    "attention": (["--data", "TEXT", "--attention", "fused"], "attention='fused' cannot run: it is a kernel of NVIDIA"),
    "unknown field": (
        ["--data", "TEXT", "--config", "norms=dyt"],
        "GPT2Config has no field 'norms'; did you mean norm",
    ),
    "no field": (["--data", "TEXT", "--config", "dyt"], "'dyt' is no assignment to a field"),
    "field twice": (["--data", "TEXT", "--config", "norm=dyt", "norm=rms_norm"], "norm is given twice"),
    "wrong value": (["--data", "TEXT", "--config", "norm=none"], "GPT2Config.norm='none' must be one of"),
    "wrong type": (["--data", "TEXT", "--config", "norm=3"], "norm=3 is not of the type str"),
    "field of an option": (
        ["--data", "TEXT", "--config", "hidden_size=8"],
        "hidden_size=8: is 16 by the other options",
    ),
    "accumulate": (["--accumulate", "3"], "--accumulate is 3 and must divide --batch-size 4"),
    "no parts": (["--accumulate", "0"], "--accumulate is 0 and must be at least 1"),
    "epochs and steps": (["--epochs", "1"], "--epochs has no effect beside --steps; leave it out"),
    "constant minimum": (
        ["--data", "TEXT", "--schedule", "constant", "--minimum-learning-rate", "1e-5"],
        "--minimum-learning-rate has no effect with --schedule constant",
    ),
    "no batches": (["--evaluate-batches", "0"], "--evaluate-batches is 0 and must be at least 1"),
    "idle batches": (
        ["--evaluate-every", "0", "--evaluate-batches", "2"],
        "--evaluate-batches has no effect with --evaluate-every 0",
    ),
    "one document": (["--data", "TEXT", "--separate-documents"], "--separate-documents has no effect on a single"),
    "no steps": (["--steps", "0"], "--steps is 0 and must be at least 1"),
    "no rate": (["--learning-rate", "0"], "--learning-rate is 0.0 and must be positive"),
    "betas": (["--betas", "0.9", "1"], "--betas is (0.9, 1.0) and must be at least 0 and below 1"),
    "seed": (["--seed", "-1"], "--seed is -1 and must be at least 0"),
    "minimum above peak": (["--data", "TEXT", "--minimum-learning-rate", "1"], "minimum learning rate"),
    "long warm-up": (["--data", "TEXT", "--warmup-steps", "6"], "warm-up of 6 steps does not fit a run of 6"),
    "fraction": (["--data", "TEXT", "--validation-fraction", "1"], "fraction is 1.0 and must lie between 0 and 1"),
    "fraction of the library": (
        ["--validation-fraction", "1.5"],
        "--validation-fraction is 1.5 and must lie between 0",
    ),
    "nothing held out": (
        ["--data", "TEXT", "--validation-fraction", "0"],
        "fraction is 0.0 and must lie between 0 and 1",
    ),
    "no context": (["--data", "TEXT", "--context", "0"], "--context is 0 and must be at least 1"),
    "no tokenizer": (["--data", "TEXT", "--tokenizer", "nowhere"], "no tokenizer 'nowhere'"),
    "device": (["--device", "gpu"], "--device gpu: JAX finds no GPU here; use --device cpu"),
    "device choice": (["--device", "npu"], "--device cannot be 'npu': choose from auto, cpu, gpu, tpu"),
    "no model": (["--init-from", "nowhere/x", "--out", "run"], "nowhere/x"),
    "nanoGPT's resume": (
        ["--init-from", "resume"],
        "names no model; the same command again, without it, resumes a run",
    ),
    "nanoGPT's scratch": (["--init-from", "scratch"], "--init-from scratch: names no model; without it weights are"),
    "model without out": (["--init-from", "nowhere/x"], "missing --out"),
    "field of plain text": (["--data", "TEXT", "--text-field", "a"], "--text-field has no effect on data without"),
    "field of nothing": (["--text-field", "a"], "--text-field has no effect"),
    "preset and model": (["--init-from", "x", "--out", "run", "--preset", "demo"], "--preset has no effect beside"),
    "tokenizer and model": (["--init-from", "x", "--out", "run", "--tokenizer", "bytes"], "--tokenizer has no effect"),
    "width and model": (["--init-from", "x", "--out", "run", "--hidden-size", "8"], "--hidden-size has no effect"),
    "two validations": (
        ["--data", "TEXT", "--validation-data", "TEXT", "--validation-fraction", "0.2"],
        "--validation-fraction has no effect beside --validation-data",
    ),
    "validation never": (
        ["--data", "TEXT", "--validation-data", "TEXT", "--evaluate-every", "0"],
        "--validation-data has no effect with --evaluate-every 0",
    ),
    "prompt never": (["--sample-every", "0", "--sample-prompt", "a"], "--sample-prompt has no effect"),
    "prompt without room": (
        ["--data", "TEXT", "--sample-prompt", "x" * 16],
        "--sample-prompt 'xxxxxxxxxxxxxxxx' is 16",
    ),
    "no room for the default prompt": (
        ["--data", "TEXT", "--context", "1"],
        "error: the default --sample-prompt '\\n' is 1 token long",
    ),
    "start without warm-up": (["--initial-learning-rate", "1e-5"], "--initial-learning-rate has no effect"),
    "keep nothing": (["--data", "TEXT", "--keep-last", "0"], "--keep-last is 0 and must be at least 1"),
    "keep what is not saved": (["--keep-last", "2", "--checkpoint-every", "0"], "--keep-last has no effect"),
    "wandb": (["--data", "TEXT", "--wandb", "p"], "wandb is not installed"),
    "folder of something else, before data are read": (
        ["--data", "missing.txt", "--out", "full"],
        "full is not empty and not the folder of a run",
    ),
    "out is a file": (["--data", "TEXT", "--out", "blank.txt"], "blank.txt is a file"),
    "out is in a file, before data are read": (
        ["--data", "missing.txt", "--out", "blank.txt/run"],
        "blank.txt is a file; a run needs a folder",
    ),
}


@pytest.fixture
def bad_files(pretrain):
    """In the folder that `pretrain` works in."""
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\n ")
    Path("latin.txt").write_bytes("é".encode("latin-1") * 40)
    Path("rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    Path("broken.jsonl").write_text("{'text': 1}\n")
    Path("full").mkdir()
    Path("full/thesis.tex").touch()


def test_the_layout_takes_no_folder(pretrain, bad_files):
    code, out, err = pretrain("--data", "TEXT", "--layout", "--out", "full")
    assert (code, err) == (0, "") and "token_embedding" in out


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(pretrain, bad_files, monkeypatch, case):
    options, message = BAD[case]
    if case == "wandb":
        # As on a machine without it.
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny = ["--batch-size=4", "--steps=6"] if "--init-from" in options else None
    before = sorted(Path().rglob("*"))
    code, _, err = pretrain(*options, **({"tiny": tiny} if tiny else {}))
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("error: ") and message in err, err
    assert sorted(Path().rglob("*")) == before
