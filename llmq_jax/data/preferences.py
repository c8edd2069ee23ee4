"""Preference pairs, two answers to one prompt of which one was preferred, in the forms that people keep them in. A
record's fields tell which form it has:

    instruction, input, chosen, rejected    Alpaca's; `input` may be missing or empty, `output` is not read
    prompt, chosen, rejected                three strings; or a list of messages and, as answers, two strings or two
                                            lists of messages
    chosen, rejected                        two lists of messages, whose common beginning is the prompt; `prompt` may
                                            say as a string what the user says there, as in UltraFeedback; or two
                                            transcripts, strings whose turns begin with "Human:" and "Assistant:"
                                            after an empty line, as in hh-rlhf (arXiv:2204.05862)

`margin`, a number, may say by how much the chosen answer is better. Every form becomes two conversations that begin
alike, and these become text and tokens as conversations do: see prompt_templates.py and instruction_batches.py.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmq_jax.counts import counted
from llmq_jax.data.bad_rows import usable
from llmq_jax.data.conversations import LOST, Conversation, answer, require_one_form, with_form
from llmq_jax.data.folders import DataPath
from llmq_jax.data.instruction_batches import Example, tokenize
from llmq_jax.data.messages import Message, message_list, not_learned, refuse_lost, template_variables, text_of
from llmq_jax.data.prompt_templates import render
from llmq_jax.data.records import Record, read_records, renamed
from llmq_jax.data.splits import split_documents
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput

FORMS = {
    "alpaca": ("instruction", "chosen", "rejected"),
    "prompt": ("prompt", "chosen", "rejected"),
    "messages": ("chosen", "rejected"),
}
"""{form: the fields that it must have}, in the order in which they are looked for."""
SIDES = ("chosen", "rejected")
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"(?:^\s*|\n\r?\n)(Human|Assistant):")
"""How a turn of a transcript begins: after an empty line, or at the beginning of the text."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first was preferred."""

    where: str
    """The file and the row, for messages."""
    chosen: Conversation
    rejected: Conversation
    """Both have the same prompt, their first `given` messages, and then the assistant's answer."""
    margin: float | None = None
    """By how much the chosen answer is better."""

    @property
    def prompt(self) -> str:
        """What both answer, as one string that is equal for equal prompts."""
        asked = self.chosen
        return json.dumps([asked.messages[: asked.given], asked.input, asked.variables])


@dataclass(frozen=True)
class Preferences:
    """The pairs of a file or folder, in its order."""

    pairs: list[Preference]
    equal: int
    """Pairs left out because both answers are the same."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Preference]:
        return iter(self.pairs)


@dataclass(frozen=True, eq=False)
class PreferenceExample:
    """A pair as tokens; `learned` of each side marks its response."""

    chosen: Example
    rejected: Example
    margin: float | None
    where: str

    @property
    def sides(self) -> tuple[Example, Example]:
        """(chosen, rejected)"""
        return self.chosen, self.rejected

    def __len__(self) -> int:
        """Tokens of the longer one."""
        return max(len(side.tokens) for side in self.sides)


@dataclass(frozen=True, eq=False)
class PreferenceExamples:
    """What there is to learn from, and what became of pairs that did not fit."""

    pairs: list[PreferenceExample]
    truncated: int
    """Pairs of which one answer or both were cut to the context."""
    dropped: int
    """Pairs left out: too long, or without a response or any difference within the context."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def answers(self) -> list[Example]:
        """Both answers of each pair, with the prompt."""
        return [side for pair in self.pairs for side in pair.sides]

    @property
    def tokens(self) -> int:
        """Tokens of all answers, with their prompts."""
        return sum(len(answer.tokens) for answer in self.answers)


def read_preferences(
    path: DataPath, left_out: list[BadInput] | None = None, fields: Mapping[str, str] | None = None
) -> Preferences:
    """The pairs of a file or folder of records (see `read_records`), all of one form; those of equal answers are
    counted and left out.

    Raises BadInput, which names the row, for a form or role that is unknown, a field that is missing or of the wrong
    kind, an empty prompt or answer, a margin that is no number; and where no pair is left. With a list `left_out` such
    rows are left out (see `usable`). `fields` are other names in the file: {"prompt": "question"}.
    """
    pairs = list(usable(as_preference, renamed(read_records(path), fields), left_out))
    require_one_form([pair.chosen for pair in pairs])
    different = [pair for pair in pairs if pair.chosen.messages != pair.rejected.messages]
    if not different:
        raise BadInput(f"{path}: the chosen and the rejected answer are the same in every row: nothing is preferred")
    return Preferences(different, len(pairs) - len(different))


def as_preference(record: Record) -> Preference:
    """A record in any of the forms; its answers may be equal. BadInput as for `read_preferences`."""
    record, form = with_form(record, FORMS, "preference pair")
    if form == "messages":
        record = _transcripts_as_messages(record)
    where, fields = record
    if form == "alpaca" and "prompt" in fields:
        raise BadInput(f"{where} has both an instruction and a prompt: remove one of the two fields")
    of_lists = () if form == "alpaca" else LOST["messages"]
    refuse_lost(fields, (*LOST[form], *of_lists), where)
    given = ""
    prompt: tuple[Message, ...]
    answers: list[tuple[Message, ...]]
    if form == "alpaca":
        given = record.text("input") if "input" in fields else ""
        prompt = ({"role": "user", "content": record.text("instruction")},)
        answers = [(answer(record, side),) for side in SIDES]
    elif form == "prompt" and not isinstance(fields["prompt"], str):
        prompt, answers = message_list(record, "prompt"), _answers(record)
        form = "messages"
    elif form == "prompt" and not all(isinstance(fields[side], list) for side in SIDES):
        prompt, answers = _strings(record)
    else:
        prompt, answers = _implicit_prompt(record)
        form = "messages"
        if "prompt" in fields and all(text_of(message) != fields["prompt"] for message in prompt):
            raise BadInput(
                f"{where}: no message that chosen and rejected begin with is the prompt's string: give the prompt as "
                "messages, or remove it where chosen and rejected begin with it"
            )
    if not given.strip() and not any(text_of(message).strip() for message in prompt):
        raise BadInput(f"{where}: the prompt is empty, so there is nothing to answer: remove the row, or fill it in")
    for side, said in zip(SIDES, answers, strict=True):
        _check_answer(where, side, said)
    variables = template_variables(record)

    def conversation(side: str, said: tuple[Message, ...]) -> Conversation:
        messages, spoken = (*prompt, *said), fields[side]
        # A list may begin with the prompt.
        marked = frozenset() if isinstance(spoken, str) else not_learned(record, side, len(messages) - len(spoken))
        return Conversation(where, form, messages, len(prompt), given, variables, marked)

    chosen, rejected = map(conversation, SIDES, answers)
    return Preference(where, chosen, rejected, _margin(record))


def split_preferences(
    pairs: Iterable[Preference], fraction: float, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """(training, held-out) pairs, each in their order; `fraction` of the prompts, at least one, is held out with all
    its pairs, so that no prompt is in both. Raises BadInput for fewer than two prompts."""
    pairs = list(pairs)
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    if len(prompts) < 2:
        raise BadInput(
            f"holding out pairs needs at least 2 different prompts, found {len(prompts)}: give more, or a file of its "
            "own for validation"
        )
    held_out = set(split_documents(prompts, fraction, seed)[1])
    training = [pair for pair in pairs if pair.prompt not in held_out]
    return training, [pair for pair in pairs if pair.prompt in held_out]


def tokenize_preferences(
    preferences: Iterable[Preference],
    tokenizer: Tokenizer,
    *,
    template: str,
    context: int,
    too_long: str = "truncate",
    left_out: list[BadInput] | None = None,
) -> PreferenceExamples:
    """Pairs, written by a template (see prompt_templates.py), as examples of at most `context` tokens each.

    The response is what the assistant says after the prompt, with the end of turn or of text; `learned` marks it.
    too_long: what becomes of a pair with a longer answer. "truncate" keeps the beginning of both, "drop" leaves the
    pair out, "error" is BadInput, which names it. Pairs without a response on both sides, or without any difference
    between the two, are dropped too. left_out: a list for the errors of pairs that the template refuses (see `usable`).
    Raises BadInput where nothing is left at all.
    """
    if too_long not in ("truncate", "drop", "error"):
        raise BadInput(f'too_long must be "truncate", "drop" or "error", not {too_long!r}')
    if context < 2:
        raise BadInput(f"a context of {context} leaves nothing to compare: it needs at least 2 tokens")

    def example(preference: Preference) -> PreferenceExample:
        chosen, rejected = (
            tokenize(render(side, template, tokenizer.chat_template), tokenizer)
            for side in (preference.chosen, preference.rejected)
        )
        return PreferenceExample(chosen, rejected, preference.margin, preference.where)

    pairs: list[PreferenceExample] = []
    truncated = dropped = 0
    for pair in usable(example, preferences, left_out):
        is_long = len(pair) > context
        if is_long and too_long == "error":
            raise BadInput(
                f"{pair.where} has {len(pair)} tokens and the context {context}: shorten it, choose a longer "
                "--context, or let such pairs be truncated or dropped (--too-long)"
            )
        if is_long:
            pair = replace(pair, chosen=pair.chosen.cut_to(context), rejected=pair.rejected.cut_to(context))
        # The first token is no response: nothing stands before it.
        responses = all(side.learned[1:].any() for side in pair.sides)
        differ = pair.chosen.tokens.tolist() != pair.rejected.tokens.tolist()
        if not (responses and differ) or (is_long and too_long == "drop"):
            dropped += 1
            continue
        truncated += is_long
        pairs.append(pair)
    if not pairs:
        raise BadInput(
            f"of {counted(dropped, 'pair')} none differs in its responses within the context of {context} tokens: "
            "choose a longer one"
        )
    return PreferenceExamples(pairs, truncated, dropped)


def without_padding(pair: PreferenceExample, pad_id: int) -> PreferenceExample:
    """The pair without `pad_id` at the end of its texts, for reward models.

    A reward is read at a text's last token, which for transformers, and so for TRL, is the last one that is not
    padding. Where a model pads with its end-of-text token, having no other, that is the token before the end of text.
    """

    def trimmed(side: Example) -> Example:
        (others,) = np.nonzero(side.tokens != pad_id)
        count = int(others[-1]) + 1 if len(others) else len(side.tokens)
        return replace(side, tokens=side.tokens[:count], learned=side.learned[:count])

    return replace(pair, chosen=trimmed(pair.chosen), rejected=trimmed(pair.rejected))


def chat_ending(tokenizer: Tokenizer, end_tokens: Collection[int]) -> list[int]:
    """How the model's chat template ends an answer: the first of these end tokens and what stands after it, such as
    ChatML's line break. A generated answer stops at the end token; texts that the template writes have all of it. Empty
    where the template writes no such token, and without a template."""
    if tokenizer.chat_template is None:
        return []
    asked: Message = {"role": "user", "content": "question"}
    said: Message = {"role": "assistant", "content": "answer"}
    text = render(Conversation("a question", "messages", (asked, said), 1), "chat", tokenizer.chat_template)
    example = tokenize(text, tokenizer)
    (ends,) = np.nonzero(example.learned & np.isin(example.tokens, list(end_tokens)))
    ending: list[int] = example.tokens[ends[0] :].tolist() if len(ends) else []
    return ending


def _strings(record: Record) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    for side in SIDES:
        if isinstance(record.fields[side], Sequence) and not isinstance(record.fields[side], str):
            raise BadInput(
                f"{record.where}: the prompt is a string and {side} a list of messages: give the prompt as messages "
                "too, or remove it where chosen and rejected begin with it"
            )
    return ({"role": "user", "content": record.text("prompt")},), [(answer(record, side),) for side in SIDES]


def _answers(record: Record) -> list[tuple[Message, ...]]:
    """Both answers, after a prompt that is a list of messages."""
    strings = [isinstance(record.fields[side], str) for side in SIDES]
    if all(strings):
        return [(answer(record, side),) for side in SIDES]
    if any(strings):
        raise BadInput(f"{record.where}: chosen and rejected must both be strings, or both be lists of messages")
    return [message_list(record, side) for side in SIDES]


def _transcripts_as_messages(record: Record) -> Record:
    """The record with lists of messages in the place of its two transcripts, if it has such."""
    texts = [record.fields[side] for side in SIDES]
    if not all(isinstance(text, str) and TURN.match(text) and len(TURN.findall(text)) > 1 for text in texts):
        return record
    return record._replace(fields={**record.fields, **dict(zip(SIDES, map(_turns, texts), strict=True))})


def _turns(transcript: str) -> list[Message]:
    _, *parts = TURN.split(transcript)
    return [
        {"role": TRANSCRIPT_ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _implicit_prompt(record: Record) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    where = record.where
    if any(isinstance(record.fields[side], str) for side in SIDES):
        raise BadInput(
            f"{where}: chosen and rejected are neither lists of messages nor transcripts, whose turns 'Human:' and "
            "'Assistant:' follow empty lines: give what they answer as 'prompt'"
        )
    chosen, rejected = (message_list(record, side) for side in SIDES)
    common = next(
        (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    if chosen == rejected:  # left out later; until then all but the last message are its prompt
        common -= 1
    if common == 0:
        raise BadInput(f"{where}: chosen and rejected must begin with the same messages, the prompt, and do not")
    return chosen[:common], [chosen[common:], rejected[common:]]


def _check_answer(where: str, side: str, messages: tuple[Message, ...]) -> None:
    if not messages:
        raise BadInput(f"{where}: {side} has no answer after the prompt: remove the row, or fill it in")
    for message, place in ((messages[0], "begin"), (messages[-1], "end")):
        if message["role"] != "assistant":
            raise BadInput(
                f"{where}: {side}, after the prompt, must {place} with a message of the assistant, not of the "
                f"{message['role']}"
            )


def _margin(record: Record) -> float | None:
    value = record.fields.get("margin")
    if value is None or value == "":  # an empty cell of a table
        return None
    try:
        # Tables hold strings.
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{record.where}: field 'margin' must be a finite number, not {value!r:.40}")
    return number
