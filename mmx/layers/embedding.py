"""Token embedding and output head."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mmx import sharding
from mmx.sharding import fan_in_normal, param

TABLE_AXES = 'vocab', 'embed'


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table_VD, tokens_BT, dtype, mesh):
  """Rows of a float32 table, [B, T, D] in `dtype`; their gradients are added up in float32.

  On a mesh every shard of the batch looks up its own tokens: the table is gathered once, in `dtype`, and the shards'
  gradients of it are added up once. Left to the partitioner, the gradients of all tokens are collected on every chip: 12
  GiB at M2's width for 64 rows of 32,768.
  """
  take, table_VD = functools.partial(jnp.take, axis=0), table_VD.astype(dtype)
  if not sharding.token_axes(mesh):
    return take(table_VD, tokens_BT)
  tokens = sharding.spec_of(('batch', 'length'), tokens_BT.shape, mesh)  # a few rows to generate from may not divide
  parts = sharding.parts_of(TABLE_AXES, table_VD.shape, mesh)
  on_shard = lambda table, tokens: take(sharding.gathered(table, parts), tokens)
  return sharding.on_tokens(on_shard, mesh, (parts, tokens), tokens)(table_VD, tokens_BT)


def _look_up_backward(dtype, mesh, residuals, drows_BTD):
  del dtype
  tokens_BT, shape_VD, tokens = residuals[0], residuals[1].shape[1:], sharding.batch_spec()

  def add(tokens_BT, drows_BTD):
    return jnp.zeros(shape_VD, jnp.float32).at[tokens_BT].add(drows_BTD.astype(jnp.float32))

  if not sharding.token_axes(mesh):
    return add(tokens_BT, drows_BTD), None
  add_up, spec = sharding.sum_of_shards(shape_VD, 1, mesh)
  on_shard = lambda *arrays: add_up(add(*arrays))
  return sharding.on_tokens(on_shard, mesh, (tokens, tokens), spec)(tokens_BT, drows_BTD), None


def _look_up_forward(table_VD, tokens_BT, dtype, mesh):
  nothing = jnp.zeros((0, *table_VD.shape))  # tells the shape
  return look_up(table_VD, tokens_BT, dtype, mesh), (tokens_BT, nothing)


look_up.defvjp(_look_up_forward, _look_up_backward)


class Embedding(nn.Module):
  """Table [V, D]; the head [D, V] is its transpose when tied."""

  vocab_size: int
  d_model: int
  tie: bool
  mesh: Mesh | None

  def setup(self):
    V, D = self.vocab_size, self.d_model
    spread = nn.initializers.normal(stddev=0.02 if self.tie else 1.0)
    self.table = param(self, 'table', (V, D), TABLE_AXES, spread)
    if not self.tie:
      self.head = param(self, 'head', (D, V), ('embed', 'vocab'), fan_in_normal(D, 0.5))

  def __call__(self, tokens_BT, dtype):
    """[B, T] int32 -> [B, T, D]."""
    return look_up(self.table, tokens_BT, dtype, self.mesh)

  def head_weight(self):
    """[D, V], float32."""
    return self.table.T if self.tie else self.head
