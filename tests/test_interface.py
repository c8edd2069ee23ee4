"""The calls that users rely on keep their arguments: names, order and defaults. More may follow them.

Before the star an argument can be given by position as well; after it by name alone. `sampler=None` draws as `Sampler`
at temperature 0.8 and top_p 0.95, and a clip of None is the loss type's own, 0.2.
"""

import dataclasses
import inspect

import pytest

import llmq_jax as lq

ROWS = "tokens, lengths=None, positions=None, segment_ids=None"
DRAWN = "max_new_tokens=None, sampler=None, stop=None, seed=0"
CALLS = {
    lq.load: "path, layout='hf', config=None, dtype=None, mesh=None",
    lq.save: "lm, folder",
    lq.save_hf: "lm, folder, dtype=None",
    lq.generate: f"lm, prompts, {DRAWN}",
    lq.stream: f"lm, prompt, {DRAWN}",
    lq.Sampler: "temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0",
    lq.LanguageModel: "config, model, variables, tokenizer=None",
    lq.LanguageModel.replace: "self",
    lq.LanguageModel.logits: f"self, {ROWS}",
    lq.LanguageModel.hidden: f"self, {ROWS}",
    lq.LanguageModel.mtp_logits: f"self, {ROWS}",
    lq.LanguageModel.classify: f"self, {ROWS}",
    lq.LanguageModel.chat: "self, messages",
    lq.preset: "name",
    lq.build: "config",
    lq.init: "config, seed=0",
    lq.lora: "lm",
    lq.merge: "lm",
    lq.add_tokens: "lm, tokens, *, special=True",
    lq.load_adapter: "lm, folder",
    lq.save_adapter: "lm, folder",
    lq.interop.from_state_dict: "state, config, layout='hf'",
    lq.interop.to_state_dict: "variables, config, layout='hf'",
    lq.interop.config_from_hf: "values",
    lq.interop.config_to_hf: "config",
    lq.objectives.token_logprobs: "model, variables, tokens, mask=None",
    lq.objectives.sequence_logprobs: "model, variables, tokens, mask=None",
    lq.objectives.bradley_terry_loss: "chosen, rejected, *, margin=None, center=0.0",
    lq.objectives.dpo_loss: "policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, "
    "beta=0.1, label_smoothing=0.0, loss_type='sigmoid'",
    lq.objectives.group_advantages: "rewards, group_size, *, scale='group', epsilon=1e-4",
    lq.objectives.grpo_loss: "logprobs, old_logprobs, reference_logprobs, advantages, mask, *, "
    "loss_type='grpo', clip_low=None, clip_high=None, beta=0.0",
    lq.training.adamw: "learning_rate, *, b1=0.9, b2=0.999, epsilon=1e-8, weight_decay=0.1, clip=1.0",
    lq.training.warmup_cosine: "peak, steps, warmup_steps=0, *, initial=0.0, minimum=0.0",
    lq.training.make_train_step: "objective, optimizer, accumulate=1, mode='jit'",
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__qualname__)
def test_arguments(call):
    promised = inspect.signature(eval(f"lambda {CALLS[call]}: None")).parameters.values()
    ours = inspect.signature(call).parameters
    by_position = [each for each in promised if each.kind is not each.KEYWORD_ONLY]
    assert [each.name for each in by_position] == list(ours)[: len(by_position)]
    for each in promised:
        found = ours[each.name]
        assert found.kind in (each.kind, found.POSITIONAL_OR_KEYWORD) and found.default == each.default, each.name
    for name in ours.keys() - {each.name for each in promised}:  # needs no argument
        assert ours[name].default is not ours[name].empty or ours[name].kind is ours[name].VAR_KEYWORD, name


def test_what_generate_returns():
    assert [field.name for field in dataclasses.fields(lq.Generation)][:4] == ["tokens", "lengths", "logprobs", "text"]


def test_tab_completion_shows_what_is_public():
    for package in (lq.data, lq.generation, lq.interop, lq.models, lq.objectives, lq.training):
        assert dir(package) == sorted(package.__all__)
