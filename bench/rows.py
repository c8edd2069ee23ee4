"""What is measured: one frozen dataclass a workload, and the table `ROWS`. A later architecture adds a few lines here.

`sides` are the competitors, ours first; each runs in a process of its own (see `bench.worker`). Nothing here imports
JAX or PyTorch, so that the process that conducts the measurement takes nothing from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

OUR_ALLOCATOR = "our allocator"
"""In the name of a PyTorch side: it has the C allocator's setting of our training loop."""
ADAPTER = "adapter"
"""The folder of the adapters that all sides start from, beside the weights."""
PROMPTS = "prompts.json"
"""The file of the texts that all sides answer, beside the weights."""
FULL = "full"
"""In the name of a side: it trains all weights where others train adapters."""
TRAIN_SIDES = (
    "ours",
    "ours, scanned",
    "transformers, eager",
    "transformers, compiled",
    "plain torch, eager",
    "plain torch, compiled",
    f"plain torch, {OUR_ALLOCATOR}, eager",
    f"plain torch, {OUR_ALLOCATOR}, compiled",
)


@dataclass(frozen=True)
class TrainStep:
    """Forward, backward, clipping to norm 1 and AdamW, without dropout."""

    name: str
    fields: Mapping[str, Any]
    """Fields of the architecture's config."""
    batch: int
    context: int
    model_type: str = "gpt2"
    sides: tuple[str, ...] = TRAIN_SIDES
    at_least: float = 1.15
    """The target: how many times as fast as the better of eager and compiled PyTorch we want to be."""
    adapters: int | None = None
    """The rank of adapters at all linear layers, which train in place of the weights; sides called *full* train the
    weights."""
    dtype: str = "float32"
    """The type that is computed in; weights, gradients and moments are in float32. PyTorch has autocast for it."""
    kind: ClassVar[str] = "train"
    unit: ClassVar[str] = "step"

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    @property
    def about(self) -> str:
        adapters = "" if self.adapters is None else f" of adapters of rank {self.adapters} at all linear layers"
        dtype = "" if self.dtype == "float32" else f", in {self.dtype}"
        return (
            f"{_model(self)}, {self.batch} x {self.context} tokens: forward, backward, clipping, AdamW{adapters}{dtype}"
        )


@dataclass(frozen=True)
class CrossEntropy:
    """Loss and both gradients of a head: `chunked_cross_entropy` against the plain form."""

    name: str
    vocab_size: int
    width: int
    tokens: int
    sides: tuple[str, ...] = ("ours, chunked", "ours, plain", "torch, eager", "torch, compiled")
    at_most_time: float = 1.1
    at_most_memory: float = 0.25
    kind: ClassVar[str] = "cross_entropy"
    unit: ClassVar[str] = "pass"

    @property
    def about(self) -> str:
        return (
            f"head and cross-entropy, forward and backward: {self.tokens:,} tokens, width {self.width}, "
            f"vocabulary {self.vocab_size:,}"
        )


@dataclass(frozen=True)
class WindowedAttention:
    """Self-attention in a layer with a window, forward and backward: values and all gradients.

    It is compared with full causal attention, which computes something else, and with sequences half and twice as long.
    """

    name: str
    length: int
    window: int
    heads: int = 4
    key_heads: int = 1
    width: int = 64
    sides: tuple[str, ...] = ("ours", "ours, full", "ours, half", "ours, twice", "torch, masked")
    at_least: float = 5.0
    """The target: how many times as fast as full attention we want to be."""
    at_most_memory: float = 0.2
    within: float = 0.2
    """How much the time per token may differ between the lengths, as a fraction."""
    kind: ClassVar[str] = "attention"
    unit: ClassVar[str] = "pass"

    def length_of(self, side: str) -> int:
        """Tokens of that side's sequence."""
        return {"ours, half": self.length // 2, "ours, twice": 2 * self.length}.get(side, self.length)

    @property
    def about(self) -> str:
        return (
            f"attention in a window of {self.window}, forward and backward: {self.length:,} tokens, "
            f"{self.heads} heads of {self.width}, {self.key_heads} of keys and values"
        )


@dataclass(frozen=True)
class ExpertNetworks:
    """The feed-forward part of a mixture of experts, forward and backward: value, and gradients of the tokens, of the
    routing weights and of the experts' weights. The experts of each token are drawn at random beforehand.

    It is compared with other implementations and with the matrix products alone (*exact*: batched, each expert with an
    equal part of the tokens, whichever these are); both ours and the products alone also run with many experts.
    """

    name: str
    tokens: int
    width: int
    intermediate_size: int
    top_k: int = 2
    num_experts: int = 8
    many: int = 64
    """The number of experts, of the same size, in the sides that show what more experts cost."""
    at_most_exact: float = 2.0
    """The target: our time in multiples of that of the batched products."""
    goal_exact: float = 1.7
    """The same, as we would like it to be."""
    at_most_others: float = 0.25
    """The target: our time as a fraction of that of `ragged` and of `dense`."""
    at_most_many: float = 1.3
    """The target: our time with many experts in multiples of that with few."""
    kind: ClassVar[str] = "experts"
    unit: ClassVar[str] = "pass"

    @property
    def sides(self) -> tuple[str, ...]:
        one_way = ("ours", "ours, exact", "ours, ragged", "ours, dense")
        return (*one_way, f"ours, {self.many} experts", f"ours, {self.many} exact", "torch, loop")

    def experts_of(self, side: str) -> int:
        return self.many if side.startswith(f"ours, {self.many} ") else self.num_experts

    @property
    def about(self) -> str:
        return (
            f"experts, forward and backward: {self.tokens:,} tokens, each to {self.top_k} of {self.num_experts} SwiGLU "
            f"networks, width {self.width}, {self.intermediate_size} within"
        )


@dataclass(frozen=True)
class Generation:
    """Greedy decoding with a cache, including the pass over the prompts."""

    name: str
    fields: Mapping[str, Any]
    batch: int
    prompt: int = 32
    new_tokens: int = 128
    model_type: str = "gpt2"
    sides: tuple[str, ...] = ("ours", "transformers, eager")
    at_least: float | None = None
    """The target: how many times as fast as transformers' `generate` we want to be."""
    compile_below: float = 20.0
    """Seconds that the first call may take beyond a later one."""
    kind: ClassVar[str] = "generate"
    unit: ClassVar[str] = "call"

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt if self.new_tokens == 1 else self.new_tokens)

    @property
    def about(self) -> str:
        if self.new_tokens == 1:
            return f"{_model(self)}: a prompt of {self.prompt} tokens, batch {self.batch}, read into a cache"
        return (
            f"{_model(self)}: greedy, batch {self.batch}, prompt of {self.prompt} tokens, {self.new_tokens} new ones, "
            "with a cache"
        )


@dataclass(frozen=True)
class Rollout:
    """Groups of answers: several to each prompt, drawn at temperature 1. None ends early."""

    name: str
    fields: Mapping[str, Any]
    batch: int = 1
    """Prompts."""
    group: int = 8
    """Answers to each."""
    prompt: int = 128
    new_tokens: int = 128
    model_type: str = "llama"
    sides: tuple[str, ...] = ("ours", "transformers, eager")
    at_least: float = 2.0
    """The target: how many times as fast as the second side we want to be. That is transformers' `generate`, or our own
    model reading the whole text again for each token."""
    kind: ClassVar[str] = "rollout"
    unit: ClassVar[str] = "rollout"

    @property
    def tokens(self) -> int:
        return self.batch * self.group * self.new_tokens

    @property
    def about(self) -> str:
        return (
            f"{_model(self)}: {self.group} answers of {self.new_tokens} tokens to each of {self.batch} prompts of "
            f"{self.prompt}"
        )


@dataclass(frozen=True)
class GRPOStep(Rollout):
    """A whole step of GRPO on them: answers, a reward by length, advantages, one update of AdamW."""

    sides: tuple[str, ...] = ("ours", "TRL")
    at_least: float = 3.0
    """The target: how many times as fast as TRL's GRPOTrainer we want to be."""
    kind: ClassVar[str] = "grpo"
    unit: ClassVar[str] = "step"

    @property
    def about(self) -> str:
        return f"a step of GRPO: {super().about}"


@dataclass(frozen=True)
class DPOStep:
    """A step of DPO on pairs whose log-probabilities under the reference are known: loss, AdamW. Prompts and answers
    have `prompt` tokens each, and answers also an end-of-text token."""

    name: str
    fields: Mapping[str, Any]
    batch: int = 2
    """Pairs."""
    prompt: int = 64
    model_type: str = "llama"
    sides: tuple[str, ...] = ("ours", "TRL", "ours, scanned")
    at_least: float = 1.15
    """The target: how many times as fast as TRL's DPOTrainer we want to be."""
    kind: ClassVar[str] = "dpo"
    unit: ClassVar[str] = "step"

    @property
    def tokens(self) -> int:
        return 2 * self.batch * (2 * self.prompt + 1)

    @property
    def about(self) -> str:
        return (
            f"a step of DPO: {_model(self)}: {self.batch} pairs of answers of {self.prompt} tokens to prompts of "
            f"{self.prompt}"
        )


@dataclass(frozen=True)
class Start:
    """A whole process, from its start to the first training step or the first token."""

    name: str
    what: str
    """"step" is a first training step, "token" a first token of text from a Hugging Face folder with its tokenizer."""
    fields: Mapping[str, Any]
    batch: int = 8
    context: int = 256
    model_type: str = "gpt2"
    sides: tuple[str, ...] = ("ours, cached", "ours, cold", "transformers, eager")
    below_seconds: float | None = None
    kind: ClassVar[str] = "start"
    unit: ClassVar[str] = "start"

    @property
    def about(self) -> str:
        end = "the first train step" if self.what == "step" else "the first token, from a Hugging Face folder"
        return f"{_model(self)}: process start to {end}"


@dataclass(frozen=True)
class Compilation:
    """Compiling a train step that loops over its layers, without any cache, beside one with `times` as many layers."""

    name: str
    fields: Mapping[str, Any]
    times: int = 4
    """How many times as many layers the deeper model has."""
    batch: int = 8
    context: int = 64
    model_type: str = "gpt2"
    at_most: float = 1.3
    """The target: how many times as long compiling the deeper model may take."""
    kind: ClassVar[str] = "compile"
    unit: ClassVar[str] = "compilation"

    @property
    def deeper(self) -> str:
        return f"ours, {self.layers_of('deeper')} layers"

    @property
    def sides(self) -> tuple[str, ...]:
        return ("ours", self.deeper)

    def layers_of(self, side: str) -> int:
        return self.fields["num_hidden_layers"] * (1 if side == "ours" else self.times)

    @property
    def about(self) -> str:
        return f"{_model(self)}: tracing and compiling a train step"


Row = (
    TrainStep | CrossEntropy | WindowedAttention | ExpertNetworks | Generation | Rollout | DPOStep | Compilation | Start
)


def _model(row: Any) -> str:
    fields = row.fields
    experts = ""
    for name in ("num_local_experts", "n_routed_experts"):
        if name in fields:
            experts = f"{fields['num_experts_per_tok']} of {fields[name]} experts, "
    return (
        f"{row.model_type} with {fields['num_hidden_layers']} layers, {fields['num_attention_heads']} heads, "
        f"width {fields['hidden_size']}, {experts}vocabulary {fields['vocab_size']:,}"
    )


def gpt2(layers: int, heads: int, width: int, context: int, vocabulary: int) -> dict[str, Any]:
    """Fields of a GPT-2 without dropout, which would be drawn differently on each side."""
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": width,
        "max_position_embeddings": context,
        "vocab_size": vocabulary,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


SMOLLM2 = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
LLAMA = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 768,
    "max_position_embeddings": 256,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
LLAMA_1B = {  # Llama 3.2 1B with 4 of its 16 layers
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "sliding_window": 128,
    "query_pre_attn_scalar": 64,
    "max_position_embeddings": 2048,
    "vocab_size": 257,
}
MIXTRAL = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,  # transformers adds the loss only where the router's logits are asked for
    "max_position_embeddings": 256,
    "vocab_size": 257,
}
DEEPSEEK = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 768,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 192,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
    "balance": None,  # transformers does not compute it
    "max_position_embeddings": 256,
    "vocab_size": 257,
}
MIXTRAL_QUARTER = {  # Mixtral 8x7B at a quarter of its width, with 4 of its 32 layers
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}
WITHOUT_PLAIN = ("ours", "ours, scanned", "transformers, eager", "transformers, compiled")
SMOLLM2_SIDES = ("ours", "transformers, eager", "plain torch, eager")
CACHED_SIDES = ("ours", "ours, without a cache", "transformers, eager")
SMALL = gpt2(6, 6, 384, 256, 50257)

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        TrainStep("gpt2-step-50257", SMALL, batch=8, context=256),
        TrainStep("gpt2-step-256", gpt2(6, 6, 384, 256, 256), batch=8, context=256),
        TrainStep("nanogpt-shakespeare-cpu-step", gpt2(4, 4, 128, 64, 257), batch=12, context=64),
        TrainStep(
            "smollm2-step-512",
            SMOLLM2,
            batch=1,
            context=512,
            model_type="llama",
            # Each side holds weights, gradients and moments: more sides do not fit 24 GiB.
            sides=("ours", "transformers, eager", "transformers, compiled", "plain torch, compiled"),
        ),
        TrainStep(
            "smollm2-bfloat16-step-2048",
            SMOLLM2,
            batch=4,
            context=512,
            model_type="llama",
            sides=("ours", "ours, scanned", "transformers, eager", "transformers, compiled"),
            at_least=1.0,
            dtype="bfloat16",
        ),
        TrainStep(
            "gemma3-step-2048",
            GEMMA3,
            batch=1,
            context=2048,
            model_type="gemma3_text",
            sides=WITHOUT_PLAIN,
            at_least=1.5,
        ),
        TrainStep(
            "mixtral-step-1024",
            MIXTRAL,
            batch=4,
            context=256,
            model_type="mixtral",
            sides=WITHOUT_PLAIN,
            at_least=1.5,
        ),
        TrainStep(
            "deepseek-step-1024",
            DEEPSEEK,
            batch=4,
            context=256,
            model_type="deepseek_v3",
            sides=WITHOUT_PLAIN,
            at_least=1.5,
        ),
        TrainStep(
            "smollm2-lora-step-512",
            SMOLLM2,
            batch=4,
            context=128,
            model_type="llama",
            sides=("ours, scanned", "ours, full, scanned", "PEFT, eager", "PEFT, compiled"),
            at_least=1.3,
            adapters=8,
        ),
        CrossEntropy("cross-entropy-128256", vocab_size=128256, width=576, tokens=2048),
        WindowedAttention("window-attention-4096", length=4096, window=256),
        ExpertNetworks("experts-2048", tokens=2048, width=384, intermediate_size=512),
        Generation("gpt2-generate-1", SMALL, batch=1),
        Generation("gpt2-generate-8", SMALL, batch=8),
        Generation("smollm2-generate-1", SMOLLM2, 1, model_type="llama", sides=SMOLLM2_SIDES, at_least=3.0),
        Generation("smollm2-generate-8", SMOLLM2, 8, model_type="llama", sides=SMOLLM2_SIDES, at_least=2.0),
        Generation("llama1b-generate-8", LLAMA_1B, 8, new_tokens=32, model_type="llama", sides=SMOLLM2_SIDES),
        Generation(
            "smollm2-prefill-512",
            SMOLLM2,
            1,
            prompt=512,
            new_tokens=1,
            model_type="llama",
            sides=SMOLLM2_SIDES,
            at_least=1.0,
        ),
        Generation("mixtral-generate-1", MIXTRAL_QUARTER, 1, new_tokens=32, model_type="mixtral", at_least=1.0),
        Generation("mixtral-generate-8", MIXTRAL_QUARTER, 8, new_tokens=32, model_type="mixtral", at_least=1.0),
        Generation("deepseek-generate-1", DEEPSEEK, 1, model_type="deepseek_v3", at_least=3.0),
        # The pairs are text of GPT-2's tokenizer, whose end token is its last.
        DPOStep("smollm2-dpo-step-2", SMOLLM2 | {"vocab_size": 50257}),
        Rollout("llama-rollout-8", LLAMA, sides=CACHED_SIDES, at_least=8.0),
        Rollout("smollm2-rollout-8", SMOLLM2),
        GRPOStep("smollm2-grpo-step-8", SMOLLM2),
        Compilation("gpt2-compile-48", gpt2(12, 6, 384, 64, 257)),
        Start("gpt2-first-step", "step", SMALL),
        Start("gpt2-first-token", "token", SMALL, below_seconds=5.0),
    )
}
