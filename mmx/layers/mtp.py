"""Multi-token prediction: sequential modules that share the embedding and the head (M2 report, section 2.3).

Module i at position p sees the hidden state of the module before it (module 1: of the main model) and the embedding of
token p + i, and predicts token p + i + 1: h' = W concat(norm(embedding), norm(hidden)), one decoder block, a norm.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mmx.config import Layer, ModelConfig, num_layers
from mmx.layers.block import remat_block
from mmx.layers.context import Context
from mmx.layers.norm import Norm
from mmx.sharding import fan_in_normal, param, product


class MTPModule(nn.Module):
  """(hidden [B, T, D], embedding of the token i further [B, T, D]) -> (hidden [B, T, D], normed for the head, aux)."""

  layer: Layer
  model: ModelConfig
  mesh: Mesh | None

  @nn.compact
  def __call__(self, hidden_BTD, embedded_BTD, context: Context):
    m, D = self.model, self.model.d_model
    normed = lambda name, x: Norm(m.norm, m.norm_eps, name=name)(x)
    axes = 'embed', 'norm'
    w = param(self, 'w_project', (2 * D, D), axes, fan_in_normal(2 * D))
    parts = normed('embedding_norm', embedded_BTD), normed('hidden_norm', hidden_BTD)
    x_BTD = product(jnp.concatenate(parts, axis=-1), w, axes, self.mesh)
    block = remat_block(m)(self.layer, m, self.mesh, name='block')
    x_BTD, _, aux = block(x_BTD, context, jnp.int32(num_layers(m.pattern) - 1), None)
    return x_BTD, normed('final_norm', x_BTD), aux


def shift_left(array_BT, steps, fill=0):
  """array[:, t + steps], `fill` past the end."""
  return jnp.pad(array_BT[:, steps:], ((0, 0), (0, steps)), constant_values=fill)
