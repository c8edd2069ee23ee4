import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.data import (
    ByteTokenizer,
    Example,
    read_conversations,
    render,
    split_documents,
    tokenize,
)
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.language_model import LanguageModel
from train.answers import end_of_answer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "max_position_embeddings": 320,
    "hidden_size": 16,
    "num_hidden_layers": 1,
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
    tokenizer = ByteTokenizer().with_tokens(("<|im_start|>", "<|im_end|>")).with_chat_template(CHATML)
    return make_model(tmp_path_factory.mktemp("chat") / "model", tokenizer)


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "alpaca.json"
    rows = [
        {"instruction": f"Say {word}.", "input": "" if i % 2 else word, "output": word} for i, word in enumerate(WORDS)
    ]
    path.write_text(json.dumps(rows))
    return path


TINY = ("--steps=6", "--batch-size=2", "--log-every=1", "--train=all", "--learning-rate=1e-2", "--out=run")
TINY += ("--checkpoint-every=20",)


@pytest.fixture
def instruct(program, monkeypatch, tmp_path, model, chat_model, alpaca):
    """`instruct(*options)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder; MODEL,
    CHAT and ALPACA stand for the files. Options given win over the tiny ones."""
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": model, "CHAT": chat_model, "ALPACA": alpaca}

    def call(*options, tiny=TINY):
        return program("train.instruct", *(names.get(option, option) for option in (*tiny, *options)))

    return call


def metrics(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def losses(folder="run"):
    return [record["loss"] for record in metrics(folder) if "loss" in record]


GIVEN = ("--data", "ALPACA", "--init-from", "MODEL")


def test_a_run_learns_and_leaves_what_it_promises(instruct, drawn):
    Path("run").mkdir()  # an empty folder is as good as none
    code, out, err = instruct(*GIVEN, "--steps", 40, "--evaluate-every", 20, "--sample-every", 20)
    assert (code, err) == (0, "")
    first, *_, last = losses()
    assert first > 5 and last < 3
    assert [record["step"] for record in metrics() if "validation_loss" in record] == [0, 20, 40]
    for name in ("config.json", "samples.txt", "losses.png", "checkpoints", "tensorboard"):
        assert Path("run", name).exists()
    assert "11 conversations to learn, 1 held out (template: alpaca)" in out
    assert re.search(r"\nstep 0: sample\n  Say .*step 0: validation loss \d\.\d{4}\n", out, re.DOTALL)
    assert "step 20: sample" in out
    assert out.endswith("next:\n  llmq chat run\n  python -m convert.to_hf run run-hf\n")
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


def test_packing_changes_no_loss(instruct, alpaca):
    """All conversations are in the first batch, in whatever order and rows."""
    for out, options in (("a", []), ("b", ["--no-pack"]), ("c", ["--accumulate", 2])):
        instruct(*GIVEN, "--batch-size", 12, "--steps", 2, "--out", out, "--sample-every", 0, *options)
    first, *others = (losses(out) for out in "abc")
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)
    # All that are read are counted, learned or not.
    training, _ = split_documents(read_conversations(alpaca), 0.1)
    read = [len(tokenize(render(conversation, "alpaca"), ByteTokenizer()).tokens) for conversation in training]
    assert [metrics(out)[1]["tokens"] for out in "abc"] == [sum(read)] * 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_stopped_run_goes_on_and_a_finished_one_says_so(instruct, monkeypatch, train):
    options = (*GIVEN, "--sample-every", 0, "--checkpoint-every", 2, "--evaluate-every", 2, "--train", train)
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
    assert code == 0 and "resuming run from step 4" in out and "step 0: validation" not in out
    assert losses() == losses("whole")
    assert "run is finished already" in instruct(*options)[1]


def test_epochs_decide_the_steps(instruct):
    _, out, _ = instruct(*GIVEN, "--epochs", 2, "--sample-every", 0, tiny=[o for o in TINY if "steps" not in o])
    assert "an epoch is 3 steps" in out
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
    chats = [{"messages": [{"role": "system", "content": f"{i}"}, *turns * 2]} for i in range(6)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    given = ("--data", "chats.jsonl", "--init-from", "CHAT")
    code, out, err = instruct(*given, "--train-on", "last")
    assert (code, err) == (0, "") and "(template: chat)" in out and "llmq chat run" in out
    lm = lq.load("run")
    end = lm.tokenizer.encode("<|im_end|>", allow_special=True)
    assert lm.generation.eos_token_id == (256, *end)
    # Five conversations of "Ho 😀<|im_end|>\n" are learned, 9 tokens each.
    assert "45 of " in out


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_run_is_asked_in_the_style_that_it_learned(instruct, program, alpaca, train):
    """What it saves has it as its chat template, and so have its export and that of adapters alone."""
    transformers = pytest.importorskip("transformers")
    code, out, err = instruct(*GIVEN, "--train", train, "--sample-every=0", "--evaluate-every=0")
    assert (code, err) == (0, "") and "(template: alpaca)" in out and "chat template" not in out
    lm = lq.load("run")
    assert lm.generation.eos_token_id == (256,)
    assert program("convert.to_hf", "run", "hf")[0] == 0
    folders = ["hf"]
    if train == "lora":
        code, out, _ = program("convert.to_hf", "run", "adapter", "--adapter", "--base=hf")
        assert code == 0 and re.search("next: llmq chat .*/adapter\n", out)
        folders.append("adapter")
    for conversation in read_conversations(alpaca)[:2]:  # with an input, and without
        asked, answer = conversation.messages
        messages = [{**asked, "input": conversation.input}, answer]
        example = tokenize(render(conversation, "alpaca"), ByteTokenizer())
        prompt = example.tokens[: int(example.learned.argmax())].tolist()
        assert lm.chat_tokens(messages[:1]) == prompt
        for folder in folders:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            assert theirs.apply_chat_template(messages, return_dict=False) == example.tokens.tolist()
            assert theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False) == prompt


def test_what_goes_on_from_a_run_goes_on_in_its_style(instruct, program, tmp_path):
    """By the defaults, where strings would be plain."""
    instruct(*GIVEN, "--sample-every=0", "--evaluate-every=0", "--steps=1")
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {word}.", "chosen": word, "rejected": "no"}) + "\n" for word in WORDS)
    )
    given = ("--init-from=run", "--train=all", "--steps=1", "--batch-size=2")
    code, out, err = program("train.dpo", "--data=pairs.jsonl", "--out=dpo", "--sample-every=0", *given)
    assert (code, err) == (0, "") and "(template: chat)" in out and "llmq chat dpo" in out
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in WORDS))
    options = ("--prompts-per-step=1", "--group-size=2", "--max-new-tokens=2", "--reward=length:1", "--sample-every=1")
    options += ("--data=prompts.jsonl", "--out=grpo", "--evaluate-every=0")
    assert program("train.grpo", *options, *given[:-1])[0] == 0
    assert "### Instruction: Say " in Path("grpo/samples.txt").read_text()
    template = lq.load("run").tokenizer.chat_template.source
    assert {lq.load(run).tokenizer.chat_template.source for run in ("dpo", "grpo")} == {template}

    # A run that goes on in the style says nothing of it, one in another does.
    again = ("--sample-every=0", "--evaluate-every=0", "--steps=1", "--init-from=run")
    _, out, _ = instruct("--data", "ALPACA", *again, "--out=again")
    assert "(template: chat)" in out and "in the style" not in out
    (tmp_path / "strings.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n")
    _, out, _ = instruct("--data=strings.jsonl", *again, "--out=other", "--template=plain")
    assert "style plain, which is its chat template from now on; the model's own stays with run\n" in out
    assert lq.load("other").chat_tokens([{"role": "user", "content": "1 + 1 ="}]) == list(b"1 + 1 =")


def test_a_chat_model_that_learns_in_another_style(instruct):
    """The run's style is what it answers to; where the model's own template is, is told."""
    given = ("--template=alpaca", "--sample-every=0", "--steps=1")
    _, out, _ = instruct("--data", "ALPACA", "--init-from", "CHAT", *given)
    assert re.search("the run answers in the style alpaca, .*; the model's own stays with .*/chat\\d+/model\n", out)
    said = [{"role": "user", "content": "Hi"}]
    assert lq.load("run").tokenizer.chat_template.render(said).endswith("### Instruction:\nHi\n\n### Response:\n")


def test_a_run_that_began_without_a_style_goes_on(instruct, monkeypatch):
    """As those of earlier versions did; its next checkpoint has it."""
    from llmq_jax.training.engine import _Loop

    options = (*GIVEN, "--sample-every=0", "--checkpoint-every=2", "--evaluate-every=0")
    read = _Loop.read

    def interrupted(loop, done):
        if done.step == 5:
            raise KeyboardInterrupt
        read(loop, done)

    with monkeypatch.context() as patch:
        patch.setattr("train.instruct.in_style", lambda options, conversations, tokenizer: tokenizer)
        patch.setattr(_Loop, "read", interrupted)
        assert instruct(*options)[0] == 130
    assert lq.load("run").tokenizer.chat_template is None
    code, out, err = instruct(*options)
    assert (code, err) == (0, "") and "resuming run from step 4" in out
    assert lq.load("run").tokenizer.chat_template is not None


def test_texts_without_prompts_have_no_style(instruct, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} and more"}) + "\n" for i in range(4)))
    given = ("--data=texts.jsonl", "--train-on=all", "--sample-every=0", "--steps=1")
    for model in ("MODEL", "CHAT"):
        _, out, _ = instruct(*given, "--init-from", model, f"--out=of-{model}")
        assert f"next:\n  llmq generate of-{model} --prompt The\n" in out
    assert lq.load("of-MODEL").tokenizer.chat_template is None
    assert lq.load("of-CHAT").tokenizer.chat_template.source == CHATML


PREVIEW = ("--batch-size=2", "--train=all", "--preview")
OWN = (
    "{% for m in messages %}{% if m['role'] == 'system' %}({{ m['content'] }}){% elif m['role'] == 'user' %}"
    "Q: {{ m['content'] }}\n{% else %}A: {{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture
def chats(tmp_path):
    """--data of several turns, and a template for a model that has none."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho 😀"}]
    chats = [{"messages": [{"role": "user", "content": f"{i}"}, turns[1], *turns]} for i in range(6)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "own.jinja").write_text(OWN)
    return [chat["messages"] for chat in chats]


def test_a_chat_template_for_a_model_that_has_none(instruct, program, chats, model):
    """The run and its export keep it, and transformers' tokens by it are those that are learned."""
    transformers = pytest.importorskip("transformers")

    given = ("--data=chats.jsonl", "--init-from", "MODEL")
    code, _, err = instruct(*given)
    assert code == 2 and err == (
        f"error: {model} has no chat template, so it cannot converse; give one with --chat-template FILE, or choose "
        "another --template\n"
    )
    given = (*given, "--chat-template=own.jinja")
    code, out, err = instruct(*given)
    assert (code, err) == (0, "") and "(template: chat)" in out and "llmq chat run" in out
    assert "will not learn to stop" not in out
    lm = lq.load("run")
    assert lm.tokenizer.chat_template.source == OWN and lm.generation.eos_token_id == (256,)
    assert lm.chat([{"role": "user", "content": "Hi"}], max_new_tokens=1) is not None

    assert program("convert.to_hf", "run", "run-hf")[0] == 0
    theirs = transformers.AutoTokenizer.from_pretrained("run-hf")
    base = transformers.AutoTokenizer.from_pretrained("run-hf", chat_template="no")
    for messages, conversation in zip(chats, read_conversations("chats.jsonl"), strict=True):
        example = tokenize(render(conversation, "chat", lm.tokenizer.chat_template), lm.tokenizer)
        assert example.tokens.tolist() == theirs.apply_chat_template(messages, return_dict=False)
        assert example.tokens.tolist() == base.apply_chat_template(messages, chat_template=OWN, return_dict=False)
        assert example.learned.sum() == 2 * len("Ho 😀".encode()) + 4  # each with its end and line break

    # Another text is another run, even where the data have no message that shows it.
    assert "run is finished already" in instruct(*given)[1]
    Path("own.jinja").write_text(OWN.replace("({{", "[{{"))
    code, _, err = instruct(*given)
    assert code == 2 and "run holds a run with other options: chat_template_sha256 " in err and "training" not in err


def test_a_chat_template_takes_the_place_of_the_models_own(instruct, chats):
    given = ("--init-from", "CHAT", "--chat-template=own.jinja")
    code, out, err = instruct("--data=chats.jsonl", *given, tiny=PREVIEW)
    assert (code, err) == (0, "") and "Q: Hi\nA: ⟦Ho 😀<|endoftext|>\n⟧" in out and "<|im_start|>" not in out
    # It writes all that has prompts: to give one is to choose it.
    Path("strings.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(4))
    )
    for data in ("strings.jsonl", "ALPACA"):
        code, out, err = instruct("--data", data, *given, tiny=PREVIEW)
        assert (code, err) == (0, "") and "(template: chat)" in out and "\nA: ⟦" in out


def test_a_chat_template_without_an_end(instruct, chats):
    Path("own.jinja").write_text(OWN.replace("{{ eos_token }}", "<|im_end|>"))
    _, out, _ = instruct("--data=chats.jsonl", "--init-from", "MODEL", "--chat-template=own.jinja", tiny=PREVIEW)
    assert (
        "own.jinja ends no answer with a special token of the tokenizer, so that the model will not learn to stop: "
        "write {{ eos_token }} there\n" in out
    )


def test_variables_of_a_chat_template_stay_with_the_run(instruct, chats):
    Path("own.jinja").write_text("{% if brief is defined and brief %}Briefly. {% endif %}" + OWN)
    variables = ("--chat-template-kwargs", '{"brief": true}')
    given = ("--data=chats.jsonl", "--init-from", "MODEL", "--chat-template=own.jinja", *variables)
    code, out, err = instruct(*given, tiny=PREVIEW)
    assert (code, err) == (0, "") and "\nBriefly. Q: " in out
    assert instruct(*given, "--steps=1")[0] == 0
    template = lq.load("run").tokenizer.chat_template
    assert template.render([{"role": "user", "content": "Hi"}]) == "Briefly. Q: Hi\nA: "
    assert template.render([{"role": "user", "content": "Hi"}], brief=False) == "Q: Hi\nA: "
    code, _, err = instruct(*given[:-1], '{"long": true}', tiny=PREVIEW)
    assert code == 2 and err == "error: the chat template reads no variable 'long'; choose from brief\n"
    code, _, err = instruct("--data=chats.jsonl", "--init-from", "MODEL", *variables, tiny=PREVIEW)
    assert code == 2 and "has no chat template, so it cannot converse; give one with --chat-template FILE" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat-template-kwargs=brief"], "--chat-template-kwargs 'brief' is no object in JSON; write"),
        (["--template=alpaca"], "--chat-template has no effect with --template alpaca; leave it out"),
        (["--template=plain"], "--chat-template has no effect with --template plain; leave it out"),
        (["--chat-template=none.jinja"], "none.jinja cannot be read (No such file or directory)"),
        (["--chat-template=bad.jinja"], "bad.jinja: the chat template is not valid Jinja: line 2: "),
    ],
)
def test_chat_templates_are_checked_before_the_model_is_loaded(instruct, chats, options, message):
    Path("bad.jinja").write_text("\n{% for %}")
    given = ("--data=chats.jsonl", "--init-from=nowhere", "--chat-template=own.jinja")
    code, _, err = instruct(*given, *options)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_preview(instruct):
    code, out, err = instruct(*GIVEN, tiny=PREVIEW)
    assert (code, err) == (0, "") and not Path("run").exists()
    assert "what is learned stands between ⟦ and ⟧" in out and "row 1, conversation 1" in out
    for word in ("ab", "bba"):
        if f"Say {word}." in out:
            assert f"### Response:\n⟦{word}<|endoftext|>⟧" in out
    assert out.count("⟦") >= 2


def test_sharegpts_conversations_are_messages(instruct, tmp_path):
    turns = [("human", "user", "Hi"), ("gpt", "assistant", "Ho"), ("human", "user", "a"), ("gpt", "assistant", "b")]
    shared = {"conversations": [{"from": name, "value": text} for name, _, text in turns]}
    chat = {"messages": [{"role": role, "content": text} for _, role, text in turns]}
    shown = []
    for record in (shared, chat):
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        (tmp_path / "b.jsonl").write_text(json.dumps(record).replace("Hi", "Hey"))
        given = ("--data=a.jsonl", "--validation-data=b.jsonl", "--init-from", "CHAT")
        code, out, err = instruct(*given, tiny=PREVIEW)
        assert (code, err) == (0, "") and "⟦Ho<|im_end|>\n⟧<|im_start|>user\na" in out
        shown.append(out)
    assert shown[0] == shown[1]


def marked(*answers):
    """Conversations of which these answers, by their numbers, have weight 0."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    turns += [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for answer in answers:
        turns[2 * answer + 1]["weight"] = 0
    records = [{"messages": [{**turns[0], "content": f"Hi {i}"}, *turns[1:]]} for i in range(4)]
    Path("chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_answers_of_weight_0_are_read_and_not_learned(instruct):
    """A run does not go on with other weights; its samples answer the last message all the same."""
    given = ("--data=chats.jsonl", "--init-from", "CHAT", "--evaluate-every=3", "--steps=3")
    for answers, shown, count in (
        ((0,), "assistant\nHo<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>\n⟧", 3),
        ((1,), "assistant\n⟦Ho<|im_end|>\n⟧<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", 4),
    ):
        marked(*answers)
        code, out, err = instruct(*given, "--preview", tiny=PREVIEW)
        assert (code, err) == (0, "") and shown in out
        assert f"\n{3 * count:,} of " in out and f": {count} of " in out
    code, out, err = instruct(*given)
    assert (code, err) == (0, "") and "\n  a\n  -> " in out
    assert "run is finished already" in instruct(*given)[1]
    marked()
    code, _, err = instruct(*given)
    assert code == 2 and "run holds a run with other options: " in err and "training_sha256" in err
    marked(0, 1)
    code, _, err = instruct(*given, "--out=other")
    assert code == 2 and err.count("\n") == 1 and "has no answer to learn: all that are chosen are marked" in err
    marked(0)
    code, _, err = instruct(*given, "--out=other", "--train-on=all")
    assert code == 2 and err.count("\n") == 1 and "leave out --train-on all, or remove the marks" in err


def test_conversations_that_differ_in_weights_alone_are_one_text(instruct):
    """Which is not learned where it is held out."""
    marked(0)
    shutil.copy("chats.jsonl", "held_out.jsonl")
    marked()
    given = ("--data=chats.jsonl", "--validation-data=held_out.jsonl", "--init-from", "CHAT")
    code, _, err = instruct(*given)
    assert code == 2 and "every conversation is in held_out.jsonl too" in err


def test_preview_on_a_terminal_is_in_colour(instruct, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = instruct(*GIVEN, "--train-on", "all", tiny=PREVIEW)
    assert "in colour" in out and "\x1b[1;32melow is an instruction" in out and "⟦" not in out


def test_what_is_too_long_is_told(instruct, tmp_path):
    rows = [{"prompt": "p" * length, "completion": "c" * length} for length in (2, 2, 3, 12, 30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "qq", "completion": "cc"}))
    given = ("--data", "a.jsonl", "--validation-data", "b.jsonl", "--init-from", "MODEL", "--context", 16)
    _, out, _ = instruct(*given, "--sample-prompt", "pp")
    assert "4 conversations to learn, 1 held out (template: plain)" in out
    told = "longer than the context of 16 tokens: 1 truncated, 1 left out; choose a longer --context for all of them"
    assert f"\nto learn, {told}\n" in out and "held out, longer" not in out
    assert "step 0: validation loss" in out and "\n  pp\n  -> " in out
    _, out, _ = instruct(*given, "--too-long", "drop", "--out", "other", "--sample-every", 0)
    assert "0 truncated, 2 left out" in out
    code, _, err = instruct(*given, "--too-long", "error", "--out", "third")
    assert code == 2 and "a.jsonl: line 4 has 25 tokens and the context 16" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-on", "none"], "--train-on is 'none' and must be response, last, all or numbers of answers"),
        (["--train-on", "1"], "has 1 answer, numbered from 0, and none with the number 1"),
        (["--epochs", 2], "--epochs has no effect beside --steps"),
        (["--validation-fraction", 0], "--validation-fraction is 0.0 and must lie between 0 and 1"),
        (["--split-seed", -1], "--split-seed is -1 and must not be negative"),
        (["--validation-data", "ALPACA", "--split-seed", 1], "--split-seed has no effect beside --validation-data"),
        (["--context", 1], "--context is 1 and must be at least 2"),
        (["--context", 512], "--context 512 exceeds the model's, 320"),
        (
            ["--context", 100],
            "within the context of 100 tokens (the shortest has 148 tokens as the template 'alpaca' writes it)",
        ),
        (["--template", "chat"], "has no chat template, so it cannot converse; give one with --chat-template FILE, or"),
        (["--template", "plain"], "row 1: the template 'plain' is for records with a prompt"),
        (["--validation-data", "ALPACA", "--validation-fraction", 0.2], "--validation-fraction has no effect"),
        (["--sample-prompt", "x" * 400], "--sample-prompt leaves no room for an answer within the model's 320"),
        (["--data", "missing.json"], "there is no file or folder missing.json"),
        (["--lora-rank", 4], "--lora-rank has no effect without --train lora"),
        (["--train", "blocks", "--blocks", 0], "--blocks is 0 and must be at least 1"),
    ],
)
def test_bad_options(instruct, options, message):
    code, _, err = instruct(*GIVEN, *options)
    assert code == 2 and err.count("\n") == 1 and message in err and not Path("run").exists()


def test_layers_that_are_cut_are_in_memory_once(instruct, beside_state):
    config = lq.Llama3Config(vocab_size=257, **SIZES | {"num_hidden_layers": 2})
    lq.save(LanguageModel(config, lq.build(config), lq.init(config), ByteTokenizer()), "deep")
    instruct("--data", "ALPACA", "--init-from", "deep", "--train", "blocks")
    assert len(beside_state) == 1 and beside_state[0] < 0.2


def test_a_run_has_a_folder_and_a_preview_the_options_of_the_run(instruct):
    code, _, err = instruct(*GIVEN, tiny=[])
    assert code == 2 and "missing --out: name a folder for the run" in err
    code, out, err = instruct(*GIVEN, "--sample-prompt=a", "--keep-last=2", "--warmup-steps=2", "--preview")
    assert (code, err) == (0, "") and not Path("run").exists()
    assert "a preview: no model is trained\n" in out and "what is learned stands between" in out


def test_a_misspelt_field_is_found_before_the_model_is_loaded(instruct, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "x", "anwser": "y"}\n')
    code, _, err = instruct("--data", "a.jsonl", "--init-from", "nowhere")
    assert code == 2 and "a.jsonl: line 1 is no conversation" in err


def test_advice_on_what_is_too_long_at_the_models_own_context(instruct, tmp_path):
    rows = [{"prompt": str(i), "completion": "c" * (400 if i in (2, 3) else 4)} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[3:])))
    _, out, _ = instruct("--data=a.jsonl", "--validation-data=b.jsonl", "--init-from", "MODEL", tiny=PREVIEW)
    told = "longer than the context of 320 tokens: 1 truncated, 0 left out; --too-long says what becomes of them"
    assert f"\nto learn, {told}\nheld out, {told}\n" in out


def test_nothing_that_is_held_out_is_learned(instruct, tmp_path):
    """A conversation that comes twice is in one part alone."""
    row = {"prompt": "", "completion": ""}
    rows = [{**row, "prompt": str(i % 10), "completion": "c" * (i % 10 + 1)} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("--data=a.jsonl", "--init-from", "MODEL")
    code, out, err = instruct(*given, tiny=PREVIEW)
    assert (code, err) == (0, "") and "not learned, since they are held out too: 1 conversation\n" in out
    assert "18 conversations to learn, 1 held out" in out
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    _, out, _ = instruct(*given, "--validation-data=b.jsonl", tiny=PREVIEW)
    assert (
        "not learned, since they are held out too: 4 conversations\n" in out
        and "16 conversations to learn, 2 hel" in out
    )
    code, _, err = instruct(*given, "--validation-data=a.jsonl", tiny=PREVIEW)
    assert code == 2 and "a.jsonl: every conversation is in a.jsonl too; give others to learn" in err


def test_a_folder_of_data(instruct, at_first_step, tmp_path, alpaca):
    """All its files are learned as one that holds them all; a run does not go on when one has changed."""
    (tmp_path / "data").mkdir()
    rows = json.loads(alpaca.read_text())
    (tmp_path / "data" / "a.json").write_text(json.dumps(rows[:7]))
    (tmp_path / "data" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[7:]))
    given = ("--init-from", "MODEL")
    assert instruct("--data", "ALPACA", "--out=file", *given)[2] == at_first_step
    _, out, err = instruct("--data=data", *given)
    assert err == at_first_step and "11 conversations to learn, 1 held out" in out
    file, folder = (json.loads(Path(run, "config.json").read_text()) for run in ("file", "run"))
    for name in ("training_sha256", "validation_sha256"):
        assert file[name] == folder[name]
    (tmp_path / "data" / "c.jsonl").write_text(json.dumps(rows[0]))
    Path("run/metrics.jsonl").write_text('{"step": 1}\n')  # with no step on record it would begin again
    code, _, err = instruct("--data=data", *given)
    assert code == 2 and "run holds a run with other options: training_sha256" in err


@pytest.mark.exhaustive
def test_process_0_says_for_all_whether_a_run_is_new(instruct, at_first_step, monkeypatch):
    """Each would look at its own machine's disk, and the first sample is one that all must compute together."""
    from llmq_jax.training import processes

    monkeypatch.setattr(processes, "of_first", lambda action: False)  # process 0 has a run there
    _, out, err = instruct(*GIVEN, "--sample-prompt", "a")
    assert err == at_first_step and "\n  -> " not in out


def test_the_split_follows_its_seed_alone(instruct, at_first_step):
    def digest(*options):
        assert instruct(*GIVEN, *options)[2] == at_first_step
        config = json.loads(Path("run/config.json").read_text())
        shutil.rmtree("run")
        return config["validation_sha256"]

    first = digest()
    assert digest("--seed=4") == first == digest("--split-seed=0") != digest("--split-seed=1")


def test_the_end_of_answers_is_that_of_whole_ones(chat_model):
    tokenizer = lq.load(chat_model).tokenizer
    start, end = (tokenizer.encode(token, allow_special=True)[0] for token in ("<|im_start|>", "<|im_end|>"))

    def example(tokens, learned, cut=False):
        return Example(np.array(tokens, np.int32), np.array(learned, bool), "a", cut)

    blank, opened = example([65, 32, 10], [False, True, True], cut=True), example([65, start], [True, True], cut=True)
    whole = example([65, 66, end, 10], [False, True, True, True])
    for examples, expected in (([blank, opened], None), ([blank, opened, whole], end), ([], None)):
        assert end_of_answer(examples, tokenizer) == expected
    assert end_of_answer([example([65, 10], [False, True])], tokenizer) is None


@pytest.mark.parametrize(("cut", "train_on"), [(24, "response"), (29, "all")])
def test_chats_that_are_cut_anywhere(instruct, tmp_path, cut, train_on):
    """Behind white space, or behind what begins a message: neither is an end of answers."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chats = [
        {
            "messages": [
                *turns[:1],
                {"role": "assistant", "content": f"    {i}"},
                {"role": "user", "content": "a"},
                *turns[1:],
            ]
        }
        for i in range(4)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    given = ("--data=chats.jsonl", "--init-from", "CHAT", "--sample-every=0", f"--context={cut}", "--steps=1")
    code, _, err = instruct(*given, "--train-on", train_on)
    assert (code, err) == (0, "")
    lm = lq.load("run")
    first = render(read_conversations("chats.jsonl")[0], "chat", lm.tokenizer.chat_template)
    text = lm.tokenizer.decode(lm.tokenizer.encode(first.text, allow_special=True)[:cut])
    assert text.endswith("assistant\n   " if train_on == "response" else "<|im_start|>")
    assert lm.generation.eos_token_id == (256,)


SMALL = {"max_position_embeddings": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = {
    "gpt2": lq.GPT2Config(vocab_size=257, **SMALL),
    "mixtral": lq.MixtralConfig(
        vocab_size=257, **SMALL, num_key_value_heads=1, intermediate_size=24, num_local_experts=4
    ),
}


def test_without_evaluations_everything_is_learned(instruct):
    code, out, err = instruct(*GIVEN, "--evaluate-every=0", "--steps=1", "--sample-every=0")
    assert (code, err) == (0, "") and ", 0 held out" in out and "validation" not in out
    config = json.loads(Path("run/config.json").read_text())
    assert "training_sha256" in config and "validation_sha256" not in config


def test_a_base_in_bfloat16_with_adapters_in_float32(instruct):
    options = [option for option in TINY if "--train" not in option]
    code, out, err = instruct(*GIVEN, "--sample-every=0", "--steps=2", "--base-dtype=bfloat16", tiny=options)
    assert (code, err) == (0, "") and "(lora)" in out
    trained = lq.load("run").variables
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained["params"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained["lora"])} == {"float32"}


def test_what_trains_whole_beside_a_base_in_bfloat16_is_not_rounded(instruct, model):
    """Nor before its first step, which here changes nothing."""
    options = [option for option in TINY if "--train" not in option and "rate" not in option]
    options += ["--steps=1", "--learning-rate=1e-30", "--base-dtype=bfloat16", "--lora-whole=embed_tokens"]
    code, out, err = instruct(*GIVEN, "--sample-every=0", tiny=options)
    assert (code, err) == (0, "") and "(lora, token_embedding)" in out
    before, after = lq.load(model).params, lq.load("run").params
    types = {name: {leaf.dtype.name for leaf in jax.tree.leaves(tree)} for name, tree in after.items()}
    assert types == {name: {"float32" if name == "token_embedding" else "bfloat16"} for name in types}
    np.testing.assert_array_equal(after["token_embedding"]["embedding"], before["token_embedding"]["embedding"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures(instruct, architecture, tmp_path):
    """By what is the default: adapters, on experts too."""
    config = ARCHITECTURES[architecture]
    lq.save(LanguageModel(config, lq.build(config), lq.init(config, seed=1), ByteTokenizer()), tmp_path / "other")
    tiny = [option for option in TINY if "--train" not in option]
    code, out, err = instruct("--data", "ALPACA", "--init-from=other", "--sample-every=0", "--steps=3", tiny=tiny)
    assert (code, err) == (0, "") and "(lora)" in out
    trained = lq.load("run")
    assert "lora" in trained.variables and trained.config.model_type == architecture
    assert losses()[0] > 4 and all(np.isfinite(losses()))


def test_the_help_names_what_is_needed(instruct):
    code, _, err = instruct("--data", "ALPACA")
    assert code == 2 and "missing --init-from" in err


def test_a_folder_with_splits(instruct, at_first_step, alpaca):
    """Is the files of each, by which a run goes on as well; the test's are not learned."""
    rows = json.loads(Path(alpaca).read_text())
    Path("data").mkdir()
    parts = {"train": rows[:8], "validation": rows[8:10], "test": rows[10:]}
    for name, part in parts.items():
        Path("data", f"{name}.json").write_text(json.dumps(part))
    given = ("--init-from", "MODEL")
    _, out, err = instruct("--data=data", *given)
    assert err == at_first_step and "8 conversations to learn, 2 held out" in out
    assert "data: train.json to learn, validation.json held out, test.json left out\n" in out
    _, _, err = instruct("--data=data/train.json", "--validation-data=data/validation.json", *given)
    assert err == at_first_step
    _, out, err = instruct("--data=data", *given, "--evaluate-every", 0, "--out=other")
    assert err == at_first_step and "8 conversations to learn, 0 held out" in out
    code, _, err = instruct("--data=data", *given, "--validation-data=data/test.json")
    assert code == 2 and "error: data has validation files of its own, validation.json: leave --validation-data" in err
    # A run that began when all files were one is another one.
    Path("data", "test.json").rename("data/train-2.json")
    Path("run/metrics.jsonl").write_text('{"step": 1}\n')
    code, _, err = instruct("--data=data", *given)
    assert code == 2 and "run holds a run with other options: training_sha256 " in err and err.count("\n") == 1
