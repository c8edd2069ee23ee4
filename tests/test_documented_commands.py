"""Every command that the README, the docs and the help texts show is one that the programs understand."""

import importlib
from typing import get_type_hints

import pytest

from llmq_jax.command_line import run
from llmq_jax.commands import VERBS
from tests.documented import PAGES, PROGRAMS, commands
from tests.documented_disk import write_options
from train import pretrain

SHOWN = {str(command): command for path in [*PAGES, *PROGRAMS] for command in commands(path) if command.is_ours}
CASES = [pytest.param(command, id=f"{command.where} {line[:60]}") for line, command in SHOWN.items()]


@pytest.mark.parametrize("command", CASES)
def test_it_is_understood(command, capsys, tmp_path, monkeypatch):
    if "--options" in command.words:
        write_options(tmp_path)
        monkeypatch.chdir(tmp_path)
    verb = command.program == "llmq"
    module = importlib.import_module(VERBS[command.words[1]] if verb else command.program)

    def main(options):
        if isinstance(options, pretrain.Options) and not options.init_from:
            pretrain.new_config(options, vocab_size=257)  # its sizes go together

    main.__annotations__ = {key: hint for key, hint in get_type_hints(module.main).items() if key != "return"}
    with pytest.raises(SystemExit) as ended:
        run(main, command.arguments[verb:], program="program", defaults=getattr(module, "starting_options", None))
    assert ended.value.code == 0, capsys.readouterr().err


def test_there_are_many():
    assert len(CASES) > 130
