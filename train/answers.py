"""Answers in training: the token that ends them, and what the model in training answers to a question."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from llmq_jax.errors import BadInput

SAMPLE_TOKENS = 120


def end_of_answer(examples: Iterable[Any], tokenizer: Any) -> int | None:
    """The special token that ends answers; None where a chat template writes none."""
    for example in examples:
        ids = reversed(example.tokens[example.learned].tolist())
        last = next((token for token in ids if tokenizer.decode([token]).strip()), None)
        if not example.cut and last is not None and not tokenizer.decode([last], skip_special_tokens=True):
            return last
    return None


def questioner(options: Any, lm: Any, held_out: list) -> Any:
    """`ask(variables, step)` -> an instruction and the model's greedy answer to it, as text, for the variables of a
    training state at any step.

    BadInput, before the run begins, where no instruction leaves room for an answer, unless it never asks one.
    """
    from llmq_jax.data.conversations import as_conversation
    from llmq_jax.data.records import Record
    from llmq_jax.generation import Sampler, generate
    from llmq_jax.training.parts import whole

    longest = lm.config.max_position_embeddings
    if options.sample_prompt is not None:
        given = as_conversation(Record("--sample-prompt", {"prompt": options.sample_prompt, "completion": "."}))
        prompts = iter([(prompt_tokens(given, options, lm.tokenizer), given)])
    else:
        prompts = prompts_to_ask(held_out, options, lm.tokenizer)
    prompt, conversation = next((pair for pair in prompts if 0 < len(pair[0]) < longest), (None, None))
    if prompt is None and options.sample_every != 0:
        which = "--sample-prompt" if options.sample_prompt is not None else "every conversation"
        raise BadInput(
            f"{which} leaves no room for an answer within the model's {longest} tokens: give a shorter "
            "--sample-prompt, or --sample-every 0"
        )

    def ask(variables, at_step=0):
        tokens = min(SAMPLE_TOKENS, longest - len(prompt))
        learner = lm.replace(variables=whole(variables))
        answer = generate(learner, [prompt], max_new_tokens=tokens, sampler=Sampler(temperature=0.0)).text[0]
        return f"{question(conversation) or lm.tokenizer.decode(prompt)}\n-> {answer.strip()}"

    return ask


def question(conversation: Any) -> str | None:
    """The text of the message that a conversation's last answer replies to; None where it has no answer."""
    from llmq_jax.data.messages import text_of

    pairs = itertools.pairwise(conversation.chat())
    asked = [text_of(before) for before, after in pairs if after["role"] == "assistant"]
    return asked[-1] if asked else None


def prompts_to_ask(conversations: Iterable[Any], options: Any, tokenizer: Any) -> Iterator[tuple[list[int], Any]]:
    """(`prompt_tokens`, conversation) of each, without those that --bad-rows drop leaves out, which is told of
    elsewhere. Each is rendered when it is asked for."""
    for conversation in conversations:
        try:
            prompt = prompt_tokens(conversation, options, tokenizer)
        except BadInput:
            if options.bad_rows != "drop":
                raise
            continue
        yield prompt, conversation


def prompt_tokens(conversation: Any, options: Any, tokenizer: Any) -> list[int]:
    """The token ids before a conversation's last answer; where it has no answer, its first few."""
    from llmq_jax.data import render, tokenize

    conversation = dataclasses.replace(conversation, unlearned=frozenset())  # asked it may be all the same
    rendered = render(conversation, options.template, tokenizer.chat_template)
    if question(conversation) is None:
        return tokenize(rendered, tokenizer, "all").tokens[:16].tolist()
    example = tokenize(rendered, tokenizer, "last")
    return example.tokens[: int(example.learned.argmax())].tolist()
