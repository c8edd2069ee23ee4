"""Classifiers of all architectures against transformers' `...ForSequenceClassification`: logits, gradients, folders.

transformers finds the last real token by its id: rows are padded with a token that stands in no text. Ours goes by
lengths or segments.
"""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers

from llmq_jax.interop import config_from_hf, config_to_hf, from_state_dict, to_state_dict
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load
from llmq_jax.models import build, init
from llmq_jax.objectives.classification import Classification
from llmq_jax.training.optimizer import decay_mask
from tests.parity.decoders import LOGITS, LOSS
from tests.parity.references import (
    assert_same_gradients,
    fields_of_transformers,
    numpy_gradients,
    numpy_state,
    randomise,
)

LABELS = ("ham", "spam", "it's complicated")
PAD, LENGTH = 0, 24
LENGTHS = np.array([LENGTH, 9, 1, 17])
CLASSES = np.array([2, 0, 1, 1])
SIZES = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}
FIELDS = {
    "gpt2": {"vocab_size": 101, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "llama": SIZES | {"num_key_value_heads": 2},
    "mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 7},
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 10},
    "mixtral": SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SIZES
    | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    | {"norm_topk_prob": True, "mlp_only_layers": [0]},
    "gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7, "final_logit_softcapping": 0.1},
    "gemma3_text": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
    "deepseek_v3": SIZES
    | {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    | {"moe_intermediate_size": 20, "num_key_value_heads": 4},
}
CLASSES_OF_TRANSFORMERS = {
    "gpt2": transformers.GPT2ForSequenceClassification,
    "llama": transformers.LlamaForSequenceClassification,
    "mistral": transformers.MistralForSequenceClassification,
    "qwen2": transformers.Qwen2ForSequenceClassification,
    "qwen3": transformers.Qwen3ForSequenceClassification,
    "mixtral": transformers.MixtralForSequenceClassification,
    "qwen3_moe": transformers.Qwen3MoeForSequenceClassification,
    "gemma2": transformers.Gemma2ForSequenceClassification,
    "gemma3_text": transformers.Gemma3TextForSequenceClassification,
    "deepseek_v3": transformers.DeepseekV3ForSequenceClassification,
}


def their_config(model_type, labels=LABELS):
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return transformers.AutoConfig.for_model(
        model_type, **FIELDS[model_type], **names, bos_token_id=1, eos_token_id=2, pad_token_id=PAD
    )


def their_model(model_type, labels=LABELS):
    config = their_config(model_type, labels)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    assert type(model) is CLASSES_OF_TRANSFORMERS[model_type]
    randomise(model)
    return model


@pytest.fixture(scope="module", params=FIELDS)
def pair(request):
    """(transformers' model with random weights, ours with the same)."""
    theirs = their_model(request.param)
    config = config_from_hf(theirs.config.to_dict() | {"architectures": [type(theirs).__name__]})
    lm = LanguageModel(config, build(config), from_state_dict(numpy_state(theirs), config))
    return theirs, lm


def rows(side="right", seed=0):
    """(tokens, whether each is real): texts of unequal length, none of which holds the padding's token."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(LENGTHS), LENGTH), PAD)
    for row, length in zip(tokens, LENGTHS, strict=True):
        start = 0 if side == "right" else LENGTH - length
        row[start : start + length] = rng.integers(1, 101, length)
    return tokens, tokens != PAD


def their_inputs(tokens, real):
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    inputs = {"input_ids": tokens, "attention_mask": real.astype(int), "position_ids": positions}
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in inputs.items()}


def their_logits(model, tokens, real):
    with torch.no_grad():
        return model(**their_inputs(tokens, real), use_cache=False).logits.float().numpy()


def test_logits(pair):
    theirs, ours = pair
    for side in ("right", "left"):
        tokens, real = rows(side)
        expected = their_logits(theirs, tokens, real)
        assert expected.std() > 0.5, "logits this flat would hide a fault"
        found = ours.classify(tokens, segment_ids=real.astype(int))
        np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)


def test_weight_decay_acts_on_the_same(pair):
    theirs, lm = pair
    decayed = jax.tree.map(lambda array, acts: np.full(array.shape, acts), lm.params, decay_mask(lm.params))
    ours = to_state_dict({**lm.variables, "params": decayed}, lm.config)
    names = transformers.Trainer.get_decay_parameter_names(None, theirs)
    trained = [name for name, _ in theirs.named_parameters() if name in ours]  # experts are stacked there
    assert {name for name in trained if ours[name].all()} == set(names) & set(trained)
    assert {name for name in trained if not ours[name].any()} == set(trained) - set(names)


WEIGHTS = (0.5, 3.0, 1.25)


@pytest.mark.parametrize(
    ("pair", "class_weights"),
    [*((model_type, WEIGHTS if place % 2 else None) for place, model_type in enumerate(FIELDS))],
    indirect=["pair"],
    ids=FIELDS,
)
def test_loss_and_gradients(pair, class_weights):
    """Their own loss, or by class weights as torch's CrossEntropyLoss has them, of every second architecture; rows that
    do not count are as if not there."""
    theirs, ours = pair
    tokens, real = rows()
    theirs.zero_grad()
    classes = torch.tensor(CLASSES)
    output = theirs(**their_inputs(tokens, real), labels=classes, use_cache=False)
    expected = output.loss
    if class_weights is not None:
        expected = torch.nn.functional.cross_entropy(output.logits, classes, weight=torch.tensor(class_weights))
    expected.backward()

    batch = {
        "tokens": np.append(tokens, tokens[::-1], axis=0).astype(np.int32),
        "lengths": np.append(LENGTHS, [0, 3, 3, 3]).astype(np.int32),
        "labels": np.append(CLASSES, [0, 1, 2, 0]).astype(np.int32),
        "mask": np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32),
    }
    objective = Classification(ours.model, class_weights)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss_and_gradients(variables, batch):
        return objective.loss(variables, batch, objective.weights(batch))[:2]

    (loss, metrics), gradients = loss_and_gradients(ours.variables, batch)
    assert abs(float(loss) - expected.item()) < LOSS
    right = (output.logits.detach().numpy().argmax(-1) == CLASSES).mean()
    assert float(metrics["accuracy"]) == pytest.approx(right)
    found = to_state_dict(gradients, ours.config)
    for name in [name for name, _ in theirs.named_buffers() if name in found]:
        assert not found.pop(name).any()
    assert_same_gradients(found, numpy_gradients(theirs, found))


def test_a_folder_of_transformers_is_loaded(pair, tmp_path):
    theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    lm = load(tmp_path)
    assert lm.config.labels == LABELS and lm.generation.pad_token_id == PAD
    tokens, real = rows()
    expected = their_logits(theirs, tokens, real)
    np.testing.assert_allclose(lm.classify(tokens, lengths=LENGTHS), expected, rtol=0, atol=LOGITS)


def test_a_folder_of_ours_is_loaded_by_transformers(pair, tmp_path):
    theirs, ours = pair
    save_hf(ours.replace(generation=GenerationConfig(pad_token_id=PAD)), tmp_path / "ours")
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert type(model) is type(theirs)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.num_labels == 3
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert model.config.pad_token_id == PAD
    # A batch, padded, which transformers refuses where there is no token for padding.
    tokens, real = rows()
    np.testing.assert_array_equal(their_logits(model.eval(), tokens, real), their_logits(theirs, tokens, real))
    # And back.
    again = load(tmp_path / "ours")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, again.variables, ours.variables)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text", "deepseek_v3"])
def test_a_scalar_head(model_type, tmp_path):
    theirs = their_model(model_type, labels=("reward",))
    theirs.save_pretrained(tmp_path)
    lm = load(tmp_path)
    tokens, real = rows()
    found = lm.classify(tokens, lengths=LENGTHS)
    assert lm.config.labels == ("reward",) and found.shape == (4, 1)
    np.testing.assert_allclose(found, their_logits(theirs, tokens, real), rtol=0, atol=LOGITS)


@pytest.mark.parametrize("model_type", FIELDS)
def test_exported_fields_are_those_of_transformers(model_type):
    config = config_from_hf(their_config(model_type).to_dict() | {"architectures": ["AForSequenceClassification"]})
    values = json.loads(json.dumps(config_to_hf(config)))
    assert values["architectures"] == [CLASSES_OF_TRANSFORMERS[model_type].__name__]
    theirs = transformers.AutoConfig.for_model(**values)
    older = {"num_experts"} if model_type == "qwen3_moe" else set()  # which transformers 5 reads and does not write
    assert set(fields_of_transformers(values)) <= set(theirs.to_dict()) | older
    assert config_from_hf(theirs.to_dict()) == config


def test_unnamed_classes_have_the_names_of_transformers(tmp_path):
    config = transformers.LlamaConfig(**FIELDS["llama"], num_labels=4, pad_token_id=PAD)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    assert (
        load(tmp_path).config.labels == tuple(config.id2label.values()) == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    )
    values = json.loads((tmp_path / "config.json").read_text())
    del values["id2label"], values["label2id"]
    assert config_from_hf(values).labels == ("LABEL_0", "LABEL_1")  # as in files of the default two


def test_the_classifier_of_a_multimodal_model(tmp_path):
    """Its text part is read, with its head."""
    text = transformers.Gemma3TextConfig(**FIELDS["gemma3_text"], pad_token_id=PAD)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **names)
    theirs = transformers.Gemma3ForSequenceClassification(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="tensors of other parts are ignored"):
        lm = load(tmp_path)
    assert lm.config.labels == LABELS
    tokens, real = rows()
    expected = their_logits(theirs, tokens, real)
    np.testing.assert_allclose(lm.classify(tokens, lengths=LENGTHS), expected, rtol=0, atol=LOGITS)


def padding_tokenizer(folder, pad_token, template):
    """Bytes with the special tokens <pad> and <s>; `pad_token` is what the files name, if anything."""
    import tokenizers

    from llmq_jax.data import ByteTokenizer, FileTokenizer

    ByteTokenizer().save(folder)
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.add_special_tokens(["<pad>", "<s>"])
    if template is not None:
        loaded.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 258), ("<|endoftext|>", 256)]
        )
    loaded.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if pad_token is not None:
        config["pad_token"] = pad_token
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad_token}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return FileTokenizer(folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model_type", "pad_token", "template", "chosen"),
    [
        ("llama", "<pad>", None, 257),  # not that of the model's generation config
        ("gpt2", None, None, 256),
        ("llama", "<|endoftext|>", "$A <|endoftext|>", 258),  # which ends every text
        ("gpt2", "<pad>", "<s> $A <|endoftext|>", 257),
    ],
)
def test_texts_go_the_whole_way_through_transformers(model_type, pad_token, template, chosen, tmp_path):
    """Their tokenizer pads with the token that their model takes for padding, and cuts as ours."""
    config = config_from_hf(their_config(model_type).to_dict() | {"architectures": ["AForSequenceClassification"]})
    config = dataclasses.replace(config, vocab_size=259)
    (tmp_path / "files").mkdir()
    tokenizer = padding_tokenizer(tmp_path / "files", pad_token, template)
    ends = GenerationConfig(pad_token_id=256 if chosen != 258 else None, eos_token_id=(256, 258))
    lm = LanguageModel(config, build(config), init(config, seed=3), tokenizer, ends)
    score = 50 * lm.params["score"]["kernel"]
    lm = lm.replace(variables={**lm.variables, "params": {**lm.params, "score": {"kernel": score}}})
    folder = save_hf(lm, tmp_path / "ours")

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.pad_token_id == model.config.pad_token_id == chosen
    texts = ["ok", "See you at ten", "Win!"]
    for longest in (None, 6):
        batch = theirs(texts, padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()
        rows, cut = lm.class_tokens(texts, longest)
        whole, _ = lm.class_tokens(texts)
        assert expected.std() > 0.3 and cut == sum(len(row) > (longest or 99) for row in whole)
        np.testing.assert_allclose(lm.classify_rows(rows), expected, rtol=0, atol=LOGITS)
    again = load(folder)
    np.testing.assert_allclose(again.classify(texts), lm.classify(texts), atol=1e-5)
