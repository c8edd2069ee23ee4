"""How a run's model is exported to transformers."""

import shlex
from typing import Any

from llmq_jax.errors import BadInput


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
