"""MiniMax Sparse Attention on TPU, of the kernels in `index_tpu`, `sparse_tpu`, `divergence_tpu` and `decode_tpu`.

Blocks are selected and attended to by Pallas kernels; another makes the index branch's divergence, over the same pairs
of query and block, from both branches' logsumexps. It is paid in training only, as nothing asks for it elsewhere.

Against a cache, few tokens go to the kernel that reads each one's blocks where they stand. Many tokens go to training's
kernel, which wants keys as [B*P, b, K*Dh]: the cache is copied once, and then each block is read once for all.
"""

from mmx.kernels_pallas import decode_tpu, divergence_tpu, index_tpu, sparse_tpu
from mmx.kernels_pallas.chunks import kept, places
from mmx.kernels_pallas.sparse_pairs import attend_cached


def unsupported(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, block_size, top_k) -> str:
  """Why the kernels cannot serve these shapes, in a few words; '' if they can."""
  attention = sparse_tpu.unsupported(q_BTHDh, k_BTKDh, block_size, top_k)
  return attention or index_tpu.unsupported(index_q_BTKDi, index_k_BTDi, block_size)


def msa_pallas(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k,
               interpret=False, part=None):
  """Sparse attention and the index branch's divergence from it: (out [B, T, H, Dh], kl [B]); see `reference.msa`.

  `interpret` runs the kernels on CPU, for tests; `part`: see `chunks.Part`.
  """
  slots_BT, segments = places(segment_ids_BT, part)
  ids_BTKk, index_logsumexp_BTK = kept(index_tpu.select_blocks_and_sum(
      index_q_BTKDi, index_k_BTDi, slots_BT, segments, block_size, top_k, interpret=interpret
  ))
  out_BTHDh, logsumexp_BTKG = sparse_tpu.attend_blocks(
      q_BTHDh, k_BTKDh, v_BTKDh, ids_BTKk, slots_BT, segments, block_size, interpret=interpret
  )
  kl_B = divergence_tpu.selected_divergence_pallas(
      q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, (logsumexp_BTKG, index_logsumexp_BTK), segment_ids_BT,
      block_size, interpret, part,
  )
  return out_BTHDh, kl_B


def unsupported_cached(q_BTHDh, k_BKSDh, index_q_BTKDi, index_k_BSDi, block_size, top_k) -> str:
  """Why the kernels cannot serve these shapes of a cache, in a few words; '' if they can."""
  attention = decode_tpu.unsupported(q_BTHDh, k_BKSDh, block_size, top_k)
  return attention or index_tpu.unsupported(index_q_BTKDi, index_k_BSDi, block_size)


def msa_cached_pallas(q_BTHDh, k_BKSDh, v_BKSDh, index_q_BTKDi, index_k_BSDi, slots_BT, block_size, top_k,
                      interpret=False):
  """T new tokens against a cache of S slots; see `sparse.msa_cached_gather`. Returns [B, T, H, Dh].

  `interpret` runs the kernels on CPU, for tests.
  """
  ids_BTKk = index_tpu.select_blocks_pallas(
      index_q_BTKDi, index_k_BSDi, slots_BT, None, block_size, top_k, interpret=interpret
  )
  inputs = q_BTHDh, k_BKSDh, v_BKSDh, ids_BTKk, slots_BT
  return attend_cached(*inputs, block_size, decode_tpu, sparse_tpu, interpret)
