"""The figures of the docs that show a model or a formula, not a run.

    python -m bench.figures attention --model SmolLM2-135M-Instruct.Q4_1.gguf --out docs/images/attention-heads.png
    python -m bench.figures rope --out docs/images/rope-scalings.png
    python -m bench.figures windows --out docs/images/windows.png

`attention` draws what six heads of SmolLM2-135M-Instruct look at in one sentence; `rope` what the scalings of RoPE do
to its frequencies; `windows` what Gemma's local and global layers may look at, and how far that carries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import run
from llmq_jax.errors import BadInput
from llmq_jax.options import Positional, default_is

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SENTENCE = "When Mary and John went to the store, John gave a drink to"
# (layer, head) of SmolLM2-135M-Instruct, both counted from 0.
HEADS = {
    (16, 0): "the token before",
    (18, 7): "the first token, whatever it is",
    (8, 1): "the same token, earlier",
    (17, 4): "what followed the same token",
    (20, 0): "at the end: the name that is there twice",
    (24, 4): "at the end: the name that comes next",
}

# Llama 3's heads and base, extended to eight times what they were trained on.
WIDTH, BASE, TRAINED, FACTOR = 128, 500_000.0, 8192, 8.0

# A row of tokens, the window of local layers, and Gemma 3's pattern of layers: True where one is local.
TOKENS, WINDOW, FIRST_DOCUMENT = 48, 8, 18
PATTERN = (True,) * 5 + (False,)


@dataclass(frozen=True)
class Options:
    figure: Positional[Literal["attention", "rope", "windows"]]
    """What to draw."""
    out: str
    """The PNG."""
    model: Annotated[str | None, default_is(MODEL)] = None
    """The model whose heads are drawn: SmolLM2-135M-Instruct, as a folder, a hub id or a GGUF file."""


def main(options: Options) -> None:
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise BadInput(f"--out {out}: the figure is a PNG; give it a name that ends in .png")
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}; make it first")
    if options.figure != "attention" and options.model is not None:
        raise BadInput(f"--model has no effect on {options.figure}, which is drawn from formulas; leave it out")
    from llmq_jax.training.plots import save_figure

    drawn = {"rope": draw_rope, "windows": draw_windows}.get(options.figure)
    figure = draw_attention(options.model or MODEL) if drawn is None else drawn()
    print(f"drawn: {save_figure(figure, out)}")


def draw_attention(model: str) -> Any:
    """A figure of the attention weights of `HEADS` on `SENTENCE`."""
    import llmq_jax as lq
    from llmq_jax.training.plots import INK, blank_figure

    lm = lq.load(model, dtype="float32")
    tokenizer = lm.require_tokenizer(model)
    tokens = tokenizer.encode(SENTENCE)
    words = [tokenizer.decode([token]).strip() for token in tokens]
    maps = attention_maps(lm, tokens)
    if any(layer >= maps.shape[0] or head >= maps.shape[1] for layer, head in HEADS):
        raise BadInput(f"{model} has {maps.shape[0]} layers of {maps.shape[1]} heads; the figure is of {MODEL}")

    figure = blank_figure((9.4, 7.0))
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for panel, ((layer, head), what) in zip(panels.flat, HEADS.items(), strict=True):
        image = panel.imshow(maps[layer, head], cmap="Blues", vmin=0.0, vmax=1.0)
        panel.set_title(f"{what}\nlayer {layer}, head {head}", loc="left", color=INK, fontsize=9)
        panel.set_xticks(range(len(words)), words, rotation=90, fontsize=8, color=INK)
        panel.set_yticks(range(len(words)), words, fontsize=8, color=INK)
        panel.set_xticks([place - 0.5 for place in range(1, len(words))], minor=True)
        panel.set_yticks([place - 0.5 for place in range(1, len(words))], minor=True)
        panel.grid(which="minor", color="#e6e6e6", linewidth=0.5)
        panel.tick_params(which="both", length=0)
        panel.spines[:].set_color("#bbbbbb")
    figure.supxlabel("key: the token that is looked at", color=INK, fontsize=9)
    figure.supylabel("query: the token that looks", color=INK, fontsize=9)
    figure.colorbar(image, ax=panels, label="weight", shrink=0.5, pad=0.02)
    return figure


def attention_maps(lm: Any, tokens: list[int]) -> Any:
    """Attention weights [layers, heads, T, T] of a Llama on a text, computed from each layer's own queries and keys
    after RoPE. BadInput for other models."""
    import jax
    import jax.numpy as jnp

    from llmq_jax.layers.scaled_dot_product import visible

    if lm.config.model_type != "llama":
        raise BadInput(f"maps are drawn of a Llama, and this is a {lm.config.model_type}")
    positions = jnp.arange(len(tokens))[None]
    context = lm.model.context(positions)
    outside, layers = lm.model.slice_layers(lm.variables)
    x = lm.model.apply(outside, jnp.asarray([tokens]), positions, method="embed")
    (group,) = lm.model.layer_groups()
    block = group.blocks[0](parent=None)

    @jax.jit
    def layer_of(variables: dict[str, Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (x, _, _), seen = block.apply(variables, x, context, capture_intermediates=True)
        inside = seen["intermediates"]["attention"]
        query, key = (context.rotation.apply(inside[name]["__call__"][0]) for name in ("query", "key"))
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)  # query heads share them
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * lm.config.head_width**-0.5
        return x, jax.nn.softmax(jnp.where(visible(positions, positions)[:, None], scores, -jnp.inf))[0]

    maps = []
    for variables in layers:
        x, weights = layer_of(variables, x)
        maps.append(weights)
    return jax.device_get(jnp.stack(maps))


def scalings() -> dict[str, Any]:
    """The kinds of RoPE that are drawn, by name, with their parameters."""
    from llmq_jax.layers.positions import ByPartsRope, LinearRope, Llama3Rope, NTKRope, Rope, YarnRope

    scaled: dict[str, Any] = {"rope_theta": BASE, "factor": FACTOR}
    trained = scaled | {"original_max_position_embeddings": TRAINED}
    return {
        "default": Rope(rope_theta=BASE),
        "linear": LinearRope(**scaled),
        "ntk": NTKRope(**scaled),
        "by_parts (1 to 32 turns)": ByPartsRope(**trained),
        "llama3 (1 to 4 turns)": Llama3Rope(**trained, low_freq_factor=1.0, high_freq_factor=4.0),
        "yarn (1 to 32 turns)": YarnRope(**trained),
    }


def draw_rope() -> Any:
    """A figure of the wavelengths of RoPE's pairs under its scalings, and of how much each pair slows down."""
    import math

    import jax.numpy as jnp
    import numpy as np

    from llmq_jax.training.plots import INK, RUN_COLOURS, blank_figure

    figure = blank_figure((9.4, 4.0))
    waves, slowing = figure.subplots(1, 2)
    lengths = jnp.zeros((1, 1), jnp.int32)  # of documents, on which none of these depends
    frequencies = {name: np.asarray(rope.frequencies(WIDTH, lengths)) for name, rope in scalings().items()}
    pairs = np.arange(WIDTH // 2)
    styles = ("-", "-", "-", "-", "-", (0, (4, 1.5)))
    for colour, style, (name, found) in zip(("#444444", *RUN_COLOURS), styles, frequencies.items(), strict=False):
        line = {"color": colour, "linewidth": 1.6, "linestyle": style}
        waves.plot(pairs, 2 * math.pi / found, **line)
        slowing.plot(pairs, frequencies["default"] / found, label=name, **line)
    for length, what in ((TRAINED, "trained on"), (FACTOR * TRAINED, "extended to")):
        waves.axhline(length, color="#999999", linewidth=0.8, linestyle=":")
        waves.text(0.5, length * 1.15, f"{what} {length:,.0f} tokens", fontsize=8, color="#666666")
    waves.set_yscale("log")
    waves.set_title("tokens in a full turn", loc="left", color=INK, fontweight="bold", fontsize=10)
    slowing.set_title("how many times slower than by default", loc="left", color=INK, fontweight="bold", fontsize=10)
    slowing.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.94), labelcolor=INK)
    for axes in (waves, slowing):
        axes.set_xlabel("pair of features, from the fastest to the slowest", color=INK)
        axes.set_xlim(0, WIDTH // 2 - 1)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def layers_until_seen(tokens: int, window: int, pattern: Sequence[bool]) -> Any:
    """Integers [T, T], by query and key: after how many layers of a pattern (True: local) information from the key's
    token can have reached the query, through the tokens between them; 0 where it cannot."""
    import jax.numpy as jnp
    import numpy as np

    from llmq_jax.layers.scaled_dot_product import visible

    positions = jnp.arange(tokens)[None]
    masks = [np.asarray(visible(positions, positions, window=window if local else None))[0] for local in pattern]
    reached, layers = np.eye(tokens, dtype=bool), np.zeros((tokens, tokens), int)
    for number, mask in enumerate(masks, 1):
        reached = mask @ reached
        layers = np.where(reached & (layers == 0), number, layers)
    return layers


def draw_windows() -> Any:
    """A figure of what queries see in a global and a local layer, in a packed row, and through a pattern of layers."""
    import jax.numpy as jnp
    import numpy as np
    from matplotlib.colors import ListedColormap

    from llmq_jax.layers.scaled_dot_product import visible
    from llmq_jax.training.plots import INK, blank_figure

    places = jnp.arange(TOKENS)[None]
    segments = jnp.where(places < FIRST_DOCUMENT, 1, 2)
    apart = jnp.where(segments == 1, places, places - FIRST_DOCUMENT)
    masks = {
        "a global layer": visible(places, places),
        f"a local layer, window of {WINDOW}": visible(places, places, window=WINDOW),
        "the same, two documents in a row": visible(apart, apart, segments, segments, WINDOW),
    }
    figure = blank_figure((9.4, 9.4))
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for panel, (what, mask) in zip(panels.flat, masks.items(), strict=False):
        panel.imshow(np.asarray(mask)[0], cmap=ListedColormap(("#f4f4f4", "#2f6fb0")), vmin=0, vmax=1)
        seen = np.asarray(mask).sum()
        panel.set_title(f"{what}: {seen:,} pairs", loc="left", color=INK, fontsize=9)
    layers = layers_until_seen(TOKENS, WINDOW, PATTERN)
    shades = ("#f4f4f4", "#12395f", "#2f6fb0", "#5f97cb", "#94bce0", "#c6ddf0", "#e9b872")
    image = panels[1, 1].imshow(layers, cmap=ListedColormap(shades), vmin=-0.5, vmax=len(PATTERN) + 0.5)
    panels[1, 1].set_title(
        "layers until the query can know of it; the sixth is global", loc="left", color=INK, fontsize=9
    )
    key = figure.colorbar(image, ax=panels, shrink=0.4, pad=0.02, ticks=range(1, len(PATTERN) + 1))
    key.set_label("layer", color=INK)
    for panel in panels.flat:
        panel.tick_params(length=0, labelsize=8, colors=INK)
        panel.spines[:].set_color("#bbbbbb")
    figure.supxlabel("key: the token that is looked at", color=INK, fontsize=9)
    figure.supylabel("query: the token that looks", color=INK, fontsize=9)
    return figure


if __name__ == "__main__":
    run(main)
