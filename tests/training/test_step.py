import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmq_jax.data import ByteTokenizer
from llmq_jax.errors import BadInput
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import GPT2Config, build, init
from llmq_jax.objectives import NextToken
from llmq_jax.objectives.means import over_devices
from llmq_jax.training.engine import run
from llmq_jax.training.optimizer import adamw
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.state import create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.mesh_program import spread_of_draws

CONFIG = GPT2Config(
    vocab_size=23,
    max_position_embeddings=16,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.3,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
SGD = optax.sgd(0.5)


def ragged_batch(seed: int, rows: int = 4, length: int = 9) -> dict:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 23, (rows, length + 1)).astype(np.int32)
    lengths = rng.integers(1, length + 1, rows)
    mask = (np.arange(length)[None] < lengths[:, None]).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


@cache
def drawn(config):
    return jax.device_get(init(config))


def fresh(optimizer, config=CONFIG, seed=0):
    return create_state(jax.tree.map(jnp.array, drawn(config)), optimizer, seed=seed)  # a copy, which a step consumes


@cache
def whole_step():
    return make_train_step(NextToken(build(CONFIG)), SGD)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_neither_loss_nor_gradients(accumulate):
    objective, batch = NextToken(build(CONFIG)), ragged_batch(0)
    whole, metrics = whole_step()(fresh(SGD), batch)
    assert metrics.keys() == {"loss", "grad_norm"}
    parts, part_metrics = make_train_step(objective, SGD, accumulate=accumulate)(fresh(SGD), batch)
    assert_close(part_metrics, metrics, rtol=1e-5)
    assert_close(parts.variables, whole.variables, atol=1e-6)
    # The trap it guards against: the mean of micro-batch means is another number on ragged masks.
    eval_step = make_eval_step(objective)
    halves = [{name: x[i::2] for name, x in batch.items()} for i in range(2)]
    means = [evaluate(eval_step, drawn(CONFIG), [half])["loss"] for half in halves]
    assert abs(np.mean(means) - float(metrics["loss"])) > 1e-3


def test_evaluation_over_batches_is_the_mean_over_tokens():
    objective = NextToken(build(CONFIG))
    batches = [ragged_batch(1), ragged_batch(2)]
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    eval_step = make_eval_step(objective)
    got = evaluate(eval_step, drawn(CONFIG), batches)
    np.testing.assert_allclose(got["loss"], evaluate(eval_step, drawn(CONFIG), [joined])["loss"], rtol=1e-6)


def test_a_term_that_counts_nothing_is_left_out_but_not_the_loss():
    """As the second token ahead is in rows of two. Extremes have no weight."""
    sums, weights = {"loss": 0.0, "mtp_2_loss": 0.0, "max_reward": 3.0}, {"loss": 0.0, "mtp_2_loss": 0.0}
    totals = jax.tree.map(np.float32, (sums, weights))
    with np.errstate(invalid="ignore"):
        found = evaluate(lambda variables, batch: totals, {}, [{}])
    assert found.keys() == {"loss", "max_reward"} and np.isnan(found["loss"]) and found["max_reward"] == 3.0


def test_remat_scan_and_their_absence_give_the_same_update():
    batch = ragged_batch(3)
    reference, _ = whole_step()(fresh(SGD), batch)
    for options in ({"remat": "full"}, {"remat": "dots", "scan_layers": False}, {"scan_layers": False}):
        state, _ = make_train_step(NextToken(build(CONFIG, **options)), SGD)(fresh(SGD), batch)
        assert_close(state.variables, reference.variables, atol=1e-6)


def test_only_the_trainable_collection_moves():
    class Sum:
        model = build(CONFIG)

        def weights(self, batch, step=None):
            return {"loss": jnp.ones(())}

        def loss(self, variables, batch, weights, rng):
            found = {"min_reward": batch["x"].min(), "max_reward": -batch["x"].max()}
            return jnp.sum(variables["lora"]["kernel"] * variables["params"]["kernel"] * batch["x"].sum()), found, {}

    variables = {"params": {"kernel": jnp.ones(3)}, "lora": {"kernel": jnp.ones(3)}}
    state = create_state(variables, SGD, trainable="lora")
    state, metrics = make_train_step(Sum(), SGD, accumulate=2)(state, {"x": np.array([[0.5], [1.5]], np.float32)})
    np.testing.assert_array_equal(state.variables["params"]["kernel"], np.ones(3))
    np.testing.assert_allclose(state.variables["lora"]["kernel"], np.zeros(3))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(12.0), rtol=1e-6)
    assert (metrics["min_reward"], metrics["max_reward"]) == (0.5, -0.5)  # not the 0 that sums begin with


def test_metrics_of_replicas_are_those_of_the_batch():
    expected = {"loss": 6, "coefficient": 3, "min_reward": 1, "max_reward": 3}
    expected |= {"clip_ratio/low_min": 1, "clip_ratio/high_max": 3}

    def whole(part):
        return over_devices(dict.fromkeys(expected, part), "replicas")

    found = jax.vmap(whole, axis_name="replicas")(jnp.array([1.0, 3.0, 2.0]))
    assert {name: values.tolist() for name, values in found.items()} == {name: [x] * 3 for name, x in expected.items()}


def test_dropout_follows_seed_and_step():
    config = GPT2Config(vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, embd_pdrop=0.5)
    step, batch = make_train_step(NextToken(build(config)), optax.set_to_zero()), ragged_batch(4)

    def losses(seed):
        state, seen = fresh(optax.set_to_zero(), config, seed), []
        for _ in range(2):
            state, metrics = step(state, batch)
            seen.append(float(metrics["loss"]))
        return seen

    first, second = losses(0)
    assert first != second
    assert losses(0) == [first, second]
    assert losses(1)[0] != first


def test_each_micro_batch_draws_its_own_dropout():
    assert spread_of_draws(2, accumulate=2) > 1e-3


def test_bfloat16_compute_keeps_float32_masters():
    optimizer = adamw(1e-2)
    step = make_train_step(NextToken(build(CONFIG, dtype="bfloat16")), optimizer)
    state, metrics = fresh(optimizer), {}
    batch = ragged_batch(5)
    first = None
    for _ in range(20):
        state, metrics = step(state, batch)
        first = first or float(metrics["loss"])
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {np.dtype("float32")}
    assert float(metrics["loss"]) < first - 0.5


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(BadInput, match="4 rows cannot be cut into 3 equal micro-batches"):
        make_train_step(NextToken(build(CONFIG)), SGD, accumulate=3)(fresh(SGD), ragged_batch(0))
    groups = SimpleNamespace(model=build(CONFIG), group_size=4, weights=lambda batch, step: {})
    with pytest.raises(BadInput, match="cannot be cut into 2 equal micro-batches of whole groups of 4"):
        make_train_step(groups, SGD, accumulate=2)(fresh(SGD), ragged_batch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"accumulate": 1.5}, "accumulate=1.5 must be an integer"),
        ({"mode": "pmapp"}, "mode='pmapp' is unknown; did you mean pmap?"),
    ],
)
def test_a_step_of_no_number_of_parts_or_of_no_mode_is_refused(options, message):
    with pytest.raises(BadInput) as error:
        make_train_step(NextToken(build(CONFIG)), SGD, **options)
    assert str(error.value) == message


def test_a_metric_without_a_weight_is_told_before_anything_runs():
    class Forgetful(NextToken):
        def loss(self, *arguments):
            loss, _, counts = super().loss(*arguments)
            return loss, {"rewards/accuracies": loss, "max_reward": loss}, counts  # an extreme needs no weight

    eval_step = make_eval_step(Forgetful(build(CONFIG)))
    with pytest.raises(BadInput, match=r"^Forgetful\.weights lacks rewards/accuracies: give it what"):
        jax.eval_shape(eval_step.program, drawn(CONFIG), ragged_batch(0))


@pytest.mark.parametrize(
    "returned",
    [
        lambda loss, metrics, counts: (loss, metrics, None),
        lambda loss, metrics, counts: (loss, metrics),
        lambda loss, metrics, counts: loss,
        lambda loss, metrics, counts: (jnp.ones(2) * loss, metrics, counts),
    ],
    ids=["no-counts", "two", "one", "no-scalar"],
)
def test_a_loss_that_returns_something_else_is_told_what_to_return(returned):
    class Short(NextToken):
        def loss(self, *arguments):
            return returned(*super().loss(*arguments))

    objective = Short(build(CONFIG))
    train_step, eval_step = make_train_step(objective, SGD), make_eval_step(objective)
    for step, first in ((train_step, fresh(SGD)), (eval_step, drawn(CONFIG))):
        with pytest.raises(
            BadInput, match=r"^Short\.loss must return \(scalar, metrics, counts of experts\), the last"
        ):
            jax.eval_shape(step.program, first, ragged_batch(0))


@pytest.mark.parametrize("bound", ["all", "some", "none"])
def test_a_step_is_compiled_once_wherever_weights_come_from(bound):
    """Weights of a checkpoint are bound to a device, fresh optimizer states are not: the first step must not find
    another mixture than the second."""
    variables = init(CONFIG)
    if bound != "none":
        device = jax.devices()[0]
        names = variables["params"] if bound == "all" else ["token_embedding"]
        params = {
            name: jax.device_put(leaf, device) if name in names else leaf for name, leaf in variables["params"].items()
        }
        variables = {"params": params}
    state = create_state(variables, adamw(lambda step: 1e-3))
    step = make_train_step(NextToken(build(CONFIG)), adamw(lambda step: 1e-3))
    before = [leaf.committed for leaf in jax.tree.leaves(state)]
    state, _ = step(state, ragged_batch(0))
    assert [leaf.committed for leaf in jax.tree.leaves(state)] == before


def shown(name):
    """What docs/training.md defines."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    mark = f"<!-- executed by tests/training/test_step.py: {name} -->"
    (code,) = re.findall(rf"{re.escape(mark)}\n```python\n(.*?)```", page, re.DOTALL)
    exec(code, scope := {})
    return scope


def test_a_loop_by_hand(capsys):
    config = GPT2Config(**(vars(CONFIG) | {"vocab_size": 257}))
    lm = LanguageModel(config, build(config), init(config), ByteTokenizer())
    learned = shown("by-hand")["trained"](lm, "abcdefgh" * 40, "abcdefgh" * 9, steps=20)
    *steps, evaluated = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[1]) for line in steps]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    validation = float(re.fullmatch(r"\{'loss': (.*)\}", evaluated)[1])
    assert validation < losses[0] - 1
    assert learned.logits([[97, 98]]).shape == (1, 2, 257)


def test_a_loss_with_one_more_term():
    """The terms add up over halves of the batch to those of the formula; evaluation has the plain loss alone."""
    objective, state, batch = shown("z-loss")["WithZLoss"](build(CONFIG)), fresh(SGD), ragged_batch(0)
    plain = evaluate(make_eval_step(objective), state.variables, [batch])["loss"]
    squares = jax.nn.logsumexp(objective.model.apply(state.variables, batch["tokens"]), axis=-1) ** 2
    z_loss = (batch["mask"] * squares).sum() / batch["mask"].sum()
    expected = {"loss": plain + 1e-4 * z_loss, "next_token_loss": plain, "z_loss": z_loss}
    _, metrics = make_train_step(objective, SGD, accumulate=2)(state, batch)
    assert_close({name: metrics[name] for name in expected}, expected, rtol=1e-5)


def test_batches_hold_what_a_teacher_says():
    scope = shown("teacher")
    model = SimpleNamespace(apply=lambda table, tokens, positions, segments: table[tokens])
    teacher = SimpleNamespace(model=model, variables=jnp.eye(23))
    batch = ragged_batch(0)
    taught = scope["Taught"]([batch], teacher)[0]
    assert taught.keys() == batch.keys() | {"teacher"}
    assert (taught["teacher"].argmax(axis=-1) == batch["tokens"]).all()


def test_an_average_of_the_weights_is_kept_and_resumes(tmp_path):
    averaged = shown("average")["Averaged"]

    def trained(folder, batches):
        step, eval_step = averaged(whole_step(), decay=0.5), make_eval_step(NextToken(build(CONFIG)))
        files = {"folder": tmp_path / folder, "evaluate": lambda v: average_loss(v, step, eval_step)}
        options = RunOptions(steps=3, checkpoint_every=1, evaluate_every=1, log_every=1, plot=False)
        start, judged_by = step.start(fresh(SGD)), ("average_loss", "lowest")
        return run(start, step, batches, options, judged_by=judged_by, **files).state

    def average_loss(variables, step, eval_step):
        losses = [evaluate(eval_step, v, [batches[0]])["loss"] for v in (variables, {"params": step.average})]
        return dict(zip(("loss", "average_loss"), losses, strict=True))

    batches = [ragged_batch(seed) for seed in range(3)]
    state = trained("whole", batches)
    expected, plain = fresh(SGD).trained, fresh(SGD)
    for batch in batches:
        plain, _ = whole_step()(plain, batch)
        expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, expected, plain.trained)
    assert_close(state.carried["average"], expected, rtol=1e-6)
    with pytest.raises(IndexError):
        trained("stopped", batches[:2])
    resumed = trained("stopped", batches)
    jax.tree.map(np.testing.assert_array_equal, resumed.carried, state.carried)
