"""The divergence of MSA's index branch on accelerators, with its gradient in closed form (arXiv:2606.13392, sections
3.2 and 4): what its kernels are given, and what is made of what they give.

Two sweeps over the tiles that `sparse_pairs` cuts of a chunk's pairs (query, block), as attention's are cut; on TPU the
second alone, as the index pass there leaves what the first is for (`index_tpu`):

  stats    index scores; the greatest of each query in a tile and the sum of exponentials above it, from which XLA makes
           the logsumexp over the query's blocks.
  diverge  the attention's scores again and, by its logsumexp, the teacher P, the mean of the G heads; index scores and
           the student P_idx; each query's sum of P log(P / P_idx); and from P_idx - P, the gradient of the scores, the
           rows of the index queries' gradient, which XLA adds up, and the index keys', which grows from tile to tile of
           a page.

Value and gradient come from one sweep, so that the attention's scores, which cost G times an index head's, are made
once. The index branch's gradients, [B, T, K + 1, Di] in its dtype, are held until the backward pass, by the policy of
rematerialisation too that keeps what kernels return (`chunks.kept`); others run the sweeps again.

What XLA makes of the tiles' results is so on GPUs (`in_tiles`); on TPU it is added up in VMEM (`divergence_tpu`).

Letters as in `sparse_pairs`; Di index dim, padded to D as Dh is.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx.kernels_pallas import sparse_pairs
from mmx.kernels_pallas.chunks import join, kept, places, split
from mmx.kernels_pallas.sparse import logsumexp_of_choices, per_row


class DivergenceKernels(NamedTuple):
  """What a platform brings. Tiles, keys and `who`, here [M, 2, r], are as `sparse_pairs.TileKernels` takes them.

    stats(tiles, keys, index_k [B*P, b, D], index_q [M, r, D], who, K, scale) -> float32 [M, 2, r]: the greatest index
      score of each query of a tile, and the sum of exponentials above it.
    diverge(tiles, keys, index_k, q [M, r*G, D], index_q, who, logsumexps, dindex_k, K, scales) -> (kl float32 [M, r],
      each pair's share of its query's divergence; dindex_q like index_q; dindex_k): logsumexps are the attention's,
      float32 [M, r*G], and the index branch's, [M, r]; scales those of both scores; dindex_k, the gradient of the index
      keys so far as each kv head has it, float32 [B*P, b, K*D], comes back with the tiles' added.
  """

  stats: Callable
  diverge: Callable
  tile_queries: Callable  # of G: most r


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def divergence(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexps, segment_ids_BT, block_size, diverge,
               part=None):
  """KL(P || P_idx) over each query's selected tokens: kl [B] float32; the kl of `reference.msa`.

  Args:
    q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi: bfloat16 or float32, as the kernels take them.
    ids_BTKk: int32 blocks of each query, no block twice, -1 for none.
    logsumexps: float32, of the scores of each query over its blocks: [B, T, K, G] of the attention and, where a platform's
      index pass makes them, [B, T, K] of the index branch.
    segment_ids_BT: a query sees the tokens up to its own of its segment; queries of segment 0 are left out.
    diverge: what makes it of the first six, slots_BT, segments (of queries, of keys) and the block size: kl, and its
      gradients of index_q and index_k.
    part: None, or which of the row's queries these are: see `chunks.Part`.

  The gradient reaches index_q and index_k only, and is made on the way forward.
  """
  arguments = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexps, segment_ids_BT
  return _forward(*arguments, block_size, diverge, part)[0]


def _forward(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexps, segment_ids_BT, block_size, diverge,
             part=None):
  slots_BT, segments = places(segment_ids_BT, part)
  slots_BT = jnp.where(segment_ids_BT > 0, slots_BT, -1)
  arguments = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, *logsumexps
  kl_B, *dindex = diverge(*arguments, slots_BT, segments, block_size)
  return kl_B, kept(tuple(dindex))


def _backward(block_size, diverge, dindex, dkl_B):
  return None, None, *(per_row(dkl_B, x) for x in dindex), None, None, None, None


divergence.defvjp(_forward, _backward)


def index_keys_in_blocks(index_k_BTDi, keys, block_size):
  """[B*P, b, D], zeros where `keys.last_B` says that no query looks."""
  used_BS1 = jnp.arange(index_k_BTDi.shape[1], dtype=jnp.int32)[None, :, None] <= keys.last_B[:, None, None]
  return sparse_pairs.in_blocks(sparse_pairs.whole_lanes(jnp.where(used_BS1, index_k_BTDi, 0)), block_size)


def in_tiles(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, slots_BT, segments, block_size,
             kernels: DivergenceKernels):
  """What `divergence` takes as `diverge`, of a platform's kernels."""
  B, T, H, Dh = q_BTHDh.shape
  K, Di = index_q_BTKDi.shape[2:]
  S = k_BTKDh.shape[1]
  chunks, keys = sparse_pairs.sides(q_BTHDh, k_BTKDh, k_BTKDh, ids_BTKk, slots_BT, segments, block_size)
  c = chunks.q_BcHD.shape[2]
  index_k_pbD = index_keys_in_blocks(index_k_BTDi, keys, block_size)
  D = index_k_pbD.shape[-1]
  diverge = functools.partial(_one_chunk, keys, index_k_pbD, (Dh**-0.5, Di**-0.5), kernels)
  start = jnp.zeros((*index_k_pbD.shape[:2], K * D), jnp.float32)
  index_q = split(sparse_pairs.whole_lanes(index_q_BTKDi), c)
  logsumexp = split(logsumexp_BTKG.reshape(B, T, H), c)
  dindex_k, (kl, dindex_q) = lax.scan(diverge, start, (chunks, index_q, logsumexp))
  dindex_k_BTDi = jnp.sum(dindex_k.reshape(B, -1, K, D), axis=2)[:, :S, :Di].astype(index_k_BTDi.dtype)
  return jnp.sum(kl, axis=0), join(dindex_q, T)[..., :Di], dindex_k_BTDi


def _one_chunk(keys, index_k_pbD, scales, kernels, dindex_k, chunk):
  """The index keys' gradient, float32 [B*P, b, K*D], with this chunk's added; kl [B] and dindex_q [B, c, K, D]."""
  queries, index_q_BcKD, logsumexp_BcH = chunk
  B, _, K, _ = index_q_BcKD.shape
  G = logsumexp_BcH.shape[2] // K
  P = keys.k_pbX.shape[0] // B
  tiles = sparse_pairs.plan(queries.ids_BcKk, queries.slot_Bc, P, -(-16 // G), kernels.tile_queries(G))
  index_queries = queries._replace(q_BcHD=index_q_BcKD)  # one head for each kv head
  index_q_MrD = sparse_pairs.rows_of(index_q_BcKD, index_queries, tiles)
  who = sparse_pairs.who(index_queries, tiles)

  stats = kernels.stats(tiles, keys, index_k_pbD, index_q_MrD, who, K, scales[1])
  index_logsumexp_N = logsumexp_of_choices(*(stats[:, i].reshape(-1) for i in (0, 1)), tiles)
  of_tiles = lambda x_N: x_N.at[tiles.query_Mr].get(mode='fill', fill_value=0).reshape(who.shape[0], -1)
  logsumexps = of_tiles(logsumexp_BcH.reshape(-1, G)), of_tiles(index_logsumexp_N)

  q_MrD = sparse_pairs.rows_of(queries.q_BcHD, queries, tiles)
  kl_Mr, dindex_q, dindex_k = kernels.diverge(
      tiles, keys, index_k_pbD, q_MrD, index_q_MrD, who, logsumexps, dindex_k, K, scales
  )
  row_M = tiles.page_M // (keys.k_pbX.shape[0] // B * K)
  row_M = jnp.where(jnp.arange(row_M.size, dtype=jnp.int32) < tiles.count, row_M, B)
  is_of_BM = row_M[None] == jnp.arange(B, dtype=jnp.int32)[:, None]
  kl_B = jnp.sum(jnp.where(is_of_BM, jnp.sum(kl_Mr, axis=1)[None], 0), axis=1)
  dindex_q_ND = sparse_pairs.sum_of_choices(
      dindex_q.reshape(tiles.query_Mr.size, -1), tiles.valid_Nk.astype(jnp.float32), tiles
  )
  return dindex_k, (kl_B, dindex_q_ND.reshape(index_q_BcKD.shape).astype(index_q_BcKD.dtype))
