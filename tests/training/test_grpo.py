"""The loop of GRPO: rollouts, rewards, references, process supervision, a reward model that learns on."""

import dataclasses
import json
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
from llmq_jax.data.length_buckets import bucket_width
from llmq_jax.data.prompts import Prompt, PromptBatches, step_seeds
from llmq_jax.errors import BadInput
from llmq_jax.generation import Sampler
from llmq_jax.generation.decoding import advance, prefill
from llmq_jax.objectives.grpo import GRPO
from llmq_jax.objectives.logprobs import completion_logprobs
from llmq_jax.objectives.reward import RewardModel, token_scores
from llmq_jax.rewards import Rewards
from llmq_jax.training.grpo import REFERENCE, Loop, over_updates, reference_variables
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.optimizer import adamw
from llmq_jax.training.parts import train_adapters
from llmq_jax.training.reward_learner import REWARD_MODEL, RewardLearner
from llmq_jax.training.rollout_scores import ModelReward, Scores, SummedRewards, TextRewards, step_ends
from llmq_jax.training.rollouts import Rollout, roll_out
from llmq_jax.training.state import create_state
from llmq_jax.training.step import make_train_step
from tests.byte_fallback import byte_ids, fallback_tokenizer
from tests.weights import draw_variables

GROUP, NEW = 4, 6
SAMPLER = Sampler(temperature=1.3)


@pytest.fixture(scope="module")
def lm():
    config = lq.Llama3Config(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    tokenizer = lq.ByteTokenizer()
    ends = lq.GenerationConfig(eos_token_id=(tokenizer.end_of_text, *range(0, 256, 16)))
    return lq.LanguageModel(config, lq.build(config), draw_variables(config, seed=2), tokenizer, ends)


@pytest.fixture(scope="module")
def reward_lm(lm):
    return lq.with_classifier(lm, ["reward"], seed=7)


def prompts(count=5):
    texts = [f"say {index}" * (1 + index % 2) for index in range(count)]
    return [Prompt(f"row {i}", text, list(text.encode()), {"best": i}) for i, text in enumerate(texts)]


def bytes_of(completions, best, **_):
    """A reward that differs between answers: the mean byte."""
    return [float(np.mean([ord(c) for c in text] or [0])) / 100 for text in completions]


def text_rewards(function=bytes_of):
    return TextRewards(Rewards(("bytes",), (function,), (1.0,)))


OPTIMIZER = adamw(lambda step: 0.01, weight_decay=0.0)


@cache
def compiled_step(model, beta, shared_by, trainable):
    """What loops of equal settings share: (objective, its step)."""
    objective = GRPO(model, beta=beta, temperature=SAMPLER.temperature, group_size=shared_by)
    return objective, make_train_step(objective, OPTIMIZER)


def make_loop(lm, score=None, *, beta=0.0, shared_by=1, trainable=("params",), **options):
    objective, update = compiled_step(lm.model, beta, shared_by, trainable)
    made = Loop(lm, objective, update, prompts(), score or text_rewards(), GROUP, NEW, SAMPLER, **options)
    variables = jax.tree.map(jnp.array, jax.device_get(lm.variables))  # which a step consumes
    return made, made.start(create_state(variables, OPTIMIZER, trainable=trainable))


@partial(jax.jit, static_argnums=0)
def logprobs_of(model, variables, tokens, lengths, prompt_lengths):
    arrays = tokens, lengths, prompt_lengths
    return completion_logprobs(model, variables, *arrays, NEW, temperature=SAMPLER.temperature)[0]


scores_of_tokens = jax.jit(token_scores, static_argnums=0)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_answers_follow_their_prompts_and_keep_their_logprobs(lm):
    rollout = roll_out(lm, prompts(2), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(2 * GROUP))
    assert len(rollout) == 2 * GROUP
    for row in range(len(rollout)):
        prompt = rollout.prompts[row // GROUP].tokens
        assert rollout.tokens[row, : len(prompt)].tolist() == prompt
        assert rollout.prompt_lengths[row] == len(prompt)
        answer = rollout.tokens[row, len(prompt) : rollout.lengths[row]].tolist()
        assert (
            rollout.answer_mask[row].sum()
            == len(answer)
            == rollout.response_mask(rollout.lengths, rollout.tokens.shape[1])[row].sum()
        )
        assert rollout.terminated[row] == (answer[-1] in lm.generation.eos_token_id)
        assert rollout.terminated[row] or len(answer) == NEW
        assert not rollout.tokens[row, rollout.lengths[row] :].any()
    arrays = (jnp.asarray(x) for x in (rollout.tokens, rollout.lengths, rollout.prompt_lengths))
    logprobs = logprobs_of(lm.model, lm.variables, *arrays)
    np.testing.assert_allclose(logprobs, rollout.logprobs, atol=1e-4)
    assert len(set(rollout.completions)) > 4
    width = bucket_width(int(rollout.prompt_lengths.max()), rollout.tokens.shape[1])
    np.testing.assert_array_equal(rollout.prompt_rows(), rollout.tokens[:, :width])
    seeds = [3, 2, 1, 0, 7, 6, 5, 4]
    turned = roll_out(lm, prompts(2), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=seeds)
    assert turned.completions == [rollout.completions[seed] for seed in seeds]


def test_answers_in_half_precision_are_those_of_the_adapters_that_learn(lm):
    """Merged into the weights, what they have learned so far would be rounded away."""

    def unlike(lm):
        """The mean difference of log-probabilities, as the answers were drawn and as the policy learns."""
        rollout = roll_out(lm, prompts(), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(5 * GROUP))
        arrays = (jnp.asarray(x) for x in (rollout.tokens, rollout.lengths, rollout.prompt_lengths))
        differences = np.abs(logprobs_of(lm.model, lm.variables, *arrays) - rollout.logprobs)
        return differences[rollout.answer_mask > 0].mean()

    adapted = lq.lora(lm, rank=2)
    fresh = adapted.variables["lora"]
    learned = jax.tree.map(lambda leaf: leaf + 0.01 * np.random.default_rng(1).standard_normal(leaf.shape), fresh)
    in_bfloat16 = {"params": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.params)}
    adapted = adapted.replace(variables={**adapted.variables, "lora": learned})
    single, half = (lq.build(lm.config, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert unlike(adapted.replace(model=single, variables={**adapted.variables, **in_bfloat16})) < 1e-5
    plain, beside = unlike(lm.replace(model=half)), unlike(adapted.replace(model=half))
    assert beside < 1.4 * plain  # merged: 1.85


def test_in_half_precision_nothing_is_clipped_before_the_policy_moves(lm):
    """Drawing rounds otherwise than learning, by more than the bounds of gspo's paper."""
    half = lm.replace(model=lq.build(lm.config, dtype="bfloat16"))
    objective = GRPO(half.model, loss_type="gspo", clip_low=3e-4, clip_high=4e-4, temperature=SAMPLER.temperature)
    still = adamw(lambda step: 0.0, weight_decay=0.0)
    update = make_train_step(objective, still)
    loop = Loop(half, objective, update, prompts(), text_rewards(), GROUP, NEW, SAMPLER, iterations=2)
    state = create_state(jax.tree.map(jnp.array, half.variables), still)
    _, metrics = loop.step(state, PromptBatches(5, 2)[0])
    assert metrics["clip_ratio/region_mean"] == 0


def test_a_step_raises_the_reward_of_its_answers(lm):
    """What was better than its group becomes likelier, what was worse less so."""
    loop, state = make_loop(lm, iterations=2)
    batch = PromptBatches(5, 2)[0]
    before, _, _ = loop.answered(state, batch)
    state, metrics = loop.step(state, batch)
    rewards = loop.score(before).rewards
    advantages = loop.advantages(loop.score(before))
    arrays = (jnp.asarray(x) for x in (before.tokens, before.lengths, before.prompt_lengths))
    after = logprobs_of(lm.model, state.variables, *arrays)
    change = np.asarray((after - before.logprobs).sum(1))
    assert (change * advantages).sum() > 0.1
    np.testing.assert_allclose(metrics["reward"], rewards.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/bytes/mean"], rewards.mean(), rtol=1e-6)
    spreads = rewards.reshape(2, GROUP).std(axis=1, ddof=1)
    np.testing.assert_allclose(metrics["reward_std"], spreads.mean(), rtol=1e-5)
    centred = (rewards.reshape(2, GROUP) - rewards.reshape(2, GROUP).mean(axis=1, keepdims=True)).reshape(-1)
    found = dataclasses.replace(loop, scale="none").advantages(loop.score(before))
    np.testing.assert_allclose(found, centred, rtol=1e-5)
    assert metrics["frac_reward_zero_std"] == 0
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - before.terminated.mean())
    np.testing.assert_allclose(metrics["rewards/bytes/std"], rewards.std(ddof=1), rtol=1e-5)
    for kind, lengths in (("", before.answer_lengths), ("terminated_", before.answer_lengths[before.terminated])):
        for name in ("mean", "min", "max"):
            assert metrics[f"completions/{name}_{kind}length"] == pytest.approx(getattr(lengths, name)())
    assert metrics["tokens"] == before.lengths.sum()
    assert {
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_max",
        "rollout_seconds",
        "update_seconds",
    } <= metrics.keys()
    assert state.step == 2


def test_equal_steps_are_equal(lm):
    batch = PromptBatches(5, 2)[3]
    loop, state = make_loop(lm)
    again, same_state = make_loop(lm)
    state, _ = loop.step(state, batch)
    same_state, _ = again.step(same_state, batch)
    assert same(state.variables, same_state.variables)


def test_prompts_that_are_read_once_change_nothing(lm):
    """Loss, metrics and gradients, and what the reference says, of rows that each read their own prompt."""
    found = []
    for shared_by in (1, GROUP):
        loop, state = make_loop(lm, beta=0.3, shared_by=shared_by)
        rollout, scores, _ = loop.answered(state, PromptBatches(5, 2)[1])
        rows = loop.rows(state, rollout, loop.advantages(scores))
        assert ("prompts" in rows) == (shared_by > 1)
        rows = jax.tree.map(jnp.asarray, rows)

        def value(variables, objective=loop.objective, rows=rows):
            loss, metrics, _ = objective.loss(variables, rows, objective.weights(rows))
            return loss, (loss, metrics, rows["reference_logprobs"])

        moved = jax.tree.map(lambda leaf: np.float32(1.05) * leaf, jax.device_get(state.variables))
        gradients, values = jax.jit(jax.grad(value, has_aux=True))(moved)
        found.append((values, gradients))
    (values, gradients), (shared_values, shared_gradients) = found
    assert values[1]["kl"] > 1e-3
    for one, other in zip(jax.tree.leaves(shared_values), jax.tree.leaves(values), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)
    for one, other in zip(jax.tree.leaves(shared_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()), rtol=0)


def test_prompts_that_are_read_once_stay_with_their_answers_in_micro_batches(lm):
    loop, state = make_loop(lm, shared_by=GROUP)
    rollout, scores, _ = loop.answered(state, PromptBatches(5, 2)[1])
    rows = jax.tree.map(jnp.asarray, loop.rows(state, rollout, loop.advantages(scores)))
    optimizer, found = optax.sgd(1.0), []
    for objective, parts in ((dataclasses.replace(loop.objective, group_size=1), 1), (loop.objective, 2)):
        start = create_state(jax.tree.map(jnp.copy, state.variables), optimizer)
        found.append(make_train_step(objective, optimizer, accumulate=parts)(start, rows))
    (plain, plain_metrics), (shared, shared_metrics) = found
    assert shared_metrics["grad_norm"] > 0.01
    for name, value in plain_metrics.items():
        np.testing.assert_allclose(shared_metrics[name], value, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), shared.variables, plain.variables)


def test_a_run_compiles_a_handful_of_programs(lm):
    loop, state = make_loop(lm, beta=0.15)  # a step that no other test takes
    batches = PromptBatches(5, 2)
    state, _ = loop.step(state, batches[0])
    state, _ = loop.step(state, batches[1])
    programs = loop.update.program, prefill, advance
    before = [program._cache_size() for program in programs]
    for step in range(2, 6):
        state, _ = loop.step(state, batches[step])
    assert [program._cache_size() for program in programs] == before
    assert before[0] == 1


@pytest.mark.parametrize(("reference", "moves"), [("iteration", [0, 2, 4]), ("start", [0])])
def test_the_reference_is_refreshed(lm, reference, moves):
    loop, state = make_loop(lm, beta=0.1, reference=reference, steps_per_iteration=2)
    state = state.replace(carried={**state.carried, "other": jnp.ones(1)})  # which stays
    start = jax.tree.map(np.asarray, state.carried[REFERENCE])
    for number in range(5):
        policy = jax.tree.map(np.asarray, state.variables["params"])
        state, metrics = loop.step(state, PromptBatches(5, 2)[number])
        found = state.carried[REFERENCE]["params"]
        assert same(found, policy) == (number in moves)
        if reference == "start":
            assert same(found, start["params"])
        # Where the reference is the policy itself, there is no distance yet.
        assert (abs(metrics["kl"]) < 1e-6) == (number in moves)
        assert "other" in state.carried


def test_the_old_policy_may_be_the_reference(lm):
    """The original repository's experimental variant: nothing is carried, and the first update has no distance."""
    loop, state = make_loop(lm, beta=0.1, reference="old", iterations=2)
    assert state.carried is None
    for number in range(2):
        state, metrics = loop.step(state, PromptBatches(5, 2)[number])
        assert 0 < metrics["kl"] < 1


def test_without_beta_there_is_no_reference(lm):
    loop, state = make_loop(lm)
    assert state.carried is None
    _, metrics = loop.step(state, PromptBatches(5, 2)[0])
    assert "kl" not in metrics


def test_adapters_have_a_reference_of_their_own_size(lm):
    adapted = lq.lora(lm, rank=2)
    loop, state = make_loop(adapted, beta=0.1, trainable=("lora",))
    assert state.carried[REFERENCE].keys() == {"lora"}
    state, metrics = loop.step(state, PromptBatches(5, 2)[0])
    assert abs(metrics["kl"]) < 1e-6
    assert same(state.variables["params"], lm.variables["params"])


def test_an_embedding_that_trains_beside_adapters_has_a_reference_too(lm):
    """That of the start, not the one that has learned."""
    adapted = lq.lora(lm, rank=2, whole="token_embedding")
    model, variables, trainable = train_adapters(adapted.model, adapted.variables)
    loop, state = make_loop(lm.replace(model=model, variables=variables), beta=0.1, trainable=trainable)
    rollout = roll_out(lm, prompts(2), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(8))
    expected = loop.reference_logprobs(state, rollout)
    before = np.array(state.variables["params"]["token_embedding"]["embedding"])
    state, _ = loop.step(state, PromptBatches(5, 2)[0])
    assert not same(state.variables["params"]["token_embedding"]["embedding"], before)
    np.testing.assert_allclose(loop.reference_logprobs(state, rollout), expected, atol=1e-6)


def test_groups_without_spread_teach_nothing_and_say_so(lm):
    said = []
    loop, state = make_loop(lm, text_rewards(lambda completions, **_: [1.5] * len(completions)), say=said.append)
    before = jax.tree.map(np.asarray, state.variables)
    for number in range(2):
        state, metrics = loop.step(state, PromptBatches(5, 2)[number])
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0
    assert same(state.variables, before)
    assert len(said) == 1
    assert "the answers of every group have the same reward (1.5 in the first)" in said[0]


def test_groups_without_spread_are_replaced(lm):
    """Only prompts whose number is even have answers of unequal worth, and each answer is scored once."""
    scored = []

    def graded(completions, best, **_):
        scored.extend(best[::GROUP])
        return [len(text) + place + 2.0 if best[place] % 2 == 0 else 1.0 for place, text in enumerate(completions)]

    batch = {"step": 0, "prompts": [1, 3, 4]}
    plain, state = make_loop(lm, text_rewards(graded))
    _, scores, asked = plain.answered(state, batch)
    assert plain.teaches(scores).tolist() == [False, False, True]
    assert asked.silent == pytest.approx(2 / 3)

    scored.clear()
    loop, state = make_loop(lm, text_rewards(graded), dynamic_sampling=True)
    rollout, scores, asked = loop.answered(state, batch)
    assert rollout.prompts[0].columns["best"] == 4
    assert {prompt.columns["best"] for prompt in rollout.prompts} == {0, 2, 4}
    assert loop.teaches(scores).all()
    assert len(scored) == 6 and scored[:3] == [1, 3, 4] and {0, 2} <= set(scored[3:])  # those not yet asked come first
    assert asked.silent == pytest.approx(2 / 3)
    assert asked.tokens > rollout.lengths.sum()
    assert rollout.tokens.shape[0] == 3 * GROUP == len(scores.rewards) == len(rollout.completions)
    expected = graded(rollout.completions, [p.columns["best"] for p in rollout.prompts for _ in range(GROUP)])
    assert [reward > 1 for reward in scores.rewards] == [reward > 1 for reward in expected]

    # Where nothing has spread, what was asked stays, and says nothing.
    equal, state = make_loop(lm, text_rewards(lambda completions, **_: [2.0] * len(completions)), dynamic_sampling=True)
    rollout, scores, asked = equal.answered(state, batch)
    assert not equal.teaches(scores).any() and len(rollout) == 3 * GROUP and asked.silent == 1
    assert len({prompt.columns["best"] for prompt in rollout.prompts}) == 3  # not one of them three times


def test_rounds_of_sampling(lm):
    """Each asks prompts that were not asked yet, with seeds of its own; what is too much is left out."""
    rounds = []

    def sample(policy, asked, seeds):
        rounds.append(([prompt.columns["best"] for prompt in asked], seeds))
        rows = len(asked) * GROUP
        ones, lengths = np.ones((rows, NEW), np.float32), np.full(rows, 1 + NEW)
        tokens = np.ones((rows, 8 + len(rounds)), np.int32)  # widths differ
        return Rollout(asked, GROUP, tokens, lengths, lengths - NEW, ones, ones, ones[:, 0] > 0, [""] * rows)

    def score(rollout):
        """Of the first round two groups teach, of the second none, of the third all."""
        teach = {1: [0, 2], 2: [], 3: [0, 1, 2, 3]}[len(rounds)]
        rewards = np.zeros((4, GROUP), np.float32)
        rewards[teach, 0] = 1.0
        return Scores(rewards.reshape(-1), {})

    loop, state = make_loop(lm, score, dynamic_sampling=True, seed=3)
    loop.sample, loop.prompts = sample, prompts(12)
    rollout, scores, cost = loop.answered(state, {"step": 2, "prompts": [5, 6, 7, 8]})
    asked, seeds = zip(*rounds, strict=True)
    assert sorted(place for each in asked for place in each) == list(range(12))
    assert len({seed for each in seeds for seed in each}) == 12 * GROUP
    assert list(seeds[0]) == step_seeds(3, 2, 4 * GROUP)
    assert [prompt.columns["best"] for prompt in rollout.prompts] == [5, 7, *asked[2][:2]]
    assert loop.teaches(scores).all() and rollout.tokens.shape == (4 * GROUP, 11)
    assert rollout.tokens[:, :9].all() and not rollout.tokens[: 2 * GROUP, 9:].any()  # padded on the right
    assert cost.tokens == 12 * GROUP * (1 + NEW) and cost.silent == 0.5
    # In an order of their own, not that in which the first epoch asks.
    assert loop.other_prompts(0, 0, 12, set()) != PromptBatches(12, 12, loop.seed)[0]["prompts"].tolist()


def test_metrics_of_several_updates():
    extremes = ("clip_ratio/low_min", "clip_ratio/high_max")
    updates = [{name: np.float32(value) for name in ("loss", *extremes)} for value in (1.0, 4.0)]
    assert over_updates(updates) == {"loss": 2.5, "clip_ratio/low_min": 1.0, "clip_ratio/high_max": 4.0}


def test_answers_that_were_cut_may_be_masked(lm):
    loop, state = make_loop(lm, mask_truncated=True)
    rollout, scores, _ = loop.answered(state, PromptBatches(5, 2)[0])
    mask = loop.rows(state, rollout, loop.advantages(scores))["completion_mask"]
    np.testing.assert_array_equal(mask.any(axis=1), rollout.terminated)
    assert 0 < rollout.terminated.sum() < len(rollout)

    said = []
    never = lm.replace(generation=lq.GenerationConfig())
    loop, state = make_loop(never, mask_truncated=True, say=said.append)
    for number in range(2):
        state, metrics = loop.step(state, PromptBatches(5, 2)[number])
    assert metrics["loss"] == 0
    assert len(said) == 1 and "every answer was cut and is masked" in said[0]


def test_the_reference_of_a_router_is_its_own():
    """A router's bias moves without gradients, and belongs to what the reference was."""
    sizes = {"vocab_size": 257, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 0}
    config = lq.DeepSeekV3Config(
        **sizes,
        **latent,
        **experts,
        n_group=1,
        topk_group=1,
        intermediate_size=8,
        max_position_embeddings=64,
        num_nextn_predict_layers=0,
    )
    tokenizer = lq.ByteTokenizer()
    ends = lq.GenerationConfig(eos_token_id=(tokenizer.end_of_text,))
    lm = lq.LanguageModel(config, lq.build(config), draw_variables(config, seed=2), tokenizer, ends)
    loop, state = make_loop(lm, beta=0.1, reference="start")
    begin = jax.tree.map(np.asarray, state.variables["router"])
    state, _ = loop.step(state, PromptBatches(5, 2)[0])
    assert not same(state.variables["router"], begin)
    assert same(reference_variables(state)["router"], begin)


def test_rewards_of_a_model(lm, reward_lm):
    rollout = roll_out(lm, prompts(2), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(8))
    scores, _ = scores_of_tokens(
        reward_lm.model, reward_lm.variables, jnp.asarray(rollout.tokens), jnp.asarray(rollout.lengths)
    )
    scores, rows = np.asarray(scores), np.arange(len(rollout))
    np.testing.assert_allclose(ModelReward(reward_lm)(rollout).rewards, scores[rows, rollout.lengths - 1], atol=1e-5)
    mask = rollout.response_mask(rollout.lengths, rollout.tokens.shape[1])
    means = (scores * mask).sum(1) / rollout.answer_lengths
    np.testing.assert_allclose(ModelReward(reward_lm, "mean")(rollout).rewards, means, atol=1e-5)


def test_functions_may_be_silent_beside_a_reward_model(lm, reward_lm):
    rollout = roll_out(lm, prompts(2), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(8))

    def of_the_first_prompt(completions, best, **_):
        return [1.0 if place == 0 else None for place in best]

    texts, model = text_rewards(of_the_first_prompt), ModelReward(reward_lm)
    scores = SummedRewards(texts, model, 0.5)(rollout)
    np.testing.assert_allclose(scores.rewards, np.repeat([1, 0], GROUP) + 0.5 * model(rollout).rewards, atol=1e-6)
    learned = jax.tree.map(lambda leaf: 2 * leaf, reward_lm.variables)  # those of a reward model that goes on learning
    scores_then = SummedRewards(texts, model, 0.5)(rollout, learned)
    np.testing.assert_array_equal(scores_then.by_name[model.name], model(rollout, learned).rewards)
    assert not np.allclose(scores_then.rewards, scores.rewards, atol=1e-3)
    assert np.isnan(scores.by_name["bytes"][GROUP:]).all()
    with pytest.raises(BadInput, match=r"no reward of completion 4"):
        texts(rollout)


def test_an_end_that_the_reward_model_takes_for_padding_is_not_read(lm, reward_lm):
    rollout = roll_out(lm, prompts(2), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(8))
    last = rollout.tokens[np.arange(8), rollout.lengths - 1]
    ended = np.flatnonzero(rollout.terminated & (rollout.answer_lengths > 1))[0]
    padded = reward_lm.replace(generation=lq.GenerationConfig(pad_token_id=int(last[ended])))
    trimmed = (last == last[ended]) & (rollout.answer_lengths > 1)
    np.testing.assert_array_equal(ModelReward(padded).rows(rollout)[1], rollout.lengths - trimmed)
    scores, _ = scores_of_tokens(
        reward_lm.model, reward_lm.variables, jnp.asarray(rollout.tokens), jnp.asarray(rollout.lengths)
    )
    found = ModelReward(padded)(rollout).rewards[ended]
    np.testing.assert_allclose(found, np.asarray(scores)[ended, rollout.lengths[ended] - 2], atol=1e-5)


def test_answers_are_read_with_what_the_chat_template_writes_after_them(lm, reward_lm):
    """As the reward model learned: the policy draws none of it."""
    rollout = roll_out(lm, prompts(), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(20))
    last = rollout.tokens[np.arange(20), rollout.lengths - 1]
    ending = [int(last[rollout.terminated][0]), 13, 10]
    ended = rollout.terminated & (last == ending[0])  # the template ends no answer with another end token
    assert 0 < ended.sum() < rollout.terminated.sum() < len(rollout)
    cut = dataclasses.replace(rollout, terminated=np.zeros(20, bool))  # an end of the template alone ends no answer
    np.testing.assert_array_equal(ModelReward(reward_lm, ending=ending).rows(cut)[1], rollout.lengths)
    found = {p: ModelReward(reward_lm, p, ending=ending)(rollout).rewards for p in ("last", "mean")}
    steps = ModelReward(reward_lm, process=True, separator="none", ending=ending)(rollout).steps
    for row, (start, length) in enumerate(zip(rollout.prompt_lengths, rollout.lengths, strict=True)):
        tokens = [*rollout.tokens[row, :length].tolist(), *(ending[1:] if ended[row] else ())]
        scores, _ = scores_of_tokens(
            reward_lm.model, reward_lm.variables, jnp.array([tokens]), jnp.array([len(tokens)], jnp.int32)
        )
        scores = np.asarray(scores)[0]
        np.testing.assert_allclose(found["last"][row], scores[-1], atol=1e-5)
        np.testing.assert_allclose(found["mean"][row], scores[start:].mean(), atol=1e-5)
        np.testing.assert_allclose(steps[row].sum(), scores[-1], atol=1e-5)


@pytest.mark.parametrize("fallback", [False, True])
def test_steps_end_at_separators_and_with_the_answer(lm, fallback):
    """Also where a line break is a token of a byte, which is decoded with those beside it."""
    text = "x=1\nab\n\nc"
    spelled = byte_ids if fallback else list
    tokenizer = fallback_tokenizer() if fallback else lm.tokenizer
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : 3 + len(text)] = spelled(b"say" + text.encode())
    rollout = Rollout(
        prompts(1),
        1,
        tokens,
        np.array([3 + len(text)]),
        np.array([3]),
        np.zeros((1, 12), np.float32),
        np.ones((1, 12), np.float32),
        np.array([True]),
        [text],
    )
    found = np.flatnonzero(step_ends(rollout, tokenizer, "\n")[0]).tolist()
    assert found == [3, 6, 7, 8]


def test_a_line_break_that_is_taken_back_hides_no_later_one():
    """Bytes that are no text make U+FFFD of those beside them, a line break too."""
    tokenizer = fallback_tokenizer()
    answer = [*byte_ids(b"\n\xff"), *byte_ids(b"hi\nx")]
    row = np.array([[*byte_ids(b"x"), *answer]], np.int32)
    count = len(answer)
    shape = (1, count)
    rollout = Rollout(
        prompts(1),
        1,
        row,
        np.array([1 + count]),
        np.array([1]),
        np.zeros(shape, np.float32),
        np.ones(shape, np.float32),
        np.array([True]),
        [""],
    )
    found = np.flatnonzero(step_ends(rollout, tokenizer, "\n")[0]).tolist()
    assert count - 2 in found and count - 1 in found


def test_an_end_token_that_the_reward_model_takes_for_padding_ends_the_last_step(reward_lm):
    """By the score of what came before it: or the policy would never learn when to stop."""
    rows = np.array([[65, 66, 67, 256], [65, 66, 67, 68]], np.int32)
    lengths, ones = np.array([4, 4], np.int32), np.ones((2, 3), np.float32)
    asked = [Prompt("row", "A", [65], {})]
    rollout = Rollout(
        asked, 2, rows, lengths, np.array([1, 1], np.int32), ones, ones, np.array([True, False]), ["", ""]
    )
    padded = reward_lm.replace(generation=lq.GenerationConfig(pad_token_id=256))
    scores = ModelReward(padded, process=True, separator="none")(rollout)
    np.testing.assert_array_equal(scores.step_ends, [[0, 0, 1], [0, 0, 1]])
    np.testing.assert_allclose(scores.steps[:, 2], scores.rewards, atol=1e-6)
    # What follows an end token may lie beyond the reward model's context.
    short = reward_lm.replace(config=dataclasses.replace(reward_lm.config, max_position_embeddings=4))
    scores = ModelReward(short, process=True, separator="none", ending=[256, 10])(rollout)
    np.testing.assert_allclose(scores.steps[:, 2], scores.rewards, atol=1e-6)
    of_one_token = dataclasses.replace(rollout, prompt_lengths=np.array([3, 3], np.int32))  # of which something is read
    assert ModelReward(padded).rows(of_one_token)[1].tolist() == [4, 4]


def test_process_supervision_rewards_later_steps(lm, reward_lm):
    loop, state = make_loop(lm, ModelReward(reward_lm, process=True, separator="�"))
    _, scores, _ = loop.answered(state, PromptBatches(5, 2)[0])
    advantages = loop.advantages(scores)
    assert advantages.shape == (2 * GROUP, NEW)
    # Normalised over all steps of a group; a token has the sum of the steps from its own on (4.1.3).
    for group in range(2):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        ends, steps = scores.step_ends[rows] > 0, scores.steps[rows]
        normal = np.where(ends, (steps - steps[ends].mean()) / (steps[ends].std(ddof=1) + 1e-4), 0)
        np.testing.assert_allclose(advantages[rows], normal[:, ::-1].cumsum(1)[:, ::-1], atol=1e-4)
        centred = np.where(ends, steps - steps[ends].mean(), 0)
        found = dataclasses.replace(loop, scale="none").advantages(scores)[rows]
        np.testing.assert_allclose(found, centred[:, ::-1].cumsum(1)[:, ::-1], atol=1e-5)
    state, metrics = loop.step(state, PromptBatches(5, 2)[0])
    assert np.isfinite(metrics["loss"])


def test_a_reward_model_learns_on_from_answers_that_are_judged(lm, reward_lm):
    """After each iteration, from the pairs of all its steps and from old ones; what is kept is in the state."""
    width = 32
    old = {
        "tokens": np.ones((1, 2, 8), np.int32),
        "lengths": np.full((1, 2), 8, np.int32),
        "response_mask": np.ones((1, 2, 8), np.float32),
        "mask": np.ones(1, np.float32),
        "margins": np.full(1, 0.5, np.float32),
    }
    replay = [{**old, "tokens": np.full_like(old["tokens"], number)} for number in range(9)]
    seen, told = [], []
    optimizer = adamw(lambda step: 0.01, weight_decay=0.0)
    update = make_train_step(RewardModel(reward_lm.model), optimizer)

    def watched(state, batch):
        seen.append(jax.tree.map(np.asarray, batch))
        state, metrics = update(state, batch)
        told.append(jax.device_get(metrics))
        return state, metrics

    variables = jax.tree.map(jnp.array, jax.device_get(reward_lm.variables))
    learned = create_state(variables, optimizer).replace(step=jnp.int32(4))  # from 4 old batches
    learner = RewardLearner(learned, watched, text_rewards(), replay, 2, 2, width, ModelReward(reward_lm).rows)
    loop, state = make_loop(lm, ModelReward(reward_lm), steps_per_iteration=2, reward_learner=learner)
    begin = jax.tree.map(np.asarray, state.carried[REWARD_MODEL].variables)
    batches = PromptBatches(5, 2)
    first, _, _ = loop.answered(state, batches[0])
    state, metrics = loop.step(state, batches[0])
    assert same(state.carried[REWARD_MODEL].variables, begin)
    assert not seen and "reward_model/loss" not in metrics
    state, metrics = loop.step(state, batches[1])
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[f"reward_model/{name}"], np.mean([x[name] for x in told]), rtol=1e-6)
    assert not same(state.carried[REWARD_MODEL].variables, begin)
    assert [batch["tokens"].shape for batch in seen] == [(3, 2, width)] * 2
    judged = np.asarray(bytes_of(first.completions, None)).reshape(2, GROUP)
    for group in range(2):
        best, worst = judged[group].argmax(), judged[group].argmin()
        for side, answer in enumerate((best, worst)):
            row = group * GROUP + answer
            length = first.lengths[row]
            assert seen[0]["lengths"][group, side] == length
            np.testing.assert_array_equal(seen[0]["tokens"][group, side, :length], first.tokens[row, :length])
    for number, batch in enumerate(seen, start=4):
        assert (batch["tokens"][2, :, :8] == number).all() and not batch["tokens"][2, :, 8:].any()
        assert (batch["mask"].tolist(), batch["margins"].tolist()) == ([1, 1, 1], [0, 0, 0.5])  # the judge gives none
    unable = dataclasses.replace(learner, judge=text_rewards(lambda completions, **_: [1.0] * len(completions)))
    assert unable.pairs(first)["mask"].tolist() == [0, 0]
    # What it has learned, it scores by.
    rollout, scores, _ = loop.answered(state, batches[2])
    learned = ModelReward(reward_lm)(rollout, state.carried[REWARD_MODEL].variables)
    np.testing.assert_array_equal(scores.rewards, learned.rewards)


def test_a_group_of_one_is_refused(lm):
    with pytest.raises(BadInput, match="group_size=1: an answer alone has no others to be better than"):
        Loop(lm, GRPO(lm.model), lambda state, batch: (state, {}), prompts(), text_rewards(), 1, NEW, SAMPLER)


def test_rewards_that_are_not_finite_are_refused(lm, reward_lm):
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) * np.float32(np.nan)), reward_lm.params)
    rollout = roll_out(lm, prompts(2), group_size=GROUP, max_new_tokens=NEW, sampler=SAMPLER, seeds=range(8))
    with pytest.raises(BadInput, match="the reward model gave nan; train it anew"):
        ModelReward(reward_lm.replace(variables={"params": params}))(rollout)


def test_the_loop_of_the_page(lm, tmp_path, monkeypatch):
    """An advantage of its own and a reward that remembers, as docs/grpo.md shows them, on a smaller scale."""
    page = (Path(__file__).parents[2] / "docs" / "grpo.md").read_text()
    mark = "<!-- executed by tests/training/test_grpo.py -->"
    (code,) = re.findall(rf"{re.escape(mark)}\n```python\n(.*?)```", page, re.DOTALL)
    for large, small in (
        ("size=8", "size=2"),
        ("max_new_tokens=64", f"max_new_tokens={NEW}"),
        ("temperature=1.0", "temperature=1.3"),  # that of SAMPLER, whose programs are compiled
        ("steps=100, warmup_steps=10", "steps=2, warmup_steps=1"),
        ("steps=100,", "steps=2,"),
    ):
        assert large in code
        code = code.replace(large, small)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"say {index}", "best": index}) for index in range(3)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    copied = lm.replace(variables=jax.tree.map(jnp.array, jax.device_get(lm.variables)))
    monkeypatch.setattr(lq, "load", lambda *_, **__: copied)
    exec(compile(code, "docs/grpo.md", "exec"), scope := {"__name__": "page"})
    assert scope["seen"].total() == 2 * 2 * GROUP
    assert [0 < step["reward"] <= 1 for step in read_metrics(Path("runs/rloo/metrics.jsonl"))] == [True, True]
    rewards = np.array([1, 0, 0, 0.5, 1, 1, 1, 1], np.float32)
    advantages = scope["loop"].advantages(Scores(rewards, {}))
    np.testing.assert_allclose(advantages, [5 / 6, -0.5, -0.5, 1 / 6, 0, 0, 0, 0], atol=1e-6)
