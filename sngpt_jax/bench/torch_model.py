"""The compact GPT in PyTorch, written for speed: the package's own step is compared with it.

It computes what `sngpt_jax.model.gpt` does. Parameters are float32 and cast where they are used.
Logits and losses are float32. Modules and parameters have our names and our layout, matrices
[in, out].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.attention import ntk_base, rotary_tables

ACTIVATIONS = {
    "relu2": lambda h: F.relu(h).square(),
    "leaky_relu2": lambda h: F.leaky_relu(h, 0.5).square(),
    "gelu": F.gelu,
}


def rms_norm(x: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """x divided by the root mean square of its last axis, times `scale`."""
    y = F.rms_norm(x, (x.shape[-1],), eps=eps)
    return y if scale == 1.0 else scale * y


def parameter(*shape: int) -> nn.Parameter:
    """An empty float32 parameter."""
    return nn.Parameter(torch.empty(shape))


def parameters(**shapes: tuple[int, ...]) -> nn.Module:
    """A module of parameters with these names and shapes."""
    module = nn.Module()
    for name, shape in shapes.items():
        setattr(module, name, parameter(*shape))
    return module


class Attention(nn.Module):
    """[B, T, D] → the output [B, T, D], and the values [B, T, K, h] for later layers."""

    def __init__(self, m: ModelConfig, layer: int):
        super().__init__()
        D, H, K, h = m.d_model, m.num_heads, m.num_kv_heads, m.head_dim
        self.m, self.exclusive = m, layer >= m.num_layers - m.xsa_layers
        self.query, self.out = parameter(D, H * h), parameter(H * h, D)
        self.key, self.value = parameter(D, K * h), parameter(D, K * h)
        self.q_gain = parameter(H)
        if m.attention_gate:
            self.gate_weight, self.gate_bias = parameter(D, H), parameter(H)
        if m.value_residual:
            self.value_mix = parameter(2)

    def rotate(self, x_BTHh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        x1, x2, rest = x_BTHh.split([half, half, x_BTHh.shape[-1] - 2 * half], dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        added_value: Tensor | None,
        first_value: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        m, dtype = self.m, x_BTD.dtype
        H, K, h = m.num_heads, m.num_kv_heads, m.head_dim
        # One large product is faster than three.
        qkv = x_BTD @ torch.cat([self.query, self.key, self.value], dim=1).to(dtype)
        q, k, v = (part.unflatten(-1, (-1, h)) for part in qkv.split([H * h, K * h, K * h], dim=-1))
        q, k = (self.rotate(rms_norm(part, m.norm_eps), *rotary) for part in (q, k))
        q = q * self.q_gain.to(dtype)[:, None]
        if added_value is not None:
            v = v + added_value
        if m.value_residual and first_value is not None:
            first, own = self.value_mix.to(dtype).unbind()
            v = first * first_value + own * v
        q_BHTh, k_BKTh, v_BKTh = (part.transpose(1, 2) for part in (q, k, v))
        if not x_BTD.is_cuda and H != K:
            # With enable_gqa a CPU computes whole scores. Expanded heads reach its flash kernel.
            k_BKTh, v_BKTh = (a.repeat_interleave(H // K, dim=1) for a in (k_BKTh, v_BKTh))
        y = F.scaled_dot_product_attention(
            q_BHTh, k_BKTh, v_BKTh, is_causal=True, enable_gqa=k_BKTh.shape[1] != H
        ).transpose(1, 2)
        if self.exclusive:
            unit = F.normalize(v.float(), dim=-1, eps=1e-12)[:, :, :, None]
            grouped = y.float().unflatten(2, (K, H // K))
            y = (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3).to(dtype)
        if m.attention_gate:
            gate = torch.sigmoid((x_BTD @ self.gate_weight.to(dtype)).float() + self.gate_bias)
            y = y * gate.to(dtype)[..., None]
        return y.flatten(2) @ self.out.to(dtype), v


class MLP(nn.Module):
    """[..., D] → [..., D] over F hidden units."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[m.mlp_activation]
        self.up, self.down = parameter(m.d_model, m.mlp_dim), parameter(m.mlp_dim, m.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.activation(x_BTD @ self.up.to(x_BTD.dtype)) @ self.down.to(x_BTD.dtype)


class Block(nn.Module):
    """The stream and the embedding, both [B, T, D] → the next stream and the attention's values."""

    def __init__(self, m: ModelConfig, layer: int):
        super().__init__()
        self.m, self.norm_scale = m, (layer + 1) ** -0.5 if m.ln_scale else 1.0
        self.attn, self.mlp = Attention(m, layer), MLP(m)
        self.resid_mix = parameter(2, m.d_model)
        self.attn_scale, self.mlp_scale = parameter(m.d_model), parameter(m.d_model)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        rotary: tuple[Tensor, Tensor],
        added_value: Tensor | None,
        first_value: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        eps, scale, dtype = self.m.norm_eps, self.norm_scale, x.dtype
        keep, mix = self.resid_mix.to(dtype).unbind()
        u = keep * x + mix * x0
        y, value = self.attn(rms_norm(u, eps, scale), rotary, added_value, first_value)
        u = u + self.attn_scale.to(dtype) * y
        return u + self.mlp_scale.to(dtype) * self.mlp(rms_norm(u, eps, scale)), value


def previous(x: Tensor) -> Tensor:
    """x [B, T, ...] shifted one position later, with zeros first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def hashed_pairs(m: ModelConfig, tokens_BT: Tensor) -> Tensor:
    """The row [B, T] of the bigram table per token and its predecessor."""
    if m.bigram_hash == "sum":
        return (2654435761 * tokens_BT + 40503 * previous(tokens_BT)) % m.bigram_buckets
    tokens, last = tokens_BT.to(torch.int32), m.bigram_buckets - 1  # int32 products wrap
    pairs = (36313 * tokens[:, 1:] ^ 27191 * tokens[:, :-1]) % last
    return torch.cat([torch.full_like(pairs[:, :1], last), pairs], dim=1)


class TorchGPT(nn.Module):
    """The model: inputs and targets [B, T] int64 → the mean cross-entropy in nats, float32.

    Its parameters are not initialized.
    """

    def __init__(self, m: ModelConfig, seq_len: int, dtype: torch.dtype):
        super().__init__()
        self.m, self.dtype, D = m, dtype, m.d_model
        self.embed = parameters(table=(m.vocab_size, D))
        self.blocks = nn.ModuleList([Block(m, layer) for layer in range(m.num_layers)])
        if m.num_skips:
            self.skip_weights = parameter(m.num_skips, D)
        if m.bigram_buckets:
            scale: dict[str, tuple[int, ...]] = {"scale": ()} if m.bigram_scale_init > 0 else {}
            rows, proj = (m.bigram_buckets, m.bigram_dim), (m.bigram_dim, D)
            self.bigram = parameters(table=rows, proj=proj, **scale)
        if m.smear != "none":
            self.smear = parameters(gate=(D,))
        if m.value_embed_layers:
            self.value_embed = parameters(
                table=(m.vocab_size, m.value_embed_dim),
                proj=(m.value_embed_dim, m.num_kv_heads * m.head_dim),
                scale=(),
                layer_scale=(len(m.value_embed_layers),),
            )
        if m.recycle_layers:
            shape = (len(m.recycle_layers), D)
            self.recycle = parameters(scale=shape, bias=shape)
        base = ntk_base(m.rope_base, m.rotary_dims, seq_len, m.rope_ntk_len)
        tables = rotary_tables(seq_len, m.rotary_dims, base)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, torch.from_numpy(table)[:, None].to(dtype))

    def smeared(self, x: Tensor, tokens: Tensor) -> Tensor:
        before = previous(x)
        if self.m.smear_mask_bos:
            before = before.masked_fill((tokens == self.m.bos_id)[..., None], 0)
        return torch.lerp(x, before, torch.sigmoid(self.smear.gate).to(x.dtype))

    def encoded(self, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        m, dtype = self.m, self.dtype
        x = F.embedding(tokens, self.embed.table).to(dtype)
        if m.bigram_buckets:
            rows = F.embedding(hashed_pairs(m, tokens), self.bigram.table).to(dtype)
            pairs = rows @ self.bigram.proj.to(dtype)
            x = x + (self.bigram.scale.to(dtype) * pairs if m.bigram_scale_init > 0 else pairs)
        if m.smear == "before_norm":
            x = self.smeared(x, tokens)
        x, added = rms_norm(x, m.norm_eps), {}
        if m.smear == "after_norm":
            x = self.smeared(x, tokens)
        if m.value_embed_layers:
            rows = F.embedding(tokens, self.value_embed.table).to(dtype)
            values = rows @ self.value_embed.proj.to(dtype)
            values = values.unflatten(-1, (m.num_kv_heads, m.head_dim))
            scales = (self.value_embed.scale * self.value_embed.layer_scale).to(dtype)
            added = {layer: scales[i] * values for i, layer in enumerate(m.value_embed_layers)}
        return x, added

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        m, rotary = self.m, (self.cos, self.sin)
        skips: list[Tensor] = []
        x0, added = self.encoded(inputs)
        x, first_value = x0, None
        for i, block in enumerate(self.blocks):
            if i == m.num_skips:
                for application, layer in enumerate(m.recycle_layers):
                    scale = self.recycle.scale[application].to(x.dtype)
                    x = scale * x + self.recycle.bias[application].to(x.dtype)
                    x, _ = self.blocks[layer](x, x0, rotary, None, first_value)
            if i >= m.num_skips and skips:
                x = x + self.skip_weights[i - m.num_skips].to(x.dtype) * skips.pop()
            x, value = block(x, x0, rotary, added.get(i), first_value)
            if i == 0:
                first_value = value
            if i < m.num_skips:
                skips.append(x)
        x = rms_norm(x, m.norm_eps).flatten(0, 1)
        logits = (x @ self.embed.table.to(x.dtype).T).float()
        if m.logit_soft_cap:
            logits = m.logit_soft_cap * torch.tanh(logits / m.logit_soft_cap)
        return F.cross_entropy(logits, targets.flatten())
