"""Talk with a chat model, at the terminal or from a file with a message a line.

There are three commands: /reset forgets what was said, but not the system text; /help lists the commands; /quit leaves,
as Ctrl-D does. At a terminal, Ctrl-C stops a reply; what was printed of it stays in the conversation, and if nothing
was, the message is forgotten too. Replies go to standard output, all else to standard error. From a file, any other
line is a message, and the exit code is 1 if one of them could not be answered.

When a conversation outgrows the model's context, its oldest turns are forgotten, and a note says so. The same happens
to turns that the model's chat template refuses, such as a template for a single message. The first reply is sampled
with the seed, each later one with a seed that is derived from it.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from llmq_jax.commands.drawing import DrawingOptions, context_of
from llmq_jax.commands.standard_input import first_record, standard_input
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.options import default_is

NEW_TOKENS = 256
UNANSWERED = 1
"""Exit code where a message from a file or pipe could not be answered."""
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget what was said, but not the system text",
    "/quit": "leave, as Ctrl-D does",
}


@dataclass(frozen=True)
class Options(DrawingOptions):
    max_new_tokens: Annotated[int | None, default_is(f"{NEW_TOKENS}, at most half of the context")] = None
    """End a reply after this many tokens, if the model has not ended it before."""
    system: Annotated[str | None, default_is("that of the chat template, if any")] = None
    """What the model is told before the conversation begins: who it is and how it should answer."""


def main(options: Options) -> int:
    options.check()
    options.check_one_row("one message")
    with options.on_devices():
        return converse(options)


def converse(options: Options) -> int:
    """Answer messages until the input ends; returns the exit code."""
    lm, drawing = options.load()
    lm.require_chat_template(options.model)
    half = context_of(lm, drawing)[0] // 2
    drawing["max_new_tokens"] = min(NEW_TOKENS, half) if options.max_new_tokens is None else options.max_new_tokens
    conversation = Conversation(lm, options, drawing)
    conversation.ask("?")  # computes nothing: raises now what the first message would raise
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if sys.stderr.isatty():
        print(f"{lm!r}; the first reply waits for compilation; /help lists the commands", file=sys.stderr)
    answered = True
    with standard_input():
        while True:
            try:
                line = _read(at_terminal)
                if line is None or line.strip() == "/quit":
                    return 0 if answered or at_terminal else UNANSWERED
                answered &= _take(line, conversation, at_terminal)
            except KeyboardInterrupt:  # at the prompt; during a reply `_show` handles it
                if not at_terminal:
                    raise
                print("\nto leave: /quit or Ctrl-D", file=sys.stderr)


class Conversation:
    """The turns of a conversation, as far as the model's context has room for them beside a reply."""

    def __init__(self, lm: Any, options: Options, drawing: dict[str, Any]):
        from llmq_jax.generation import PromptCache

        self.lm = lm
        self.options = options
        self.drawing = drawing
        self.context, self.whose = context_of(lm, drawing)
        if drawing.get("draft") is None:  # then only what is new in a conversation is read
            self.drawing = drawing | {"prompt_cache": PromptCache()}
        self.turns: list[list[dict[str, str]]] = []
        """Pairs of a message and the reply to it, the oldest first."""
        self.replies = 0
        """The number of replies so far, forgotten ones included."""
        self.refusal_is_told = False

    def ask(self, message: str) -> Iterator[str]:
        """The reply, piece by piece. Where earlier turns leave it no room, or the chat template refuses them, the
        oldest are forgotten, and a note says so.

        BadInput, with nothing forgotten, where the message alone leaves no room or is refused.
        """
        from llmq_jax.generation import stream

        refused = False
        for forgotten in range(len(self.turns) + 1):
            try:
                tokens = self.lm.chat_tokens(self._messages(self.turns[forgotten:], message))
            except BadInput:
                if forgotten == len(self.turns):
                    raise
                refused = True
                continue
            if len(tokens) <= self._room():
                break
        else:
            what = "the message takes" if self.options.system is None else "the system text and the message take"
            raise BadInput(
                f"{what} {counted(len(tokens), 'token')}, which with a reply of {self.drawing['max_new_tokens']} "
                f"exceed the {self.whose}'s context of {self.context}; say less, or lower --max-new-tokens"
            )
        pieces = stream(self.lm, tokens, seed=self.options.seed_of(self.replies), **self.drawing)
        if refused and not self.refusal_is_told:
            self.refusal_is_told = True
            note = "the model's chat template takes no further turn; from now on earlier ones are forgotten"
            print(f"note: {note}", file=sys.stderr)
        elif forgotten and not refused:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            print(f"note: the conversation outgrew the context; its oldest {turns} forgotten", file=sys.stderr)
        del self.turns[:forgotten]
        return pieces

    def reset(self) -> None:
        self.turns.clear()
        if "prompt_cache" in self.drawing:
            self.drawing["prompt_cache"].forget()

    def add(self, message: str, reply: str) -> None:
        self.turns.append([_message("user", message), _message("assistant", reply)])
        self.replies += 1

    def _room(self) -> int:
        """The greatest number of tokens in a prompt."""
        return int(self.context - self.drawing["max_new_tokens"])

    def _messages(self, turns: list[list[dict[str, str]]], message: str) -> list[dict[str, str]]:
        system = [] if self.options.system is None else [_message("system", self.options.system)]
        return [*system, *itertools.chain.from_iterable(turns), _message("user", message)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _read(at_terminal: bool) -> str | None:
    """A line of the user's, None at the end of input; at a terminal with a prompt, editing and history."""
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` uses it once it is there
    try:
        return input("> " if at_terminal else "")
    except EOFError:
        if at_terminal:
            print()
        return None


def _take(line: str, conversation: Conversation, at_terminal: bool) -> bool:
    """Run the command, or answer the message, in a line; returns whether that was possible."""
    command = line.strip()
    if command == "/reset":
        conversation.reset()
    elif command == "/help":
        print("\n".join(f"{name:8}{meaning}" for name, meaning in COMMANDS.items()), file=sys.stderr)
    elif command.startswith("/") and at_terminal:
        print(f"unknown command {command}: {did_you_mean(command, COMMANDS)}", file=sys.stderr)
    elif command:
        if not at_terminal and not conversation.replies and first_record(line) is not None:
            print(
                "note: these lines of JSON are messages as they stand; for an answer each, "
                "llmq generate --prompt-file FILE --jsonl --chat",
                file=sys.stderr,
            )
        try:
            pieces = conversation.ask(line)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            return False
        reply = _show(pieces, at_terminal)
        if reply is not None:
            conversation.add(line, reply)
    return True


def _show(pieces: Iterator[str], at_terminal: bool) -> str | None:
    """Print a reply as it comes, until it ends or, at a terminal, until Ctrl-C; returns its text, None if it was
    stopped before there was any."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not at_terminal:
            raise
        if not said:
            print(flush=True)
            return None
    print(flush=True)
    return said
