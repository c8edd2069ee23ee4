import json
from pathlib import Path

import jax
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.data import (
    ByteTokenizer,
    FileTokenizer,
    read_conversations,
    render,
    split_documents,
    tokenize,
)
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.language_model import LanguageModel

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "max_position_embeddings": 320,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
}
WORDS = ["ab", "ba", "aa", "bb", "abab", "a", "b", "bab", "aba", "bba", "aab", "abb"]


def make_model(folder, tokenizer):
    config = lq.Llama3Config(vocab_size=tokenizer.vocab_size, **SIZES)
    ends = GenerationConfig(eos_token_id=(tokenizer.end_of_text,))
    lq.save(LanguageModel(config, lq.build(config), lq.init(config, seed=0), tokenizer, ends), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "bytes", ByteTokenizer())


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """With ChatML's template and its two special tokens."""
    import tokenizers as hf_tokenizers

    folder = tmp_path_factory.mktemp("chat")
    ByteTokenizer().save(folder / "tokenizer")
    loaded = hf_tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    loaded.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    loaded.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    return make_model(folder / "model", FileTokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "alpaca.json"
    rows = [
        {"instruction": f"Say {word}.", "input": "" if i % 2 else word, "output": word} for i, word in enumerate(WORDS)
    ]
    path.write_text(json.dumps(rows))
    return path


TINY = ("--steps=6", "--batch-size=2", "--log-every=1", "--train=all", "--learning-rate=1e-2", "--out=run")


@pytest.fixture
def instruct(capsys, monkeypatch, tmp_path, model, chat_model, alpaca):
    """`instruct(*options)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder; MODEL,
    CHAT and ALPACA stand for the files. Options given win over the tiny ones."""
    from llmq_jax.command_line import run
    from train.instruct import main

    monkeypatch.chdir(tmp_path)
    names = {"MODEL": model, "CHAT": chat_model, "ALPACA": alpaca}

    def call(*options, tiny=TINY):
        arguments = [str(names.get(option, option)) for option in (*tiny, *options)]
        with pytest.raises(SystemExit) as exit:
            run(main, arguments, program="python -m train.instruct")
        return exit.value.code, *capsys.readouterr()

    return call


def metrics(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def losses(folder="run"):
    return [record["loss"] for record in metrics(folder) if "loss" in record]


GIVEN = ("--data", "ALPACA", "--init-from", "MODEL")


def test_a_run_learns_and_leaves_what_it_promises(instruct):
    code, out, err = instruct(*GIVEN, "--steps", 40, "--evaluate-every", 20, "--sample-every", 20)
    assert (code, err) == (0, "")
    first, *_, last = losses()
    assert first > 5 and last < 3
    assert [record["step"] for record in metrics() if "validation_loss" in record] == [20, 40]
    for name in ("config.json", "samples.txt", "losses.png", "checkpoints", "tensorboard"):
        assert Path("run", name).exists()
    assert "11 conversations to learn, 1 held out (template: alpaca)" in out
    assert "before training:\nSay " in out and "step 20: sample" in out
    assert "$'Below is an instruction" in out and "python -m convert.to_hf run run-hf" in out
    config = json.loads(Path("run/config.json").read_text())
    assert {"template": "alpaca", "context": 320, "train_on": "response", "pack": True}.items() <= config.items()


def test_validation_loss_is_that_of_the_held_out_answers(instruct, alpaca):
    instruct(*GIVEN, "--sample-every", 0)
    lm = lq.load("run")
    _, held_out = split_documents(read_conversations(alpaca), 0.1)
    losses = []
    for conversation in held_out:
        tokens = tokenize(render(conversation, "alpaca"), lm.tokenizer).tokens.tolist()
        answer = len(conversation.messages[1]["content"]) + 1  # its bytes and the end of text
        logits = np.asarray(lm.logits([tokens])[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logprobs[place - 1, tokens[place]] for place in range(len(tokens) - answer, len(tokens))]
    assert metrics()[-1]["validation_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_packing_changes_no_loss(instruct):
    """All conversations are in the first batch, in whatever order and rows."""
    for out, options in (("a", []), ("b", ["--no-pack"]), ("c", ["--accumulate", 2])):
        instruct(*GIVEN, "--batch-size", 12, "--steps", 2, "--out", out, "--sample-every", 0, *options)
    first, *others = (losses(out) for out in "abc")
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)
    assert metrics("a")[0]["tokens"] == sum(len(word) + 1 for word in WORDS) - len_of_held_out("a")


def len_of_held_out(out):
    config = json.loads(Path(out, "config.json").read_text())
    _, held_out = split_documents(read_conversations(config["data"]), 0.1)
    return sum(len(conversation.messages[1]["content"]) + 1 for conversation in held_out)


def test_a_stopped_run_goes_on_and_a_finished_one_says_so(instruct, monkeypatch):
    options = (*GIVEN, "--sample-every", 0, "--checkpoint-every", 2, "--evaluate-every", 2)
    instruct(*options, "--out", "whole")
    from llmq_jax.training.engine import _Loop

    read = _Loop.read

    def interrupted(loop, done):
        if done.step == 5:
            raise KeyboardInterrupt
        read(loop, done)

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "read", interrupted)
        assert instruct(*options)[0] == 130
    code, out, _ = instruct(*options)
    assert code == 0 and "resuming run from step 4" in out and "before training" not in out
    assert losses() == losses("whole")
    assert "run is finished already" in instruct(*options)[1]


def test_epochs_decide_the_steps(instruct):
    _, out, _ = instruct(*GIVEN, "--epochs", 2, "--sample-every", 0, tiny=[o for o in TINY if "steps" not in o])
    assert "3 steps are an epoch" in out
    assert metrics()[-1]["step"] == 6


def test_adapters_are_what_trains_by_default(instruct, model):
    tiny = [option for option in TINY if "train" not in option and "rate" not in option]
    code, out, err = instruct(*GIVEN, "--steps", 2, "--sample-every", 0, tiny=tiny)
    assert (code, err) == (0, "") and "(lora)" in out
    assert json.loads(Path("run/config.json").read_text())["learning_rate"] == 2e-4
    before, after = lq.load(model), lq.load("run")
    assert "lora" in after.variables
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_a_chat_models_own_template(instruct, tmp_path):
    """The end of turn is learned, and ends what the model writes from now on."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho 😀"}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns * 2})}\n" * 6)
    given = ("--data", "chats.jsonl", "--init-from", "CHAT")
    code, out, err = instruct(*given, "--train-on", "last")
    assert (code, err) == (0, "") and "(template: chat)" in out and "llmq chat run" in out
    lm = lq.load("run")
    end = lm.tokenizer.encode("<|im_end|>", allow_special=True)
    assert lm.generation.eos_token_id == (256, *end)
    # Five conversations of "Ho 😀<|im_end|>\n" are learned, 9 tokens each.
    assert metrics()[-1]["tokens"] % 9 == 0 and "45 of " in out


def test_preview(instruct):
    code, out, err = instruct(*GIVEN, "--preview")
    assert (code, err) == (0, "") and not Path("run").exists()
    assert "what is learned stands between ⟦ and ⟧" in out and "row 1, conversation 1" in out
    for word in ("ab", "bba"):
        if f"Say {word}." in out:
            assert f"### Response:\n⟦{word}<|endoftext|>⟧" in out
    assert out.count("⟦") >= 2


def test_preview_on_a_terminal_is_in_colour(instruct, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = instruct(*GIVEN, "--preview", "--train-on", "all")
    assert "in colour" in out and "\x1b[1;32melow is an instruction" in out and "⟦" not in out


def test_what_is_too_long_is_told(instruct, tmp_path):
    rows = [{"prompt": "p" * length, "completion": "c" * length} for length in (2, 2, 3, 12, 30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[0]))
    given = ("--data", "a.jsonl", "--validation-data", "b.jsonl", "--init-from", "MODEL", "--context", 16)
    _, out, _ = instruct(*given, "--sample-prompt", "pp")
    assert "4 conversations to learn, 1 held out (template: plain)" in out
    assert "longer than the context of 16 tokens: 1 conversations truncated, 1 left out; choose a longer" in out
    assert "before training:\npp\n-> " in out
    _, out, _ = instruct(*given, "--too-long", "drop", "--out", "other", "--sample-every", 0)
    assert "0 conversations truncated, 2 left out" in out
    code, _, err = instruct(*given, "--too-long", "error", "--out", "third")
    assert code == 2 and "a.jsonl: line 4 has 25 tokens and the context 16" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-on", "none"], "--train-on is 'none' and must be response, last, all or numbers of answers"),
        (["--train-on", "1"], "has 1 answers, numbered from 0, and none with the number 1"),
        (["--epochs", 2], "--epochs has no effect beside --steps"),
        (["--context", 1], "--context is 1 and must be at least 2"),
        (["--context", 512], "--context 512 exceeds the model's, 320"),
        (["--context", 100], "conversations has anything to learn within the context of 100 tokens"),
        (["--template", "chat"], "has no chat template"),
        (["--template", "plain"], "row 1: the template 'plain' is for records with a prompt"),
        (["--validation-data", "ALPACA", "--validation-fraction", 0.2], "--validation-fraction has no effect"),
        (["--sample-prompt", "x" * 400], "--sample-prompt leaves no room for an answer within the model's 320"),
        (["--data", "missing.json"], "there is no file missing.json"),
        (["--lora-rank", 4], "--lora-rank has no effect without --train lora"),
    ],
)
def test_bad_options(instruct, options, message):
    code, _, err = instruct(*GIVEN, *options)
    assert code == 2 and err.count("\n") == 1 and message in err and not Path("run").exists()


def test_the_help_names_what_is_needed(instruct):
    code, _, err = instruct("--data", "ALPACA")
    assert code == 2 and "missing --init-from" in err
