"""Fields of dataclasses that Python's callers give: their types, and scalars of other libraries."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.field_types import check_fields, create, whole


@dataclass(frozen=True)
class Cake:
    layers: int = 1
    heat: float | None = None
    cream: bool = True
    name: str = "plain"
    other: Any = None
    oven: ClassVar[str] = "gas"

    def __post_init__(self) -> None:
        check_fields(self)


def test_scalars_become_pythons():
    cake = Cake(layers=np.int64(3), heat=jnp.float32(0.5), cream=np.bool_(False), other=np.int64(1))
    assert cake == Cake(3, 0.5, False, other=np.int64(1))
    assert [type(value) for value in (cake.layers, cake.heat, cake.cream)] == [int, float, bool]
    assert type(Cake(heat=2).heat) is float  # transformers takes no integer there


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": 2.0}, "Cake.layers=2.0 is not of the type int"),
        ({"layers": True}, "Cake.layers=True is not of the type int"),
        ({"layers": None}, "Cake.layers=None is not of the type int"),
        ({"layers": np.arange(2)}, "is not of the type int"),
        ({"heat": "hot"}, "Cake.heat='hot' is not of the type float | None"),
        ({"cream": "no"}, "Cake.cream='no' is not of the type bool"),
        ({"name": 3}, "Cake.name=3 is not of the type str"),
    ],
)
def test_another_type_is_refused(fields, said):
    with pytest.raises(BadInput, match=said.replace("|", r"\|")):
        Cake(**fields)


def test_integers_of_all_kinds():
    assert [whole(value, "n") for value in (3, np.int64(3), np.uint8(3), jnp.int32(3), np.array(3))] == [3] * 5
    for value in (2.5, 2.0, "3", None, [3], np.float32(3)):
        with pytest.raises(BadInput, match=r"n=.* must be an integer"):
            whole(value, "n")


SCRIPT = """
import jax.numpy as jnp, numpy as np
import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.generation import Sampler, generate
from llmq_jax.language_model import LanguageModel

sizes = dict(vocab_size=257, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128)
config = lq.GPT2Config(**sizes | dict(num_hidden_layers=np.int64(1)))
lm = LanguageModel(config, lq.build(config), lq.init(config, 0), ByteTokenizer())

optimizer = lq.training.adamw(1e-3)

def refused(said, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except lq.BadInput as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)

for kind in (lq.GPT2Config, lq.Llama3Config, lq.Gemma3Config, lq.MixtralConfig, lq.DeepSeekV3Config):
    refused(f"{kind.__name__}.num_hidden_layers=2.5", kind, num_hidden_layers=2.5)
    refused(f"{kind.__name__}.tie_word_embeddings='no'", kind, tie_word_embeddings="no")
refused("router_aux_loss_coef='0.1'", lq.MixtralConfig, router_aux_loss_coef="0.1")
refused("MixtralConfig.num_local_experts='8'", lq.MixtralConfig, num_local_experts="8")
refused("num_key_value_heads=2.0", lq.Llama3Config, num_key_value_heads=2.0)
refused("Experts.top_k='2'", lq.Experts, num_experts=4, top_k="2")
assert lq.Experts(num_experts=np.int64(4), top_k=np.int64(2)) == lq.Experts(num_experts=4, top_k=2)
for options in (dict(rank=2.5), dict(rank="8"), dict(rank=None), dict(alpha="4"), dict(use_rslora="yes"),
                dict(targets=None), dict(targets=5), dict(targets="query,value"), dict(dropout=None)):
    refused(next(iter(options)), lq.lora, lm, **options)
assert lq.lora(lm, rank=np.int64(2)) is not None
for name, hint in dict(r="here it is rank", lora_alpha="did you mean alpha?", use_dora="here it is variant='dora'",
                       dora="here it is variant='dora'", rslora="choose from rank, alpha, targets").items():
    refused(f"LoRA has no field '{name}'; {hint}", lq.lora, lm, **{name: 4})
refused("4 is no LoRA; give one, or its fields: lq.lora(lm, rank=4)", lq.lora, lm, 4)
assert lq.objectives.group_advantages([1.0, 0.0], 2, scale="none").tolist() == [0.5, -0.5]
refused("mask has the shape [1, 2] and tokens [1, 3]; give it an entry for each token", lq.objectives.token_logprobs,
        lm.model, lm.variables, [[1, 2, 3]], [[1, 1]])
refused("tokens have the shape [3] and must be [B, T]; write [tokens] for one row", lq.objectives.token_logprobs,
        lm.model, lm.variables, [1, 2, 3])
said = "temperature=0.5 belongs to the sampler; give sampler=lq.Sampler(temperature=0.5)"
refused(said, generate, lm, "a", temperature=0.5)
refused(said, lq.stream, lm, "a", temperature=0.5)
refused(said, lm.chat, [], temperature=0.5)
refused("there is no argument 'max_tokens'; here it is max_new_tokens", generate, lm, "a", max_tokens=5)
refused("there is no argument 'echo'; choose from messages, max_new_tokens, sampler", lm.chat, [], echo=True)
refused("unknown preset None; choose from gpt2-124m", lq.preset, None)
refused("attention=None is unknown; choose from", lq.build(config, attention=None).apply, lm.variables, [[1]])
refused("'gpt2' is no dict; give what json.load reads", lq.interop.config_from_hf, "gpt2")
for function in (lambda given: lq.training.create_state(given, optimizer), lambda given: lm.replace(variables=given)):
    for wrong in (lm, lm.params, None):
        refused("stands where variables are wanted, a dict with 'params' among", function, wrong)
refused("trainable='lora' is none of these variables' collections: params", lq.training.create_state, lm.variables,
        optimizer, trainable="lora")
for wrong in (lm.model, lq.objectives.NextToken(lm)):
    refused("is no objective of a model; give one, as lq.objectives.NextToken", lq.training.make_train_step, wrong,
            optimizer)
training, objectives, step = lq.training, lq.objectives, lq.training.make_eval_step(lq.objectives.NextToken(lm.model))
refused("is no objective of a model; give one, as lq.objectives.NextToken", training.make_train_step, lm, optimizer)
refused("is no objective of a model; give one, as lq.objectives.NextToken", training.make_eval_step, lm)
learner = objectives.NextToken(lm.model)
state = training.create_state(lm.variables, optimizer)
for function in (training.create_state, training.make_train_step):
    refused("'adamw' is no optimizer; give one, as lq.training.adamw(1e-3)", function,
            lm.variables if function is training.create_state else learner, "adamw")
refused("give what lq.training.create_state returns", training.make_train_step(learner, optimizer), lm.variables, {})
refused("give what lq.training.create_state returns", training.run, lm, step, [], training.RunOptions(1))
refused("give lq.training.RunOptions(steps=...)", training.run, state, step, [], 10)
refused("stands where variables are wanted", step, state, {})
refused("batches is one batch; give a list of them", training.evaluate, step, lm.variables, {"tokens": []})
for name in ("learning_rate", "epsilon", "weight_decay", "clip"):
    for function in (training.adamw, training.muon):
        refused(f"{name}='1e-3' must be a number; YAML reads 1e-3 as a text, and 1.0e-3 as a number", function,
                **{"learning_rate": 1.0, name: "1e-3"})
refused("learning_rate=None must be a number", training.adamw, None)
refused("peak='1e-3' must be a number", training.warmup_cosine, "1e-3", 10)
refused("mesh 4 must be a text, as data=2,fsdp=4", training.make_mesh, 4)
refused("GRPO.beta='0.1' is not of the type float", objectives.GRPO, lm.model, beta="0.1")
refused("DPO.beta='0.1' is not of the type float", objectives.DPO, lm.model, "0.1")
refused("stands where a model is wanted, a Flax module; give lm.model", objectives.token_logprobs, lm, lm.variables,
        [[1, 2]])
refused("stands where variables are wanted", objectives.token_logprobs, lm.model, lm.params, [[1, 2]])
for function in (generate, lq.lora, lq.save_hf):
    refused("stands where a loaded model is wanted", function, lm.model, "x")
refused("prompts={'prompt': 'a'} must be a text, or a list", generate, lm, {"prompt": "a"})
for wrong in ("bfloat", 16):
    refused(f"dtype={wrong!r} is not a floating type of 2 bytes or more", lq.build, config, dtype=wrong)
for wrong in ("gpt2", lm, None):
    refused("is no config of a model", lq.interop.config_to_hf, wrong)
    refused("is no config of a model", lq.interop.to_state_dict, lm.variables, wrong)
    refused("is no config of a model", lq.interop.from_state_dict, {}, wrong)
for wrong, right in (("gpt2", ["a"]), (["a"], lm)):
    refused("is no tokenizer; give one, as lq.load_tokenizer", lq.data.encode_documents, wrong, right)
for wrong in (3, None, ["a"]):
    refused("must be a text", lm.tokenizer.encode, wrong)
for wrong in (dict(context="8"), dict(batch_size=2.5), dict(seed="0")):
    refused("must be an integer", lq.data.training_batches, list(range(100)), **dict(context=8, batch_size=2) | wrong)
refused("context=8.5 must be an integer", lq.data.evaluation_batches, list(range(100)), context=8.5, batch_size=2)
refused("RunOptions.steps='5' is not of the type int", lq.training.RunOptions, "5")
refused("Sampler.temperature='hot'", Sampler, temperature="hot")
refused("Sampler.top_k=2.5", Sampler, top_k=2.5)
greedy = Sampler(temperature=jnp.float32(0))
assert hash(greedy) == hash(Sampler(temperature=0.0))
expected = generate(lm, "ab", max_new_tokens=3, sampler=greedy, seed=3).tokens.tolist()
given = dict(max_new_tokens=jnp.int32(3), sampler=greedy, seed=jnp.int32(3), stop=jnp.int32(255))
assert generate(lm, np.array([[97, 98]]), **given).tokens.tolist() == expected
assert generate(lm, jnp.array([[97, 98]]), **given | dict(stop=jnp.array([255]))).tokens.tolist() == expected
refused("prompt 0 is the number 97", generate, lm, jnp.array([97, 98]))
refused("samples=2.5 must be an integer", generate, lm, "a", samples=2.5)
refused("prompt 0: a token=1.5 must be an integer", generate, lm, [[1.5]])
refused("prompt 0 is None", generate, lm, [None])
refused("seed='0' must be an integer", generate, lm, "a", seed="0")
refused("seed=None must be an integer", generate, lm, "a", seed=None)
refused("max_new_tokens=2.5 must be an integer", generate, lm, "a", max_new_tokens=2.5)
refused("stop=2.5", generate, lm, "a", stop=2.5)
refused("prompts=None must be a text", generate, lm, None)
refused("path=None names no model", lq.load, None)
refused("path='' names no model", lq.load, "")
refused("seed=1.5 must be an integer", lq.init, config, seed=1.5)
assert str(lq.init(config, seed=jnp.int32(1))) == str(lq.init(config, seed=1))
refused("labels=3 must be the names of the classes", lq.with_classifier, lm, labels=3)
refused("seed=None must be an integer", lq.with_classifier, lm, ["a", "b"], seed=None)
"""


def test_what_the_public_functions_are_given():
    """Without the checks of types that tests have and users have not."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_variable_of_the_class_is_no_field_to_be_read_or_chosen():
    with pytest.raises(BadInput, match=r"there is no field 'oven'; choose from layers, heat, cream, name, other$"):
        create(Cake, {"oven": "gas"})


def test_json_has_a_list_for_a_tuple():
    @dataclass(frozen=True)
    class Ropes:
        bases: tuple[float, ...] | None = None
        spans: tuple[tuple[int, ...], ...] = ()
        names: tuple[str, ...] | list[str] = ()

    read = create(Ropes, {"bases": [1, 2.5], "spans": [[0, 3], [4]], "names": ["a"]})
    assert read == Ropes((1.0, 2.5), ((0, 3), (4,)), ["a"])  # a field that takes lists too gets what there is
    assert [type(base) for base in read.bases] == [float, float]
    with pytest.raises(BadInput, match=r"bases=\['a'\] is not of the type"):
        create(Ropes, {"bases": ["a"]})
