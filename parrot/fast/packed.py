"""model.Llama, faster on a CPU: the network arranged for writing, 9.5 ms a token instead of 12.2.

One row uses each weight once, so memory and the number of small operations count: matrices that
read the same row are one, with the norm's scale in them, and rotation multiplies complex numbers.
For one reply weights stay in bfloat16 even where products with more rows need float32 (1.3 times as
fast there); for many, oneDNN orders the matrices. Held equal by tests/fast/test_packed.py.
"""

import platform

import torch
import torch.nn.functional as F

from parrot.system.device import multiplies_bfloat16


class PackedLinear:
    """Linear layers with the same input, as one; scale (in,): what else would multiply it."""

    def __init__(self, *weights, scale=None, many):
        weight = weights[0].detach()
        if scale is not None:
            weight = (torch.cat(weights) * scale).to(weight.dtype).detach()
        self.weight, self.packed = weight.T, None
        if many and weight.dtype != torch.float16:  # few CPUs can
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # suits 16 rows
            if weight.dtype == torch.float32:
                self.weight = None  # its own order is as good for one row

    def __call__(self, x, stream=None):
        """x (N, in) -> the product (N, all outs), added to the stream if there is one."""
        if self.packed is not None and (len(x) > 1 or self.weight is None):
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        elif len(x) > 1:
            y = x @ self.weight.to(x.dtype)
        elif stream is None or stream.dtype != self.weight.dtype:
            y = x.to(self.weight.dtype) @ self.weight
        else:
            return torch.addmm(stream, x, self.weight)
        return y if stream is None else stream + y


class PackedBlock:
    """model.Block in four products."""

    def __init__(self, block, many):
        attention, mlp, D = block.self_attn, block.mlp, block.self_attn.head_dim
        norms = block.input_layernorm, block.post_attention_layernorm  # sqrt(C): see length
        before, between = (norm.weight.float() * norm.weight.numel() ** 0.5 for norm in norms)
        q, k = (pairs_together(p.weight, D) for p in (attention.q_proj, attention.k_proj))
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        self.qkv_proj = PackedLinear(q, k, attention.v_proj.weight, scale=before, many=many)
        self.o_proj = PackedLinear(attention.o_proj.weight, many=many)
        self.gate_up_proj = PackedLinear(gate, up, scale=between, many=many)
        self.down_proj = PackedLinear(mlp.down_proj.weight, many=many)


class PackedLlama:
    """A model.Llama that only writes."""

    def __init__(self, model, many=True):
        self.config, self.device = model.config, model.device
        self.dtype = model.dtype if multiplies_bfloat16(model.device) else torch.float32
        self.embed_tokens, self.norm = model.model.embed_tokens, model.model.norm
        self.blocks = [PackedBlock(block, many) for block in model.model.layers]
        self.lm_head = PackedLinear(model.lm_head.weight, many=many)
        self.least = torch.tensor((model.config.hidden_size * model.config.rms_norm_eps) ** 0.5)

    def length(self, x):
        """x (N, C) -> (N, 1): its root mean square times the root of C, in float32."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.hypot(norm, self.least)  # sqrt(|x|^2 + C eps)

    def __call__(self, tokens, layout):
        """As model.Llama.forward."""
        N, H, K = len(tokens), self.config.num_attention_heads, self.config.num_key_value_heads
        D = self.config.head_dim
        # model.rope_angles as complex numbers; v does not turn.
        angles = layout.positions[:, None] / self.config.rope_theta ** (torch.arange(0, D, 2) / D)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (N, 1, D / 2)
        turns = torch.cat([turns.expand(N, H + K, -1), turns.new_ones(N, K, D // 2)], dim=1)
        x = self.embed_tokens(tokens).to(self.dtype)  # (N, C)
        with one_row_by_torch(N):
            for layer, block in enumerate(self.blocks):
                qkv = (block.qkv_proj(x) / self.length(x)).view(N, -1, D // 2, 2)
                qkv = torch.view_as_real(torch.view_as_complex(qkv) * turns).view(N, -1, D)
                y = layout.attend(layer, *qkv.split((H, K, K), dim=1))  # (N, H, D)
                x = block.o_proj(y.reshape(N, -1).to(x.dtype), x)
                gate, up = (block.gate_up_proj(x) / self.length(x)).chunk(2, dim=-1)
                x = block.down_proj((F.silu(gate) * up).to(x.dtype), x)
        return self.norm(x)

    def logits(self, hidden_states):
        """As model.Llama.logits."""
        with one_row_by_torch(len(hidden_states)):
            return self.lm_head(hidden_states)


def one_row_by_torch(num_rows):
    """For one row torch's own product reads bfloat16 at 29 GB/s, that of oneDNN (mkldnn) at 10."""
    return torch.backends.mkldnn.flags(enabled=num_rows > 1, allow_tf32=None)


def pairs_together(weight, head_dim):
    """(heads D, C) -> the same rows, each pair that turns side by side: q k^T is the same."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pays(device):
    """Whether packed weights are faster there. Measured only on x86 with oneDNN."""
    is_x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.mkldnn.is_available()


def pack(model, many):
    """A Llama -> a packed one where that pays, else itself."""
    return PackedLlama(model, many) if pays(model.device) else model
