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


def experts(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation='swiglu'):
  """Every expert on every token, then the weighted sum of the chosen; id E means 'not here' and adds zero.

  Returns [N, D]: sum over k of weight * down_e(act(gate_e(x), up_e(x))).
  """
  E = w_down_EFD.shape[0]
  gate_NEF, up_NEF = (jnp.einsum('nd,edf->nef', x_ND, w_EDF) for w_EDF in (w_gate_EDF, w_up_EDF))
  act_NEF = ACTIVATIONS[activation](gate_NEF, up_NEF)
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


# ----------------------------------------------------------------------------------------------------------------------
# sliding windows and Lightning attention


def sliding(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT, window, sink_tokens=0, past=None):
  """Attention to the `window` positions up to the query's own, and to the first `sink_tokens` of its document.

  Args:
    segment_ids_BT: int32, documents of a row ascend; tokens of one stand together.
    positions_BT: int32, within the document.
    past: None, or for rows of one document (k_BPKDh, v_BPKDh, positions_BP) of tokens before, in any order, negative
      positions where there is none; what is not before the row's first new token does not count.
  """
  B, T, H, Dh = q_BTHDh.shape
  K = k_BTKDh.shape[2]
  key_segments_BS, key_positions_BS = segment_ids_BT, positions_BT
  if past:
    k_BPKDh, v_BPKDh, past_positions_BP = past
    there_BP = (past_positions_BP >= 0) & (past_positions_BP < positions_BT[:, :1])
    k_BTKDh, v_BTKDh = (jnp.concatenate(pair, axis=1) for pair in ((k_BPKDh, k_BTKDh), (v_BPKDh, v_BTKDh)))
    key_segments_BS = jnp.concatenate([jnp.where(there_BP, segment_ids_BT[:, :1], -1), segment_ids_BT], axis=1)
    key_positions_BS = jnp.concatenate([past_positions_BP, positions_BT], axis=1)
  behind_BTS = positions_BT[:, :, None] - key_positions_BS[:, None, :]
  near_BTS = (behind_BTS < window) | (key_positions_BS < sink_tokens)[:, None, :]
  visible_BTS = (segment_ids_BT[:, :, None] == key_segments_BS[:, None, :]) & (behind_BTS >= 0) & near_BTS
  q_BTKGDh = q_BTHDh.reshape(B, T, K, H // K, Dh)
  scores_BKGTS = jnp.einsum('btkgd,bskd->bkgts', q_BTKGDh, k_BTKDh, preferred_element_type=jnp.float32) * Dh**-0.5
  scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, -jnp.inf)
  probabilities = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BTKDh.dtype)
  return jnp.einsum('bkgts,bskd->btkgd', probabilities, v_BTKDh).reshape(B, T, H, Dh)


def lightning(q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, state_BHDhDh=None):
  """S_t = exp(-slope) S_{t-1} + k_t^T v_t, o_t = q_t S_t, token by token in float32 (MiniMax-01, section 2.2).

  Args:
    slopes_H: float32, 0 or more; constants, to which no gradient flows.
    segment_ids_BT: int32, documents of a row ascend; tokens of one stand together. A new one starts with S = 0; on
      padding, segment 0, S stays and o is 0.
    state_BHDhDh: S before the row, of the document that the row's first token belongs to; None is 0.

  Returns:
    o [B, T, H, Dh] in the dtype of q, and S behind the row, float32 [B, H, Dh, Dh].
  """
  B, T, H, Dh = q_BTHDh.shape
  if state_BHDhDh is None:
    state_BHDhDh = jnp.zeros((B, H, Dh, Dh))
  decay_H = jnp.exp(-jax.lax.stop_gradient(slopes_H.astype(jnp.float32)))

  def step(carry, token):
    state_BHDhDh, document_B = carry
    q_BHDh, k_BHDh, v_BHDh, segment_B = token
    real_B = segment_B > 0
    begins_B = real_B & (document_B > 0) & (segment_B != document_B)
    old_BHDhDh = jnp.where(begins_B[:, None, None, None], 0, state_BHDhDh) * decay_H[None, :, None, None]
    new_BHDhDh = old_BHDhDh + jnp.einsum('bhd,bhe->bhde', k_BHDh, v_BHDh, precision='float32')
    o_BHDh = jnp.einsum('bhd,bhde->bhe', q_BHDh, new_BHDhDh, precision='float32')
    state_BHDhDh = jnp.where(real_B[:, None, None, None], new_BHDhDh, state_BHDhDh)
    return (state_BHDhDh, jnp.where(real_B, segment_B, document_B)), jnp.where(real_B[:, None, None], o_BHDh, 0)

  tokens = (*(a.astype(jnp.float32).swapaxes(0, 1) for a in (q_BTHDh, k_BTHDh, v_BTHDh)), segment_ids_BT.T)
  start = state_BHDhDh.astype(jnp.float32), jnp.zeros_like(segment_ids_BT[:, 0])
  (state_BHDhDh, _), o_TBHDh = jax.lax.scan(step, start, tokens)
  return o_TBHDh.swapaxes(0, 1).astype(q_BTHDh.dtype), state_BHDhDh
