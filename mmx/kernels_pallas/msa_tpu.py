"""MiniMax Sparse Attention on TPU: what the kernels of `index_tpu`, `sparse_tpu` and `divergence_tpu` make together.

Blocks are selected and attended to by Pallas kernels; another makes the index branch's divergence, over the same pairs
of query and block, from the attention's logsumexp. It is paid in training only, as nothing asks for it elsewhere.

Decoding stays with `sparse.msa_cached_gather` yet: the attention kernel takes keys as [B*P, b, K*Dh], and a cache that
stands as [B, S, K, Dh] would be copied for it at every token (2 GiB at a million slots of M3's heads).
"""

import jax.numpy as jnp

from mmx.kernels_pallas import divergence_tpu, index_tpu, sparse_tpu


def unsupported(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, block_size, top_k) -> str:
  """Why the kernels cannot serve these shapes, in a few words; '' if they can."""
  attention = sparse_tpu.unsupported(q_BTHDh, k_BTKDh, block_size, top_k)
  return attention or index_tpu.unsupported(index_q_BTKDi, index_k_BTDi, block_size)


def msa_pallas(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k,
               interpret=False):
  """Sparse attention and the index branch's divergence from it: (out [B, T, H, Dh], kl [B]); see `reference.msa`.

  `interpret` runs the kernels on CPU, for tests.
  """
  B, T = segment_ids_BT.shape
  slots_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  segments = segment_ids_BT, segment_ids_BT
  ids_BTKk = index_tpu.select_blocks_pallas(
      index_q_BTKDi, index_k_BTDi, slots_BT, segments, block_size, top_k, interpret=interpret
  )
  out_BTHDh, logsumexp_BTKG = sparse_tpu.attend_blocks(
      q_BTHDh, k_BTKDh, v_BTKDh, ids_BTKk, slots_BT, segments, block_size, interpret=interpret
  )
  kl_B = divergence_tpu.selected_divergence_pallas(
      q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT, block_size, interpret
  )
  return out_BTHDh, kl_B
