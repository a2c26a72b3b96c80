"""The divergence of MSA's index branch on TPU, with its gradient in closed form (arXiv:2606.13392, sections 3.2 and 4).

Two sweeps over the tiles that `sparse_pairs` cuts of a chunk's pairs (query, block), as attention's are cut:

  stats    index scores; the greatest of each query in a tile and the sum of exponentials above it, from which XLA makes
           the logsumexp over the query's blocks.
  diverge  the attention's scores again and, by its logsumexp, the teacher P, the mean of the G heads; index scores and
           the student P_idx; each query's sum of P log(P / P_idx); and from P_idx - P, the gradient of the scores, the
           rows of the index queries' gradient, which XLA adds up, and the index keys', which grows in VMEM from tile to
           tile of a page.

Value and gradient come from one sweep, so that the attention's scores, which cost G times an index head's, are made
once. The index branch's gradients, [B, T, K + 1, Di] in its dtype, are held until the backward pass. They are named
'mixer': the policy of rematerialisation that keeps mixers' outputs keeps them too, others run both sweeps again.

Layout. As in `sparse_tpu` keys are in sublanes and queries in lanes, [b, r*G] scores of attention and [b, r] of the
index branch. A query's G heads are neighbours in lanes, so their sum is a product with a matrix of zeros and ones: that
is exact in bfloat16, and probabilities enter it in as many bfloat16 parts as the inputs' dtype asks for. Keys that a
query does not see are masked in the mean, once for G heads.

None of it has run on a TPU. Letters as in `sparse_pairs`; Di index dim, padded to D as Dh is, and R = r*G.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import sparse_pairs
from mmx.kernels_pallas.chunks import join, kernel_product, places, split
from mmx.kernels_pallas.sparse import MASKED, logsumexp_of_choices
from mmx.kernels_pallas.sparse_tpu import PARAMS, TILE_ROWS, of_the_page, visible

LEAST_QUERIES = 2  # of a tile: a product with one row of bfloat16 does not compile
PARTS = {jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.float32): 3}  # numbers of 8 bits that make up a probability


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def selected_divergence_pallas(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT,
                               block_size, interpret=False, part=None):
  """KL(P || P_idx) over each query's selected tokens: kl [B] float32; the meaning is `sparse.selected_divergence`'s.

  Args:
    q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi: bfloat16 or float32; shapes that `msa_tpu.unsupported` has nothing
      to say of.
    ids_BTKk: int32 blocks of each query, no block twice, -1 for none.
    logsumexp_BTKG: float32, of the attention's scores of each query over its blocks.
    segment_ids_BT: a query sees the tokens up to its own of its segment; queries of segment 0 are left out.
    interpret: as `pl.pallas_call` takes it.
    part: None, or which of the row's queries these are: see `chunks.Part`.

  The gradient reaches index_q and index_k only, and is made on the way forward.
  """
  arguments = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT
  return _forward(*arguments, block_size, interpret, part)[0]


def _forward(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT, block_size,
             interpret, part=None):
  B, T, H, Dh = q_BTHDh.shape
  K, Di = index_q_BTKDi.shape[2:]
  S = k_BTKDh.shape[1]
  slots_BT, segments = places(segment_ids_BT, part)
  slots_BT = jnp.where(segment_ids_BT > 0, slots_BT, -1)
  chunks, keys = sparse_pairs.sides(q_BTHDh, k_BTKDh, k_BTKDh, ids_BTKk, slots_BT, segments, block_size)
  c = chunks.q_BcHD.shape[2]
  used_BS1 = jnp.arange(S, dtype=jnp.int32)[None, :, None] <= keys.last_B[:, None, None]
  index_k_pbD = sparse_pairs.in_blocks(sparse_pairs.whole_lanes(jnp.where(used_BS1, index_k_BTDi, 0)), block_size)
  D = index_k_pbD.shape[-1]
  diverge = functools.partial(_one_chunk, keys, index_k_pbD, (Dh**-0.5, Di**-0.5), interpret)
  start = jnp.zeros((*index_k_pbD.shape[:2], K * D), jnp.float32)
  index_q = split(sparse_pairs.whole_lanes(index_q_BTKDi), c)
  logsumexp = split(logsumexp_BTKG.reshape(B, T, H), c)
  dindex_k, (kl, dindex_q) = lax.scan(diverge, start, (chunks, index_q, logsumexp))
  dindex_k_BTDi = jnp.sum(dindex_k.reshape(B, -1, K, D), axis=2)[:, :S, :Di].astype(index_k_BTDi.dtype)
  dindex = join(dindex_q, T)[..., :Di], dindex_k_BTDi
  return jnp.sum(kl, axis=0), checkpoint_name(dindex, 'mixer')


def _backward(block_size, interpret, dindex, dkl_B):
  per_row = lambda x: x * dkl_B.reshape((-1,) + (1,) * (x.ndim - 1)).astype(x.dtype)
  return None, None, *map(per_row, dindex), None, None, None, None


selected_divergence_pallas.defvjp(_forward, _backward)


def _one_chunk(keys, index_k_pbD, scales, interpret, dindex_k, chunk):
  """The index keys' gradient, float32 [B*P, b, K*D], with this chunk's added; kl [B] and dindex_q [B, c, K, D]."""
  queries, index_q_BcKD, logsumexp_BcH = chunk
  B, _, K, _ = index_q_BcKD.shape
  tiles = sparse_pairs.plan(queries, keys, TILE_ROWS, LEAST_QUERIES)
  index_queries = queries._replace(q_BcHD=index_q_BcKD)  # one head for each kv head
  index_q_MrD = sparse_pairs.rows_of(index_q_BcKD, index_queries, tiles)
  page_M, who = of_the_page(tiles, keys, sparse_pairs.who(index_queries, tiles), K)

  stats = _stats(page_M, keys, index_k_pbD, index_q_MrD, who, tiles.count, K, scales[1], interpret)
  index_logsumexp_N = logsumexp_of_choices(*(stats[:, i].reshape(-1) for i in (0, 1)), tiles)
  lanes = lambda x_NG: x_NG.at[tiles.query_Mr].get(mode='fill', fill_value=0).reshape(who.shape[0], 1, -1)
  logsumexps = lanes(logsumexp_BcH.reshape(index_logsumexp_N.size, -1)), lanes(index_logsumexp_N)

  q_MrD = sparse_pairs.rows_of(queries.q_BcHD, queries, tiles)
  kl_M1r, dindex_q, dindex_k = _diverge(
      page_M, keys, index_k_pbD, q_MrD, index_q_MrD, who, logsumexps, dindex_k, tiles.count, K, scales, interpret
  )
  row_M = tiles.page_M // (keys.k_pbX.shape[0] // B * K)
  row_M = jnp.where(jnp.arange(row_M.size, dtype=jnp.int32) < tiles.count, row_M, B)
  is_of_BM = row_M[None] == jnp.arange(B, dtype=jnp.int32)[:, None]
  kl_B = jnp.sum(jnp.where(is_of_BM, jnp.sum(kl_M1r, axis=(1, 2))[None], 0), axis=1)
  dindex_q_ND = sparse_pairs.sum_of_choices(
      dindex_q.reshape(tiles.query_Mr.size, -1), tiles.valid_Nk.astype(jnp.float32), tiles
  )
  return dindex_k, (kl_B, dindex_q_ND.reshape(index_q_BcKD.shape).astype(index_q_BcKD.dtype))


def _stats(page_M, keys, index_k_pbD, index_q_MrD, who, count, K, scale, interpret):
  """float32 [M, 2, r]: the greatest index score of each query of a tile, and the sum of exponentials above it."""
  M, r, D = index_q_MrD.shape
  b = index_k_pbD.shape[1]
  tile, block, _ = _specs(K)
  return pl.pallas_call(
      functools.partial(_stats_kernel, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(count,),
          in_specs=[tile(r, D), tile(2, r), block(b, D), block(1, b)], out_specs=tile(2, r),
      ),
      out_shape=jax.ShapeDtypeStruct((M, 2, r), jnp.float32),
      compiler_params=PARAMS,
      cost_estimate=pl.CostEstimate(
          flops=2 * M * r * b * D, transcendentals=M * r * b,
          bytes_accessed=(index_q_MrD.size + M * b * D) * index_q_MrD.dtype.itemsize,
      ),
      interpret=interpret, name='msa_index_stats',
  )(page_M, index_q_MrD, who, index_k_pbD, keys.segment_p1b)


def _diverge(page_M, keys, index_k_pbD, q_MrD, index_q_MrD, who, logsumexps, dindex_k, count, K, scales, interpret):
  """float32 [M, 1, r], each pair's share of its query's divergence; dindex_q like index_q_MrD; dindex_k."""
  (M, rows, D), (r, Di) = q_MrD.shape, index_q_MrD.shape[1:]
  b, parts = index_k_pbD.shape[1], PARTS[q_MrD.dtype]
  tile, block, head = _specs(K)
  return pl.pallas_call(
      functools.partial(_diverge_kernel, scales=scales, parts=parts),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(count,),
          in_specs=[
              tile(rows, D), tile(1, rows), tile(r, Di), tile(1, r), tile(2, r),
              head(b, D), block(b, Di), block(1, b), head(b, Di),
          ],
          out_specs=[tile(1, r), tile(r, Di), head(b, Di)],
      ),
      out_shape=[
          jax.ShapeDtypeStruct((M, 1, r), jnp.float32), jax.ShapeDtypeStruct(index_q_MrD.shape, index_q_MrD.dtype),
          jax.ShapeDtypeStruct(dindex_k.shape, jnp.float32),
      ],
      input_output_aliases={9: 2},  # pages that no query chose keep what they have
      compiler_params=PARAMS,
      cost_estimate=pl.CostEstimate(
          flops=2 * M * b * (rows * (D + parts * r * (rows > r)) + 3 * r * Di), transcendentals=M * b * (rows + 2 * r),
          bytes_accessed=(q_MrD.size + 2 * index_q_MrD.size + M * b * (D + Di)) * q_MrD.dtype.itemsize,
      ),
      interpret=interpret, name='msa_divergence',
  )(
      page_M, q_MrD, logsumexps[0], index_q_MrD, logsumexps[1], who, keys.k_pbX, index_k_pbD, keys.segment_p1b,
      dindex_k,
  )


def _specs(K):
  """BlockSpecs by their last two dims: of a tile, of what a block's heads share, of one head's."""
  bits = K.bit_length()
  tile = lambda *dims: pl.BlockSpec((1, *dims), lambda m, page: (m, 0, 0))
  block = lambda *dims: pl.BlockSpec((1, *dims), lambda m, page: (page[m] >> bits, 0, 0))
  head = lambda *dims: pl.BlockSpec((1, *dims), lambda m, page: (page[m] >> bits, 0, page[m] & 2**bits - 1))
  return tile, block, head


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def _stats_kernel(page_ref, index_q_ref, who_ref, index_k_ref, segment_ref, stats_ref, *, scale):
  visible_br = visible(who_ref, segment_ref)
  scores_br = jnp.where(visible_br, kernel_product(index_k_ref[0], index_q_ref[0], 1, 1) * scale, MASKED)
  top_1r = jnp.max(scores_br, axis=0, keepdims=True)
  stats_ref[0, :1] = top_1r
  stats_ref[0, 1:] = jnp.sum(jnp.where(visible_br, jnp.exp(scores_br - top_1r), 0), axis=0, keepdims=True)


def _diverge_kernel(
    page_ref, q_ref, logsumexp_ref, index_q_ref, index_logsumexp_ref, who_ref, k_ref, index_k_ref, segment_ref,
    before_ref, kl_ref, dindex_q_ref, dindex_k_ref, *, scales, parts):
  m = pl.program_id(0)

  @pl.when((m == 0) | (page_ref[m] != page_ref[jnp.maximum(m - 1, 0)]))
  def _():
    dindex_k_ref[...] = before_ref[...]

  visible_br, index_q_rD, index_k_bD = visible(who_ref, segment_ref), index_q_ref[0], index_k_ref[0]
  teacher_br = _teacher(q_ref[0], k_ref[0], logsumexp_ref[0], scales[0], index_q_rD.shape[0], parts)
  teacher_br = jnp.where(visible_br, teacher_br, 0)
  scores_br = kernel_product(index_k_bD, index_q_rD, 1, 1) * scales[1]
  log_student_br = jnp.where(visible_br, scores_br - index_logsumexp_ref[0], 0)
  log_teacher_br = jnp.log(jnp.maximum(teacher_br, jnp.finfo(jnp.float32).tiny))  # where P is 0, its share is 0
  kl_ref[0] = jnp.sum(teacher_br * (log_teacher_br - log_student_br), axis=0, keepdims=True)
  dscores_br = (jnp.where(visible_br, jnp.exp(log_student_br), 0) - teacher_br) * scales[1]
  dscores_br = dscores_br.astype(index_k_bD.dtype)
  dindex_k_ref[0] += kernel_product(dscores_br, index_q_rD, 1, 0)
  dindex_q_ref[0] = kernel_product(dscores_br, index_k_bD, 0, 0).astype(dindex_q_ref.dtype)


def _teacher(q_RD, k_bD, logsumexp_1R, scale, r, parts):
  """[b, r]: the mean of the heads of each of r queries; no matter what for keys that a query does not see."""
  # Those may score above what it sees, and infinity would reach the tile's other queries.
  rest_bR = jnp.exp(jnp.minimum(kernel_product(k_bD, q_RD, 1, 1) * scale - logsumexp_1R, 0))
  R = q_RD.shape[0]
  G = R // r
  if G == 1:
    return rest_bR
  head_Rr, query_Rr = (lax.broadcasted_iota(jnp.int32, (R, r), axis) for axis in (0, 1))
  is_of_Rr = (head_Rr >= query_Rr * G) & (head_Rr < query_Rr * G + G)
  is_of_Rr = jnp.where(is_of_Rr, 1.0, 0.0).astype(jnp.bfloat16)
  total_br = jnp.zeros((k_bD.shape[0], r))
  for _ in range(parts):
    part_bR = rest_bR.astype(jnp.bfloat16)
    total_br += kernel_product(part_bR, is_of_Rr, 1, 0)
    rest_bR -= part_bR.astype(jnp.float32)
  return total_br / G
