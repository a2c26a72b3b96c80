"""MiniMax Sparse Attention on Hopper, of the kernels in `index_gpu`, `sparse_gpu`, `divergence_gpu` and `decode_gpu`.

Blocks are selected and attended to by Mosaic GPU kernels: in training, and for a prompt whose choices cover the cache,
by those that read a block once for many queries; for a few new tokens by one that reads them where they stand. Another
makes the index branch's divergence, over the same pairs of query and block, from the attention's logsumexp; it is paid in
training only, as nothing asks for it elsewhere.
"""

import jax

from mmx.kernels_pallas import decode_gpu, divergence_gpu, index_gpu, sparse_gpu
from mmx.kernels_pallas.chunks import kept, places
from mmx.kernels_pallas.sparse_pairs import attend_cached


def unsupported(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, block_size, top_k, index_dtype=None) -> str:
  """Why the kernels cannot serve these shapes, in a few words; '' if they can."""
  attention = sparse_gpu.unsupported(q_BTHDh, k_BTKDh, block_size, top_k)
  attention = attention or divergence_gpu.unsupported(q_BTHDh, k_BTKDh, index_q_BTKDi)
  index = (jax.ShapeDtypeStruct(x.shape, index_dtype or x.dtype) for x in (index_q_BTKDi, index_k_BTDi))
  return attention or index_gpu.unsupported(*index, block_size)


def msa_hopper(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k,
               interpret=False, part=None, index_dtype=None):
  """Sparse attention and the index branch's divergence from it: (out [B, T, H, Dh], kl [B]); see `reference.msa`.

  `interpret` is False for the card, `hopper.simulator()` for tests; `part`: see `chunks.Part`; `index_dtype`: `api.msa`.
  """
  slots_BT, segments = places(segment_ids_BT, part)
  index = (x.astype(index_dtype or x.dtype) for x in (index_q_BTKDi, index_k_BTDi))
  ids_BTKk = kept(index_gpu.select_blocks_gpu(*index, slots_BT, segments, block_size, top_k, interpret=interpret))
  out_BTHDh, logsumexp_BTKG = sparse_gpu.attend_blocks(
      q_BTHDh, k_BTKDh, v_BTKDh, ids_BTKk, slots_BT, segments, block_size, interpret=interpret
  )
  kl_B = divergence_gpu.selected_divergence_hopper(
      q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT, block_size, interpret,
      part,
  )
  return out_BTHDh, kl_B


def unsupported_cached(q_BTHDh, k_BKSDh, index_q_BTKDi, index_k_BSDi, block_size) -> str:
  """Why the kernels cannot serve these shapes of a cache, in a few words; '' if they can."""
  attention = decode_gpu.unsupported(q_BTHDh, k_BKSDh, block_size)
  return attention or index_gpu.unsupported(index_q_BTKDi, index_k_BSDi, block_size)


def msa_cached_hopper(q_BTHDh, k_BKSDh, v_BKSDh, index_q_BTKDi, index_k_BSDi, slots_BT, block_size, top_k,
                      interpret=False):
  """T new tokens against a cache of S slots; see `sparse.msa_cached_gather`. Returns [B, T, H, Dh].

  `interpret` is False for the card, `hopper.simulator()` for tests.
  """
  ids_BTKk = index_gpu.select_blocks_gpu(
      index_q_BTKDi, index_k_BSDi, slots_BT, None, block_size, top_k, interpret=interpret
  )
  inputs = q_BTHDh, k_BKSDh, v_BKSDh, ids_BTKk, slots_BT
  return attend_cached(*inputs, block_size, decode_gpu, sparse_gpu, interpret)
