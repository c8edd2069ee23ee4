"""The names of options in other programs, so that a user who types one is told ours.

The names are those of nanoGPT's config, of transformers' and TRL's arguments, and of their configs of models.
docs/from_trl.md says where meanings differ.
"""

from collections.abc import Callable, Collection
from dataclasses import fields as fields_of

from llmq_jax.errors import close_names

OURS = {
    "data": ("dataset", "dataset_name", "train_dataset", "train_file"),
    "validation_data": ("eval_dataset", "validation_file"),
    "text_field": ("text_column", "text_key"),
    "out": ("output", "output_dir", "out_dir", "save_dir"),
    "preset": ("model_type", "architecture", "arch"),
    "init_from": ("model", "model_name", "model_name_or_path", "pretrained"),
    "context": (
        "block_size",
        "context_length",
        "seq_len",
        "max_length",
        "max_seq_len",
        "max_seq_length",
        "n_positions",
    ),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "layers", "depth"),
    "hidden_size": ("n_embd", "d_model", "dim", "emb_dim", "embed_dim", "width"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "heads"),
    "steps": ("max_steps", "max_iters", "iters", "num_steps", "train_steps"),
    "epochs": ("num_train_epochs", "num_epochs"),
    "batch_size": (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "per_device_batch_size",
        "train_batch_size",
    ),
    "accumulate": ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum_steps"),
    "learning_rate": ("lr", "max_lr", "peak_lr"),
    "minimum_learning_rate": ("min_lr",),
    "warmup_steps": ("warmup", "warmup_iters"),
    "schedule": ("lr_scheduler_type", "lr_schedule", "scheduler", "decay_lr"),
    "optimizer": ("optim",),
    "betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "clip": ("grad_clip", "gradient_clip", "max_grad_norm", "clip_grad_norm"),
    "weight_decay": ("wd",),
    "dtype": ("bf16", "fp16", "bfloat16", "float16", "precision", "torch_dtype"),
    "remat": ("activation_checkpointing", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    "attention": ("attn_implementation", "flash_attention"),
    "device": ("use_cpu", "cpu", "gpu", "tpu"),
    "mesh": ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "gpus", "num_gpus", "devices"),
    "log_every": ("log_interval", "logging_steps"),
    "evaluate_every": ("eval_every", "eval_interval", "eval_steps", "eval_strategy", "evaluation_strategy"),
    "evaluate_batches": ("eval_batches", "eval_iters"),
    "checkpoint_every": ("save_every", "save_interval", "save_steps", "save_strategy", "always_save_checkpoint"),
    "keep_last": ("save_total_limit",),
    "sample_every": ("log_completions",),
    "seed": ("data_seed",),
    "patience": ("early_stopping_patience",),
    "wandb": ("report_to", "run_name", "project", "wandb_project", "wandb_log", "wandb_run_name"),
    "chat_template": ("chat_template_path",),
    "pack": ("packing", "packing_strategy", "padding_free"),
    "too_long": ("truncation_mode",),
    "train_on": ("assistant_only_loss", "completion_only_loss"),
    "train": ("use_peft", "use_lora"),
    "lora_rank": ("lora_r", "r", "rank"),
    "lora_targets": ("lora_target_modules", "target_modules", "target_parameters"),
    "lora_dropout": ("dropout",),
    "lora_rslora": ("use_rslora",),
    "lora_variant": ("use_dora", "dora"),
    "lora_numbers": ("u",),
    "lora_tied": ("weight_tying",),
    "lora_layers": ("layers_to_transform",),
    "lora_whole": ("modules_to_save", "lora_modules_to_save", "ensure_weight_tying"),
    "reference": ("ref_model",),
    "center": ("center_rewards_coefficient",),
    "loss": ("loss_type",),
    "reward": ("reward_funcs",),
    "group_size": ("num_generations",),
    "iterations": ("num_iterations",),
    "steps_per_iteration": ("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"),
    "kl_by_ratio": ("use_bias_correction_kl",),
    "max_length": ("context",),
    "max_prompt": ("max_prompt_length",),
    "max_new_tokens": ("max_tokens", "num_tokens", "max_completion_length"),
    "scale": ("scale_rewards",),
    "clip_low": ("epsilon",),
    "clip_high": ("epsilon_high",),
    "mask_truncated": ("mask_truncated_completions",),
    "entropy_coefficient": ("entropy_coef",),
}
"""{our field: its names in other programs}."""
VALUES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("use_peft", "use_lora"), "lora"),
    **dict.fromkeys(("use_dora", "dora"), "dora"),
    **dict.fromkeys(("use_cpu", "cpu"), "cpu"),
    **{name: name for name in ("gpu", "tpu")},
}
"""{one of these names that says the value itself: the value here}."""

RESUMING = ("resume", "resume_from", "resume_from_checkpoint")
"""Names for which we have no option: the same command again resumes a run."""
WITHOUT_OPTION = {
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy"),
        ("checkpoint_every", "a run stays here; python -m convert.to_hf RUN FOLDER, then hf upload NAME FOLDER"),
    ),
    "trust_remote_code": ("init_from", "no code that comes with a model is ever run; leave it out"),
    **dict.fromkeys(("model_revision", "revision"), ("init_from", "write {init_from} org/name@REVISION")),
    "prompt": ("system", "messages are typed or come from standard input; for one alone, llmq generate MODEL --chat"),
    "start": ("prompt", "here it is {prompt}"),
    **dict.fromkeys(
        ("num_return_sequences", "num_samples"),
        ("prompt_file", "write the prompt so many times into a .jsonl file, once a line"),
    ),
    **dict.fromkeys(
        ("compile", "torch_compile", "torch_compile_mode", "torch_compile_backend"),
        ("checkpoint_every", "a step is always compiled; leave it out"),
    ),
    "lr_decay_iters": ("schedule", "the schedule takes all {steps}; leave it out"),
    "eval_only": ("evaluate_every", "llmq evaluate RUN FILE does that"),
    "backend": ("coordinator", "processes find each other by {coordinator}; leave it out"),
    **dict.fromkeys(("labels", "num_labels"), ("label_field", "the classes are the labels that the data have")),
    "use_vllm": ("group_size", "the model that trains samples its answers itself, without vLLM; leave it out"),
    "importance_sampling_level": ("clip_low", "ratios of whole sequences are those of {gspo}, others of tokens"),
    "per_device_train_batch_size": ("group_size", "the answers of a step are {prompts_per_step} times {group_size}"),
    "num_train_epochs": ("group_size", "the length of a run is given by {steps}"),
    "dataset_text_field": ("train_on", "records with the field text are learned whole, by {all}"),
    "bias": ("checkpoint_every", "a model has the biases of its architecture, and no others; leave it out"),
    "loss_type": ("train_on", "the loss is nll, the only one; leave it out"),
}
"""{name for which we have no option: (a field of the commands that it is for, what to do there)}."""
WITHOUT_COUNTERPART = {
    *("per_device_eval_batch_size", "adam_epsilon", "use_liger_kernel", "auto_find_batch_size"),
    *("dataloader_num_workers", "train_sampling_strategy", "eval_on_start", "save_only_model"),
    *("load_best_model_at_end", "metric_for_best_model", "disable_dropout", "eos_token", "pad_token"),
    *("precompute_ref_log_probs", "generation_batch_size", "steps_per_generation", "num_generations_eval"),
    *("init_lora_weights", "rank_pattern", "alpha_pattern", "trainable_token_indices", "use_weighting", "ld_alpha"),
    *("delta", "top_entropy_quantile", "use_adaptive_entropy", "off_policy_mask_threshold", "cast_lm_head_to_fp32"),
    *("sapo_temperature_pos", "sapo_temperature_neg", "sync_ref_model", "ref_model_sync_steps"),
    *("ref_model_mixup_alpha", "f_divergence_type", "f_alpha_divergence_coef", "loss_weights", "neftune_noise_alpha"),
    *("label_smoothing_factor", "load_in_4bit", "load_in_8bit", "greater_is_better", "group_by_length"),
    "dataset_num_proc",
}
"""Names of which docs/from_trl.md says what there is in their place, or that there is nothing."""


def meant_by(name: str, fields: Collection[str], shown: Callable[..., str]) -> str:
    """A hint at what an unknown option was meant to be, by the names in other programs or else by its spelling; ""
    where nothing is near. `shown(field)` spells a field as the user gives it, `shown(field, value)` with a value."""
    elsewhere = name.removeprefix("--").replace("-", "_")
    elsewhere = "use_vllm" if elsewhere.startswith("vllm_") else elsewhere
    if elsewhere in RESUMING and "out" in fields:
        return "the same command again resumes a run"
    field, advice = WITHOUT_OPTION.get(elsewhere, ("", ""))
    if field in fields:
        options = {name: shown(name) for name in fields}
        return advice.format(**options, gspo=shown("loss", "gspo"), all=shown("train_on", "all"))
    ours = next((field for field, others in OURS.items() if elsewhere in others), "")
    if ours in fields:
        return f"here it is {shown(ours, VALUES.get(elsewhere, ''))}"
    if "config" in fields and _is_of_configs(elsewhere):
        return f"as a field of the model's config it is given by {shown('config', f'{elsewhere}=VALUE')}"
    is_models = ours == "preset" or elsewhere == "config" or _is_of_configs(ours or elsewhere)
    if is_models and "init_from" in fields and "config" not in fields:
        return f"the model of {shown('init_from')} brings its config, which is not changed here; leave it out"
    if elsewhere in WITHOUT_COUNTERPART and "checkpoint_every" in fields:
        return "it has no counterpart here; docs/from_trl.md says what there is"
    if ours:  # what this command lacks is not what happens to be spelled alike
        return ""
    near = close_names(elsewhere, fields, count=1)
    return f"did you mean {shown(near[0])}?" if near else ""


def _is_of_configs(name: str) -> bool:
    """Whether the config of some architecture has a field of this name, other than the labels, which data bring."""
    from llmq_jax.models import ARCHITECTURES

    return name != "labels" and any(
        name == field.name for each in ARCHITECTURES.values() for field in fields_of(each.config_class)
    )
