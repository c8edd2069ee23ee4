"""Inputs that readers once failed on, each the smallest of its kind."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmq_jax.data import GPT2Tokenizer, tokenizer_in
from llmq_jax.data.records import read_records
from llmq_jax.errors import BadInput
from llmq_jax.interop.architectures import config_from_hf
from llmq_jax.interop.safetensors_files import open_safetensors
from llmq_jax.interop.tensor_files import read_json
from llmq_jax.training.checkpoints import read_info
from llmq_jax.training.manifest import CorruptCheckpoint, verify_manifest
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.plots import training_curve
from llmq_jax.training.run_folder import RunFolder
from tests.fuzz.readers import (
    LLAMA,
    READERS,
    RUN,
    config_to_hf,
    tokenizer_files,
    use_tokenizer,
    vocabulary_files,
    write_files,
)

CLASSIFIER = ["XForSequenceClassification"]
NESTED, DIGITS = "[" * 100_000 + "]" * 100_000, "9" * 5_000


@pytest.mark.parametrize("content", [NESTED, DIGITS, '{"a": ' + NESTED + "}", '{"a": ' + DIGITS + "}"])
def test_json_that_python_does_not_read(tmp_path, content):
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(BadInput, match=r"JSON that cannot be read"):
            read_records(tmp_path / name)
    with pytest.raises(BadInput, match="cannot be read as JSON"):
        read_json(tmp_path / "data.json")
    tokenizer_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json is not a JSON object"):
        tokenizer_in(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": 1}, "architectures=1 is no list of names"),
        (
            {"architectures": ["XForSequenceClassification"], "num_labels": "2"},
            "num_labels='2' is no number of classes",
        ),
        ({"architectures": CLASSIFIER, "num_labels": 2**40}, "classes is not supported"),
        ({"architectures": CLASSIFIER, "id2label": {"0": 1}}, "has names that are no strings"),
        ({"architectures": CLASSIFIER, "id2label": {"0": "\ud800"}}, "has half a surrogate pair"),
        ({"architectures": CLASSIFIER, "problem_type": []}, "problem_type=[] is not supported"),
        ({"model_type": ["llama"]}, "model_type=['llama'] is no name"),
        ({"rms_norm_eps": 10**400}, "is not of the type float"),
        ({"rope_theta": 10**400, "rope_parameters": {"rope_type": "default"}}, "is not a number"),
        ({"head_dim": 2**63}, "is beyond all models"),
        ({"head_dim": 2**30}, "features are not supported"),
    ],
)
def test_configs(fields, message):
    with pytest.raises(BadInput) as caught:
        config_from_hf({**config_to_hf(LLAMA), **fields})
    assert message in str(caught.value)


def test_whole_numbers_where_there_should_be_others():
    config = config_from_hf({**config_to_hf(LLAMA), "attention_dropout": 0, "rms_norm_eps": 1})
    assert (type(config.attention_dropout), config.rms_norm_eps) == (float, 1.0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vocab.json", {"ab": 5}, "have the same id, 5"),
        ("vocab.json", {"x y": 2**40}, "which is not from 0 to"),
        ("vocab.json", {"x y": 2**30}, "which is not from 0 to"),
        ("vocab.json", {"\ud800": 500}, "holds half a surrogate pair"),
        ("added_tokens.json", {"a": 400}, "'a' has the id 400 here"),
        ("added_tokens.json", {"!": 0}, "'!' is a single byte"),
        ("added_tokens.json", {"": 400}, "token 400 is empty"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {}}},
            "must hold one JSON object, added_tokens_decoder",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}, "which is not from 0 to"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "a"}}}, "'a' has the id 7 here"),
    ],
)
def test_vocabularies(tmp_path, name, change, message):
    vocabulary_files(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        GPT2Tokenizer(tmp_path)


def test_a_merge_of_what_is_no_token(tmp_path):
    vocabulary_files(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na bc\n")  # of which "abc" is one
    with pytest.raises(BadInput, match="merge 1 has 'bc', which vocab"):
        GPT2Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", lambda values: values["model"].update(unk_token="<ujk>"), "cannot encode"),
        ("tokenizer.json", lambda values: values["post_processor"]["special_tokens"].clear(), "cannot encode"),
        (
            "tokenizer.json",
            lambda values: values["post_processor"]["single"].append({"Sequence": {"id": "A", "type_id": 0}}),
            "drops or repeats the text",
        ),
        ("special_tokens_map.json", lambda values: values.update(eos_token="\ud800"), "is not valid Unicode"),
    ],
)
def test_tokenizers(tmp_path, name, change, message):
    tokenizer_files(tmp_path)
    values = json.loads((tmp_path / name).read_text())
    change(values)
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(BadInput, match=message):
        use_tokenizer(tokenizer_in(tmp_path))


def test_a_shard_whose_name_is_too_long(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "%s.safetensors"}}' % ("x" * 300))
    with pytest.raises(BadInput, match="1 of 1 shards are not there: xxx"):
        open_safetensors(tmp_path)


def test_a_whole_number_of_dropout(tmp_path):
    reader = READERS["adapter"]
    parts = reader.parts()
    values = json.loads(parts["adapter_config.json"]) | {"lora_dropout": 1}
    write_files(tmp_path, {**parts, "adapter_config.json": json.dumps(values).encode()})
    reader.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"r": "2"},
        {"lora_alpha": []},
        {"lora_alpha": 10**400},
        {"lora_dropout": "a"},
        {"alpha_pattern": "a"},
        {"rank_pattern": {"q_proj": None}},
        {"rank_pattern": {"(": 2}},
        {"base_model_name_or_path": ["base"]},
    ],
)
def test_adapters(tmp_path, change):
    reader = READERS["adapter"]
    parts = reader.parts()
    values = json.loads(parts["adapter_config.json"]) | change
    write_files(tmp_path, {**parts, "adapter_config.json": json.dumps(values).encode()})
    with pytest.raises(BadInput, match=r"adapter_config\.json: "):
        reader.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {name: tensor[:0] if "lora_A" in name else tensor[:, :0] for name, tensor in state.items()},
            "has the rank 0; it needs at least 1",
        ),
        (
            lambda state: state | {"base_model.model.score.weight": np.ones((), np.float32)},
            r"score\.weight is \[\], and a head has two axes; save it again",
        ),
    ],
)
def test_adapters_of_odd_shapes(tmp_path, change, message):
    write_files(tmp_path, READERS["adapter"].parts())
    path = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(BadInput, match=message):
        READERS["adapter"].read(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", NESTED, '{"step": 1, "speed": 2}', "{}", '{"step": "1", "version": 1}'])
def test_checkpoints(tmp_path, content):
    (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(CorruptCheckpoint):
        read_info(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CorruptCheckpoint):
        verify_manifest(tmp_path)


def test_a_manifest_of_devices(tmp_path):
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "manifest.json").write_text('{"files": {"endless": {"size": 0, "sha256": ""}}}')
    with pytest.raises(CorruptCheckpoint, match="endless is no file"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", NESTED, "\xff"])
def test_the_report_of_a_run(tmp_path, content):
    write_files(tmp_path, {**READERS["run folder"].parts(), "finished.json": content.encode("latin-1")})
    with RunFolder(tmp_path, RUN) as run, pytest.raises(BadInput, match=r"finished\.json is damaged"):
        run.report()


@pytest.mark.parametrize("line", ['{"step": "1"}', '{"step": 1, "loss": []}', '{"step": 1, "loss": 1e999}', NESTED])
def test_metrics(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(BadInput, match=r"metrics\.jsonl"):
        training_curve(read_metrics(tmp_path / "metrics.jsonl"))
