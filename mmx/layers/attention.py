"""Grouped-query attention: projections, key shift, query and key norms, partial RoPE, the kernel or the cache, output.

`project` and `project_out` serve every softmax mixer (full, sliding, msa); `Attention` is the mixer 'full'.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from mmx import sharding
from mmx.config import ModelConfig
from mmx.kernels_pallas import api
from mmx.layers import context_parallel
from mmx.layers.context import Context
from mmx.layers.norm import norm
from mmx.layers.rope import rotary_angles, rotate
from mmx.sharding import fan_in_normal, param, product


class Attention(nn.Module):
  """Causal softmax attention over the whole document (M2 report, section 2.1); the mixer 'full'."""

  model: ModelConfig
  out_scale: float
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, context: Context, layer_index, cache):
    """x [B, T, D] -> (y [B, T, D], the cache with these tokens, None)."""
    q_BTHDh, k_BTKDh, v_BTKDh, _, kept = project(self, self.model, x_BTD, context, cache, self.mesh)
    implementation, platform = self.model.attention.implementation, sharding.platform_of(self.mesh)
    choice = {'mesh': self.mesh, 'implementation': implementation, 'platform': platform}
    if cache is None:
      out_BTHDh = context_parallel.attend(q_BTHDh, k_BTKDh, v_BTKDh, context.segment_ids_BT, **choice)
    else:
      cache = kept | append({name: cache[name] for name in 'kv'}, {'k': k_BTKDh, 'v': v_BTKDh}, context)
      out_BTHDh = api.attend_cached(q_BTHDh, cache['k'], cache['v'], context.positions_BT, **choice)
    return project_out(self, out_BTHDh, x_BTD.shape[-1], self.out_scale), cache, None


def init_cache(model: ModelConfig, batch_size: int, max_length: int, dtype):
  """{'k', 'v': [B, K, S, Dh]} for S = max_length slots: slot s holds the token at position s.

  Heads stand before slots, so that a block of one head is memory without gaps, which kernels read in place.
  """
  a = model.attention
  empty = jnp.zeros((batch_size, a.num_kv_heads, max_length, a.head_dim), dtype)
  return {'k': empty, 'v': empty} | init_shift(model, batch_size, dtype)


def append(cache, new, context: Context):
  """Writes new entries at their positions into a cache; padding is not written.

  Entries [B, T, K, Dh] go into a cache [B, K, S, Dh], entries without heads [B, T, D] into one [B, S, D].
  """

  def write(slots, entries):
    slot = jnp.where(context.segment_ids_BT > 0, context.positions_BT, slots.shape[-2])
    if slots.ndim == 4:
      slot, entries = slot[:, None], entries.swapaxes(1, 2)
    # Heads by their numbers too: for a slice of all, XLA on TPU would turn the cache and back.
    rows_heads = (number[..., None] for number in jnp.indices(slots.shape[:-2], sparse=True))
    return slots.at[*rows_heads, slot].set(entries.astype(slots.dtype), mode='drop')

  return jax.tree.map(write, cache, new)


# ----------------------------------------------------------------------------------------------------------------------
# what the softmax mixers share; `module` is the mixer that owns the parameters


def project(module, model: ModelConfig, x_BTD, context: Context, cache, mesh):
  """Queries, keys and values, normed and rotated.

  'full_width' norms all heads of the query (H*Dh) and of the key (K*Dh) with one statistic before the head split (M2);
  'per_head' norms each head with one scale [Dh] shared by all (M3).

  Returns:
    q [B, T, H, Dh], k and v [B, T, K, Dh], the input that keys are made from [B, T, D], and the key shift's cache.
  """
  a = model.attention
  B, T, D = x_BTD.shape
  H, K, Dh = a.num_heads, a.num_kv_heads, a.head_dim
  w_q = param(module, 'w_q', (D, H, Dh), ('embed', 'heads', 'head_dim'), fan_in_normal(D))
  first_of_group = lambda: w_q[:, :: H // K]
  w_k = param(module, 'w_k', (D, K, Dh), ('embed', 'kv_heads', 'head_dim'), key_init(a.qk_init, D, first_of_group))
  w_v = param(module, 'w_v', (D, K, Dh), ('embed', 'kv_heads', 'head_dim'), fan_in_normal(D))
  keys_x_BTD, kept = shift_keys(module, model, x_BTD, context, cache)
  heads = lambda x_BTD, w, axis: product(x_BTD, w, ('embed', axis, 'head_dim'), mesh)
  q_BTHDh, k_BTKDh = heads(x_BTD, w_q, 'heads'), heads(keys_x_BTD, w_k, 'kv_heads')
  v_BTKDh = heads(x_BTD, w_v, 'kv_heads')

  if a.qk_norm == 'full_width':
    normed = lambda name, x: norm(module, name, model.norm, x.reshape(B, T, -1), model.norm_eps).reshape(x.shape)
    q_BTHDh, k_BTKDh = normed('q_norm', q_BTHDh), normed('k_norm', k_BTKDh)
  elif a.qk_norm == 'per_head':
    q_BTHDh = norm(module, 'q_norm', model.norm, q_BTHDh, model.norm_eps)
    k_BTKDh = norm(module, 'k_norm', model.norm, k_BTKDh, model.norm_eps)
  q_BTHDh, k_BTKDh = rotated(model, context, q_BTHDh), rotated(model, context, k_BTKDh)
  return sharding.constrain(q_BTHDh, mesh, 'batch', 'length', 'heads', None), k_BTKDh, v_BTKDh, keys_x_BTD, kept


def rotated(model: ModelConfig, context: Context, x_BTHDh):
  """Partial RoPE on the first attention.rotary_dim of each head."""
  if not model.attention.rotary_dim:
    return x_BTHDh
  angles = rotary_angles(context.positions_BT, model.attention.rotary_dim, model.attention.rope_theta)
  return rotate(x_BTHDh, *angles)


def project_out(module, out_BTHDh, D, out_scale):
  """[B, T, H, Dh] -> [B, T, D]."""
  H, Dh = out_BTHDh.shape[2:]
  axes = 'heads', 'head_dim', 'embed'
  w_o = param(module, 'w_o', (H, Dh, D), axes, fan_in_normal(H * Dh, out_scale))
  return product(out_BTHDh, w_o, axes, module.mesh)


def key_init(qk_init, fan_in, query_weights):
  """Initializer of key weights; 'equal' copies `query_weights()`, so that equal tokens match from the first step."""
  if qk_init == 'independent':
    return fan_in_normal(fan_in)
  return lambda rng, shape, dtype: query_weights().astype(dtype).reshape(shape)


def init_shift(model: ModelConfig, batch_size: int, dtype):
  """The cache of `shift_keys`: the input of the token before, {'previous': [B, D]}; empty without a shift."""
  return {} if model.key_shift == 'none' else {'previous': jnp.zeros((batch_size, model.d_model), dtype)}


def shift_keys(module, model: ModelConfig, x_BTD, context: Context, cache):
  """The input that keys are made from, [B, T, D], and the shift's cache.

  'learned': g_0 * x_t + g_1 * x_{t-1} with gates per channel, x_{t-1} of the same document. A key then knows what
  precedes its token, which a small model otherwise needs a layer for and many steps to find.
  """
  if model.key_shift == 'none':
    return x_BTD, {}
  D = x_BTD.shape[-1]
  gates_2D = param(module, 'key_shift', (2, D), (None, 'norm'), nn.initializers.constant(0.5)).astype(x_BTD.dtype)
  if cache is None:
    before_BTD = context_parallel.one_before(x_BTD, module.mesh)
  else:
    before_BTD = jnp.concatenate([cache['previous'][:, None].astype(x_BTD.dtype), x_BTD[:, :-1]], axis=1)
  before_BTD = jnp.where(context.positions_BT[..., None] > 0, before_BTD, 0)
  kept = {}
  if cache is not None:
    last_B = jnp.sum(context.segment_ids_BT > 0, axis=1)  # padding stands behind: the row's last token, 0 if none
    every_BT1D = jnp.concatenate([cache['previous'][:, None].astype(x_BTD.dtype), x_BTD], axis=1)
    kept = {'previous': jnp.take_along_axis(every_BT1D, last_B[:, None, None], axis=1)[:, 0]}
  return x_BTD * gates_2D[None, None, 0] + before_BTD * gates_2D[None, None, 1], kept
