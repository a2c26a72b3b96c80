"""MiniMax Sparse Attention on Hopper: what the kernels of `index_gpu` and `sparse_gpu` make together.

Blocks are selected and attended to by Mosaic GPU kernels. The index branch's divergence runs through XLA, over the same
pairs of query and block, from the kernel's logsumexp (`sparse.selected_divergence`): it is paid in training only, as
nothing asks for it elsewhere.
"""

import jax.numpy as jnp

from mmx.kernels_pallas import index_gpu, sparse_gpu
from mmx.kernels_pallas.sparse import selected_divergence


def unsupported(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, block_size, top_k) -> str:
  """Why the kernels cannot serve these shapes, in a few words; '' if they can."""
  attention = sparse_gpu.unsupported(q_BTHDh, k_BTKDh, block_size, top_k)
  return attention or index_gpu.unsupported(index_q_BTKDi, index_k_BTDi, block_size)


def msa_pallas(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k,
               interpret=False):
  """Sparse attention and the index branch's divergence from it: (out [B, T, H, Dh], kl [B]); see `reference.msa`.

  `interpret` is False for the card, `hopper.simulator()` for tests.
  """
  B, T = segment_ids_BT.shape
  slots_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  segments = segment_ids_BT, segment_ids_BT
  ids_BTKk = index_gpu.select_blocks_gpu(
      index_q_BTKDi, index_k_BTDi, slots_BT, segments, block_size, top_k, interpret=interpret
  )
  out_BTHDh, logsumexp_BTKG = sparse_gpu.attend_blocks(
      q_BTHDh, k_BTKDh, v_BTKDh, ids_BTKk, slots_BT, segments, block_size, interpret=interpret
  )
  kl_B = selected_divergence(
      q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT, block_size
  )
  return out_BTHDh, kl_B
