"""The options that `generate` and `chat` share: which model, how it samples tokens, where it computes."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmq_jax.commands.devices import DeviceOptions
from llmq_jax.defaults import MTP, TEMPERATURE, TOP_P
from llmq_jax.errors import BadInput, warn
from llmq_jax.options import (
    Positional,
    Repeated,
    default_is,
    named_as_options,
    option_name,
    refuse_idle,
    require_at_least,
    with_breaks,
)

SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    model: Positional[str]
    """The model: a run folder or checkpoint of this project, a Hugging Face folder, a hub id, or a GGUF file."""
    max_new_tokens: int | None = None
    """Stop after this many tokens, if the text has not ended before."""
    temperature: float = TEMPERATURE
    """Temperature: below 1 favours what is likely, above 1 what is not; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample from this many likeliest tokens only; 0: from all."""
    top_p: Annotated[float | None, default_is(f"{TOP_P}; 1 at temperature 0")] = None
    """Sample from the fewest likeliest tokens whose probabilities add up to this; 1: from all."""
    min_p: float = 0.0
    """Leave out tokens that are less likely than this times the likeliest one; 0: none."""
    repetition_penalty: Annotated[float | None, default_is("1")] = None
    """Make tokens that the prompt or the new text holds less likely (above 1) or likelier (below 1); 1: neither."""
    stop: Repeated = ()
    r"""Stop before this text appears, in which \n is a line break, \t a tab and \\ a backslash; may be given several
    times."""
    chat_template_kwargs: Annotated[str | None, default_is("none")] = None
    """Variables for the model's chat template, as JSON: {"enable_thinking": false} for Qwen 3."""
    draft: Annotated[str | None, default_is("none")] = None
    """A small model with the same tokenizer that drafts tokens ahead (speculative decoding); mtp: the model's own
    modules of multi-token prediction. Greedy text stays the same."""
    draft_tokens: Annotated[int | None, default_is("4")] = None
    """Tokens that a draft model drafts at a time; with mtp each module drafts one."""
    seed: Annotated[int | None, default_is("0")] = None
    """Seed of sampling; the same seed gives the same text."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, default_is("float32 on a CPU, elsewhere that of the file")
    ] = None
    """Type to compute in and to hold the weights in. On a CPU with AMX (lscpu lists amx_bf16) bfloat16 is faster than
    float32, and its weights take half the memory; float16 and other CPUs were not tried."""


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(DeviceOptions, SamplingOptions):  # the fields of the last class come first
    def check(self) -> None:
        """BadInput for options that cannot be, or would have no effect."""
        refuse_idle(
            self,
            (
                ("seed", self.temperature == 0, "at temperature 0, where nothing is drawn"),
                ("draft_tokens", self.draft is None, "without a draft model (--draft)"),
                ("draft_tokens", self.draft == MTP, "beside --draft mtp, of which each module drafts one token"),
            ),
        )
        require_at_least(self, max_new_tokens=1, draft_tokens=1)
        if not 0 <= (self.seed or 0) < SEEDS:
            raise BadInput(f"--seed {self.seed} must lie between 0 and {SEEDS - 1}")
        self.chat_variables()

    def chat_variables(self) -> dict[str, Any]:
        """The variables of --chat-template-kwargs; empty where none are given."""
        from llmq_jax.data.chat_template import parse_variables

        text = self.chat_template_kwargs
        return {} if text is None else parse_variables(text, option_name("chat_template_kwargs"))

    def load(self) -> tuple[Any, dict[str, Any]]:
        """(the model, arguments of `lq.generate` and `lq.stream` other than prompt, length and seed). Call it within
        `on_devices`."""
        import jax

        import llmq_jax as lq

        top_p = (TOP_P if self.temperature else 1.0) if self.top_p is None else self.top_p
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        with named_as_options("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            sampler = lq.Sampler(self.temperature, self.top_k, top_p, self.min_p, penalty)
        # Most files are in bfloat16. On a CPU float32, because every CPU is fast in it, and because bfloat16 rounds.
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else None)
        lm = self.load_model(self.model, dtype)
        lm.require_language_model(self.model)
        lm.require_tokenizer(self.model)
        if self.repetition_penalty is None and (asked := lm.generation.repetition_penalty) != 1.0:
            warn(
                f"{self.model}: its generation config asks for repetition_penalty={asked!r:.60}, which is not applied; "
                f"give --repetition-penalty {asked!r:.60}"
            )
        if variables := self.chat_variables():
            lm.require_chat_template(self.model)
            lm = lm.replace(tokenizer=lm.tokenizer.with_chat_variables(variables))
        draft = self.draft if self.draft is None or self.draft == MTP else lq.load(self.draft, dtype=dtype)
        drafting = {"draft": draft, "draft_tokens": self.draft_tokens}
        return lm, {"sampler": sampler, "stop": [*map(with_breaks, self.stop)] or None, **drafting}

    def seed_of(self, number: int) -> int:
        """The seed of one of several texts, numbered from 0."""
        from llmq_jax.generation import row_seed

        return row_seed(self.seed or 0, number)


def context_of(lm: Any, drawing: dict[str, Any]) -> tuple[int, str]:
    """(the context in tokens, whose it is): "model" or, if that of a draft model is shorter, "draft"."""
    contexts = [(int(lm.config.max_position_embeddings), "model")]
    draft: Any = drawing.get("draft")
    if hasattr(draft, "config"):
        contexts.append((int(draft.config.max_position_embeddings), "draft"))
    return min(contexts, key=lambda context: context[0])
