"""List the presets: published sizes by name, with their parameter counts.

--preset of train.pretrain also takes the names of complete runs, which set model and training; its --help names them.
"""

import json
from dataclasses import dataclass
from typing import Any

from llmq_jax.command_line import Flag

PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-10m": 9_540_864,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-moe-10m": 10_374_400,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-10m": 10_365_696,
    "deepseek-v3": 682_636_472_320,
    "moonlight-16b": 15_960_108_544,
    "deepseek-10m": 11_801_536,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-10m": 9_546_240,
}
"""What `count_parameters` gives for the presets here, which takes a tenth of a second for each."""


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
            row = {"preset": name, "model_type": config.model_type, "parameters": parameters(name, config), **fields}
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
            parameters(name, config),
        )
        table.add_row(name, config.model_type, *(f"{size:,}" for size in sizes))
    print_table(table)


def parameters(name: str, config: Any) -> int:
    """`count_parameters` of a preset, which a script may have added."""
    return PARAMETERS.get(name) or count_parameters(config)


def count_parameters(config: Any) -> int:
    """Parameters of a model of this config, tied ones once; from shapes alone, no array is made."""
    from llmq_jax.models import abstract_variables, parameter_count

    return parameter_count(abstract_variables(config)["params"])
