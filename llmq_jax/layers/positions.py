"""Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864, eq. 34) and its scalings to longer contexts.

Pair i of a head's H features is rotated by the angle position · θᵢ, with the inverse frequencies θᵢ = base^(-2i/H), so
that the product of a query and a key depends on the distance between them alone. Scalings change the frequencies, each
in its own way, so that a model trained on short contexts can read long ones. Each is a class here, named by `rope_type`
in `config.json`, which computes the frequencies; `rope_from` finds the class.

| rope_type | which pairs turn more slowly | source |
| --- | --- | --- |
| default | nothing | the paper |
| linear | all pairs alike | position interpolation, arXiv:2306.15595 |
| ntk | slow pairs more, through the base | NTK-aware scaling (bloc97 2023), arXiv:2309.00071, definition 1 |
| dynamic | the same, by the length of the document at hand | arXiv:2309.00071, section 3.3 |
| by_parts | slow pairs, by a ramp in their turns per context | NTK-by-parts, arXiv:2309.00071, definition 2 |
| by_parts_ntk | as by_parts, over the base of ntk | the default of the repository that this project re-implements |
| llama3 | as by_parts | the code of Llama 3.1 (meta-llama/llama-models); its paper does not tell of it |
| yarn | slow pairs, by a ramp in the index of the pair; with a temperature | YaRN as released, arXiv:2309.00071 |
| longrope | each pair by a factor of its own | LongRoPE, arXiv:2402.13753 |

The types that transformers has (all but ntk, by_parts and by_parts_ntk) give its frequencies.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.field_types import LARGEST_FLOAT
from llmq_jax.layers.axes import target_platform


class Rotation(struct.PyTreeNode):
    """Cosine and sine of the angle by which each pair of features turns at each position; the same for all heads."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]

    def apply(self, x: Float[Array, "B T N H"], interleaved: bool = False) -> Float[Array, "B T N H"]:
        """Turn queries or keys, in float32.

        Pairs are features i and i + H/2 (half-split, as transformers has them), or 2i and 2i + 1 (interleaved, as the
        paper and Llama's own code have them): the same but for the order of the features.
        """
        width = 2 * self.cos.shape[-1]
        if x.shape[-1] != width:
            given = f"RoPE is for heads of {width} features, not {x.shape[-1]}"
            raise BadInput(f"{given}: make the rotation for their width in `context` of the model")
        wide = x.astype(jnp.float32)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]  # [B, T, 1, H/2]: the same for all heads
        first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        whole = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
        return whole.astype(x.dtype)


def _cos_and_sin(angles: Float[Array, "B T half"], scale: Float[Array, ""]) -> tuple[Array, Array]:
    """Kept apart from what uses them: XLA would fuse them into it and recompute them wherever a query or a key is
    rotated, in each layer and head, forward and backward, which on a CPU takes twenty times as long as the rotation.

    On an accelerator a barrier keeps them apart. XLA's CPU backend takes barriers out before it fuses, but not loops; a
    loop would cut the decoding of each token on a GPU into several CUDA graphs.
    """
    if target_platform() != "cpu":
        kept: tuple[Array, Array] = jax.lax.optimization_barrier((jnp.cos(angles) * scale, jnp.sin(angles) * scale))
        return kept
    cos, sin = _in_a_loop(angles, scale)
    return cos, sin


@jax.jit  # or each call outside of a jitted function would compile the loop
def _in_a_loop(angles: Float[Array, "B T half"], scale: Float[Array, ""]) -> Float[Array, "2 B T half"]:
    turns: Array = jax.lax.map(
        lambda is_sine: jnp.where(is_sine, jnp.sin(angles), jnp.cos(angles)) * scale, jnp.array([False, True])
    )
    return turns


def document_lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Int[Array, "B S"]:
    """The length of each token's document, its last position + 1: [B, T], or [B, 1] where each row is one document."""
    if segment_ids is None:
        return positions.max(axis=1, keepdims=True) + 1
    # A document is a run of equal segment ids in which positions rise: its last token has its last position.
    length = segment_ids.shape[1]
    ends = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, jnp.arange(length), length), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def inverse_frequencies(base: Any, width: int) -> Any:
    """base^(-2i/H) for i = 0, ..., H/2 - 1. A float gives float64 [H/2]; an array [...] gives float32 [..., H/2]."""
    exponents = np.arange(0, width, 2) / width
    return 1.0 / (base**exponents if isinstance(base, float) else base[..., None] ** jnp.float32(exponents))


@dataclass(frozen=True)
class Rope:
    """Plain RoPE, and what all scalings share."""

    least_width: ClassVar[int] = 2
    """The narrowest heads for which the frequencies are defined."""

    rope_type: str = field(default="default", init=False)
    rope_theta: float = 10_000.0
    """The base: the larger, the more slowly the slow pairs turn."""

    def __post_init__(self) -> None:
        self.require(self.rope_theta > 1, "rope_theta", "must be above 1")

    def frequencies(self, width: int, lengths: Int[Array, "B S"]) -> Any:
        """Radians per position, [H/2]; or [B, S, H/2], by `document_lengths`, where `depends_on_length`."""
        return inverse_frequencies(float(self.rope_theta), width)

    @property
    def depends_on_length(self) -> bool:
        """Whether the rotation at a position depends on the length of its document."""
        return False

    @property
    def attention_scale(self) -> float:
        """What cosine and sine, and thus the queries and the keys, are multiplied by."""
        return 1.0

    def rotation(
        self, positions: Int[Array, "B T"], width: int, segment_ids: Int[Array, "B T"] | None = None
    ) -> Rotation:
        """The rotation of heads of `width` features at a batch's positions; `segment_ids` give documents' lengths."""
        frequencies = self.frequencies(width, document_lengths(positions, segment_ids))
        angles = positions[..., None].astype(jnp.float32) * jnp.float32(frequencies)
        return Rotation(*_cos_and_sin(angles, jnp.float32(self.attention_scale)))

    def check(self, width: int, max_position_embeddings: int) -> None:
        """Raise BadInput where the parameters do not suit heads of that width, or the original context is below 1.

        A longest context below the original one is fine: training on short rows needs it.
        """
        if width < self.least_width:
            raise BadInput(f"rope_type {self.rope_type!r} needs heads of {self.least_width} features, not {width}")
        original = getattr(self, "original_max_position_embeddings", max_position_embeddings)
        self.require(original >= 1, "original_max_position_embeddings", "must be at least 1")

    def require(self, condition: bool, field: str, rule: str) -> None:
        if not condition:
            value = getattr(self, field)
            raise BadInput(f"rope_parameters.{field}={value!r} {rule} (rope_type {self.rope_type!r})")

    def exported(self, width: int) -> "Rope":
        """A rope with the same frequencies, of a type that transformers has."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` has it: parameters that are None left out."""
        fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ScaledRope(Rope):
    factor: float
    """By how much the context grows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.factor >= 1, "factor", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LinearRope(ScaledRope):
    """Position interpolation (Chen et al. 2023): as if positions were closer together."""

    rope_type: str = field(default="linear", init=False)

    def frequencies(self, width: int, lengths: Array) -> Any:
        return inverse_frequencies(float(self.rope_theta), width) / self.factor


@dataclass(frozen=True, kw_only=True)
class NTKRope(ScaledRope):
    """NTK-aware scaling: the base grows so that the slowest pair slows by `factor` and the fastest not at all."""

    least_width = 4
    rope_type: str = field(default="ntk", init=False)

    def frequencies(self, width: int, lengths: Array) -> Any:
        return self.exported(width).frequencies(width, lengths)

    def exported(self, width: int) -> Rope:
        return Rope(rope_theta=ntk_base(self.rope_theta, self.factor, width))


def ntk_base(base: float, factor: Any, width: int) -> Any:
    """Peng et al. 2023 (YaRN), definition 1: base · factor^(H / (H - 2)), for heads of more than 2 features."""
    return base * factor ** (width / (width - 2))


@dataclass(frozen=True, kw_only=True)
class DynamicRope(ScaledRope):
    """NTK-aware scaling by the length of the document at hand, where it exceeds what the model was trained on.

    transformers takes the length of the longest row for the whole batch; here a document's frequencies do not depend on
    its neighbours.
    """

    least_width = 4
    rope_type: str = field(default="dynamic", init=False)
    original_max_position_embeddings: int
    """The length that the model was trained on."""

    @property
    def depends_on_length(self) -> bool:
        return True

    def frequencies(self, width: int, lengths: Array) -> Any:
        trained = self.original_max_position_embeddings
        # transformers' form, s · length / trained - (s - 1); with factor s = 1 it is the paper's length / trained.
        excess = jnp.maximum(lengths - trained, 0) / trained
        return inverse_frequencies(ntk_base(self.rope_theta, 1 + self.factor * excess, width), width)


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(ScaledRope):
    """Llama 3.1: pairs that turn less than `low_freq_factor` times in the trained context slow down by `factor`, those
    that turn more than `high_freq_factor` times do not, and between the two a linear ramp in the number of turns
    interpolates the frequencies.
    """

    rope_type: str = field(default="llama3", init=False)
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.low_freq_factor > 0, "low_freq_factor", "must be positive")
        rule = f"must be above low_freq_factor={self.low_freq_factor!r}"
        self.require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor", rule)

    def frequencies(self, width: int, lengths: Array) -> Any:
        plain = inverse_frequencies(float(self.rope_theta), width)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        # Peng et al. 2023 (YaRN), eq. 18: the ramp.
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return plain * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, kw_only=True)
class ByPartsRope(ScaledRope):
    """NTK-by-parts (Peng et al. 2023, definition 2, the paper's α and β): `llama3` under the paper's names."""

    rope_type: str = field(default="by_parts", init=False)
    alpha: float = 1.0
    beta: float = 32.0
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha > 0, "alpha", "must be positive")
        self.require(self.beta > self.alpha, "beta", f"must be above alpha={self.alpha!r}")

    def base(self, width: int) -> float:
        return float(self.rope_theta)

    def frequencies(self, width: int, lengths: Array) -> Any:
        return self.exported(width).frequencies(width, lengths)

    def exported(self, width: int) -> Rope:
        return Llama3Rope(
            rope_theta=self.base(width),
            factor=self.factor,
            low_freq_factor=self.alpha,
            high_freq_factor=self.beta,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )


@dataclass(frozen=True, kw_only=True)
class ByPartsNTKRope(ByPartsRope):
    """NTK-by-parts over the base of NTK-aware scaling, as the repository that this project re-implements has it."""

    least_width = 4
    rope_type: str = field(default="by_parts_ntk", init=False)
    ntk_factor: float
    """By how much the base's scaling takes the context to grow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.ntk_factor >= 1, "ntk_factor", "must be at least 1")

    def base(self, width: int) -> float:
        base: float = ntk_base(self.rope_theta, self.ntk_factor, width)
        return base


@dataclass(frozen=True, kw_only=True)
class YarnRope(ScaledRope):
    """YaRN as it was released and as transformers has it: the ramp between kept and slowed pairs is linear in the index
    of the pair, from the one that turns `beta_fast` times in the trained context to the one that turns `beta_slow`
    times; a factor on queries and keys gives attention a temperature (section 3.4, eq. 22).
    """

    rope_type: str = field(default="yarn", init=False)
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """The scale of queries and keys; None is what `mscale` and `mscale_all_dim` give, or 0.1 ln(factor) + 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the ends of the ramp are rounded to whole indices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta_slow > 0, "beta_slow", "must be positive")
        self.require(self.beta_fast >= self.beta_slow, "beta_fast", f"is below beta_slow={self.beta_slow!r}")
        self.require(self.attention_factor is None or self.attention_factor > 0, "attention_factor", "must be positive")

    def frequencies(self, width: int, lengths: Array) -> Any:
        plain = inverse_frequencies(float(self.rope_theta), width)
        low, high = (self._index(turns, width) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)  # not width / 2 - 1: as in YaRN's own code and transformers
        slowed = np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0.0, 1.0)
        return plain * (1 - slowed + slowed / self.factor)

    def _index(self, turns: float, width: int) -> float:
        """The i at which θᵢ · original_max_position_embeddings = 2π · turns; seldom a whole number."""
        wavelength = self.original_max_position_embeddings / turns
        return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.rope_theta))

    @property
    def attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_scale(self.factor, self.mscale) / yarn_scale(self.factor, self.mscale_all_dim)
        return yarn_scale(self.factor)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """Peng et al. 2023 (YaRN), eq. 22: 0.1 · weight · ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class LongRope(ScaledRope):
    """LongRoPE: a divisor for each pair, one list for documents within the trained context and one for longer ones.

    transformers chooses one list for the whole batch, by its longest row. `factor` scales attention only.
    """

    rope_type: str = field(default="longrope", init=False)
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None
    """The scale of queries and keys; None is sqrt(1 + ln(factor) / ln(original_max_position_embeddings))."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            self.require(all(divisor > 0 for divisor in getattr(self, name)), name, "must be positive numbers")
        self.require(self.attention_factor is None or self.attention_factor > 0, "attention_factor", "must be positive")

    def check(self, width: int, max_position_embeddings: int) -> None:
        super().check(width, max_position_embeddings)
        derived = self.attention_factor is None and self.factor != 1
        rule = "must be above 1, since attention's scale is divided by its logarithm; or give an attention_factor"
        self.require(not derived or self.original_max_position_embeddings > 1, "original_max_position_embeddings", rule)
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self, name))
            if count != width // 2:
                raise BadInput(
                    f"rope_parameters.{name} has {count} factors; heads of {width} features take {width // 2}"
                )

    @property
    def depends_on_length(self) -> bool:
        return self.short_factor != self.long_factor  # they are equal in GGUF files, which have one list

    def frequencies(self, width: int, lengths: Array) -> Any:
        plain = inverse_frequencies(float(self.rope_theta), width)
        short, long = (jnp.float32(plain / np.array(factors)) for factors in (self.short_factor, self.long_factor))
        if not self.depends_on_length:
            return short
        return jnp.where(lengths[..., None] > self.original_max_position_embeddings, long, short)

    @property
    def attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor == 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


ROPES: dict[str, type[Rope]] = {
    rope.rope_type: rope
    for rope in (
        Rope,
        LinearRope,
        NTKRope,
        DynamicRope,
        ByPartsRope,
        ByPartsNTKRope,
        Llama3Rope,
        YarnRope,
        LongRope,
    )
}


WIDEST_HEAD = 2**16
"""RoPE has a frequency for every two features; a config.json that says more is damaged."""


def rope_from(parameters: Rope | Mapping[str, Any], width: int, max_position_embeddings: int) -> Rope:
    """The rope of a `rope_parameters` dict, checked against the width of heads and the longest context.

    As in transformers, the trained context defaults to the longest one, and the factor of yarn and longrope to the
    ratio of the two (of longrope to 1 at least). BadInput: an unknown rope_type, or a parameter that is missing,
    unknown to the type, of a wrong kind, or in contradiction to another.
    """
    if width > WIDEST_HEAD:
        raise BadInput(f"heads of {width:,} features are not supported; the widest are {WIDEST_HEAD:,}")
    if not isinstance(parameters, Rope):
        parameters = _read(dict(parameters), max_position_embeddings)
    parameters.check(width, max_position_embeddings)
    return parameters


def _read(values: dict[str, Any], max_position_embeddings: int) -> Rope:
    rope_type, old = values.pop("rope_type", None), values.pop("type", None)
    if rope_type is not None and old is not None and rope_type != old:
        raise BadInput(f"rope_parameters has rope_type={rope_type!r} and type={old!r}; keep one of them")
    rope_type = str(rope_type or old or "default")
    if rope_type not in ROPES:
        raise BadInput(f"rope_parameters.rope_type={rope_type!r} is unknown: {did_you_mean(rope_type, ROPES)}")
    fields = {entry.name: entry for entry in dataclasses.fields(ROPES[rope_type]) if entry.init}
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]  # all of a head's features turn
    values = {name: value for name, value in values.items() if value is not None}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise BadInput(f"rope_parameters.{unknown[0]} is not a parameter of rope_type {rope_type!r}: drop it")
    values = {name: _as_kind(fields[name], value) for name, value in values.items()}
    if "original_max_position_embeddings" in fields:
        original = values.setdefault("original_max_position_embeddings", max_position_embeddings)
        ratio = max_position_embeddings / original
        if rope_type == "yarn":
            values.setdefault("factor", ratio)
        elif rope_type == "longrope":  # whose factor scales attention alone, and up alone
            values.setdefault("factor", max(ratio, 1.0))
    missing = [name for name, entry in fields.items() if entry.default is dataclasses.MISSING and name not in values]
    if missing:
        raise BadInput(f"rope_parameters lacks {' and '.join(missing)}, which rope_type {rope_type!r} needs")
    return ROPES[rope_type](**values)


def _as_kind(entry: dataclasses.Field[Any], value: Any) -> Any:
    """A parameter as JSON may have it, in the type of its field."""
    if entry.type is bool:
        good, kind = isinstance(value, bool), "true or false"
    elif entry.type is int:
        good, kind = _is_number(value) and value == int(value) > 0, "a positive whole number"
    elif entry.type == tuple[float, ...]:
        good, kind = isinstance(value, list | tuple) and all(map(_is_number, value)), "a list of numbers"
    else:
        good, kind = _is_number(value), "a number"
    if not good:
        raise BadInput(f"rope_parameters.{entry.name}={value!r} is not {kind}")
    if isinstance(value, list | tuple):
        return tuple(map(float, value))
    return value if entry.type is bool else int(value) if entry.type is int else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_FLOAT
