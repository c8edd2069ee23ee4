"""python -m convert.parity: it finds a fault where it is, and nothing where there is none."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from convert import parity, parity_reference, parity_report, parity_weights
from convert.parity_check import _distribution, compare_models
from convert.parity_reference import VARIANTS, random_config, random_model, randomise
from convert.parity_trace import Difference, First, Place, first_difference
from convert.parity_weights import Gradient, first_gradient
from llmq_jax.errors import BadInput
from llmq_jax.interop import config_from_hf, config_to_hf
from llmq_jax.interop.architectures import SUPPORTED, weight_table
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.model_files import load
from llmq_jax.models import gpt2
from tests.interop.refusals import refused
from tests.smollm2 import smollm2_gguf

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder


def check(model, **options):
    config = options.pop("config", config_from_hf(model.config.to_dict()))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    return compare_models(model, config, tokens, **options)


def everywhere(places):
    for place in places:
        yield place
        yield from everywhere(place.parts)


def test_no_difference_where_there_is_none(model):
    found = check(model)
    assert first_difference(found.places, 1e-5) is None
    assert first_gradient(found.gradients, 1e-5) is None
    assert found.unmatched == ((), (), ())
    assert {gradient.key for gradient in found.gradients} == {name for name, _ in model.named_parameters()}

    names = [place.name for place in everywhere(found.places)]
    inside = ["output", "attention norm", "attention", "attention qkv", "attention out"]
    inside += ["mlp norm", "mlp", "mlp up", "mlp down"]
    assert names == [
        *("embeddings", "token embedding", "position embedding"),
        *(f"layer {layer}, {what}" for layer in range(3) for what in inside),
        *("final norm", "logits", "loss"),
    ]
    # Rounding differs in two frameworks: had nothing but zeros been found, nothing had been compared.
    assert found.output("logits").output.absolute > 0
    assert all(gradient.difference.absolute > 0 for gradient in found.gradients)


FAULTS = [
    ("token_embedding/embedding", "token embedding", "transformer.wte", "transformer.wte.weight"),
    ("group_0/block_0/attention_norm/scale[1]", "layer 1, attention norm", "transformer.h.1.ln_1", None),
    ("transformer.h.1.mlp.c_proj.weight", "layer 1, mlp down", "transformer.h.1.mlp.c_proj", None),
    ("final_norm/bias", "final norm", "transformer.ln_f", "transformer.ln_f.bias"),
]
MORE_FAULTS = [
    ("transformer.wpe.weight", "position embedding", "transformer.wpe", "transformer.wpe.weight"),
    ("transformer.h.0.attn.c_attn.bias", "layer 0, attention qkv", "transformer.h.0.attn.c_attn", None),
    ("params/group_0/block_0/mlp/up/kernel[2]", "layer 2, mlp up", "transformer.h.2.mlp.c_fc", None),
]
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("name", "place", "theirs", "key"), [*FAULTS, *(pytest.param(*fault, marks=EXHAUSTIVE) for fault in MORE_FAULTS)]
)
def test_an_injected_fault_is_found_where_it_is(model, name, place, theirs, key):
    found = check(model, inject=name)
    first = first_difference(found.places, TOLERANCE)
    assert (first.place.name, first.place.theirs, first.before) == (place, theirs, False)
    assert str(first) == f"{place} ({theirs})"
    changed = [key for key, difference in found.weights.items() if difference > 0]
    assert len(changed) == 1 and changed[0] in first.place.keys
    assert key in (None, changed[0])
    gradient = next(gradient for gradient in found.gradients if gradient.key == changed[0])
    assert gradient.difference.above(TOLERANCE)
    assert name.removeprefix("params/") in (gradient.key, gradient.ours)


def test_llama_by_its_weight_table_alone():
    """Nothing in the check knows of an architecture: parts, gradients and faults are found as GPT-2's are."""
    model = random_model("llama")
    found = check(model)
    # transformers in float32 is itself 1e-5 away from transformers in float64 here.
    assert first_difference(found.places, TOLERANCE) is None
    assert first_gradient(found.gradients, TOLERANCE) is None
    assert found.unmatched == ((), (), ())
    assert {gradient.key for gradient in found.gradients} == {name for name, _ in model.named_parameters()}
    names = [place.name for place in everywhere(found.places)]
    attention = ["attention", *(f"attention {part}" for part in ("query", "key", "value", "out"))]
    inside = ["output", "attention norm", *attention, "mlp norm", "mlp", "mlp gate", "mlp up", "mlp down"]
    layers = [f"layer {layer}, {what}" for layer in range(3) for what in inside]
    assert names == ["embeddings", "token embedding", *layers, "final norm", "logits", "loss"]

    first = first_difference(check(model, inject="model.layers.1.self_attn.k_proj.weight").places, TOLERANCE)
    assert str(first) == "layer 1, attention key (model.layers.1.self_attn.k_proj)"
    # A fault in the frequencies is seen where queries and keys have met.
    config = config_from_hf(model.config.to_dict())
    other = dataclasses.replace(config.rope_parameters, high_freq_factor=3.0)
    found = check(model, config=dataclasses.replace(config, rope_parameters=other))
    first = str(first_difference(found.places, TOLERANCE))
    assert first == "layer 0, input of attention out (model.layers.0.self_attn.o_proj)"


def test_layers_after_a_fault_agree(model):
    """They are given what transformers' were, so that each shows its own faults; in the end all is seen."""
    found = check(model, inject="transformer.h.0.mlp.c_proj.bias")
    layers = [place for place in found.places if place.layer is not None]
    assert [place.layer for place in layers if place.output.above(1e-5)] == [0]
    assert layers[1].input.above(TOLERANCE)
    assert found.output("logits").output.above(TOLERANCE)


def test_rounding_explains_as_much_as_other_last_bits_do(model):
    """The reference is as it was afterwards, bit by bit."""
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    found = check(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    logits = found.output("logits").output
    assert 0 < logits.relative < logits.rounding < 1e-4
    with parity_reference.nudged(model):
        for name, tensor in model.named_parameters():
            changed = (tensor != before[name]) & (before[name] != 0)
            assert changed.float().mean() > 0.99
            torch.testing.assert_close(tensor, before[name], rtol=2**-22, atol=1e-30)
    noisy = Difference(1.0, 2e-4, rounding=3e-4)
    assert not noisy.above(TOLERANCE)
    assert noisy._replace(relative=4e-4).above(TOLERANCE)
    assert Difference(1.0, float("nan"), rounding=float("nan")).above(TOLERANCE)


@EXHAUSTIVE
def test_gemma_by_its_weight_table_alone():
    """Layers of two kinds in several groups, and norms after sub-layers.

    Norms by head are no places: transformers has heads before positions there.
    """
    model, layers = random_model("gemma3_text"), 7
    found = check(model)
    assert first_difference(found.places, TOLERANCE) is None
    assert first_gradient(found.gradients, TOLERANCE) is None
    assert found.unmatched == ((), (), ())
    assert {gradient.key for gradient in found.gradients} == {name for name, _ in model.named_parameters()}
    names = [place.name for place in everywhere(found.places) if place.name.startswith(f"layer {layers - 1}, ")]
    inside = ["post attention norm", "mlp norm", "post mlp norm", "attention norm", "attention query", "mlp gate"]
    assert set(names) >= {f"layer {layers - 1}, {what}" for what in inside}
    first = first_difference(check(model, inject="model.layers.1.post_feedforward_layernorm.weight").places, TOLERANCE)
    assert str(first) == "layer 1, post mlp norm (model.layers.1.post_feedforward_layernorm)"


@pytest.mark.exhaustive
def test_mixtral_by_its_weight_table_alone():
    """Experts that are one tensor in transformers' memory and many in its files; the parts of ours are no modules."""
    model = random_model("mixtral")
    found = check(model)
    assert first_difference(found.places, TOLERANCE) is None
    assert first_gradient(found.gradients, TOLERANCE) is None
    assert found.unmatched == ((), (), ())
    assert sum(gradient.key.endswith(".w1.weight") for gradient in found.gradients) == 3 * 6
    names = [place.name for place in everywhere(found.places) if place.name.startswith("layer 2, m")]
    assert names == ["layer 2, mlp norm", "layer 2, moe", "layer 2, moe router"]
    for inject, place in (
        ("group_0/block_0/moe/up_kernel[1, 5, :, 1, :]", "layer 1, moe (model.layers.1.mlp)"),
        ("group_0/block_0/moe/router/kernel[1]", "layer 1, moe router (model.layers.1.mlp.gate)"),
    ):
        assert str(first_difference(check(model, inject=inject).places, TOLERANCE)) == place


def test_of_a_multimodal_model_the_text_is_compared(tmp_path, capsys):
    text = config_to_hf(random_config("gemma3_text")) | {"num_hidden_layers": 2, "layer_types": None, "pad_token_id": 0}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    randomise(model)
    model.save_pretrained(tmp_path)
    assert parity.main(parity.Options(str(tmp_path))) == 0
    assert "model.layers.N" in capsys.readouterr().out


@EXHAUSTIVE
def test_dynamic_rope_is_compared_beyond_the_trained_length(tmp_path, capsys):
    seed = next(seed for seed in range(1, 99) if random_config("llama", seed).rope_parameters.rope_type == "dynamic")
    random_model("llama", seed).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 16
    assert parity.main(parity.Options(str(tmp_path))) == 0
    assert f"2 x {parity.ROW} random tokens" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--length 65 exceeds the model's context; choose at most 64"):
        parity.main(parity.Options(str(tmp_path), length=65))

    model = random_model("llama", seed)
    config = config_from_hf(model.config.to_dict())
    other = dataclasses.replace(config.rope_parameters, factor=4.1)
    config = dataclasses.replace(config, max_position_embeddings=64, rope_parameters=other)
    first = str(first_difference(check(model, config=config).places, TOLERANCE))
    assert first == "layer 0, input of attention out (model.layers.0.self_attn.o_proj)"


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_every_seed_makes_a_model(model_type):
    """Of gemma3_text none with dynamic frequencies, which transformers has for all layers or none."""
    for seed in range(12):
        random_model(model_type, seed)


def test_seeds_vary_what_models_of_an_architecture_differ_in():
    configs = [random_config("llama", seed) for seed in range(30)]
    assert configs[1] == random_config("llama", 1)
    for field, options in VARIANTS.items():
        found = {getattr(config, field) for config in configs}
        assert len(found) == len(options), field
    assert len({random_config("gpt2", seed).tie_word_embeddings for seed in range(30)}) == 2


def test_the_head_of_an_untied_model_is_a_place():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=24, n_embd=12, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert first_difference(check(model).places, TOLERANCE) is None
    first = first_difference(check(model, inject="lm_head/kernel").places, TOLERANCE)
    assert str(first) == "lm head (lm_head)"


@pytest.mark.exhaustive
def test_a_fault_between_two_modules_is_found_between_them(model, monkeypatch):
    """Weights are the same: it is the activation, the scale of attention, and the sum that goes into a norm."""
    config = config_from_hf(model.config.to_dict())
    found = check(model, config=dataclasses.replace(config, activation_function="gelu"))
    assert str(first_difference(found.places, TOLERANCE)) == "layer 0, input of mlp down (transformer.h.0.mlp.c_proj)"
    assert not any(found.weights.values())

    found = check(model, config=dataclasses.replace(config, layer_norm_epsilon=1e-5))
    assert str(first_difference(found.places, TOLERANCE)) == "layer 0, attention norm (transformer.h.0.ln_1)"

    # The norm would not see a mere factor.
    hook = model.transformer.h[1].ln_2.register_forward_pre_hook(lambda _, args: (args[0] + 0.1 * args[0] ** 2,))
    first = str(first_difference(check(model).places, TOLERANCE))
    hook.remove()
    assert first == "layer 1, input of mlp norm (transformer.h.1.ln_2)"

    hook = model.transformer.h[2].register_forward_pre_hook(lambda _, args: (args[0] * 1.01, *args[1:]))
    first = str(first_difference(check(model).places, TOLERANCE))
    hook.remove()
    assert first == "layer 2, input (transformer.h.2)"

    jax.clear_caches()  # or what was compiled with the exact one would run
    exact = gpt2.attention
    monkeypatch.setattr(gpt2, "attention", lambda *args, scale, **options: exact(*args, scale=1.1 * scale, **options))
    first = str(first_difference(check(model).places, TOLERANCE))
    jax.clear_caches()
    assert first == "layer 0, input of attention out (transformer.h.0.attn.c_proj)"


def test_parameters_of_one_side_only_are_named(model):
    """As in the middle of a port: a rule is missing, another has a wrong name. What there is runs all the same."""
    table = weight_table("gpt2")
    rules = {rule.key: rule for rule in table.rules}
    del rules["transformer.h.{layer}.attn.c_proj.bias"]
    rules["transformer.ln_f.bias"] = rules["transformer.ln_f.bias"]._replace(key="transformer.ln_f.shift")
    found = check(model, table=dataclasses.replace(table, rules=tuple(rules.values())))
    biases = tuple(f"transformer.h.{layer}.attn.c_proj.bias" for layer in range(3))
    assert found.unmatched.theirs == (*biases, "transformer.ln_f.bias")
    assert found.unmatched.ours == ("final_norm/bias", "group_0/block_0/attention/out/bias")
    first = first_difference(found.places, TOLERANCE)
    assert first.place.name == "layer 0, attention out"

    config = dataclasses.replace(config_from_hf(model.config.to_dict()), intermediate_size=40)
    shapes = check(model, config=config).unmatched.other_shape
    assert shapes[0] == "transformer.h.0.mlp.c_fc.weight [24, 56], by our config [24, 40]"


def run(*arguments):
    command = [sys.executable, "-m", "convert.parity", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


def test_command_on_a_folder(folder):
    done = run(folder, "--length", 16)
    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.splitlines()[-1]
    assert last.startswith("parity: ") and last.endswith(" largest difference in logits, tolerance 1e-4")
    for text in ("attention norm", "embeddings", "final norm", "transformer.wpe.weight", "mlp.c_proj.bias"):
        assert text in done.stdout
    assert "*" not in done.stdout and "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_command_on_a_random_model_with_a_fault(program):
    """In this process: a new one's exit code is looked at above and below."""
    words = ("--random", "gpt2", "--seed", "1", "--inject", "transformer.h.1.ln_1.weight")
    code, out, err = program("convert.parity", *words)
    assert (code, err) == (1, "")
    last = out.splitlines()[-1]
    assert last.startswith("first difference: layer 1, attention norm (transformer.h.1.ln_1): ")
    assert "  transformer.h.1.ln_1.weight  differs by up to " in out
    assert "  transformer.h.1.ln_1.bias  the same on both sides" in out


def test_float32_is_compared_in_float32_on_a_gpu_too(model, monkeypatch):
    """Where JAX multiplies in TF32 unless told otherwise; PyTorch's side is exact."""

    def trace(*_):
        lowered = jax.jit(jnp.matmul).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).as_text()
        raise BadInput("HIGHEST" if "precision = [HIGHEST, HIGHEST]" in lowered else "TF32")

    monkeypatch.setattr("convert.parity_check.parity_trace.trace", trace)
    with pytest.raises(BadInput, match="HIGHEST"):
        check(model)


def test_command_on_an_architecture_that_is_not_here(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    path = tmp_path / "config.json"
    assert done.stderr == f"error: {path}: model_type 'bert' is not supported; supported: {SUPPORTED}\n"


def test_predictions_are_compared_token_by_token():
    exact, found = np.full((1, 3, 2), 0.5), np.array([[[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]]])
    divergence = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    numbers = _distribution("ours", np.log(found), np.log(exact))[1:]
    np.testing.assert_allclose(numbers, (divergence * 2 / 3, divergence, 2 / 3), rtol=1e-5)


@pytest.mark.exhaustive
def test_bfloat16_is_compared_by_what_is_predicted(folder, capsys):
    assert parity.main(parity.Options(str(folder), dtype="bf16")) == 0
    out = capsys.readouterr().out
    assert "mean KL" in out and "same top-1" in out
    assert out.splitlines()[-1].startswith("parity: ") and out.splitlines()[-1].endswith("tolerance 1e-3")
    assert parity.main(parity.Options(random="mixtral", dtype="bf16")) == 0
    capsys.readouterr()
    assert parity.main(parity.Options(str(folder), dtype="bf16", inject="transformer.wte.weight")) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("no parity: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a Hugging Face folder, or --random"),
        ({"model": "{folder}", "random": "gpt2"}, "give either a Hugging Face folder, or --random"),
        ({"random": "gpt3"}, "--random gpt3: there is no such architecture; did you mean gpt2?"),
        ({"model": "{folder}/nowhere"}, "there is no such file or folder"),
        ({"model": "{folder}/config.json"}, "has no config.json"),
        ({"model": "{folder}", "length": 65}, "--length 65 exceeds the model's context; choose at most 64"),
        ({"model": "{folder}", "length": 1}, "--length 1 is too small; choose at least 2"),
        ({"model": "{folder}", "batch_size": 0}, "--batch-size 0 is too small; choose at least 1"),
        ({"model": "{folder}", "tolerance": 0.0}, "--tolerance 0.0 is not positive"),
        ({"model": "{folder}", "inject": "transformer.h.1.ln_1.weigth"}, "did you mean transformer.h.1.ln_1.weight"),
        (
            {"model": "{folder}", "inject": "group_0/block_0/mlp/up/bias"},
            "name one of group_0/block_0/mlp/up/bias[0] to group_0/block_0/mlp/up/bias[2]",
        ),
    ],
)
def test_bad_options(folder, options, message):
    options = {
        name: value.format(folder=folder) if isinstance(value, str) else value for name, value in options.items()
    }
    assert message in refused(parity.main, parity.Options(**options))


def test_a_run_folder_is_exported_first(tmp_path):
    (tmp_path / "config.json").write_text('{"llmq_jax_run": 1, "steps": 3}')
    assert refused(parity.main, parity.Options(str(tmp_path))) == (
        f"{tmp_path}: has no config.json with a model_type; give a Hugging Face folder (python -m convert.to_hf writes "
        "one)"
    )


def test_bad_folders(folder, tmp_path):
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match=f"{damaged}: transformers cannot load it") as error:
        parity.main(parity.Options(str(damaged)))
    assert "\n" not in str(error.value)

    lacking = tmp_path / "lacking"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "transformer.h.1.ln_2.bias"}
    model.save_pretrained(lacking, state_dict=state)
    with pytest.raises(BadInput, match=r"lacks weights that transformers needs: transformer\.h\.1\.ln_2\.bias"):
        parity.main(parity.Options(str(lacking)))


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_extra_is_named_where_it_is_not_installed(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=rf"{name} is not installed: pip install -e '\.\[test\]'"):
        parity.main(parity.Options(str(folder)))


@pytest.mark.parametrize("width", [80, 120])
def test_many_layers_fit_the_screen(width):
    console = Console(width=width, record=True, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    small = Difference(1e-6, 1e-6)
    names = ("attention_norm", "attention", "post_attention_norm", "mlp_norm", "mlp", "post_mlp_norm")
    places = [
        Place(layer, (), "", (), small, parts=tuple(Place(layer, (name,), "", (), small) for name in names))
        for layer in range(40)
    ]
    parity_report.show_hidden_states(console, places, TOLERANCE, None)
    kinds = ("input_layernorm.weight", "self_attn.q_proj.weight", "mlp.experts.0.w1.weight", "mlp.experts.1.w1.weight")
    gradients = [
        Gradient(f"model.layers.{layer}.{kind}", kind, layer, Difference(1.0, 1e-6 * (layer + 1)))
        for layer in range(40)
        for kind in kinds
    ]
    parity_report.show_gradients(console, gradients, TOLERANCE)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for layer in range(40):
        assert f"{1e-6 * (layer + 1):.1e}" in text, "a layer is not shown"
    assert "mlp.experts.*.w1.weight" in text and "…" not in text
    assert not any(map(str.isspace, text.splitlines()))  # a table that goes on has no title


STYLES = {"32": "good:", "33": "near:", "1;31": "bad:", "1;7;31": "first:"}


def shown(show, *given):
    """The lines of words that are shown, with the styles of numbers before them."""
    null = open(os.devnull, "w")  # noqa: SIM115
    console = Console(width=80, record=True, file=null, highlight=False, color_system="standard", force_terminal=True)
    show(console, *given)
    text = re.sub("\x1b\\[([0-9;]+)m *", lambda code: " " + STYLES.get(code[1], ""), console.export_text(styles=True))
    return [" ".join(line.split()) for line in text.splitlines()]


def test_tables_show_where_it_differs():
    good, near, bad = Difference(2e-6, 1e-6), Difference(9e-5, 5e-5), Difference(0.5, 0.25)
    norm = Place(0, ("mlp_norm",), "h.0.ln", (), near, good)
    mlp = Place(0, ("mlp",), "h.0.mlp", ("h.0.mlp.weight", "h.0.mlp.bias"), bad, near)
    block = Place(0, (), "h.0", (), bad, parts=(norm, mlp))
    # Of layer 1 a part alone is known.
    places = [Place(None, ("embeddings",), "wte", (), good), block, Place(1, ("mlp",), "", (), good)]
    places += [Place(1, ("mlp_norm",), "", (), near), Place(None, ("logits",), "", (), bad)]
    first = first_difference(places, TOLERANCE)
    assert shown(parity_report.show_hidden_states, places, TOLERANCE, first)[3:] == [
        "embeddings 2.0e-06 good:1.0e-06",
        "0 9.0e-05 near:5.0e-05 5.0e-01 first:*2.5e-01 5.0e-01 bad:*2.5e-01",
        "1 9.0e-05 near:5.0e-05 2.0e-06 good:1.0e-06",
        "logits 5.0e-01 bad:*2.5e-01",
    ]
    whole = First(block, False, tuple(places))
    row = shown(parity_report.show_hidden_states, places, TOLERANCE, whole)[4]
    assert row == "0 9.0e-05 near:5.0e-05 5.0e-01 bad:*2.5e-01 5.0e-01 first:*2.5e-01"
    weights = {"h.0.mlp.bias": 0.0, "h.0.mlp.weight": 0.125}
    assert shown(parity_report.show_first, first, TOLERANCE, weights)[3:] == [
        "layer 0, mlp norm h.0.ln good:1.0e-06 near:5.0e-05",
        "layer 0, mlp h.0.mlp near:5.0e-05 bad:*2.5e-01",
        "",
        "The same goes into layer 0, mlp, and something else comes out.",
        "It reads:",
        "h.0.mlp.weight bad:differs by up to 1.2e-01",
        "h.0.mlp.bias the same on both sides",
    ]
    for found, told in (
        (whole, "The parts of layer 0, output agree: look at what it makes of them."),
        (
            First(mlp, True, (norm, mlp)),
            "What goes into layer 0, mlp differs, and what comes before agrees: look between.",
        ),
    ):
        assert shown(parity_report.show_first, found, TOLERANCE, weights)[-1] == told


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return save_hf(load(smollm2_gguf()), tmp_path_factory.mktemp("smollm2"))


@pytest.mark.slow
def test_a_trained_model_of_which_places_magnify_rounding(smollm2, capsys):
    """Activations hundreds of times as large as others: a change of the last bits is above the tolerance after some."""
    status = parity.main(parity.Options(str(smollm2)))
    out = capsys.readouterr().out
    assert status == 0, out[-2000:]
    assert out.splitlines()[-1].startswith("parity: ")
    assert "*" not in out


@pytest.mark.slow
def test_small_faults_of_a_trained_model(smollm2, monkeypatch):
    """A hundredth of the usual perturbation, in the midst of the places that magnify rounding; an epsilon 2% off."""
    monkeypatch.setattr(parity_weights, "PERTURBATION", 1e-3)
    model = parity_reference.load(smollm2)
    first = first_difference(check(model, inject="model.layers.9.mlp.down_proj.weight").places, TOLERANCE)
    assert (first.place.theirs, first.before) == ("model.layers.9.mlp.down_proj", False)
    config = config_from_hf(model.config.to_dict())
    found = check(model, config=dataclasses.replace(config, rms_norm_eps=1.02e-5))
    assert str(first_difference(found.places, TOLERANCE)) == "layer 0, attention norm (model.layers.0.input_layernorm)"


def test_random_models_hide_nothing(model):
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        output = model(tokens, output_attentions=True)
    assert output.logits.std() > 1, "logits this flat would hide a fault"
    assert output.attentions[0].max() > 0.5, "attention this flat would hide a fault"
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.1, f"{name} is constant"
    assert not torch.equal(random_model("gpt2", seed=1).lm_head.weight, model.lm_head.weight)
