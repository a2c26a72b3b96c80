"""Mixture of experts: route, run the chosen experts, and keep their load even.

Routing (M2 report, section 2.2.1; `reference/minimax.md` A2 has the exact order): scores in float32, the top k of
score + bias are chosen, weights are the chosen *scores* over their sum. The bias is for selection only: it gets no
gradient and lives in the 'router' collection, updated after the step by `update_bias` (aux-loss-free balancing,
arXiv:2408.15664).

Letters: B rows, T tokens, D model, E experts, k experts per token, F expert hidden.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, PartitionSpec as P

from mmx import sharding
from mmx.config import MoEConfig
from mmx.kernels_pallas import api
from mmx.layers.mlp import MLP
from mmx.layers.moe_transport import DOWN_AXES, GATE_AXES, UP_AXES, Experts, expert_parallel
from mmx.sharding import cast, fan_in_normal, param


@struct.dataclass
class MoEAux:
  """What one layer tells the training step. All float32."""

  load_E: jax.Array  # share of all assignments that each expert was chosen for; sums to 1
  balance_loss: jax.Array  # Switch-style E * sum_e load_e * mean probability_e; 1 when even
  entropy: jax.Array  # mean over tokens of the entropy of the normalised scores, in nats
  dropped: jax.Array  # fraction of assignments dropped by a capacity limit


def gate_scores(x_BTD, w_router_DE, gate):
  """Scores [B, T, E] in float32: independent sigmoids, or a softmax over experts."""
  # The router's product is float32 even when the model computes in bfloat16: rounding flips near-ties.
  logits_BTE = jnp.einsum('btd,de->bte', x_BTD.astype(jnp.float32), w_router_DE, precision='float32')
  return jax.nn.sigmoid(logits_BTE) if gate == 'sigmoid' else jax.nn.softmax(logits_BTE, axis=-1)


def route(scores_BTE, bias_E, top_k, routed_scaling):
  """Chosen experts and their weights.

  Returns:
    ids_BTk int32, distinct per token, and weights_BTk float32, which sum to `routed_scaling`.
  """
  biased_BTE = jax.lax.stop_gradient(scores_BTE) + bias_E[None, None, :]
  ids_BTk = jax.lax.top_k(biased_BTE, top_k)[1]
  chosen_BTk = jnp.take_along_axis(scores_BTE, ids_BTk, axis=-1)
  return ids_BTk, chosen_BTk * (routed_scaling / jnp.sum(chosen_BTk, axis=-1, keepdims=True))


def router_statistics(scores_BTE, ids_BTk, valid_BT):
  """(load_E, balance_loss, entropy) over the tokens that are not padding."""
  E = scores_BTE.shape[-1]
  valid = valid_BT.astype(jnp.float32)
  count = jnp.maximum(jnp.sum(valid), 1.0)
  chosen = jnp.broadcast_to(valid[..., None], ids_BTk.shape).reshape(-1)
  load_E = jnp.zeros(E, jnp.float32).at[ids_BTk.reshape(-1)].add(chosen) / (count * ids_BTk.shape[-1])
  probability_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
  mean_probability_E = jnp.sum(probability_BTE * valid[..., None], axis=(0, 1)) / count
  balance_loss = E * jnp.sum(load_E * mean_probability_E)
  entropy_BT = -jnp.sum(probability_BTE * jnp.log(probability_BTE + 1e-20), axis=-1)
  return load_E, balance_loss, jax.lax.stop_gradient(jnp.sum(entropy_BT * valid) / count)


def update_bias(bias_E, load_E, rate):
  """Raises the bias of experts under the mean load and lowers it over, by `rate` (sign rule of arXiv:2408.15664).

  Works on stacked layers [..., E]; each layer's mean bias is then removed, as a common shift changes no selection.
  """
  mean = jnp.mean(load_E, axis=-1, keepdims=True)
  bias_E = bias_E + rate * jnp.sign(mean - load_E)
  return bias_E - jnp.mean(bias_E, axis=-1, keepdims=True)


class MoE(nn.Module):
  """Parameters and call: x [B, T, D] -> (y [B, T, D], MoEAux). Padding (`valid_BT` false) still passes through."""

  config: MoEConfig
  activation: str
  out_scale: float
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, valid_BT):
    c = self.config
    D, E, F = x_BTD.shape[-1], c.num_experts, c.d_ff
    w_router = param(self, 'w_router', (D, E), ('norm', 'router'), fan_in_normal(D))
    w_gate = param(self, 'w_gate', (E, D, F), GATE_AXES, fan_in_normal(D))
    w_up = param(self, 'w_up', (E, D, F), UP_AXES, fan_in_normal(D))
    w_down = param(self, 'w_down', (E, F, D), DOWN_AXES, fan_in_normal(F, self.out_scale))
    bias_E = self.variable('router', 'bias', jnp.zeros, (E,), jnp.float32).value

    scores_BTE = gate_scores(x_BTD, w_router, c.gate)
    choose = functools.partial(route, top_k=c.top_k, routed_scaling=c.routed_scaling)
    if self.mesh is not None and self.mesh.size > 1:  # the partitioner would collect all scores for a top_k
      tokens = sharding.spec_of(('batch', 'length', None), scores_BTE.shape, self.mesh)
      choose = sharding.on_shards(choose, self.mesh, (tokens, P()), (tokens, tokens))
    ids_BTk, weights_BTk = choose(scores_BTE, bias_E)
    load_E, balance_loss, entropy = router_statistics(scores_BTE, ids_BTk, valid_BT)
    choice = {
        'implementation': c.implementation, 'platform': sharding.platform_of(self.mesh), 'activation': self.activation,
    }
    y_BTD, dropped = expert_parallel(
        x_BTD, ids_BTk, weights_BTk, *(cast(w, x_BTD.dtype) for w in (w_gate, w_up, w_down)),
        mesh=self.mesh, transport=c.transport, capacity_factor=c.capacity_factor,
        experts=Experts(functools.partial(api.experts, **choice), functools.partial(api.experts_on_rows, **choice)),
    )
    if c.shared_d_ff:
      y_BTD = y_BTD + MLP(c.shared_d_ff, self.activation, self.out_scale, self.mesh, name='shared')(x_BTD)
    return y_BTD, MoEAux(load_E, balance_loss, entropy, dropped)
