"""The divergence of MSA's index branch as Pallas kernels for TPU; `divergence_pairs` says what they make.

Layout. As in `sparse_tpu` keys are in sublanes and queries in lanes, [b, r*G] scores of attention and [b, r] of the
index branch. A query's G heads are neighbours in lanes, so their sum is a product with a matrix of zeros and ones: that
is exact in bfloat16, and probabilities enter it in as many bfloat16 parts as the inputs' dtype asks for. Keys that a
query does not see are masked in the mean, once for G heads. The index keys' gradient grows in VMEM. The first sweep,
little work and much waiting, takes several tiles a step as attention forward does: 162 cycles a tile on v5p by the
compiler's schedule, where one a step takes 285 (`scripts/tpu_schedule.py`).

None of it has run on a TPU. Letters as in `divergence_pairs`, and R = r*G.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas.chunks import kernel_product
from mmx.kernels_pallas.divergence_pairs import DivergenceKernels, divergence_in_tiles
from mmx.kernels_pallas.sparse import MASKED
from mmx.kernels_pallas.sparse_tpu import LOG2E, TILE_ROWS, visible

TILES = 4  # of a step of the first sweep
LEAST_QUERIES = 2  # of a tile: a product with one row of bfloat16 does not compile
PARAMS = pltpu.CompilerParams(dimension_semantics=('arbitrary',), disable_bounds_checks=True)
PARTS = {jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.float32): 3}  # numbers of 8 bits that make up a probability


def selected_divergence_pallas(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT,
                               block_size, interpret=False, part=None):
  """`divergence_pairs.divergence_in_tiles` by the kernels below: kl [B] float32.

  Shapes are those that `msa_tpu.unsupported` has nothing to say of; `interpret` is as `pl.pallas_call` takes it.
  """
  arguments = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT
  return divergence_in_tiles(*arguments, block_size, kernels(interpret), part)


def kernels(interpret=False):
  """The two kernels as `divergence_pairs.DivergenceKernels`."""
  stats, diverge = (functools.partial(function, interpret=interpret) for function in (_stats, _diverge))
  return DivergenceKernels(stats, diverge, lambda G: max(1, TILE_ROWS // G), LEAST_QUERIES, TILES)


def _stats(tiles, keys, index_k_pbD, index_q_MrD, who, K, scale, interpret):
  M, r, D = index_q_MrD.shape
  page_M, who = of_the_page(tiles, keys, who, K)
  b = index_k_pbD.shape[1]
  W = TILES
  rows = lambda *dims: pl.BlockSpec((W, *dims), lambda m, page: (m, 0, 0))
  block = lambda i, *dims: pl.BlockSpec((1, *dims), lambda m, page: (page[m * W + i] >> K.bit_length(), 0, 0))
  blocks = lambda *dims: [block(i, *dims) for i in range(W)]
  return pl.pallas_call(
      functools.partial(_stats_kernel, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(pl.cdiv(tiles.count, W),),
          in_specs=[rows(r, D), rows(2, r), blocks(b, D), blocks(1, b)], out_specs=rows(2, r),
      ),
      out_shape=jax.ShapeDtypeStruct((M, 2, r), jnp.float32),
      compiler_params=PARAMS,
      cost_estimate=pl.CostEstimate(
          flops=2 * M * r * b * D, transcendentals=M * r * b,
          bytes_accessed=(index_q_MrD.size + M * b * D) * index_q_MrD.dtype.itemsize,
      ),
      interpret=interpret, name='msa_index_stats',
  )(page_M, index_q_MrD, who, [index_k_pbD] * W, [keys.segment_p1b] * W)


def _diverge(tiles, keys, index_k_pbD, q_MrD, index_q_MrD, who, logsumexps, dindex_k, K, scales, interpret):
  (M, rows, D), (r, Di) = q_MrD.shape, index_q_MrD.shape[1:]
  b, parts = index_k_pbD.shape[1], PARTS[q_MrD.dtype]
  tile, block, head = _specs(K)
  page_M, who = of_the_page(tiles, keys, who, K)
  attention, index = (x[:, None] for x in logsumexps)
  kl_M1r, *gradients = pl.pallas_call(
      functools.partial(_diverge_kernel, scales=scales, parts=parts),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(tiles.count,),
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
      page_M, q_MrD, attention, index_q_MrD, index, who, keys.k_pbX, index_k_pbD, keys.segment_p1b, dindex_k
  )
  return kl_M1r[:, 0], *gradients


def of_the_page(tiles, keys, who, K):
  """Each tile's row of blocks and head in one word, and `who` with slots counted from the block's first."""
  P, b = keys.k_pbX.shape[0] // keys.last_B.shape[0], keys.k_pbX.shape[1]
  page_M = tiles.page_M
  row_block_M, head_M = page_M // (P * K) * P + page_M % P, page_M // P % K
  first_M2 = jnp.stack([page_M % P * b, jnp.zeros_like(page_M)], axis=1)
  return row_block_M * 2 ** K.bit_length() + head_M, who - first_M2[..., None]


def _specs(K):
  """BlockSpecs by their last two dims: of a tile, of what a block's heads share, of one head's."""
  bits = K.bit_length()
  tile = lambda *dims: pl.BlockSpec((1, *dims), lambda m, page: (m, 0, 0))
  block = lambda *dims: pl.BlockSpec((1, *dims), lambda m, page: (page[m] >> bits, 0, 0))
  head = lambda *dims: pl.BlockSpec((1, *dims), lambda m, page: (page[m] >> bits, 0, page[m] & 2**bits - 1))
  return tile, block, head


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def _stats_kernel(page_ref, index_q_ref, who_ref, index_k_refs, segment_refs, stats_ref, *, scale):
  def of_tile(i):
    seen_br = visible(who_ref[i, :1], who_ref[i, 1:], segment_refs[i])
    return jnp.where(seen_br, kernel_product(index_k_refs[i][0], index_q_ref[i], 1, 1), MASKED)

  for i, scores_br in enumerate([of_tile(i) for i in range(TILES)]):
    top_1r = jnp.maximum(jnp.max(scores_br, axis=0, keepdims=True), MASKED / 2)  # what is masked lies far below, ever
    weights_br = jnp.exp2((scores_br - top_1r) * (scale * LOG2E))
    stats_ref[i] = jnp.concatenate([top_1r * scale, jnp.sum(weights_br, axis=0, keepdims=True)])


def _diverge_kernel(
    page_ref, q_ref, logsumexp_ref, index_q_ref, index_logsumexp_ref, who_ref, k_ref, index_k_ref, segment_ref,
    before_ref, kl_ref, dindex_q_ref, dindex_k_ref, *, scales, parts):
  m = pl.program_id(0)

  @pl.when((m == 0) | (page_ref[m] != page_ref[jnp.maximum(m - 1, 0)]))
  def _():
    dindex_k_ref[...] = before_ref[...]

  visible_br = visible(who_ref[0, :1], who_ref[0, 1:], segment_ref)
  index_q_rD, index_k_bD = index_q_ref[0], index_k_ref[0]
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
