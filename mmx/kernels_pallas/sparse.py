"""MiniMax Sparse Attention (arXiv:2606.13392): a query and kv head attends to the k blocks that an index branch picks.

  gather   everywhere. Index scores streamed over keys, top-k, then blocks outside and queries inside: the pairs (query,
           block) of a chunk of queries are sorted by block and cut into tiles of r queries of one block, so that
           a tile is a matrix product of r*G rows and a block is read once for them all (MSA, section 4). All that is
           moved is gathered; only the gradients of keys are added up in place, tile after tile, always in one order.
           Against gathering each query's blocks: 0.2 times the time on CPU at T=2048, k=8, b=32, G=4.

Costs for T queries against S keys: T*S*K*Di for the index scores, T*k*b*H*Dh for attention, and no array over S^2.
Blocks are anchored at slot 0. A query at slot i sees the slots up to i of its own segment; slot -1 is padding, which
sees nothing, picks nothing and gives zeros.

Letters: B rows, T queries, S key slots, H query heads, K kv heads, G = H/K, Dh head dim, Di index dim, b block size,
P = S/b blocks, k blocks per query and kv head, c chunk of queries, N = B*c*K queries of one kv head each,
R = N*k pairs (query, block), r queries of a tile, M tiles, W tiles computed at once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx.kernels_pallas.chunks import join, kept, places, product, split

SPAN = 2048  # index keys scored at once: 1 MiB at Di = 128 stays in the cache that the copied slice is read from
SELECT_ELEMENTS = 2**21  # index scores at once, B*c*K*SPAN
CHUNK_ELEMENTS = 2**25  # of the outputs of one chunk's pairs, R*G*Dh: 128 MiB in float32
TILE_ROWS = 64  # r*G: long enough for the rate of matrix products
BATCH_ELEMENTS = 2**16  # scores computed at once, W*r*G*b: small products in batches, large ones a few at a time
PREFIX_CHUNK = 64  # most queries of the warm-up's divergence at once
PREFIX_ELEMENTS = 2**24  # most scores of it at once, B*H*c*T
RECALL_QUERIES = 32  # queries of a row that selection is judged by
MASKED = -1e30
_product = functools.partial(product, batch_axes=1)  # of W pairs of matrices


class Keys(NamedTuple):
  """Key side in blocks, as the cache has it. `segment_BPb` is None where every slot is of the query's document."""

  k_BKPbDh: jax.Array
  v_BKPbDh: jax.Array
  index_BPbDi: jax.Array
  segment_BPb: jax.Array | None


class Queries(NamedTuple):
  """Query side of a chunk. `segment_Bc` is None when that of the keys is."""

  q_BcHDh: jax.Array
  index_BcKDi: jax.Array
  slot_Bc: jax.Array
  segment_Bc: jax.Array | None


# ----------------------------------------------------------------------------------------------------------------------
# public functions


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def msa_gather(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k, part=None):
  """Sparse attention and the index branch's divergence from it; see `reference.msa`, and `chunks.Part`.

  Attention gives no gradient to the index branch and the divergence none to anything else, so the two gradients are
  made apart: that of the divergence in closed form on the way forward, P_idx - P on the support, while the teacher P is
  at hand.

  Returns:
    out [B, T, H, Dh], and kl [B] float32, summed over a row's kv heads and its queries of segments above 0.
  """
  return _forward(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k, part)[0]


def msa_cached_gather(q_BTHDh, k_BKSDh, v_BKSDh, index_q_BTKDi, index_k_BSDi, slots_BT, block_size, top_k):
  """T new queries against a cache of S slots, a multiple of the block size. Returns [B, T, H, Dh].

  Reads the index keys up to the last query's slot, and of the keys and values the chosen blocks only.
  """
  ids_BTKk = select_blocks(index_q_BTKDi, index_k_BSDi, slots_BT, None, block_size, top_k)
  B, K, S, Dh = k_BKSDh.shape
  blocks = lambda a: a.reshape(B, K, S // block_size, block_size, Dh)
  keys = Keys(blocks(k_BKSDh), blocks(v_BKSDh), None, None)
  chunk = _chunk_length(q_BTHDh, ids_BTKk.shape[3])

  def attend(queries_ids):
    queries, ids_BcKk = queries_ids
    return _attend(queries, keys, _plan(ids_BcKk, queries, keys))[0]

  queries = Queries(split(q_BTHDh, chunk), None, split(slots_BT, chunk, -1), None)
  return join(lax.map(attend, (queries, split(ids_BTKk, chunk, -1))), q_BTHDh.shape[1])


def select_blocks(index_q_BTKDi, index_k_BSDi, slots_BT, segments, block_size, top_k):
  """The k best blocks of each query and kv head, by the largest index score in a block; its own is always among them.

  Args:
    slots_BT: int32 slot of each query.
    segments: (segment_ids_BT, segment_ids_BS) of queries and keys, or None.

  Returns:
    int32 [B, T, K, k], own block first, then by falling score, ties to the lower block, -1 where fewer are visible.
  """
  B, T, K, _ = index_q_BTKDi.shape
  query_segments, key_segments = segments or (None, None)
  keys = Keys(None, None, _blocks(index_k_BSDi, block_size), _blocks(key_segments, block_size))
  chunk = max(1, min(T, SELECT_ELEMENTS // (B * K * min(index_k_BSDi.shape[1], SPAN))))
  chunks = Queries(None, split(index_q_BTKDi, chunk), split(slots_BT, chunk, -1), split(query_segments, chunk))
  return join(lax.map(lambda queries: _select(queries, keys, top_k), chunks), T)


# ----------------------------------------------------------------------------------------------------------------------
# chunks and blocks


def _blocks(x, b):
  """[B, S, ...] -> [B, P, b, ...]; a last block that is not whole is padded."""
  if x is None:
    return None
  B, S = x.shape[:2]
  x = jnp.pad(x, ((0, 0), (0, -S % b)) + ((0, 0),) * (x.ndim - 2)) if S % b else x
  return x.reshape(B, -1, b, *x.shape[2:])


def _chunk_length(q_BTHDh, top_k):
  """Queries of a chunk, all alike as far as T allows."""
  B, T, H, Dh = q_BTHDh.shape
  chunks = math.ceil(T / max(1, CHUNK_ELEMENTS // (B * H * top_k * Dh)))
  return math.ceil(T / chunks)


# ----------------------------------------------------------------------------------------------------------------------
# selection


def _select(queries, keys, top_k):
  """Block ids [B, c, K, k] of one chunk; see `select_blocks`."""
  B, c, K, Di = queries.index_BcKDi.shape
  P, b = keys.index_BPbDi.shape[1:3]
  span = max(1, min(P, SPAN // b))  # blocks
  q_BnDi = (queries.index_BcKDi.astype(jnp.float32) * Di**-0.5).reshape(B, c * K, Di)
  slot_B11c = queries.slot_Bc[:, None, None]

  def score(i, best_BPcK):
    first = jnp.minimum(i * span, P - span)
    take = lambda x: lax.dynamic_slice_in_dim(x, first, span, axis=1)
    k_BsDi = take(keys.index_BPbDi).reshape(B, span * b, Di).astype(jnp.float32)
    # Keys are the rows of the product: few queries then cost one pass over the keys, at the speed of memory.
    scores = jnp.einsum('bsd,bnd->bsn', k_BsDi, q_BnDi, precision='float32').reshape(B, span, b, c, K)
    key_slot = (first * b + jnp.arange(span * b, dtype=jnp.int32)).reshape(1, span, b, 1)
    visible = key_slot <= slot_B11c
    if keys.segment_BPb is not None:
      visible &= take(keys.segment_BPb)[..., None] == queries.segment_Bc[:, None, None]
    best = jnp.max(jnp.where(visible[..., None], scores, -jnp.inf), axis=2)
    return lax.dynamic_update_slice_in_dim(best_BPcK, best, first, axis=1)

  spans = (jnp.max(queries.slot_Bc) + span * b) // (span * b)  # up to the last query's slot, none for padding
  best_BPcK = lax.fori_loop(0, spans, score, jnp.full((B, P, c, K), -jnp.inf))
  own_BPc = jnp.arange(P, dtype=jnp.int32)[None, :, None] == (queries.slot_Bc // b)[:, None]
  best_BcKP = jnp.transpose(jnp.where(own_BPc[..., None], jnp.inf, best_BPcK), (0, 2, 3, 1))
  best_BcKk, ids_BcKk = lax.top_k(best_BcKP, min(top_k, P))
  ids_BcKk = jnp.where(best_BcKk > -jnp.inf, ids_BcKk, -1)
  return jnp.pad(ids_BcKk, ((0, 0),) * 3 + ((0, top_k - ids_BcKk.shape[-1]),), constant_values=-1)


# ----------------------------------------------------------------------------------------------------------------------
# tiles: pairs (query, block) sorted by block


class Tiles(NamedTuple):
  """Tile m is up to r queries that chose one block. They are computed W at a time, in batches 0 to `batches` - 1.

  A page is one block of one row and kv head: (row * K + head) * P + block. Pair n*k + j is query n's choice j.
  """

  page_mW: jax.Array
  query_mWr: jax.Array  # n; N where there is none
  place_Nk: jax.Array  # where each pair stands among all m*W*r
  valid_Nk: jax.Array  # false for choices of -1
  batches: jax.Array


def _plan(ids_BcKk, queries, keys) -> Tiles:
  """Sorts the pairs of one chunk by page and cuts the run of each page into tiles."""
  B, c, K, k = ids_BcKk.shape
  P, b = keys.k_BKPbDh.shape[2:4]
  G = queries.q_BcHDh.shape[2] // K
  N, R, pages = B * c * K, B * c * K * k, B * K * P
  shared = max(1, R // pages)  # queries that choose a block, on average
  r = max(1, min(TILE_ROWS // G, 2 ** (shared - 1).bit_length()))
  most = min(R, R // r + pages)
  W = max(1, min(most, BATCH_ELEMENTS // (r * G * b)))
  M = most + -most % W

  first_page_BK = (jnp.arange(B, dtype=jnp.int32)[:, None] * K + jnp.arange(K, dtype=jnp.int32)[None]) * P
  page_R = jnp.where(ids_BcKk >= 0, first_page_BK[:, None, :, None] + ids_BcKk, pages).reshape(R)
  index_R = jnp.arange(R, dtype=jnp.int32)
  if (pages + 1) * R < 2**31:  # one 32-bit key holds page and pair: half the time of a sort with two operands
    key_R = lax.sort(page_R * R + index_R)
    page_R, pair_R = key_R // R, key_R % R
  else:
    pair_R = jnp.argsort(page_R, stable=True).astype(jnp.int32)
    page_R = page_R[pair_R]

  new_R = jnp.concatenate([jnp.ones(1, bool), page_R[1:] != page_R[:-1]])
  offset_R = index_R - lax.cummax(jnp.where(new_R, index_R, 0))
  starts_R = (offset_R % r == 0) & (page_R < pages)
  tile_R = jnp.cumsum(starts_R, dtype=jnp.int32) - 1
  take = lambda x, index, fill: x.at[index].get(mode='fill', fill_value=fill)
  first_M = jnp.full(M, R, jnp.int32).at[jnp.where(starts_R, tile_R, M)].set(index_R, mode='drop')
  page_M = take(page_R, first_M, pages)
  sorted_Mr = first_M[:, None] + jnp.arange(r, dtype=jnp.int32)[None]
  here_Mr = (take(page_R, sorted_Mr, pages) == page_M[:, None]) & (page_M < pages)[:, None]
  query_Mr = jnp.where(here_Mr, take(pair_R, sorted_Mr, 0) // k, N)
  place_R = jnp.zeros(R, jnp.int32).at[pair_R].set(tile_R * r + offset_R % r, unique_indices=True)
  return Tiles(
      jnp.minimum(page_M, pages - 1).reshape(-1, W), query_Mr.reshape(-1, W, r),
      place_R.reshape(N, k), ids_BcKk.reshape(N, k) >= 0, (tile_R[-1] + W) // W,
  )


class Tile(NamedTuple):
  """W tiles at work: which block of which row and kv head, which queries, who sees what."""

  page: tuple[jax.Array, jax.Array, jax.Array]  # row_W, head_W, block_W: index into keys and values
  block: tuple[jax.Array, jax.Array]  # row_W, block_W: index into what all heads share
  query_Wr: jax.Array
  visible_Wrb: jax.Array


def _over_tiles(tiles, queries, keys, step, start):
  """Carries `start` through the tiles: step(tile, put, carry), where put(rows, new_Wr...) stores in tile order."""
  _, W, r = tiles.query_mWr.shape
  K, P, b = keys.k_BKPbDh.shape[1:4]
  per_head = lambda x_Bc: jnp.broadcast_to(x_Bc[:, :, None], (*x_Bc.shape, K)).reshape(-1)
  slot_N = per_head(queries.slot_Bc)
  segment_N = None if queries.segment_Bc is None else per_head(queries.segment_Bc)

  def body(i, carry):
    page_W, query_Wr = tiles.page_mW[i], tiles.query_mWr[i]
    row_W, head_W, block_W = page_W // (P * K), page_W // P % K, page_W % P
    key_slot_Wb = block_W[:, None] * b + jnp.arange(b, dtype=jnp.int32)[None]
    slot_Wr = slot_N.at[query_Wr].get(mode='fill', fill_value=-1)  # a place without query sees nothing
    visible_Wrb = key_slot_Wb[:, None] <= slot_Wr[..., None]
    if segment_N is not None:
      visible_Wrb &= keys.segment_BPb[row_W, block_W][:, None] == _rows(segment_N, query_Wr)[..., None]
    put = lambda rows, new: lax.dynamic_update_slice_in_dim(rows, new.reshape(W * r, *rows.shape[1:]), i * W * r, 0)
    return step(Tile((row_W, head_W, block_W), (row_W, block_W), query_Wr, visible_Wrb), put, carry)

  return lax.fori_loop(0, tiles.batches, body, start)


def _rows(x_N, query_Wr):
  """Rows of each tile's queries; where there is none, some row."""
  return x_N.at[query_Wr].get(mode='clip')


def _scores(q_WrGDh, k_WbDh, visible_Wrb):
  """Masked scores [W, r, G, b] in float32."""
  W, r, G, Dh = q_WrGDh.shape
  scores = _product(q_WrGDh.reshape(W, r * G, Dh), k_WbDh, 2, 2).reshape(W, r, G, -1) * Dh**-0.5
  return jnp.where(visible_Wrb[:, :, None], scores, MASKED)


def logsumexp_of_choices(top, total, tiles):
  """Maxima and sums of exponentials, in tile order, over each query's choices: [places, ...] -> [N, ...]."""
  valid = tiles.valid_Nk.reshape(tiles.valid_Nk.shape + (1,) * (top.ndim - 1))
  top_Nk = jnp.where(valid, top[tiles.place_Nk], MASKED)
  top_N = jnp.max(top_Nk, axis=1, keepdims=True)
  total_N = jnp.sum(jnp.where(valid, jnp.exp(top_Nk - top_N) * total[tiles.place_Nk], 0), axis=1)
  return jnp.where(total_N > 0, top_N[:, 0] + jnp.log(total_N), 0)  # 0 for a query that chose nothing


def _sum_of_choices(rows, weights_Nk, tiles):
  """[places, ...] -> [N, ...]: each query's choices by their weights [N, k] or [N, k, G]."""
  part = lambda place_N, weights: weights.reshape(weights.shape + (1,) * (rows.ndim - weights.ndim)) * rows[place_N]
  # One gather for each of the k choices: they fuse into the sum, and [N, k, ...] is never held.
  return functools.reduce(jnp.add, map(part, tiles.place_Nk.T, jnp.moveaxis(weights_Nk, 1, 0)))


# ----------------------------------------------------------------------------------------------------------------------
# one chunk: attention, its gradient, and the divergence with its gradient


def _attend(queries, keys, tiles):
  """Softmax within each tile, then over each query's tiles: out [B, c, H, Dh] and logsumexp [N, G]."""
  B, c, H, Dh = queries.q_BcHDh.shape
  N, G = tiles.place_Nk.shape[0], H * B * c // tiles.place_Nk.shape[0]
  q_NGDh = queries.q_BcHDh.reshape(N, G, Dh)
  places = tiles.query_mWr.size

  def step(tile, put, carry):
    k_WbDh, v_WbDh = keys.k_BKPbDh[tile.page], keys.v_BKPbDh[tile.page]
    scores = _scores(_rows(q_NGDh, tile.query_Wr), k_WbDh, tile.visible_Wrb)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    W, r, _, b = weights.shape
    out = _product(weights.astype(v_WbDh.dtype).reshape(W, r * G, b), v_WbDh, 2, 1)
    return tuple(map(put, carry, (out, top, jnp.sum(weights, axis=-1))))

  start = jnp.zeros((places, G, Dh)), jnp.zeros((places, G)), jnp.zeros((places, G))
  out, top, total = _over_tiles(tiles, queries, keys, step, start)
  logsumexp_NG = logsumexp_of_choices(top, total, tiles)
  weights_NkG = jnp.exp(top[tiles.place_Nk] - logsumexp_NG[:, None])
  out_NGDh = _sum_of_choices(out, jnp.where(tiles.valid_Nk[..., None], weights_NkG, 0), tiles)
  return out_NGDh.reshape(B, c, H, Dh).astype(queries.q_BcHDh.dtype), logsumexp_NG


def _attend_backward(queries, keys, tiles, logsumexp_NG, out_BcHDh, dout_BcHDh, dkeys):
  """Makes the probabilities again from the logsumexp; adds to dkeys (k, v in float32) and returns dq [B, c, H, Dh]."""
  N, G = logsumexp_NG.shape
  q_NGDh, dout_NGDh = (a.reshape(N, G, -1) for a in (queries.q_BcHDh, dout_BcHDh))
  delta_NG = jnp.sum((out_BcHDh * dout_BcHDh).astype(jnp.float32).reshape(N, G, -1), axis=-1)
  dtype = q_NGDh.dtype

  def step(tile, put, carry):
    dq, dk_BKPbDh, dv_BKPbDh = carry
    k_WbDh, v_WbDh = keys.k_BKPbDh[tile.page], keys.v_BKPbDh[tile.page]
    q_WrGDh, dout_WrGDh = _rows(q_NGDh, tile.query_Wr), _rows(dout_NGDh, tile.query_Wr)
    W, r = tile.query_Wr.shape
    flat = lambda a: a.astype(dtype).reshape(W, r * G, -1)
    scores = _scores(q_WrGDh, k_WbDh, tile.visible_Wrb)
    weights = jnp.exp(scores - _rows(logsumexp_NG, tile.query_Wr)[..., None])
    dweights = _product(flat(dout_WrGDh), v_WbDh, 2, 2).reshape(scores.shape)
    dscores = weights * (dweights - _rows(delta_NG, tile.query_Wr)[..., None]) * q_NGDh.shape[-1] ** -0.5
    dq = put(dq, _product(flat(dscores), k_WbDh, 2, 1))
    dk_BKPbDh = dk_BKPbDh.at[tile.page].add(_product(flat(dscores), flat(q_WrGDh), 1, 1))
    return dq, dk_BKPbDh, dv_BKPbDh.at[tile.page].add(_product(flat(weights), flat(dout_WrGDh), 1, 1))

  start = jnp.zeros((tiles.query_mWr.size, *q_NGDh.shape[1:])), *dkeys
  dq, *dkeys = _over_tiles(tiles, queries, keys, step, start)
  dq_NGDh = _sum_of_choices(dq, tiles.valid_Nk.astype(jnp.float32), tiles)
  return dq_NGDh.reshape(queries.q_BcHDh.shape).astype(dtype), tuple(dkeys)


def _divergence(queries, keys, tiles, logsumexp_NG, dindex_k_BPbDi):
  """KL(P || P_idx) over each query's selected tokens, P the mean of its G heads' probabilities (MSA, section 3.2).

  Returns:
    kl [B], summed over queries of segments above 0 and their kv heads; its gradients: dindex_q [B, c, K, Di], and that
    of the index keys, added to dindex_k.
  """
  B, c, K, Di = queries.index_BcKDi.shape
  N, G = logsumexp_NG.shape
  b = keys.k_BKPbDh.shape[3]
  places = tiles.query_mWr.size
  q_NGDh, index_NDi = queries.q_BcHDh.reshape(N, G, -1), queries.index_BcKDi.reshape(N, Di)
  counts_N = jnp.broadcast_to((queries.segment_Bc > 0)[:, :, None], (B, c, K)).reshape(N)

  def index_scores(tile, put, rows):
    index_WrDi = _rows(index_NDi, tile.query_Wr)
    return put(rows, _scores(index_WrDi[:, :, None], keys.index_BPbDi[tile.block], tile.visible_Wrb))

  index_rows = _over_tiles(tiles, queries, keys, index_scores, jnp.zeros((places, b)))
  index_top = jnp.max(index_rows, axis=-1)
  index_total = jnp.sum(jnp.exp(index_rows - index_top[:, None]), axis=-1)
  index_logsumexp_N = logsumexp_of_choices(index_top, index_total, tiles)

  def diverge(tile, put, carry):
    rows, dindex_q, dindex_k_BPbDi = carry
    W, r = tile.query_Wr.shape
    k_WbDh = keys.k_BKPbDh[tile.page]
    scores = _scores(_rows(q_NGDh, tile.query_Wr), k_WbDh, tile.visible_Wrb)
    teacher_Wrb = jnp.mean(jnp.exp(scores - _rows(logsumexp_NG, tile.query_Wr)[..., None]), axis=2)
    index_WrDi, index_k_WbDi = _rows(index_NDi, tile.query_Wr), keys.index_BPbDi[tile.block]
    index_scores = _scores(index_WrDi[:, :, None], index_k_WbDi, tile.visible_Wrb)[:, :, 0]
    log_student_Wrb = index_scores - _rows(index_logsumexp_N, tile.query_Wr)[..., None]
    kl_Wr, dscores = _kl(teacher_Wrb, log_student_Wrb)
    counts_Wr1 = counts_N.at[tile.query_Wr].get(mode='fill', fill_value=False)[..., None]
    dscores = jnp.where(counts_Wr1, dscores * Di**-0.5, 0).astype(index_NDi.dtype)
    dindex_k_BPbDi = dindex_k_BPbDi.at[tile.block].add(_product(dscores, index_WrDi, 1, 1))
    return put(rows, kl_Wr), put(dindex_q, _product(dscores, index_k_WbDi, 2, 1)), dindex_k_BPbDi

  start = jnp.zeros(places), jnp.zeros((places, Di)), dindex_k_BPbDi
  kl, dindex_q, dindex_k_BPbDi = _over_tiles(tiles, queries, keys, diverge, start)
  valid_Nk = tiles.valid_Nk.astype(jnp.float32)
  kl_N = jnp.where(counts_N, _sum_of_choices(kl, valid_Nk, tiles), 0)
  dindex_q_NDi = _sum_of_choices(dindex_q, valid_Nk, tiles)
  return jnp.sum(kl_N.reshape(B, -1), axis=1), dindex_q_NDi.reshape(B, c, K, Di), dindex_k_BPbDi


# ----------------------------------------------------------------------------------------------------------------------
# all chunks


def _sides(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, part, b, top_k):
  """Queries in chunks, keys in blocks."""
  c = _chunk_length(q_BTHDh, top_k)
  slots_BT, (_, key_segments) = places(segment_ids_BT, part)
  chunks = Queries(split(q_BTHDh, c), split(index_q_BTKDi, c), split(slots_BT, c, -1), split(segment_ids_BT, c))
  heads_first = lambda a: jnp.moveaxis(_blocks(a, b), 3, 1)
  keys_of_heads = heads_first(k_BTKDh), heads_first(v_BTKDh)
  return chunks, Keys(*keys_of_heads, _blocks(index_k_BTDi, b), _blocks(key_segments, b))


def _forward(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k, part=None):
  T = q_BTHDh.shape[1]
  inputs = q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, part
  ids_BTKk = select_blocks(index_q_BTKDi, index_k_BTDi, *places(segment_ids_BT, part), block_size, top_k)
  chunks, keys = _sides(*inputs, block_size, top_k)
  ids = split(ids_BTKk, chunks.slot_Bc.shape[2], -1)

  def one_chunk(dindex_k_BPbDi, chunk):
    queries, ids_BcKk = chunk
    tiles = _plan(ids_BcKk, queries, keys)
    out, logsumexp = _attend(queries, keys, tiles)
    kl_B, dindex_q, dindex_k_BPbDi = _divergence(queries, keys, tiles, logsumexp, dindex_k_BPbDi)
    return dindex_k_BPbDi, (out, logsumexp, kl_B, dindex_q)

  start = jnp.zeros(keys.index_BPbDi.shape, jnp.float32)
  dindex_k, (out, logsumexp, kl, dindex_q) = lax.scan(one_chunk, start, (chunks, ids))
  dindex = join(dindex_q, T).astype(index_q_BTKDi.dtype), _unblock(dindex_k, index_k_BTDi)
  out_BTHDh, logsumexp, ids, dindex = kept((join(out, T), logsumexp, ids, dindex))
  return (out_BTHDh, jnp.sum(kl, axis=0)), (inputs, out_BTHDh, logsumexp, ids, dindex)


def _unblock(x, like):
  """[B, P, b, ...] -> [B, T, ...] of the same length and dtype as `like`."""
  return x.reshape(like.shape[0], -1, *like.shape[2:])[:, : like.shape[1]].astype(like.dtype)


def _backward(block_size, top_k, residuals, cotangents):
  inputs, out_BTHDh, logsumexp, ids, (dindex_q_BTKDi, dindex_k_BTDi) = residuals
  dout_BTHDh, dkl_B = cotangents
  q_BTHDh, k_BTKDh, v_BTKDh, *_ = inputs
  chunks, keys = _sides(*inputs, block_size, top_k)
  c = chunks.q_BcHDh.shape[2]

  def one_chunk(dkeys, chunk):
    queries, ids_BcKk, logsumexp_NG, out, dout = chunk
    tiles = _plan(ids_BcKk, queries, keys)
    dq, dkeys = _attend_backward(queries, keys, tiles, logsumexp_NG, out, dout, dkeys)
    return dkeys, dq

  start = (jnp.zeros(keys.k_BKPbDh.shape, jnp.float32),) * 2
  chunks = chunks, ids, logsumexp, split(out_BTHDh, c), split(dout_BTHDh.astype(q_BTHDh.dtype), c)
  (dk, dv), dq = lax.scan(one_chunk, start, chunks)
  return (
      join(dq, q_BTHDh.shape[1]), _unblock(jnp.moveaxis(dk, 1, 3), k_BTKDh), _unblock(jnp.moveaxis(dv, 1, 3), v_BTKDh),
      per_row(dkl_B, dindex_q_BTKDi), per_row(dkl_B, dindex_k_BTDi), None, None,
  )


msa_gather.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------------------------------------
# warm-up: the divergence over everything a query sees


@jax.custom_vjp
def msa_prefix_kl_gather(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, part=None):
  """The divergence of the dense warm-up, see `reference.msa_prefix_kl`: T^2 work on [B, H, c, T] of memory.

  As in `msa_gather`, its gradient is made on the way forward. A part of a row scores all of its keys, as where it
  stands is not known when the program is built.
  """
  return _prefix_forward(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, part)[0]


def _prefix_forward(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, part=None):
  B, T, H, Dh = q_BTHDh.shape
  K, Di = index_q_BTKDi.shape[2:]
  S = k_BTKDh.shape[1]
  chunk = max(1, min(PREFIX_CHUNK, PREFIX_ELEMENTS // (B * H * S)))
  eighth = -(-T // (8 * chunk)) * chunk  # queries that get the same prefix, so that a 16th of it is future
  span = eighth if part is None else T
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  slots_BT, (_, key_segments_BS) = places(segment_ids_BT, part)
  key_slots_1S = jnp.arange(S, dtype=jnp.int32)[None]
  k_BKTDh = k_BTKDh.transpose(0, 2, 1, 3)

  def one_chunk(end, dindex_k_BTDi, queries):
    q_BcHDh, index_BcKDi, slot_Bc, segment_Bc = queries
    visible_BcS = key_slots_1S[:, None, :end] <= slot_Bc[..., None]
    visible_BcS &= key_segments_BS[:, None, :end] == segment_Bc[..., None]
    masked = lambda scores, visible: jnp.where(visible, scores, MASKED)
    q_BKGcDh = q_BcHDh.reshape(B, -1, K, H // K, Dh).transpose(0, 2, 3, 1, 4)
    scores = einsum('bkgcd,bksd->bkgcs', q_BKGcDh, k_BKTDh[:, :, :end]) * Dh**-0.5
    teacher = jnp.mean(jax.nn.softmax(masked(scores, visible_BcS[:, None, None]), axis=-1), axis=2)
    index_scores = einsum('bcki,bsi->bkcs', index_BcKDi, index_k_BTDi[:, :end]) * Di**-0.5
    log_student = jax.nn.log_softmax(masked(index_scores, visible_BcS[:, None]), axis=-1)
    kl_BKc, dscores = _kl(teacher, log_student)
    counts_B1c = segment_Bc[:, None] > 0
    dscores = jnp.where(counts_B1c[..., None], dscores * Di**-0.5, 0).astype(index_BcKDi.dtype)
    kl_B = jnp.sum(jnp.where(counts_B1c, kl_BKc, 0), axis=(1, 2))
    # No scatter: of all keys its indices are an empty array, at which the compiler of jax 0.11 crashes within shard_map.
    grown_BsDi = dindex_k_BTDi[:, :end] + einsum('bkcs,bcki->bsi', dscores, index_BcKDi)
    dindex_k_BTDi = lax.dynamic_update_slice_in_dim(dindex_k_BTDi, grown_BsDi, 0, axis=1)
    return dindex_k_BTDi, (kl_B, einsum('bkcs,bsi->bcki', dscores, index_k_BTDi[:, :end]))

  kl_B, dindex_q, dindex_k_BTDi = jnp.zeros(B), [], jnp.zeros((B, S, Di))
  for start in range(0, T, span):
    end = min(start + span, T)
    pieces = (q_BTHDh, 0), (index_q_BTKDi, 0), (slots_BT, -1), (segment_ids_BT, 0)
    chunks = Queries(*(split(a[:, start:end], chunk, fill) for a, fill in pieces))
    seen = end if part is None else S
    dindex_k_BTDi, (kl, dq) = lax.scan(functools.partial(one_chunk, seen), dindex_k_BTDi, chunks)
    kl_B += jnp.sum(kl, axis=0)
    dindex_q.append(join(dq, end - start))
  dindex_q_BTKDi = jnp.concatenate(dindex_q, axis=1).astype(index_q_BTKDi.dtype)
  return kl_B, kept((dindex_q_BTKDi, dindex_k_BTDi.astype(index_k_BTDi.dtype)))


def _prefix_backward(dindex, dkl_B):
  return None, None, *(per_row(dkl_B, a) for a in dindex), None, None


msa_prefix_kl_gather.defvjp(_prefix_forward, _prefix_backward)


def _kl(teacher, log_student):
  """KL(teacher || student) over the last axis, and its gradient with respect to the student's scores (MSA, app. B)."""
  log_teacher = jnp.log(jnp.maximum(teacher, jnp.finfo(jnp.float32).tiny))
  return jnp.sum(teacher * (log_teacher - log_student), axis=-1), jnp.exp(log_student) - teacher


def per_row(dkl_B, a):
  """The gradient of a divergence [B], times its cotangent."""
  return a * dkl_B.reshape((-1,) + (1,) * (a.ndim - 1)).astype(a.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# how well the selection meets full attention


def msa_recall_sample(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k):
  """Means of `reference.msa_recall` over at most RECALL_QUERIES queries a row, evenly spaced and the last among them.

  Returns (block recall, score recall), float32 scalars without gradient: the mean over sampled queries of segments
  above 0 and their kv heads. Costs RECALL_QUERIES rows of full attention.
  """
  q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi = lax.stop_gradient((q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi))
  B, T, H, Dh = q_BTHDh.shape
  K = k_BTKDh.shape[2]
  stride = -(-T // RECALL_QUERIES)
  sampled = lambda a: a[:, (T - 1) % stride :: stride]
  slots_BT, _ = places(segment_ids_BT)
  slots_Bn, segments_Bn = sampled(slots_BT), sampled(segment_ids_BT)
  n = slots_Bn.shape[1]
  q_BnKGDh = sampled(q_BTHDh).reshape(B, n, K, H // K, Dh)
  scores = jnp.einsum('bnkgd,bskd->bnkgs', q_BnKGDh, k_BTKDh, preferred_element_type=jnp.float32) * Dh**-0.5
  visible_BnT = slots_BT[:, None] <= slots_Bn[..., None]
  visible_BnT &= segment_ids_BT[:, None] == segments_Bn[..., None]
  teacher = jnp.mean(jax.nn.softmax(jnp.where(visible_BnT[:, :, None, None], scores, MASKED), axis=-1), axis=3)

  by_block = lambda a: jnp.moveaxis(_blocks(jnp.moveaxis(a, -1, 1), block_size), (1, 2), (-2, -1))
  mass_BnKP = jnp.sum(by_block(teacher), axis=-1)
  seen_BnP = jnp.any(by_block(visible_BnT), axis=-1)
  P = seen_BnP.shape[-1]
  best, ids = lax.top_k(jnp.where(seen_BnP[:, :, None], mass_BnKP, -1), min(top_k, P))
  blocks_of = lambda ids: jax.nn.one_hot(ids, P, dtype=bool).any(axis=3)  # -1 is none
  best_BnKP = blocks_of(jnp.where(best >= 0, ids, -1))
  segments = segments_Bn, segment_ids_BT
  chosen_BnKP = blocks_of(select_blocks(sampled(index_q_BTKDi), index_k_BTDi, slots_Bn, segments, block_size, top_k))
  block_recall = jnp.sum(best_BnKP & chosen_BnKP, axis=-1) / jnp.sum(best_BnKP, axis=-1)
  score_recall = jnp.sum(jnp.where(chosen_BnKP, mass_BnKP, 0), axis=-1)
  counts_Bn1 = (segments_Bn > 0)[..., None]
  total = jnp.maximum(K * jnp.sum(counts_Bn1), 1)
  return tuple(jnp.sum(jnp.where(counts_Bn1, a, 0)) / total for a in (block_recall, score_recall))
