"""Oracles: slow, exact, differentiable, one per kernel. Fast paths are tested against these, values and gradients."""

import jax
import jax.numpy as jnp

from mmx.kernels_pallas.gated import ACTIVATIONS


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


def experts(x_ND, ids_Nk, weights_Nk, w_gate_up_ED2F, w_down_EFD, activation='swiglu'):
  """Every expert on every token, then the weighted sum of the chosen; id E means 'not here' and adds zero.

  Returns [N, D]: sum over k of weight * down_e(act(gate_e(x), up_e(x))).
  """
  E = w_down_EFD.shape[0]
  gate_up = jnp.einsum('nd,edgf->negf', x_ND, w_gate_up_ED2F)
  act_NEF = ACTIVATIONS[activation](gate_up[:, :, 0], gate_up[:, :, 1])
  y_NED = jnp.einsum('nef,efd->ned', act_NEF, w_down_EFD)
  chosen_NkE = jax.nn.one_hot(ids_Nk, E, dtype=jnp.float32)
  weight_NE = jnp.einsum('nk,nke->ne', weights_Nk.astype(jnp.float32), chosen_NkE)
  return jnp.einsum('ne,ned->nd', weight_NE, y_NED.astype(jnp.float32)).astype(x_ND.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# MiniMax Sparse Attention (arXiv:2606.13392); letters as in kernels_pallas/sparse.py


def msa_visible(segment_ids_BT):
  """bool [B, T, S]: keys up to the query, of its segment."""
  causal_TS = jnp.tril(jnp.ones((segment_ids_BT.shape[1],) * 2, bool))
  return causal_TS[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def msa_index_scores(index_q_BTKDi, index_k_BTDi, segment_ids_BT):
  """float32 [B, T, K, S]: <q, k> / sqrt(Di), -inf where the query does not see the key."""
  q_BTKDi, k_BTDi = index_q_BTKDi.astype(jnp.float32), index_k_BTDi.astype(jnp.float32)
  scores = jnp.einsum('btkd,bsd->btks', q_BTKDi, k_BTDi, precision='float32') * q_BTKDi.shape[-1] ** -0.5
  return jnp.where(msa_visible(segment_ids_BT)[:, :, None], scores, -jnp.inf)


def msa_select(index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k):
  """The k blocks of highest maximal index score, the query's own among them: int32 [B, T, K, k], -1 where fewer."""
  T = segment_ids_BT.shape[1]
  scores = msa_index_scores(index_q_BTKDi, index_k_BTDi, segment_ids_BT)
  padded = jnp.pad(scores, ((0, 0),) * 3 + ((0, -T % block_size),), constant_values=-jnp.inf)
  best_BTKP = jnp.max(padded.reshape(*scores.shape[:3], -1, block_size), axis=-1)
  own_TP = jnp.arange(T)[:, None] // block_size == jnp.arange(best_BTKP.shape[-1])[None]
  best_BTKP = jnp.where(own_TP[None, :, None], jnp.inf, best_BTKP)
  order = jnp.argsort(-best_BTKP, axis=-1, stable=True)[..., :top_k]
  ids = jnp.where(jnp.take_along_axis(best_BTKP, order, axis=-1) > -jnp.inf, order, -1).astype(jnp.int32)
  return jnp.pad(ids, ((0, 0),) * 3 + ((0, top_k - ids.shape[-1]),), constant_values=-1)


def _msa_probabilities(q_BTHDh, k_BTKDh, allowed_BTKS):
  """Softmax over allowed keys, scale Dh^-1/2, float32 [B, T, K, G, S]."""
  B, T, H, Dh = q_BTHDh.shape
  K = k_BTKDh.shape[2]
  q_BTKGDh = q_BTHDh.reshape(B, T, K, H // K, Dh)
  scores = jnp.einsum('btkgd,bskd->btkgs', q_BTKGDh, k_BTKDh, preferred_element_type=jnp.float32) * Dh**-0.5
  return jax.nn.softmax(jnp.where(allowed_BTKS[:, :, :, None], scores, -jnp.inf), axis=-1)


def _msa_kl(probabilities_BTKGS, index_scores_BTKS, allowed_BTKS, segment_ids_BT):
  """sum over queries of segments above 0 and kv heads of KL(mean over G of P || softmax of index scores): [B]."""
  teacher = jax.lax.stop_gradient(jnp.mean(probabilities_BTKGS, axis=3))
  log_student = jax.nn.log_softmax(jnp.where(allowed_BTKS, index_scores_BTKS, -jnp.inf), axis=-1)
  log_student = jnp.where(allowed_BTKS, log_student, 0)
  log_teacher = jnp.log(jnp.where(teacher > 0, teacher, 1))
  kl_BTK = jnp.sum(teacher * (log_teacher - log_student), axis=-1)
  return jnp.sum(jnp.where((segment_ids_BT > 0)[:, :, None], kl_BTK, 0), axis=(1, 2))


def msa(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k):
  """Attention over the selected blocks, and the divergence of the index branch from it on the same tokens.

  Teacher and selection carry no gradient: attention moves q, k, v only and the divergence only the index branch.

  Returns:
    out [B, T, H, Dh]; kl [B] float32, summed over kv heads and queries of segments above 0.
  """
  B, T, H, Dh = q_BTHDh.shape
  P = -(-T // block_size)
  ids_BTKk = msa_select(index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k)
  chosen_BTKP = jax.nn.one_hot(ids_BTKk, P, dtype=bool).any(axis=3)  # -1 is none
  chosen_BTKS = jnp.repeat(chosen_BTKP, block_size, axis=3)[..., :T]
  allowed_BTKS = chosen_BTKS & msa_visible(segment_ids_BT)[:, :, None]
  probabilities = _msa_probabilities(q_BTHDh, k_BTKDh, allowed_BTKS)
  out = jnp.einsum('btkgs,bskd->btkgd', probabilities.astype(v_BTKDh.dtype), v_BTKDh).reshape(B, T, H, Dh)
  index_scores = msa_index_scores(index_q_BTKDi, index_k_BTDi, segment_ids_BT)
  return out, _msa_kl(probabilities, index_scores, allowed_BTKS, segment_ids_BT)


def msa_prefix_kl(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT):
  """The divergence of the warm-up: as in `msa`, over everything the query sees. Returns kl [B]."""
  allowed_BTKS = jnp.broadcast_to(msa_visible(segment_ids_BT)[:, :, None], (*index_q_BTKDi.shape[:3], q_BTHDh.shape[1]))
  probabilities = _msa_probabilities(q_BTHDh, k_BTKDh, allowed_BTKS)
  index_scores = msa_index_scores(index_q_BTKDi, index_k_BTDi, segment_ids_BT)
  return _msa_kl(probabilities, index_scores, allowed_BTKS, segment_ids_BT)


def msa_recall(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k):
  """How well selection meets full attention, per query: (block recall, score recall), each [B, T, K] float32.

  With mass the full-attention probability of a block, mean over the group's heads: block recall is the share of the k
  blocks of largest mass that were selected, score recall the mass that the selected blocks hold.
  """
  B, T, K = index_q_BTKDi.shape[:3]
  P = -(-T // block_size)
  visible_BTS = msa_visible(segment_ids_BT)
  teacher = jnp.mean(_msa_probabilities(q_BTHDh, k_BTKDh, jnp.broadcast_to(visible_BTS[:, :, None], (B, T, K, T))), 3)
  in_blocks = lambda x, fill: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -T % block_size),), constant_values=fill)
  mass_BTKP = jnp.sum(in_blocks(teacher, 0).reshape(B, T, K, P, -1), axis=-1)
  seen_BTP = jnp.any(in_blocks(visible_BTS, False).reshape(B, T, P, -1), axis=-1)
  rank_BTKP = jnp.argsort(jnp.argsort(jnp.where(seen_BTP[:, :, None], -mass_BTKP, 1), axis=-1, stable=True), axis=-1)
  best_BTKP = (rank_BTKP < top_k) & seen_BTP[:, :, None]
  ids_BTKk = msa_select(index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k)
  chosen_BTKP = jax.nn.one_hot(ids_BTKk, P, dtype=bool).any(axis=3)  # -1 is none
  block_recall = jnp.sum(best_BTKP & chosen_BTKP, axis=-1) / jnp.sum(best_BTKP, axis=-1)
  return block_recall, jnp.sum(jnp.where(chosen_BTKP, mass_BTKP, 0), axis=-1)
