"""Llama in plain PyTorch as people write it by hand, to train and to generate with: a cache of a fixed size, written in
place.

Names are those of transformers' `LlamaForCausalLM`. It needs no masks: a prompt attends causally, a new token to the
whole cache up to itself.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, config: Mapping):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = width // self.heads
        self.input_layernorm = nn.RMSNorm(width, eps=config["rms_norm_eps"])
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, self.heads * self.width, bias=False),
                "k_proj": nn.Linear(width, self.groups * self.width, bias=False),
                "v_proj": nn.Linear(width, self.groups * self.width, bias=False),
                "o_proj": nn.Linear(self.heads * self.width, width, bias=False),
            }
        )
        self.post_attention_layernorm = nn.RMSNorm(width, eps=config["rms_norm_eps"])
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )

    def forward(self, x, cos, sin, cache=None, start=0):
        """x [B, T, D]; a cache has keys and values [B, K, S, H], written from `start` on."""
        batch, length, _ = x.shape
        normed = self.input_layernorm(x)

        def heads(name, count):
            return self.self_attn[name](normed).view(batch, length, count, self.width).transpose(1, 2)

        query = rotate(heads("q_proj", self.heads), cos, sin)
        key, value = rotate(heads("k_proj", self.groups), cos, sin), heads("v_proj", self.groups)
        if cache is not None:
            end = start + length
            for held, new in zip(cache, (key, value), strict=True):
                held[:, :, start:end] = new
            key, value = (held[:, :, :end] for held in cache)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, enable_gqa=self.heads > self.groups
        )
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](functional.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainLlama(nn.Module):
    def __init__(self, config: Mapping):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"]),
                "layers": nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"])),
                "norm": nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"]),
            }
        )

    def forward(self, tokens):
        """Logits [B, T, V]."""
        x = self.model["embed_tokens"](tokens)
        cos, sin = self.tables(tokens.shape[1])
        for block in self.model["layers"]:
            x = block(x, cos, sin)
        return functional.linear(self.model["norm"](x), self.model["embed_tokens"].weight)

    def tables(self, length):
        """Cosines and sines of RoPE [T, H/2]."""
        width = self.model["layers"][0].width
        frequencies = self.config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        angles = torch.arange(length)[:, None] * frequencies
        return angles.cos(), angles.sin()

    def last_logits(self, tokens, start, tables, caches):
        """Logits [B, V] after the last of `tokens` [B, T], whose positions begin at `start`."""
        cos, sin = (table[start : start + tokens.shape[1]] for table in tables)
        x = self.model["embed_tokens"](tokens)
        for block, cache in zip(self.model["layers"], caches, strict=True):
            x = block(x, cos, sin, cache, start)
        return functional.linear(self.model["norm"](x[:, -1]), self.model["embed_tokens"].weight)

    @torch.inference_mode()
    def generate(self, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Greedy: prompts [B, P] to [B, P + new tokens]."""
        batch, prompt = prompts.shape
        block, length = self.model["layers"][0], prompt + new_tokens
        shape = (batch, block.groups, length, block.width)
        caches = [(torch.empty(shape), torch.empty(shape)) for _ in self.model["layers"]]
        tables, tokens, newest, start = self.tables(length), [prompts], prompts, 0
        for _ in range(new_tokens):
            logits = self.last_logits(newest, start, tables, caches)
            newest, start = logits.argmax(-1, keepdim=True), start + newest.shape[1]
            tokens.append(newest)
        return torch.cat(tokens, dim=1)


def load(config: Mapping, state: Mapping[str, torch.Tensor]) -> PlainLlama:
    """The model with weights in the layout of transformers; strict. Tied head, plain RoPE, no biases."""
    model = PlainLlama(config)
    model.load_state_dict(dict(state))
    return model
