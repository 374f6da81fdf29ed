"""Networks small enough to train in a test."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A SwiGLU block with a norm before it."""

    def __init__(self, h=32, i=64, norm=True):
        super().__init__()
        self.norm = nn.RMSNorm(h) if norm else nn.Identity()
        self.gate, self.up, self.down = nn.Linear(h, i, bias=False), nn.Linear(h, i, bias=False), nn.Linear(i, h)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Net(nn.Module):
    """Embedding, blocks, a final norm and a head that may be the embedding."""

    def __init__(self, blocks=2, vocabulary=61, h=32, i=64, tied=False, norm=True, padding_idx=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, h, padding_idx=padding_idx)
        self.blocks = nn.ModuleList(Block(h, i, norm) for _ in range(blocks))
        self.last = nn.LayerNorm(h) if norm else nn.Identity()
        self.head = nn.Linear(h, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.wrap = lambda block, x: block(x)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.wrap(block, x)
        return self.head(self.last(x))


def tokens(vocabulary=61, shape=(4, 9), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary // 2, shape, generator=g)  # many repeat


def loss_of(net, x):
    y = net(x)
    y = y.logits if hasattr(y, "logits") else y
    return F.cross_entropy(y.flatten(0, -2).float(), x.flatten())
