"""The other side of a parity check: transformers' model, run with hooks on its modules, from a folder or at random.

torch and transformers are imported when a function needs them, and only here.
"""

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from llmq_jax.errors import BadInput, first_line
from llmq_jax.interop import config_to_hf
from llmq_jax.interop.architectures import config_table
from llmq_jax.models import ARCHITECTURES, override

# Fields of a small model of any architecture, which takes those that it has. No two sizes are equal and no epsilon is
# the usual one, so that nothing fits by chance; windows are shorter than the rows that are compared.
SMALL = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 10,
    "intermediate_size": 56,
    "num_local_experts": 6,
    "sliding_window": 8,
    "query_pre_attn_scalar": 20,
    "layer_norm_epsilon": 1e-2,
    "rms_norm_eps": 1e-2,
}
# Fields in which models of one architecture differ. Seed 0 takes the first value, other seeds draw one for each field.
# Rotary frequencies are scaled from a context that the rows exceed.
TRAINED = {"rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, tuple] = {
    "tie_word_embeddings": (True, False),
    "num_key_value_heads": (2, 1, 4),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "rope_parameters": (
        {"rope_type": "llama3", "low_freq_factor": 0.5, "high_freq_factor": 2.0, **TRAINED},
        {"rope_type": "default", "rope_theta": 1e3},
        {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0},
        {"rope_type": "yarn", "beta_fast": 2.0, "beta_slow": 0.5, **TRAINED},
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
            "long_factor": [1.0, 1.5, 2.5, 3.5, 4.0],
            **TRAINED,
        },
        {"rope_type": "dynamic", **TRAINED},
    ),
}
# Further or other values that an architecture needs: {model_type: {field of our config: value}}.
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    "qwen3_moe": {"num_experts_per_tok": 2, "moe_intermediate_size": 28, "mlp_only_layers": (1,)},
    # Five local layers, a global one, and the first of the next six.
    "gemma3_text": {"num_hidden_layers": 7, "local_rope_parameters": {"rope_theta": 100.0}},
}


class Pass(NamedTuple):
    """What a forward and a backward pass of transformers' model gave, as numpy arrays in float32."""

    inputs: dict[str, np.ndarray]
    """{module: the first array that it was given}."""
    outputs: dict[str, np.ndarray]
    """{module: the first array that it returned}, in the order in which the modules finished."""
    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    """{parameter's name in a file: its gradient}."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A model of transformers, and which of its tensors hold those of its files.

    In memory some tensors have other names, or several are one tensor (a layer's experts). Weight tables use the names
    in files, those of `save_pretrained`.
    """

    model: Any
    owners: Mapping[str, str]
    """{name in a file: name of the tensor in memory that holds it}."""

    @classmethod
    def of(cls, model: Any, keys: Iterable[str]) -> "Reference":
        """`keys` are the names in a weight table: if all are names in memory too, nothing needs to be saved."""
        names = list(_tensors(model))
        if set(keys) <= set(names):
            return cls(model, {name: name for name in names})
        import torch

        # Every tensor filled with its number: what is saved then says where it came from.
        numbered = {
            name: torch.full(tensor.shape, float(i)) for i, (name, tensor) in enumerate(_tensors(model).items())
        }
        saved = _save_and_read(model, numbered)
        return cls(model, {key: names[int(tensor.reshape(-1)[0])] for key, tensor in saved.items()})

    def as_saved(self, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """NumPy arrays under the names in a file, from torch tensors under the names in memory."""
        if any(key != owner for key, owner in self.owners.items()):
            tensors = _save_and_read(self.model, tensors)
        return {name: _numpy(tensor) for name, tensor in tensors.items()}

    def state(self) -> dict[str, np.ndarray]:
        return self.as_saved(_tensors(self.model))

    def modules(self) -> set[str]:
        """The modules that compute; lists and dicts of modules do not."""
        import torch

        nothing = torch.nn.Module.forward
        return {name for name, module in self.model.named_modules() if type(module).forward is not nothing}

    def run(self, tokens: np.ndarray, modules: Iterable[str]) -> Pass:
        """Logits, next-token loss and gradients on tokens [B, T], with the inputs and outputs of these modules."""
        import torch

        inputs: dict[str, np.ndarray] = {}
        outputs: dict[str, np.ndarray] = {}

        def before(name, args, kwargs):
            given = _first_array((*args, *kwargs.values()))
            if given is not None:
                inputs.setdefault(name, _numpy(given))

        def after(name, output):
            if (given := _first_array(output)) is not None:
                outputs.setdefault(name, _numpy(given))

        with contextlib.ExitStack() as hooks:
            for name in modules:
                module = self.model.get_submodule(name)
                handles = (
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                    ),
                    module.register_forward_hook(lambda _, args, output, name=name: after(name, output)),
                )
                for handle in handles:
                    hooks.callback(handle.remove)
            self.model.zero_grad()
            ids = torch.tensor(tokens, dtype=torch.long)
            output = self.model(input_ids=ids, labels=ids, use_cache=False)
            output.loss.backward()
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.model.named_parameters()
        }
        return Pass(inputs, outputs, _numpy(output.logits), output.loss.item(), self.as_saved(gradients))


@contextlib.contextmanager
def nudged(model: Any, seed: int = 0) -> Iterator[None]:
    """Within the context, every parameter is the next number of its type, above or below at random; afterwards it is
    exactly what it was.

    What this changes is an estimate of what rounding changes: in some places of trained models, hundreds of times the
    last bit.
    """
    import torch

    def step(direction: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            above = torch.rand(parameter.shape, generator=generator) < 0.5
            towards = torch.where(above, direction, -direction).to(parameter.dtype)
            parameter.data = torch.nextafter(parameter.data, towards)

    step(math.inf)
    try:
        yield
    finally:
        step(-math.inf)


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] in float32, without gradients."""
    import torch

    with torch.no_grad():
        return _numpy(model(input_ids=torch.tensor(tokens, dtype=torch.long), use_cache=False).logits)


def load(folder: Path, dtype: str = "float32") -> Any:
    """transformers' model of a folder, ready to be compared with: eager attention, no kernels of the hub, which 5.25
    uses by default, evaluation mode."""
    transformers = import_transformers()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", use_kernels=False, output_loading_info=True
        )
    except Exception as error:  # its exceptions are of many types
        raise BadInput(f"{folder}: transformers cannot load it ({first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers draws these at random, and says so in a warning at most.
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BadInput(f"{folder}: lacks weights that transformers needs: {', '.join(missing[:5])}{more}")
    model = _text_model(model)
    model.get_input_embeddings().padding_idx = None  # else the padding token's embedding would get no gradient
    return model.eval()


def _text_model(model: Any) -> Any:
    """The text model of a multimodal model, the only part that we have; any other model as it is."""
    import torch
    import transformers

    config = model.config.get_text_config()
    if config is model.config:
        return model
    with torch.device("meta"):
        text = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    text.model, text.lm_head = model.model.language_model, model.lm_head
    return text


def random_model(model_type: str, seed: int = 0) -> Any:
    """A small model of an architecture, with every parameter drawn at random."""
    transformers = import_transformers()
    values = config_to_hf(random_config(model_type, seed))
    # The usual ones are outside so small a vocabulary.
    token_ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    theirs = transformers.AutoConfig.for_model(**values | token_ids)
    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").eval()
    randomise(model, seed)
    return model


def random_config(model_type: str, seed: int = 0) -> Any:
    """A small config of an architecture."""
    config_class = ARCHITECTURES[model_type].config_class
    # Fields that transformers does not compute keep their defaults.
    own = config_table(model_type).own
    names = [field.name for field in dataclasses.fields(config_class) if field.name not in own]

    def drawn(field: str) -> Any:
        options = VARIANTS[field]
        if field == "rope_parameters" and "local_rope_parameters" in names:
            # The trained length of dynamic is max_position_embeddings to transformers, and so the same for all layers.
            options = [option for option in options if option["rope_type"] != "dynamic"]
        rng = np.random.default_rng([seed, crc32(field.encode())])
        return options[rng.integers(len(options)) if seed else 0]

    fields = {name: SMALL[name] for name in names if name in SMALL}
    fields |= {name: drawn(name) for name in names if name in VARIANTS}
    return override(config_class(), **fields | SPECIAL.get(model_type, {}))


def randomise(model: Any, seed: int = 0) -> None:
    """Draw every parameter and saved buffer of a torch model anew, each from the seed and its name.

    Norms and biases move away from 1 and 0, which hide a wrong or missing one, and matrices have a gain of about
    1/sqrt(fan in), so that attention is not flat.
    """
    import torch

    for name, tensor in _tensors(model).items():
        if not tensor.is_floating_point() or not tensor.numel():  # empty in a DeepSeek without shared experts
            continue
        shape = tuple(tensor.shape)
        rng = np.random.default_rng([seed, crc32(name.encode())])
        if len(shape) == 1:
            values = 0.3 * rng.standard_normal(shape) + (1.0 if "bias" not in name else 0.0)
        else:
            embedding = "wte" in name or "wpe" in name or "embed" in name
            values = rng.standard_normal(shape) * (0.5 if embedding else 1.4 / math.sqrt(min(shape[-2:])))
        with torch.no_grad():
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))


def import_transformers() -> Any:
    """transformers, silent; BadInput that names the extra where it or torch is not installed."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise BadInput(
            f"parity compares with transformers on PyTorch, and {error.name or 'one of them'} is not installed: "
            "pip install -e '.[test]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _tensors(model: Any) -> dict[str, Any]:
    """Parameters and saved buffers by name, tied ones once."""
    saved = model.state_dict().keys()
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor for name, tensor in named if name in saved}


def _save_and_read(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors under the names in memory, as `save_pretrained` writes them: renamed, and fused ones split."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=dict(tensors))
        return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def _first_array(values: Any) -> Any:
    """The first tensor of floats among a module's arguments or results, or None."""
    import torch

    if isinstance(values, torch.Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, Mapping):
        values = values.values()
    if isinstance(values, tuple | list):
        return next((found for value in values if (found := _first_array(value)) is not None), None)
    return None


def _numpy(tensor: Any) -> np.ndarray:
    """A copy in float32, since later code may write into the tensor."""
    return np.array(tensor.detach().float().cpu().numpy())
