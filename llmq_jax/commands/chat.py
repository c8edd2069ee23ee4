"""Talk with a chat model, at the terminal or from a file with a message a line.

Three lines are commands: /reset forgets what was said, but not the system text; /help lists the commands; /quit leaves,
as Ctrl-D does. At a terminal, Ctrl-C stops a reply, and what was said of it stays in the conversation; where nothing
was, the message goes too. Replies go to standard output, all else to standard error. From a file, any other line is a
message, and the exit code is 1 if one of them found no room.

When a conversation outgrows the model's context, its oldest turns are forgotten, which a note says; so are those that
the model's chat template refuses, as one does that takes a single message. The first reply draws from the seed, each
one after it from one that follows from it.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from llmq_jax.command_line import default_is
from llmq_jax.commands.drawing import DrawingOptions
from llmq_jax.commands.standard_input import standard_input
from llmq_jax.errors import BadInput, did_you_mean

NEW_TOKENS = 256
UNANSWERED = 1
"""Exit code where a piped message found no room."""
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget what was said, but not the system text",
    "/quit": "leave, as Ctrl-D does",
}


@dataclass(frozen=True)
class Options(DrawingOptions):
    max_new_tokens: Annotated[int | None, default_is(f"{NEW_TOKENS}, at most half of the context")] = None
    """End a reply after this many tokens, if the model does not before."""
    system: Annotated[str | None, default_is("that of the chat template, if any")] = None
    """What the model is told before the conversation begins: who it is and how it should answer."""


def main(options: Options) -> int:
    options.check()
    options.check_one_row("one message")
    with options.on_devices():
        return converse(options)


def converse(options: Options) -> int:
    """The exit code, when no line comes any more."""
    lm, drawing = options.load()
    lm.require_chat_template(options.model)
    half = context_of(lm, drawing) // 2
    drawing["max_new_tokens"] = min(NEW_TOKENS, half) if options.max_new_tokens is None else options.max_new_tokens
    conversation = Conversation(lm, options, drawing)
    conversation.ask("?")  # computes nothing, and checks now what would else be found at the first message
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
            except KeyboardInterrupt:  # at the prompt: during a reply, `_show` sees to it
                if not at_terminal:
                    raise
                print("\nto leave: /quit or Ctrl-D", file=sys.stderr)


class Conversation:
    """What was said, as far as the model's context has room for it beside a reply."""

    def __init__(self, lm: Any, options: Options, drawing: dict[str, Any]):
        self.lm = lm
        self.options = options
        self.drawing = drawing
        self.context = context_of(lm, drawing)
        self.turns: list[list[dict[str, str]]] = []
        """A message and the reply to it, the oldest first."""
        self.replies = 0
        """All so far, those that are forgotten included."""
        self.refusal_is_told = False

    def ask(self, message: str) -> Iterator[str]:
        """The reply as it comes. The oldest turns are forgotten where they leave it no room, or the chat template does
        not take them, and a note says so.

        BadInput, with nothing forgotten, where the message alone leaves it none, or is not taken.
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
                f"{what} {len(tokens)} tokens, which with a reply of {self.drawing['max_new_tokens']} exceed the "
                f"{'model' if self.context == self.lm.config.max_position_embeddings else 'draft'}'s context of "
                f"{self.context}; say less, or lower --max-new-tokens"
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

    def add(self, message: str, reply: str) -> None:
        self.turns.append([_message("user", message), _message("assistant", reply)])
        self.replies += 1

    def _room(self) -> int:
        """The tokens of the longest prompt."""
        return int(self.context - self.drawing["max_new_tokens"])

    def _messages(self, turns: list[list[dict[str, str]]], message: str) -> list[dict[str, str]]:
        system = [] if self.options.system is None else [_message("system", self.options.system)]
        return [*system, *itertools.chain.from_iterable(turns), _message("user", message)]


def context_of(lm: Any, drawing: dict[str, Any]) -> int:
    """That of the model, or of a draft model that reads less."""
    draft = drawing.get("draft")
    models = [lm, draft] if hasattr(draft, "config") else [lm]
    return min(int(model.config.max_position_embeddings) for model in models)


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
    """Do what a line asks for, a command's work or a reply; whether that could be done."""
    command = line.strip()
    if command == "/reset":
        conversation.turns.clear()
    elif command == "/help":
        print("\n".join(f"{name:8}{meaning}" for name, meaning in COMMANDS.items()), file=sys.stderr)
    elif command.startswith("/") and at_terminal:
        print(f"unknown command {command}: {did_you_mean(command, COMMANDS)}", file=sys.stderr)
    elif command:
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
    """Print a reply as it comes, until it ends or, at a terminal, Ctrl-C; returns what was said, None if that came
    before anything was."""
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
