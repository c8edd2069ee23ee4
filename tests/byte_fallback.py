"""A small tokenizer with byte fallback, as Llama 2's: a character without a token is spelled by tokens of its bytes."""

import json

import jax
import jax.numpy as jnp
import tokenizers as hf_tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

import llmq_jax as lq
from llmq_jax.data import FileTokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi", "hi", "x", "▁▁", "\ufffd"]
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def fallback_tokenizer(decoder: decoders.Decoder = LLAMA_DECODER) -> FileTokenizer:
    model = models.BPE(
        vocab={token: number for number, token in enumerate(TOKENS)},
        merges=[("▁", "h"), ("▁h", "i"), ("h", "i"), ("▁", "▁")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = hf_tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return FileTokenizer.from_files(files, "fallback")


def one_word_model(word: str) -> lq.LanguageModel:
    """A model that says this token again and again."""
    sizes = {"max_position_embeddings": 64, "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = lq.GPT2Config(vocab_size=len(TOKENS), **sizes)
    params = jax.tree.map(jnp.zeros_like, lq.init(config)["params"])
    params["final_norm"]["bias"] = jnp.ones(2)
    params["token_embedding"]["embedding"] = jnp.zeros((len(TOKENS), 2)).at[TOKENS.index(word)].set(1.0)
    return lq.LanguageModel(config, lq.build(config), {"params": params}, fallback_tokenizer())


def byte_ids(content: bytes) -> list[int]:
    """Spaces and the letters that have tokens as these, all other bytes as tokens of bytes."""
    own = {ord("h"): "h", ord("i"): "i", ord("x"): "x", ord(" "): "▁"}
    return [TOKENS.index(own[byte]) if byte in own else len(SPECIAL) + byte for byte in content]
