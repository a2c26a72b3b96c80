"""Attention over selected blocks as Pallas kernels for TPU: keys outside, queries gathered (arXiv:2606.13392, sec. 4).

A chunk of queries at a time. XLA sorts the chunk's pairs (query, block) by page, one block of one row and kv head, cuts
the run of each page into tiles of r queries and gathers their rows; the kernel goes through the tiles that there are
(the grid's length is counted at run time), and a block stays in VMEM from tile to tile of its page. Each pair's output
is weighed by log-sum-exp and gathered per query; the gradient of the keys grows in VMEM and is written once per page
and chunk. All orders are fixed, so equal inputs give equal bits.

Layout. A tile's scores stand as [b, r*G], keys in sublanes and queries in lanes: slots, maxima and sums are then rows
of lanes, reductions over keys need no exchange between lanes, and the gradients of keys and values are plain products.
Keys and values are held as [B*P, b, K*D]: one copy of each, in which a block of one head is a legal block of memory.
D is Dh padded to a multiple of 128, as the tiles of the memory are anyhow. Pairs' outputs are held in the queries'
dtype: one rounding before a sum of k in float32.

Letters as in `sparse`: B rows, T queries, S key slots, H query heads, K kv heads, G = H/K, Dh head dim, D = Dh padded,
b block size, P = S/b blocks, k blocks per query and kv head, c chunk of queries, N = B*c*K queries of one kv head each,
R = N*k pairs, r queries of a tile, M most tiles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas.chunks import join, split
from mmx.kernels_pallas.sparse import MASKED, logsumexp_of_choices

CHUNK_ELEMENTS = 2**26  # of the outputs of one chunk's pairs, R*G*D: 128 MiB in bfloat16, and room for half-full tiles
CHUNK_PAIRS = 2**17  # most tiles, whose pages stand in 512 KiB of the 1 MiB for scalars
TILE_ROWS = 512  # most r*G: a step of the grid costs about as much as the products of so many rows
STEP_ROWS = 256  # of a tile at once: scores of 256 x 128 are half of the vector registers
LANES = 128


def unsupported(q_BTHDh, k_BSKDh, block_size, top_k) -> str:
  """'' where `attend_blocks` compiles for TPU, else one reason. Takes anything with shape and dtype."""
  H = q_BTHDh.shape[2]
  B, S, K, _ = k_BSKDh.shape
  if H % K:
    return f'{H} query heads are no multiple of {K} kv heads'
  if H // K > TILE_ROWS:
    return f'{H // K} query heads per kv head; at most {TILE_ROWS} are supported'
  if block_size % 16 or not 16 <= block_size <= 256:
    return f'block_size {block_size}; multiples of 16 from 16 to 256 are supported'
  if q_BTHDh.dtype not in (jnp.bfloat16, jnp.float32) or k_BSKDh.dtype != q_BTHDh.dtype:
    return f'dtypes {q_BTHDh.dtype} and {k_BSKDh.dtype}; bfloat16 or float32, the same for both, are supported'
  if B * K * top_k * (B * K * -(-S // block_size) + 1) >= 2**31:
    return f'{B} rows of {S} slots with {K} kv heads; pairs of one token times blocks must stay below 2**31'
  return ''


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_blocks(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret=False):
  """Softmax attention of each query and kv head over its blocks, up to the query's slot and within its segment.

  Args:
    q_BTHDh, k_BSKDh, v_BSKDh: bfloat16 or float32; S need not be a multiple of the block size.
    ids_BTKk: int32 blocks of each query, as `sparse.select_blocks` returns them; no block twice, -1 for none.
    slots_BT: int32 slot of each query; -1 for padding, which gives zeros.
    segments: (segment_ids_BT, segment_ids_BS) of queries and keys, or None.
    interpret: as `pl.pallas_call` takes it.

  Returns:
    out [B, T, H, Dh] of q's dtype, and logsumexp [B, T, K, G] float32 without gradient, 0 where nothing is seen.
  """
  return _forward(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret)[0]


# ----------------------------------------------------------------------------------------------------------------------
# both sides


class Keys(NamedTuple):
  """Key side in blocks. `last_B` is the last slot that a row's queries see: what lies beyond is never used."""

  k_pbX: jax.Array  # [B*P, b, K*D]
  v_pbX: jax.Array
  segment_p1b: jax.Array
  last_B: jax.Array


class Queries(NamedTuple):
  """Query side of a chunk, or of all chunks with one more axis in front."""

  q_BcHD: jax.Array
  ids_BcKk: jax.Array
  slot_Bc: jax.Array
  segment_Bc: jax.Array


def _sides(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, b):
  """Queries in chunks, keys in blocks."""
  B, T, H, _ = q_BTHDh.shape
  S, K = k_BSKDh.shape[1:3]
  k = ids_BTKk.shape[3]
  query_segments, key_segments = segments or (jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32))
  q_BTHD = _whole_lanes(q_BTHDh)
  pairs = min(CHUNK_PAIRS, CHUNK_ELEMENTS // (H // K * q_BTHD.shape[-1]), (2**31 - 1) // (B * K * -(-S // b) + 1))
  chunks = -(-T // max(1, pairs // (B * K * k)))
  c = -(-T // chunks)
  queries = Queries(split(q_BTHD, c), split(ids_BTKk, c, -1), split(slots_BT, c, -1), split(query_segments, c))
  blocks = lambda x: jnp.pad(x, ((0, 0), (0, -S % b)) + ((0, 0),) * (x.ndim - 2)) if S % b else x
  k_pbX, v_pbX = (blocks(_whole_lanes(x)).reshape(-(-S // b) * B, b, -1) for x in (k_BSKDh, v_BSKDh))
  return queries, Keys(k_pbX, v_pbX, blocks(key_segments).reshape(-1, 1, b), jnp.max(slots_BT, axis=1))


def _whole_lanes(x):
  return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % LANES),)) if x.shape[-1] % LANES else x


# ----------------------------------------------------------------------------------------------------------------------
# tiles: pairs (query, block) sorted by page


class Tiles(NamedTuple):
  """Tile m is up to r queries that chose one page, (row * K + head) * P + block. Pair n*k + j is query n's choice j."""

  page_M: jax.Array
  count: jax.Array  # tiles that there are, at least 1: the first is computed even when it is empty
  query_Mr: jax.Array  # n; N where there is none
  place_Nk: jax.Array  # where each pair stands among all M*r, 0 for choices of -1
  valid_Nk: jax.Array


def _plan(queries, keys) -> Tiles:
  """Sorts the pairs of one chunk by page and cuts the run of each page into tiles."""
  B, c, K, k = queries.ids_BcKk.shape
  P, G = keys.k_pbX.shape[0] // B, queries.q_BcHD.shape[2] // K
  N, R, pages = B * c * K, B * c * K * k, B * K * P
  shared = max(1, R // pages)  # queries that choose a block, on average
  r = min(max(2 ** (shared.bit_length() - 1), -(-16 // G)), max(1, TILE_ROWS // G))
  M = min(R, R // r + pages)

  first_page_BK = (jnp.arange(B, dtype=jnp.int32)[:, None] * K + jnp.arange(K, dtype=jnp.int32)[None]) * P
  valid_BcKk = (queries.ids_BcKk >= 0) & (queries.slot_Bc >= 0)[:, :, None, None]
  page_R = jnp.where(valid_BcKk, first_page_BK[:, None, :, None] + queries.ids_BcKk, pages).reshape(R)
  index_R = jnp.arange(R, dtype=jnp.int32)
  # One 32-bit key holds page and pair, by the choice of c: a sort of it compiles in a quarter of the time of a pair's.
  key_R = lax.sort(page_R * R + index_R, is_stable=False)
  page_R, pair_R = key_R // R, key_R % R

  search = lambda ends, n, side: jnp.searchsorted(ends, jnp.arange(n, dtype=jnp.int32), side=side).astype(jnp.int32)
  start_p = search(page_R, pages + 1, 'left')  # of each page among the sorted pairs
  tiles_p = (start_p[1:] - start_p[:-1] + r - 1) // r
  end_p = jnp.cumsum(tiles_p, dtype=jnp.int32)
  first_p = end_p - tiles_p
  page_M = jnp.minimum(search(end_p, M, 'right'), pages - 1)
  sorted_M = start_p[page_M] + (jnp.arange(M, dtype=jnp.int32) - first_p[page_M]) * r
  sorted_Mr = sorted_M[:, None] + jnp.arange(r, dtype=jnp.int32)[None]
  here_Mr = sorted_Mr < start_p[page_M + 1][:, None]
  query_Mr = jnp.where(here_Mr, pair_R[jnp.minimum(sorted_Mr, R - 1)] // k, N)
  page_R, there_R = jnp.minimum(page_R, pages - 1), page_R < pages
  place_R = jnp.where(there_R, first_p[page_R] * r + index_R - start_p[page_R], 0)
  place_R = jnp.zeros(R, jnp.int32).at[pair_R].set(place_R, unique_indices=True)
  return Tiles(page_M, jnp.maximum(end_p[-1], 1), query_Mr, place_R.reshape(N, k), valid_BcKk.reshape(N, k))


def _rows(x_BcHD, queries, tiles):
  """Rows of each tile's queries, [M, r*G, D], zeros of padded queries; where there is no query, some row."""
  x_BcHD = jnp.where((queries.slot_Bc >= 0)[..., None, None], x_BcHD, 0)
  G = x_BcHD.shape[2] // queries.ids_BcKk.shape[2]
  M, r = tiles.query_Mr.shape
  return x_BcHD.reshape(-1, G, x_BcHD.shape[-1]).at[tiles.query_Mr].get(mode='clip').reshape(M, r * G, -1)


def _lanes(x_NG, y_NG, tiles, fill):
  """Two values of each query and head as rows of lanes, [M, 2, r*G]; `fill` where there is no query."""
  lanes = lambda x: x.at[tiles.query_Mr].get(mode='fill', fill_value=fill).reshape(tiles.query_Mr.shape[0], -1)
  return jnp.stack([lanes(x_NG), lanes(y_NG)], axis=1)


def _who(queries, tiles):
  """int32 [M, 2, r*G]: slot and segment; slot -1, which sees nothing, where there is no query."""
  K = queries.ids_BcKk.shape[2]
  per_head = lambda x_Bc: jnp.broadcast_to(x_Bc[:, :, None, None], (*x_Bc.shape, K, queries.q_BcHD.shape[2] // K))
  flat = lambda x_Bc: per_head(x_Bc).reshape(-1, queries.q_BcHD.shape[2] // K)
  return _lanes(flat(queries.slot_Bc), flat(queries.segment_Bc), tiles, -1)


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


def _specs(rows, keys, P, K, D):
  """BlockSpecs of a tile's rows [rows, D], its two rows of lanes, a block of one head, and the segments of a block."""
  b = keys.k_pbX.shape[1]
  row_block = lambda page: (page // (P * K)) * P + page % P
  return (
      pl.BlockSpec((1, rows, D), lambda m, page, last: (m, 0, 0)),
      pl.BlockSpec((1, 2, rows), lambda m, page, last: (m, 0, 0)),
      pl.BlockSpec((1, b, D), lambda m, page, last: (row_block(page[m]), 0, page[m] // P % K)),
      pl.BlockSpec((1, 1, b), lambda m, page, last: (row_block(page[m]), 0, 0)),
  )


def _attend(queries, keys, tiles, scale, interpret):
  """One chunk: out [B, c, H, D] and logsumexp [N, G]."""
  B, c, H, D = queries.q_BcHD.shape
  K = queries.ids_BcKk.shape[2]
  G, P, b = H // K, keys.k_pbX.shape[0] // B, keys.k_pbX.shape[1]
  M, r = tiles.query_Mr.shape
  q_MrD = _rows(queries.q_BcHD, queries, tiles)
  tile, lanes, block, segment = _specs(r * G, keys, P, K, D)
  out, stats = pl.pallas_call(
      functools.partial(_forward_kernel, P=P, K=K, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(tiles.count,),
          in_specs=[tile, lanes, block, block, segment], out_specs=[tile, lanes],
      ),
      out_shape=[
          jax.ShapeDtypeStruct(q_MrD.shape, q_MrD.dtype), jax.ShapeDtypeStruct((M, 2, r * G), jnp.float32),
      ],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
      cost_estimate=_cost(q_MrD, b, products=2, tensors=2),
      interpret=interpret, name='msa_attend_blocks',
  )(tiles.page_M, keys.last_B, q_MrD, _who(queries, tiles), keys.k_pbX, keys.v_pbX, keys.segment_p1b)
  top, total = (stats[:, i].reshape(M * r, G) for i in (0, 1))
  logsumexp_NG = logsumexp_of_choices(top, total, tiles)
  weights_NkG = jnp.exp(top[tiles.place_Nk] - logsumexp_NG[:, None])
  weights_NkG = jnp.where(tiles.valid_Nk[..., None], weights_NkG, 0)
  out_NGD = _sum_of_choices(out.reshape(M * r, G, D), weights_NkG, tiles)
  return out_NGD.reshape(B, c, H, D).astype(queries.q_BcHD.dtype), logsumexp_NG


def _attend_backward(queries, keys, tiles, logsumexp_BcH, delta_BcH, dout_BcHD, dkeys, scale, interpret):
  """One chunk: the gradients of keys and values so far with its own added, in place, and dq [B, c, H, D]."""
  B, c, H, D = queries.q_BcHD.shape
  K = queries.ids_BcKk.shape[2]
  G, P, b = H // K, keys.k_pbX.shape[0] // B, keys.k_pbX.shape[1]
  M, r = tiles.query_Mr.shape
  q_MrD, dout_MrD = _rows(queries.q_BcHD, queries, tiles), _rows(dout_BcHD, queries, tiles)
  stats = _lanes(logsumexp_BcH.reshape(-1, G), delta_BcH.reshape(-1, G), tiles, 0)
  tile, lanes, block, segment = _specs(r * G, keys, P, K, D)
  dq, *dkeys = pl.pallas_call(
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
      tiles.page_M, keys.last_B, q_MrD, dout_MrD, _who(queries, tiles), stats,
      keys.k_pbX, keys.v_pbX, keys.segment_p1b, *dkeys,
  )
  dq_NGD = _sum_of_choices(dq.reshape(M * r, G, D), tiles.valid_Nk[..., None].astype(jnp.float32), tiles)
  return tuple(dkeys), dq_NGD.reshape(B, c, H, D).astype(queries.q_BcHD.dtype)


def _sum_of_choices(rows, weights_NkG, tiles):
  """[places, G, D] -> [N, G, D] float32: each query's choices by their weights, one gather at a time.

  A loop, for the compiler makes of sixteen gathers in a row sixteen buffers: 136 MiB where the loop needs 24.
  """
  def add(sum_NGD, choice):
    place_N, weights_NG = choice
    return sum_NGD + weights_NG[..., None] * rows[place_N], None

  N = tiles.place_Nk.shape[0]
  return lax.scan(add, jnp.zeros((N, *rows.shape[1:])), (tiles.place_Nk.T, jnp.moveaxis(weights_NkG, 1, 0)))[0]


def _cost(q_MrD, b, products, tensors):
  M, rows, D = q_MrD.shape
  return pl.CostEstimate(
      flops=2 * products * M * rows * b * D, transcendentals=M * rows * b,
      bytes_accessed=(tensors * q_MrD.size + 2 * M * b * D) * q_MrD.dtype.itemsize,
  )


# ----------------------------------------------------------------------------------------------------------------------
# all chunks


def _forward(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret):
  B, T, H, Dh = q_BTHDh.shape
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  chunks, keys = _sides(*inputs, block_size)

  def one_chunk(queries):
    out, logsumexp_NG = _attend(queries, keys, _plan(queries, keys), Dh**-0.5, interpret)
    return out, logsumexp_NG.reshape(B, -1, H)  # H in the lanes; G alone would be padded to 128

  out, logsumexp = lax.map(one_chunk, chunks)
  out_BTHDh, logsumexp_BTH = join(out, T)[..., :Dh], join(logsumexp, T)
  logsumexp_BTKG = logsumexp_BTH.reshape(B, T, k_BSKDh.shape[2], -1)
  return (out_BTHDh, logsumexp_BTKG), (inputs, out_BTHDh, logsumexp_BTH)


def _backward(block_size, interpret, residuals, cotangents):
  inputs, out_BTHDh, logsumexp_BTH = residuals
  dout_BTHDh, _ = cotangents
  q_BTHDh, k_BSKDh, v_BSKDh, *_ = inputs
  B, T, _, Dh = q_BTHDh.shape
  S, K = k_BSKDh.shape[1:3]
  chunks, keys = _sides(*inputs, block_size)
  c = chunks.q_BcHD.shape[2]
  delta_BTH = jnp.sum(out_BTHDh.astype(jnp.float32) * dout_BTHDh.astype(jnp.float32), axis=-1)
  dout = split(_whole_lanes(dout_BTHDh.astype(q_BTHDh.dtype)), c)

  def one_chunk(dkeys, chunk):
    queries, *rest = chunk
    return _attend_backward(queries, keys, _plan(queries, keys), *rest, dkeys, Dh**-0.5, interpret)

  start = (jnp.zeros(keys.k_pbX.shape, jnp.float32),) * 2
  (dk, dv), dq = lax.scan(one_chunk, start, (chunks, split(logsumexp_BTH, c), split(delta_BTH, c), dout))
  unblock = lambda x, like: x.reshape(B, -1, K, keys.k_pbX.shape[2] // K)[:, :S, :, :Dh].astype(like.dtype)
  return join(dq, T)[..., :Dh], unblock(dk, k_BSKDh), unblock(dv, v_BSKDh), None, None, None


attend_blocks.defvjp(_forward, _backward)
