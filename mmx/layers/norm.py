"""Root-mean-square norms."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmx.sharding import param


def rms_norm(x, scale, eps):
  """x / rms(x) * scale over the last axis: statistics in float32, cast to x.dtype, then scaled (MiniMax-M2 order)."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return normed.astype(x.dtype) * scale.astype(x.dtype)


class RMSNorm(nn.Module):
  """Holds the scale [D] of `rms_norm`."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = param(self, 'scale', (x.shape[-1],), ('norm',), nn.initializers.ones)
    return rms_norm(x, scale.reshape((1,) * (x.ndim - 1) + (-1,)), self.eps)
