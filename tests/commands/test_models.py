import json

import jax

import llmq_jax as lq
from llmq_jax.commands.models import PARAMETERS, count_parameters

# Published counts, the tied head once: transformers' `model.num_parameters()`.
GPT2_PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
}


def test_the_counts_that_are_shown_are_those_of_the_models():
    assert {name: count_parameters(config) for name, config in lq.models.PRESETS.items()} == PARAMETERS


def test_table_has_every_preset_with_its_published_size(llmq):
    code, out, _ = llmq("models")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:] if line.strip()}
    assert set(rows) == set(lq.models.PRESETS)
    for name, count in GPT2_PARAMETERS.items():
        config = lq.preset(name)
        heads = config.num_attention_heads
        sizes = (config.num_hidden_layers, config.hidden_size, heads, heads, 1024, count)
        assert rows[name] == ["gpt2", *(f"{size:,}" for size in sizes)]
    assert rows["smollm2-135m"][3:5] == ["9", "3"]
    assert rows["smollm2-1.7b"][3:5] == ["32", "32"]


def test_json_is_the_config(llmq, monkeypatch, tiny_config):
    monkeypatch.setitem(lq.models.PRESETS, "mine", tiny_config)
    _, out, _ = llmq("models", "--json")
    rows = {row.pop("preset"): row for row in map(json.loads, out.splitlines())}
    assert rows["mine"]["parameters"] == count_parameters(tiny_config)
    row = rows["gpt2-355m"]
    assert (row.pop("model_type"), row.pop("parameters")) == ("gpt2", 354_823_168)
    assert lq.GPT2Config(**row) == lq.preset("gpt2-355m")


def test_count_is_that_of_real_arrays(tiny_config):
    leaves = jax.tree.leaves(lq.init(tiny_config)["params"])
    assert count_parameters(tiny_config) == sum(leaf.size for leaf in leaves)
