"""Attention over selected blocks on accelerators: keys outside, queries inside (arXiv:2606.13392, section 4).

A chunk of queries and one kv head at a time: for the same memory, a chunk of all heads would have its queries share a
block 1/K as often. XLA sorts the chunk's pairs (query, block) by page, one block of one row and kv head, and cuts the
run of each page into tiles of r queries (`plan`). On TPU `sparse_tpu` keeps a chunk's queries in VMEM and goes on by
itself. On GPUs (`attend_in_tiles`) XLA gathers the tiles' rows, a kernel (`TileKernels`) goes through the tiles that
there are, and each pair's output is weighed by log-sum-exp and gathered per query. The gradients of keys and values grow
in float32 from tile to tile of a page and from chunk to chunk. All orders are fixed, so equal inputs give equal bits. On
CPU `sparse.msa_gather` does the same in batches of small products.

Layout. Keys and values are held as [B*P, b, K*D]: one copy of each, in which a block of one head is a legal block of
memory. D is Dh padded to a multiple of 128, as the tiles of a TPU's memory are anyhow. Pairs' outputs are held in the
queries' dtype: one rounding before a sum of k in float32.

Letters as in `sparse`: B rows, T queries, S key slots, H query heads, K kv heads, G = H/K, Dh head dim, D = Dh padded,
b block size, P = S/b blocks, k blocks per query and kv head, c chunk of queries, N = B*c*K queries of one kv head each,
R = N*k pairs, r queries of a tile, M most tiles.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx.kernels_pallas.chunks import join, kept, split
from mmx.kernels_pallas.sparse import logsumexp_of_choices

CHUNK_ELEMENTS = 2**26  # of the outputs of one chunk's pairs, R*G*D: 128 MiB in bfloat16, and room for half-full tiles
LONGEST = 4  # times as much where a row has 4096 blocks or more, of which a shorter chunk's queries share few
CHUNK_PAIRS = 2**17  # sorted at once, at most
SUM_AT_ONCE = 4  # choices of a query
# Times that choices cover a cache before it pays to copy it into this layout. Where it stands a choice moves 2 blocks,
# of keys and of values; copied, a block of the cache moves 6, and a choice its queries' rows: half a block with 16 heads.
COVER = 4
LANES = 128


class TileKernels(NamedTuple):
  """What a platform brings. A tile's rows are its r queries' G heads, r*G together; `who` is int32 [M, 2, r*G], the
  slot and the segment of each row, slot -1 where there is no query.

    forward(tiles, keys, q [M, r*G, D], who, K, scale) -> (out like q, stats float32 [M, 2, r*G]: the greatest score of
      each row and the sum of exponentials above it, by which `out` is not yet divided)
    backward(tiles, keys, q, dout, who, stats, dkeys, K, scale) -> (dq like q, dk, dv): stats are each row's logsumexp
      and <out, dout>; dkeys, the gradients of keys and values so far, float32 [B*P, b, K*D], come back with the tiles'
      added.

  Tiles from tiles.count on are not there: what stands in them is never used.
  """

  forward: Callable
  backward: Callable
  tile_rows: int  # most r*G
  least_rows: int = 1  # below which a tile costs no less


def unsupported(q_BTHDh, k_BSKDh, block_size, top_k, tile_rows) -> str:
  """'' where pairs can be sorted and cut into tiles, else one reason. Takes anything with shape and dtype."""
  H = q_BTHDh.shape[2]
  B, S, K, _ = k_BSKDh.shape
  if H % K:
    return f'{H} query heads are no multiple of {K} kv heads'
  if H // K > tile_rows:
    return f'{H // K} query heads per kv head; at most {tile_rows} are supported'
  if q_BTHDh.dtype not in (jnp.bfloat16, jnp.float32) or k_BSKDh.dtype != q_BTHDh.dtype:
    return f'dtypes {q_BTHDh.dtype} and {k_BSKDh.dtype}; bfloat16 or float32, the same for both, are supported'
  if (B * K * top_k - 1).bit_length() + (B * K * -(-S // block_size)).bit_length() > 31:
    return f'{B} rows of {S} slots with {K} kv heads; pairs of one token times blocks must stay below 2**29'
  return ''


def covers(T, top_k, block_size, S) -> bool:
  """Whether T tokens of a row choose so much of a cache of S slots that each block is better read once for all."""
  return T * top_k * block_size >= COVER * S


def attend_cached(q_BTHDh, k_BKSDh, v_BKSDh, ids_BTKk, slots_BT, block_size, decode, sparse, interpret):
  """Attention against a cache by two modules of a platform: `decode.attend_chosen` reads each query's blocks where they
  stand; where choices cover the cache, it is copied for `sparse.attend_blocks`. Returns [B, T, H, Dh].
  """
  B, K, S, Dh = k_BKSDh.shape
  top_k = ids_BTKk.shape[3]
  copied = jax.ShapeDtypeStruct((B, S, K, Dh), k_BKSDh.dtype)
  few = not covers(q_BTHDh.shape[1], top_k, block_size, S)
  if few or sparse.unsupported(q_BTHDh, copied, block_size, top_k):
    return decode.attend_chosen(q_BTHDh, k_BKSDh, v_BKSDh, ids_BTKk, slots_BT, block_size, interpret=interpret)
  k_BSKDh, v_BSKDh = k_BKSDh.swapaxes(1, 2), v_BKSDh.swapaxes(1, 2)
  return sparse.attend_blocks(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, None, block_size, interpret)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_in_tiles(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, kernels: TileKernels):
  """Softmax attention of each query and kv head over its blocks, up to the query's slot and within its segment.

  Args:
    q_BTHDh, k_BSKDh, v_BSKDh: bfloat16 or float32; S need not be a multiple of the block size.
    ids_BTKk: int32 blocks of each query, as `sparse.select_blocks` returns them; no block twice, -1 for none.
    slots_BT: int32 slot of each query; -1 for padding, which gives zeros.
    segments: (segment_ids_BT, segment_ids_BS) of queries and keys, or None.

  Returns:
    out [B, T, H, Dh] of q's dtype, and logsumexp [B, T, K, G] float32 without gradient, 0 where nothing is seen.
  """
  return _forward(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, kernels)[0]


def _forward(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, kernels):
  B, T, H, Dh = q_BTHDh.shape
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  K = k_BSKDh.shape[2]
  chunks, keys = sides(*inputs, block_size, one_head=True)

  def one_chunk(queries):
    out, logsumexp = lax.map(lambda head: one_head(of_head(queries, head, K)), jnp.arange(K))
    return _all_heads(out), _all_heads(logsumexp)

  def one_head(queries):
    out, logsumexp_NG = _attend(queries, keys, _tiles(queries, keys, kernels), K, Dh**-0.5, kernels)
    return out, logsumexp_NG.reshape(B, -1, H // K)

  out, logsumexp = lax.map(one_chunk, chunks)
  out_BTHDh, logsumexp_BTH = kept((join(out, T)[..., :Dh], join(logsumexp, T)))
  logsumexp_BTKG = logsumexp_BTH.reshape(B, T, K, -1)
  return (out_BTHDh, logsumexp_BTKG), (inputs, out_BTHDh, logsumexp_BTH)


def _backward(block_size, kernels, residuals, cotangents):
  inputs, out_BTHDh, logsumexp_BTH = residuals
  dout_BTHDh, _ = cotangents
  q_BTHDh, k_BSKDh, v_BSKDh, *_ = inputs
  B, T, _, Dh = q_BTHDh.shape
  K = k_BSKDh.shape[2]
  chunks, keys = sides(*inputs, block_size, one_head=True)
  c = chunks.q_BcHD.shape[2]
  delta_BTH = jnp.sum(out_BTHDh.astype(jnp.float32) * dout_BTHDh.astype(jnp.float32), axis=-1)
  dout = split(whole_lanes(dout_BTHDh.astype(q_BTHDh.dtype)), c)

  def one_chunk(dkeys, chunk):
    queries, *rest = chunk
    one_head = lambda dkeys, head: of_this(of_head(queries, head, K), [_part(x, head, K) for x in rest], dkeys)
    dkeys, dq = lax.scan(one_head, dkeys, jnp.arange(K))
    return dkeys, _all_heads(dq)

  def of_this(queries, rest, dkeys):
    return _attend_backward(queries, keys, _tiles(queries, keys, kernels), *rest, dkeys, K, Dh**-0.5, kernels)

  start = (jnp.zeros(keys.k_pbX.shape, jnp.float32),) * 2
  (dk, dv), dq = lax.scan(one_chunk, start, (chunks, split(logsumexp_BTH, c), split(delta_BTH, c), dout))
  return join(dq, T)[..., :Dh], out_of_blocks(dk, k_BSKDh), out_of_blocks(dv, v_BSKDh), None, None, None


attend_in_tiles.defvjp(_forward, _backward)


def _tiles(queries, keys, kernels):
  """Of one kv head."""
  B, _, G, D = queries.q_BcHD.shape
  P, K = keys.k_pbX.shape[0] // B, keys.k_pbX.shape[2] // D
  least, most = max(kernels.least_rows // G, -(-16 // G)), kernels.tile_rows // G
  tiles = plan(queries.ids_BcKk, queries.slot_Bc, P, least, most)
  return tiles._replace(page_M=(tiles.page_M // P * K + queries.head) * P + tiles.page_M % P)


def _attend(queries, keys, tiles, K, scale, kernels):
  """One chunk and kv head of K: out [B, c, G, D] and logsumexp [N, G]."""
  B, c, G, D = queries.q_BcHD.shape
  out, stats = kernels.forward(tiles, keys, rows_of(queries.q_BcHD, queries, tiles), who(queries, tiles), K, scale)
  places = tiles.query_Mr.size
  top, total = (stats[:, i].reshape(places, G) for i in (0, 1))
  logsumexp_NG = logsumexp_of_choices(top, total, tiles)
  weights_NkG = jnp.exp(top[tiles.place_Nk] - logsumexp_NG[:, None])
  weights_NkG = jnp.where(tiles.valid_Nk[..., None], weights_NkG, 0)
  out_NGD = sum_of_choices(out.reshape(places, G, D), weights_NkG, tiles)
  return out_NGD.reshape(B, c, G, D).astype(queries.q_BcHD.dtype), logsumexp_NG


def _attend_backward(queries, keys, tiles, logsumexp_BcG, delta_BcG, dout_BcGD, dkeys, K, scale, kernels):
  """One chunk and kv head of K: the gradients of keys and values so far with its own added, and dq [B, c, G, D]."""
  B, c, G, D = queries.q_BcHD.shape
  q_MrD, dout_MrD = rows_of(queries.q_BcHD, queries, tiles), rows_of(dout_BcGD, queries, tiles)
  stats = lanes_of(logsumexp_BcG.reshape(-1, G), delta_BcG.reshape(-1, G), tiles, 0)
  dq, *dkeys = kernels.backward(tiles, keys, q_MrD, dout_MrD, who(queries, tiles), stats, dkeys, K, scale)
  dq_NGD = sum_of_choices(dq.reshape(-1, G, D), tiles.valid_Nk[..., None].astype(jnp.float32), tiles)
  return tuple(dkeys), dq_NGD.reshape(B, c, G, D).astype(queries.q_BcHD.dtype)


def _part(x_BcH, head, K):
  """Of [B, c, H, ...] the heads of one kv head, [B, c, G, ...]; of [B, c, K, ...] that kv head itself."""
  G = x_BcH.shape[2] // K
  return lax.dynamic_slice_in_dim(x_BcH, head * G, G, axis=2)


def _all_heads(x_KBcG):
  """[K, B, c, G, ...] -> [B, c, H, ...]."""
  x_BcKG = jnp.moveaxis(x_KBcG, 0, 2)
  return x_BcKG.reshape(*x_BcKG.shape[:2], -1, *x_BcKG.shape[4:])


# ----------------------------------------------------------------------------------------------------------------------
# both sides


class Keys(NamedTuple):
  """Key side in blocks. `last_B` is the last slot that a row's queries see: what lies beyond is never used; keys and
  values there are zeros.
  """

  k_pbX: jax.Array  # [B*P, b, K*D]
  v_pbX: jax.Array
  segment_p1b: jax.Array
  last_B: jax.Array


class Queries(NamedTuple):
  """Query side of a chunk, or of all chunks with one more axis in front; of one kv head where `head` says which."""

  q_BcHD: jax.Array
  ids_BcKk: jax.Array
  slot_Bc: jax.Array
  segment_Bc: jax.Array
  head: jax.Array | None = None


def of_head(queries, head, K) -> Queries:
  """A chunk's queries of one kv head of K."""
  q_BcGD, ids_Bc1k = (_part(x, head, K) for x in (queries.q_BcHD, queries.ids_BcKk))
  return queries._replace(q_BcHD=q_BcGD, ids_BcKk=ids_Bc1k, head=head)


def sides(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, b, one_head=False):
  """Queries in chunks, keys in blocks. A chunk's length is for one kv head at a time, or for all at once."""
  B, T, H, _ = q_BTHDh.shape
  S, K = k_BSKDh.shape[1:3]
  k = ids_BTKk.shape[3]
  query_segments, key_segments = segments or (jnp.zeros((B, T), jnp.int32), None)
  q_BTHD = whole_lanes(q_BTHDh)
  P = -(-S // b)
  heads, times = (1, min(max(P // 1024, 1), LONGEST)) if one_head else (K, 1)
  pairs = times * CHUNK_ELEMENTS // (H // K * q_BTHD.shape[-1])
  chunks = -(-T // max(1, min(pairs, most_pairs(B * heads * P)) // (B * heads * k)))
  c = -(-T // chunks)
  queries = Queries(split(q_BTHD, c), split(ids_BTKk, c, -1), split(slots_BT, c, -1), split(query_segments, c))
  return queries, keys_in_blocks(k_BSKDh, v_BSKDh, slots_BT, key_segments, b)


def most_pairs(pages):
  """Of a chunk: a pair and its page stand in 31 bits."""
  return min(CHUNK_PAIRS, 2 ** (31 - pages.bit_length()))


def keys_in_blocks(k_BSKDh, v_BSKDh, slots_BT, segments_BS, b) -> Keys:
  B, S = k_BSKDh.shape[:2]
  last_B = jnp.max(slots_BT, axis=1)
  used_BS1 = (jnp.arange(S, dtype=jnp.int32)[None] <= last_B[:, None])[..., None]
  used_blocks = lambda x: jnp.where(in_blocks(used_BS1, b), in_blocks(whole_lanes(x), b), 0)
  k_pbX, v_pbX = used_blocks(k_BSKDh), used_blocks(v_BSKDh)
  segments_BS = jnp.zeros((B, S), jnp.int32) if segments_BS is None else segments_BS
  return Keys(k_pbX, v_pbX, in_blocks(segments_BS, b).reshape(-1, 1, b), last_B)


def in_blocks(x, b):
  """[B, S, ...] -> [B*P, b, what is left as one]; a last block that is not whole is padded."""
  B, S = x.shape[:2]
  x = jnp.pad(x, ((0, 0), (0, -S % b)) + ((0, 0),) * (x.ndim - 2)) if S % b else x
  return x.reshape(-(-S // b) * B, b, -1)


def out_of_blocks(x_pbX, like_BSKDh):
  """[B*P, b, K*D] -> the shape and dtype of the keys that were put in blocks."""
  B, S, K, Dh = like_BSKDh.shape
  return x_pbX.reshape(B, -1, K, x_pbX.shape[2] // K)[:, :S, :, :Dh].astype(like_BSKDh.dtype)


def whole_lanes(x):
  return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % LANES),)) if x.shape[-1] % LANES else x


# ----------------------------------------------------------------------------------------------------------------------
# tiles: pairs (query, block) sorted by page


class Tiles(NamedTuple):
  """Tile m is up to r queries that chose one page, (row * K + head) * P + block: of the pairs sorted by page, those from
  first_M1[m] to first_M1[m + 1]. Pair n*k + j is query n's choice j.
  """

  page_M: jax.Array
  count: jax.Array  # tiles that there are, at least 1: the first is computed even when it is empty
  first_M1: jax.Array  # tiles that are not there begin, and end, where the last pair ends
  query_R: jax.Array  # n of the sorted pairs, choices of -1 last
  query_Mr: jax.Array  # of each tile; N where there is none
  place_Nk: jax.Array  # where each pair stands among all M*r, 0 for choices of -1
  valid_Nk: jax.Array


def plan(ids_BcKk, slot_Bc, P, least, most, together=1) -> Tiles:
  """Sorts the pairs of one chunk by page, of P blocks a row and head, and cuts the run of each page into tiles of at
  least `least` queries and at most `most`, which wins; the most tiles are a multiple of `together`.

  Sorts and running sums alone, but for query_Mr: by libtpu's schedule an element gathered or scattered takes 7 to 10
  cycles, one sorted a third of a cycle. What is not used of the result is not computed.
  """
  B, c, K, k = ids_BcKk.shape
  N, R, pages = B * c * K, B * c * K * k, B * K * P
  shared = max(1, R // pages)  # queries that choose a block, on average
  r = min(max(2 ** (shared.bit_length() - 1), least), most)
  M = -(-min(R, R // r + pages) // together) * together
  pair_bits, page_bits = (R - 1).bit_length(), pages.bit_length()

  first_page_BK = (jnp.arange(B, dtype=jnp.int32)[:, None] * K + jnp.arange(K, dtype=jnp.int32)[None]) * P
  valid_BcKk = (ids_BcKk >= 0) & (slot_Bc >= 0)[:, :, None, None]
  page_R = jnp.where(valid_BcKk, first_page_BK[:, None, :, None] + ids_BcKk, pages).reshape(R)
  index_R = jnp.arange(R, dtype=jnp.int32)
  # One 32-bit key holds page and pair: a sort of it compiles in a quarter of the time of a pair's.
  key_R = lax.sort(page_R << pair_bits | index_R, is_stable=False)
  page_R, pair_R = key_R >> pair_bits, key_R & 2**pair_bits - 1
  there_R = page_R < pages
  total = jnp.sum(valid_BcKk, dtype=jnp.int32)

  new_R = page_R != jnp.concatenate([jnp.full(1, -1, jnp.int32), page_R[:-1]])
  of_page_R = index_R - lax.cummax(jnp.where(new_R, index_R, 0))  # how many of its page stand before it
  begins_R = there_R & (of_page_R % r == 0)
  tile_R = jnp.cumsum(begins_R, dtype=jnp.int32) - 1
  none = jnp.iinfo(jnp.int32).max
  tile_M = lax.sort(jnp.where(begins_R, index_R << page_bits | page_R, none), is_stable=False)[:M]
  tile_M1 = jnp.pad(tile_M, (0, M + 1 - tile_M.size), constant_values=none)
  first_M1 = jnp.where(tile_M1 == none, total, tile_M1 >> page_bits)
  page_M = jnp.where(tile_M1 == none, 0, tile_M1 & 2**page_bits - 1)[:M]

  query_R = pair_R // k
  sorted_Mr = first_M1[:-1, None] + jnp.arange(r, dtype=jnp.int32)[None]
  query_Mr = jnp.where(sorted_Mr < first_M1[1:, None], query_R[jnp.minimum(sorted_Mr, R - 1)], N)
  place_R = jnp.where(there_R, tile_R * r + of_page_R % r, 0)
  _, place_R = lax.sort((pair_R, place_R), num_keys=1, is_stable=False)
  return Tiles(
      page_M, jnp.maximum(tile_R[-1] + 1, 1), first_M1, query_R, query_Mr, place_R.reshape(N, k),
      valid_BcKk.reshape(N, k),
  )


def rows_of(x_BcHD, queries, tiles):
  """Rows of each tile's queries, [M, r*G, D], zeros of padded queries; where there is no query, some row."""
  x_BcHD = jnp.where((queries.slot_Bc >= 0)[..., None, None], x_BcHD, 0)
  G = x_BcHD.shape[2] // queries.ids_BcKk.shape[2]
  M, r = tiles.query_Mr.shape
  return x_BcHD.reshape(-1, G, x_BcHD.shape[-1]).at[tiles.query_Mr].get(mode='clip').reshape(M, r * G, -1)


def lanes_of(x_NG, y_NG, tiles, fill):
  """Two values of each query and head as rows of lanes, [M, 2, r*G]; `fill` where there is no query."""
  lanes = lambda x: x.at[tiles.query_Mr].get(mode='fill', fill_value=fill).reshape(tiles.query_Mr.shape[0], -1)
  return jnp.stack([lanes(x_NG), lanes(y_NG)], axis=1)


def who(queries, tiles):
  """int32 [M, 2, r*G]: slot and segment; slot -1, which sees nothing, where there is no query."""
  K = queries.ids_BcKk.shape[2]
  per_head = lambda x_Bc: jnp.broadcast_to(x_Bc[:, :, None, None], (*x_Bc.shape, K, queries.q_BcHD.shape[2] // K))
  flat = lambda x_Bc: per_head(x_Bc).reshape(-1, queries.q_BcHD.shape[2] // K)
  return lanes_of(flat(queries.slot_Bc), flat(queries.segment_Bc), tiles, -1)


def sum_of_choices(rows, weights_NkG, tiles):
  """[places, G, D] -> [N, G, D] float32: each query's choices by their weights, one gather at a time.

  A loop, for the compiler makes of sixteen gathers in a row sixteen buffers: 136 MiB where the loop needs 24. Some go
  together, so that the sum in float32 is read and written less often.
  """
  def add(sum_NGD, choice):
    place_N, weights_NG = choice
    return sum_NGD + weights_NG[..., None] * rows[place_N], None

  N = tiles.place_Nk.shape[0]
  choices = tiles.place_Nk.T, jnp.moveaxis(weights_NkG, 1, 0)
  return lax.scan(add, jnp.zeros((N, *rows.shape[1:])), choices, unroll=SUM_AT_ONCE)[0]
