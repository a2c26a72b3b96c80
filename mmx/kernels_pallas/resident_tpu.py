"""Kernels for TPU whose queries stay in VMEM while blocks of keys pass by: what attention over selected blocks and the
divergence of its index branch share. A chunk's queries of one kv head, and what is added up for each, are held in VMEM,
of which a TPU core has 64 MiB or 128; each block of keys comes for the tiles of queries that chose it.

No pair's row is written to memory or read from it: keys outside and queries gathered, as `sparse_pairs.attend_in_tiles`
has it for GPUs, would move 24 KiB for each pair of 16 heads, and libtpu's gathers wait for every 128 rows.

Letters as in `sparse_pairs`; X = K*G heads as they are held, N queries of a chunk, L = 128 lanes, u = L/G queries whose
heads fill the lanes. G is padded to a power of two that fills sublanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import sparse_pairs
from mmx.kernels_pallas.sparse_pairs import LANES, whole_lanes

TILE_ROWS = 512  # most r*G: what a step of the grid costs beside its products is less than they are
MOST_TILES = 16  # of a step of the grid
AT_ONCE = 4  # queries
MOST_PAIRS = 2**16  # of a chunk: sorts of 2**17 take libtpu minutes to compile
LEAST_VMEM = 64 * 2**20  # bytes of a core of v5p, where it is not known which chip it will be
OTHER_VMEM = 20 * 2**20  # of it not for what a chunk's queries hold
MORE_VMEM_BYTES = 10 * 2**20  # a step's scores, and what the compiler keeps
IN_PLACE = pl.BlockSpec(memory_space=pl.ANY)


class Queries(NamedTuple):
  """What decides which keys a query sees, of all queries or of a chunk."""

  ids_BTKk: jax.Array
  slots_BT: jax.Array
  segments_BT: jax.Array


def sides(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size):
  """(q [B, T, X, D] of K*G heads, Queries, keys in blocks, where each chunk starts and what it leaves to the next)."""
  B, T = q_BTHDh.shape[:2]
  K = k_BSKDh.shape[2]
  q_BTXD = whole_heads(whole_lanes(q_BTHDh), q_BTHDh, K)
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
  pairs = min(MOST_PAIRS, sparse_pairs.most_pairs(B * -(-S // block_size)))
  most = min(most_queries(q_BTHDh, K), pairs // top_k)
  return -(-T // -(-T // max(1, most // B)))


def whole_heads(x_BTHX, q_BTHDh, K):
  """[B, T, H, X] with each kv head's heads padded by zeros."""
  B, T, H, X = x_BTHX.shape
  more = heads_held(q_BTHDh, K) - H // K
  x_BTHX = jnp.pad(x_BTHX.reshape(B, T, K, H // K, X), ((0, 0),) * 3 + ((0, more), (0, 0))) if more else x_BTHX
  return x_BTHX.reshape(B, T, -1, X)


def real_heads(x_BTHX, K, H):
  """`whole_heads` undone."""
  B, T, _, X = x_BTHX.shape
  return x_BTHX.reshape(B, T, K, -1, X)[:, :, :, : H // K].reshape(B, T, H, X)


def each_chunk_and_head(call, carried, queries, keys, starts, least=1):
  """What `call(plan, carried)` makes of what is carried, chunk by chunk and kv head by kv head; and gives of each."""
  starts, c, most = starts

  def one_chunk(carried, ends):
    start, next_start = ends
    chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, c, axis=1), queries)
    mine_c = start + jnp.arange(c, dtype=jnp.int32) < next_start
    stacked, r = plans(chunk._replace(slots_BT=jnp.where(mine_c, chunk.slots_BT, -1)), keys, start, least, most)
    return lax.scan(lambda carried, plan: call((plan, r), carried), carried, stacked)

  return lax.scan(one_chunk, carried, (starts[:-1], starts[1:]))


def joined(x_nKNX, B, T):
  """[B, T, K, X] of what `each_chunk_and_head` gave of each; the last chunk begins within the one before."""
  n, K, N, X = x_nKNX.shape
  x_BncKX = x_nKNX.reshape(n, K, B, N // B, X).transpose(2, 0, 3, 1, 4)
  before_BTKX = x_BncKX[:, :-1].reshape(B, (n - 1) * (N // B), K, X)[:, : T - N // B]
  return jnp.concatenate([before_BTKX, x_BncKX[:, -1]], axis=1)


class Plan(NamedTuple):
  """What the kernels read as scalars. N stands for no query: its slot is -1."""

  block_M: jax.Array  # row * P + block of each tile
  first_slot_M: jax.Array  # of the block
  first_M1: jax.Array  # of each tile's pairs among those sorted; `sparse_pairs.Tiles`
  query_R: jax.Array  # of each pair, and r more
  slot_N1: jax.Array
  segment_N1: jax.Array
  whole_p: jax.Array  # 1 for pages of `seen_whole`, else 0
  place: jax.Array  # the chunk's first query of its row, kv head, tiles


def plans(chunk, keys, start, least, most):
  """(Plans of a chunk's kv heads, stacked; r). All at once: each step of XLA's costs 2000 cycles, much work or little."""
  B, c, K, _ = chunk.ids_BTKk.shape
  P, b = keys.k_pbX.shape[0] // B, keys.k_pbX.shape[1]
  whole_p = seen_whole(chunk, keys).astype(jnp.int32)
  one_more = lambda x_Bc, value: jnp.pad(x_Bc.reshape(-1), (0, 1), constant_values=value)

  def of_head(ids_Bck, head):
    tiles = sparse_pairs.plan(ids_Bck[:, :, None], chunk.slots_BT, P, least, most, MOST_TILES)
    r = tiles.query_Mr.shape[1]
    return Plan(
        tiles.page_M, tiles.page_M % P * b, tiles.first_M1, jnp.pad(tiles.query_R, (0, r)),
        one_more(chunk.slots_BT, -1), one_more(chunk.segments_BT, 0), whole_p,
        jnp.stack([start, head, tiles.count]),
    ), tiles.query_Mr

  stacked, query_KMr = jax.vmap(of_head, (2, 0))(chunk.ids_BTKk, jnp.arange(K, dtype=jnp.int32))
  return stacked, query_KMr.shape[2]


def seen_whole(chunk, keys):
  """Whether every query of the chunk that chose a page sees all its keys, [B*P]: none comes after the first of them, and
  the row's queries and the page's keys are of one segment.
  """
  segments_BPb = keys.segment_p1b.reshape(chunk.slots_BT.shape[0], -1, keys.segment_p1b.shape[2])
  P, b = segments_BPb.shape[1:]
  there_BT, most = chunk.slots_BT >= 0, jnp.iinfo(jnp.int32).max
  least_B1 = lambda x_BT: jnp.min(jnp.where(there_BT, x_BT, most), axis=1, keepdims=True)
  segment_B1 = least_B1(chunk.segments_BT)
  one_B1 = segment_B1 == -least_B1(-chunk.segments_BT)
  last_slot_1P = jnp.arange(1, P + 1, dtype=jnp.int32)[None] * b - 1
  of_it_BP = jnp.all(segments_BPb == segment_B1[..., None], axis=2)  # libtpu takes a minute over a minimum and a maximum
  return ((last_slot_1P <= least_B1(chunk.slots_BT)) & one_B1 & of_it_BP).reshape(-1)


def vmem_bytes():
  """For a chunk's queries and what attention adds up for them, on the chips of the mesh at hand."""
  capacity = pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else LEAST_VMEM
  return capacity - OTHER_VMEM


def most_queries(q_BTHDh, K):
  """Most queries of a chunk."""
  size = q_BTHDh.dtype.itemsize
  G, D = heads_held(q_BTHDh, K), -(-q_BTHDh.shape[-1] // LANES) * LANES
  return vmem_bytes() // (G * (D * (size + 4) + 2 * LANES * 4))


def heads_held(q_BTHDh, K):
  """Of a kv head: a slice of fewer is no whole tile of memory."""
  return max(32 // q_BTHDh.dtype.itemsize, 2 ** (q_BTHDh.shape[2] // K - 1).bit_length())


def lanes_of_chunk(x_BTX, plan, G):
  """Of [B, T, X] a chunk's values of one kv head as `in_lanes` takes them, [N + 1, L]: G again and again."""
  B, N = x_BTX.shape[0], plan.slot_N1.size - 1
  x_NG = lax.dynamic_slice(x_BTX, (0, plan.place[0], plan.place[1] * G), (B, N // B, G)).reshape(N, G)
  return jnp.tile(jnp.pad(x_NG, ((0, 1), (0, 0))), (1, LANES // G))


def rows_held(q_BTXD, plan, K):
  """Rows held in VMEM, N of them queries and the next for tiles that are not full; G, D."""
  D = q_BTXD.shape[-1]
  N, G = plan.slot_N1.size - 1, q_BTXD.shape[-2] // K
  together = max(8, LANES // G)
  return -(-(N + 1) // together) * together, N, G, D


def params(size):
  limit = size + MORE_VMEM_BYTES
  return pltpu.CompilerParams(
      dimension_semantics=('arbitrary',), disable_bounds_checks=True, vmem_limit_bytes=limit
  )


# ----------------------------------------------------------------------------------------------------------------------
# within a kernel


def visible(limit_1R, segment_1R, segment_ref):
  """Which key of a block each row sees, [b, R]: up to the row's limit, and of its segment."""
  b = segment_ref.shape[2]
  segment_b1 = jnp.broadcast_to(segment_ref[0], (8, b)).T[:, :1]
  return (lax.broadcasted_iota(jnp.int32, (b, 1), 0) <= limit_1R) & (segment_b1 == segment_1R)


def queries_of(m, r, first_ref, query_ref, N):
  """The queries of tile m; N where there is none."""
  first, count = first_ref[m], first_ref[m + 1] - first_ref[m]
  return [jnp.where(j < count, query_ref[first + j], N) for j in range(r)]


def some_of(queries):
  """(place of the first, queries) of a few at a time. What is kept of each is read before any of them is written: the
  compiler does not know that they are not the same, and would wait for each one's writing before the next's reading.
  """
  return [(j, queries[j : j + AT_ONCE]) for j in range(0, len(queries), AT_ONCE)]


def row_of(ref, n):
  """Where query n stands in [rows, G, D], or in [rows, D] of one row a query."""
  return n if len(ref.shape) == 3 else pl.ds(n, 1)


def raise_tops(top_ref, some, own_X1):
  """Takes the maxima of some queries in: their new maxima, and by what sums above the old ones fade, [X, L]."""
  old_XL = jnp.concatenate([top_ref[row_of(top_ref, n)] for n in some])
  top_XL = jnp.maximum(old_XL, own_X1)
  for n, top in zip(some, jnp.split(top_XL, len(some)), strict=True):
    top_ref[row_of(top_ref, n)] = top
  return top_XL, jnp.exp2(old_XL - top_XL)


def add_rows(sum_ref, some, x_XD, fade_XD=1):
  """Adds the rows of some queries to sums of theirs that fade."""
  sum_XD = jnp.concatenate([sum_ref[row_of(sum_ref, n)] for n in some]) * fade_XD + x_XD
  for n, sum_GD in zip(some, jnp.split(sum_XD, len(some)), strict=True):
    sum_ref[row_of(sum_ref, n)] = sum_GD


def wide(x_RL, width):
  """Equal lanes, as many as are asked for."""
  return x_RL[:, :width] if width <= LANES else jnp.tile(x_RL, (1, -(-width // LANES)))[:, :width]


def chunk_copies(place_ref, memory_ref, held_ref, sem, N, out=False):
  """Copies between a chunk's queries of one kv head in memory, [B, T, K*G, D], and [rows, G, D] in VMEM, row by row."""
  B, G = memory_ref.shape[0], held_ref.shape[1]
  c = N // B
  heads = pl.ds(pl.multiple_of(place_ref[1] * G, G), G)
  ends = [(memory_ref.at[row, pl.ds(place_ref[0], c), heads], held_ref.at[pl.ds(row * c, c)]) for row in range(B)]
  return [pltpu.make_async_copy(*(pair[::-1] if out else pair), sem) for pair in ends]


def start(copies):
  for copy in copies:
    copy.start()


def wait(copies):
  for copy in copies:
    copy.wait()


def in_lanes(values, group_1L, G):
  """[1, r*G]: each query's value, a scalar or [1, L] of its G heads again and again, in the lanes of its heads."""
  u, parts = LANES // G, []
  for first in range(0, len(values), u):
    part_1L = jnp.broadcast_to(values[first], group_1L.shape)
    for i, value in enumerate(values[first + 1 : first + u], 1):
      part_1L = jnp.where(group_1L == i, value, part_1L)
    parts.append(part_1L)
  return jnp.concatenate(parts, axis=1)[:, : len(values) * G]
