"""Root-mean-square norms by name (`model.norm`): `norm(form, x, scale, eps)`, and their parameter."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmx.sharding import param


def rms_norm(x, scale, eps):
  """x / rms(x) * scale over the last axis: statistics in float32, cast to x.dtype, then scaled (Text-01, M2)."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return normed.astype(x.dtype) * _lifted(scale, x).astype(x.dtype)


def gemma_norm(x, scale, eps):
  """x / rms(x) * (1 + scale) over the last axis, all in float32, then cast to x.dtype (M3)."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (normed * (1 + _lifted(scale, x))).astype(x.dtype)


def _lifted(scale, x):
  """[n] -> [1, ..., n]: ranks are never promoted implicitly."""
  return scale.reshape((1,) * (x.ndim - 1) + (-1,))


NORMS = {'rms': (rms_norm, nn.initializers.ones), 'gemma': (gemma_norm, nn.initializers.zeros)}


def norm(module: nn.Module, name: str, form: str, x, eps: float):
  """Norms the last axis of x with a parameter of `module`, the scale [x.shape[-1]], which starts as the identity."""
  function, init = NORMS[form]
  return function(x, param(module, name, (x.shape[-1],), ('norm',), init), eps)


class Norm(nn.Module):
  """A norm with a parameter of its own: 'scale' [D]."""

  form: str
  eps: float

  @nn.compact
  def __call__(self, x):
    return norm(self, 'scale', self.form, x, self.eps)
