"""Programs of the project in this process, as their command lines begin them."""

import importlib

from llmq_jax import command_line
from llmq_jax.commands import ELSEWHERE, VERBS


def start(program, *words):
    """`python -m PROGRAM WORDS` or, of "llmq", that with its verb: SystemExit at its end."""
    if program == "llmq":
        main, name, defaults = VERBS, program, None
    else:
        module = importlib.import_module(program)
        main, name, defaults = module.main, f"python -m {program}", getattr(module, "starting_options", None)
    command_line.run(main, [str(word) for word in words], program=name, defaults=defaults, elsewhere=ELSEWHERE)


def ended(program, *words):
    """The exit code of `start`."""
    try:
        start(program, *words)
    except SystemExit as exit:
        return exit.code
