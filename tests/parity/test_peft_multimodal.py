"""Adapters of the text part of a multimodal model, Gemma 3, against PEFT on the whole model."""

import shutil
import warnings

import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file

import llmq_jax as lq
from llmq_jax.errors import BadInput
from tests.parity.adapters import changed, moved
from tests.parity.decoders import LOGITS, draw_tokens, their_logits
from tests.parity.references import randomise

TEXT = {
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "sliding_window": 7,
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """(the folder of the whole model, ours of its text part)."""
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomise(model)
    folder = tmp_path_factory.mktemp("gemma3") / "base"
    model.save_pretrained(folder)
    with pytest.warns(UserWarning, match="other parts are ignored"):
        return folder, lq.load(folder)


@pytest.mark.parametrize("variant", ["lora", "tinylora"])
def test_adapters_go_onto_the_whole_model(multimodal, tmp_path, variant):
    folder, lm = multimodal
    ours = moved(lq.lora(lm, rank=2, variant=variant, layers=(0, 2)))
    lq.save_adapter(ours, tmp_path / "adapter", base=str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # by which PEFT tells of what it has not found
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [name for name, _ in theirs.named_parameters() if "vision_tower" in name and "lora" in name]
    tokens = draw_tokens(lm)
    expected = ours.logits(tokens)
    assert np.abs(expected - lm.logits(tokens)).max() > 0.05
    np.testing.assert_allclose(their_logits(theirs, tokens), expected, atol=LOGITS, rtol=0)
    with pytest.warns(UserWarning, match="other parts are ignored"):
        np.testing.assert_allclose(lq.load(tmp_path / "adapter").logits(tokens), expected, atol=1e-6, rtol=0)


def test_adapters_of_a_multimodal_model_fit_its_text_part(multimodal, tmp_path):
    """Names of transformers 5 and 4; patterns, too."""
    _, lm = multimodal
    ours = moved(lq.lora(lm, rank=2, targets="attention"))
    lq.save_adapter(ours, tmp_path / "text")
    tokens = draw_tokens(lm)
    for place, outer in enumerate(("model.language_model.", "language_model.model.")):

        def longer(state, outer=outer):
            return {
                name.replace("base_model.model.model.", f"base_model.model.{outer}"): x for name, x in state.items()
            }

        patterns = {"alpha_pattern": {rf"{outer}layers\.1\.self_attn\.q_proj": 7}}
        text = {"alpha_pattern": {r"model\.layers\.1\.self_attn\.q_proj": 7}}
        expected = lq.load_adapter(lm, changed(tmp_path / "text", tmp_path / f"{place}", text)).logits(tokens)
        found = lq.load_adapter(lm, changed(tmp_path / "text", tmp_path / f"{place} whole", patterns, longer))
        np.testing.assert_array_equal(found.logits(tokens), expected)
        assert np.abs(expected - ours.logits(tokens)).max() > 1e-4
    vision = {"base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight": np.zeros((2, 8), np.float32)}
    both = changed(tmp_path / "text", tmp_path / "both", None, lambda state: state | vision)
    with pytest.warns(UserWarning, match=r"1 tensors of other parts of its base are ignored: model\.vision_tower$"):
        np.testing.assert_array_equal(lq.load_adapter(lm, both).logits(tokens), ours.logits(tokens))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    long = name.replace("model.layers", "model.language_model.layers")
    twice = changed(tmp_path / "text", tmp_path / "twice", None, lambda state: state | {long: state[name]})
    with pytest.raises(BadInput, match=f"{long} and {name} are two names of one tensor; leave one out"):
        lq.load_adapter(lm, twice)
    alone = changed(tmp_path / "text", tmp_path / "alone", None, lambda state: vision)
    with pytest.warns(UserWarning, match="are ignored"), pytest.raises(BadInput, match="holds no adapter of a layer"):
        lq.load_adapter(lm, alone)


def test_a_base_that_is_not_on_this_computer_is_warned_of(multimodal, tmp_path, monkeypatch):
    folder, lm = multimodal
    ours = lq.lora(lm, rank=2, targets="attention", layers=(0,))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.warns(UserWarning, match="org/base is not on this computer, so that it cannot be seen whether it is"):
        lq.save_adapter(ours, tmp_path / "text", base="org/base")
    cached = tmp_path / "hub" / "models--org--base" / "snapshots" / "v1"
    cached.mkdir(parents=True)
    shutil.copy(folder / "config.json", cached)
    lq.save_adapter(ours, tmp_path / "whole", base="org/base@v1")
    for name, prefix in (("text", "model."), ("whole", "model.language_model.")):
        state = load_file(tmp_path / name / "adapter_model.safetensors")
        assert len(state) == 8  # A and B of four matrices
        assert all(key.startswith(f"base_model.model.{prefix}layers.0.self_attn.") for key in state)
