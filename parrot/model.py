"""A Llama: the whole network, by hand.

    token -> embedding -> 30 x (attention, then MLP, each added to the stream) -> norm -> logits

Two choices make it short. Tokens come as one flat ribbon, so a hidden state is (N, C) and
no layer but attention knows about sequences (see attention.py). And every module carries
the name that it has in a Hugging Face checkpoint, so loading needs no table of names.

Shapes: N tokens, S supervised rows, C hidden_size, H query heads, K key/value heads,
D head_dim, M intermediate_size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of the network, under the names of a Hugging Face config.json."""
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K: each serves H / K query heads
    head_dim: int  # D
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool


class RMSNorm(nn.Module):
    """Scale each row to root mean square 1, then by a learned weight (arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        # In float32: bfloat16 squares and sums would lose the small differences.
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_angles(positions, head_dim, theta):
    """cos and sin of the angle by which rotary embedding turns each pair (arXiv:2104.09864).

    positions (N,) -> two tensors (N, 1, D / 2). Pair i turns by position / theta^(2i / D):
    the first pairs tell neighbours apart, the last ones distant places.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() / theta ** exponents  # (N, D / 2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x, cos, sin):
    """Turn x (N, heads, D) by the angles. Pair i is (x[i], x[i + D / 2]), the split-half form."""
    first, second = x.float().chunk(2, dim=-1)  # (N, heads, D / 2) each
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H heads ask, K <= H heads answer (arXiv:2305.13245)."""

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def project(self, x, cos, sin):
        """x (N, C) -> what every token asks, is found by, and tells."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU: one projection gates the other (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, M, bias=False)
        self.up_proj = nn.Linear(C, M, bias=False)
        self.down_proj = nn.Linear(M, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    # The halves before and after `attend` treat every token alone, whatever sequence it is in,
    # so they are what compiling.py compiles.

    def before_attention(self, x, cos, sin):
        """x (N, C) -> q (N, H, D), k and v (N, K, D)."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, y):
        """x (N, C) and what attention brought, y (N, H, D) -> the next block's x (N, C)."""
        x = x + self.self_attn.o_proj(y.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, layer, place, angles):
        return self.after_attention(x, place.attend(layer, *self.before_attention(x, *angles)))


class LlamaBody(nn.Module):
    """Everything but the last matrix."""

    def __init__(self, config):
        super().__init__()
        # Weights are always loaded: drawing random ones first would import half of torch, 1.2 s.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The language model. Hidden states first, logits only for the rows that need them:

    >>> from parrot.attention import Ribbon
    >>> model = Llama(LlamaConfig(32, 16, 24, 2, 4, 2, 4, 64, 1e-5, 10000.0, True))
    >>> hidden_states = model(torch.tensor([5, 6, 7, 8, 9]), Ribbon([3, 2]))
    >>> model.logits(hidden_states[[2, 4]]).shape  # what comes after each document
    torch.Size([2, 32])
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        """In what the weights are kept."""
        return self.model.embed_tokens.weight.dtype

    def forward(self, tokens, place):
        """tokens (N,), place: a Ribbon or a KVCache's step -> hidden states (N, C)."""
        angles = rope_angles(place.positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(tokens)  # (N, C)
        for layer, block in enumerate(self.model.layers):
            x = block(x, layer, place, angles)
        return self.model.norm(x)

    def logits(self, hidden_states):
        """(S, C) -> (S, V): the score of every token to come next."""
        return self.lm_head(hidden_states)
