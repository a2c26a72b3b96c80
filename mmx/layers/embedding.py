"""Token embedding and output head."""

import jax.numpy as jnp
from flax import linen as nn

from mmx.sharding import fan_in_normal, param


class Embedding(nn.Module):
  """Table [V, D]; the head [D, V] is its transpose when tied."""

  vocab_size: int
  d_model: int
  tie: bool

  def setup(self):
    V, D = self.vocab_size, self.d_model
    spread = nn.initializers.normal(stddev=0.02 if self.tie else 1.0)
    self.table = param(self, 'table', (V, D), ('vocab', 'embed'), spread)
    if not self.tie:
      self.head = param(self, 'head', (D, V), ('embed', 'vocab'), fan_in_normal(D, 0.5))

  def __call__(self, tokens_BT, dtype):
    """[B, T] int32 -> [B, T, D]."""
    return jnp.take(self.table.astype(dtype), tokens_BT, axis=0)

  def head_weight(self):
    """[D, V], float32."""
    return self.table.T if self.tie else self.head
