"""MiniMax Sparse Attention on Hopper: what the kernels of `index_gpu` and `sparse_gpu` make together.

In training blocks are selected and attended to by Mosaic GPU kernels; against a cache they are selected so. The index
branch's divergence runs through XLA, over the same pairs of query and block, from the kernel's logsumexp
(`sparse.selected_divergence`): it is paid in training only, as nothing asks for it elsewhere.
"""

from mmx.kernels_pallas import index_gpu, sparse_gpu
from mmx.kernels_pallas.chunks import places
from mmx.kernels_pallas.sparse import attend_chosen_gather, selected_divergence


def unsupported(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, block_size, top_k) -> str:
  """Why the kernels cannot serve these shapes, in a few words; '' if they can."""
  attention = sparse_gpu.unsupported(q_BTHDh, k_BTKDh, block_size, top_k)
  return attention or index_gpu.unsupported(index_q_BTKDi, index_k_BTDi, block_size)


def msa_hopper(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k,
               interpret=False, part=None):
  """Sparse attention and the index branch's divergence from it: (out [B, T, H, Dh], kl [B]); see `reference.msa`.

  `interpret` is False for the card, `hopper.simulator()` for tests; `part`: see `chunks.Part`.
  """
  slots_BT, segments = places(segment_ids_BT, part)
  ids_BTKk = index_gpu.select_blocks_gpu(
      index_q_BTKDi, index_k_BTDi, slots_BT, segments, block_size, top_k, interpret=interpret
  )
  out_BTHDh, logsumexp_BTKG = sparse_gpu.attend_blocks(
      q_BTHDh, k_BTKDh, v_BTKDh, ids_BTKk, slots_BT, segments, block_size, interpret=interpret
  )
  kl_B = selected_divergence(
      q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT, block_size, part
  )
  return out_BTHDh, kl_B


def unsupported_cached(index_q_BTKDi, index_k_BSDi, block_size) -> str:
  """Why the kernels cannot serve these shapes of a cache, in a few words; '' if they can."""
  return index_gpu.unsupported(index_q_BTKDi, index_k_BSDi, block_size)


def msa_cached_hopper(q_BTHDh, k_BKSDh, v_BKSDh, index_q_BTKDi, index_k_BSDi, slots_BT, block_size, top_k,
                      interpret=False):
  """T new tokens against a cache of S slots; see `sparse.msa_cached_gather`. Returns [B, T, H, Dh].

  The kernel reads the index keys, which grow with the context; the chosen blocks, which do not, are gathered by XLA.
  """
  ids_BTKk = index_gpu.select_blocks_gpu(
      index_q_BTKDi, index_k_BSDi, slots_BT, None, block_size, top_k, interpret=interpret
  )
  return attend_chosen_gather(q_BTHDh, k_BKSDh, v_BKSDh, ids_BTKk, slots_BT, block_size)
