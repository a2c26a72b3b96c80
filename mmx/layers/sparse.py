"""MiniMax Sparse Attention (arXiv:2606.13392; M3's form of it): the mixer 'msa'.

Full attention's projections, an index branch that scores blocks of keys, and attention to the best blocks. The index
branch learns from its divergence from the attention it steers (`IndexAux.kl`) and from nothing else; it sees the
layer's input detached, so that it moves nothing else either.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, PartitionSpec as P

from mmx import sharding
from mmx.config import ModelConfig
from mmx.kernels_pallas import api
from mmx.layers import attention, context_parallel
from mmx.layers.context import Context
from mmx.layers.norm import norm
from mmx.sharding import fan_in_normal, param, product


@struct.dataclass
class IndexAux:
  """What one layer's index branch tells the training step. All float32."""

  kl: jax.Array  # mean over queries and kv heads of KL(teacher || index branch), in nats
  block_recall: jax.Array  # share of the best top_k blocks, by the teacher's mass, that were selected
  score_recall: jax.Array  # share of the teacher's mass that the selected blocks hold


class SparseAttention(nn.Module):
  """Attention to the top_k blocks that the index branch selects for each query and kv head, its own among them.

  Blocks are counted from the start of the row. `context.warmup` switches to full attention with the divergence over all
  that a query sees, within one compiled program.
  """

  model: ModelConfig
  out_scale: float
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, context: Context, layer_index, cache):
    """x [B, T, D] -> (y [B, T, D], the cache with these tokens, IndexAux in training)."""
    q_BTHDh, k_BTKDh, v_BTKDh, keys_x_BTD, kept = attention.project(
        self, self.model, x_BTD, context, cache, self.mesh
    )
    index = self._index(*jax.lax.stop_gradient((x_BTD, keys_x_BTD)), context)
    index_q_BTKDi, index_k_BTDi = (rounded(x, index_dtype(self.model, x.dtype)) for x in index)
    if cache is None:
      inputs = q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, context.segment_ids_BT
      out_BTHDh, aux = self._train(inputs, context.warmup)
    else:
      new = {'k': k_BTKDh, 'v': v_BTKDh, 'index_k': index_k_BTDi}
      cache = kept | attention.append({name: cache[name] for name in new}, new, context)
      slots_BT = jnp.where(context.segment_ids_BT > 0, context.positions_BT, -1)
      index_k_BSDi = cache['index_k']
      inputs = q_BTHDh, cache['k'], cache['v'], index_q_BTKDi.astype(index_k_BSDi.dtype), index_k_BSDi, slots_BT
      function = lambda *inputs: (api.msa_cached(*inputs, **self._choice()),)
      (out_BTHDh,), aux = self._sharded(function, (True,), *inputs, cached=True), None
    return attention.project_out(self, out_BTHDh, x_BTD.shape[-1], self.out_scale), cache, aux

  def _index(self, x_BTD, keys_x_BTD, context):
    """Index queries [B, T, K, Di], one head per kv head, and index keys [B, T, Di], one head for all."""
    m, c = self.model, self.model.msa
    D, K, Di = x_BTD.shape[-1], m.attention.num_kv_heads, c.index_dim
    q_axes, k_axes = ('embed', 'kv_heads', 'head_dim'), ('embed', 'head_dim')
    w_q = param(self, 'w_index_q', (D, K, Di), q_axes, fan_in_normal(D))
    key_init = attention.key_init(m.attention.qk_init, D, lambda: w_q[:, 0])
    w_k = param(self, 'w_index_k', (D, Di), k_axes, key_init)
    q_BTKDi = product(x_BTD, w_q, q_axes, self.mesh)
    k_BT1Di = product(keys_x_BTD, w_k, k_axes, self.mesh)[:, :, None]
    if c.index_norm == 'per_head':
      q_BTKDi = norm(self, 'index_q_norm', m.norm, q_BTKDi, m.norm_eps)
      k_BT1Di = norm(self, 'index_k_norm', m.norm, k_BT1Di, m.norm_eps)
    return attention.rotated(m, context, q_BTKDi), attention.rotated(m, context, k_BT1Di)[:, :, 0]

  def _choice(self):
    c = self.model.msa
    platform = sharding.platform_of(self.mesh)
    return {'block_size': c.block_size, 'top_k': c.top_k, 'implementation': c.implementation, 'platform': platform}

  def _train(self, inputs, warmup):
    """Attention [B, T, H, Dh] and IndexAux, sparse or, in the warm-up, dense."""
    c = self.model.msa

    def sparse(*inputs):
      def shard(q, k, v, index_q, index_k, segment_ids):
        part, k, v, index_k = context_parallel.whole_rows(self.mesh, segment_ids, k, v, index_k)
        narrow = index_dtype(self.model, index_k.dtype)
        return api.msa(q, k, v, index_q, index_k, segment_ids, part=part, index_dtype=narrow, **self._choice())

      return self._sharded(shard, (True, False), *inputs)

    def dense(q, k, v, index_q, index_k, segment_ids):
      platform = sharding.platform_of(self.mesh)

      def shard(q, k, index_q, index_k, segment_ids):
        part, k, index_k = context_parallel.whole_rows(self.mesh, segment_ids, k, index_k)
        choice = {'implementation': c.implementation, 'platform': platform}
        return (api.msa_prefix_kl(q, k, index_q, index_k, segment_ids, part=part, **choice),)

      choice = {'implementation': self.model.attention.implementation, 'platform': platform}
      out = context_parallel.attend(q, k, v, segment_ids, mesh=self.mesh, **choice)
      return out, *self._sharded(shard, (False,), q, k, index_q, index_k, segment_ids)

    out, kl = sparse(*inputs) if warmup is None else jax.lax.cond(warmup, dense, sparse, *inputs)
    q, k, _, index_q, index_k, segment_ids = inputs
    blocks = {'block_size': c.block_size, 'top_k': c.top_k}
    block_recall, score_recall = api.msa_recall(q, k, index_q, index_k, segment_ids, **blocks)
    queries = jnp.maximum(k.shape[2] * jnp.sum(segment_ids > 0), 1)
    return out, IndexAux(jnp.sum(kl) / queries, block_recall, score_recall)

  def _sharded(self, function, are_heads, *inputs, cached=False):
    """Runs `function` on each device's rows, tokens and kv heads; its outputs are [B, T, heads, ...], or sums [B] over
    tokens and heads.

    Inputs with heads are [B, T, heads, ...], and where they are `cached` the second and third [B, heads, S, ...].
    Left to the partitioner, sorting and gathering pairs of all rows together would collect them on every device.
    """
    if self.mesh is None or self.mesh.size == 1:
      return function(*inputs)
    q_BTHDh, keys = inputs[:2]
    K = keys.shape[1 if cached else 2]
    rows, tokens, heads = sharding.spec_of(('batch', 'length', 'kv_heads'), (*q_BTHDh.shape[:2], K), self.mesh)
    in_specs = [P(rows, tokens, heads, None) if a.ndim == 4 else P(rows, tokens) for a in inputs]
    if cached:
      in_specs[1:3] = [P(rows, heads, None, None)] * 2
    local = lambda *inputs: tuple(
        out if is_heads else out[:, None, None] for out, is_heads in zip(function(*inputs), are_heads)
    )
    out_specs = tuple(P(rows, tokens, heads, None) if is_heads else P(rows, tokens, heads) for is_heads in are_heads)
    outs = sharding.on_shards(local, self.mesh, tuple(in_specs), out_specs)(*inputs)
    return tuple(out if is_heads else jnp.sum(out, axis=(1, 2)) for out, is_heads in zip(outs, are_heads))


def index_dtype(model: ModelConfig, dtype):
  """What index queries and keys are rounded to, and index keys cached in, where activations are of `dtype`."""
  return jnp.dtype(dtype if model.msa.index_dtype == 'compute' else model.msa.index_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x, dtype):
  """x, of its own dtype, at the nearest values of `dtype`: at its largest where that is exceeded. Its gradient is as if
  nothing was rounded.

  Training rounds as serving does, so that it selects the same blocks and learns the scores that select them. float8
  needs no scales here: from 2^-6 to 448 it is right to one part in 16, and entries of a normed index head are about 1.
  """
  if dtype == x.dtype:
    return x
  most = jnp.finfo(dtype).max.astype(x.dtype)
  return jnp.clip(x, -most, most).astype(dtype).astype(x.dtype)


rounded.defjvp(lambda dtype, primals, tangents: (rounded(*primals, dtype), *tangents))


def init_cache(model: ModelConfig, batch_size: int, max_length: int, dtype):
  """Full attention's cache and 'index_k' [B, S, Di]; S is max_length rounded up to whole blocks."""
  S = -(-max_length // model.msa.block_size) * model.msa.block_size
  index_k = jnp.zeros((batch_size, S, model.msa.index_dim), index_dtype(model, dtype))
  return attention.init_cache(model, batch_size, S, dtype) | {'index_k': index_k}
