"""The public interface as README and docs use it, for `mypy --strict`: test_typing.py has it checked. Never run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llmq_jax as lq


def models() -> None:
    config = lq.GPT2Config(vocab_size=257, max_position_embeddings=64, hidden_size=128, num_hidden_layers=4)
    assert_type(config.hidden_size, int)
    assert_type(lq.Llama3Config(rope_parameters={"rope_theta": 1e5}, experts=lq.Experts(4, 2)).rope.rope_theta, float)
    assert_type(lq.MixtralConfig().usual_experts, lq.Experts)
    assert_type(lq.DeepSeekV3Config(balance=lq.Balance(sequence=1e-4)).score_scale, float)
    assert_type(lq.Gemma2Config().layer_kinds, tuple[str, ...])
    assert_type(lq.Gemma3Config().local_rope.rope_theta, float)
    preset: lq.Llama3Config = lq.preset("llama3.2-1b", num_hidden_layers=4)
    model = lq.build(preset, dtype="bfloat16", remat="dots", attention="blocked")
    variables = lq.init(config, seed=1)
    assert_type(variables, dict[str, Any])
    logits: jax.Array = model.apply(variables, jnp.ones((1, 4), jnp.int32))
    print(logits, lq.GPT2(config), lq.Llama3(preset), lq.Mixtral(lq.MixtralConfig(), attention="auto"))
    print(lq.DeepSeek3(lq.DeepSeekV3Config(), dtype=jnp.bfloat16), lq.Gemma(lq.Gemma3Config()))


def language_model() -> None:
    lm = lq.load("gpt2")
    assert_type(lm, lq.LanguageModel)
    lq.load(Path("gpt2.pth"), layout="book", config={"num_attention_heads": 12}, dtype="float32", mesh="fsdp=4")
    assert_type(lm.variables, dict[str, Any])
    assert_type(lm.params, dict[str, Any])
    assert_type(lm.tokenizer, lq.data.Tokenizer | None)
    assert_type(lm.generation, lq.GenerationConfig)
    print(lm.config, lm.model)
    assert_type(lm.replace(tokenizer=lq.ByteTokenizer()), lq.LanguageModel)
    tokens = np.array([[1, 2, 3]])
    assert_type(lm.logits(tokens), jax.Array)
    assert_type(lm.logits([[1, 2, 3]], lengths=[2]), jax.Array)
    assert_type(lm.hidden(tokens, positions=tokens, segment_ids=tokens), jax.Array)
    assert_type(lm.mtp_logits(tokens), tuple[jax.Array, ...])
    assert_type(lm.chat([{"role": "user", "content": "Hi"}], max_new_tokens=8), str)
    classifier = lq.with_classifier(lm, ["ham", "spam"], seed=1)
    scores: jax.Array | np.ndarray = classifier.classify(["a text", "another"])
    print(scores)
    assert_type(lq.save(lm, "folder"), Path)
    assert_type(lq.save_hf(lm, Path("folder"), dtype="bfloat16", max_shard_size="500MB", overwrite=True), Path)


def adapters(lm: lq.LanguageModel) -> None:
    assert_type(lq.add_tokens(lm, ["<think>"], special=False), lq.LanguageModel)
    learner = lq.lora(lm, rank=16, targets="attention")
    assert_type(learner, lq.LanguageModel)
    assert_type(lq.lora(lm, lq.LoRA(variant="dora"), seed=1), lq.LanguageModel)
    assert_type(lq.merge(learner), lq.LanguageModel)
    assert_type(lq.unmerge(lq.merge(learner), learner), lq.LanguageModel)
    assert_type(lq.save_adapter(learner, "folder", base="org/name", overwrite=True), Path)
    assert_type(lq.load_adapter(lm, "folder"), lq.LanguageModel)


def generation(lm: lq.LanguageModel, draft: lq.LanguageModel) -> None:
    made = lq.generate(lm, "The capital of France is", max_new_tokens=16)
    assert_type(made, lq.Generation)
    assert_type(made.text, list[str] | None)
    assert_type(made.drafted, int)
    print(made.tokens.shape, made.lengths.sum(), made.logprobs.mean())
    lq.generate(lm, [[1, 2], [3]], stop=["\n", 13], seed=[0, 1], draft=draft, draft_tokens=3)
    lq.generate(lm, ["a", "b"], sampler=lq.Sampler(temperature=0.8, top_k=40), draft="mtp", samples=2)
    assert_type(lq.stream(lm, "Once upon a time", sampler=lq.Sampler(temperature=0.0)), Iterator[str])


def weights(lm: lq.LanguageModel, state: dict[str, np.ndarray]) -> None:
    config: lq.GPT2Config = lq.interop.config_from_hf({"model_type": "gpt2"})
    assert_type(lq.interop.config_to_hf(config), dict[str, Any])
    print(lq.interop.config_from_state_dict(state, "book", num_attention_heads=12))
    assert_type(lq.interop.from_state_dict(state, config, layout="original", dtype="float32"), dict[str, Any])
    for name, tensor in lq.interop.to_state_dict(lm.variables, lm.config).items():
        assert_type(name, str)
        print(tensor.shape)


def training(config: lq.GPT2Config) -> None:
    tokenizer = lq.load_tokenizer("bytes")
    tokens = lq.data.encode_documents(tokenizer, lq.data.read_documents("input.txt"))
    training, held_out = lq.data.split_tokens(tokens, 0.1)
    batches = lq.data.training_batches(training, context=64, batch_size=12, seed=0)
    assert_type(batches, lq.data.TrainingBatches)
    objective = lq.objectives.NextToken(lq.build(config))
    rate = lq.training.warmup_cosine(peak=1e-3, minimum=1e-4, steps=500, warmup_steps=50)
    assert_type(rate, Callable[[int], jax.Array])
    optimizer: optax.GradientTransformation = lq.training.adamw(rate, b2=0.99, weight_decay=0.1)
    state = lq.training.create_state(lq.init(config, seed=0), optimizer)
    assert_type(state, lq.training.TrainState)
    assert_type(state.replace(step=0), lq.training.TrainState)
    train_step = lq.training.make_train_step(objective, optimizer, accumulate=2)
    state, metrics = train_step(state, batches[0])
    assert_type(state, lq.training.TrainState)
    assert_type(metrics, dict[str, Any])

    eval_step = lq.training.make_eval_step(objective)
    validation = lq.data.evaluation_batches(held_out, context=64, batch_size=12)

    def evaluate(variables: dict[str, Any]) -> dict[str, float]:
        return lq.training.evaluate(eval_step, variables, validation)

    def sample(variables: dict[str, Any], step: int) -> str:
        lm = lq.LanguageModel(config, lq.build(config), variables, tokenizer)
        return (lq.generate(lm, "The ", seed=step).text or [""])[0]

    result = lq.training.run(
        state,
        train_step,
        batches,
        lq.training.RunOptions(steps=500, evaluate_every=100, on_full_disk="continue"),
        folder="runs/mine",
        model_config=config,
        tokenizer=tokenizer,
        schedule=rate,
        evaluate=evaluate,
        sample=sample,
    )
    assert_type(result, lq.training.RunResult)
    assert_type(result.validation_loss, float | None)
    with jax.set_mesh(lq.training.make_mesh("data=2,fsdp=4")):
        print(lq.training.find_checkpoint("runs/mine"), lq.training.plot_losses("runs/mine"))


def objectives(lm: lq.LanguageModel, tokens: jax.Array, logprobs: jax.Array) -> None:
    of_tokens = lq.objectives.token_logprobs(lm.model, lm.variables, tokens, lengths=jnp.array([3]))
    assert_type(of_tokens, jax.Array)
    assert_type(lq.objectives.sequence_logprobs(lm.model, lm.variables, tokens), jax.Array)
    assert_type(lq.objectives.bradley_terry_loss(logprobs, logprobs, center=0.01), jax.Array)
    losses, metrics = lq.objectives.dpo_loss(logprobs, logprobs, logprobs, logprobs, beta=0.1, loss_type="ipo")
    assert_type(losses, jax.Array)
    assert_type(metrics, dict[str, jax.Array])
    advantages = lq.objectives.group_advantages(logprobs, 4, scale="none")
    loss, figures = lq.objectives.grpo_loss(of_tokens, of_tokens, None, advantages, of_tokens, loss_type="dapo")
    assert_type(loss, jax.Array)
    assert_type(figures, dict[str, jax.Array])
    assert isinstance(lm.model, lq.DeepSeek3)
    for objective in (
        lq.objectives.NextToken(lm.model),
        lq.objectives.MultiToken(lm.model, coefficient=0.1),
        lq.objectives.Classification(lm.model),
        lq.objectives.DPO(lm.model, normalise=True),
        lq.objectives.GRPO(lm.model, beta=0.04),
        lq.objectives.RewardModel(lm.model, pooling="mean"),
    ):
        lq.training.make_train_step(objective, optax.sgd(0.1))


def data(tokenizer: lq.data.Tokenizer) -> None:
    assert_type(tokenizer.encode("a text"), list[int])
    assert_type(tokenizer.decode([1, 2]), str)
    rows, lengths = lq.data.pad([[1, 2], [3]])
    plan = lq.data.pack([2, 1], capacity=4)
    assert_type(plan, list[list[int]])
    print(rows, lengths, lq.data.packed_rows([[1, 2], [3]], plan, 4)["segment_ids"])
    labelled = lq.data.read_labelled("spam.csv", label_field="kind").without_duplicates().kept
    assert_type(labelled, lq.data.LabelledTexts)
    examples = lq.data.tokenize_conversations(
        lq.data.read_conversations("chats.jsonl"), tokenizer, template="chat", context=512
    )
    batches = lq.data.instruction_batches(examples.examples, context=512, batch_size=8)
    assert_type(batches, lq.data.InstructionBatches)
    preferences = lq.data.read_preferences("pairs.jsonl").pairs
    pairs = lq.data.tokenize_preferences(preferences, tokenizer, template="chat", context=512).pairs
    lq.data.PreferenceBatches(pairs, batch_size=4, longest=512)
    try:
        lq.load("nowhere")
    except lq.BadInput as error:
        print(error)
