"""Whether what a recipe trains can be exported."""

from typing import Any

from llmq_jax.errors import BadInput


def exports(config: Any) -> bool:
    """Whether transformers has a model of this config, with a place for each of its weights; none is made."""
    from llmq_jax.interop.architectures import config_to_hf, weight_table
    from llmq_jax.models import abstract_variables

    try:
        config_to_hf(config)
        weight_table(config.model_type).lazy_state_dict(abstract_variables(config), config)
    except BadInput:
        return False
    return True
