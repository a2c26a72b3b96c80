"""MSA's index branch on Hopper (arXiv:2606.13392): one kernel scores keys and keeps the k best blocks of each query.

A block of threads holds 128 query rows and streams keys through a ring of stages in shared memory: one warpgroup copies
in bulk, two multiply 64 rows each with a tile of 128 keys (`wgmma`), take the largest score of each block of keys in
registers, and insert it into a sorted list of the best blocks so far, also in registers; the matrix unit is free for
one of them while the other does so. Neither the scores of tokens nor those of blocks reach memory at any length, and
nothing is left to sort.

Queries are the rows of the product and keys its columns: then 4 lanes hold a row, and the largest of a block is a
maximum over registers and two shuffles, where over rows of keys it would take three shuffles for each column and an
exchange between warps. The list of a row stands in the same 4 lanes. More than `MOST` blocks are found in further
passes over the keys, each behind the last block of the pass before.

Tiles of keys that no query of a tile sees are neither copied nor multiplied, and those that all of them see not masked.
Keys are split in parts over several blocks of threads where there are too few queries to fill the card, as in decoding;
the lists of parts are merged by `lax.top_k`. Keys are copied once where S is not a multiple of 128. None of it has run
on a GPU.

Letters: B rows, T queries, S key slots, K index heads, Di index dim, b block size, k blocks per query and head,
N = T*K query rows, padded; R query rows of a block of threads, t of those; J parts that keys are split in; n blocks
found in one pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmx.kernels_pallas import hopper

ROWS = 64  # query rows of a warpgroup: the rows of one wgmma
KEYS = 128  # keys of a tile: 64 registers of scores in each thread
MOST = 24  # blocks found in one pass: 96 registers of scores and ids; with 32 blocks some would spill
CORES = 132  # each serves one block of threads
DTYPES = jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn
STAGE_BYTES = 2**17  # of shared memory, for tiles of keys: 4 of index dim 128

WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_KEY = WGMMA.reduce(1), WGMMA.reduce(0)


def unsupported(index_q_BTKDi, index_k_BSDi, block_size) -> str:
  """Why `select_blocks_gpu` cannot serve these arguments, or ''. Takes anything with shape and dtype."""
  Di = index_k_BSDi.shape[2]
  if index_q_BTKDi.dtype != index_k_BSDi.dtype or index_k_BSDi.dtype not in DTYPES:
    allowed = ', '.join(jnp.dtype(dtype).name for dtype in DTYPES)
    return f'needs both of one of {allowed}, got index_q {index_q_BTKDi.dtype} and index_k {index_k_BSDi.dtype}'
  row = 128 // index_k_BSDi.dtype.itemsize  # see `hopper.tiled`
  if Di % row or Di > 256:
    return f'needs an index dim in multiples of {row} up to 256 for {index_k_BSDi.dtype}, got {Di}'
  if block_size not in (8, 16, 32, 64, 128):
    return f'needs a block_size of 8, 16, 32, 64 or 128, got {block_size}'
  return ''


def select_blocks_gpu(index_q_BTKDi, index_k_BSDi, slots_BT, segments, block_size, top_k, interpret=False):
  """The k best blocks of each query and index head; the meaning is that of `sparse.select_blocks`.

  Args:
    slots_BT: int32 slot of each query; -1 is padding.
    segments: (segment_ids_BT, segment_ids_BS) of queries and keys, or None.
    interpret: False for the card, `hopper.simulator()` for tests.

  Returns:
    int32 [B, T, K, k], own block first, then by falling score, ties to the lower block, -1 where fewer are visible.
    No gradient.
  """
  B, T, K, Di = index_q_BTKDi.shape
  own_BTK1 = jnp.broadcast_to(jnp.where(slots_BT < 0, -1, slots_BT // block_size)[..., None, None], (B, T, K, 1))
  if top_k == 1:
    return own_BTK1
  index_q_BTKDi, index_k_BSDi = lax.stop_gradient((index_q_BTKDi, index_k_BSDi))
  R = ROWS * min(2, pl.cdiv(T * K, ROWS))
  pad = lambda x, to, fill=0: jnp.pad(
      x, ((0, 0), (0, -x.shape[1] % to)) + ((0, 0),) * (x.ndim - 2), constant_values=fill
  )
  per_row = lambda x_BT, fill: pad(jnp.repeat(x_BT, K, axis=1), R, fill)
  q_BNDi, k_BSDi = pad(index_q_BTKDi.reshape(B, T * K, Di), R), pad(index_k_BSDi, KEYS)
  slot_BN = per_row(slots_BT, -1)
  segments = segments and (per_row(segments[0], 0), pad(segments[1], KEYS))
  tiles_Bt4 = _tiles(slot_BN, segments, R, k_BSDi.shape[1] // KEYS)

  found, after = [], None
  for first in range(0, top_k - 1, MOST):
    last = first + MOST >= top_k - 1
    n = min(MOST, top_k - 1 - first)
    *scores, ids_BnN = _best(q_BNDi, k_BSDi, slot_BN, segments, tiles_Bt4, after, block_size, n, not last, interpret)
    after = None if last else (scores[0][:, -1], ids_BnN[:, -1])
    found.append(ids_BnN[..., : T * K].reshape(B, n, T, K).transpose(0, 2, 3, 1))
  return jnp.concatenate([own_BTK1, jnp.where(own_BTK1 < 0, -1, jnp.concatenate(found, axis=-1))], axis=-1)


def _tiles(slot_BN, segments, R, tiles):
  """Of each tile of queries: its first tile of keys and the end, the first that needs no mask and the end of those.

  int32 [B, t, 4]. Padding sees whatever the other rows of its tile see: what it picks is thrown away.
  """
  in_tiles = lambda x_BN: x_BN.reshape(x_BN.shape[0], -1, R)
  lowest = lambda x_BtR: jnp.min(jnp.where(slot_BtR < 0, most, x_BtR), axis=-1)
  highest = lambda x_BtR: jnp.max(jnp.where(slot_BtR < 0, -most, x_BtR), axis=-1)
  most = jnp.iinfo(jnp.int32).max
  slot_BtR = in_tiles(slot_BN)
  end_Bt = jnp.maximum(highest(slot_BtR) // KEYS + 1, 0)
  free_end_Bt = jnp.minimum(lowest(slot_BtR) // KEYS + (lowest(slot_BtR) % KEYS == KEYS - 1), end_Bt)
  if segments is None:
    zero_Bt = jnp.zeros_like(end_Bt)
    return jnp.stack([zero_Bt, end_Bt, zero_Bt, free_end_Bt], axis=-1)
  # Segments of queries and keys can only be equal where their ranges meet, and all are where those are one number.
  low_Bt1, high_Bt1 = (bound(in_tiles(segments[0]))[..., None] for bound in (lowest, highest))
  keys_B1ts = segments[1].reshape(-1, 1, tiles, KEYS)
  key_low_B1t, key_high_B1t = jnp.min(keys_B1ts, axis=-1), jnp.max(keys_B1ts, axis=-1)
  tile_11t = jnp.arange(tiles, dtype=jnp.int32)[None, None]
  meet = (key_low_B1t <= high_Bt1) & (key_high_B1t >= low_Bt1) & (tile_11t < end_Bt[..., None])
  free = (key_low_B1t == high_Bt1) & (key_high_B1t == low_Bt1) & (tile_11t < free_end_Bt[..., None])
  first = lambda found, otherwise: jnp.min(jnp.where(found, tile_11t, otherwise), axis=-1)
  end_Bt = jnp.max(jnp.where(meet, tile_11t + 1, 0), axis=-1)
  free_Bt = first(free, tiles)
  free_end_Bt = first(~free & (tile_11t >= free_Bt[..., None]), tiles)
  return jnp.stack([jnp.minimum(first(meet, tiles), end_Bt), end_Bt, free_Bt, free_end_Bt], axis=-1)


def _best(q_BNDi, k_BSDi, slot_BN, segments, tiles_Bt4, after, block, n, scored, interpret):
  """The n best blocks of each row but its own, by falling score: ([float32 scores if `scored`], int32 ids) [B, n, N].

  after: (float32 score, int32 block) [B, N] to search behind, or None.
  """
  B, N, Di = q_BNDi.shape
  S, t = k_BSDi.shape[1], tiles_Bt4.shape[1]
  groups = N // t // ROWS
  J = max(1, min(CORES // (B * t), S // KEYS))
  dtypes = (jnp.float32, jnp.int32) if scored or J > 1 else (jnp.int32,)
  stages = min(STAGE_BYTES // (KEYS * Di * k_BSDi.dtype.itemsize), 8)
  transforms = hopper.tiled(k_BSDi.dtype)
  call = plgpu.kernel(
      functools.partial(_kernel, block=block, interpret=interpret),
      out_type=[jax.ShapeDtypeStruct((B, J, n, N), dtype) for dtype in dtypes],
      # The last runs fastest, and is the one that may exceed 65535, as with a million tokens and 16 heads.
      grid=(B, J, t), grid_names=('row', 'part', 'tile'), num_threads=groups + 1, thread_name='group',
      compiler_params=hopper.parameters(), kernel_name='select_blocks',
      scratch_types=[
          plgpu.SMEM((groups, ROWS, Di), q_BNDi.dtype, transforms=transforms),
          plgpu.SMEM((stages, KEYS, Di), k_BSDi.dtype, transforms=transforms),
          plgpu.SMEM((stages, KEYS), jnp.int32) if segments else None,
          [plgpu.SMEM((groups, n, ROWS), dtype) for dtype in dtypes],
          plgpu.Barrier(num_barriers=groups),
          plgpu.Barrier(num_arrivals=2 if segments else 1, num_barriers=stages),
          plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
      ],
      interpret=interpret,
  )
  outputs = call(tiles_Bt4, q_BNDi, k_BSDi, slot_BN, segments or (), after or ())
  if J == 1:
    return [x[:, 0] for x in outputs]
  # Parts stand in the order of their keys and tied blocks within a part in theirs, so that the lower block stays first.
  scores_BNm, ids_BNm = (x.transpose(0, 3, 1, 2).reshape(B, N, J * n) for x in outputs)
  scores_BNn, best_BNn = lax.top_k(scores_BNm, n)
  return [x.transpose(0, 2, 1) for x in (scores_BNn, jnp.take_along_axis(ids_BNm, best_BNn, axis=-1))]


# ----------------------------------------------------------------------------------------------------------------------
# the kernel


def _kernel(tiles_ref, q_ref, k_ref, slot_ref, segment_refs, after_refs, *refs, block, interpret):
  *out_refs, q_smem, k_smem, segment_smem, out_smem, q_filled, filled, emptied = refs
  groups, stages, n, parts = q_smem.shape[0], k_smem.shape[0], out_smem[0].shape[1], out_refs[0].shape[1]
  row, tile, part, group = (lax.axis_index(name) for name in ('row', 'tile', 'part', 'group'))
  tile = tiles_ref.shape[1] - 1 - tile  # under a causal mask the last have the most to do
  first, end, free, free_end = (tiles_ref[row, tile, i] for i in range(4))
  share = lax.div(end - first + (parts - 1), parts)
  start = first + part * share
  steps = jnp.clip(end - start, 0, share)

  @pl.when(group == groups)
  def _():
    plgpu.set_max_registers(24, action='decrease')

    @pl.loop(0, steps)
    def _(step):
      stage = lax.rem(step, stages)
      pl.when(step >= stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
      keys = pl.ds((start + step) * KEYS, KEYS)
      plgpu.copy_gmem_to_smem(k_ref.at[row, keys], k_smem.at[stage], filled.at[stage])
      if segment_refs:
        plgpu.copy_gmem_to_smem(segment_refs[1].at[row, keys], segment_smem.at[stage], filled.at[stage])

    pl.loop(jnp.maximum(steps - stages, 0), steps)(lambda step: plgpu.barrier_wait(emptied.at[lax.rem(step, stages)]))

  @pl.when(group < groups)
  def _():
    plgpu.set_max_registers(232, action='increase')
    rows = pl.ds((tile * groups + group) * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(q_ref.at[row, rows], q_smem.at[group], q_filled.at[group])
    by_row = lambda ref: hopper.read(ref.at[row, rows], BY_ROW, interpret)
    slot = by_row(slot_ref)
    segment = by_row(segment_refs[0]) if segment_refs else None
    after = [by_row(ref) for ref in after_refs]
    own = lax.div(slot, jnp.int32(block))
    plgpu.barrier_wait(q_filled.at[group])

    def mask(scores, stage, key):
      across = lambda x, axis: lax.broadcast_in_dim(x, scores.shape, (axis,))
      visible = hopper.iota(scores.shape, 1, WGMMA, interpret) <= across(slot - key, 0)
      if segment_refs:
        visible &= across(hopper.read(segment_smem.at[stage], BY_KEY, interpret), 1) == across(segment, 0)
      # A choice, not a sum: what is behind or of another document may be NaN.
      return jnp.where(visible, scores, -jnp.inf)

    def step(i, best):
      stage, keys = lax.rem(i, stages), start + i
      plgpu.barrier_wait(filled.at[stage])
      scores = hopper.product(q_smem.at[group], k_smem.at[stage], interpret, transpose_b=True)
      whole = (free <= keys) & (keys < free_end)
      scores = lax.cond(whole, lambda: scores, lambda: mask(scores, stage, keys * KEYS))
      plgpu.barrier_arrive(emptied.at[stage])
      for j in range(KEYS // block):
        id_ = keys * (KEYS // block) + j
        score = jnp.max(scores[:, j * block : (j + 1) * block], axis=1)
        open_ = own != id_
        if after:
          open_ &= (score < after[0]) | ((score == after[0]) & (after[1] < id_))
        best = _insert(jnp.where(open_, score, -jnp.inf), id_, *best)
      return best

    full = lambda value, dtype: hopper.cast(jnp.full((ROWS,), value, dtype), BY_ROW, interpret)
    best = (full(-jnp.inf, jnp.float32),) * n, (full(-1, jnp.int32),) * n
    best = lax.fori_loop(0, steps, step, best)

    for smem, values in zip(out_smem, best[-len(out_smem) :]):
      for i, value in enumerate(values):
        smem[group, i] = value
    plgpu.commit_smem()
    for smem, ref in zip(out_smem, out_refs):
      plgpu.copy_smem_to_gmem(smem.at[group], ref.at[row, part, :, rows])
    plgpu.wait_smem_to_gmem(0)


def _insert(score, id_, scores, ids):
  """Puts a block behind all that score as high, whose ids are lower; the last of the list falls out."""
  stays = [other >= score for other in scores]
  # The case of an array goes first: with a scalar there, Mosaic's select of jax 0.10 loses that the ids are signed.
  put = lambda new, old: tuple(
      jnp.where(stays[i], old[i], jnp.where(stays[i - 1], new, old[i - 1]) if i else new) for i in range(len(old))
  )
  return put(score, scores), put(id_, ids)
