"""A Llama, by hand: the whole network.

    token -> embedding -> 30 x (attention, then MLP, each added to the stream) -> norm -> logits

Tokens come as one flat ribbon, so only attention knows about documents. Modules have the names of a
Hugging Face checkpoint. If you edit this file, run with --plain: otherwise fast/packed.py writes
the replies, which knows nothing of your edit.

Shapes: N tokens, S rows with a target, C hidden_size, H query heads, K key/value heads,
D head_dim, M intermediate_size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from parrot.files import model_folder


@dataclass(frozen=True)
class LlamaConfig:  # in the words of a Hugging Face config.json
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # M
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K: each serves H / K query heads
    head_dim: int  # D
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool


class RMSNorm(nn.Module):
    """Scale each row to root mean square 1, then by a learned weight (arXiv:1910.07467).

    >>> RMSNorm(2, eps=0.0)(torch.tensor([[1.0, 7.0]])).detach()  # the root of (1 + 49) / 2 is 5
    tensor([[0.2000, 1.4000]])
    """

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        x32 = x.float()  # bfloat16 would lose the small differences in squares and sums
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_angles(positions, head_dim, theta):
    """cos and sin of the angles of rotary embedding (arXiv:2104.09864).

    positions (N,) -> two tensors (N, 1, D / 2). Pair i turns by position / theta^(2i / D).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, None].float() / theta ** (exponents / head_dim)  # (N, D / 2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x, cos, sin):
    """Turn each pair of x (N, heads, D) by its angle. Pair i is (x[i], x[i + D / 2]).

    Why: the dot product of two turned vectors sees only the distance of their positions.
    """
    first, second = x.float().chunk(2, dim=-1)  # (N, heads, D / 2) each
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245): H query heads share K key/value heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, layer, layout, cos_sin):  # x (N, C); layout: see attention.py
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        y = layout.attend(layer, rotate(q, *cos_sin), rotate(k, *cos_sin), v)  # (N, H, D)
        return self.o_proj(y.flatten(-2))  # (N, C)


class MLP(nn.Module):
    """SwiGLU, on each token alone: one projection, through silu, gates another (arXiv:2002.05202).

    silu(x) = x * sigmoid(x) is near 0 below zero, which blocks, and near x above it.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, M, bias=False)
        self.up_proj = nn.Linear(C, M, bias=False)
        self.down_proj = nn.Linear(M, C, bias=False)

    def forward(self, x):  # (N, C), inside (N, M), -> (N, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to the stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, layer, layout, cos_sin):  # as in Attention; (N, C) -> (N, C)
        x = x + self.self_attn(self.input_layernorm(x), layer, layout, cos_sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBody(nn.Module):  # no forward: it gives the parameters their prefix "model."
    def __init__(self, config: LlamaConfig):
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)  # nn.Embedding would fill it
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The language model, with random weights. Hidden states first, then logits where needed."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if self.device.type != "meta":  # `load` fills a model on "meta" from a checkpoint instead
            for parameter in (p for p in self.parameters() if p.dim() == 2):
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def load(cls, folder, dtype=torch.float32, device="cpu"):
        """A Hugging Face model folder -> Llama. UserError names what is missing or unknown."""
        config = LlamaConfig(**model_folder.read_config(folder))
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        tensors = model_folder.read_tensors(folder, shapes, dtype, device)
        model.load_state_dict(tensors, strict=False, assign=True)  # a tied lm_head is not in it
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight  # assigning untied them
        return model

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    def forward(self, tokens, layout):
        """tokens (N,), layout: a Ribbon or a step of a KVCache -> hidden states (N, C)."""
        if len(tokens) != len(layout.positions):
            raise ValueError(f"{len(tokens)} tokens on a layout of {len(layout.positions)}")
        cos_sin = rope_angles(layout.positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(tokens)  # (N, C)
        for layer, block in enumerate(self.model.layers):
            x = block(x, layer, layout, cos_sin)
        return self.model.norm(x)

    def logits(self, hidden_states):
        """(S, C) -> (S, V): the score of every token to come next."""
        return self.lm_head(hidden_states)
