"""Attention to one stretch of keys on Hopper: causal within documents, within a window, of queries of a part of a row.

What a query sees of packed documents is one stretch of slots, from where its document or its window begins to its own
(`sight`). cuDNN is told by a bias of [T, S], and has no form for a part of a row. Here two numbers a query say it, and of
each tile XLA works out which tiles it meets: others are neither copied nor multiplied, and those that it sees whole not
masked. The gradient of a row of 32,768 tokens at M2's heads, compiled, has 0.39 GiB of temporaries; cuDNN's 4.8.

Three kernels, as in FlashAttention-3 (arXiv:2407.08608): one warpgroup copies in bulk, two multiply. Forward, and for the
gradient of queries, each of the two has 64 queries of one head and keys stream by; forward they take turns at the matrix
unit, so that one makes its weights while the other multiplies. For the gradients of keys and values each has 64 keys of
one kv head, and the queries of all its heads stream by, with scores as [keys, queries]. So nothing is added by atomics
and equal inputs give equal bits; scores are made twice in the backward pass, seven products for five. None of it has run
on a GPU.

Letters: B rows, n runs of queries in each, R = B*n, T queries of a run, S key slots, H query heads, K kv heads, G = H/K,
Dh head dim, t tiles of queries, s tiles of keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmx.kernels_pallas import hopper
from mmx.kernels_pallas.chunks import kept
from mmx.kernels_pallas.shards import on_documents, on_shards, on_windows

ROWS = 64  # of a warpgroup's product
TILE = 128  # queries or keys that stay: two warpgroups' rows
KEYS = 128  # that stream by forward, at once
FEW = 64  # that stream by backward, where a warpgroup has two products at work beside its sums
STAGES = 2  # tiles in shared memory: one at work and the next
MULTIPROCESSORS = 132  # of an H100 or H200
MEMORY = 2  # the warpgroup that copies; 0 and 1 compute
WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
BITS = math.log2(math.e)  # exponentials are of base 2, as the card's: a product with this less for each score


def unsupported(q_BTHDh, k_BSKDh) -> str:
  """'' where the kernels compile for Hopper, else one reason. Takes anything with shape and dtype."""
  H, Dh = q_BTHDh.shape[2:]
  if H % k_BSKDh.shape[2]:
    return f'{H} query heads are no multiple of {k_BSKDh.shape[2]} kv heads'
  if q_BTHDh.dtype != jnp.bfloat16 or k_BSKDh.dtype != jnp.bfloat16:
    return f'dtypes {q_BTHDh.dtype} and {k_BSKDh.dtype}; bfloat16 is supported'
  return '' if Dh in (64, 128) else f'head dim {Dh}; 64 and 128 are supported'


def sliding_unsupported(q_BTHDh, k_BSKDh, sink_tokens) -> str:
  """The same of `sliding_hopper`."""
  return f'serves no sink tokens, got {sink_tokens}' if sink_tokens else unsupported(q_BTHDh, k_BSKDh)


def attention_hopper(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT, mesh=None, part=None, interpret=False):
  """`reference.attention` where each document stands in one piece: [B, T, H, Dh] of q's dtype.

  Args:
    mesh: of whole rows, over whose devices rows and heads are split.
    part: see `chunks.Part`; within a shard_map.
    interpret: False for the card, `hopper.simulator()` for tests.
  """
  in_order = part is None or bool(np.all(np.diff(part.slots_nT) == 1))
  attend = functools.partial(_attend, n=1 if in_order else 2, interpret=interpret)
  return on_documents(attend, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT, mesh, part)


def sliding_hopper(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS, window, mesh=None, start=None, interpret=False):
  """`reference.sliding` without sink tokens and past keys.

  With `start`, within a shard_map, queries are those at the slots from there on; else `mesh` as in `attention_hopper`.
  """
  attend = functools.partial(_attend, n=1, interpret=interpret)
  return on_windows(attend, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS, window, mesh, start)


def attention_cached_hopper(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, mesh=None, interpret=False):
  """`attention.attention_cached` where S is a multiple of KEYS; the cache stays where it is. [B, T, H, Dh], no gradient.

  The G heads of a kv head are queries beside each other, which share its keys. Where there are few, as in decoding, what
  is used of the cache is cut into as many parts as multiprocessors ask for, and XLA adds up what comes of them.
  """
  def shard(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT):
    B, T, H, Dh = q_BTHDh.shape
    K, S = k_BKSDh.shape[1:3]
    N = T * H // K
    J = max(1, min(MULTIPROCESSORS // (B * K * -(-N // TILE)), S // KEYS))
    share_B = -(-(jnp.max(positions_BT, axis=1) + 1) // (J * KEYS)) * KEYS
    first_BJ = jnp.arange(J, dtype=jnp.int32)[None] * share_B[:, None]
    last_BJT = jnp.minimum(positions_BT[:, None], (first_BJ + share_B[:, None] - 1)[..., None])
    sights = jnp.stack([jnp.broadcast_to(first_BJ[..., None], last_BJT.shape), last_BJT], axis=2)[:, None, ..., None]
    sights_R2N = jnp.broadcast_to(sights, (B, K, J, 2, T, H // K)).reshape(-1, 2, N)
    q_BKTGDh = q_BTHDh.reshape(B, T, K, H // K, Dh).swapaxes(1, 2)
    q_RN1Dh = jnp.broadcast_to(q_BKTGDh[:, :, None], (B, K, J, *q_BKTGDh.shape[2:])).reshape(-1, N, 1, Dh)
    alone = lambda x_BKSDh: x_BKSDh.reshape(B * K, S, 1, Dh)
    out, bits = _attend_tiles(
        _whole(q_RN1Dh, 1), alone(k_BKSDh), alone(v_BKSDh), _whole(sights_R2N, 2, mode='edge'), interpret
    )
    out, bits = out[:, :N].reshape(B, K, J, T, -1, Dh), bits[:, 0, :N].reshape(B, K, J, T, -1, 1)
    weights = jnp.exp2(bits - jnp.max(bits, axis=2, keepdims=True))
    out_BKTGDh = jnp.sum(weights * out, axis=2) / jnp.sum(weights, axis=2)
    return out_BKTGDh.swapaxes(1, 2).reshape(q_BTHDh.shape).astype(q_BTHDh.dtype)

  return on_shards(shard, mesh, q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, cached=True)


def _attend(q_BTHDh, k_BSKDh, v_BSKDh, first_BT, last_BT, n, interpret):
  """Each query on the keys first..last, both ascending along each of the n runs that T is cut into."""
  B, T, H, Dh = q_BTHDh.shape
  runs = lambda x: x.reshape(B * n, T // n, *x.shape[2:])
  # Queries that are not there see what the last one sees: their rows are zeros, and their gradients.
  sights_R2T = _whole(jnp.stack([runs(first_BT), runs(last_BT)], axis=1), 2, mode='edge')
  out_RTHDh = _attend_whole(_whole(runs(q_BTHDh), 1), _whole(k_BSKDh, 1), _whole(v_BSKDh, 1), sights_R2T, interpret)
  return out_RTHDh[:, : T // n].reshape(B, T, H, Dh)


def _whole(x, axis, **how):
  """In whole tiles."""
  missing = -x.shape[axis] % TILE
  return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], **how) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_whole(q_RTHDh, k_BSKDh, v_BSKDh, sights_R2T, interpret):
  """T and S are multiples of TILE; int32 sights: first, last."""
  return _forward(q_RTHDh, k_BSKDh, v_BSKDh, sights_R2T, interpret)[0]


def _attend_tiles(q_RTHDh, k_BSKDh, v_BSKDh, sights_R2T, interpret):
  """(out like q, logsumexp of the scores in bits [R, H, T] float32); zeros and -1e30 where nothing is seen."""
  (R, T, H, Dh), dtype = q_RTHDh.shape, q_RTHDh.dtype
  tile = functools.partial(_tile, dtype, Dh)
  out_RTX, bits_RHT = _launch(
      _forward_kernel, 'attend', (R, H, T // TILE), q_RTHDh, k_BSKDh, interpret,
      out_type=[jax.ShapeDtypeStruct((R, T, H * Dh), dtype), jax.ShapeDtypeStruct((R, H, T), jnp.float32)],
      scratch=dict(
          q_s=tile(2, ROWS), k_s=tile(STAGES, KEYS), v_s=tile(STAGES, KEYS), bits_s=plgpu.SMEM((2, ROWS), jnp.float32),
          asked=plgpu.Barrier(num_barriers=2), full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
          free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES), turn=plgpu.Barrier(num_barriers=2),
      ),
  )(_met_keys(sights_R2T, k_BSKDh.shape[1], KEYS), sights_R2T, *map(_heads_together, (q_RTHDh, k_BSKDh, v_BSKDh)))
  return out_RTX.reshape(q_RTHDh.shape), bits_RHT


def _forward(q_RTHDh, k_BSKDh, v_BSKDh, sights_R2T, interpret):
  out_RTHDh, bits_RHT = kept(_attend_tiles(q_RTHDh, k_BSKDh, v_BSKDh, sights_R2T, interpret))
  return out_RTHDh, (q_RTHDh, k_BSKDh, v_BSKDh, sights_R2T, out_RTHDh, bits_RHT)


def _backward(interpret, residuals, dout_RTHDh):
  q_RTHDh, k_BSKDh, v_BSKDh, sights_R2T, out_RTHDh, bits_RHT = residuals
  (R, T, H, Dh), (B, S, K, _), dtype = q_RTHDh.shape, k_BSKDh.shape, q_RTHDh.dtype
  delta_RTH = jnp.sum(out_RTHDh.astype(jnp.float32) * dout_RTHDh.astype(jnp.float32), axis=-1)
  stats_RH2T = jnp.stack([bits_RHT, delta_RTH.swapaxes(1, 2)], axis=2)
  dout_RTHDh = dout_RTHDh.astype(dtype)
  arrays = *map(_heads_together, (q_RTHDh, dout_RTHDh, k_BSKDh, v_BSKDh)), stats_RH2T
  tile = functools.partial(_tile, dtype, Dh)
  numbers = lambda dtype: plgpu.SMEM((STAGES, 2, FEW), dtype)
  barriers = lambda arrivals: dict(
      full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES),
      free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
  )
  launch = functools.partial(_launch, q_RTHDh=q_RTHDh, k_BSKDh=k_BSKDh, interpret=interpret)
  dq_RTX = launch(
      _queries_kernel, 'attend_dq', (R, H, T // TILE),
      out_type=jax.ShapeDtypeStruct((R, T, H * Dh), dtype),
      scratch=dict(
          q_s=tile(2, ROWS), dout_s=tile(2, ROWS), k_s=tile(STAGES, FEW), v_s=tile(STAGES, FEW),
          asked=plgpu.Barrier(num_arrivals=2, num_barriers=2), **barriers(2),
      ),
  )(_met_keys(sights_R2T, S, FEW), sights_R2T, *arrays)
  dk_BSX, dv_BSX = launch(
      _keys_kernel, 'attend_dkv', (B, K, S // TILE),
      out_type=[jax.ShapeDtypeStruct((B, S, K * Dh), dtype)] * 2,
      scratch=dict(
          k_s=tile(2, ROWS), v_s=tile(2, ROWS), q_s=tile(STAGES, FEW), dout_s=tile(STAGES, FEW),
          sights_s=numbers(jnp.int32), stats_s=numbers(jnp.float32),
          asked=plgpu.Barrier(num_arrivals=2, num_barriers=2), **barriers(4),
      ),
  )(_met_queries(sights_R2T, B, S), sights_R2T, *arrays)
  return dq_RTX.reshape(q_RTHDh.shape), dk_BSX.reshape(k_BSKDh.shape), dv_BSX.reshape(k_BSKDh.shape), None


_attend_whole.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------------------------------------
# which tiles meet


def _met_keys(sights_R2T, S, keys):
  """Of each tile of queries: its first tile of `keys` keys and the end, and the same of those that all of it sees whole.

  int32 [R, t, 4]. A tile that sees nothing meets one nevertheless.
  """
  sights_R2tq = sights_R2T.reshape(*sights_R2T.shape[:2], -1, TILE)
  low_R2t, high_R2t = jnp.min(sights_R2tq, axis=-1), jnp.max(sights_R2tq, axis=-1)
  begin = jnp.minimum(low_R2t[:, 0], S - 1) // keys
  end = jnp.maximum(high_R2t[:, 1] // keys, begin) + 1
  whole, whole_end = -(-high_R2t[:, 0] // keys), (low_R2t[:, 1] + 1) // keys
  return jnp.stack([begin, end, whole, whole_end], axis=-1)


def _met_queries(sights_R2T, B, S):
  """Of each tile of keys and run of queries: the first tile of FEW queries that sees any of it, and the end.

  int32 [B, s, n, 2].
  """
  low_Bn2t, high_Bn2t = (sights_R2T.reshape(B, -1, 2, sights_R2T.shape[2] // FEW, FEW)[..., at] for at in (0, -1))
  key_1s11 = jnp.arange(0, S, TILE, dtype=jnp.int32)[None, :, None, None]
  below = lambda tiles_Bnt, bound_1s11: jnp.sum(tiles_Bnt[:, None] < bound_1s11, axis=-1, dtype=jnp.int32)  # they ascend
  begin, end = below(high_Bn2t[:, :, 1], key_1s11), below(low_Bn2t[:, :, 0], key_1s11 + TILE)
  return jnp.stack([begin, jnp.maximum(begin, end)], axis=-1)


# ----------------------------------------------------------------------------------------------------------------------
# kernels: _g global memory, _s shared memory


def _launch(kernel, name, grid, q_RTHDh, k_BSKDh, interpret, out_type, scratch):
  (R, _, H, Dh), (B, _, K, _) = q_RTHDh.shape, k_BSKDh.shape
  return plgpu.kernel(
      functools.partial(kernel, n=R // B, G=H // K, scale=Dh**-0.5, interpret=interpret), out_type=out_type,
      # The last runs fastest, and is the one that may exceed 65535.
      grid=grid, grid_names=('row', 'head', 'tile'), num_threads=3, thread_name='group', scratch_types=scratch,
      compiler_params=hopper.parameters(approx_math=True), kernel_name=name, interpret=interpret,
  )


def _tile(dtype, Dh, *shape):
  return plgpu.SMEM((*shape, Dh), dtype, transforms=hopper.tiled(dtype))


def _heads_together(x_BTHDh):
  return x_BTHDh.reshape(*x_BTHDh.shape[:2], -1)


def _stream(pairs, tile_of, steps, full, free):
  """Copies in bulk, step by step as room is made: each (source, its memory) of `pairs` where tile_of(step) says."""
  @pl.loop(0, steps)
  def _(step):
    stage = lax.rem(step, STAGES)
    pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
    for (source, memory), at in zip(pairs, tile_of(step)):
      plgpu.copy_gmem_to_smem(source.at[at], memory.at[stage], full.at[stage])

  # Every arrival is waited for: the simulator takes a barrier that is left in between for a mistake.
  pl.loop(jnp.maximum(steps - STAGES, 0), steps)(lambda step: plgpu.barrier_wait(free.at[lax.rem(step, STAGES)]))


def _spread(x, shape, axis):
  return lax.broadcast_in_dim(x, shape, (axis,))


def _seen(scores, first_key, sight, axis, interpret):
  """Scores of keys from `first_key` on, along the other axis than the queries' `axis`; what is not seen is -inf."""
  first, last = (_spread(x - first_key, scores.shape, axis) for x in sight)
  key = hopper.iota(scores.shape, 1 - axis, WGMMA, interpret)
  return jnp.where((first <= key) & (key <= last), scores, -jnp.inf)


def _forward_kernel(met_g, sights_g, q_g, k_g, v_g, out_g, bits_g, *, q_s, k_s, v_s, bits_s, asked, full, free,
                    turn, n, G, scale, interpret):
  row, head, tile, group = (lax.axis_index(name) for name in ('row', 'head', 'tile', 'group'))
  tile = met_g.shape[1] - 1 - tile  # the last have the most to do
  begin, end, whole, whole_end = (met_g[row, tile, i] for i in range(4))
  last, Dh = end - begin - 1, q_s.shape[2]

  @pl.when(group == MEMORY)
  def _():
    plgpu.set_max_registers(24, action='decrease')
    keys = lambda step: (lax.div(row, n), pl.ds((begin + step) * KEYS, KEYS), pl.ds(lax.div(head, G) * Dh, Dh))
    _stream([(k_g, k_s), (v_g, v_s)], lambda step: [keys(step)] * 2, end - begin, full, free)

  @pl.when(group < MEMORY)
  def _():
    plgpu.set_max_registers(240, action='increase')
    rows, columns, mine = pl.ds(tile * TILE + group * ROWS, ROWS), pl.ds(head * Dh, Dh), q_s.at[group]
    plgpu.copy_gmem_to_smem(q_g.at[row, rows, columns], mine, asked.at[group])
    sight = [hopper.read(sights_g.at[row, i, rows], BY_ROW, interpret) for i in range(2)]
    plgpu.barrier_wait(asked.at[group])

    def scores_of(step):
      plgpu.barrier_wait(full.at[lax.rem(step, STAGES)])
      return hopper.product(mine, k_s.at[lax.rem(step, STAGES)], interpret, transpose_b=True)

    def weigh(step, scores, top, total, out):
      keys = begin + step
      mask = lambda: _seen(scores, keys * KEYS, sight, 0, interpret)
      scores = lax.cond((whole <= keys) & (keys < whole_end), lambda: scores, mask)
      higher = jnp.maximum(top, jnp.max(scores, axis=1) * (scale * BITS))
      weights = jnp.exp2(scores * (scale * BITS) - _spread(higher, scores.shape, 0))
      keep = jnp.exp2(top - higher)
      return weights.astype(v_s.dtype), higher, total * keep + jnp.sum(weights, axis=1), out * _spread(keep, out.shape, 0)

    def add(step, weights, out):
      out = hopper.product(weights, v_s.at[lax.rem(step, STAGES)], interpret, start=out)
      plgpu.barrier_arrive(free.at[lax.rem(step, STAGES)])
      return out

    def one_tile(step, carry):
      weights, top, total, out = weigh(step, *carry)
      plgpu.barrier_wait(turn.at[group])
      out = add(step, weights, out)
      scores = scores_of(step + 1)
      plgpu.barrier_arrive(turn.at[1 - group])
      return scores, top, total, out

    numbers = lambda value: hopper.cast(jnp.full((ROWS,), value, jnp.float32), BY_ROW, interpret)
    lowest = numbers(-1e30)  # less than all scores, and a number: what is not seen by it weighs 0
    out = hopper.cast(jnp.zeros((ROWS, Dh), jnp.float32), WGMMA, interpret)
    pl.when(group == 1)(lambda: plgpu.barrier_wait(turn.at[1]))
    scores = scores_of(0)
    plgpu.barrier_arrive(turn.at[1 - group])
    carry = lax.fori_loop(0, last, one_tile, (scores, lowest, numbers(0), out))
    weights, top, total, out = weigh(last, *carry)
    plgpu.barrier_wait(turn.at[group])
    out = add(last, weights, out)
    pl.when(group == 0)(lambda: plgpu.barrier_arrive(turn.at[1]))
    some = total > 0
    total = jnp.where(some, total, 1.0)
    mine[...] = (out / _spread(total, out.shape, 0)).astype(mine.dtype)
    bits_s[group] = jnp.where(some, top + jnp.log(total) * BITS, lowest)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mine, out_g.at[row, rows, columns])
    plgpu.copy_smem_to_gmem(bits_s.at[group], bits_g.at[row, head, rows])
    plgpu.wait_smem_to_gmem(0)


def _queries_kernel(met_g, sights_g, q_g, dout_g, k_g, v_g, stats_g, dq_g, *, q_s, dout_s, k_s, v_s, asked, full, free,
                    n, G, scale, interpret):
  row, head, tile, group = (lax.axis_index(name) for name in ('row', 'head', 'tile', 'group'))
  tile = met_g.shape[1] - 1 - tile
  begin, end, whole, whole_end = (met_g[row, tile, i] for i in range(4))
  Dh = q_s.shape[2]

  @pl.when(group == MEMORY)
  def _():
    plgpu.set_max_registers(24, action='decrease')
    keys = lambda step: (lax.div(row, n), pl.ds((begin + step) * FEW, FEW), pl.ds(lax.div(head, G) * Dh, Dh))
    _stream([(k_g, k_s), (v_g, v_s)], lambda step: [keys(step)] * 2, end - begin, full, free)

  @pl.when(group < MEMORY)
  def _():
    plgpu.set_max_registers(240, action='increase')
    rows, columns = pl.ds(tile * TILE + group * ROWS, ROWS), pl.ds(head * Dh, Dh)
    for source, memory in (q_g, q_s), (dout_g, dout_s):
      plgpu.copy_gmem_to_smem(source.at[row, rows, columns], memory.at[group], asked.at[group])
    sight = [hopper.read(sights_g.at[row, i, rows], BY_ROW, interpret) for i in range(2)]
    bits, delta = (hopper.read(stats_g.at[row, head, i, rows], BY_ROW, interpret) for i in range(2))
    plgpu.barrier_wait(asked.at[group])
    shape = ROWS, FEW

    def one_tile(step, dq):
      stage, keys = lax.rem(step, STAGES), begin + step
      plgpu.barrier_wait(full.at[stage])
      scores = hopper.product(q_s.at[group], k_s.at[stage], interpret, transpose_b=True)
      mask = lambda: _seen(scores, keys * FEW, sight, 0, interpret)
      scores = lax.cond((whole <= keys) & (keys < whole_end), lambda: scores, mask)
      start = -_spread(delta, shape, 0)
      dweights = hopper.product(dout_s.at[group], v_s.at[stage], interpret, transpose_b=True, start=start)
      weights = jnp.exp2(scores * (scale * BITS) - _spread(bits, shape, 0))
      dscores = (weights * dweights).astype(k_s.dtype)
      dq = hopper.product(dscores, k_s.at[stage], interpret, start=dq)
      plgpu.barrier_arrive(free.at[stage])
      return dq

    dq = hopper.cast(jnp.zeros((ROWS, Dh), jnp.float32), WGMMA, interpret)
    dq = lax.fori_loop(0, end - begin, one_tile, dq)
    q_s[group] = (dq * scale).astype(q_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_s.at[group], dq_g.at[row, rows, columns])
    plgpu.wait_smem_to_gmem(0)


def _keys_kernel(met_g, sights_g, q_g, dout_g, k_g, v_g, stats_g, dk_g, dv_g, *, k_s, v_s, q_s, dout_s, sights_s, stats_s,
                 asked, full, free, n, G, scale, interpret):
  row, head, tile, group = (lax.axis_index(name) for name in ('row', 'head', 'tile', 'group'))
  begins, ends = ([met_g[row, tile, run, i] for run in range(n)] for i in range(2))
  before = [sum(ends[:run]) - sum(begins[:run]) for run in range(n + 1)]  # tiles of the runs before, of one head
  each, Dh = before[n], k_s.shape[2]

  @pl.when(group == MEMORY)
  def _():
    plgpu.set_max_registers(24, action='decrease')

    def at(step):
      query_head, left = head * G + lax.div(step, each), lax.rem(step, each)
      run, here = jnp.int32(0), begins[0] + left
      for other in range(1, n):
        run = jnp.where(left >= before[other], other, run)
        here = jnp.where(left >= before[other], begins[other] + left - before[other], here)
      run, rows, columns = row * n + run, pl.ds(here * FEW, FEW), pl.ds(query_head * Dh, Dh)
      return (run, rows, columns), (run, rows, columns), (run, slice(None), rows), (run, query_head, slice(None), rows)

    pairs = (q_g, q_s), (dout_g, dout_s), (sights_g, sights_s), (stats_g, stats_s)
    _stream(pairs, at, each * G, full, free)

  @pl.when(group < MEMORY)
  def _():
    plgpu.set_max_registers(240, action='increase')
    first_key = tile * TILE + group * ROWS
    rows, columns = pl.ds(first_key, ROWS), pl.ds(head * Dh, Dh)
    for source, memory in (k_g, k_s), (v_g, v_s):
      plgpu.copy_gmem_to_smem(source.at[row, rows, columns], memory.at[group], asked.at[group])
    plgpu.barrier_wait(asked.at[group])
    shape = ROWS, FEW
    by_column = lambda x: hopper.cast(x, BY_COLUMN, interpret)

    def one_tile(step, sums):
      dk, dv = sums
      # Steps are never negative, but the compiler does not know: see `sparse_gpu`. Else it spills registers.
      stage, mine = lax.rem(step, STAGES), group + jnp.minimum(step, 0)
      plgpu.barrier_wait(full.at[stage])
      q, dout = q_s.at[stage], dout_s.at[stage]
      scores = hopper.product(k_s.at[mine], q, interpret, transpose_b=True)

      def mask():
        sight = [by_column(sights_s[stage, i]) for i in range(2)]
        return _seen(scores, first_key, sight, 1, interpret)

      is_whole = (sights_s[stage, 0, FEW - 1] <= first_key) & (first_key + ROWS - 1 <= sights_s[stage, 1, 0])
      scores = lax.cond(is_whole, lambda: scores, mask)
      bits, delta = (_spread(by_column(stats_s[stage, i]), shape, 1) for i in range(2))
      dweights = hopper.product(v_s.at[mine], dout, interpret, transpose_b=True, start=-delta)
      weights = jnp.exp2(scores * (scale * BITS) - bits)
      dscores = (weights * dweights).astype(q_s.dtype)
      dv = hopper.product(weights.astype(q_s.dtype), dout, interpret, start=dv)
      dk = hopper.product(dscores, q, interpret, start=dk)
      plgpu.commit_smem()  # numbers that were read: a copy in bulk may now write there
      plgpu.barrier_arrive(free.at[stage])
      return dk, dv

    zeros = hopper.cast(jnp.zeros((ROWS, Dh), jnp.float32), WGMMA, interpret)
    dk, dv = lax.fori_loop(0, each * G, one_tile, (zeros, zeros))
    for memory, sums in (k_s, dk * scale), (v_s, dv):
      memory[group] = sums.astype(memory.dtype)
    plgpu.commit_smem()
    for memory, gradient in (k_s, dk_g), (v_s, dv_g):
      plgpu.copy_smem_to_gmem(memory.at[group], gradient.at[row, rows, columns])
    plgpu.wait_smem_to_gmem(0)
