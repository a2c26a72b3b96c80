"""Attention over selected blocks as Pallas kernels for TPU; `sparse_pairs` sorts and cuts what they are given.

A chunk's queries of one kv head, and what has been added up for each, stay in VMEM, of which a TPU core has 64 MiB or
more; blocks of keys come one after another, each for the tiles of queries that chose it. No pair's row is written to
memory or read from it: keys outside and queries gathered, as `sparse_pairs.attend_in_tiles` has it for GPUs, would move
24 KiB for each pair of 16 heads, and libtpu's gathers wait for every 128 rows.

Forward, scores stand as [r*G, b], a query's heads in sublanes; a tile raises its queries' maxima, and their outputs and
sums of weights fade by as much and take the tile's in. Sums are kept per lane and added up at the end. A step of the
grid is several tiles: what one of them waits for, the others fill. Backward, a block stays in VMEM from tile to tile of
its page; the gradients of its keys and values grow there and are written once per page and chunk; scores stand as
[b, r*G], so that two of three gradients are plain products.

`scripts/tpu_schedule.py` counts what a step of the grid costs beside its products. The grid's length is counted at run
time; copies are not checked against bounds that a plan keeps by construction.

Letters as in `sparse_pairs`; N queries of a chunk, L = 128 lanes, u = L/G queries whose heads fill the lanes. G is
padded to a power of two that fills sublanes.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import sparse_pairs
from mmx.kernels_pallas.chunks import kernel_product
from mmx.kernels_pallas.sparse import MASKED
from mmx.kernels_pallas.sparse_pairs import LANES, whole_lanes

TILE_ROWS = 512  # most r*G: what a step of the grid costs beside its products is less than they are
STEP_QUERIES = 256  # of a step forward, in 16 tiles at most
MOST_TILES = 16
AT_ONCE = 4  # queries
VMEM_BYTES = 44 * 2**20  # of a chunk's queries and what is added up for them; v5p has 64 MiB
MORE_VMEM_BYTES = 10 * 2**20  # a step's scores, and what the compiler keeps
STEP_BYTES = 2**20  # of a step's blocks of keys at most; as many of values, each twice for the copies
LOG2E = math.log2(math.e)
IN_PLACE = pl.BlockSpec(memory_space=pl.ANY)


def unsupported(q_BTHDh, k_BSKDh, block_size, top_k) -> str:
  """'' where `attend_blocks` compiles for TPU, else one reason. Takes anything with shape and dtype."""
  if block_size % 16 or not 16 <= block_size <= 256:
    return f'block_size {block_size}; multiples of 16 from 16 to 256 are supported'
  reason = sparse_pairs.unsupported(q_BTHDh, k_BSKDh, block_size, top_k, LANES)
  if reason:
    return reason
  rows, most = q_BTHDh.shape[0], _most_queries(q_BTHDh, k_BSKDh.shape[2])
  return f'{rows} rows of queries; at most {most} are supported' if rows > most else ''


def _most_queries(q_BTHDh, K):
  """Most queries of a chunk."""
  size = q_BTHDh.dtype.itemsize
  G, D = _heads(q_BTHDh, K), -(-q_BTHDh.shape[-1] // LANES) * LANES
  return VMEM_BYTES // (G * (D * (size + 4) + 2 * LANES * 4))


def _heads(q_BTHDh, K):
  """Of a kv head: a slice of fewer is no whole tile of memory."""
  return max(32 // q_BTHDh.dtype.itemsize, 2 ** (q_BTHDh.shape[2] // K - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_blocks(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret=False):
  """`sparse_pairs.attend_in_tiles` by the kernels below: (out, logsumexp); `interpret` as `pl.pallas_call` takes it."""
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  return _forward(*inputs, block_size, interpret)[0]


def _forward(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret):
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  B, T, H, Dh = q_BTHDh.shape
  K = k_BSKDh.shape[2]
  q_BTXD, queries, keys, starts = _sides(*inputs, block_size)
  attend = functools.partial(attend_chunk, keys=keys, q_BTXD=q_BTXD, K=K, scale=Dh**-0.5, interpret=interpret)
  out_BTXD, logsumexp = _each_chunk_and_head(attend, lax.empty(q_BTXD.shape, q_BTXD.dtype), queries, keys, starts)
  n, _, N, _ = logsumexp.shape
  c = N // B
  logsumexp_BncKG = jnp.moveaxis(logsumexp.reshape(n, K, B, c, -1), (2, 0), (0, 1)).swapaxes(2, 3)[..., : H // K]
  before_BTKG = logsumexp_BncKG[:, :-1].reshape(B, (n - 1) * c, K, H // K)[:, : T - c]
  logsumexp_BTKG = jnp.concatenate([before_BTKG, logsumexp_BncKG[:, -1]], axis=1)
  out_BTHDh = _real_heads(out_BTXD, K, H)[..., :Dh]
  return (out_BTHDh, logsumexp_BTKG), (inputs, out_BTHDh, logsumexp_BTKG)


def _backward(block_size, interpret, residuals, cotangents):
  inputs, out_BTHDh, logsumexp_BTKG = residuals
  dout_BTHDh, _ = cotangents
  q_BTHDh, k_BSKDh, v_BSKDh, *_ = inputs
  B, T, H, Dh = q_BTHDh.shape
  S, K = k_BSKDh.shape[1:3]
  q_BTXD, queries, keys, starts = _sides(*inputs, block_size)
  delta_BTH1 = jnp.sum(out_BTHDh.astype(jnp.float32) * dout_BTHDh.astype(jnp.float32), axis=-1, keepdims=True)
  stats = [_whole_heads(x, q_BTHDh, K)[..., 0] for x in (logsumexp_BTKG.reshape(delta_BTH1.shape), delta_BTH1)]
  rows = q_BTXD, _whole_heads(whole_lanes(dout_BTHDh.astype(q_BTHDh.dtype)), q_BTHDh, K)
  differentiate = functools.partial(
      attend_chunk_backward, keys=keys, rows=rows, stats=stats, K=K, scale=Dh**-0.5, interpret=interpret
  )
  start = lax.empty(q_BTXD.shape, q_BTXD.dtype), *[jnp.zeros(keys.k_pbX.shape, jnp.float32)] * 2
  (dq_BTXD, dk, dv), _ = _each_chunk_and_head(differentiate, start, queries, keys, starts)
  unblock = lambda x, like: x.reshape(B, -1, K, keys.k_pbX.shape[2] // K)[:, :S, :, :Dh].astype(like.dtype)
  return _real_heads(dq_BTXD, K, H)[..., :Dh], unblock(dk, k_BSKDh), unblock(dv, v_BSKDh), None, None, None


attend_blocks.defvjp(_forward, _backward)


class Queries(NamedTuple):
  """What decides which keys a query sees, of all queries or of a chunk."""

  ids_BTKk: jax.Array
  slots_BT: jax.Array
  segments_BT: jax.Array


def _sides(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size):
  """(q [B, T, X, D] of K*G heads, Queries, keys in blocks, where each chunk starts and what it leaves to the next)."""
  B, T = q_BTHDh.shape[:2]
  K = k_BSKDh.shape[2]
  q_BTXD = _whole_heads(whole_lanes(q_BTHDh), q_BTHDh, K)
  query_segments, key_segments = segments or (jnp.zeros((B, T), jnp.int32), None)
  c = chunk_length(q_BTHDh, k_BSKDh, ids_BTKk.shape[3], block_size)
  chunks = -(-T // c)
  starts = jnp.minimum(jnp.arange(chunks + 1, dtype=jnp.int32) * c, T - c).at[chunks].set(T)
  keys = sparse_pairs.keys_in_blocks(k_BSKDh, v_BSKDh, slots_BT, key_segments, block_size)
  queries = Queries(ids_BTKk, slots_BT, query_segments)
  return q_BTXD, queries, keys, (starts, c, TILE_ROWS // (q_BTXD.shape[2] // K))


def chunk_length(q_BTHDh, k_BSKDh, top_k, block_size):
  """Queries of each row in a chunk. Takes anything with shape and dtype."""
  B, T = q_BTHDh.shape[:2]
  S, K = k_BSKDh.shape[1:3]
  most = min(_most_queries(q_BTHDh, K), sparse_pairs.most_pairs(B * -(-S // block_size)) // top_k)
  return -(-T // -(-T // max(1, most // B)))


def _whole_heads(x_BTHX, q_BTHDh, K):
  """[B, T, H, X] with each kv head's heads padded by zeros."""
  B, T, H, X = x_BTHX.shape
  more = _heads(q_BTHDh, K) - H // K
  x_BTHX = jnp.pad(x_BTHX.reshape(B, T, K, H // K, X), ((0, 0),) * 3 + ((0, more), (0, 0))) if more else x_BTHX
  return x_BTHX.reshape(B, T, -1, X)


def _real_heads(x_BTHX, K, H):
  """`_whole_heads` undone."""
  B, T, _, X = x_BTHX.shape
  return x_BTHX.reshape(B, T, K, -1, X)[:, :, :, : H // K].reshape(B, T, H, X)


def _each_chunk_and_head(call, carried, queries, keys, starts):
  """What `call(plan, carried)` makes of what is carried, chunk by chunk and kv head by kv head; and gives of each."""
  starts, c, most = starts

  def one_chunk(carried, ends):
    start, next_start = ends
    chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, c, axis=1), queries)
    mine_c = start + jnp.arange(c, dtype=jnp.int32) < next_start
    stacked, r = plans(chunk._replace(slots_BT=jnp.where(mine_c, chunk.slots_BT, -1)), keys, start, most)
    return lax.scan(lambda carried, plan: call((plan, r), carried), carried, stacked)

  return lax.scan(one_chunk, carried, (starts[:-1], starts[1:]))


class Plan(NamedTuple):
  """What the kernels read as scalars. N stands for no query: its slot is -1."""

  block_M: jax.Array  # row * P + block of each tile
  first_slot_M: jax.Array  # of the block
  first_M1: jax.Array  # of each tile's pairs among those sorted; `sparse_pairs.Tiles`
  query_R: jax.Array  # of each pair, and r more
  slot_N1: jax.Array
  segment_N1: jax.Array
  place: jax.Array  # the chunk's first query of its row, kv head, tiles


def plans(chunk, keys, start, most):
  """(Plans of a chunk's kv heads, stacked; r). All at once, for each step of XLA's costs 2000 cycles, much work or little.
  """
  B, c, K, _ = chunk.ids_BTKk.shape
  P, b = keys.k_pbX.shape[0] // B, keys.k_pbX.shape[1]
  one_more = lambda x_Bc, value: jnp.pad(x_Bc.reshape(-1), (0, 1), constant_values=value)

  def of_head(ids_Bck, head):
    tiles = sparse_pairs.plan(ids_Bck[:, :, None], chunk.slots_BT, P, 1, most, MOST_TILES)
    r = tiles.query_Mr.shape[1]
    return Plan(
        tiles.page_M, tiles.page_M % P * b, tiles.first_M1, jnp.pad(tiles.query_R, (0, r)),
        one_more(chunk.slots_BT, -1), one_more(chunk.segments_BT, 0), jnp.stack([start, head, tiles.count]),
    ), tiles.query_Mr

  stacked, query_KMr = jax.vmap(of_head, (2, 0))(chunk.ids_BTKk, jnp.arange(K, dtype=jnp.int32))
  return stacked, query_KMr.shape[2]


def tiles_of_a_step(r, block_bytes):
  """Forward, of tiles of r queries: a power of two, at most MOST_TILES."""
  most = max(1, min(STEP_QUERIES // r, MOST_TILES, STEP_BYTES // block_bytes))
  return 2 ** (most.bit_length() - 1)


def attend_chunk(plan, out_BTXD, *, keys, q_BTXD, K, scale, interpret=False):
  """Of a chunk and kv head: `out_BTXD` with its outputs written in, and logsumexp float32 [N, G]."""
  plan, r = plan
  rows, N, G, D = _chunk(q_BTXD, plan, K)
  b = keys.k_pbX.shape[1]
  W = tiles_of_a_step(r, b * D * q_BTXD.dtype.itemsize)
  block = lambda i: pl.BlockSpec((1, b, D), lambda m, block_M, *scalars: (block_M[m * W + i], 0, scalars[-1][1]))
  segment = lambda i: pl.BlockSpec((1, 1, b), lambda m, block_M, *_: (block_M[m * W + i], 0, 0))
  blocks, segments = ([make(i) for i in range(W)] for make in (block, segment))
  state = lambda X, dtype=jnp.float32: pltpu.VMEM((rows, G, X), dtype)
  M, scalars = plan.block_M.size, len(plan)
  out, logsumexp = pl.pallas_call(
      functools.partial(_attend_kernel, scale=scale, r=r),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=scalars, grid=(pl.cdiv(plan.place[2], W),),
          in_specs=[IN_PLACE, IN_PLACE, blocks, blocks, segments],
          out_specs=[IN_PLACE, pl.BlockSpec((rows * G // LANES, LANES), lambda *_: (0, 0))],
          scratch_shapes=[
              state(D, q_BTXD.dtype), state(D), state(LANES), state(LANES), pltpu.SemaphoreType.DMA,
          ],
      ),
      out_shape=[
          jax.ShapeDtypeStruct(out_BTXD.shape, out_BTXD.dtype),
          jax.ShapeDtypeStruct((rows * G // LANES, LANES), jnp.float32),
      ],
      input_output_aliases={scalars + 1: 0},
      compiler_params=_params(rows * G * (D * (q_BTXD.dtype.itemsize + 4) + 2 * LANES * 4) + 4 * STEP_BYTES),
      cost_estimate=_cost(M, r * G, b, D, N, q_BTXD.dtype, products=2, tensors=2),
      interpret=interpret, name='msa_attend_blocks',
  )(*plan, q_BTXD, out_BTXD, [keys.k_pbX] * W, [keys.v_pbX] * W, [keys.segment_p1b] * W)
  return out, logsumexp.reshape(rows, G)[:N]


def attend_chunk_backward(plan, grown, *, keys, rows, stats, K, scale, interpret=False):
  """Of a chunk and kv head: dq of all with its own written in, and the keys' and values' gradients with its own added,
  float32 [B*P, b, K*D]. `stats`, float32 [B, T, K*G]: logsumexp, and <out, dout>.
  """
  plan, r = plan
  dq_BTXD, dk_pbX, dv_pbX = grown
  padded_rows, N, G, D = _chunk(rows[0], plan, K)
  b, scalars = keys.k_pbX.shape[1], len(plan)
  block = pl.BlockSpec((1, b, D), lambda m, block_M, *scalars: (block_M[m], 0, scalars[-1][1]))
  segment = pl.BlockSpec((1, 1, b), lambda m, block_M, *_: (block_M[m], 0, 0))
  B = dq_BTXD.shape[0]
  of_chunk = lambda x: lax.dynamic_slice(x, (0, plan.place[0], plan.place[1] * G), (B, N // B, G)).reshape(N, G)
  lanes = [jnp.tile(jnp.pad(of_chunk(x), ((0, 1), (0, 0))), (1, LANES // G)) for x in stats]
  row_stats = pl.BlockSpec((N + 1, LANES), lambda *_: (0, 0))
  state = lambda dtype: pltpu.VMEM((padded_rows, G, D), dtype)
  dtype = dq_BTXD.dtype
  M = plan.block_M.size
  dq, dk, dv = pl.pallas_call(
      functools.partial(_backward_kernel, scale=scale, r=r),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=scalars, grid=(plan.place[2],),
          in_specs=[IN_PLACE] * 3 + [row_stats] * 2 + [block, block, segment, block, block],
          out_specs=[IN_PLACE, block, block],
          scratch_shapes=[state(dtype), state(dtype), state(jnp.float32), pltpu.SemaphoreType.DMA],
      ),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in grown],
      input_output_aliases={scalars + 2: 0, scalars + 8: 1, scalars + 9: 2},  # blocks not chosen keep what they have
      compiler_params=_params(padded_rows * G * D * (2 * dtype.itemsize + 4) + 4 * N * LANES * 4),
      cost_estimate=_cost(M, r * G, b, D, N, dtype, products=5, tensors=3),
      interpret=interpret, name='msa_attend_blocks_backward',
  )(*plan, *rows, dq_BTXD, *lanes, keys.k_pbX, keys.v_pbX, keys.segment_p1b, dk_pbX, dv_pbX)
  return (dq.reshape(dq_BTXD.shape), dk, dv), None


def _chunk(q_BTXD, plan, K):
  """Rows held in VMEM, N of them queries and the next for tiles that are not full; G, D."""
  D = q_BTXD.shape[-1]
  N, G = plan.slot_N1.size - 1, q_BTXD.shape[-2] // K
  together = LANES // G
  return -(-(N + 1) // together) * together, N, G, D


def _params(size):
  limit = size + MORE_VMEM_BYTES
  return pltpu.CompilerParams(
      dimension_semantics=('arbitrary',), disable_bounds_checks=True, vmem_limit_bytes=limit
  )


def _cost(M, rows, b, D, N, dtype, products, tensors):
  G = rows  # of one query at least
  return pl.CostEstimate(
      flops=2 * products * M * rows * b * D, transcendentals=M * rows * b,
      bytes_accessed=(tensors * N * G * D + 2 * M * b * D) * dtype.itemsize,
  )


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def visible(limit_1R, segment_1R, segment_ref):
  """Which key of a block each row sees, [b, R]: up to the row's limit, and of its segment."""
  b = segment_ref.shape[2]
  segment_b1 = jnp.broadcast_to(segment_ref[0], (8, b)).T[:, :1]
  return (lax.broadcasted_iota(jnp.int32, (b, 1), 0) <= limit_1R) & (segment_b1 == segment_1R)


def _queries_of(m, r, first_ref, query_ref, N):
  """The queries of tile m; N where there is none."""
  first, count = first_ref[m], first_ref[m + 1] - first_ref[m]
  return [jnp.where(j < count, query_ref[first + j], N) for j in range(r)]


def _some(queries):
  """(place of the first, queries) of a few at a time. What is kept of each is read before any of them is written: the
  compiler does not know that they are not the same, and would wait for each one's writing before the next's reading.
  """
  return [(j, queries[j : j + AT_ONCE]) for j in range(0, len(queries), AT_ONCE)]


def _raise(top_ref, some, own_X1):
  """Takes the maxima of some queries in: their new maxima, and by what sums above the old ones fade, [X, L]."""
  old_XL = jnp.concatenate([top_ref[n] for n in some])
  top_XL = jnp.maximum(old_XL, own_X1)
  for n, top in zip(some, jnp.split(top_XL, len(some)), strict=True):
    top_ref[n] = top
  return top_XL, jnp.exp2(old_XL - top_XL)


def _add(sum_ref, some, x_XD, fade_XD=1):
  """Adds the rows of some queries to sums of theirs that fade."""
  sum_XD = jnp.concatenate([sum_ref[n] for n in some]) * fade_XD + x_XD
  for n, sum_GD in zip(some, jnp.split(sum_XD, len(some)), strict=True):
    sum_ref[n] = sum_GD


def _wide(x_RL, width):
  """Equal lanes, as many as are asked for."""
  return x_RL[:, :width] if width <= LANES else jnp.tile(x_RL, (1, -(-width // LANES)))[:, :width]


def _chunk_copies(place_ref, memory_ref, held_ref, sem, N, out=False):
  """Copies between a chunk's queries of one kv head in memory, [B, T, K*G, D], and [rows, G, D] in VMEM, row by row."""
  B, G = memory_ref.shape[0], held_ref.shape[1]
  c = N // B
  heads = pl.ds(pl.multiple_of(place_ref[1] * G, G), G)
  ends = [(memory_ref.at[row, pl.ds(place_ref[0], c), heads], held_ref.at[pl.ds(row * c, c)]) for row in range(B)]
  return [pltpu.make_async_copy(*(pair[::-1] if out else pair), sem) for pair in ends]


def _start(copies):
  for copy in copies:
    copy.start()


def _wait(copies):
  for copy in copies:
    copy.wait()


def _attend_kernel(
    block_ref, first_slot_ref, first_ref, query_ref, slot_ref, segment_ref, place_ref,
    q_all_ref, before_ref, k_refs, v_refs, key_segment_refs,
    out_all_ref, logsumexp_ref, q_ref, out_ref, top_ref, total_ref, sem, *, scale, r):
  step, W, (_, b, D) = pl.program_id(0), len(k_refs), k_refs[0].shape
  rows, G, _ = q_ref.shape
  N, u = slot_ref.shape[0] - 1, LANES // G

  @pl.when(step == 0)
  def _():
    copies = _chunk_copies(place_ref, q_all_ref, q_ref, sem, N)
    _start(copies)
    q_ref[N:] = jnp.zeros((rows - N, G, D), q_ref.dtype)

    @pl.loop(0, rows // u)
    def _(i):
      queries = pl.ds(i * u, u)
      out_ref[queries] = jnp.zeros((u, G, D), jnp.float32)
      top_ref[queries] = jnp.full((u, G, LANES), MASKED / 2, jnp.float32)
      total_ref[queries] = jnp.zeros((u, G, LANES), jnp.float32)

    _wait(copies)

  slot_1b = lax.broadcasted_iota(jnp.int32, (1, b), 1)
  for i in range(W):
    queries = _queries_of(step * W + i, r, first_ref, query_ref, N)
    here_1b = slot_1b + first_slot_ref[step * W + i]
    seen = lambda n: (here_1b <= slot_ref[n]) & (key_segment_refs[i][0] == segment_ref[n])
    q_RD = jnp.concatenate([q_ref[n] for n in queries])
    scores_RGb = kernel_product(q_RD, k_refs[i][0], 1, 1).reshape(r, G, b) * (scale * LOG2E)
    scores_Rb = jnp.concatenate([jnp.where(seen(n), scores_RGb[j], MASKED) for j, n in enumerate(queries)])
    own_R1 = jnp.max(scores_Rb, axis=1, keepdims=True)
    tops, fades = zip(*[
        _raise(top_ref, some, own_R1[j * G : (j + len(some)) * G]) for j, some in _some(queries)
    ])
    weights_Rb = jnp.exp2(scores_Rb - _wide(jnp.concatenate(tops), b))
    out_RD = kernel_product(weights_Rb.astype(v_refs[i].dtype), v_refs[i][0], 1, 0)
    fade_RL, weights_RL = jnp.concatenate(fades), _per_lane(weights_Rb)
    for j, some in _some(queries):
      of_some = slice(j * G, (j + len(some)) * G)
      _add(out_ref, some, out_RD[of_some], _wide(fade_RL[of_some], D))
      _add(total_ref, some, weights_RL[of_some], fade_RL[of_some])

  @pl.when(step == pl.cdiv(place_ref[2], W) - 1)
  def _():
    @pl.loop(0, rows // u)
    def _(i):
      queries = pl.ds(i * u, u)
      total_R1 = jnp.sum(total_ref[queries].reshape(LANES, LANES), axis=1, keepdims=True)
      total_RL = jnp.broadcast_to(total_R1, (LANES, LANES))
      some_RL = jnp.where(total_RL > 0, total_RL, 1)
      out_RD = out_ref[queries].reshape(LANES, D) / _wide(some_RL, D)
      q_ref[queries] = out_RD.astype(q_ref.dtype).reshape(u, G, D)
      top_RL = top_ref[queries].reshape(LANES, LANES)
      logsumexp_RL = jnp.where(total_RL > 0, top_RL / LOG2E + jnp.log(some_RL), 0)
      logsumexp_ref[pl.ds(i, 1)] = logsumexp_RL.T[:1]

    copies = _chunk_copies(place_ref, out_all_ref, q_ref, sem, N, out=True)
    _start(copies)
    _wait(copies)


def _per_lane(weights_Gb):
  """[G, L] of [G, b]: sums over keys that are left to be added up over lanes."""
  G, b = weights_Gb.shape
  whole = [weights_Gb[:, i : i + LANES] for i in range(0, b - LANES + 1, LANES)]
  rest = b % LANES
  if rest:
    sum_G1 = jnp.sum(weights_Gb[:, b - rest :], axis=1, keepdims=True) / LANES
    whole.append(jnp.broadcast_to(sum_G1, (G, LANES)))
  return sum(whole[1:], whole[0])


def _backward_kernel(
    block_ref, first_slot_ref, first_ref, query_ref, slot_ref, segment_ref, place_ref,
    q_all_ref, dout_all_ref, before_ref, logsumexp_ref, delta_ref, k_ref, v_ref, key_segment_ref, dk_before_ref,
    dv_before_ref, dq_all_ref, dk_ref, dv_ref, q_ref, dout_ref, dq_ref, sem, *, scale, r):
  m = pl.program_id(0)
  rows, G, D = q_ref.shape
  N, u = slot_ref.shape[0] - 1, LANES // G

  @pl.when(m == 0)
  def _():
    pairs = (q_all_ref, q_ref), (dout_all_ref, dout_ref)
    copies = [copy for pair in pairs for copy in _chunk_copies(place_ref, *pair, sem, N)]
    _start(copies)
    q_ref[N:] = jnp.zeros((rows - N, G, D), q_ref.dtype)
    dout_ref[N:] = jnp.zeros((rows - N, G, D), q_ref.dtype)

    @pl.loop(0, rows // u)
    def _(i):
      dq_ref[pl.ds(i * u, u)] = jnp.zeros((u, G, D), jnp.float32)

    _wait(copies)

  @pl.when((m == 0) | (block_ref[m] != block_ref[jnp.maximum(m - 1, 0)]))
  def _():
    dk_ref[...] = dk_before_ref[...]
    dv_ref[...] = dv_before_ref[...]

  queries = _queries_of(m, r, first_ref, query_ref, N)
  group_1L = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // G
  in_lanes = lambda of_query: _in_lanes([of_query(n) for n in queries], group_1L, G)
  limit_1R = in_lanes(lambda n: slot_ref[n] - first_slot_ref[m])
  segment_1R = in_lanes(lambda n: segment_ref[n])
  logsumexp_1R, delta_1R = (in_lanes(lambda n: ref[pl.ds(n, 1)]) for ref in (logsumexp_ref, delta_ref))

  q_RD, dout_RD = (jnp.concatenate([ref[n] for n in queries]) for ref in (q_ref, dout_ref))
  k_bD, v_bD = k_ref[0], v_ref[0]
  scores_bR = kernel_product(k_bD, q_RD, 1, 1) * (scale * LOG2E) - logsumexp_1R * LOG2E
  weights_bR = jnp.exp2(jnp.where(visible(limit_1R, segment_1R, key_segment_ref), scores_bR, MASKED))
  dscores_bR = (weights_bR * (kernel_product(v_bD, dout_RD, 1, 1) - delta_1R) * scale).astype(k_bD.dtype)
  dk_ref[0] += kernel_product(dscores_bR, q_RD, 1, 0)
  dv_ref[0] += kernel_product(weights_bR.astype(v_bD.dtype), dout_RD, 1, 0)
  dq_RD = kernel_product(dscores_bR, k_bD, 0, 0)
  for j, some in _some(queries):
    _add(dq_ref, some, dq_RD[j * G : (j + len(some)) * G])

  @pl.when(m == place_ref[2] - 1)
  def _():
    @pl.loop(0, rows // u)
    def _(i):
      queries = pl.ds(i * u, u)
      q_ref[queries] = dq_ref[queries].astype(q_ref.dtype)

    copies = _chunk_copies(place_ref, dq_all_ref, q_ref, sem, N, out=True)
    _start(copies)
    _wait(copies)


def _in_lanes(values, group_1L, G):
  """[1, r*G]: each query's value, a scalar or [1, L] of its G heads again and again, in the lanes of its heads."""
  u, parts = LANES // G, []
  for first in range(0, len(values), u):
    part_1L = jnp.broadcast_to(values[first], group_1L.shape)
    for i, value in enumerate(values[first + 1 : first + u], 1):
      part_1L = jnp.where(group_1L == i, value, part_1L)
    parts.append(part_1L)
  return jnp.concatenate(parts, axis=1)[:, : len(values) * G]
