"""GPT-2 in plain PyTorch as people write it by hand: the strong peer on a CPU, where transformers is a weak one.

Written for speed where PyTorch offers it: fused attention (`scaled_dot_product_attention`), one product for queries,
keys and values, the loss inside the module so that a compiler sees all of it. Names are those of transformers'
`GPT2LMHeadModel`, whose linear layers are stored (in, out): `load` transposes them.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, config: Mapping):
        super().__init__()
        width, self.heads = config["n_embd"], config["n_head"]
        inner = config.get("n_inner") or 4 * width
        self.ln_1 = nn.LayerNorm(width, eps=config["layer_norm_epsilon"])
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_2 = nn.LayerNorm(width, eps=config["layer_norm_epsilon"])
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["c_proj"](mixed.transpose(1, 2).reshape(batch, length, width))
        inner = functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](inner)


class PlainGPT2(nn.Module):
    """Tokens [B, T] to logits [B, T, V]; the head is the token table."""

    def __init__(self, config: Mapping):
        super().__init__()
        width = config["n_embd"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config["vocab_size"], width),
                "wpe": nn.Embedding(config["n_positions"], width),
                "h": nn.ModuleList(Block(config) for _ in range(config["n_layer"])),
                "ln_f": nn.LayerNorm(width, eps=config["layer_norm_epsilon"]),
            }
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"]:
            x = block(x)
        return functional.linear(parts["ln_f"](x), parts["wte"].weight)


def load(config: Mapping, state: Mapping[str, torch.Tensor]) -> PlainGPT2:
    """The model with weights in the layout of transformers; strict."""
    model = PlainGPT2(config)
    stored_in_out = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    model.load_state_dict({name: x.T if name.endswith(stored_in_out) else x for name, x in state.items()})
    return model
