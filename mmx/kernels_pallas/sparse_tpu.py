"""Attention over selected blocks as Pallas kernels for TPU; `sparse_pairs` sorts and cuts what they are given.

The grid's length is counted at run time. Backward a block stays in VMEM from tile to tile of its page; the gradients of
its keys and values grow there and are written once per page and chunk.

Layout. A tile's scores stand as [b, r*G], keys in sublanes and queries in lanes: slots, maxima and sums are then rows
of lanes, reductions over keys need no exchange between lanes, and the gradients of keys and values are plain products.

What a step of the grid costs beside its products is counted by `scripts/tpu_schedule.py`. Hence a page comes to the
kernel as its row of blocks and its head in one word, for each window would divide by P and K; copies are not checked
against bounds that a plan keeps by construction; scores are masked once, far below every maximum, where weights would
be masked again; and the rows of a tile go through at once. Forward, a step takes four tiles, and makes the scores of
all of them first: what one of them waits for, the others fill (v5p 546 cycles a tile where one a step takes 952). Each
copies its own block, a quarter more beside 512 rows.

Letters as in `sparse_pairs`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import sparse_pairs
from mmx.kernels_pallas.chunks import kernel_product
from mmx.kernels_pallas.sparse import MASKED

TILE_ROWS = 512  # most r*G: what a step of the grid costs beside its products is less than they are
TILES = 4  # of a step forward, if one is of TILE_BYTES at most
TILE_BYTES = 2**18  # of queries: with as many of outputs, and each twice for the copies, 4 MiB of VMEM
LOG2E = math.log2(math.e)
PARAMS = pltpu.CompilerParams(dimension_semantics=('arbitrary',), disable_bounds_checks=True)


def unsupported(q_BTHDh, k_BSKDh, block_size, top_k) -> str:
  """'' where `attend_blocks` compiles for TPU, else one reason. Takes anything with shape and dtype."""
  if block_size % 16 or not 16 <= block_size <= 256:
    return f'block_size {block_size}; multiples of 16 from 16 to 256 are supported'
  return sparse_pairs.unsupported(q_BTHDh, k_BSKDh, block_size, top_k, TILE_ROWS)


def attend_blocks(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret=False):
  """`sparse_pairs.attend_in_tiles` by the kernels below: (out, logsumexp); `interpret` as `pl.pallas_call` takes it."""
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  return sparse_pairs.attend_in_tiles(*inputs, block_size, kernels(interpret))


def kernels(interpret=False):
  """The two kernels as `sparse_pairs.TileKernels`."""
  forward, backward = (functools.partial(function, interpret=interpret) for function in (_forward, _backward))
  return sparse_pairs.TileKernels(forward, backward, TILE_ROWS, together=TILES)


def _forward(tiles, keys, q_MrD, who, K, scale, interpret):
  M, rows, D = q_MrD.shape
  W = TILES if rows * D * q_MrD.dtype.itemsize <= TILE_BYTES else 1
  page_M, who = of_the_page(tiles, keys, who, K)
  tile, lanes, blocks, segments = _specs(q_MrD, keys, K, W)
  return pl.pallas_call(
      functools.partial(_forward_kernel, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(pl.cdiv(tiles.count, W),),
          in_specs=[tile, lanes, blocks, blocks, segments], out_specs=[tile, lanes],
      ),
      out_shape=[jax.ShapeDtypeStruct(q_MrD.shape, q_MrD.dtype), jax.ShapeDtypeStruct((M, 2, rows), jnp.float32)],
      compiler_params=PARAMS,
      cost_estimate=_cost(q_MrD, keys, products=2, tensors=2),
      interpret=interpret, name='msa_attend_blocks',
  )(page_M, q_MrD, who, [keys.k_pbX] * W, [keys.v_pbX] * W, [keys.segment_p1b] * W)


def _backward(tiles, keys, q_MrD, dout_MrD, who, stats, dkeys, K, scale, interpret):
  page_M, who = of_the_page(tiles, keys, who, K)
  tile, lanes, (block,), (segment,) = _specs(q_MrD, keys, K)
  return pl.pallas_call(
      functools.partial(_backward_kernel, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(tiles.count,),
          in_specs=[tile, tile, lanes, lanes, block, block, segment, block, block], out_specs=[tile, block, block],
      ),
      out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_MrD, *dkeys)],
      input_output_aliases={8: 1, 9: 2},  # pages that no query chose keep what they have
      compiler_params=PARAMS,
      cost_estimate=_cost(q_MrD, keys, products=5, tensors=3),
      interpret=interpret, name='msa_attend_blocks_backward',
  )(page_M, q_MrD, dout_MrD, who, stats, keys.k_pbX, keys.v_pbX, keys.segment_p1b, *dkeys)


def of_the_page(tiles, keys, who, K):
  """Each tile's row of blocks and head in one word, and `who` with slots counted from the block's first."""
  P, b = keys.k_pbX.shape[0] // keys.last_B.shape[0], keys.k_pbX.shape[1]
  page_M = tiles.page_M
  row_block_M, head_M = page_M // (P * K) * P + page_M % P, page_M // P % K
  first_M2 = jnp.stack([page_M % P * b, jnp.zeros_like(page_M)], axis=1)
  return row_block_M * 2 ** K.bit_length() + head_M, who - first_M2[..., None]


def _specs(q_MrD, keys, K, W=1):
  """BlockSpecs of the rows of W tiles [W, rows, D] and their two rows of lanes [W, 2, rows]; and of each tile its block
  of one head, and the segments of the block.
  """
  b, (_, rows, D) = keys.k_pbX.shape[1], q_MrD.shape
  bits = K.bit_length()
  tiles = lambda *shape: pl.BlockSpec((W, *shape), lambda m, page: (m, 0, 0))
  of_page = lambda i, shape, column: pl.BlockSpec(
      (1, *shape), lambda m, page: (page[m * W + i] >> bits, 0, column(page[m * W + i]))
  )
  blocks = [of_page(i, (b, D), lambda page: page & 2**bits - 1) for i in range(W)]
  return tiles(rows, D), tiles(2, rows), blocks, [of_page(i, (1, b), lambda page: 0) for i in range(W)]


def _cost(q_MrD, keys, products, tensors):
  (M, rows, D), b = q_MrD.shape, keys.k_pbX.shape[1]
  return pl.CostEstimate(
      flops=2 * products * M * rows * b * D, transcendentals=M * rows * b,
      bytes_accessed=(tensors * q_MrD.size + 2 * M * b * D) * q_MrD.dtype.itemsize,
  )


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def visible(who_ref, segment_ref):
  """Which row of `who` sees which key of the block, [b, rows]."""
  b = segment_ref.shape[2]
  segment_b1 = jnp.broadcast_to(segment_ref[0], (8, b)).T[:, :1]
  return (lax.broadcasted_iota(jnp.int32, (b, 1), 0) <= who_ref[0, :1]) & (segment_b1 == who_ref[0, 1:])


def seen_scores(k_bD, q_rD, who_ref, segment_ref):
  """Unscaled scores [b, rows], MASKED where a query does not see a key."""
  return jnp.where(visible(who_ref, segment_ref), kernel_product(k_bD, q_rD, 1, 1), MASKED)


def stats_and_weights(scores, scale):
  """Of unscaled scores [b, rows] the two rows of a tile's stats, [2, rows], and exp(scaled score - greatest)."""
  top = jnp.maximum(jnp.max(scores, axis=0, keepdims=True), MASKED / 2)  # what is masked lies far below, ever
  weights = jnp.exp2((scores - top) * (scale * LOG2E))
  return jnp.concatenate([top * scale, jnp.sum(weights, axis=0, keepdims=True)]), weights


def _forward_kernel(page_ref, q_ref, who_ref, k_refs, v_refs, segment_refs, out_ref, stats_ref, *, scale):
  of_tile = lambda i: seen_scores(k_refs[i][0], q_ref[i], who_ref.at[pl.ds(i, 1)], segment_refs[i])
  for i, scores in enumerate([of_tile(i) for i in range(len(k_refs))]):
    v_bD = v_refs[i][0]
    stats_ref[i], weights = stats_and_weights(scores, scale)
    out_ref[i] = kernel_product(weights.astype(v_bD.dtype), v_bD, 0, 0).astype(out_ref.dtype)


def _backward_kernel(
    page_ref, q_ref, dout_ref, who_ref, stats_ref, k_ref, v_ref, segment_ref, dk_before_ref, dv_before_ref,
    dq_ref, dk_ref, dv_ref, *, scale):
  m = pl.program_id(0)

  @pl.when((m == 0) | (page_ref[m] != page_ref[jnp.maximum(m - 1, 0)]))
  def _():
    dk_ref[...] = dk_before_ref[...]
    dv_ref[...] = dv_before_ref[...]

  q_rD, dout_rD, k_bD, v_bD = q_ref[0], dout_ref[0], k_ref[0], v_ref[0]
  logsumexp, delta = stats_ref[0, :1], stats_ref[0, 1:]
  weights = jnp.exp2(seen_scores(k_bD, q_rD, who_ref, segment_ref) * (scale * LOG2E) - logsumexp * LOG2E)
  dscores = (weights * (kernel_product(v_bD, dout_rD, 1, 1) - delta) * scale).astype(k_bD.dtype)
  dk_ref[0] += kernel_product(dscores, q_rD, 1, 0)
  dv_ref[0] += kernel_product(weights.astype(v_bD.dtype), dout_rD, 1, 0)
  dq_ref[0] = kernel_product(dscores, k_bD, 0, 0).astype(dq_ref.dtype)
