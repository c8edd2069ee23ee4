"""Real weights: SmolLM2-135M-Instruct from a GGUF file, saved as a Hugging Face folder, against transformers there."""

import gc

import numpy as np
import pytest
import torch
import transformers

from llmq_jax.generation.generate import generate
from llmq_jax.generation.sampling import Sampler
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.model_files import load
from tests.smollm2 import smollm2_gguf

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue to a child.",
    "def fibonacci(n):",
    "List three uses of a paper clip, with prices like $1.25 or 10%.",
    "Übersetze ins Englische: Guten Morgen! 😀",
)
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, transformers' model and tokenizer from what ours wrote)."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    ours = load(smollm2_gguf(), dtype="float32")
    save_hf(ours, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    yield ours, theirs.eval(), transformers.AutoTokenizer.from_pretrained(folder)
    del theirs
    gc.collect()


def chats(tokenizer):
    rendered = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in rendered]


def test_logits_of_a_saved_folder(pair):
    ours, theirs, tokenizer = pair
    tokens = np.array([chats(tokenizer)[2]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    # At logits of this size (std 5 to 8, largest near 40) float32 itself leaves a few 1e-5.
    np.testing.assert_allclose(ours.logits(tokens), expected, rtol=0, atol=2e-4)
    assert (np.asarray(ours.logits(tokens)).argmax(-1) == expected.argmax(-1)).all()


def test_chats_are_the_same_tokens(pair):
    ours, _, tokenizer = pair
    for question, theirs in zip(QUESTIONS, chats(tokenizer), strict=True):
        assert ours.chat_tokens([{"role": "user", "content": question}]) == theirs


@pytest.mark.exhaustive
def test_greedy_tokens_are_those_of_transformers(pair):
    """All prompts in one batch of ours, each alone in theirs; nothing ends early.

    Theirs reads each prompt with our tokens after it: where at every place its likeliest token is the one that follows,
    they are what it would generate, and one pass tells.
    """
    ours, theirs, tokenizer = pair
    prompts = chats(tokenizer)
    found = generate(ours, prompts, max_new_tokens=NEW_TOKENS, sampler=Sampler(temperature=0.0), stop=())
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor([[*prompt, *found.tokens[row]]])
        with torch.no_grad():
            likeliest = theirs(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
        np.testing.assert_array_equal(found.tokens[row], likeliest.numpy(), err_msg=QUESTIONS[row])


def test_the_capital_of_france(pair):
    ours, _, _ = pair
    reply = ours.chat([{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=24, sampler=Sampler(temperature=0.0))
    assert "Paris" in reply
