"""Lightning attention layer: SiLU projections, decayed linear attention, output norm, gate; the mixer 'lightning'.

MiniMax-01, section 2.2: q, k, v = silu(W x); the recurrence of mmx/kernels_pallas/lightning.py with one decay per head
and layer; an RMS norm over all heads' outputs, whatever the norm of the model; sigmoid(W_gate x) times that; W_o. No
rotation, no scaling, no softmax. The cache is the state: one [Dh, Dh] matrix per head, however long the context.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec as P

from mmx import sharding
from mmx.config import ModelConfig, num_layers
from mmx.kernels_pallas import api
from mmx.layers import context_parallel
from mmx.layers.attention import init_shift, key_init, project_out, shift_keys
from mmx.layers.context import Context
from mmx.layers.norm import norm
from mmx.sharding import fan_in_normal, param, product


def slopes(num_heads: int, layer_index, layers: int):
  """Decay rates s [H] float32 of layer `layer_index` (an int, traced or not) of `layers`: S shrinks by exp(-s) a token.

  s = 2^(-8h/H) * (1 - l/(L-1) + 1e-5) for h = 1..H: 0.917 to 0.0039 in the first layer of Text-01's 64 heads, next to
  nothing in the last. Where H is no power of two, ALiBi's rule (arXiv:2108.12409) fills up the heads of the power below
  with every other one of the power above.
  """
  power = 2 ** int(math.log2(num_heads))
  of_power = lambda n: [2 ** (-8 * h / n) for h in range(1, n + 1)]
  of_heads = of_power(power) + of_power(2 * power)[::2][: num_heads - power]
  return jnp.asarray(of_heads, jnp.float32) * (1 - layer_index / max(layers - 1, 1) + 1e-5)


class Lightning(nn.Module):
  """The mixer 'lightning'; see the module docstring."""

  model: ModelConfig
  out_scale: float
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, context: Context, layer_index, cache):
    """x [B, T, D] -> (y [B, T, D], the cache behind these tokens, None)."""
    m, c = self.model, self.model.lightning
    B, T, D = x_BTD.shape
    H, Dh = c.num_heads, c.head_dim
    shape, axes = (D, H, Dh), ('embed', 'heads', 'head_dim')
    w_q = param(self, 'w_q', shape, axes, fan_in_normal(D))
    w_k = param(self, 'w_k', shape, axes, key_init(m.attention.qk_init, D, lambda: w_q))
    w_v = param(self, 'w_v', shape, axes, fan_in_normal(D))
    w_gate = param(self, 'w_gate', shape, axes, fan_in_normal(D))
    keys_x_BTD, kept = shift_keys(self, m, x_BTD, context, cache)
    heads = lambda x_BTD, w: product(x_BTD, w, axes, self.mesh)
    q_BTHDh, k_BTHDh, v_BTHDh = (
        sharding.constrain(jax.nn.silu(heads(x, w)), self.mesh, 'batch', 'length', 'heads', None)
        for x, w in ((x_BTD, w_q), (keys_x_BTD, w_k), (x_BTD, w_v))
    )
    state = () if cache is None else (_state_before(cache, context),)
    o_BTHDh, state_BHDhDh = self._sharded(
        q_BTHDh, k_BTHDh, v_BTHDh, slopes(H, layer_index, num_layers(m.pattern)), context.segment_ids_BT, *state
    )
    normed_BTI = norm(self, 'out_norm', 'rms', o_BTHDh.reshape(B, T, H * Dh), c.norm_eps)
    gated_BTHDh = jax.nn.sigmoid(heads(x_BTD, w_gate)) * normed_BTI.reshape(B, T, H, Dh)
    cache = None if cache is None else kept | {'state': state_BHDhDh}
    return project_out(self, gated_BTHDh, D, self.out_scale), cache, None

  def _sharded(self, *inputs):
    """(o, state) on each device's rows, tokens and heads: kernels are nothing that the partitioner could cut.

    Where rows are split over devices there is one state for each; they serve training only, which reads none.
    """
    c, mesh = self.model.lightning, self.mesh
    choice = {'implementation': c.implementation, 'platform': sharding.platform_of(mesh)}
    function = functools.partial(api.lightning, chunk=c.chunk, **choice)
    if mesh is None or mesh.size == 1:
      return function(*inputs)
    shards = context_parallel.ways(mesh)

    def shard(q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, *state):
      o_BTHDh, state_BHDhDh = function(q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, *state)
      if shards > 1:
        told = q_BTHDh, state_BHDhDh, slopes_H, segment_ids_BT
        o_BTHDh = context_parallel.add_state_before(o_BTHDh, *told, shards)
      return o_BTHDh, state_BHDhDh

    rows, length, heads = sharding.spec_of(('batch', 'length', 'heads'), inputs[0].shape[:3], mesh)
    tokens, state = P(rows, length, heads, None), P(rows, heads, None, None)
    specs = (tokens, tokens, tokens, P(heads), P(rows, length), state)[: len(inputs)]
    return sharding.on_shards(shard, mesh, specs, (tokens, state))(*inputs)


def init_cache(model: ModelConfig, batch_size: int, max_length: int, dtype):
  """{'state': [B, H, Dh, Dh]}, float32 whatever `dtype`, as rounding would add up; `max_length` does not matter."""
  c = model.lightning
  return {'state': jnp.zeros((batch_size, c.num_heads, c.head_dim, c.head_dim))} | init_shift(model, batch_size, dtype)


def _state_before(cache, context: Context):
  """The state, or 0 for a row that begins a document: like the other caches, one needs no clearing to be used again."""
  begins_B = (context.positions_BT[:, 0] == 0) & (context.segment_ids_BT[:, 0] > 0)
  return jnp.where(begins_B[:, None, None, None], 0, cache['state'])
