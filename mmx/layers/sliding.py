"""Sliding-window attention layer with sink tokens: the mixer 'sliding'.

A query at position i of its document sees the positions j with i - window < j <= i, and those below sink_tokens. The
cache holds no more than that: the sinks at their positions, and behind them a ring of `window` slots.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mmx import sharding
from mmx.config import ModelConfig
from mmx.kernels_pallas import api
from mmx.layers import context_parallel
from mmx.layers.attention import init_shift, project, project_out
from mmx.layers.context import Context


class Sliding(nn.Module):
  """Causal softmax attention within a window, with the heads, norms and rotation of `model.attention`."""

  model: ModelConfig
  out_scale: float
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, context: Context, layer_index, cache):
    """x [B, T, D] -> (y [B, T, D], the cache with these tokens, None)."""
    c = self.model.sliding
    q_BTHDh, k_BTKDh, v_BTKDh, _, kept = project(self, self.model, x_BTD, context, cache, self.mesh)
    sight = {'window': c.window, 'sink_tokens': c.sink_tokens}
    past = None if cache is None else (cache['k'], cache['v'], cache['positions'])
    if cache is not None:
      cache = kept | remember(cache, k_BTKDh, v_BTKDh, context, c.sink_tokens)
    if cache is not None and x_BTD.shape[1] == 1:
      slots = cache['k'], cache['v'], cache['positions']
      out_BTHDh = api.sliding_slots(q_BTHDh, *slots, context.positions_BT, **sight)
    else:
      choice = {'implementation': c.implementation, 'platform': sharding.platform_of(self.mesh)}
      new = q_BTHDh, k_BTKDh, v_BTKDh, context.segment_ids_BT, context.positions_BT
      if past:
        out_BTHDh = api.sliding(*new, **sight, past=past, **choice)
      else:
        out_BTHDh = context_parallel.slide(*new, **sight, mesh=self.mesh, **choice)
    return project_out(self, out_BTHDh, x_BTD.shape[-1], self.out_scale), cache, None


def init_cache(model: ModelConfig, batch_size: int, max_length: int, dtype):
  """{'k', 'v': [B, R, K, Dh], 'positions': int32 [B, R]} for R = sink_tokens + window slots, or max_length if fewer.

  Slot s holds position s while s < sink_tokens, the others the last positions modulo their number; -1 is none yet.
  """
  a, c = model.attention, model.sliding
  slots = min(c.sink_tokens + c.window, max_length)
  empty = jnp.zeros((batch_size, slots, a.num_kv_heads, a.head_dim), dtype)
  positions = jnp.full((batch_size, slots), -1, jnp.int32)
  return {'k': empty, 'v': empty, 'positions': positions} | init_shift(model, batch_size, dtype)


def remember(cache, k_BTKDh, v_BTKDh, context: Context, sink_tokens):
  """Writes the tokens that a later query can see into the cache: sinks and the last of the row; padding never."""
  positions_BT, real_BT = context.positions_BT, context.segment_ids_BT > 0
  B, slots = cache['positions'].shape
  ring = max(slots - sink_tokens, 1)
  last_B1 = jnp.max(jnp.where(real_BT, positions_BT, -1), axis=1, keepdims=True)
  kept_BT = real_BT & ((positions_BT < sink_tokens) | (positions_BT > last_B1 - ring))
  slot_BT = jnp.where(positions_BT < sink_tokens, positions_BT, sink_tokens + (positions_BT - sink_tokens) % ring)
  slot_BT = jnp.where(kept_BT, slot_BT, slots)  # past the end: dropped
  write = lambda held, new: held.at[jnp.arange(B)[:, None], slot_BT].set(new.astype(held.dtype), mode='drop')
  return {
      'k': write(cache['k'], k_BTKDh),
      'v': write(cache['v'], v_BTKDh),
      'positions': write(cache['positions'], positions_BT),
  }
