"""Print the script with which a shell completes commands, options and files.

Put one of these lines into the file that the shell reads when it starts:

    eval "$(llmq completion bash)"      # ~/.bashrc
    eval "$(llmq completion zsh)"       # ~/.zshrc
"""

import importlib
from dataclasses import dataclass
from typing import Literal

from llmq_jax.options import Positional, given_fields, option_name, without_names

BASH = """\
_llmq() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" known=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    known="{verbs}"
  elif [ "${{word#-}}" != "$word" ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  else
    COMPREPLY=()
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$word")
    return
  fi
  COMPREPLY=($(compgen -W "$known" -- "$word"))
}}
complete -o filenames -F _llmq llmq
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True)
class Options:
    shell: Positional[Literal["bash", "zsh"]]
    """The shell to print the script for."""


def main(options: Options) -> None:
    print(script(options.shell), end="")


def script(shell: Literal["bash", "zsh"]) -> str:
    from llmq_jax.commands import VERBS

    cases = "\n".join(f'      {verb}) known="{" ".join(options_of(module))}" ;;' for verb, module in VERBS.items())
    text = BASH.format(verbs=" ".join(VERBS), cases=cases)
    return text if shell == "bash" else ZSH + text


def options_of(module: str) -> list[str]:
    """The options of a verb, in the order of its help text."""
    options = importlib.import_module(module).Options
    bare = without_names(options)
    return [*(option_name(field.name) for field in given_fields(options) if field.name not in bare), "--help"]
