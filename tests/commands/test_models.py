import functools
import json

import jax
import pytest

import llmq_jax as lq
from llmq_jax.commands.models import count_parameters

# Published counts, the tied head once: transformers' `model.num_parameters()`.
GPT2_PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
}


counted_once = functools.cache(count_parameters)


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    """Every preset is traced to be counted, which takes seconds: once, for all commands here."""
    monkeypatch.setattr("llmq_jax.commands.models.count_parameters", counted_once)


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


def test_json_is_the_config(llmq):
    _, out, _ = llmq("models", "--json")
    rows = {row.pop("preset"): row for row in map(json.loads, out.splitlines())}
    row = rows["gpt2-355m"]
    assert (row.pop("model_type"), row.pop("parameters")) == ("gpt2", 354_823_168)
    assert lq.GPT2Config(**row) == lq.preset("gpt2-355m")


def test_count_is_that_of_real_arrays(tiny_config):
    leaves = jax.tree.leaves(lq.init(tiny_config)["params"])
    assert count_parameters(tiny_config) == sum(leaf.size for leaf in leaves)
