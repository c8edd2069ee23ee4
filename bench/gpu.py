"""Training and decoding on a GPU, in shares of what it could do:

    python -m bench.gpu                               gpt2-124m, llama3.2-1b, and a mixture of experts with MLA
    python -m bench.gpu llama3.2-1b --batch-size 8    one of them

Training is a step of the library: bfloat16 products, float32 weights, clipping, AdamW, cuDNN's attention by name.

    MFU = tokens a second · FLOP a token / peak         model FLOP utilisation (Chowdhery et al. 2022, appendix B)
    FLOP a token = 3 · (2 · weights + attention)        backward counts twice forward; recomputing counts nothing
    weights: entries of the matrices that a token passes: of k experts and the shared ones, no embedding but as a head
    attention = (T + 1) / 2 · heads · 2 · (key width + value width) a layer: the keys that a token sees, and no others;
    of a window W at most W of them. Of MLA the widths are those of training, 192 and 128 in DeepSeek-V3.

Decoding is one row in bfloat16; its limit is the memory, of which every token reads the same weights, and its cache:

    share = tokens a second · (bytes of weights + bytes of cache, in the mean) / bandwidth
"""

import re
import time
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, Literal

from llmq_jax.command_line import Flag, Positional, default_is, option_name, run, use_device
from llmq_jax.errors import BadInput, did_you_mean

PEAKS = {
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100-(SXM4|PCIE)-40GB": (312e12, 1.555e12),
    "A100": (312e12, 2.04e12),
    "B200": (2250e12, 8.0e12),
}
"""Dense FLOP a second in bfloat16, and bytes a second, by the first pattern that is in a device's name: of SXM boards
where it does not say, from NVIDIA's data sheets."""
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
"""A DeepSeek-V3 of SMALL's size: 16 experts, 4 to a token, and a shared one."""
WORK = {"gpt2-124m": (32, 1024), "llama3.2-1b": (4, 4096), MIXTURE: (2, 4096)}
"""Rows of a batch and tokens of a row."""
WARM_UP, ROUNDS, STEPS = 2, 5, 4
PROMPT, SHORT, LONG = 128, 144, 272
SLOTS = 512
"""Of the cache of both, all of which a step reads: a power of two that holds prompt and answer."""


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
    """Of training; "fused" is cuDNN's, and an error where it cannot run."""
    remat: Literal["none", "dots", "full"] = "none"
    """What is recomputed."""
    written_out: Flag = False
    """Write layers out in place of a loop over them: slower to compile, at times faster."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Where; a CPU has no known peak."""


def main(options: Options) -> None:
    for name in options.models:
        if name not in WORK:
            raise BadInput(f"unknown model {name!r}: {did_you_mean(name, WORK)}")
    for name in ("batch_size", "context", "layers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise BadInput(f"{option_name(name)} is {getattr(options, name)} and must be at least 1")
    use_device(options.device)
    import jax

    kind = jax.devices()[0].device_kind
    peak, bandwidth = next((peaks for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", kind)), (None, None))
    told = "peak unknown" if peak is None else f"peak {peak / 1e12:,.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:g} TB/s"
    print(f"{kind}: {told}; JAX {jax.__version__}", flush=True)
    for name in options.models or WORK:
        rows, length = WORK[name]
        rows, length = options.batch_size or rows, options.context or length
        config = config_of(name, options.layers, length)
        if length > config.max_position_embeddings:
            raise BadInput(f"--context {length} exceeds the {config.max_position_embeddings:,} positions of {name}")
        print(f"\n{name}: {passed_weights(config) / 1e6:,.0f} M weights a token passes", flush=True)
        print(f"  {training(config, rows, length, peak, options)}", flush=True)
        print(f"  {decoding(config, bandwidth)}", flush=True)


def config_of(name: str, layers: int | None, length: int) -> Any:
    import llmq_jax as lq

    fields: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    if name == MIXTURE:
        return lq.DeepSeekV3Config(**{**SMALL, **fields}, max_position_embeddings=max(length, PROMPT + LONG))
    if name == "gpt2-124m":
        fields |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return lq.preset(name, **fields)


def training(config: Any, rows: int, length: int, peak: float | None, options: Options) -> str:
    """Tokens a second of a step, in words."""
    import jax
    import numpy as np

    import llmq_jax as lq

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
    draw = np.random.default_rng(0).integers(config.vocab_size, size=(rows, length + 1), dtype=np.int32)
    batch = {"tokens": draw[:, :-1], "targets": draw[:, 1:], "mask": np.ones((rows, length), np.float32)}
    batch = jax.device_put(batch)
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
    """Tokens a second of one row, in words: of what longer texts take more than short ones."""
    import jax
    import numpy as np

    import llmq_jax as lq

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


def passed_weights(config: Any) -> int:
    """Entries of the matrices that a token passes through: see above."""
    import jax

    from llmq_jax.layers.axes import EXPERTS, path_names
    from llmq_jax.models import abstract_variables

    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(config)["params"]):
        names = path_names(path)
        if names[-1] in EXPERTS and names[-1].endswith("kernel"):
            experts = leaf.shape[-len(EXPERTS[names[-1]])]
            total += leaf.size * config.num_experts_per_tok // experts
        elif names[-1] == "kernel" or (names[0] == "token_embedding" and config.tie_word_embeddings):
            total += leaf.size
    return total


def token_flops(config: Any, length: int) -> float:
    """Of training, a token of rows of `length`: see above."""
    return 3 * (2 * passed_weights(config) + attention_flops(config, length))


def attention_flops(config: Any, length: int) -> float:
    """Forward, a token, of all layers."""
    key, value = widths(config)
    windows = getattr(config, "layer_windows", (None,) * config.num_hidden_layers)
    total = 0.0
    for window in windows:
        window = min(length, window or length)
        seen = (window * (window + 1) / 2 + (length - window) * window) / length
        total += seen * config.num_attention_heads * 2 * (key + value)
    return total


def widths(config: Any) -> tuple[int, int]:
    """Of a head's keys and values in training."""
    if hasattr(config, "v_head_dim"):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def cache_bytes(config: Any, length: int) -> float:
    """Of what a token reads of its row's cache after `length` tokens, in bfloat16."""
    if hasattr(config, "kv_lora_rank"):
        entries = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        entries = heads * sum(widths(config))
    return 2.0 * entries * length * config.num_hidden_layers


if __name__ == "__main__":
    run(main)
