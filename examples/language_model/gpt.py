"""A small GPT: a transformer that predicts the next token from the tokens before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    """Causal attention and a perceptron, each after a layer norm and added to its input (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, L, width) to the same shape. Position i depends on the positions 0 … i only."""
        n, length, width = x.shape
        parts = self.query_key_value(self.norm_attention(x)).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (n, heads, L, width / heads) each
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Token and position embeddings, blocks, and a head that shares the weights of the token embedding."""

    def __init__(self, vocabulary: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width = {width} must be a multiple of heads = {heads}")
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # as in GPT-2, what is added to the residual stream starts smaller
                is_added = name.endswith(("project.weight", "mlp.2.weight"))
                std = parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std / (2 * layers) ** 0.5 if is_added else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position, (n, L, vocabulary), for int64 (n, L)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))
        return logits


def gpt(num_classes: int, context: int, layers: int = 2, heads: int = 4, width: int = 64) -> GPT:
    """Return the network of a job: `num_classes` is the size of the vocabulary, the others are `model.kwargs`."""
    return GPT(num_classes, context, layers, heads, width)
