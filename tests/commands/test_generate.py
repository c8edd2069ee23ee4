import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import jax
import pytest

import llmq_jax as lq
from llmq_jax.atomic_files import lock_file
from llmq_jax.commands.drawing import DrawingOptions
from llmq_jax.commands.kept_lines import kept_lines
from llmq_jax.errors import BadInput
from llmq_jax.generation.sampling import DEFAULT
from tests.byte_fallback import one_word_model

TAIL = "\n"
SAMPLER = lq.Sampler(temperature=0.8, top_p=0.95)  # the default


def test_greedy_text_is_that_of_the_library(llmq, model_folder, tiny_model):
    code, out, err = llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 12, "--temperature", 0)
    expected = lq.generate(tiny_model, "ab", max_new_tokens=12, sampler=lq.Sampler(temperature=0.0)).text[0]
    assert (code, out, err) == (0, "ab" + expected + TAIL, "")


def test_sampling_options_reach_the_sampler(llmq, model_folder, tiny_model):
    options = ["--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--seed", 7, "--stop", "e"]
    options += ["--repetition-penalty", 1.2]
    _, out, _ = llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 20, *options)
    sampler = lq.Sampler(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    expected = lq.generate(tiny_model, "ab", max_new_tokens=20, sampler=sampler, seed=7, stop=["e"]).text[0]
    assert out == "ab" + expected + TAIL
    others = [[*options, "--seed", 8], [*options, "--top-k", 1]]
    assert all(llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 20, *o)[1] != out for o in others)


def test_a_penalty_of_the_file_is_named_until_one_is_given(llmq, tiny_model, tmp_path):
    generation = tiny_model.generation.replace(other={"repetition_penalty": 1.3})
    folder = lq.save_hf(tiny_model.replace(generation=generation), tmp_path / "model")
    command = ["generate", folder, "--prompt", "ab", "--max-new-tokens", 12, "--temperature", 0]
    with pytest.warns(UserWarning) as caught:
        plain = llmq(*command)
    advice = "asks for repetition_penalty=1.3, which is not applied; give --repetition-penalty 1.3"
    assert [str(warning.message) for warning in caught] == [f"{folder}: its generation config {advice}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llmq(*command, "--repetition-penalty", 1) == plain
        code, out, _ = llmq(*command, "--repetition-penalty", 3)
    assert code == 0 and out != plain[1]
    code, _, err = llmq(*command, "--repetition-penalty", 0)
    assert (code, err) == (2, "error: --repetition-penalty is 0.0 and must be positive; 1 changes nothing\n")


def test_a_draft_changes_no_greedy_text(llmq, model_folder, tiny_model):
    plain = llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 20, "--temperature", 0)
    options = ["--max-new-tokens", 20, "--temperature", 0, "--draft", model_folder, "--draft-tokens", 3]
    assert llmq("generate", model_folder, "--prompt", "ab", *options) == plain


def test_without_a_length_it_fills_the_context(llmq, model_folder, tiny_model):
    code, out, _ = llmq("generate", model_folder, "--prompt", "x" * 30, "--temperature", 0)
    expected = lq.generate(tiny_model, "x" * 30, max_new_tokens=2, sampler=lq.Sampler(temperature=0.0)).text[0]
    assert (code, out) == (0, "x" * 30 + expected + TAIL)


def test_without_a_length_it_fills_the_draft_s_context(llmq, model_folder, tiny_model, tmp_path):
    config = dataclasses.replace(tiny_model.config, max_position_embeddings=16)
    lq.save_hf(tiny_model.replace(config=config, variables=lq.init(config)), tmp_path / "draft")
    command = ["generate", model_folder, "--prompt-file", tmp_path / "prompts.jsonl", "--draft", tmp_path / "draft"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    code, out, err = llmq(*command)
    assert (code, json.loads(out)["tokens"], err) == (0, 14, "")
    code, _, err = llmq(*command, "--max-new-tokens", 15)
    assert (
        code == 2 and "line 1: the prompt has 2 tokens, which with --max-new-tokens 15 exceed the draft's cont" in err
    )


def test_a_stop_text_may_be_a_line_break(model_folder):
    r"""Which a shell leaves as the two characters of \n: they stand in no text, and nothing would stop."""
    _, drawing = DrawingOptions(model=str(model_folder), stop=(r"\n\n", r"a\tb", r"\\nabla", "e")).load()
    assert drawing["stop"] == ["\n\n", "a\tb", r"\nabla", "e"]


def test_prompt_from_standard_input(llmq, model_folder, piped):
    given = llmq("generate", model_folder, "--prompt", "one\ntwo", "--max-new-tokens", 4)
    piped("one\ntwo\n")
    assert llmq("generate", model_folder, "--prompt", "-", "--max-new-tokens", 4) == given


@pytest.mark.parametrize(
    ("content", "prompt"),
    [("ö", "ö"), ("a\nö\n", "a\nö"), ("ö\n\n", "ö\n"), ("ö\r\n", "ö"), ("\ufeffa\r\nö\r\n", "a\r\nö")],
)
def test_prompt_from_a_file(llmq, model_folder, tmp_path, piped, content, prompt):
    """Whatever its name ends in; but for the last, its line breaks are part of the prompt."""
    given = llmq("generate", model_folder, "--prompt", prompt, "--max-new-tokens", 4)
    path = tmp_path / "prompt.json"
    path.write_bytes(content.encode())
    assert llmq("generate", model_folder, "--prompt-file", path, "--max-new-tokens", 4) == given
    piped(content)
    assert llmq("generate", model_folder, "--prompt-file", "-", "--max-new-tokens", 4) == given


@pytest.mark.parametrize("arguments", [["generate", "--prompt", "-"], ["generate", "--prompt-file", "-"], ["chat"]])
def test_standard_input_must_be_utf8_in_any_locale(chat_folder, arguments):
    """Under the locale C, Python lets any byte through as half a surrogate pair."""
    program = [sys.executable, "-c", "from llmq_jax import commands; commands.main()"]
    environment = {**os.environ, "LC_ALL": "C"}
    verb, *options = arguments
    command = [*program, verb, str(chat_folder), *options]
    ended = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, env=environment)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert re.match(rb"error: standard input.* is not UTF-8.*: convert it to UTF-8(, or unpack it)?\n\Z", ended.stderr)


def test_chat_asks_for_the_reply(llmq, chat_folder, chat_model):
    code, out, err = llmq("generate", chat_folder, "--prompt", "hi", "--chat", "--max-new-tokens", 8, "--seed", 2)
    reply = chat_model.chat([{"role": "user", "content": "hi"}], max_new_tokens=8, sampler=SAMPLER, seed=2)
    assert (code, out, err) == (0, reply + TAIL, "")
    _, plain, _ = llmq("generate", chat_folder, "--prompt", "hi", "--max-new-tokens", 8, "--seed", 2)
    assert plain == "hi" + lq.generate(chat_model, "hi", max_new_tokens=8, sampler=SAMPLER, seed=2).text[0] + TAIL


@pytest.mark.parametrize(("given", "wanted"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_on_a_cpu_weights_are_float32_unless_told_otherwise(tiny_model, tmp_path, given, wanted):
    lq.save_hf(tiny_model, tmp_path / "half", dtype="bfloat16")
    lm, _ = DrawingOptions(model=str(tmp_path / "half"), dtype=given).load()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {wanted}


def test_the_default_sampler_is_that_of_the_library(model_folder):
    def sampler(**options):
        return DrawingOptions(model=str(model_folder), **options).load()[1]["sampler"]

    assert sampler() == DEFAULT == SAMPLER
    assert sampler(temperature=0.0) == lq.Sampler(temperature=0.0)
    assert sampler(top_p=1.0) == lq.Sampler(temperature=0.8)


BAD = {
    "no prompt": (["MODEL"], "there is no prompt: give either --prompt TEXT or --prompt-file FILE"),
    "two prompts": (["MODEL", "--prompt", "x", "--prompt-file", "-"], "two prompts were given: give either --prompt"),
    "nanoGPT's run": (
        ["--out_dir=MODEL", "--prompt", "x"],
        "unknown option --out-dir: write MODEL without an option's",
    ),
    "no prompt file": (["MODEL", "--prompt-file", "nothing.txt"], "nothing.txt cannot be read"),
    "batch of one": (["MODEL", "--prompt", "x", "--batch-size", "8"], "--batch-size has no effect without a .jsonl"),
    "variables for a text": (
        ["MODEL", "--prompt", "x", "--chat-template-kwargs", '{"brief": true}'],
        "--chat-template-kwargs has no effect without --chat; leave it out",
    ),
    "out for one": (["MODEL", "--prompt-file", "-", "--out", "o"], "--out has no effect without a .jsonl file"),
    "no chat template": (["MODEL", "--prompt", "x", "--chat"], "has no chat template, so it cannot converse"),
    "seed": (["MODEL", "--prompt", "x", "--seed", "4294967296"], "--seed 4294967296 must lie between 0 and 4294967295"),
    "no model there": (["nowhere/at-all", "--prompt", "a"], "nowhere/at-all"),
    "past the context": (
        ["MODEL", "--prompt", "x" * 40],
        "error: the prompt has 40 tokens, which leave no room in the model's context of 32",
    ),
    "too many new tokens": (
        ["MODEL", "--prompt", "x", "--max-new-tokens", "33"],
        "error: the prompt has 1 token, which with --max-new-tokens 33 exceed the model's context of 32; shorten it",
    ),
    "idle jsonl": (["MODEL", "--prompt", "x", "--jsonl"], "--jsonl reads the prompts of --prompt-file: name the file"),
    "jsonl of nothing": (["MODEL", "--jsonl"], "--jsonl reads the prompts of --prompt-file: name the file, or - for"),
    "no new token": (
        ["MODEL", "--prompt", "x", "--max-new-tokens", "0"],
        "--max-new-tokens is 0 and must be at least 1",
    ),
    "top-p": (["MODEL", "--prompt", "x", "--top-p", "2"], "--top-p is 2.0 and must be between 0 and 1"),
    "idle draft": (["MODEL", "--prompt", "x", "--draft-tokens", "3"], "--draft-tokens has no effect without a draft"),
    "no modules": (["MODEL", "--prompt", "x", "--draft", "mtp"], "this gpt2 has no modules of multi-token prediction"),
    "no effect": (["MODEL", "--prompt", "x", "--temperature", "0", "--top-k", "3"], "no effect at --temperature 0"),
    "idle seed": (
        ["MODEL", "--prompt", "x", "--temperature", "0", "--seed", "0"],
        "--seed has no effect at temperature 0",
    ),
    "empty stop": (["MODEL", "--prompt", "x", "--stop", ""], "stop string is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(llmq, model_folder, case):
    arguments, message = BAD[case]
    code, _, err = llmq("generate", *(str(model_folder) if a == "MODEL" else a for a in arguments))
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_model_without_tokenizer_is_refused(llmq, tiny_model, tmp_path):
    lq.save_hf(tiny_model.replace(tokenizer=None), tmp_path / "mute")
    code, _, err = llmq("generate", tmp_path / "mute", "--prompt", "a")
    assert code == 2 and "holds no tokenizer" in err and err.count("\n") == 1


@pytest.mark.parametrize("prompt", ["--- title", "-x y", "-1"])
def test_a_prompt_may_begin_with_hyphens(llmq, model_folder, prompt):
    code, out, err = llmq("generate", model_folder, "--prompt", prompt, "--max-new-tokens", 1)
    assert (code, err) == (0, "") and out.startswith(prompt)


def test_a_terminal_is_told_the_time_alone(llmq, model_folder, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, _, err = llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 3)
    assert re.fullmatch(r"\d+\.\d s, compilation included\n", err)


def test_a_terminal_is_told_how_many_drafts_were_accepted(llmq, model_folder, tiny_model, tmp_path, monkeypatch):
    """Of a text and of a file, without the copies of the last prompt that fill up the last batch."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    lq.save_hf(tiny_model.replace(variables=lq.init(tiny_model.config, seed=4)), tmp_path / "draft")
    prompts, draft = ["ab", "x", "k!"], lq.load(tmp_path / "draft")
    made = [lq.generate(tiny_model, prompt, 20, lq.Sampler(temperature=0.0), draft=draft) for prompt in prompts]
    drafted, accepted = ([getattr(each, name) for each in made] for name in ("drafted", "accepted"))
    assert len(set(drafted)) == 3 and accepted[0] > 0
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ["--max-new-tokens", 20, "--temperature", 0, "--draft", tmp_path / "draft"]
    sources = [["--prompt", "ab"], ["--prompt-file", tmp_path / "prompts.jsonl", "--batch-size", 2]]
    for source, of in zip(sources, ([0], [0, 1, 2]), strict=True):
        counts = sum(accepted[i] for i in of), sum(drafted[i] for i in of)
        _, _, err = llmq("generate", model_folder, *source, *options)
        told = "{} of {} drafted tokens accepted ({:.0%})".format(*counts, counts[0] / counts[1])
        assert re.fullmatch(rf"\d+\.\d s, compilation included; {re.escape(told)}\n", err)


# Files of prompts

RECORDS = [
    {"id": 1, "prompt": "ab"},
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "é"}], "id": "zwölf"},
    {"prompt": ""},
    {"prompt": "<|user|> is text", "tags": [None, 1.5]},
    {"prompt": "c"},
]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in RECORDS) + "\n")
    return path


def tokens_of(lm, record):
    messages = record.get("messages")
    return lm.chat_tokens(messages) if messages else lm.tokenizer.encode(record["prompt"]) or record["prompt"]


def test_every_line_of_a_file_is_completed_in_order(llmq, chat_folder, chat_model, prompt_file):
    """In batches of 8, that is all at once, and of 2, the last of which is not full: each draws from its own seed."""
    options = ["--max-new-tokens", 8, "--seed", 2**32 - 3]
    code, out, err = llmq("generate", chat_folder, "--prompt-file", prompt_file, *options)
    prompts = [tokens_of(chat_model, record) for record in RECORDS]
    expected = lq.generate(chat_model, prompts, max_new_tokens=8, sampler=SAMPLER, seed=2**32 - 3)
    added = [{"completion": t, "tokens": int(n)} for t, n in zip(expected.text, expected.lengths, strict=True)]
    assert (code, err) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [a | b for a, b in zip(RECORDS, added, strict=True)]
    assert "zwölf" in out
    assert llmq("generate", chat_folder, "--prompt-file", prompt_file, *options, "--batch-size", 2) == (0, out, "")


def test_the_space_before_the_first_new_word(llmq, tmp_path):
    """Of a tokenizer as Llama 2's, which drops it where a text begins."""
    lq.save_hf(one_word_model("▁hi"), tmp_path / "model")
    command = ["generate", tmp_path / "model", "--max-new-tokens", 2, "--temperature", 0]
    assert llmq(*command, "--prompt", "x hi") == (0, "x hi hi hi\n", "")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    line = json.dumps({"prompt": "x", "completion": " hi hi", "tokens": 2})
    assert llmq(*command, "--prompt-file", tmp_path / "prompts.jsonl") == (0, f"{line}\n", "")


def test_lines_from_standard_input(llmq, chat_folder, prompt_file, tmp_path, piped):
    expected = llmq("generate", chat_folder, "--prompt-file", prompt_file, "--max-new-tokens", 8)
    piped("\ufeff" + prompt_file.read_text().replace("\n", "\r\n"))
    assert llmq("generate", chat_folder, "--prompt-file", "-", "--jsonl", "--max-new-tokens", 8) == expected
    other = prompt_file.rename(tmp_path / "prompts.txt")
    assert llmq("generate", chat_folder, "--prompt-file", other, "--jsonl", "--max-new-tokens", 8) == expected
    piped('{"prompt": "a"}\n{"prompt": 1}\n')
    code, _, err = llmq("generate", chat_folder, "--prompt-file", "-", "--jsonl")
    assert (code, err) == (2, 'error: standard input: line 2 has a "prompt" that is not a string\n')
    piped('{"prompt": "a"}\n{"prompt": "b"}\n')
    code, _, err = llmq("generate", chat_folder, "--prompt-file", "-", "--max-new-tokens", 96)
    note = "note: these lines of JSON are taken as one prompt; for a prompt each, --prompt-file - --jsonl\n"
    assert code == 2 and err.startswith(f"{note}error: the prompt has 31 tokens, which with ")
    piped('{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n')
    code, _, err = llmq("generate", chat_folder, "--prompt", "-", "--max-new-tokens", 96)
    note = note.replace("prompt-file - --jsonl", "prompt-file - --jsonl with a field prompt (found: text, id)")
    assert code == 2 and err.startswith(f"{note}error: the prompt has ")
    piped("{}\n")
    assert llmq("generate", chat_folder, "--prompt", "-", "--max-new-tokens", 1)[2] == ""


def test_one_long_prompt_does_not_shorten_the_others_in_silence(llmq, model_folder, tmp_path):
    """Without --max-new-tokens all get as many as the longest leaves room for, here 3."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"prompt": "x" * 29}) + "\n")
    code, out, err = llmq("generate", model_folder, "--prompt-file", path, "--temperature", 0)
    assert (code, [json.loads(line)["tokens"] for line in out.splitlines()]) == (0, [3, 3])
    assert err == (
        f"note: {path}: line 3 has 29 tokens and leaves room for 3 new ones in the model's context of 32, which are "
        "all that any prompt gets; shorten it, or say so by --max-new-tokens 3\n"
    )
    said = llmq("generate", model_folder, "--prompt-file", path, "--temperature", 0, "--max-new-tokens", 3)
    assert said == (0, out, "")


def test_out_is_a_file_of_the_same_lines(llmq, chat_folder, prompt_file, tmp_path):
    arguments = ["generate", chat_folder, "--prompt-file", prompt_file, "--max-new-tokens", 8, "--stop", "e"]
    _, expected, _ = llmq(*arguments)
    assert llmq(*arguments, "--out", tmp_path / "out.jsonl") == (0, "", "")
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == expected
    code, _, err = llmq(*arguments, "--out", tmp_path / "out.jsonl")
    assert code == 2 and err == f"error: --out {tmp_path / 'out.jsonl'} is there already; name a new file\n"


@pytest.fixture
def stopped(llmq, chat_folder, prompt_file, tmp_path, monkeypatch, stopped_at):
    """(the command, what it would have written, the file with the two lines of five that it came to)."""
    command = ["generate", chat_folder, "--prompt-file", prompt_file, "--max-new-tokens", 8]
    _, expected, _ = llmq(*command)
    command += ["--out", tmp_path / "out.jsonl"]
    partial = tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patch:
        patch.setattr(lq, "generate", stopped_at(2, lq.generate))
        said = f"2 of 5 are in {partial}: the command goes on from there\n"
        assert llmq(*command, "--batch-size", 2) == (130, "", said)
    assert sorted(tmp_path.iterdir()) == [partial, prompt_file]
    assert partial.read_text(encoding="utf-8").splitlines(keepends=True)[1:] == expected.splitlines(keepends=True)[:2]
    return command, expected, partial


def test_the_same_command_goes_on_where_it_was_stopped(stopped, stopped_at, llmq, tmp_path, monkeypatch):
    command, expected, partial = stopped
    whole = partial.read_bytes()
    partial.write_bytes(whole + whole[-9:-1])  # as a kill tears a line
    with monkeypatch.context() as patch:
        patch.setattr(lq, "generate", stopped_at(2, lq.generate))
        code, _, err = llmq(*command, "--batch-size", 1)
    assert (code, err.splitlines()[0]) == (130, f"going on after 2 of 5, found in {partial}")
    assert partial.read_bytes() == whole + expected.encode().splitlines(keepends=True)[2]
    assert llmq(*command)[:2] == (0, "")
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == expected
    assert not partial.exists()


def test_lines_that_another_process_finishes_meanwhile(tmp_path, monkeypatch):
    """It has removed the file whose lock is waited for, or another has, and then the result is there."""
    out, locks = tmp_path / "out.jsonl", []

    def removed_at_first(path):
        locks.append(lock_file(path))
        if len(locks) == 1:
            path.unlink()
        return locks[-1]

    monkeypatch.setattr("llmq_jax.commands.kept_lines.lock_file", removed_at_first)
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    with kept_lines(out, {}, [{"a": 1}, {"a": 2}]) as kept:
        for line in (lines := ['{"a": 1}', '{"a": 2}']):
            kept.add([line])
        assert {f"{out}.partial", str(tmp_path)} <= {*synced}
        assert kept.partial.read_text().splitlines()[1:] == lines
    assert (len(locks), out.read_text().splitlines(), os.listdir(tmp_path)) == (2, lines, ["out.jsonl"])
    with pytest.raises(BadInput, match="is there already"), kept_lines(out, {}, [{"a": 1}]):
        pass
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_two_processes_do_not_write_the_same_lines(stopped, llmq):
    command, _, partial = stopped
    before, lock = partial.read_bytes(), lock_file(partial)
    code, _, err = llmq(*command)
    os.close(lock)
    assert (code, partial.read_bytes()) == (2, before)
    assert err == f"error: another process is writing {partial}; wait for it, or name another file by --out\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seed", 1], "--seed"),
        (
            ["--top-k", 3, "--stop", "x", "--repetition-penalty", 2, "--max-new-tokens", 7],
            "--max-new-tokens, --top-k, --repetition-penalty, --stop",
        ),
        (["--dtype", "bfloat16"], "--model"),  # other weights
        (["--prompt-file", "OTHER"], "--prompt-file"),
    ],
)
def test_another_command_does_not_go_on(stopped, llmq, tmp_path, options, named):
    command, _, partial = stopped
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a"}\n')
    before = partial.read_bytes()
    code, _, err = llmq(*command, *(other if word == "OTHER" else word for word in options))
    assert (code, partial.read_bytes()) == (2, before)
    assert f"{partial} was begun by a command that differs in {named}; give that one again to go on" in err


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("generation_config.json", '{"eos_token_id": 5}', "--model"),
        ("chat_template.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "--prompt-file"),
    ],
)
def test_nor_does_the_same_one_with_a_model_that_ends_or_asks_otherwise(
    stopped, llmq, chat_folder, tmp_path, file, content, named
):
    (_, _, *options), _, _ = stopped
    shutil.copytree(chat_folder, tmp_path / "changed")
    (tmp_path / "changed" / file).write_text(content)
    code, _, err = llmq("generate", tmp_path / "changed", *options)
    assert code == 2 and f"was begun by a command that differs in {named}; give" in err


def test_lines_of_others_are_left_alone(stopped, llmq):
    """Those of no command, and those that came twice, as of two processes at a time."""
    command, whole, partial = stopped
    heading, first, second = partial.read_bytes().splitlines(keepends=True)
    for found in (
        b"notes",
        b"notes\n",
        b'{"a": 1}\n',
        first,
        heading + first * 2,
        heading + second + b"1\n",
        heading * 2,
        heading + whole.encode() + second,
    ):
        partial.write_bytes(found)
        code, _, err = llmq(*command)
        assert (code, partial.read_bytes()) == (2, found)
        assert err == f"error: {partial} was not written by this command for these texts; rename or remove it\n"
    partial.write_bytes(heading[:20])
    assert llmq(*command) == (0, "", "")


def test_nothing_is_left_of_what_has_not_begun(llmq, chat_folder, prompt_file, tmp_path, monkeypatch, stopped_at):
    monkeypatch.setattr(lq, "generate", stopped_at(1, lq.generate))
    options = ["--max-new-tokens", 8, "--out", tmp_path / "out.jsonl"]
    assert llmq("generate", chat_folder, "--prompt-file", prompt_file, *options) == (130, "", "")
    assert sorted(tmp_path.iterdir()) == [prompt_file]


def test_chat_makes_messages_of_prompts(llmq, chat_folder, chat_model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hi"}\n')
    _, out, _ = llmq("generate", chat_folder, "--prompt-file", path, "--chat", "--max-new-tokens", 8)
    messages = [{"role": "user", "content": "hi"}]
    reply = chat_model.chat(messages, max_new_tokens=8, sampler=SAMPLER)
    assert json.loads(out)["completion"] == reply


def test_what_a_template_reads_stands_beside_messages_or_a_prompt(llmq, chat_folder, tmp_path):
    """As in training: tools may be JSON in a string, and other variables are an object."""
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ tools[0].name }}{{ mood }}{{ messages[0].content }}")
    tools, mood = [{"name": "clock"}], {"mood": "!"}
    messages = [{"role": "user", "content": "a"}]
    beside = {"tools": json.dumps(tools), "chat_template_kwargs": mood}
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(given | beside) + "\n" for given in ({"messages": messages}, {"prompt": "a"})))
    code, out, _ = llmq("generate", folder, "--prompt-file", path, "--chat", "--max-new-tokens", 8)
    lm = lq.load(folder)
    prompt = lm.chat_tokens(messages, tools, **mood)
    assert prompt == lm.tokenizer.encode("clock!a")
    expected = lq.generate(lm, [prompt] * 2, max_new_tokens=8, sampler=SAMPLER)
    assert (code, [json.loads(line)["completion"] for line in out.splitlines()]) == (0, expected.text)

    path.write_text(json.dumps({"messages": messages, "tools": ["clock"]}) + "\n")
    code, _, err = llmq("generate", folder, "--prompt-file", path)
    assert (code, err.startswith(f"error: {path}: line 1: field 'tools' must be a list of objects")) == (2, True)


GOOD = '{"prompt": "a"}\n'
BAD_FILES = {
    "empty": ("\n", [], "FILE holds no prompts"),
    "broken": (GOOD + '{"prompt": "a"\n', [], "FILE: broken JSON at line 2, column 15"),
    "no object": (GOOD + '\n"a"\n', [], 'FILE: line 3 must be an object with "prompt" or "messages"'),
    "neither": (
        '{"text": 1, "id": 2}',
        [],
        'line 1 has neither "prompt" nor "messages" (fields found: ',
    ),
    "both": ('{"prompt": "a", "messages": []}', [], 'line 1 has both "prompt" and "messages"; keep one of them'),
    "no text": ('{"prompt": ["a"]}', [], 'line 1 has a "prompt" that is not a string'),
    "field in the way": ('{"prompt": "a", "tokens": 1}', [], 'line 1 has a field "tokens" already'),
    "no Unicode": ('{"prompt": "a", "id": "\\ud800"}', [], "line 1: half a surrogate pair at character"),
    "too long": (GOOD + f'{{"prompt": "{"x" * 99}"}}', [], "FILE: line 2: the prompt has 99 tokens, which leave no"),
    "no room": (GOOD + f'{{"prompt": "{"x" * 90}"}}', ["--max-new-tokens", "8"], "FILE: line 2: the prompt has 90"),
    "no messages": (GOOD + '{"messages": []}', [], "FILE: line 2: messages are empty"),
    "refused messages": (
        '{"messages": [{"role": "tool", "content": ""}]}',
        [],
        "FILE: line 1: the chat template refused these messages: no tools",
    ),
    "unknown role": (
        GOOD + '{"messages": [{"role": "sytem", "content": "be"}]}',
        [],
        "FILE: line 2: messages[0] has the role 'sytem': choose from system, developer, user, assistant, tool",
    ),
    "answered messages": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        [],
        "FILE: line 1: the conversation ends with a message of the assistant: end it with what is to be answered",
    ),
    "lost system": (
        GOOD + '{"prompt": "a", "system": "b"}',
        ["--chat"],
        "FILE: line 2 has 'system', which is not read: write it into the text, or remove it",
    ),
    "lost tools": (
        '{"prompt": "a", "tools": [{"name": "clock"}]}',
        [],
        "FILE: line 1 has 'tools', which is not read without --chat: write it into the text, or remove it",
    ),
    "idle chat": ('{"messages": [{"role": "user", "content": "a"}]}', ["--chat"], "--chat has no effect on FILE"),
    "batch size": (GOOD, ["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    "no new token": (GOOD, ["--max-new-tokens", "0"], "error: --max-new-tokens is 0 and must be at"),
    "empty stop": (GOOD, ["--stop", ""], "error: a stop string is empty"),
    "no folder": (
        GOOD,
        ["--out", "nowhere/out.jsonl"],
        "nothing can be written to the folder nowhere;",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_before_anything_is_generated(llmq, chat_folder, tmp_path, monkeypatch, case):
    monkeypatch.setattr(lq, "generate", lambda *_, **__: pytest.fail("it generates"))
    content, options, message = BAD_FILES[case]
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    code, out, err = llmq("generate", chat_folder, "--prompt-file", path, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message.replace("FILE", str(path)) in err


def test_messages_need_a_chat_template(llmq, model_folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    code, _, err = llmq("generate", model_folder, "--prompt-file", path)
    assert code == 2 and err.startswith(f"error: {path}: line 1: this model has no chat template, ")
