"""What a run proposes at its end: to ask the model, and to export it to transformers."""

import shlex
from typing import Any

from llmq_jax.errors import BadInput


def next_commands(folder: str, config: Any, converses: Any, prompt: str = "The") -> list[str]:
    """Commands for the run of a language model in this folder: to chat with it if it `converses`, else to continue the
    `prompt` (in a shell's words), and to export it."""
    out = shlex.quote(folder)
    ask = f"llmq chat {out}" if converses else f"llmq generate {out} --prompt {prompt}"
    return [ask + registering(config), *export_commands(folder, config)]


def registering(config: Any) -> str:
    """What is said beside a command of `llmq` for this model: "", unless a script has to register it first."""
    if type(config).__module__.startswith("llmq_jax."):
        return ""
    return f"    # by a script that registers {config.model_type}: docs/own_model.md"


def export_commands(folder: str, config: Any) -> list[str]:
    """The command that exports the run in this folder; none where transformers has no model of this config with a place
    for each of its weights. This is checked on shapes alone."""
    from llmq_jax.interop.architectures import config_to_hf, weight_table
    from llmq_jax.models import abstract_variables

    try:
        config_to_hf(config)
        weight_table(config.model_type).lazy_state_dict(abstract_variables(config), config)
    except BadInput:
        return []
    return [f"python -m convert.to_hf {shlex.quote(folder)} {shlex.quote(f'{folder}-hf')}"]
