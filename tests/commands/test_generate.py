import io
import re

import pytest

import llmq_jax as lq

TAIL = "\n"


def test_greedy_text_is_that_of_the_library(llmq, model_folder, tiny_model):
    code, out, err = llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 12, "--temperature", 0)
    expected = lq.generate(tiny_model, "ab", max_new_tokens=12, sampler=lq.Sampler(temperature=0.0)).text[0]
    assert (code, out, err) == (0, "ab" + expected + TAIL, "")


def test_sampling_options_reach_the_sampler(llmq, model_folder, tiny_model):
    options = ["--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--seed", 7, "--stop", "e"]
    _, out, _ = llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 20, *options)
    sampler = lq.Sampler(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01)
    expected = lq.generate(tiny_model, "ab", max_new_tokens=20, sampler=sampler, seed=7, stop=["e"]).text[0]
    assert out == "ab" + expected + TAIL
    others = [[*options, "--seed", 8], [*options, "--top-k", 1]]
    assert all(llmq("generate", model_folder, "--prompt", "ab", "--max-new-tokens", 20, *o)[1] != out for o in others)


def test_without_a_length_it_fills_the_context(llmq, model_folder, tiny_model):
    code, out, _ = llmq("generate", model_folder, "--prompt", "x" * 30, "--temperature", 0)
    expected = lq.generate(tiny_model, "x" * 30, max_new_tokens=2, sampler=lq.Sampler(temperature=0.0)).text[0]
    assert (code, out) == (0, "x" * 30 + expected + TAIL)


def test_prompt_from_standard_input(llmq, model_folder, monkeypatch):
    given = llmq("generate", model_folder, "--prompt", "one\ntwo", "--max-new-tokens", 4)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    assert llmq("generate", model_folder, "--prompt", "-", "--max-new-tokens", 4) == given


BAD = {
    "no model there": (["nowhere/at-all", "--prompt", "a"], "nowhere/at-all"),
    "past the context": (["MODEL", "--prompt", "x" * 40], "exceed the model's context of 32"),
    "too many new tokens": (["MODEL", "--prompt", "x", "--max-new-tokens", "33"], "exceed the model's context of 32"),
    "no new token": (["MODEL", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
    "top-p": (["MODEL", "--prompt", "x", "--top-p", "2"], "top_p=2.0 must be above 0 and at most 1"),
    "no effect": (["MODEL", "--prompt", "x", "--temperature", "0", "--top-k", "3"], "no effect at temperature 0"),
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
