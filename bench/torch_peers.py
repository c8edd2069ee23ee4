"""The PyTorch sides: transformers and a model written by hand, eager and compiled, as fast as a user can have them.

They have fused AdamW, fused attention, and gradients set to None between steps. The allocator is as it comes, except
on the sides that say so: those show what the setting of our training loop (`keep_freed_memory`) would do for PyTorch.
"""

import itertools
import json
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from bench import plain_gpt, plain_llama
from bench.inputs import attention_inputs, cross_entropy_inputs, experts_inputs, prompts, train_batch
from bench.products import Product, time_in_torch
from bench.rows import ADAPTER, OUR_ALLOCATOR, PROMPTS
from bench.worker import Side
from llmq_jax.training.host_memory import keep_freed_memory

PLAIN = {"gpt2": plain_gpt.load, "llama": plain_llama.load}


class TorchSide(Side):
    def prepare(self) -> dict[str, Any]:
        if OUR_ALLOCATOR in self.name:
            keep_freed_memory()
        self.build()
        return {"compile_seconds": self.first_runs()}

    def build(self) -> None:
        raise NotImplementedError

    def compiled(self, function: Any) -> Any:
        return torch.compile(function) if self.name.endswith("compiled") else function

    def time_products(self, products: list[dict]) -> list[float]:
        return time_in_torch([Product(**product) for product in products])

    def load_model(self) -> nn.Module:
        """The row's model, with the weights that our side has written."""
        if self.name.startswith("plain"):
            from safetensors.torch import load_file

            config = json.loads((self.folder / "config.json").read_text())
            return PLAIN[config["model_type"]](config, load_file(self.folder / "model.safetensors"))
        from transformers import AutoModelForCausalLM

        # Not `load_state_dict`: a model may arrange its weights differently from its files (experts in one tensor).
        model, told = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, output_loading_info=True)
        wrong = {name: keys for name, keys in told.items() if keys}
        if wrong:
            raise RuntimeError(f"weights do not fit transformers: {wrong}")
        # Some architectures have a padding token by default, whose embedding then would not learn.
        model.get_input_embeddings().padding_idx = None
        if self.name.startswith("PEFT"):
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.folder / ADAPTER, is_trainable=True)
        return model


class WithLoss(nn.Module):
    """Tokens and targets [B, T] to the mean loss, in one module, so that a compiler sees all of it."""

    def __init__(self, model: nn.Module, of_transformers: bool):
        super().__init__()
        self.model, self.of_transformers = model, of_transformers

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, use_cache=False).logits if self.of_transformers else self.model(tokens)
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))


class TrainStepSide(TorchSide):
    def build(self) -> None:
        model = self.load_model().train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
        )
        self.loss = self.compiled(WithLoss(model, not self.name.startswith("plain")))
        batches = (train_batch(self.row, index) for index in range(4))
        self.batches = [tuple(torch.from_numpy(b[key]).long() for key in ("tokens", "targets")) for b in batches]
        self.done, self.losses = 0, []

    def prepare(self) -> dict[str, Any]:
        return {**super().prepare(), "losses": self.losses}

    def repeat(self, count: int) -> None:
        dtype = getattr(torch, self.row.dtype)
        for _ in range(count):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = self.loss(*self.batches[self.done % len(self.batches)])
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.done += 1
            if self.done <= 3:
                self.losses.append(loss.item())


class CrossEntropySide(TorchSide):
    def build(self) -> None:
        head, hidden, targets = map(torch.from_numpy, cross_entropy_inputs(self.row))
        self.head, self.hidden = head.requires_grad_(), hidden[0].requires_grad_()
        self.targets = targets[0].long()
        self.loss = self.compiled(
            lambda head, hidden, targets: functional.cross_entropy(functional.linear(hidden, head), targets)
        )

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        norms = (self.head.grad.norm().item(), self.hidden.grad.norm().item())
        return {**facts, "losses": [self.last.item(), *norms]}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.head.grad = self.hidden.grad = None
            self.last = self.loss(self.head, self.hidden, self.targets)
            self.last.backward()


class WindowedAttentionSide(TorchSide):
    """As transformers computes it: fused attention with the band as a mask."""

    def build(self) -> None:
        inputs = attention_inputs(self.row, self.row.length)
        self.inputs = [torch.from_numpy(x).transpose(1, 2).requires_grad_() for x in inputs]
        behind = torch.arange(self.row.length)[:, None] - torch.arange(self.row.length)
        self.mask = (behind >= 0) & (behind < self.row.window)

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        return {**facts, "losses": [self.last.item(), *(x.grad.norm().item() for x in self.inputs)]}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            for x in self.inputs:
                x.grad = None
            mixed = functional.scaled_dot_product_attention(*self.inputs, attn_mask=self.mask, enable_gqa=True)
            self.last = mixed.square().mean()
            self.last.backward()


class ExpertsSide(TorchSide):
    """Expert by expert: the tokens routed to it go through its two linear layers, and the results are added.

    Each expert's weights are tensors of their own. In one stacked tensor, every expert's gradient would have the size
    of the whole stack.
    """

    def build(self) -> None:
        x, ids, weights, up, down = map(torch.from_numpy, experts_inputs(self.row, self.row.num_experts))
        self.x, self.weights = x.requires_grad_(), weights.requires_grad_()
        self.ids = ids.long()
        self.up, self.down = (
            [matrix.T.contiguous().requires_grad_() for matrix in stack]  # [out, in], as linear layers have it
            for stack in (up.flatten(2), down)
        )

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        kinds = ((self.x,), (self.weights,), self.up, self.down)
        norms = (torch.cat([leaf.grad.flatten() for leaf in leaves]).norm().item() for leaves in kinds)
        return {**facts, "losses": [self.last.item(), *norms]}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            for leaf in (self.x, self.weights, *self.up, *self.down):
                leaf.grad = None
            self.last = self.mixed().square().mean()
            self.last.backward()

    def mixed(self) -> torch.Tensor:
        mixed = torch.zeros_like(self.x)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            tokens, choices = torch.where(self.ids == expert)
            gate, value = functional.linear(self.x.index_select(0, tokens), up).chunk(2, dim=-1)
            rows = functional.linear(functional.silu(gate) * value, down)
            mixed.index_add_(0, tokens, rows * self.weights[tokens, choices, None])
        return mixed


class GenerationSide(TorchSide):
    def build(self) -> None:
        self.model = self.load_model().eval()
        self.prompts = torch.tensor(prompts(self.row))
        if not self.name.startswith("plain"):
            self.model.generation_config.eos_token_id = None  # nothing ends early

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        return {**facts, "tokens": self.last[:, self.row.prompt :].tolist()}

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.last = self.generate()

    def generate(self) -> torch.Tensor:
        if self.name.startswith("plain"):
            return self.model.generate(self.prompts, self.row.new_tokens)
        if self.row.new_tokens == 1:  # a prompt alone, without what `generate` does around it
            with torch.inference_mode():
                logits = self.model(self.prompts, use_cache=True, logits_to_keep=1).logits
            return torch.cat((self.prompts, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        return self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=False,
            max_new_tokens=self.row.new_tokens,
            pad_token_id=0,
            use_cache=True,
        )


class RolloutSide(GenerationSide):
    def prepare(self) -> dict[str, Any]:
        return TorchSide.prepare(self)  # sampled tokens differ between sides

    def generate(self) -> torch.Tensor:
        return self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            top_k=0,
            num_return_sequences=self.row.group,
            max_new_tokens=self.row.new_tokens,
            pad_token_id=0,
            use_cache=True,
        )


class TRLSide(TorchSide):
    """One of TRL's trainers, driven step by step as its loop does it."""

    CONFIG: ClassVar = {
        "learning_rate": 1e-6,
        "weight_decay": 0.1,
        "max_steps": 10_000,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }

    def build(self) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        tokenizer.pad_token = tokenizer.eos_token
        config = {**self.CONFIG, "output_dir": str(self.folder / "trl")}
        self.trainer = self.create(config, json.loads((self.folder / PROMPTS).read_text()), tokenizer)
        self.trainer.create_optimizer_and_scheduler(self.CONFIG["max_steps"])
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches, self.losses = iter(()), []

    def create(self, config: dict[str, Any], texts: list, tokenizer: Any) -> Any:
        raise NotImplementedError

    def repeat(self, count: int) -> None:
        trainer = self.trainer
        for _ in range(count):
            inputs = next(self.batches, None)
            if inputs is None:
                self.batches = iter(trainer.get_train_dataloader())
                inputs = next(self.batches)
            loss = trainer.training_step(trainer.model, inputs, None)
            nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
            trainer.state.global_step += 1
            if len(self.losses) < 3:
                self.losses.append(loss.item())


class GRPOStepSide(TRLSide):
    def create(self, config: dict[str, Any], texts: list, tokenizer: Any) -> Any:
        import datasets
        import trl

        return trl.GRPOTrainer(
            model=self.load_model(),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=trl.GRPOConfig(
                per_device_train_batch_size=self.row.batch * self.row.group,
                num_generations=self.row.group,
                max_completion_length=self.row.new_tokens,
                loss_type="grpo",
                top_k=0,
                **config,
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
        )


class DPOStepSide(TRLSide):
    def build(self) -> None:
        super().build()
        inputs = next(iter(self.trainer.get_train_dataloader()))
        self.batches = (dict(inputs) for _ in itertools.count())  # as on our side, made once

    def create(self, config: dict[str, Any], texts: list, tokenizer: Any) -> Any:
        import datasets
        import trl

        return trl.DPOTrainer(
            model=self.load_model(),
            args=trl.DPOConfig(per_device_train_batch_size=self.row.batch, precompute_ref_log_probs=True, **config),
            train_dataset=datasets.Dataset.from_list(texts),
            processing_class=tokenizer,
        )

    def prepare(self) -> dict[str, Any]:
        facts = super().prepare()
        return {**facts, "losses": self.losses}


SIDES = {
    "rollout": RolloutSide,
    "grpo": GRPOStepSide,
    "dpo": DPOStepSide,
    "train": TrainStepSide,
    "cross_entropy": CrossEntropySide,
    "attention": WindowedAttentionSide,
    "experts": ExpertsSide,
    "generate": GenerationSide,
}
