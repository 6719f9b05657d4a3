"""Attention with factorized projections, in place of nn.MultiheadAttention."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hodec.layers.base import added
from hodec.layers.weight import FactorizedWeights

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class FactorizedAttention(FactorizedWeights):
    """Put before ``nn.MultiheadAttention``; takes and gives what it does.

    The projections run by their factors. One weight for queries, keys and values does so where the three are the same
    tensor; otherwise, and with ``add_bias_kv`` or ``add_zero_attn``, torch's own function gets the rebuilt weights.
    """

    num_heads: int
    head_dim: int
    batch_first: bool
    dropout: float

    def forward(  # noqa: PLR0913
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: (N, L, E), (L, N, E) or (L, E) -> the same, and the attention weights."""
        same = query is key and key is value
        if not self._by_factors(same) or query.is_nested:
            made_by_torch: tuple[Tensor, Tensor | None] = cast(Any, super()).forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return made_by_torch
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask too")
        batched = query.ndim == 3
        given = [self._batch_first(x) for x in (query, key, value)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._projected(*given, same=same))
        mask = self._mask(q, k, attn_mask, key_padding_mask, batched=batched)
        weights = None
        if need_weights:
            scores = q @ k.mT / self.head_dim**0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            made = F.dropout(weights, self.dropout, self.training) @ v
        else:
            rate = self.dropout if self.training else 0.0
            made = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=rate)
        output = self.out_proj(made.transpose(1, 2).flatten(2))  # (N, L, E)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _by_factors(self, same: bool) -> bool:
        out = self.out_proj.runs_factors("weight") if isinstance(self.out_proj, FactorizedWeights) else False
        joint = self.runs_factors("in_proj_weight")
        special = self.bias_k is not None or self.add_zero_attn
        return (out or joint or any(map(self.runs_factors, SEPARATE))) and not special and (same or not joint)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, *, same: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values (N, L, E), with their biases."""
        bias = cast(Tensor | None, self.in_proj_bias)
        if not self._qkv_same_embed_dim:
            made = tuple(self.product(name, x) for name, x in zip(SEPARATE, (query, key, value), strict=True))
        elif same:
            joint = self.product("in_proj_weight", query)
            return added(joint, bias).chunk(3, dim=-1)
        else:
            parts = cast(Tensor, self.in_proj_weight).chunk(3)
            made = tuple(F.linear(x, part) for x, part in zip((query, key, value), parts, strict=True))
        return made if bias is None else tuple(added(x, b) for x, b in zip(made, bias.chunk(3), strict=True))

    def _batch_first(self, x: Tensor) -> Tensor:
        """As given -> (N, L, E)."""
        if x.ndim == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None, *, batched: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores (N, heads, L, S), or None."""
        mask = None if attn_mask is None else _added(attn_mask, q)
        if mask is not None and mask.ndim == 3:  # (N * heads, L, S)
            mask = mask.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return mask
        hidden = _added(padding if batched else padding.unsqueeze(0), q)[:, None, None, : k.shape[2]]
        return hidden if mask is None else mask + hidden


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add: of a boolean one, minus infinity where it hides."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
