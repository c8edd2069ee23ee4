"""Hugging Face folders, read and written: config, generation config, weights and tokenizer together.

What is read here is what transformers writes (`save_pretrained`), and what is written here is what it reads
(`from_pretrained`), versions 4 and 5 (4 does not scale RoPE in Gemma 3's local layers). The path of a file of weights
stands for its folder, but no other weights there are read.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmq_jax.data.tokenizer_files import COMPANION_FILES, TokenizerFiles
from llmq_jax.data.tokenizer_loading import tokenizer_in
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.defaults import MAX_SHARD_SIZE
from llmq_jax.errors import BadInput, at_place, first_line, no_such_path
from llmq_jax.field_types import float_type, require_model
from llmq_jax.interop.architectures import (
    config_from_hf,
    config_to_hf,
    from_state_dict,
    is_whole,
    language_part,
    resolve_config,
    weight_table,
)
from llmq_jax.interop.float8 import QUANTIZATION, SCALE, block_size, dequantised
from llmq_jax.interop.generation_config import (
    GENERATION_CONFIG,
    TOKEN_IDS,
    GenerationConfig,
    read_generation_config,
    warn_of_ignored,
)
from llmq_jax.interop.peft import is_adapter
from llmq_jax.interop.safetensors_files import INDEX, is_safetensors, open_safetensors, write_safetensors
from llmq_jax.interop.tensor_files import TensorFiles, read_json, write_json
from llmq_jax.interop.torch_files import is_torch, open_torch
from llmq_jax.layers.lora import merge_when_read, spread
from llmq_jax.weight_type import weight_type
from llmq_jax.whole_folders import check_target, whole_folder

if TYPE_CHECKING:
    from llmq_jax.language_model import LanguageModel
else:
    LanguageModel = Any  # It imports this module.


CONFIG = "config.json"
EXPORTED = (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    "model*.safetensors",
    "tokenizer.json",
    *COMPANION_FILES,
)
"""Patterns of all files that an export may consist of."""
TOKENIZER_DOWNLOADED = ("*.json", "*.txt", "*.model", "chat_template.jinja", "additional_chat_templates/*.jinja")
DOWNLOADED = ("model*.safetensors", "adapter_model.safetensors", *TOKENIZER_DOWNLOADED)
DOWNLOADED_WITHOUT_SAFETENSORS = ("pytorch_model*.bin", "adapter_model.bin")
# Patterns match across slashes, and subfolders hold other formats of the same weights.
NOT_DOWNLOADED = ("*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "*/*.bin")
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
GGUF_NAME = r"(?!\.|.*\.\.)([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)"
"""A GGUF file on the hub: "org/name/file.gguf"."""


class Contents(NamedTuple):
    """What a Hugging Face folder holds, in our terms."""

    config: Any
    variables: dict[str, Any]
    tokenizer: Tokenizer | None
    generation: GenerationConfig


def is_hf(path: Path) -> bool:
    """Whether a path is a file of weights, or a folder with one or with an index of shards."""
    return is_safetensors(path) or is_torch(path)


def open_weights(path: Path) -> TensorFiles:
    """The tensors of such a file or folder, by name; of a folder with both formats, those in safetensors."""
    return open_safetensors(path) if is_safetensors(path) else open_torch(path)


def read_hf(path: Path, layout: str = "hf", config: Any = None, dtype: Any = None) -> Contents:
    """Read a folder, or a file of weights, which may have its `config.json` beside it.

    A given `config` takes the place of `config.json`. A dict changes fields of it or, where there is none, gives the
    fields that the shapes of the weights do not tell.
    """
    folder = path.parent if path.is_file() else path
    values = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    state: Mapping[str, Any] = open_weights(path)
    with at_place(path):
        block = block_size(values)
        if block is not None:
            state = dequantised(state, block)
        elif QUANTIZATION not in values and (scale := next((name for name in state if name.endswith(SCALE)), None)):
            raise BadInput(
                f"holds weights in float8 ({scale}), and its {CONFIG} has no {QUANTIZATION}: get {CONFIG} again"
            )

        def stored() -> Any:
            with at_place(folder / CONFIG):
                return config_from_hf(values) if values else None

        config, variables = read_state(state, layout, config, dtype, stored)
    tokenizer = tokenizer_in(folder)
    return Contents(config, variables, tokenizer, _generation(folder, values, config, tokenizer))


def read_state(
    state: Mapping[str, Any], layout: str, given: Any, dtype: Any, stored: Callable[[], Any]
) -> tuple[Any, dict[str, Any]]:
    """(config, variables) of weights. `stored` reads the config beside them, or returns None. It is not called where a
    whole one is given, so that the stored one need not be one that we can read."""
    config = resolve_config(given, None if is_whole(given) else stored(), state, layout)
    return config, from_state_dict(state, config, layout, dtype)


def save_hf(
    lm: LanguageModel,
    folder: str | os.PathLike[str],
    dtype: Any = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Write a model as a Hugging Face folder that transformers loads; returns the folder.

    The weights are written in their own type, or as `dtype`; in shards where they exceed `max_shard_size`. Adapters are
    merged into them; `save_adapter` writes them alone. The folder must not exist or be empty; `overwrite=True` replaces
    one that holds nothing but an earlier export. It appears complete or not at all.

    BadInput: a folder that may not be replaced, a `dtype` that is no floating one, or a model that transformers has no
    form for (experts in a Llama, Dynamic Tanh, a field or a weight of your own, ...), which `save` keeps.
    """
    require_model(lm)
    folder = Path(folder).expanduser().resolve()
    dtype = float_type(dtype)
    config, variables = config_to_hf(lm.config), merge_when_read(spread(lm.variables))
    tensors = weight_table(lm.config.model_type).lazy_state_dict(variables, lm.config, dtype)
    config |= lm.generation.token_ids() | {"dtype": weight_type(tensors).name}
    changed_files: dict[str, bytes] = {}
    if lm.config.labels is None:
        # As `padding_idx` of transformers' embedding it would keep its row, often that of the end token, from being
        # trained; generation_config.json has it.
        config["pad_token_id"] = None
    else:
        config["pad_token_id"], changed_files = padding(lm)
    check_target(folder, overwrite, CONFIG, EXPORTED)
    with whole_folder(folder) as partial:
        write_json(partial / CONFIG, config)
        write_json(partial / GENERATION_CONFIG, lm.generation.to_hf())
        write_safetensors(partial, tensors, max_shard_size)
        if lm.tokenizer is not None:
            lm.tokenizer.save(partial)
        for name, content in changed_files.items():
            (partial / name).write_bytes(content)
    return folder


def padding(lm: Any) -> tuple[int, dict[str, bytes]]:
    """(the id of the token with which transformers pads a classifier's rows, {file: content} of the tokenizer's files
    that must change for it to pad with this token).

    transformers reads the logits at the last token that is not this one, so texts may not end with it.
    """
    files = None if lm.tokenizer is None else TokenizerFiles(lm.tokenizer.files(), lm.tokenizer.name)
    own = None if files is None else files.token_id(files.named_tokens().get("pad_token"))
    end = lm.tokenizer and lm.tokenizer.end_of_text
    last = lm.tokenizer.ending[-1] if lm.tokenizer and lm.tokenizer.ending else None
    tokens = [
        token
        for token in (own, lm.generation.pad_token_id, end, *lm.generation.eos_token_id)
        if token not in (None, last) and token < lm.config.vocab_size
    ]
    if files is not None:
        tokens = [token for token in tokens if files.token(token) is not None]
    if not tokens:
        raise BadInput(
            "transformers pads the rows of a classifier with a token that ends no text, and this model names none; "
            "give it one: lm.replace(generation=lm.generation.replace(pad_token_id=...))"
        )
    if files is None or tokens[0] == own:
        return tokens[0], {}
    spelling = files.token(tokens[0])
    assert spelling is not None  # only such tokens are left
    return tokens[0], files.naming("pad_token", spelling)


def find(name: str | os.PathLike[str], *, tokenizer: bool = False, config: Any = None) -> Path:
    """The path of a model: one that exists, or the local copy of what the hub has under this name ("org/name", or
    "org/name@revision" for one commit, tag or branch of it; "org/name/file.gguf" for one file). With `tokenizer` no
    weights are fetched beside it; nor are they for a model whose `config.json` is refused, unless a whole `config` is
    given, which takes its place.

    The hub is not asked for a name that can only be a path: `runs/mien` where there is a folder `runs`.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    name = str(name)
    is_path = name.startswith(".") or ("/" in name and path.parent.is_dir())
    if is_path or not re.fullmatch(rf"({HUB_NAME}|{GGUF_NAME})(@[\w./-]+)?", name):
        raise BadInput(no_such_path(name))
    return _download(name, tokenizer, config)


def is_hub_id(name: str) -> bool:
    """Whether a name, without a revision, can be a hub id ("org/name") and is not a path that exists."""
    return re.fullmatch(HUB_NAME, name) is not None and not Path(name).exists()


def is_hub_file(name: str) -> bool:
    """Whether a name, perhaps with a revision, can be that of a GGUF file on the hub ("org/name/file.gguf")."""
    return re.fullmatch(GGUF_NAME, name.partition("@")[0]) is not None


def _download(name: str, tokenizer: bool, config: Any) -> Path:
    """The local copy of a model on the Hugging Face hub ("gpt2", "org/name@revision") or, for a `tokenizer`, of its
    files without weights, fetched unless it is there already. Only weights, JSON and text are fetched: no code, and no
    pickle where there are safetensors. `config`: see `find`."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    file = re.fullmatch(GGUF_NAME, repository)
    repository = file[1] if file else repository

    def fetched(patterns: Sequence[str]) -> Path:
        wanted: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": list(NOT_DOWNLOADED)}
        with _told_by_the_hub(name, repository, revision):
            return Path(snapshot_download(repo_id=repository, revision=revision or None, **wanted))

    if file:  # of a model in parts all of them
        path = fetched([re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-?????\1", file[2])]) / file[2]
        if not path.is_file():
            raise BadInput(f"{name}: the Hugging Face hub has {repository}, but no {file[2]} in it")
        return path
    folder = fetched(TOKENIZER_DOWNLOADED)
    if not tokenizer:
        _refuse_by_config(folder, config)
        folder = fetched(DOWNLOADED)  # all once more, of one commit: the name may mean another by now
        if not (is_safetensors(folder) or (folder / "adapter_model.safetensors").is_file()):
            folder = fetched(DOWNLOADED_WITHOUT_SAFETENSORS)
    if not folder.is_dir() or not (tokenizer or is_hf(folder) or is_adapter(folder)):
        raise BadInput(
            f"{name}: has no file on the Hugging Face hub that could be read from there; of GGUF files, name one: "
            f"{repository}/FILE.gguf"
        )
    return folder


@contextlib.contextmanager
def _told_by_the_hub(name: str, repository: str, revision: str) -> Iterator[None]:
    """What the hub's client raises within it as BadInput that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalEntryNotFoundError:
        raise BadInput(
            f"{name}: there is no such file or folder, and the Hugging Face hub could not be reached (no network, or "
            "offline)"
        ) from None
    except GatedRepoError:
        raise BadInput(
            f"{name}: is given to those who accept its licence: do so on https://huggingface.co/{repository}, then log "
            "in by `hf auth login`, or set HF_TOKEN to a token of that account"
        ) from None
    except RepositoryNotFoundError:  # which the hub also says of what it does not show to strangers
        raise BadInput(
            f"{name}: there is no such file or folder, and the Hugging Face hub shows you no such model; check the "
            f"name, or, of a private or gated model, accept its licence on https://huggingface.co/{repository} and log "
            "in by `hf auth login`, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise BadInput(
            f"{name}: the Hugging Face hub has {repository}, but no branch, tag or commit {revision!r} of it"
        ) from None
    except Exception as error:  # what the HTTP library of hub's client raises
        raise BadInput(
            f"{name}: there is no such file or folder, and the Hugging Face hub did not give it ({first_line(error)})"
        ) from error


def _refuse_by_config(folder: Path, config: Any) -> None:
    """BadInput for a model that `read_hf` would refuse for its `config.json`; an adapter's model may be another."""
    file = folder / CONFIG
    if not file.is_file() or is_adapter(folder) or is_whole(config):
        return
    with at_place(file), warnings.catch_warnings(action="ignore"):  # reading the model will tell
        if values := read_json(file):  # an empty one is taken for none
            config_from_hf(values)


def _generation(folder: Path, values: Mapping[str, Any], config: Any, tokenizer: Tokenizer | None) -> GenerationConfig:
    """Special tokens from generation_config.json, else from config.json; the end token, if neither has it, from the
    tokenizer.

    transformers reads only one of the two files, and without an end token in it never stops generating.
    """
    stored = read_generation_config(folder) or {}
    with at_place(folder / CONFIG):
        own = language_part(values)
        if not stored:
            warn_of_ignored(own, folder / CONFIG)
        said = {name: own[name] for name in TOKEN_IDS if name in own} | stored
        end = None if tokenizer is None else tokenizer.end_of_text
        if end is not None and end < config.vocab_size:
            said.setdefault("eos_token_id", end)
        return GenerationConfig.from_hf(said)
