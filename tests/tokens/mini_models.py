"""Small models of our own with the attribute names of VGGT's Aggregator and of pi3, for patches that go by names.

    VGGT   DINOv2, then [frame block, global block] x depth; camera and register tokens first, other ones in frame 0
    pi3    encoder, then blocks in turn: even ones within frames, odd ones over all; registers first, none special
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Rotary2D(nn.Module):
    """Half of a head turns with the row of a token, half with its column; position 0 does not turn."""

    def __init__(self, base=100.0):
        super().__init__()
        self.base = base

    def forward(self, x, where):  # x (B, heads, n, d), where (B, n, 2)
        pairs = x.shape[-1] // 4
        speed = self.base ** (-torch.arange(pairs, device=x.device) / pairs)
        angle = (where[..., None] * speed).flatten(2)[:, None].to(x.dtype)  # (B, 1, n, d / 2): rows', then columns'
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)
        return turned.flatten(-2)


class Attention(nn.Module):
    """``forward(x, pos)``, as VGGT's; ``cast_first`` and ``forward(x, attn_bias, xpos)`` in the subclass, as pi3's."""

    def __init__(self, dim, num_heads, *, rope=None, qkv_bias=True, qk_norm=True, attn_drop=0.0, fused_attn=True):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn, self.rope = self.head_dim**-0.5, fused_attn, rope
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x, where, cast_first=False):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if cast_first:
            q, k = q.to(v.dtype), k.to(v.dtype)
        if self.rope is not None:
            q, k = self.rope(q, where), self.rope(k, where)
        return q, k, v

    def mix(self, q, k, v):
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = self.attn_drop((q * self.scale @ k.mT).softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def forward(self, x, pos=None):
        return self.mix(*self.heads(x, pos))


class AttentionRope(Attention):
    def forward(self, x, attn_bias=None, xpos=None):
        return self.mix(*self.heads(x, xpos, cast_first=True))


class LayerScale(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, num_heads, *, kind=Attention, init_values=0.5, drop_path=0.0, **options):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = kind(dim, num_heads, **options)
        self.ls1, self.ls2 = LayerScale(dim, init_values), LayerScale(dim, init_values)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop_path = drop_path

    def forward(self, x, pos=None, **more):
        if self.training and self.drop_path:  # attention for some scenes of the batch, as DINOv2's blocks do
            some = torch.randperm(len(x))[: max(1, int(len(x) * (1 - self.drop_path)))]
            place = {k: v[some] for k, v in more.items()} if pos is None else {"pos": pos[some]}
            x = x.index_add(0, some, self.ls1(self.attn(self.norm1(x[some]), **place)))
        else:
            x = x + self.ls1(self.attn(self.norm1(x), **({"pos": pos} if pos is not None else more)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    """An encoder: a convolution, a norm."""

    def __init__(self, dim, patch):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, patch, patch), nn.LayerNorm(dim)

    def forward(self, images, is_training=True):
        return {"x_norm_patchtokens": self.norm(self.proj(images).flatten(2).mT)}


def places(frames, height, width, special, device=None):
    """(frames, special + height width, 2): special tokens at 0, patches from 1."""
    grid = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device)) + 1
    return F.pad(grid, (0, 0, special, 0)).expand(frames, -1, -1)


class Aggregator(nn.Module):
    """VGGT's: ``forward(images (B, S, 3, H, W))`` -> ([frame | global tokens (B, S, P, 2 C), ...], patch_start_idx)."""

    def __init__(self, dim=32, depth=4, num_heads=4, patch_size=4, registers=2, use_reentrant=False, **options):
        super().__init__()
        self.patch_embed, self.rope = Patches(dim, patch_size), Rotary2D()
        self.frame_blocks = nn.ModuleList(Block(dim, num_heads, rope=self.rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(dim, num_heads, rope=self.rope, **options) for _ in range(depth))
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.randn(1, 2, registers, dim))
        self.patch_start_idx, self.patch_size, self.aa_order = 1 + registers, patch_size, ["frame", "global"]
        self.use_reentrant, self.checkpointing = use_reentrant, True

    def special(self, token, b, s):  # the first frame's, then the others'
        return torch.cat([token[:, :1].expand(b, -1, -1, -1), token[:, 1:].expand(b, s - 1, -1, -1)], 1).flatten(0, 1)

    def forward(self, images):
        b, s, _, h, w = images.shape
        patches = self.patch_embed(images.flatten(0, 1))["x_norm_patchtokens"]
        x = torch.cat([self.special(self.camera_token, b, s), self.special(self.register_token, b, s), patches], 1)
        p, c = x.shape[1:]
        pos = places(b * s, h // self.patch_size, w // self.patch_size, self.patch_start_idx, x.device)
        outputs = []
        for i in range(len(self.frame_blocks)):
            x, _, (one,) = self._process_frame_attention(x, b, s, p, c, i, pos=pos)
            x, _, (two,) = self._process_global_attention(x, b, s, p, c, i, pos=pos)
            outputs.append(torch.cat([one, two], -1))
        return outputs, self.patch_start_idx

    def call(self, block, x, pos):
        if self.training and self.checkpointing:
            return checkpoint(block, x, pos, use_reentrant=self.use_reentrant)
        return block(x, pos=pos)

    def _process_frame_attention(self, tokens, B, S, P, C, frame_idx, pos=None):
        x = self.call(self.frame_blocks[frame_idx], tokens.reshape(B * S, P, C), pos.reshape(B * S, P, 2))
        return x, frame_idx + 1, [x.view(B, S, P, C)]

    def _process_global_attention(self, tokens, B, S, P, C, global_idx, pos=None):
        x = self.call(self.global_blocks[global_idx], tokens.reshape(B, S * P, C), pos.reshape(B, S * P, 2))
        return x, global_idx + 1, [x.view(B, S, P, C)]


class MiniVGGT(nn.Module):
    """What holds an aggregator: (B, S, 3, H, W) -> tokens (B, S, P, 2 C) of the last layer."""

    def __init__(self, **options):
        super().__init__()
        self.aggregator = Aggregator(**options)

    def forward(self, images):
        return self.aggregator(images)[0][-1]


class MiniPi3(nn.Module):
    """pi3's: ``forward(imgs (B, N, 3, H, W))`` -> tokens (B, N, P, C)."""

    def __init__(self, dim=32, depth=8, num_heads=4, patch_size=4, registers=3, **options):
        super().__init__()
        self.encoder, self.rope, self.patch_size = Patches(dim, patch_size), Rotary2D(), patch_size
        options = {"kind": AttentionRope, "rope": self.rope, **options}
        self.decoder = nn.ModuleList(Block(dim, num_heads, **options) for _ in range(depth))
        self.register_token = nn.Parameter(torch.randn(1, 1, registers, dim))
        self.patch_start_idx = registers

    def decode(self, hidden, N, H, W):
        b = hidden.shape[0] // N
        x = torch.cat([self.register_token[0].expand(b * N, -1, -1), hidden], 1)
        p, c = x.shape[1:]
        pos = places(b * N, H // self.patch_size, W // self.patch_size, self.patch_start_idx, x.device)
        for i, block in enumerate(self.decoder):
            rows = (b, N * p) if i % 2 else (b * N, p)
            x = block(x.reshape(*rows, c), xpos=pos.reshape(*rows, 2))
        return x.view(b, N, p, c), pos

    def forward(self, imgs):
        _, n, _, h, w = imgs.shape
        hidden = self.encoder(imgs.flatten(0, 1))["x_norm_patchtokens"]
        return self.decode(hidden, n, h, w)[0]


def sharpen(model, factor=4.0):
    """Attention of random weights is all but uniform: larger q and k, so that which keys are seen matters."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "qkv"):
                third = module.qkv.weight.shape[0] // 3
                module.qkv.weight[: 2 * third] *= factor
                for norm in (module.q_norm, module.k_norm):
                    if isinstance(norm, nn.LayerNorm):
                        norm.weight.mul_(math.sqrt(factor))
    return model
