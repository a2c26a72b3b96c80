"""Grouped-query attention layer: projections, query and key norms, partial RoPE, the kernel, output."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mmx import sharding
from mmx.config import AttentionConfig
from mmx.kernels_pallas import api
from mmx.layers.norm import rms_norm
from mmx.layers.rope import rotary_angles, rotate
from mmx.sharding import fan_in_normal, param

ONES = nn.initializers.ones


class Attention(nn.Module):
  """Full causal attention (M2 report, section 2.1; `qk_norm` per the reference implementations of M2 and M3).

  'full_width' norms all heads of the query (H*Dh) and of the key (K*Dh) with one statistic before the head split;
  'per_head' norms each head with one scale [Dh] shared by all.
  """

  config: AttentionConfig
  norm_eps: float
  out_scale: float
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segment_ids_BT):
    c = self.config
    B, T, D = x_BTD.shape
    H, K, Dh = c.num_heads, c.num_kv_heads, c.head_dim
    w_q = param(self, 'w_q', (D, H, Dh), ('embed', 'heads', 'head_dim'), fan_in_normal(D))
    w_k = param(self, 'w_k', (D, K, Dh), ('embed', 'kv_heads', 'head_dim'), fan_in_normal(D))
    w_v = param(self, 'w_v', (D, K, Dh), ('embed', 'kv_heads', 'head_dim'), fan_in_normal(D))
    w_o = param(self, 'w_o', (H, Dh, D), ('heads', 'head_dim', 'embed'), fan_in_normal(H * Dh, self.out_scale))

    q_BTHDh, k_BTKDh, v_BTKDh = (jnp.einsum('btd,dhe->bthe', x_BTD, w.astype(x_BTD.dtype)) for w in (w_q, w_k, w_v))
    if c.qk_norm == 'full_width':
      q_scale = param(self, 'q_norm', (H * Dh,), ('norm',), ONES)
      k_scale = param(self, 'k_norm', (K * Dh,), ('norm',), ONES)
      q_BTHDh = self._norm(q_BTHDh.reshape(B, T, H * Dh), q_scale).reshape(B, T, H, Dh)
      k_BTKDh = self._norm(k_BTKDh.reshape(B, T, K * Dh), k_scale).reshape(B, T, K, Dh)
    elif c.qk_norm == 'per_head':
      q_BTHDh = self._norm(q_BTHDh, param(self, 'q_norm', (Dh,), ('norm',), ONES))
      k_BTKDh = self._norm(k_BTKDh, param(self, 'k_norm', (Dh,), ('norm',), ONES))

    if c.rotary_dim:
      cos_BTR, sin_BTR = rotary_angles(positions_BT, c.rotary_dim, c.rope_theta)
      q_BTHDh, k_BTKDh = rotate(q_BTHDh, cos_BTR, sin_BTR), rotate(k_BTKDh, cos_BTR, sin_BTR)
    q_BTHDh = sharding.constrain(q_BTHDh, self.mesh, 'batch', None, 'heads', None)
    out_BTHDh = api.attend(
        q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT,
        implementation=c.implementation, platform=sharding.platform_of(self.mesh), mesh=self.mesh,
    )
    return jax.lax.dot_general(out_BTHDh, w_o.astype(x_BTD.dtype), (((2, 3), (0, 1)), ((), ())))

  def _norm(self, x, scale):
    return rms_norm(x, scale.reshape((1,) * (x.ndim - 1) + (-1,)), self.norm_eps)
