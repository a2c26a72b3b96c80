"""Attention over selected blocks as Pallas kernels for TPU; `sparse_pairs` sorts and cuts what they are given.

The grid's length is counted at run time, and a block stays in VMEM from tile to tile of its page; the gradients of its
keys and values grow there and are written once per page and chunk.

Layout. A tile's scores stand as [b, r*G], keys in sublanes and queries in lanes: slots, maxima and sums are then rows
of lanes, reductions over keys need no exchange between lanes, and the gradients of keys and values are plain products.

Letters as in `sparse_pairs`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import sparse_pairs
from mmx.kernels_pallas.sparse import MASKED

TILE_ROWS = 512  # most r*G: a step of the grid costs about as much as the products of so many rows
STEP_ROWS = 256  # of a tile at once: scores of 256 x 128 are half of the vector registers


def unsupported(q_BTHDh, k_BSKDh, block_size, top_k) -> str:
  """'' where `attend_blocks` compiles for TPU, else one reason. Takes anything with shape and dtype."""
  if block_size % 16 or not 16 <= block_size <= 256:
    return f'block_size {block_size}; multiples of 16 from 16 to 256 are supported'
  return sparse_pairs.unsupported(q_BTHDh, k_BSKDh, block_size, top_k, TILE_ROWS)


def attend_blocks(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret=False):
  """`sparse_pairs.attend_in_tiles` by the kernels below: (out, logsumexp); `interpret` as `pl.pallas_call` takes it."""
  forward, backward = (functools.partial(function, interpret=interpret) for function in (_forward, _backward))
  kernels = sparse_pairs.TileKernels(forward, backward, TILE_ROWS)
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  return sparse_pairs.attend_in_tiles(*inputs, block_size, kernels)


def _forward(tiles, keys, q_MrD, who, K, scale, interpret):
  B, (M, rows, _) = keys.last_B.shape[0], q_MrD.shape
  P, b = keys.k_pbX.shape[0] // B, keys.k_pbX.shape[1]
  tile, lanes, block, segment = _specs(q_MrD, keys, P, K)
  return pl.pallas_call(
      functools.partial(_forward_kernel, P=P, K=K, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(tiles.count,),
          in_specs=[tile, lanes, block, block, segment], out_specs=[tile, lanes],
      ),
      out_shape=[jax.ShapeDtypeStruct(q_MrD.shape, q_MrD.dtype), jax.ShapeDtypeStruct((M, 2, rows), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
      cost_estimate=_cost(q_MrD, b, products=2, tensors=2),
      interpret=interpret, name='msa_attend_blocks',
  )(tiles.page_M, keys.last_B, q_MrD, who, keys.k_pbX, keys.v_pbX, keys.segment_p1b)


def _backward(tiles, keys, q_MrD, dout_MrD, who, stats, dkeys, K, scale, interpret):
  P, b = keys.k_pbX.shape[0] // keys.last_B.shape[0], keys.k_pbX.shape[1]
  tile, lanes, block, segment = _specs(q_MrD, keys, P, K)
  return pl.pallas_call(
      functools.partial(_backward_kernel, P=P, K=K, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(tiles.count,),
          in_specs=[tile, tile, lanes, lanes, block, block, segment, block, block], out_specs=[tile, block, block],
      ),
      out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_MrD, *dkeys)],
      input_output_aliases={9: 1, 10: 2},  # pages that no query chose keep what they have
      compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
      cost_estimate=_cost(q_MrD, b, products=5, tensors=3),
      interpret=interpret, name='msa_attend_blocks_backward',
  )(
      tiles.page_M, keys.last_B, q_MrD, dout_MrD, who, stats, keys.k_pbX, keys.v_pbX, keys.segment_p1b, *dkeys,
  )


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def _product(a, b, axis_a, axis_b):
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dims = (((axis_a,), (axis_b,)), ((), ()))
  return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _block(page_ref, last_ref, segment_ref, P, K, b):
  """Slots [b, 1] and segments [b, 1] of the keys at work, and what clears those that no query sees, were they NaN."""
  page = page_ref[pl.program_id(0)]
  slot_b1 = page % P * b + lax.broadcasted_iota(jnp.int32, (b, 1), 0)
  segment_b1 = jnp.broadcast_to(segment_ref[0], (8, b)).T[:, :1]
  used_b1 = slot_b1 <= last_ref[page // (P * K)]
  return slot_b1, segment_b1, lambda x_bD: jnp.where(used_b1, x_bD, jnp.zeros_like(x_bD))


def _steps(rows):
  return [slice(i, min(i + STEP_ROWS, rows)) for i in range(0, rows, STEP_ROWS)]


def _visible(slot_b1, segment_b1, who_ref, lanes):
  return (slot_b1 <= who_ref[0, :1, lanes]) & (segment_b1 == who_ref[0, 1:, lanes])


def _forward_kernel(page_ref, last_ref, q_ref, who_ref, k_ref, v_ref, segment_ref, out_ref, stats_ref, *, P, K, scale):
  b = k_ref.shape[1]
  slot_b1, segment_b1, clear = _block(page_ref, last_ref, segment_ref, P, K, b)
  k_bD, v_bD = k_ref[0], clear(v_ref[0])
  for lanes in _steps(q_ref.shape[1]):
    visible = _visible(slot_b1, segment_b1, who_ref, lanes)
    scores = jnp.where(visible, _product(k_bD, q_ref[0, lanes], 1, 1) * scale, MASKED)
    top = jnp.max(scores, axis=0, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - top), 0)
    stats_ref[0, :1, lanes] = top
    stats_ref[0, 1:, lanes] = jnp.sum(weights, axis=0, keepdims=True)
    out_ref[0, lanes] = _product(weights.astype(v_bD.dtype), v_bD, 0, 0).astype(out_ref.dtype)


def _backward_kernel(
    page_ref, last_ref, q_ref, dout_ref, who_ref, stats_ref, k_ref, v_ref, segment_ref, dk_before_ref, dv_before_ref,
    dq_ref, dk_ref, dv_ref, *, P, K, scale):
  m = pl.program_id(0)

  @pl.when((m == 0) | (page_ref[m] != page_ref[jnp.maximum(m - 1, 0)]))
  def _():
    dk_ref[...] = dk_before_ref[...]
    dv_ref[...] = dv_before_ref[...]

  slot_b1, segment_b1, clear = _block(page_ref, last_ref, segment_ref, P, K, k_ref.shape[1])
  k_bD, v_bD = clear(k_ref[0]), clear(v_ref[0])
  for lanes in _steps(q_ref.shape[1]):
    q_rD, dout_rD = q_ref[0, lanes], dout_ref[0, lanes]
    logsumexp, delta = stats_ref[0, :1, lanes], stats_ref[0, 1:, lanes]
    scores = _product(k_bD, q_rD, 1, 1) * scale
    weights = jnp.where(_visible(slot_b1, segment_b1, who_ref, lanes), jnp.exp(scores - logsumexp), 0)
    dscores = (weights * (_product(v_bD, dout_rD, 1, 1) - delta) * scale).astype(k_bD.dtype)
    dk_ref[0] += _product(dscores, q_rD, 1, 0)
    dv_ref[0] += _product(weights.astype(v_bD.dtype), dout_rD, 1, 0)
    dq_ref[0, lanes] = _product(dscores, k_bD, 0, 0).astype(dq_ref.dtype)


def _specs(q_MrD, keys, P, K):
  """BlockSpecs of a tile's rows [rows, D], its two rows of lanes, a block of one head, and the segments of a block."""
  b, (_, rows, D) = keys.k_pbX.shape[1], q_MrD.shape
  row_block = lambda page: (page // (P * K)) * P + page % P
  return (
      pl.BlockSpec((1, rows, D), lambda m, page, last: (m, 0, 0)),
      pl.BlockSpec((1, 2, rows), lambda m, page, last: (m, 0, 0)),
      pl.BlockSpec((1, b, D), lambda m, page, last: (row_block(page[m]), 0, page[m] // P % K)),
      pl.BlockSpec((1, 1, b), lambda m, page, last: (row_block(page[m]), 0, 0)),
  )


def _cost(q_MrD, b, products, tensors):
  M, rows, D = q_MrD.shape
  return pl.CostEstimate(
      flops=2 * products * M * rows * b * D, transcendentals=M * rows * b,
      bytes_accessed=(tensors * q_MrD.size + 2 * M * b * D) * q_MrD.dtype.itemsize,
  )
