"""Training and decoding on a GPU, or with --device tpu on a TPU, in shares of what it could do:

    python -m bench.gpu                               gpt2-124m, llama3.2-1b, and a mixture of experts with MLA
    python -m bench.gpu llama3.2-1b --batch-size 8    one of them
    python -m bench.gpu deepseek-1b-active --dispatch blocks

Training is a step of the library: bfloat16 products, float32 weights, clipping, AdamW, and the device's own
attention by name. Its MFU is by the formula and the peaks of llmq_jax/training/flops.py.

Decoding is one row in bfloat16; its limit is the memory, of which every token reads the same weights, and its cache:

    share = tokens a second · (bytes of weights + bytes of cache, in the mean) / bandwidth
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, Literal

from llmq_jax.backend import use_device
from llmq_jax.command_line import run
from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.options import Flag, Positional, default_is, require_at_least

SMALL = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1024,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
MIXTURE = "deepseek-1b-active"
"""A DeepSeek-V3 of SMALL's size: 16 experts, of which each token passes through 4, and a shared one."""
WORK = {"gpt2-124m": (32, 1024), "llama3.2-1b": (4, 4096), MIXTURE: (2, 4096)}
"""Rows of a batch and tokens of a row."""
WARM_UP, ROUNDS, STEPS = 2, 5, 4
PROMPT, SHORT, LONG = 128, 144, 272
SETTINGS = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_CLIENT_MEM_FRACTION")
"""Variables of the environment that change what is measured; printed where they are set."""
SLOTS = 512
"""Slots in the cache, for short answers and long ones, all of which a step reads: a power of two that holds both prompt
and answer."""


@dataclass(frozen=True)
class Options:
    models: Annotated[Positional[tuple[str, ...]], default_is("all")] = ()
    """Which of them."""
    batch_size: Annotated[int | None, default_is("32 for gpt2-124m, 4 for llama3.2-1b, else 2")] = None
    """Rows of a step."""
    context: Annotated[int | None, default_is("1024 for gpt2-124m, else 4096")] = None
    """Tokens of a row."""
    layers: Annotated[int | None, default_is("the model's")] = None
    """Fewer of them, to try this out."""
    attention: Literal["fused", "masked", "blocked", "auto"] = "fused"
    """Of training; "fused" is the device's own kernel, and an error where it cannot run. If it fails there, "masked"
    tells what the rest takes, with a smaller batch: it stores all scores."""
    dispatch: Literal["auto", "blocks", "grouped", "ragged", "dense"] = "auto"
    """How tokens come to their experts (docs/moe.md): which is fastest on a GPU is for this program to show."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes, for less memory: "dots" all but products with weights, "full" everything."""
    written_out: Flag = False
    """Write layers out in place of a loop over them: slower to compile, at times faster."""
    device: Literal["gpu", "tpu", "cpu"] = "gpu"
    """Where; a CPU has no known peak."""


def main(options: Options) -> None:
    for name in options.models:
        if name not in WORK:
            raise BadInput(f"unknown model {name!r}: {did_you_mean(name, WORK)}")
    require_at_least(options, batch_size=1, context=1, layers=1)
    plain = [name for name in options.models or WORK if name != MIXTURE]
    if options.dispatch != "auto" and plain:
        raise BadInput(f"--dispatch {options.dispatch}: {plain[0]} has no experts; measure {MIXTURE} alone")
    use_device(options.device)
    import jax

    from llmq_jax.training.flops import passed_weights, peak_of

    devices = jax.devices()
    kind = devices[0].device_kind
    peak, bandwidth = peak_of(kind) or (None, None)
    told = "peak unknown" if peak is None else f"peak {peak / 1e12:,.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:g} TB/s"
    print(f"{kind}, the first of {len(devices)}: {told}; JAX {jax.__version__}", flush=True)
    for name in SETTINGS:
        if name in os.environ:
            print(f"{name}={os.environ[name]}", flush=True)
    for name in options.models or WORK:
        rows, length = WORK[name]
        rows, length = options.batch_size or rows, options.context or length
        config = config_of(name, options.layers, length, options.dispatch)
        if length > config.max_position_embeddings:
            raise BadInput(f"--context {length} exceeds the {config.max_position_embeddings:,} positions of {name}")
        named = name if options.dispatch == "auto" else f"{name}, dispatch {options.dispatch}"
        print(f"\n{named}: {passed_weights(config) / 1e6:,.0f} M weights a token passes", flush=True)
        advice = "take a smaller --batch-size, --remat dots or a smaller --context"
        print(f"  {within_memory(advice, training, config, rows, length, peak, options)}", flush=True)
        print(f"  {within_memory('take fewer --layers', decoding, config, bandwidth)}", flush=True)


def within_memory(advice: str, measure: Callable[..., str], *arguments: Any) -> str:
    """What `measure` returns of these arguments, or, where memory has run out, a line that tells it, with advice: so
    the other figures follow."""
    from llmq_jax.training.out_of_memory import ERRORS, shortage

    try:
        return measure(*arguments)
    except ERRORS as error:
        short = shortage(error)
        if short is None:
            raise
        return f"does not fit: {short}; {advice}"


def config_of(name: str, layers: int | None, length: int, dispatch: str = "auto") -> Any:
    import llmq_jax as lq

    fields: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    if name == MIXTURE:
        fields |= {"max_position_embeddings": max(length, PROMPT + LONG), "experts": {"dispatch": dispatch}}
        return lq.DeepSeekV3Config(**{**SMALL, **fields})
    if name == "gpt2-124m":
        fields |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return lq.preset(name, **fields)


def training(config: Any, rows: int, length: int, peak: float | None, options: Options) -> str:
    """Tokens a second in training, as one line of text."""
    import jax

    import llmq_jax as lq
    from bench.inputs import random_batch
    from llmq_jax.training.flops import token_flops

    model = lq.build(
        config,
        dtype="bfloat16",
        remat=options.remat,
        scan_layers=not options.written_out,
        attention=options.attention,
    )
    optimizer = lq.training.adamw(1e-4, b1=0.9, b2=0.95, moments="bfloat16")
    step = lq.training.make_train_step(lq.objectives.NextToken(model), optimizer)
    state = lq.training.create_state(lq.init(config), optimizer)
    batch = jax.device_put(random_batch(config.vocab_size, rows, length))
    began = time.perf_counter()
    state, metrics = step(state, batch)
    float(metrics["loss"])
    first = time.perf_counter() - began
    for _ in range(WARM_UP):
        state, metrics = step(state, batch)
    float(metrics["loss"])
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        float(metrics["loss"])
        seconds.append((time.perf_counter() - began) / STEPS)
    rate = rows * length / median(seconds)
    share = "" if peak is None else f", MFU {rate * token_flops(config, length) / peak:.1%}"
    spread = f"{rows * length / max(seconds):,.0f} to {rows * length / min(seconds):,.0f}"
    return (
        f"training, {rows} x {length} tokens: {rate:,.0f} tokens/s ({spread}){share}, "
        f"{token_flops(config, length):.3g} FLOP a token, first step after {first:.0f} s"
    )


def decoding(config: Any, bandwidth: float | None) -> str:
    """Tokens a second in decoding one row, as one line of text: from the time that a long answer takes beyond a short
    one."""
    import jax
    import numpy as np

    import llmq_jax as lq
    from llmq_jax.training.flops import passed_weights

    variables = jax.tree.map(lambda x: x.astype("bfloat16"), lq.init(config))
    lm = lq.LanguageModel(config, lq.build(config), variables)
    prompt = [np.random.default_rng(0).integers(config.vocab_size, size=PROMPT).tolist()]

    def seconds(count: int) -> float:
        began = time.perf_counter()
        lq.generate(lm, prompt, max_new_tokens=count, stop=(), sampler=lq.Sampler(temperature=0.0))
        return time.perf_counter() - began

    for count in (SHORT, LONG):
        seconds(count)
    rate = (LONG - SHORT) / median([seconds(LONG) - seconds(SHORT) for _ in range(ROUNDS)])
    held = 2 * passed_weights(config) + cache_bytes(config, SLOTS)
    share = "" if bandwidth is None else f", {rate * held / bandwidth:.1%} of the bandwidth"
    return f"decoding, 1 row: {rate:,.1f} tokens/s, {held / 1e9:.2f} GB a token{share}"


def cache_bytes(config: Any, length: int) -> int:
    """Bytes of one row's cache of `length` slots, in bfloat16: what each token reads."""
    import jax
    import jax.numpy as jnp

    from llmq_jax.models import build

    arrays = jax.eval_shape(lambda: jax.tree.leaves(build(config).create_caches(1, length, jnp.bfloat16)))
    return sum(array.size * array.dtype.itemsize for array in arrays)


if __name__ == "__main__":
    run(main)
