"""Multi-token prediction: sequential modules that share the embedding and the head (M2 report, section 2.3).

Module i at position p sees the hidden state of the module before it (module 1: of the main model) and the embedding of
token p + i, and predicts token p + i + 1: h' = W concat(norm(embedding), norm(hidden)), one decoder block, a norm.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mmx.config import Layer, ModelConfig
from mmx.layers.block import remat_block
from mmx.layers.norm import RMSNorm
from mmx.sharding import fan_in_normal, param


class MTPModule(nn.Module):
  """(hidden [B, T, D], embedding of the token i further [B, T, D]) -> (hidden [B, T, D], normed for the head, aux)."""

  layer: Layer
  model: ModelConfig
  mesh: Mesh | None

  @nn.compact
  def __call__(self, hidden_BTD, embedded_BTD, positions_BT, segment_ids_BT):
    D, eps = self.model.d_model, self.model.norm_eps
    w = param(self, 'w_project', (2 * D, D), ('embed', 'norm'), fan_in_normal(2 * D))
    parts = RMSNorm(eps, name='embedding_norm')(embedded_BTD), RMSNorm(eps, name='hidden_norm')(hidden_BTD)
    x_BTD = jnp.concatenate(parts, axis=-1) @ w.astype(hidden_BTD.dtype)
    x_BTD, aux = remat_block(self.model)(self.layer, self.model, self.mesh, name='block')(
        x_BTD, positions_BT, segment_ids_BT
    )
    return x_BTD, RMSNorm(eps, name='final_norm')(x_BTD), aux


def shift_left(array_BT, steps, fill=0):
  """array[:, t + steps], `fill` past the end."""
  return jnp.pad(array_BT[:, steps:], ((0, 0), (0, steps)), constant_values=fill)
