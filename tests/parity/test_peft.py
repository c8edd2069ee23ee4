"""Adapters against PEFT, on disk both ways: logits, gradients, what is refused."""

import contextlib
import dataclasses
import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tokenizers
import torch
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file, save_file

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.interop.peft import PREFIX, experts_module, sites_of
from llmq_jax.interop.peft_config import FIELDS as FIELDS_READ
from llmq_jax.interop.peft_config import PLAIN, ends_with
from llmq_jax.interop.peft_reader import base_of
from llmq_jax.interop.peft_writer import _short_names
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers import lora
from llmq_jax.model_files import has_config
from llmq_jax.objectives import NextToken
from tests.interop.refusals import refused
from tests.parity.adapters import FIELDS, adapted_by, base_pair, changed, moved
from tests.parity.decoders import LOGITS, LOSS, draw_tokens, make_pair, their_logits

SOME = {
    "gpt2": ["attn.c_attn", "c_fc"],
    "deepseek_v3": ["q_b_proj", "kv_b_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def peft_config(kind, model_type):
    """What PEFT is asked for; everything starts random, so that it changes something."""
    some = SOME.get(model_type, ["q_proj", "down_proj"])
    common = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    if kind == "all":
        experts = EXPERTS if model_type in ("mixtral", "qwen3_moe", "deepseek_v3") else {}
        return peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **experts, **common)
    if kind == "some layers, rslora, dora":
        fields = {"use_dora": True, "use_rslora": True, "layers_to_transform": [0, 2]}
        return peft.LoraConfig(r=4, target_modules=some, **fields, **common)
    if kind == "patterns":
        patterns = {"rank_pattern": {some[0]: 5}, "alpha_pattern": {some[1]: 20, f"2.*{some[0]}": 3}}
        return peft.LoraConfig(r=2, target_modules=some, **patterns, **common)
    assert kind == "tinylora"
    start = {"init_weights": "uniform", "init_v_bound": 0.3}
    return peft.TinyLoraConfig(r=2, u=5, weight_tying=0.6, target_modules="all-linear", task_type="CAUSAL_LM", **start)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    return functools.cache(lambda model_type: base_pair(model_type, tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def pair(request, pair_of):
    """(a function that gives transformers' model anew, ours)."""
    return pair_of(request.param)


KINDS = ("all", "some layers, rslora, dora", "patterns", "tinylora")
# Conv1D, whose weights lie the other way round, has every kind; experts and latents have what is said of them alone.
CASES = [
    *(("gpt2", kind) for kind in KINDS),
    *(("llama", kind) for kind in KINDS[1:3]),
    *(("mixtral", kind) for kind in ("all", "tinylora")),
    *(("deepseek_v3", kind) for kind in ("all", "some layers, rslora, dora", "tinylora")),
    *zip(("gemma3_text", "qwen3", "qwen2", "gemma2"), KINDS, strict=True),
    ("qwen3_moe", "all"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pair", "kind"), CASES, indirect=["pair"])
@pytest.mark.product
def test_adapters_of_peft_and_back(pair, kind, tmp_path):
    anew, lm = pair
    adapted = adapted_by(anew(), peft_config(kind, lm.config.model_type))
    adapted.save_pretrained(tmp_path / "theirs")
    tokens = draw_tokens(lm)
    expected = their_logits(adapted, tokens)
    ours = lq.load_adapter(lm, tmp_path / "theirs")
    assert np.abs(expected - lm.logits(tokens)).max() > 0.05
    np.testing.assert_allclose(ours.logits(tokens), expected, atol=LOGITS, rtol=0)
    np.testing.assert_allclose(lq.merge(ours).logits(tokens), expected, atol=LOGITS, rtol=0)

    lq.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(anew(), tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(back, tokens), expected, atol=LOGITS, rtol=0)
    again, first = (jax.tree.leaves(lora.merge(x.variables)) for x in (lq.load_adapter(lm, tmp_path / "ours"), ours))
    assert max(np.abs(a - b).max() for a, b in zip(again, first, strict=True)) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("pair", "fields"),
    [
        ("gpt2", {"rank": 3, "alpha": 7.0}),  # Conv1D
        ("mixtral", {"rank": 4, "use_rslora": True, "dropout": 0.25, "targets": "attention"}),
        ("mixtral", {"rank": 2, "layers": (1,)}),  # experts
        ("gpt2", {"rank": 2, "variant": "dora", "targets": "attention"}),
        ("mixtral", {"rank": 3, "variant": "lora-xs", "targets": "attention"}),
        ("gpt2", {"rank": 2, "variant": "lora-xs", "targets": "attention"}),
        ("gpt2", {"rank": 2, "variant": "tinylora", "numbers": 4, "tied": True, "targets": "attention"}),
        ("mixtral", {"rank": 2, "variant": "tinylora", "numbers": 4, "alpha": 5.0, "layers": (0, 2)}),
        ("qwen3_moe", {"rank": 2, "variant": "tinylora", "tied": True, "targets": ("attention", "mlp", "router")}),
    ],
    indirect=["pair"],
)
def test_adapters_of_ours_load_in_peft(pair, fields, tmp_path):
    anew, lm = pair
    ours = moved(lq.lora(lm, **fields))
    lq.save_adapter(ours, tmp_path / "ours", base="org/base")
    with (tmp_path / "ours" / "adapter_config.json").open() as file:
        written = json.load(file)
    assert written["base_model_name_or_path"] == "org/base"
    if written["peft_type"] == "LORA":
        assert written["lora_dropout"] == fields.get("dropout", 0.0)
    loaded = peft.PeftModel.from_pretrained(anew(), tmp_path / "ours").eval()
    tokens = draw_tokens(lm)
    expected = ours.logits(tokens)
    assert np.abs(expected - lm.logits(tokens)).max() > 0.005
    np.testing.assert_allclose(their_logits(loaded, tokens), expected, atol=LOGITS, rtol=0)
    again = lq.load_adapter(lm, tmp_path / "ours")
    np.testing.assert_allclose(again.logits(tokens), expected, atol=LOGITS, rtol=0)
    assert dropouts(again) == dropouts(ours)


def dropouts(lm):
    """The rates of a model's adapters."""
    return {float(rate) for _, fixed in lora.adapters(lm.variables).values() for rate in fixed.get("dropout", ())}


TRAINED = [("gpt2", "all"), ("gpt2", KINDS[1]), ("llama", "all"), ("mixtral", "all")]
TRAINED += [("deepseek_v3", "all"), ("deepseek_v3", KINDS[1])]
TRAINED += [("gemma3_text", "all"), ("qwen3", KINDS[1]), ("qwen2", "all"), ("gemma2", KINDS[1])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pair", "kind"), TRAINED, indirect=["pair"])
@pytest.mark.product
def test_loss_and_gradients_are_those_of_peft(pair, kind, tmp_path):
    anew, lm = pair
    adapted = adapted_by(anew(), peft_config(kind, lm.config.model_type))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = draw_tokens(lm)
    loss = adapted(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens), use_cache=False).loss
    loss.backward()

    ours = lq.load_adapter(lm, tmp_path / "adapter")
    objective = NextToken(ours.model)
    targets = jnp.roll(jnp.asarray(tokens, jnp.int32), -1, axis=1)
    mask = jnp.ones(tokens.shape).at[:, -1].set(0)
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "targets": targets, "mask": mask}

    def our_loss(trained):
        variables = {**ours.variables, "lora": trained}
        return objective.loss(variables, batch, objective.weights(batch), None)[0]

    value, gradients = jax.jit(jax.value_and_grad(our_loss))(ours.variables["lora"])
    np.testing.assert_allclose(value, loss.item(), atol=LOSS, rtol=0)

    # Gradients are written like adapters, and read by PEFT's names: with the scale 1, as tensors they are the same.
    theirs = {name.replace(".default", ""): p.grad.numpy() for name, p in adapted.named_parameters() if p.requires_grad}
    as_saved(ours, gradients, theirs)


def as_saved(ours, gradients, theirs):
    """Every gradient of theirs against the part of ours that it belongs to."""
    found = lora.adapters({**ours.variables, "lora": gradients})
    compared = 0
    for site in sites_of(ours.config):
        pair = found.get(site.placement.path[1:])
        module = experts_module(site, found) if site.of_experts else site.module
        for name, leaf in (pair[0] if pair else {}).items():
            key = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}.get(name)
            if key is None or f"{PREFIX}{module}.{key}" not in theirs:
                continue
            expected = theirs.pop(f"{PREFIX}{module}.{key}")
            part = np.asarray(leaf)[site.placement.slot]
            if name == "A":  # [D, R], of experts [E, D, R]
                part = part.swapaxes(-1, -2).reshape(-1, part.shape[-2])
                part = part[: len(expected)] if not site.of_experts else part
            elif name == "B" and site.of_experts:
                part = part.reshape(*part.shape[:2], -1).transpose(2, 1, 0).reshape(expected.shape)
            elif name == "B":
                part = part.reshape(len(part), -1).T[:, : expected.shape[1]]
            else:
                part = part.reshape(-1)
            largest = np.abs(expected).max()
            np.testing.assert_allclose(part, expected, atol=1e-4 * largest + 1e-9, rtol=0, err_msg=f"{module} {name}")
            compared += 1
    assert not theirs, sorted(theirs)
    assert compared


@pytest.mark.filterwarnings("ignore")
def test_files_of_pytorch_where_there_are_no_safetensors(llama, tmp_path):
    """PEFT wrote them until 2023."""
    lm, folder = llama
    state = {name: torch.tensor(x) for name, x in load_file(folder / "adapter_model.safetensors").items()}
    shutil.copy(folder / "adapter_config.json", tmp_path)
    with pytest.raises(BadInput, match=r"has no adapter_model\.safetensors"):
        lq.load_adapter(lm, tmp_path)
    torch.save(state, tmp_path / "adapter_model.bin")
    found, expected = lq.load_adapter(lm, tmp_path), lq.load_adapter(lm, folder)
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(ours, a folder with an adapter for it)."""
    theirs, lm = make_pair("llama", FIELDS["llama"])
    folder = tmp_path_factory.mktemp("adapter")
    spec = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted_by(theirs, spec).save_pretrained(folder)
    return lm, folder


def test_several_adapters_share_their_base(llama, tmp_path):
    lm, folder = llama
    first, second = lq.load_adapter(lm, folder), lq.lora(lm, rank=2)
    for other in (first, second):
        assert all(a is b for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(lm.params), strict=True))
    tokens = draw_tokens(lm)
    # Fresh adapters add 0; beside theirs, JAX 0.12 sums the other products in another order.
    np.testing.assert_allclose(second.logits(tokens), lm.logits(tokens), atol=1e-5, rtol=0)
    assert np.abs(first.logits(tokens) - lm.logits(tokens)).max() > 0.01
    # Another adapter takes the place of the one that was there.
    np.testing.assert_array_equal(lq.load_adapter(second, folder).logits(tokens), first.logits(tokens))
    # What generates has it, and so has what is saved.
    greedy = lq.Sampler(temperature=0.0)
    prompt = [list(tokens[0, :4])]
    expected = lq.generate(lq.merge(first), prompt, max_new_tokens=8, sampler=greedy).tokens
    np.testing.assert_array_equal(lq.generate(first, prompt, max_new_tokens=8, sampler=greedy).tokens, expected)
    loaded = lq.load(lq.save_hf(first, tmp_path / "merged"))
    matrices, expected = (jax.tree.leaves(each.params) for each in (loaded, lq.merge(first)))
    assert all(np.abs(a - b).max() < 1e-6 for a, b in zip(matrices, expected, strict=True))
    np.testing.assert_allclose(loaded.logits(tokens), first.logits(tokens), atol=LOGITS, rtol=0)
    lq.model_files.save(first, tmp_path / "own")
    np.testing.assert_array_equal(lq.load(tmp_path / "own").logits(tokens), first.logits(tokens))


def test_numbers_that_matrices_share_stay_shared(llama, tmp_path):
    lm, _ = llama
    tied = moved(lq.lora(lm, rank=2, variant="tinylora", numbers=5, tied=True, dropout=0.25), size=0.3)
    lq.save_adapter(tied, tmp_path / "tied")
    with (tmp_path / "tied" / "adapter_config.json").open() as file:
        written = json.load(file)
    assert (written["weight_tying"], written["tinylora_dropout"]) == (1.0, 0.25)
    loaded = lq.load_adapter(lm, tmp_path / "tied")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["lora"], tied.variables["lora"])
    half = changed(tmp_path / "tied", tmp_path / "half", None, lambda state: jax.tree.map(np.half, state))
    (numbers,) = jax.tree.leaves(lq.load_adapter(lm, half).variables["lora"])
    assert numbers.dtype == np.float32
    assert dropouts(loaded) == dropouts(tied) == {0.25}
    tokens = draw_tokens(lm)
    np.testing.assert_allclose(loaded.logits(tokens), tied.logits(tokens), atol=1e-6, rtol=0)
    assert f"adapters of {5:,}" in repr(loaded)
    classifier = lq.with_classifier(loaded, ("a", "b"))
    assert np.abs(classifier.hidden(tokens) - lq.with_classifier(lm, ("a", "b")).hidden(tokens)).max() > 1e-3


def test_an_alpha_is_written_however_small_it_is(llama, tmp_path):
    lm, _ = llama
    small = lq.lora(lm, rank=3, alpha=1.2345e-7, targets="attention", dropout=0.1)
    with warnings.catch_warnings(action="error"):  # there is no multimodal Llama that the base might be
        lq.save_adapter(small, tmp_path / "small", base="org/base")
    written = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (written["lora_alpha"], written["lora_dropout"]) == (1.2345e-7, 0.1)
    assert written["rank_pattern"] == written["alpha_pattern"] == {}  # all are alike
    del written["lora_dropout"]  # PEFT's default is none
    (tmp_path / "small" / "adapter_config.json").write_text(json.dumps(written))
    assert dropouts(lq.load_adapter(lm, tmp_path / "small")) == set()
    usual = moved(lq.lora(lm, rank=8, alpha=8.0, targets="attention"))  # PEFT's defaults, which a file need not have
    written = json.loads((lq.save_adapter(usual, tmp_path / "usual") / "adapter_config.json").read_text())
    del written["r"], written["lora_alpha"]
    (tmp_path / "usual" / "adapter_config.json").write_text(json.dumps(written))
    tokens = draw_tokens(lm)
    np.testing.assert_array_equal(lq.load_adapter(lm, tmp_path / "usual").logits(tokens), usual.logits(tokens))


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_names_its_base_loads_as_a_model(llama, tmp_path, monkeypatch):
    lm, folder = llama
    base = lq.save_hf(lm, tmp_path / "base")
    at_hub = changed(folder, tmp_path / "at hub", {"base_model_name_or_path": "org/base", "revision": "v1"})
    assert base_of(at_hub)[0] == "org/base@v1"
    named = changed(folder, tmp_path / "named", {"base_model_name_or_path": str(base), "revision": "v1"})
    tokens = draw_tokens(lm)
    np.testing.assert_allclose(lq.load(named).logits(tokens), lq.load_adapter(lm, folder).logits(tokens), atol=1e-6)
    lq.ByteTokenizer().save(named)  # as trainers save theirs
    with pytest.warns(UserWarning, match="its tokenizer has 257 tokens, the base 61: its own stays"):
        assert lq.load(named).tokenizer is None
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    (named / "tokenizer_config.json").unlink()
    words.save(str(named / "tokenizer.json"))
    (named / "tokenizer_config.json").write_text('{"eos_token": "[UNK]"}')  # which ends what it says, too
    loaded = lq.load(named)
    assert loaded.tokenizer.encode("a") == [0] and loaded.generation.eos_token_id[-1] == 1
    with pytest.raises(BadInput, match="names no base; load that, then"):
        lq.load(changed(folder, tmp_path / "nameless", {"base_model_name_or_path": None}))
    with pytest.raises(BadInput, match="is an adapter too; merge that one into its own base first"):
        lq.load(changed(folder, tmp_path / "twice", {"base_model_name_or_path": str(tmp_path / "nameless")}))
    # A base that cannot be had, such as unsloth's in 4 bits, or a path on the computer where the adapter was trained.
    quantised = tmp_path / "base-bnb-4bit"
    shutil.copytree(base, quantised)
    values = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (quantised / "config.json").write_text(json.dumps(values))
    for number, (path, why) in enumerate(
        [(quantised, "quantization_config="), ("/home/a/base", "there is no such file")]
    ):
        lost = changed(folder, tmp_path / f"lost {number}", {"base_model_name_or_path": str(path)})
        message = refused(lq.load, lost)
        assert message.startswith(f"{lost}: its base {path} cannot be loaded: {path}") and why in message
        assert f'lq.load_adapter(lq.load("..."), "{lost}")' in message
    # A model in the folder itself is its base, as where a trainer wrote into that.
    inside = changed(folder, tmp_path / "inside", {"base_model_name_or_path": str(tmp_path / "inside")})
    for file in ("config.json", "model.safetensors"):
        shutil.copy(base / file, inside / file)
    np.testing.assert_allclose(lq.load(inside).logits(tokens), lq.load_adapter(lm, folder).logits(tokens), atol=1e-6)
    other = changed(inside, tmp_path / "other", {"base_model_name_or_path": "org/other"})
    for file in ("config.json", "model.safetensors"):
        shutil.copy(base / file, other / file)
    with pytest.warns(UserWarning, match="its adapters go onto the model beside them, not onto org/other; if that"):
        np.testing.assert_array_equal(lq.load(other).logits(tokens), lq.load(inside).logits(tokens))
    assert has_config(inside) and has_config(named)  # which tells the number of heads
    # Of the hub's, what lies beside adapters may hold them already: the base is the one that is named.
    merged = changed(folder, tmp_path / "merged", {"base_model_name_or_path": str(base)})
    for file in ("config.json", "model.safetensors"):
        shutil.copy(lq.save_hf(lq.load(named), tmp_path / f"of {file}") / file, merged / file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda **wanted: str(merged))
    np.testing.assert_allclose(lq.load("org/merged").logits(tokens), lq.load(named).logits(tokens), atol=1e-6)
    # A classifier's tells how many classes there are.
    ours = moved(lq.lora(lq.with_classifier(lm, ("a", "b", "c")), rank=2))
    lq.save_adapter(ours, tmp_path / "classifier", base=str(base))
    loaded = lq.load(tmp_path / "classifier")
    assert loaded.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    np.testing.assert_allclose(loaded.classify(tokens), ours.classify(tokens), atol=1e-5)


def test_adapters_of_as_many_experts_as_the_base_has(pair_of, tmp_path):
    _, lm = pair_of("mixtral")
    more = lq.models.override(lm.config, num_local_experts=8)
    wide = LanguageModel(more, lq.build(more), lq.init(more))
    lq.save_adapter(lq.lora(wide, rank=2), tmp_path / "eight")
    with pytest.raises(BadInput, match=r"is \[16, 32\] instead of \[8, 32\]: it is an adapter of another base"):
        lq.load_adapter(lm, tmp_path / "eight")
    with pytest.raises(BadInput, match="plain LoRA without dropout alone"):
        lq.save_adapter(lq.lora(lm, rank=2, targets=("attention", "router"), dropout=0.1), tmp_path / "router")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("mixtral", ("q_proj", "block_sparse_moe.gate", "w1", "w2", "w3")),
        ("mixtral", ("w2",)),
        ("mixtral", ("w1",)),
        ("qwen3_moe", ("q_proj", "mlp.gate", "gate_proj", "up_proj", "down_proj")),
        ("deepseek_v3", ("kv_b_proj", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_adapters_of_transformers_4_whose_experts_are_apart(pair_of, tmp_path, model_type, names):
    """Against the base whose files have W + s B A in place of W."""
    anew, lm = pair_of(model_type)
    base = anew()
    base.save_pretrained(tmp_path / "base")
    files, draw, state = load_file(tmp_path / "base" / "model.safetensors"), np.random.default_rng(0), {}
    ranks = {"w1": 3, "up_proj": 3}  # by a pattern
    merged = dict(files)
    for name, matrix in files.items():
        if name.endswith(tuple(f"{each}.weight" for each in names)):
            rank = next((rank for end, rank in ranks.items() if f".{end}." in name), 2)
            scale = (7 if ".w2." in name else 0 if ".w3." in name else 9 if ".gate." in name else 5) / rank
            first = draw.normal(size=(rank, matrix.shape[1])).astype(np.float32) * np.float32(0.3)
            last = draw.normal(size=(matrix.shape[0], rank)).astype(np.float32) * np.float32(0.1)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            state |= {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": last}
            merged[name] = matrix + np.float32(scale) * last @ first
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": [name.split(".")[-1] for name in names]}
    gate = "block_sparse_moe.gate" if model_type == "mixtral" else "mlp.gate"  # as the files name it
    config |= {"rank_pattern": ranks, "alpha_pattern": {"w2": 7, "w3": 0, gate: 9}, "lora_dropout": 0.05}
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")

    save_file(merged, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tokens = draw_tokens(lm)
    expected = their_logits(type(base).from_pretrained(tmp_path / "base", attn_implementation="eager").eval(), tokens)
    with pytest.warns(UserWarning, match=r"lora_dropout=0.05 is left out"):
        ours = lq.load_adapter(lm, folder)
    assert np.abs(expected - lm.logits(tokens)).max() > 0.05
    np.testing.assert_allclose(ours.logits(tokens), expected, atol=LOGITS, rtol=0)
    np.testing.assert_allclose(lq.merge(ours).logits(tokens), expected, atol=LOGITS, rtol=0)

    if model_type != "deepseek_v3":
        lq.save_adapter(ours, tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(anew(), tmp_path / "ours").eval()
        np.testing.assert_allclose(their_logits(back, tokens), expected, atol=LOGITS, rtol=0)
    else:
        with pytest.warns(UserWarning, match=r"takes model.layers.0.mlp.\w+_proj and its like for experts"):
            lq.save_adapter(ours, tmp_path / "ours")
        np.testing.assert_array_equal(lq.load_adapter(lm, tmp_path / "ours").logits(tokens), ours.logits(tokens))
        with contextlib.suppress(RuntimeError, ValueError):  # or it loads, and computes something else
            back = peft.PeftModel.from_pretrained(anew(), tmp_path / "ours").eval()
            assert np.abs(their_logits(back, tokens) - expected).max() > 0.05
    some = next(name.partition(".lora_")[0] for name in state if ".experts.1." in name)
    without = {name: x for name, x in state.items() if not name.startswith(some)}
    longer = state | {f"{some}.lora_magnitude_vector": np.ones(3, np.float32)}
    for wrong, message in (
        (without, "has adapters of other experts and none of"),
        (longer, "has a DoRA of .*, and experts have plain LoRA alone"),
    ):
        save_file(wrong, folder / "adapter_model.safetensors")
        with pytest.raises(BadInput, match=message):
            lq.load_adapter(lm, folder)


def assert_both_ways(anew, lm, spec, tmp_path):
    """PEFT's adapter has its logits here, and in PEFT again after it was saved here."""
    adapted = adapted_by(anew(), spec)
    adapted.save_pretrained(tmp_path / "theirs")
    tokens = draw_tokens(lm)
    expected = their_logits(adapted, tokens)
    ours = lq.load_adapter(lm, tmp_path / "theirs")
    np.testing.assert_allclose(ours.logits(tokens), expected, atol=LOGITS, rtol=0)
    lq.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(anew(), tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(back, tokens), expected, atol=LOGITS, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_patterns_name_a_router_with_its_parameter(pair_of, tmp_path):
    """As PEFT matches them: `mlp.gate.weight`, where modules go without."""
    anew, lm = pair_of("mixtral")
    fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"], "init_lora_weights": False}
    patterns = {"gate": 9, "block_sparse_moe.gate": 9, "mlp.gate.weight": 40}  # the first two match nothing
    spec = peft.LoraConfig(r=2, alpha_pattern=patterns, task_type="CAUSAL_LM", **fields)
    assert_both_ways(anew, lm, spec, tmp_path)


@pytest.mark.parametrize(("model_type", "name"), [("llama", "q_proj"), ("gpt2", "attn.c_proj"), ("gpt2", "c_fc")])
@pytest.mark.filterwarnings("ignore")
def test_patterns_name_a_matrix_that_was_adapted_as_a_parameter(pair_of, tmp_path, model_type, name):
    """`target_parameters` may name what is a module's weight, too; patterns then have the parameter's name, and A and B
    are as the parameter lies, which GPT-2's does the other way round than their modules' adapters."""
    anew, lm = pair_of(model_type)
    fields = {"target_modules": [], "target_parameters": [f"{name}.weight"], "init_lora_weights": False}
    patterns = {name: 9, rf".*1\..*{name}.weight": 40}  # the first matches nothing
    spec = peft.LoraConfig(r=2, alpha_pattern=patterns, task_type="CAUSAL_LM", **fields)
    assert_both_ways(anew, lm, spec, tmp_path)


def test_patterns_match_as_in_peft():
    name = "model.layers.1.self_attn.q_proj"
    for pattern in ("q_proj", "proj", "k|proj", "k_proj|q_proj", "q_proj|k", r"1\..*", "layers"):
        assert ends_with(name, pattern) == (get_pattern_key([pattern], name) == pattern), pattern
    # Names are as short as they can be without meaning modules that have no adapter.
    assert _short_names(["h.0.q", "h.0.k", "h.1.k"], ["h.0.q", "h.1.q", "h.0.k", "h.1.k"]) == ["0.q", "k"]


def test_what_peft_computes_by_is_read_or_refused():
    """The others change nothing in an adapter that is trained, or as `init_lora_weights` says."""
    harmless = {"corda_config", "loftq_config", "lora_ga_config", "eva_config", "init_lora_weights", "auto_mapping"}
    harmless |= {"ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"}
    harmless |= {"bias", "layers_to_transform", "megatron_config", "megatron_core", "peft_version", "qalora_group_size"}
    harmless |= {"runtime_config", "target_modules", "task_type"}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= {*FIELDS_READ, *PLAIN, *harmless}


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
AT_EMBEDDING = {
    "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((3, 61)),
    "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((32, 3)),
}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "VERA"}, None, "peft_type='VERA' is not supported; LORA and TINYLORA are"),
        (
            {"bias": "all"},
            lambda state: state | {NAME.replace("lora_A.weight", "bias"): np.zeros(32)},
            "layers.0.self_attn.q_proj.bias, and bias='all' is not supported: merge it in PEFT",
        ),
        ({"lora_bias": True}, None, "only False: merge it in PEFT, which can where its matrices have biases of their"),
        ({"alora_invocation_tokens": [1]}, None, "alora_invocation_tokens=[1] is not supported, only None"),
        ({"layer_replication": [[0, 2]]}, None, "layer_replication=[[0, 2]] is not supported, only None"),
        ({"trainable_token_indices": [1]}, None, "trainable_token_indices=[1] is not supported, only None: merge it"),
        ({"use_qalora": True}, None, "use_qalora=True is not supported, only False: merge it in PEFT"),
        *[({"init_lora_weights": kind}, None, f"{kind!r} changed the base") for kind in ("corda", "loftq", "lora_ga")],
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa' changed the base"),
        ({"init_lora_weights": "OLoRA"}, None, "init_lora_weights='OLoRA' changed the base"),
        (
            {"base_model_name_or_path": "org/other"},
            lambda state: state | {NAME: np.zeros((3, 48), np.float32)},
            f"{NAME} is [3, 48] instead of [r, 32]: it is an adapter of another base (org/other)",
        ),
        (
            {},
            lambda state: state | {NAME: np.zeros(0, np.float32)},
            f"{NAME} is empty: its trainer (ZeRO-3, FSDP) saved it without gathering its parts; save the adapter again",
        ),
        ({}, lambda state: state | {"base_model.model.odd": np.zeros(3)}, "base_model.model.odd has no place in this"),
        (
            {},
            lambda state: state | {NAME.replace("layers.0", "layers.7"): np.zeros((3, 32))},
            "layers.7.self_attn.q_proj.lora_A.weight has no place in this llama: it is an adapter of another base",
        ),
        (
            {},
            lambda state: state | {"base_model.model.score.weight": np.zeros((2, 32))},
            "it is a classifier's: load it onto one (lq.with_classifier)",
        ),
        (
            {"modules_to_save": ["norm"]},
            lambda state: state | {"base_model.model.model.norm.weight": np.zeros(32)},
            "of modules_to_save=['norm'] only embeddings and heads are supported: merge it in PEFT",
        ),
        (
            {},
            lambda state: state | AT_EMBEDDING | {NAME.replace("layers.0", "layers.7"): np.zeros((3, 32))},
            "layers.7.self_attn.q_proj.lora_A.weight has no place in this llama: it is an adapter of another base",
        ),
        (
            {},
            lambda state: AT_EMBEDDING,
            "holds no adapter of a layer beside an embedding or a head: merge it in PEFT",
        ),
        (
            {"use_dora": True},
            lambda state: AT_EMBEDDING | {"base_model.model.model.embed_tokens.lora_magnitude_vector": np.zeros(61)},
            "of embeddings only that of tokens may have an adapter, and only LoRA: merge it in PEFT",
        ),
        (
            {},
            lambda state: {name: x for name, x in state.items() if name != NAME.replace("lora_A", "lora_B")},
            "lora_A.weight and no lora_B",
        ),
        ({"use_dora": True}, None, "lora_magnitude_vector of model.layers.0.self_attn.q_proj, and adapter_config.json"),
        (
            {},
            lambda state: state | {NAME.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(32, np.float32)},
            "has a lora_magnitude_vector of model.layers.0.self_attn.q_proj, and adapter_config.json says use_dora=Fal",
        ),
        ({"use_dora": "yes"}, None, "use_dora='yes' is not of the type bool"),
        ({"r": 8}, None, "q_proj has the rank 3, and adapter_config.json says 8 (r, rank_pattern)"),
        ({"rank_pattern": {"q_proj": 2}}, None, "q_proj has the rank 3, and adapter_config.json says 2"),
        ({"rank_pattern": {"q\nproj": 2.5}}, None, r"rank_pattern says 2.5 of 'q\nproj', which is not of the type i"),
        (
            {"alpha_pattern": {"q_proj": "2"}},
            None,
            "alpha_pattern says '2' of 'q_proj', which is not of the type float",
        ),
        ({"lora_dropout": 1.5}, None, "lora_dropout=1.5 is not between 0 and 1"),
        ({"tinylora_dropout": -1}, None, "tinylora_dropout=-1 is not between 0 and 1"),
        ({"weight_tying": 2}, None, "weight_tying=2 is not between 0 and 1"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_in_one_line(llama, tmp_path, config, tensors, message):
    lm, folder = llama
    assert message in refused(lq.load_adapter, lm, changed(folder, tmp_path / "changed", config, tensors))


@pytest.mark.parametrize("trains", ["all", "lora_only"])
def test_biases_that_the_base_has_not_are_none_to_train(llama, tmp_path, trains):
    lm, folder = llama
    found = lq.load_adapter(lm, changed(folder, tmp_path / "changed", {"bias": trains}))
    jax.tree.map(np.testing.assert_array_equal, found.variables, lq.load_adapter(lm, folder).variables)


@pytest.mark.parametrize(
    ("end", "tensor", "message"),
    [
        ("layers.1.mlp.up_proj.tinylora_P", None, "layers.1.mlp.up_proj.tinylora_P; save the adapter with save_pr"),
        ("tinylora_v.0", None, "has no base_model.tinylora_v.0 of 5 numbers, as many as base_model.model.model.layers"),
        ("tinylora_v.0", np.zeros(4), "has no base_model.tinylora_v.0 of 5 numbers, as many as base_model.model.model"),
        ("tinylora_v.0", np.zeros((5, 1)), "base_model.tinylora_v.0 is [5, 1] instead of [u]"),
        (
            "model.embed_tokens.tinylora_A",
            np.zeros((2, 61)),
            "that of tokens may have an adapter, and only LoRA: merge",
        ),
        ("layers.1.mlp.up_proj.tinylora_A", np.zeros((0, 32)), "layers.1.mlp.up_proj has the rank 0; it needs at leas"),
    ],
)
def test_tiny_adapters_that_do_not_fit_are_refused_in_one_line(llama, tmp_path, end, tensor, message):
    lm, _ = llama
    lq.save_adapter(lq.lora(lm, rank=2, variant="tinylora", numbers=5, tied=True), tmp_path / "tied")

    def damaged(state):
        name = next((name for name in state if name.endswith(end)), PREFIX + end)
        rest = {other: x for other, x in state.items() if other != name}
        return rest if tensor is None else rest | {name: tensor}

    assert message in refused(lq.load_adapter, lm, changed(tmp_path / "tied", tmp_path / "changed", None, damaged))


def test_adapters_that_peft_has_no_form_for_are_refused(llama, tmp_path):
    lm, _ = llama
    with pytest.raises(BadInput, match=r"PEFT has no adapter at score, .*; merge it \(lq\.merge\) and save the model"):
        lq.save_adapter(lq.lora(lq.with_classifier(lm, ("a", "b")), rank=1, targets="score"), tmp_path / "score")
    config = lq.models.override(lm.config, experts=lq.Experts(num_experts=2, top_k=1))
    experts = LanguageModel(config, lq.build(config), lq.init(config))
    with pytest.raises(BadInput, match=r"PEFT has no adapter at group_0/block_0/moe/router/kernel; merge it"):
        lq.save_adapter(lq.lora(experts, rank=1, targets="router"), tmp_path / "router")
    ours = lq.lora(lm, rank=1, targets=("query", "key"), dropout=0.25)
    block = ours.variables["lora_fixed"]["group_0"]["block_0"]["attention"]
    block["key"]["kernel"]["dropout"] = jnp.full(3, 0.5)
    with pytest.raises(BadInput, match=r"PEFT has one dropout for all adapters, and these have 0\.25, 0\.5; merge"):
        lq.save_adapter(ours, tmp_path / "dropout")
    assert not list(tmp_path.iterdir())


def test_what_is_no_adapter_is_refused(llama, tmp_path):
    lm, folder = llama
    with pytest.raises(BadInput, match=r"holds no adapter_config\.json"):
        lq.load_adapter(lm, tmp_path)
    with pytest.raises(BadInput, match="has no adapters to write"):
        lq.save_adapter(lm, tmp_path / "new")
    ours = lq.load_adapter(lm, folder)
    with pytest.raises(BadInput, match="is not empty"):
        lq.save_adapter(ours, folder)
    lq.save_adapter(ours, tmp_path / "kept")
    lq.save_adapter(ours, tmp_path / "kept", overwrite=True)
    (tmp_path / "kept" / "README.md").write_text("my model card")
    lq.save_adapter(ours, tmp_path / "kept", overwrite=True)
    assert (tmp_path / "kept" / "README.md").read_text() == "my model card"
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"holds notes\.txt"):
        lq.save_adapter(ours, tmp_path / "kept", overwrite=True)
