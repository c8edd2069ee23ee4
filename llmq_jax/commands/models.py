"""List the presets: published sizes by name, with their parameter counts.

--preset of train.pretrain also takes the names of complete runs, which set model and training; its --help names them.
"""

import json
from dataclasses import dataclass
from typing import Any

from llmq_jax.options import Flag


@dataclass(frozen=True)
class Options:
    json: Flag = False
    """Print one line of JSON for each preset, with its whole config."""


def main(options: Options) -> None:
    import dataclasses

    from rich.table import Table

    from llmq_jax.commands.tables import print_table
    from llmq_jax.models import PRESETS

    if options.json:
        for name, config in PRESETS.items():
            fields = dataclasses.asdict(config)
            row = {"preset": name, "model_type": config.model_type, "parameters": count_parameters(config), **fields}
            print(json.dumps(row))
        return

    table = Table("preset", "type", box=None, header_style="bold", pad_edge=False)
    for title in ("layers", "width", "heads", "kv", "context", "parameters"):
        table.add_column(title, justify="right")
    for name, config in PRESETS.items():
        sizes = (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            config.max_position_embeddings,
            count_parameters(config),
        )
        table.add_row(name, config.model_type, *(f"{size:,}" for size in sizes))
    print_table(table)


def count_parameters(config: Any) -> int:
    """Parameters of a model of this config, tied ones once; from shapes alone, no array is made."""
    from llmq_jax.models import abstract_variables, parameter_count

    return parameter_count(abstract_variables(config)["params"])
