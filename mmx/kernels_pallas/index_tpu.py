"""MSA's index branch on TPU (arXiv:2606.13392): scores of tokens, the largest of each block, the k best blocks.

  pooled   scores of a tile of keys against a tile of query rows, and the largest of each block.
  largest  k rounds of maximum over a query row's blocks: TPU kernels have no sort, and XLA's would sort all blocks.
  chosen   in training, the logsumexp over the chosen blocks' tokens, of each block's, which `pooled` then makes too: the
           student's, as the paper has it (section 4). While the matrix unit is busy exponentials cost little; going
           through the chosen pairs once more would cost 3.4 times as much at 128K tokens, and as much at 450K.

Both keep keys or blocks on sublanes and query rows on lanes. Then the largest of a block is an elementwise maximum of
registers, where across lanes it would be one reduction for each row and block; the pooled scores [P, N] come out dense
for any block size; and a decoded token still streams its keys through the matrix unit as rows, at 128 query rows.

Token scores stay in VMEM. Pooled scores are kept for one chunk of queries, POOLED_BYTES of them or one tile of queries.
Tiles of keys that no query of a tile sees are neither read nor computed, and those that all see whole are not masked.
None of it has run on a TPU.

Letters: B rows, T queries, S key slots, K index heads, Di index dim, b block size, P blocks, k blocks per query and
head, c queries of a chunk, N = c*K query rows, R query rows of a tile, s keys of a tile, n = s/b blocks of a tile.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas.chunks import join, split
from mmx.kernels_pallas.sparse import MASKED

LANES = 128
ROWS = 1024  # query rows of a tile: 1024 products for each 2 bytes of keys read, above what any TPU's memory asks for
KEYS = 1024  # keys of a tile: 8 blocks of 128, one for each sublane
POOLED_BYTES = 2**26
MOST_BLOCKS = 8192  # of one query row: 4 MiB for 128 rows, which `largest` holds three times
DTYPES = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
STRIP = 64  # blocks compared at once in `largest`: 8 registers; 16 with their ids and all would spill


def unsupported(index_q_BTKDi, index_k_BSDi, block_size):
  """Why `select_blocks_pallas` cannot serve these arguments, or ''."""
  _, S, Di = index_k_BSDi.shape
  if index_q_BTKDi.dtype != index_k_BSDi.dtype or index_k_BSDi.dtype not in DTYPES:
    allowed = ', '.join(jnp.dtype(dtype).name for dtype in DTYPES)
    return f'needs both of one of {allowed}, got index_q {index_q_BTKDi.dtype} and index_k {index_k_BSDi.dtype}'
  if Di % 32 or Di > 256:
    return f'needs an index dim in multiples of 32 up to 256, got {Di}'
  if block_size not in (8, 16, 32, 64, 128):
    return f'needs a block_size of 8, 16, 32, 64 or 128, got {block_size}'
  if pl.cdiv(S, block_size) > MOST_BLOCKS:
    return f'needs at most {MOST_BLOCKS} blocks of keys, got {pl.cdiv(S, block_size)} of block_size {block_size}'
  return ''


def select_blocks_pallas(index_q_BTKDi, index_k_BSDi, slots_BT, segments, block_size, top_k, interpret=False):
  """The k best blocks of each query and index head; the meaning is that of `sparse.select_blocks`.

  Args:
    slots_BT: int32 slot of each query; -1 is padding.
    segments: (segment_ids_BT, segment_ids_BS) of queries and keys, or None.
    interpret: run in Pallas's interpret mode, on any platform.

  Returns:
    int32 [B, T, K, k], own block first, then by falling score, ties to the lower block, -1 where fewer are visible.
    No gradient.
  """
  return _select(index_q_BTKDi, index_k_BSDi, slots_BT, segments, block_size, top_k, interpret)[0]


def select_blocks_and_sum(index_q_BTKDi, index_k_BSDi, slots_BT, segments, block_size, top_k, interpret=False):
  """`select_blocks_pallas`, and of each query and index head the logsumexp of its scores, times Di**-0.5, over what it
  sees of those blocks: float32 [B, T, K], 0 where it chose none.
  """
  return _select(index_q_BTKDi, index_k_BSDi, slots_BT, segments, block_size, top_k, interpret, sums=1)


def _select(index_q_BTKDi, index_k_BSDi, slots_BT, segments, block_size, top_k, interpret, sums=0):
  """(ids, *logsumexps), of which there are `sums`."""
  index_q_BTKDi, index_k_BSDi = lax.stop_gradient((index_q_BTKDi, index_k_BSDi))
  B, T, K, Di = index_q_BTKDi.shape
  S = index_k_BSDi.shape[1]
  P = pl.cdiv(pl.cdiv(S, KEYS) * (KEYS // block_size), STRIP) * STRIP
  least = LANES // math.gcd(LANES, K)  # fewest queries that fill lanes
  tile = min(max(least, ROWS // K // least * least), pl.cdiv(T, least) * least)
  chunk = tile * max(1, min(pl.cdiv(T, tile), POOLED_BYTES // (B * tile * K * P * 4 * (1 + sums))))
  query_segments, key_segments = segments or (None, None)
  if key_segments is not None:
    key_segments = jnp.pad(key_segments, ((0, 0), (0, -S % KEYS))).reshape(B, -1, LANES)

  def one_chunk(queries):
    q_BcKDi, slot_Bc, segment_Bc = queries
    per_row = lambda x_Bc: None if x_Bc is None else jnp.repeat(x_Bc, K, axis=1)[:, None]
    slot_B1N = per_row(slot_Bc)
    q_BNDi = q_BcKDi.reshape(B, chunk * K, Di)
    pooled_BPN, *sums_BPN = _pooled(
        q_BNDi, index_k_BSDi, slot_B1N, per_row(segment_Bc), key_segments, P, tile * K, block_size, sums, interpret
    )
    own_B1N = jnp.where(slot_B1N < 0, -1, slot_B1N // block_size)
    ids_BkN = _largest(pooled_BPN, own_B1N, top_k, interpret)
    return ids_BkN, *(_chosen(sum_BPN, ids_BkN, own_B1N, interpret) for sum_BPN in sums_BPN)

  ids, *logsumexps = lax.map(
      one_chunk, (split(index_q_BTKDi, chunk), split(slots_BT, chunk, -1), split(query_segments, chunk))
  )
  # Turned once at the end: with its k in lanes, padded to 128, the output of all chunks would be held 8 times over.
  ids_BTKk = join(ids.reshape(-1, B, top_k, chunk, K).transpose(0, 1, 3, 4, 2), T)
  return ids_BTKk, *(join(logsumexp.reshape(-1, B, chunk, K), T) for logsumexp in logsumexps)


# ----------------------------------------------------------------------------------------------------------------------
# scores of tokens, the largest of each block


def _pooled(q_BNDi, k_BSDi, slot_B1N, segment_B1N, key_segments, P, R, block, sums, interpret):
  """float32 [B, P, N]: each block's largest score, unscaled, -inf where nothing is visible; no value behind all slots.
  If `sums` is 1, also each block's logsumexp, scaled.
  """
  B, N, Di = q_BNDi.shape
  S, n = k_BSDi.shape[1], KEYS // block
  tiles = pl.cdiv(S, KEYS)
  # Rows and tiles in one axis: scalar memory pads the last to 128, and rows of decoding have one tile each.
  spans = jnp.stack(_spans(slot_B1N, segment_B1N, key_segments, R, tiles)).reshape(4, -1)
  seen_tiles = jnp.maximum(jnp.max(slot_B1N), 0) // KEYS + 1  # of the chunk's last query; `_largest` reads no further
  # A step that computes nothing names the tile that is there already, and nothing is copied.
  at = lambda b, i: b * (N // R) + i
  seen = lambda b, i, j, spans: jnp.maximum(jnp.clip(j, spans[0, at(b, i)], spans[1, at(b, i)]), 0)
  rows = pl.BlockSpec((1, 1, R), lambda b, i, j, *_: (b, 0, i))
  in_specs = [
      pl.BlockSpec((1, R, Di), lambda b, i, j, *_: (b, i, 0)),
      pl.BlockSpec((1, KEYS, Di), lambda b, *step: (b, seen(b, *step), 0)),
      rows,
  ]
  arguments = q_BNDi, k_BSDi, slot_B1N
  if key_segments is not None:
    in_specs += [rows, pl.BlockSpec((1, KEYS // LANES, LANES), lambda b, *step: (b, seen(b, *step), 0))]
    arguments += segment_B1N, key_segments
  return pl.pallas_call(
      functools.partial(_pooled_kernel, block=block, sums=sums),
      out_shape=[jax.ShapeDtypeStruct((B, P, N), jnp.float32)] * (1 + sums),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(B, N // R, seen_tiles), in_specs=in_specs,
          out_specs=[pl.BlockSpec((1, n, R), lambda b, i, j, *_: (b, j, i))] * (1 + sums),
      ),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
      cost_estimate=pl.CostEstimate(
          flops=2 * B * N * S * Di, transcendentals=sums * B * N * S,
          bytes_accessed=B * (N // R * S * Di * k_BSDi.dtype.itemsize + q_BNDi.nbytes // B + 4 * (1 + sums) * P * N),
      ),
      interpret=interpret, name='msa_index_scores',
  )(spans, *arguments)


def _spans(slot_B1N, segment_B1N, key_segments, R, tiles):
  """First and last tile of keys that a tile of queries may see, and first and last of a run that each of them sees whole:
  int32 [B, N/R] four times, last -1 where none.
  """
  in_tiles = lambda x: x.reshape(x.shape[0], -1, R)
  slot_BtR, most = in_tiles(slot_B1N), jnp.iinfo(jnp.int32).max - 1
  last_Bt = jnp.max(slot_BtR, axis=-1) // KEYS
  whole_Bt = jnp.minimum((jnp.min(jnp.where(slot_BtR < 0, most, slot_BtR), axis=-1) + 1) // KEYS - 1, last_Bt)
  if segment_B1N is None:
    return jnp.zeros_like(last_Bt), last_Bt, jnp.zeros_like(last_Bt), whole_Bt
  # Padding is of no segment. Segments of queries and keys can only be equal where their ranges meet.
  low_Bt1 = jnp.min(jnp.where(slot_BtR < 0, most, in_tiles(segment_B1N)), axis=-1, keepdims=True)
  high_Bt1 = jnp.max(jnp.where(slot_BtR < 0, -most, in_tiles(segment_B1N)), axis=-1, keepdims=True)
  keys_B1ts = key_segments.reshape(-1, 1, tiles, KEYS)
  low_B1t, high_B1t = jnp.min(keys_B1ts, axis=-1), jnp.max(keys_B1ts, axis=-1)
  upto = lambda last_Bt: jnp.arange(tiles, dtype=jnp.int32)[None, None] <= last_Bt[..., None]
  meet = (low_B1t <= high_Bt1) & (high_B1t >= low_Bt1) & upto(last_Bt)
  whole = (low_B1t == high_Bt1) & (high_B1t == low_Bt1) & upto(whole_Bt)
  (first_Bt, last_Bt), (first_whole_Bt, last_whole_Bt) = map(_ends, (meet, whole))
  without_gap = jnp.sum(whole, axis=-1) == last_whole_Bt - first_whole_Bt + 1  # in rows whose documents do not ascend
  return first_Bt, last_Bt, first_whole_Bt, jnp.where(without_gap, last_whole_Bt, -1)


def _ends(true_Btt):
  """int32 [B, t], twice: where the first stands, and the last; -1 where there is none."""
  found, last = jnp.any(true_Btt, axis=-1), true_Btt.shape[-1] - 1
  first_Bt = jnp.argmax(true_Btt, axis=-1).astype(jnp.int32)
  return first_Bt, jnp.where(found, last - jnp.argmax(true_Btt[..., ::-1], axis=-1).astype(jnp.int32), -1)


def _pooled_kernel(spans_ref, q_ref, k_ref, slot_ref, *refs, block, sums):
  segments, (best_ref, *sum_refs) = refs[: -1 - sums], refs[-1 - sums :]
  step, at = pl.program_id(2), pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
  seen = (step >= spans_ref[0, at]) & (step <= spans_ref[1, at])
  whole = (step >= spans_ref[2, at]) & (step <= spans_ref[3, at])

  def masked(scores):
    visible = lax.broadcasted_iota(jnp.int32, scores.shape, 0) <= slot_ref[0] - step * KEYS
    if segments:
      segment_1R, key_segments = segments[0][0], segments[1][0].T  # [LANES, KEYS / LANES]: keys on sublanes
      parts = [key_segments[:, part : part + 1] == segment_1R for part in range(KEYS // LANES)]
      visible &= jnp.concatenate(parts)
    # A choice, not a sum: what is behind or of another document may be NaN.
    return jnp.where(visible, scores, -jnp.inf)

  def pool(mask):
    q_RDi, k_sDi = q_ref[0], k_ref[0]
    if q_RDi.dtype.itemsize == 1:  # no matrix unit up to v6e multiplies float8; every one of them is a bfloat16
      q_RDi, k_sDi = q_RDi.astype(jnp.bfloat16), k_sDi.astype(jnp.bfloat16)
    # bfloat16 products are exact in float32; float32 operands need all their bits, or near scores would change places.
    precision = lax.Precision.HIGHEST if q_RDi.dtype == jnp.float32 else None
    scores = lax.dot_general(
        k_sDi, q_RDi, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    scores = mask(scores).reshape(KEYS // block, block, -1)
    best_nR = jnp.max(scores, axis=1)
    best_ref[0] = best_nR
    for sum_ref in sum_refs:
      top_nR, scale = jnp.where(best_nR > -jnp.inf, best_nR, 0), q_RDi.shape[1] ** -0.5
      total_nR = jnp.sum(jnp.exp2((scores - top_nR[:, None]) * (scale / math.log(2))), axis=1)
      sum_ref[0] = top_nR * scale + jnp.log(total_nR)

  pl.when(seen & whole)(lambda: pool(lambda scores: scores))
  pl.when(seen & ~whole)(lambda: pool(masked))

  @pl.when(~seen)
  def _():
    for ref in (best_ref, *sum_refs):
      ref[0] = jnp.full(ref.shape[1:], -jnp.inf)


# ----------------------------------------------------------------------------------------------------------------------
# the k best blocks


def _largest(pooled_BPN, own_B1N, top_k, interpret):
  """int32 [B, k, N]: the blocks of each column by falling score, its own first, -1 where nothing is left."""
  B, P, N = pooled_BPN.shape
  lanes = lambda rows: pl.BlockSpec((1, rows, LANES), lambda b, i, _: (b, 0, i))
  return pl.pallas_call(
      functools.partial(_largest_kernel, top_k=top_k),
      out_shape=jax.ShapeDtypeStruct((B, top_k, N), jnp.int32),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(B, N // LANES), in_specs=[lanes(P), lanes(1)], out_specs=lanes(top_k),
          scratch_shapes=[pltpu.VMEM((P, LANES), jnp.float32)],
      ),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
      cost_estimate=pl.CostEstimate(
          flops=6 * B * P * N * top_k, transcendentals=0, bytes_accessed=pooled_BPN.nbytes + 4 * B * N * (top_k + 1)
      ),
      interpret=interpret, name='msa_index_largest',
  )(_strips(own_B1N), pooled_BPN, own_B1N)


def _strips(own_B1N):
  """Of each LANES queries, all rows': no block is visible behind a query's own."""
  return (jnp.max(own_B1N.reshape(-1, LANES), axis=-1) + STRIP) // STRIP


def _strips_here(strips_ref):
  return strips_ref[pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]


def _largest_kernel(strips_ref, pooled_ref, own_ref, ids_ref, left_ref, *, top_k):
  P, own_1L = left_ref.shape[0], own_ref[0]
  block_h = lax.broadcasted_iota(jnp.int32, (STRIP, LANES), 0)
  strips = _strips_here(strips_ref)
  at = lambda i: pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP)

  def load(i, _):
    left_ref[at(i)] = jnp.where(block_h + i * STRIP <= own_1L, pooled_ref[0, at(i)], -jnp.inf)

  def strip(i, carry, taken, value):
    """Sets `taken` to `value`; the largest of what stands at each place of a strip so far, and its block."""
    best, best_id = carry
    ids = block_h + i * STRIP
    scores = jnp.where(ids == taken, value, left_ref[at(i)])
    left_ref[at(i)] = scores
    higher = scores > best  # a tie stays with the lower block
    return jnp.where(higher, scores, best), jnp.where(higher, ids, best_id)

  def one_round(round_, carry):
    taken, value = carry
    start = jnp.full(block_h.shape, -jnp.inf), jnp.full(block_h.shape, P, jnp.int32)
    best, best_id = lax.fori_loop(0, strips, functools.partial(strip, taken=taken, value=value), start)
    top = jnp.max(best, axis=0, keepdims=True)
    taken = jnp.min(jnp.where(best == top, best_id, P), axis=0, keepdims=True)
    ids_ref[0, pl.ds(round_, 1)] = jnp.where(top > -jnp.inf, taken, -1)
    return taken, -jnp.inf

  lax.fori_loop(0, strips, load, None)
  lax.fori_loop(0, top_k, one_round, (own_1L, jnp.inf))


# ----------------------------------------------------------------------------------------------------------------------
# the sum over them


def _chosen(sum_BPN, ids_BkN, own_B1N, interpret):
  """float32 [B, 1, N]: the logsumexp over the chosen blocks, of each block's own; 0 where none is chosen."""
  B, P, N = sum_BPN.shape
  k = ids_BkN.shape[1]
  lanes = lambda rows: pl.BlockSpec((1, rows, LANES), lambda b, i, _: (b, 0, i))
  return pl.pallas_call(
      _chosen_kernel, out_shape=jax.ShapeDtypeStruct((B, 1, N), jnp.float32),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(B, N // LANES), in_specs=[lanes(P), lanes(k)], out_specs=lanes(1),
      ),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
      cost_estimate=pl.CostEstimate(
          flops=2 * B * P * N * k, transcendentals=2 * B * P * N, bytes_accessed=sum_BPN.nbytes + 4 * B * N * (k + 1)
      ),
      interpret=interpret, name='msa_index_logsumexp',
  )(_strips(own_B1N), sum_BPN, ids_BkN)


def _chosen_kernel(strips_ref, sum_ref, ids_ref, logsumexp_ref):
  block_h = lax.broadcasted_iota(jnp.int32, (STRIP, LANES), 0)

  def strip(i, carry):
    top, total = carry
    ids = block_h + i * STRIP
    chosen = functools.reduce(jnp.logical_or, [ids == ids_ref[0, pl.ds(j, 1)] for j in range(ids_ref.shape[1])])
    # What is not chosen may be of no query at all, and unset memory.
    scores = jnp.where(chosen, sum_ref[0, pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP)], MASKED)
    higher = jnp.maximum(top, scores)
    return higher, total * jnp.exp(top - higher) + jnp.where(chosen, jnp.exp(scores - higher), 0)

  start = jnp.full(block_h.shape, MASKED), jnp.zeros(block_h.shape)
  top, total = lax.fori_loop(0, _strips_here(strips_ref), strip, start)
  top_1L = jnp.max(top, axis=0, keepdims=True)
  total_1L = jnp.sum(total * jnp.exp(top - top_1L), axis=0, keepdims=True)
  logsumexp_ref[0] = jnp.where(total_1L > 0, top_1L + jnp.log(jnp.where(total_1L > 0, total_1L, 1)), 0)
