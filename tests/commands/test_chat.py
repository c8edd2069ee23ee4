"""Conversations: `lm.chat`, and `llmq chat` from a file, at a terminal, and interrupted.

The model is one of random weights, whose replies are noise, but always the same noise.
"""

import dataclasses
import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest

import llmq_jax as lq
from llmq_jax import generation
from llmq_jax.commands.chat import Conversation, Options
from llmq_jax.data import as_chat_template
from llmq_jax.generation import request

SAMPLER = lq.Sampler(temperature=0.8, top_p=0.95)  # the default
SYSTEM, USER, ASSISTANT, END = 257, 258, 259, 260


def user(text):
    return {"role": "user", "content": text}


def replies(lm, questions, new_tokens=8, seed=0, system=None):
    """What the library replies to questions in one conversation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, question in enumerate(questions):
        messages.append(user(question))
        reply = lm.chat(messages, max_new_tokens=new_tokens, sampler=SAMPLER, seed=generation.row_seed(seed, number))
        messages.append({"role": "assistant", "content": reply})
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.fixture
def chat(llmq, chat_folder, monkeypatch):
    """`chat(lines, *options)` -> (exit code, stdout, stderr) of `llmq chat` with these lines piped in."""

    def call(lines, *options):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        return llmq("chat", chat_folder, "--max-new-tokens", 8, *options)

    return call


# The library


def test_the_template_writes_the_prompt(chat_model):
    messages = [{"role": "system", "content": "be"}, user("a"), {"role": "assistant", "content": "b"}, user("é")]
    expected = [SYSTEM, *b"be", END, USER, *b"a", END, ASSISTANT, *b"b", END, USER, *"é".encode(), END, ASSISTANT]
    assert chat_model.chat_tokens(messages) == expected


def test_a_reply_is_what_is_generated_after_the_prompt(chat_model):
    tokens = [USER, *b"hi", END, ASSISTANT]
    for options in ({"seed": 3}, {"seed": 4, "stop": ["e"]}):
        options = {"max_new_tokens": 8, "sampler": SAMPLER, **options}
        expected = lq.generate(chat_model, [tokens], **options).text[0]
        assert chat_model.chat([user("hi")], **options) == expected


def test_a_reply_has_by_default_as_many_tokens_as_there_is_room_for(chat_model):
    room = chat_model.config.max_position_embeddings - len([USER, *b"hi", END, ASSISTANT])
    options = {"sampler": SAMPLER, "stop": ()}
    reply = chat_model.chat([user("hi")], **options)
    assert reply == chat_model.chat([user("hi")], max_new_tokens=room, **options)
    assert reply != chat_model.chat([user("hi")], max_new_tokens=room - 1, **options)


def test_messages_that_fill_the_context_are_refused_by_default(chat_model):
    context = chat_model.config.max_position_embeddings
    with pytest.raises(lq.BadInput, match=f"messages have {context + 1} tokens, which leave no room in the model's"):
        chat_model.chat([user("a" * (context - 2))])


def test_what_cannot_be_said_is_refused(chat_model, tiny_model):
    for lm, messages, fault in (
        (tiny_model, [user("hi")], "this model has no chat template, so it cannot converse; use generate with a plain"),
        (tiny_model.replace(tokenizer=None), [user("hi")], "this model holds no tokenizer"),
        (chat_model, [user("x" * 90)], "93 tokens, which with 8 new ones exceed the model's context of 96"),
        (chat_model, [{"role": "tool", "content": ""}], "no tools"),
        (
            chat_model,
            [user("hi"), {"role": "sytem", "content": "be"}],
            r"messages\[1\] has the role 'sytem': choose from system, developer, user, assistant, tool",
        ),
        (chat_model, [], "messages are empty"),
    ):
        with pytest.raises(lq.BadInput, match=fault):
            lm.chat(messages, max_new_tokens=8)


def test_what_a_template_leaves_out_is_refused(chat_folder, llmq, piped, tmp_path):
    """Not the assistant's: templates take out its former thoughts."""
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages if message.role == 'user' %}<|user|>{{ message.content }}{% endfor %}<|assistant|>"
    )
    lm, said = lq.load(folder), [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    assert lm.chat_tokens(said) == [USER, *b"a", USER, *b"c", ASSISTANT]
    fault = "the chat template leaves out messages[0], of the system: use another template"
    with pytest.raises(lq.BadInput, match=re.escape(fault)):
        lm.chat([{"role": "system", "content": "be"}, *said])
    piped("hi\n")
    assert llmq("chat", folder, "--system", "be") == (2, "", f"error: {fault}\n")


# The command, with its lines piped in


def test_every_line_gets_a_reply_that_knows_those_before(chat, chat_model):
    first, second = replies(chat_model, ["one", " two"], seed=7)
    assert chat("one\n\n two\n", "--seed", 7) == (0, f"{first}\n{second}\n", "")
    assert second != chat_model.chat([user(" two")], max_new_tokens=8, sampler=SAMPLER, seed=8)


def test_lines_of_json_are_told_once_to_be_messages(chat):
    code, _, err = chat('{"prompt": "a"}\n{"prompt": "b"}\n')
    note = "note: these lines of JSON are messages as they stand; for an answer each, llmq generate --prompt-file FILE"
    assert (code, err) == (0, f"{note} --jsonl --chat\n")


def test_what_was_read_is_not_read_again(chat, chat_model, monkeypatch):
    given, prefill = [], request.prefill

    def counting(model, variables, prompts, lengths, *args, **kwargs):
        given.append(int(lengths[0]))
        return prefill(model, variables, prompts, lengths, *args, **kwargs)

    monkeypatch.setattr(request, "prefill", counting)
    chat("a\nb\n")
    said = [user("a"), {"role": "assistant", "content": replies(chat_model, ["a"])[0]}, user("b")]
    # The reply may be bytes of no character, which the second prompt spells in another way.
    assert given[0] == 4 and given[1] <= len(chat_model.chat_tokens(said)) - 4


def test_variables_of_the_chat_template(llmq, chat_model, tmp_path, monkeypatch):
    template = chat_model.tokenizer.chat_template.source + "{%- if brief -%}in short{%- endif -%}"
    lm = chat_model.replace(tokenizer=chat_model.tokenizer.with_chat_template(template))
    lq.save_hf(lm, tmp_path / "model")

    def call(variables):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n")))
        given = ("--max-new-tokens", 8, "--chat-template-kwargs", variables)
        return llmq("chat", tmp_path / "model", *given)

    prompt = [USER, *b"one", END, ASSISTANT, *b"in short"]
    expected = lq.generate(chat_model, [prompt], max_new_tokens=8, sampler=SAMPLER, seed=0).text[0]
    assert call('{"brief": true}') == (0, f"{expected}\n", "")
    asked = ("--prompt", "one", "--chat", "--max-new-tokens", 8, "--chat-template-kwargs", '{"brief": true}')
    assert llmq("generate", tmp_path / "model", *asked) == (0, f"{expected}\n", "")
    (reply,) = replies(chat_model, ["one"])
    assert call('{"brief": false}') == (0, f"{reply}\n", "") and reply != expected
    assert call('{"breif": true}') == (
        *(2, ""),
        "error: the chat template reads no variable 'breif'; did you mean brief?\n",
    )
    code, _, err = call("brief=true")
    assert code == 2 and err.startswith("error: --chat-template-kwargs 'brief=true' is no object in JSON; write")


def test_options_reach_the_model(chat, chat_model):
    (reply,) = replies(chat_model, ["one"], system="be good")
    assert chat("one\n", "--system", "be good") == (0, f"{reply}\n", "")
    assert chat("one\n", "--system", "be good", "--stop", reply[3]) == (0, f"{reply[: reply.index(reply[3])]}\n", "")


def test_commands(chat, chat_model):
    code, out, err = chat("one\n/reset\n/help\none\n /quit \nnever read\n", "--system", "be")
    messages = [{"role": "system", "content": "be"}, user("one")]
    expected = [
        chat_model.chat(messages, max_new_tokens=8, sampler=SAMPLER, seed=generation.row_seed(0, number))
        for number in (0, 1)
    ]
    assert (code, out) == (0, "".join(f"{reply}\n" for reply in expected))
    assert [line.split()[0] for line in err.splitlines()] == ["/help", "/reset", "/quit"]


def test_what_is_piped_may_begin_with_a_slash(chat, chat_model):
    lines = ["/usr/bin is what?", "/helm"]
    assert chat("\n".join(lines)) == (0, "".join(f"{reply}\n" for reply in replies(chat_model, lines)), "")


def test_the_oldest_turns_are_forgotten_with_a_note(chat):
    """Whatever the replies, of at most 24 bytes: two of these messages fit the context, three do not."""
    code, out, err = chat(("x" * 26 + "\n") * 3, "--system", "be")
    assert code == 0 and out.count("\n") >= 3
    assert err == "note: the conversation outgrew the context; its oldest turn is forgotten\n"


def test_a_message_that_does_not_fit_is_dropped(chat, chat_model):
    expected = replies(chat_model, ["one", "two"])
    code, out, err = chat(f"one\n{'x' * 90}\ntwo\n")
    assert (code, out) == (1, "".join(f"{reply}\n" for reply in expected))
    assert err == (
        "error: the message takes 93 tokens, which with a reply of 8 exceed the model's context of 96; "
        "say less, or lower --max-new-tokens\n"
    )


def test_just_as_much_is_forgotten_as_must_be(chat_model, capsys):
    seen = []

    class Recording(lq.LanguageModel):
        def chat_tokens(self, messages):
            seen.append("".join(message["content"] for message in messages))
            return super().chat_tokens(messages)

    fields = {field.name: getattr(chat_model, field.name) for field in dataclasses.fields(chat_model)}
    conversation = Conversation(Recording(**fields), Options(model="", system="S"), {"max_new_tokens": 40})
    for letter in "abcd":
        conversation.ask(letter * 6)
        conversation.add(letter * 6, letter.upper() * 3)
    # 56 tokens are left to the prompt: 3 of the system text, 9 of the question, 13 of each earlier turn.
    assert seen[-1] == "S" + "aaaaaaAAA" + "bbbbbbBBB" + "ccccccCCC" + "dddddd"
    assert capsys.readouterr().err == ""
    conversation.ask("eeeeee")
    assert seen[-1] == "S" + "bbbbbbBBB" + "ccccccCCC" + "ddddddDDD" + "eeeeee"
    conversation.ask("f" * 40)
    assert seen[-1] == "S" + "f" * 40 and conversation.turns == []
    assert capsys.readouterr().err.splitlines() == [
        "note: the conversation outgrew the context; its oldest turn is forgotten",
        "note: the conversation outgrew the context; its oldest 3 turns are forgotten",
    ]


def test_a_template_for_one_message_is_asked_each_alone(llmq, chat_model, tmp_path, monkeypatch):
    tokenizer = chat_model.tokenizer.with_chat_template(as_chat_template("plain", chat_model.tokenizer))
    lm = chat_model.replace(tokenizer=tokenizer)
    lq.save(lm, tmp_path / "model")
    lines = ["one", "two", "three"]
    seeds = [generation.row_seed(0, number) for number in range(3)]
    expected = [
        lm.chat([user(line)], max_new_tokens=8, sampler=SAMPLER, seed=seed)
        for seed, line in zip(seeds, lines, strict=True)
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    code, out, err = llmq("chat", tmp_path / "model", "--max-new-tokens", 8)
    assert (code, out) == (0, "".join(f"{reply}\n" for reply in expected))
    assert err == "note: the model's chat template takes no further turn; from now on earlier ones are forgotten\n"
    code, out, err = llmq("chat", tmp_path / "model", "--system", "be")
    assert (code, out) == (2, "") and "the chat template refused these messages: the model answers one mes" in err


def test_a_draft_model_that_reads_less_has_the_say(chat_model):
    fewer = dataclasses.replace(chat_model.config, max_position_embeddings=64)
    short = lq.with_config(chat_model, fewer, fresh=["position_embedding/embedding"])
    asked = {"draft": None, "max_new_tokens": 40}
    rooms = [Conversation(chat_model, Options(model=""), {**asked, "draft": d})._room() for d in (None, 3, short)]
    assert rooms == [96 - 40, 96 - 40, 64 - 40]


BAD = {
    "no model there": (["nowhere/at-all"], "nowhere/at-all"),
    "no chat template": (["PLAIN"], "has no chat template, so it cannot converse; use generate with a plain prompt"),
    "no tokenizer": (["MUTE"], "holds no tokenizer"),
    "idle seed": (["MODEL", "--temperature", "0", "--seed", "0"], "--seed has no effect at temperature 0"),
    "seed": (["MODEL", "--seed", "-1"], "--seed -1 must lie between 0 and 4294967295"),
    "top-p": (["MODEL", "--top-p", "2"], "--top-p is 2.0 and must be between 0 and 1"),
    "no new token": (["MODEL", "--max-new-tokens", "0"], "--max-new-tokens is 0 and must be at least 1"),
    "no room": (["MODEL", "--max-new-tokens", "96"], "with a reply of 96 exceed the model's context of 96"),
    "long system text": (["MODEL", "--system", "x" * 50], "the system text and the message take 56 tokens"),
    "empty stop": (["MODEL", "--stop", ""], "stop string is empty"),
    "not UTF-8": (["MODEL"], "standard input is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(llmq, chat_folder, model_folder, chat_model, tmp_path, monkeypatch, case):
    arguments, message = BAD[case]
    if case == "no tokenizer":
        lq.save_hf(chat_model.replace(tokenizer=None), tmp_path / "mute")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    folders = {"MODEL": chat_folder, "PLAIN": model_folder, "MUTE": tmp_path / "mute"}
    code, out, err = llmq("chat", *(str(folders.get(argument, argument)) for argument in arguments))
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: ") and message in err


# At a terminal


class Terminal(io.StringIO):
    """Keyboard and screen. What is typed is a list of lines, with "^C" and "^D"; "^C" is pressed, too, when the screen
    has shown `stop_after` pieces of a reply."""

    def __init__(self, typed, stop_after=None):
        super().__init__()
        self.typed = iter(typed)
        self.pieces_left = stop_after

    def isatty(self):
        return True

    def reconfigure(self, **_):
        pass

    def readline(self, *_):
        line = next(self.typed)
        if line == "^C":
            signal.raise_signal(signal.SIGINT)
        return "" if line == "^D" else line + "\n"

    def write(self, text):
        super().write(text)
        if self.pieces_left is not None and text not in ("", "\n", "> "):
            self.pieces_left -= 1
            if self.pieces_left == 0:
                signal.raise_signal(signal.SIGINT)
        return len(text)


def test_ctrl_c_stops_a_reply_and_not_the_conversation(llmq, chat_folder, chat_model, monkeypatch):
    whole = list(lq.stream(chat_model, chat_model.chat_tokens([user("one")]), max_new_tokens=8, sampler=SAMPLER))
    said = "".join(whole[:3])
    messages = [user("one"), {"role": "assistant", "content": said}, user("two")]
    second = chat_model.chat(messages, max_new_tokens=8, sampler=SAMPLER, seed=generation.row_seed(0, 1))
    terminal = Terminal(["one", "two", "^D"], stop_after=3)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    assert llmq("chat", chat_folder, "--max-new-tokens", 8)[0] == 0
    assert terminal.getvalue() == f"> {said}\n> {second}\n> \n"


def test_ctrl_c_before_a_reply_takes_the_message_back(llmq, chat_folder, chat_model, monkeypatch):
    """The conversation, which the template may want to alternate, goes on as if it had not been sent."""
    stream, asked = generation.stream, []

    def interrupted_once(lm, tokens, **options):
        asked.append(tokens)
        if len(asked) == 2:  # `main` asks once to check its options
            return map(signal.raise_signal, [signal.SIGINT])
        return stream(lm, tokens, **options)

    monkeypatch.setattr(generation, "stream", interrupted_once)
    terminal = Terminal(["one", "two", "^D"])
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    assert llmq("chat", chat_folder, "--max-new-tokens", 8)[0] == 0
    assert asked[2] == chat_model.chat_tokens([user("two")])
    assert terminal.getvalue() == f"> \n> {replies(chat_model, ['two'])[0]}\n> \n"


def test_a_misspelt_command_at_a_terminal(llmq, chat_folder, monkeypatch):
    terminal = Terminal(["/helm", "/no such", "^D"])
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    code, _, err = llmq("chat", chat_folder)
    assert (code, err.splitlines()) == (
        0,
        ["unknown command /helm: did you mean /help?", "unknown command /no such: choose from /help, /reset, /quit"],
    )


def test_ctrl_c_at_the_prompt_says_how_to_leave(llmq, chat_folder, monkeypatch):
    terminal = Terminal(["^C", "/quit"])
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    code, _, err = llmq("chat", chat_folder)
    assert (code, terminal.getvalue(), err) == (0, "> > ", "\nto leave: /quit or Ctrl-D\n")


def test_ctrl_c_ends_what_is_piped(llmq, chat_folder, monkeypatch):
    piped = Terminal(["one", "two", "^D"], stop_after=3)
    piped.isatty = lambda: False
    monkeypatch.setattr("sys.stdin", piped)
    monkeypatch.setattr("sys.stdout", piped)
    assert llmq("chat", chat_folder, "--max-new-tokens", 8)[0] == 130


def test_at_a_real_terminal(chat_folder):
    """In a process of its own, whose keyboard and screen is a pseudo-terminal: keys become signals there."""
    keyboard, screen = pty.openpty()
    program = (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "import sys; from llmq_jax import commands; commands.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "chat", str(chat_folder), "--max-new-tokens", "48"],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(screen)
    shown = b""

    def wait_for(text, pressing=b""):
        nonlocal shown
        patience = 30
        while text not in shown:
            if select.select([keyboard], [], [], 2)[0]:
                shown += os.read(keyboard, 4096)  # raises where the process has ended
                continue
            # A signal that comes just before Python waits for a key is noticed with the next one.
            patience -= 1
            assert patience, shown
            os.write(keyboard, pressing)
        before, _, shown = shown.partition(text)
        return before

    try:
        assert b"LanguageModel(gpt2, " in wait_for(b"> ")
        os.write(keyboard, b"half a line\x03")
        wait_for(b"to leave: /quit or Ctrl-D", pressing=b"\x03")
        wait_for(b"> ")
        os.write(keyboard, b"hello\n")
        wait_for(b"hello\r\n")
        os.write(keyboard, b"\x03")  # before the reply, in its midst, or after it: then it may throw away the prompt
        wait_for(b"\r\n> ", pressing=b"\n")
        os.write(keyboard, b"/help\n")
        wait_for(b"/reset  forget")
        wait_for(b"\r\n> ")
        os.write(keyboard, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(keyboard)
