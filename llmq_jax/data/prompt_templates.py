"""Prompt templates: a conversation as the one text that a model reads, and where in it the answers stand.

    alpaca    Stanford Alpaca's headings, for one instruction and its response; the preamble never mentions an input
    chat      the chat template that comes with the model
    plain     prompt and completion as they are, one right after the other

An answer goes from where the template lets the assistant begin to where the next message begins: the end of turn that
the template writes belongs to it, and is learned with it. (alpaca and plain write none; the end-of-text token, which is
added to the tokens, takes its place.)

Alpaca's and the plain template exist as chat templates in Jinja too, so that a model that was tuned with one of them
gets prompts in that style from then on: see chat_style.py.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from llmq_jax.counts import counted
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.conversations import Conversation
from llmq_jax.data.messages import Message, called, reasoning_of, text_of
from llmq_jax.data.offsets import Span
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput, at_place

Template = Literal["alpaca", "chat", "plain"]
TrainOn = str | tuple[int, ...]
"""What is learned: "response" (every answer), "last" (the last one), "all" (the prompts too), or the answers with these
numbers, from 0; negative numbers count from the last, which is -1."""
TRAIN_ON = ("response", "last", "all")

DAY = datetime(2024, 7, 26)
"""The date for chat templates that write one (Llama 3.1's): batches may not depend on the day of training."""

REWRITTEN = (
    "has an answer that the chat template writes in another way when messages follow, as those do that leave out "
    "earlier reasoning, so that where it ends cannot be told: train on the last one only, or by a template that writes "
    "all of them alike"
)
UNASKED = "begins with the assistant, which answers nothing: put a prompt before it, or train on the last answer only"
"""Why answers cannot be learned."""

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
INSTRUCTION, INPUT, RESPONSE = f"{PREAMBLE}\n\n### Instruction:\n", "### Input:\n", "### Response:\n"
PARAGRAPH = "\n\n"
"""The end of an instruction, and of an input."""

ONE_TURN = """\
{%- set roles = messages | map(attribute="role") | list -%}
{%- if roles != ["user"] and (add_generation_prompt or roles != ["user", "assistant"]) -%}
{{- raise_exception("the model answers one message of the user and takes no others, and not " ~ roles | join(", ")) -}}
{%- endif -%}
{{- beginning ~ instruction ~ messages[0].content ~ paragraph -}}
{%- if input and messages[0].input -%}
{{- input ~ messages[0].input ~ paragraph -}}
{%- endif -%}
{%- if add_generation_prompt or roles | length == 2 -%}
{{- response -}}
{%- endif -%}
{%- if roles | length == 2 -%}
{{- messages[1].content ~ end -}}
{%- endif -%}"""
"""A template in Jinja for one message and its answer. The tokenizer's `beginning` and `end` come before it."""


def set_in_jinja(**texts: str) -> str:
    """Jinja that sets these variables, a line each. JSON spells the texts, since Jinja reads its escapes but would trim
    line breaks."""
    lines = (f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}\n" for name, text in texts.items())
    return "".join(lines)


STYLES = {
    "alpaca": set_in_jinja(instruction=INSTRUCTION, input=INPUT, paragraph=PARAGRAPH, response=RESPONSE) + ONE_TURN,
    "plain": set_in_jinja(instruction="", input="", paragraph="", response="") + ONE_TURN,
}
"""{template: its text in Jinja, without a beginning and an end}. Alpaca's input is the key `input` of the message."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    where: str
    text: str
    answers: tuple[Span | str | None, ...]
    """For each answer after the given messages, in order: its characters, or why it cannot be learned; None where it is
    marked as not to be learned."""
    is_chat: bool
    """Whether special tokens spelled out in the text become tokens, because a chat template writes them. Those that
    messages spell out do so too, as everywhere that chat templates are used."""

    def chosen(self, train_on: TrainOn) -> tuple[Span, ...]:
        """The characters to learn. BadInput: an answer that is not there, or none but marked ones."""
        if train_on == "all":
            return ((0, len(self.text)),)
        if not self.answers:
            raise BadInput(
                f"{self.where} has no answer to a prompt: train on all of it (--train-on all, in Python "
                'train_on="all"), or remove the row'
            )
        count = len(self.answers)
        if isinstance(train_on, str):
            numbers: Sequence[int] = range(count) if train_on == "response" else (-1,)
        else:
            numbers = train_on
        for number in numbers:
            if not -count <= number < count:
                raise BadInput(
                    f"{self.where} has {counted(count, 'answer')}, numbered from 0, and none with the number {number}"
                )
        spans: list[Span] = []
        for number in sorted({number % count for number in numbers}):
            span = self.answers[number]
            if isinstance(span, str):
                raise BadInput(f"{self.where} {span}")
            if span is not None:
                spans.append(span)
        if not spans:
            raise BadInput(
                f"{self.where} has no answer to learn: all that are chosen are marked as not to be learned (weight, "
                "train or loss): remove the row, or a mark"
            )
        return tuple(spans)


def check_train_on(train_on: TrainOn) -> None:
    """BadInput unless it is one of TRAIN_ON or a tuple of numbers."""
    numbers = isinstance(train_on, tuple) and train_on and all(isinstance(number, int) for number in train_on)
    if not numbers and train_on not in TRAIN_ON:
        raise BadInput(f"train_on must be {', '.join(TRAIN_ON)} or numbers of answers, not {train_on!r}")


def style_of(chat_template: ChatTemplate | None) -> str | None:
    """Which of STYLES a chat template is; None for any other."""
    source = "" if chat_template is None else chat_template.source
    return next((name for name, style in STYLES.items() if source.endswith(style)), None)


def default_template(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> str:
    """The model's chat template where it has one and the data are questions and answers; else what fits the data.
    Prompts and completions are plain, unless the chat template is one of STYLES, which an earlier run left."""
    form = conversations[0].form
    if form == "text" or (form == "prompt" and style_of(tokenizer.chat_template) is None):
        return "plain"
    return "chat" if form == "messages" or tokenizer.chat_template is not None else "alpaca"


def render(conversation: Conversation, template: str, chat_template: ChatTemplate | None = None) -> Rendered:
    """A conversation written by one of the templates; for "chat" it is `chat_template`.

    Raises BadInput, which names the row, where the template has no place for what the conversation holds.
    """
    where, form = conversation.where, conversation.form
    if template not in get_args(Template):
        raise BadInput(f"unknown template {template!r}: choose from {', '.join(get_args(Template))}")
    if form == "text":
        if template != "plain":
            raise BadInput(f"{where} holds a text without a prompt, for which there is only the template 'plain'")
        return Rendered(where, conversation.messages[0]["content"], (), is_chat=False)
    if template == "chat":
        if chat_template is None:
            raise BadInput(f"{where}: the model has no chat template: use the template 'alpaca', or another model")
        return _chat(conversation, chat_template)
    if template == "plain" and form != "prompt":
        raise BadInput(
            f"{where}: the template 'plain' is for records with a prompt and a completion, both strings; choose "
            "'alpaca', for one question and its answer, or 'chat'"
        )
    prompt, answer = conversation.single_turn(template)
    if template == "alpaca":
        prompt = alpaca_prompt(prompt, conversation.input)
    text = prompt + answer
    answers = (None if 1 in conversation.unlearned else (len(prompt), len(text)),)
    return Rendered(where, text, answers, is_chat=False)


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Alpaca's text up to the response."""
    section = f"{INPUT}{given}{PARAGRAPH}" if given else ""
    return f"{INSTRUCTION}{instruction}{PARAGRAPH}{section}{RESPONSE}"


def prompt_text(conversation: Conversation, template: ChatTemplate) -> str:
    """A conversation that is to be answered, written by a chat template, up to the beginning of the answer.

    BadInput, which names the row, where the template has no place for what the conversation holds.
    """
    text = _written(conversation, template, conversation.chat(), opens_answer=True)
    _refuse_left_out(conversation, template, text)
    return text


def _chat(conversation: Conversation, template: ChatTemplate) -> Rendered:
    """Where an answer begins and ends is found by writing the conversation up to there as well."""
    messages, where = conversation.chat(), conversation.where
    if conversation.input and style_of(template) == "alpaca":
        first, *others = conversation.messages
        messages = [{**first, "input": conversation.input}, *others]

    def written(count: int, *, opens_answer: bool = False) -> str:
        return _written(conversation, template, messages[:count], opens_answer)

    text = written(len(messages))
    _refuse_left_out(conversation, template, text)
    answers: list[Span | str | None] = []
    for index in range(conversation.given, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        if index in conversation.unlearned:
            answers.append(None)
            continue
        if index == 0:
            answers.append(UNASKED)
            continue
        opening = written(index, opens_answer=True)
        after = text if index + 1 == len(messages) else written(index + 1)
        if not text.startswith(after):
            answers.append(REWRITTEN)
            continue
        start = _common_start(opening, text)
        answer = text[start : len(after)]
        # Mostly the whole answer stands after its opening, and the messages before it need not be written again.
        if start < len(opening) or not _says("", answer, messages[index]):
            before = written(index)
            # The opening of a new answer may hold more than stands before an answer that exists, such as an empty
            # thought. But the messages before it must be written alike.
            if start < _common_start(before, opening):
                answers.append(REWRITTEN)
                continue
            if not _says(text[_common_start(before, text) : start], answer, messages[index]):
                fault = _left_out(f"a part of what messages[{index}] says", messages[index], template)
                raise BadInput(f"{where}: {fault}")
        answers.append((start, len(after)))
    return Rendered(where, text, tuple(answers), is_chat=True)


def _written(conversation: Conversation, template: ChatTemplate, messages: list[Message], opens_answer: bool) -> str:
    with at_place(conversation.where):
        return template.render(
            messages, add_generation_prompt=opens_answer, strftime_now=DAY.strftime, **conversation.variables
        )


def _refuse_left_out(conversation: Conversation, template: ChatTemplate, text: str) -> None:
    """BadInput for what a conversation holds and the template leaves out of its text; `_chat` checks the answers."""
    with at_place(conversation.where):
        refuse_left_out(conversation.messages, conversation.variables, template, text)


def refuse_left_out(
    messages: Sequence[Message], variables: Mapping[str, Any], template: ChatTemplate, text: str
) -> None:
    """BadInput for what a template does not read (`refuse_unread`), and for a message that it left out of the text that
    it wrote; the assistant's are not looked at, since templates take out former thoughts."""
    template.refuse_unread(messages, variables)
    text = "".join(text.split())
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and not _stands_in(text, text_of(message)):
            raise _left_out(f"messages[{index}], of the {message['role']}", message, template)


def _left_out(what: str, message: Message, template: ChatTemplate) -> BadInput:
    advice = "use another template"
    if isinstance(message.get("content"), str) and message["role"] in template.takes_only_parts:
        advice = f'it reads texts only from parts: write content as [{{"type": "text", "text": ...}}], or {advice}'
    return BadInput(f"the chat template leaves out {what}: {advice}")


def _stands_in(text: str, content: str) -> bool:
    """Whether a text without white space holds what a message says, as it is or as a string in JSON or Python."""
    in_json, in_ascii = (json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    # LFM2's template writes all strings between single quotes, where Python's repr chooses.
    between_single = in_json.replace('\\"', '"').replace("'", "\\'")
    spelled = (content, in_json, in_ascii, repr(content)[1:-1], between_single)
    return any("".join(each.split()) in text for each in spelled)


def _says(opened: str, answer: str, message: Message) -> bool:
    """Whether an answer holds a message's text, reasoning and tool calls, whose beginning may stand in the opening."""
    said = [each for each in (text_of(message), reasoning_of(message) or "") if each.strip()]
    return all(_holds(opened, answer, each) for each in said) and _holds_calls(opened + answer, called(message))


def _holds_calls(answer: str, calls: Sequence[tuple[str, list[str]]]) -> bool:
    """Whether an answer has each tool's name as often as it is called, and the texts among the arguments."""
    answer, times = "".join(answer.split()), Counter("".join(name.split()) for name, _ in calls)
    if any(answer.count(name) < count for name, count in times.items()):
        return False
    return all(_stands_in(answer, text) for _, texts in calls for text in texts)


def _holds(opened: str, answer: str, content: str) -> bool:
    """Whether an answer holds a text, whose beginning may stand in the opening. White space does not count: templates
    trim and indent."""
    opened, answer, content = ("".join(text.split()) for text in (opened, answer, content))
    place = (opened + answer).rfind(content)
    return place >= 0 and place + len(content) > len(opened)


def _common_start(a: str, b: str) -> int:
    """The length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
