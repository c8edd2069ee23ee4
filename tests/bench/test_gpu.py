"""What the figures for a GPU are made of, and the program from end to end at the size of a moment."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import llmq_jax as lq
from bench import gpu
from llmq_jax.command_line import run
from llmq_jax.training.flops import passed_weights

H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
NARROW = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
NARROW |= {"num_attention_heads": 2, "max_position_embeddings": 64}
NO_DROPOUT = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "kv_lora_rank": 32}
CONFIGS = {
    "gpt2": lq.GPT2Config(**{name: NARROW[name] for name in NARROW if name != "intermediate_size"}, **NO_DROPOUT),
    "llama": lq.Llama3Config(**NARROW, num_key_value_heads=1),
    "mixture": lq.DeepSeekV3Config(**{**gpu.SMALL, **NARROW, **EXPERTS}),
}


def test_published_sizes():
    mixture = gpu.config_of(gpu.MIXTURE, None, 4096)
    assert 0.7e9 < passed_weights(mixture) < 1.2e9
    assert gpu.cache_bytes(lq.preset("llama3.2-1b"), 100) == 2 * 16 * 100 * 8 * 128


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr("llmq_jax.layers.expert_dispatch.works_here", lambda: True)
    monkeypatch.setattr(jax, "devices", lambda: [H100])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(f"{cudnn}.check_compute_capability", lambda least: True)
    kind = AbstractDevice(H100.device_kind, num_cores=None, platform=H100.platform)  # what Pallas makes a kernel for
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        yield


def calls_of(lowered):
    lines = lowered.as_text().splitlines()
    calls = {line.partition("@")[2].partition("(")[0] for line in lines if "stablehlo.custom_call" in line}
    return {call for call in calls if "Sharding" not in call}


@pytest.mark.parametrize(("name", "length"), [("gpt2", 64), ("llama", 63), ("mixture", 64)])
def test_the_training_step_as_a_gpu_gets_it(name, length, h100):
    """Lowered here for CUDA, not run: cuDNN's attention, products in bfloat16 except the router's, which are in float32
    and not in TF32, sums over tokens in float32, nothing that calls the host, and the state donated."""
    config, rows = CONFIGS[name], 4
    optimizer = lq.training.adamw(1e-4)
    model = lq.build(config, dtype="bfloat16", attention="fused")
    step = lq.training.make_train_step(lq.objectives.NextToken(model), optimizer)
    state = jax.eval_shape(lambda: lq.training.create_state(lq.init(config), optimizer))
    types = {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in types.items()}
    lowered = step.program.trace(state, batch).lower(lowering_platforms=("cuda",))
    lines = lowered.as_text().splitlines()
    kernels = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", *["__gpu$xla.gpu.triton"] * bool(model.experts)}
    assert calls_of(lowered) == kernels
    assert "stablehlo.case" not in lowered.as_text()
    products = [line.rpartition(" : ") for line in lines if "dot_general" in line]
    wide = [(what, types) for what, _, types in products if "f32>" in types.partition("->")[0]]
    of_router = [types for _, types in wide if model.experts and f"x{model.experts.num_experts}xf32" in types]
    assert [types for _, types in wide] == of_router
    assert bool(wide) == (name == "mixture") and all("precision = [HIGHEST, HIGHEST]" in what for what, _ in wide)
    # Over tokens, which come first, and over the features of a row.
    of = r"(?:\[0.*: \(tensor<(.*)|\[1\].*: \(tensor<(\d+x\d+))xbf16>,"
    sums = [re.search(rf"stablehlo\.reduce\(.*add.*dimensions = {of}", line) for line in lines]
    assert [found[0] for found in sums if found] == []
    assert {argument.donated for argument in jax.tree.leaves(lowered.args_info[0][0])} == {True}


@pytest.mark.exhaustive
def test_it_runs(monkeypatch, capsys):
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    monkeypatch.setattr(gpu, "SMALL", {**gpu.SMALL, **small, "kv_lora_rank": 16, "num_attention_heads": 2})
    for name, value in {"WARM_UP": 1, "ROUNDS": 1, "STEPS": 1, "PROMPT": 8, "SHORT": 4, "LONG": 8}.items():
        monkeypatch.setattr(gpu, name, value)
    words = [gpu.MIXTURE, "--device", "cpu", "--attention", "auto", "--layers", "2", "--batch-size", "2"]
    words += ["--dispatch", "ragged"]
    with pytest.raises(SystemExit) as stop:
        run(gpu.main, [*words, "--context", "16"], program="gpu")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "training, 2 x 16 tokens" in out and "decoding, 1 row" in out and "peak unknown" in out
    assert "dispatch ragged" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["gpt3"], "unknown model 'gpt3'"),
        (["--layers", "0"], "--layers is 0 and must be at least 1"),
        (["--device", "gpu"], "--device gpu: JAX finds no GPU here"),
        (
            ["gpt2-124m", "--dispatch", "ragged"],
            "--dispatch ragged: gpt2-124m has no experts; measure deepseek-1b-active",
        ),
    ],
)
def test_bad_input(words, why, capsys):
    with pytest.raises(SystemExit) as stop:
        run(gpu.main, words, program="gpu")
    assert stop.value.code == 2 and why in capsys.readouterr().err


def test_what_does_not_fit_is_told_and_the_rest_goes_on():
    def measure(message):
        raise jax.errors.JaxRuntimeError(message)

    told = gpu.within_memory("take less", measure, "RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.")
    assert told.startswith("does not fit: Out of memory allocating 2.0 GiB; take less")
    with pytest.raises(jax.errors.JaxRuntimeError, match="No valid engine"):
        gpu.within_memory("take less", measure, "INTERNAL: No valid engine configs")


@pytest.mark.parametrize("name", ["dpo", "grpo", "reward", "classifier"])
def test_rows_padded_on_the_right_need_no_mask(name, h100):
    labels = {"reward": ("reward",), "classifier": ("ham", "spam")}.get(name)
    config = lq.models.override(CONFIGS["llama"], labels=labels)
    model = lq.build(config, dtype="bfloat16", attention="fused")
    ids, mask, one, number = jnp.ones((2, 16), jnp.int32), jnp.ones((2, 16)), jnp.ones(2, jnp.int32), jnp.ones(2)
    rows = {"tokens": ids, "lengths": one}
    pairs = {"tokens": ids[None], "lengths": one[None], "response_mask": mask[None], "mask": number[:1]}
    answers = {"prompt_lengths": one, "completion_mask": mask, "old_logprobs": mask, "advantages": number}
    objective, batch = {
        "dpo": lambda: (lq.objectives.DPO(model), {**pairs, "reference_logprobs": number[None]}),
        "grpo": lambda: (lq.objectives.GRPO(model=model), {**rows, **answers}),
        "reward": lambda: (lq.objectives.RewardModel(model), pairs),
        "classifier": lambda: (lq.objectives.Classification(model), {**rows, "labels": one, "mask": number}),
    }[name]()
    variables = jax.eval_shape(lambda: lq.init(config))
    loss = jax.jit(lambda variables: objective.loss(variables, batch, objective.weights(batch))[0])
    assert calls_of(loss.trace(variables).lower(lowering_platforms=("cuda",))) == {"__cudnn$fmhaSoftmax"}
