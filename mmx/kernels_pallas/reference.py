"""Oracles: slow, exact, differentiable, one per kernel. Fast paths are tested against these, values and gradients."""

import jax
import jax.numpy as jnp


def attention(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
  """Causal softmax attention of H query heads over K shared kv heads, scale Dh^-1/2, within equal segment ids.

  Scores and softmax in float32, probabilities cast to v's dtype (MiniMax-M2 order). Returns [B, T, H, Dh].
  """
  B, T, H, Dh = q_BTHDh.shape
  K = k_BTKDh.shape[2]
  q_BTKGDh = q_BTHDh.reshape(B, T, K, H // K, Dh)
  scores_BKGTS = jnp.einsum('btkgd,bskd->bkgts', q_BTKGDh, k_BTKDh, preferred_element_type=jnp.float32) * Dh**-0.5
  causal_TS = jnp.tril(jnp.ones((T, T), bool))
  visible_BTS = causal_TS[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
  scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, -jnp.inf)
  probabilities = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BTKDh.dtype)
  return jnp.einsum('bkgts,bskd->btkgd', probabilities, v_BTKDh).reshape(B, T, H, Dh)


def experts(x_ND, ids_Nk, weights_Nk, w_gate_up_ED2F, w_down_EFD):
  """Every expert on every token, then the weighted sum of the chosen; id E means 'not here' and adds zero.

  Returns [N, D]: sum over k of weight * down_e(silu(gate_e(x)) * up_e(x)).
  """
  E = w_down_EFD.shape[0]
  gate_up = jnp.einsum('nd,edgf->negf', x_ND, w_gate_up_ED2F)
  y_NED = jnp.einsum('nef,efd->ned', jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1], w_down_EFD)
  chosen_NkE = jax.nn.one_hot(ids_Nk, E, dtype=jnp.float32)
  weight_NE = jnp.einsum('nk,nke->ne', weights_Nk.astype(jnp.float32), chosen_NkE)
  return jnp.einsum('ne,ned->nd', weight_NE, y_NED.astype(jnp.float32)).astype(x_ND.dtype)
