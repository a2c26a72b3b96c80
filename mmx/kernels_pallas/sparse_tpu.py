"""Attention over selected blocks as Pallas kernels for TPU, a chunk's queries in VMEM: see `resident_tpu`.

Forward, scores stand as [r*G, b], a query's heads in sublanes; a tile raises its queries' maxima, and their outputs and
sums of weights fade by as much and take the tile's in. Sums are kept per lane and added up at the end. A step of the
grid is several tiles: what one of them waits for, the others fill. Its blocks are copied in while the step before is
computed, by the kernel itself: as inputs of the grid each would cost 30 cycles more. Keys are masked only where a step
has a block that some query of the chunk does not see whole. Backward, a block stays in VMEM from tile to tile of
its page; the gradients of its keys and values grow there and are written once per page and chunk; scores stand as
[b, r*G], so that two of three gradients are plain products.

`scripts/tpu_schedule.py` counts what a step of the grid costs beside its products. The grid's length is counted at run
time; copies are not checked against bounds that a plan keeps by construction.

Letters as in `resident_tpu`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import resident_tpu as resident
from mmx.kernels_pallas import sparse_pairs
from mmx.kernels_pallas.chunks import kept, kernel_product
from mmx.kernels_pallas.sparse import MASKED
from mmx.kernels_pallas.sparse_pairs import LANES, whole_lanes

STEP_QUERIES = 256  # of a step forward, in 16 tiles at most
STEP_BYTES = 2**20  # of a step's blocks of keys at most; as many of values, each twice for the copies
LOG2E = math.log2(math.e)


def unsupported(q_BTHDh, k_BSKDh, block_size, top_k) -> str:
  """'' where `attend_blocks` compiles for TPU, else one reason. Takes anything with shape and dtype."""
  if block_size % 16 or not 16 <= block_size <= 256:
    return f'block_size {block_size}; multiples of 16 from 16 to 256 are supported'
  reason = sparse_pairs.unsupported(q_BTHDh, k_BSKDh, block_size, top_k, LANES)
  if reason:
    return reason
  rows, most = q_BTHDh.shape[0], resident.most_queries(q_BTHDh, k_BSKDh.shape[2])
  return f'{rows} rows of queries; at most {most} are supported' if rows > most else ''


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_blocks(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret=False):
  """`sparse_pairs.attend_in_tiles` by the kernels below: (out, logsumexp); `interpret` as `pl.pallas_call` takes it."""
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  return _forward(*inputs, block_size, interpret)[0]


def _forward(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret):
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  B, T, H, Dh = q_BTHDh.shape
  K = k_BSKDh.shape[2]
  q_BTXD, queries, keys, starts = resident.sides(*inputs, block_size)
  attend = functools.partial(attend_chunk, keys=keys, q_BTXD=q_BTXD, K=K, scale=Dh**-0.5, interpret=interpret)
  out_BTXD = lax.empty(q_BTXD.shape, q_BTXD.dtype)
  out_BTXD, logsumexp = resident.each_chunk_and_head(attend, out_BTXD, queries, keys, starts)
  logsumexp_BTKG = resident.joined(logsumexp, B, T)[..., : H // K]
  out_BTHDh, logsumexp_BTKG = kept((resident.real_heads(out_BTXD, K, H)[..., :Dh], logsumexp_BTKG))
  return (out_BTHDh, logsumexp_BTKG), (inputs, out_BTHDh, logsumexp_BTKG)


def _backward(block_size, interpret, residuals, cotangents):
  inputs, out_BTHDh, logsumexp_BTKG = residuals
  dout_BTHDh, _ = cotangents
  q_BTHDh, k_BSKDh, v_BSKDh, *_ = inputs
  B, T, H, Dh = q_BTHDh.shape
  K = k_BSKDh.shape[2]
  q_BTXD, queries, keys, starts = resident.sides(*inputs, block_size)
  delta_BTH1 = jnp.sum(out_BTHDh.astype(jnp.float32) * dout_BTHDh.astype(jnp.float32), axis=-1, keepdims=True)
  stats = logsumexp_BTKG.reshape(delta_BTH1.shape), delta_BTH1
  stats = [resident.whole_heads(x, q_BTHDh, K)[..., 0] for x in stats]
  rows = q_BTXD, resident.whole_heads(whole_lanes(dout_BTHDh.astype(q_BTHDh.dtype)), q_BTHDh, K)
  differentiate = functools.partial(
      attend_chunk_backward, keys=keys, rows=rows, stats=stats, K=K, scale=Dh**-0.5, interpret=interpret
  )
  start = lax.empty(q_BTXD.shape, q_BTXD.dtype), *[jnp.zeros(keys.k_pbX.shape, jnp.float32)] * 2
  (dq_BTXD, dk, dv), _ = resident.each_chunk_and_head(differentiate, start, queries, keys, starts)
  dk_BSKDh, dv_BSKDh = map(sparse_pairs.out_of_blocks, (dk, dv), (k_BSKDh, v_BSKDh))
  return resident.real_heads(dq_BTXD, K, H)[..., :Dh], dk_BSKDh, dv_BSKDh, None, None, None


attend_blocks.defvjp(_forward, _backward)


def tiles_of_a_step(r, block_bytes):
  """Forward, of tiles of r queries: a power of two, at most resident.MOST_TILES."""
  most = max(1, min(STEP_QUERIES // r, resident.MOST_TILES, STEP_BYTES // block_bytes))
  return 2 ** (most.bit_length() - 1)


def attend_chunk(plan, out_BTXD, *, keys, q_BTXD, K, scale, interpret=False):
  """Of a chunk and kv head: `out_BTXD` with its outputs written in, and logsumexp float32 [N, G]."""
  plan, r = plan
  rows, N, G, D = resident.rows_held(q_BTXD, plan, K)
  b = keys.k_pbX.shape[1]
  W = tiles_of_a_step(r, b * D * q_BTXD.dtype.itemsize)
  state = lambda X, dtype=jnp.float32: pltpu.VMEM((rows, G, X), dtype)
  block = pltpu.VMEM((2, W, b, D), keys.k_pbX.dtype)
  M, scalars = plan.block_M.size, len(plan)
  out, logsumexp = pl.pallas_call(
      functools.partial(_attend_kernel, scale=scale, r=r),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=scalars, grid=(pl.cdiv(plan.place[2], W),),
          in_specs=[resident.IN_PLACE] * 5,
          out_specs=[resident.IN_PLACE, pl.BlockSpec((rows * G // LANES, LANES), lambda *_: (0, 0))],
          scratch_shapes=[
              state(D, q_BTXD.dtype), state(D), state(LANES), state(LANES), block, block,
              pltpu.VMEM((2, W, 1, b), jnp.int32), pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA((2,)),
          ],
      ),
      out_shape=[
          jax.ShapeDtypeStruct(out_BTXD.shape, out_BTXD.dtype),
          jax.ShapeDtypeStruct((rows * G // LANES, LANES), jnp.float32),
      ],
      input_output_aliases={scalars + 1: 0},
      compiler_params=resident.params(rows * G * (D * (q_BTXD.dtype.itemsize + 4) + 2 * LANES * 4) + 4 * STEP_BYTES),
      cost_estimate=_cost(M, r * G, b, D, N * G, q_BTXD.dtype, products=2, tensors=2),
      interpret=interpret, name='msa_attend_blocks',
  )(*plan, q_BTXD, out_BTXD, *keys[:3])
  return out, logsumexp.reshape(rows, G)[:N]


def attend_chunk_backward(plan, grown, *, keys, rows, stats, K, scale, interpret=False):
  """Of a chunk and kv head: dq of all with its own written in, and the keys' and values' gradients with its own added,
  float32 [B*P, b, K*D]. `stats`, float32 [B, T, K*G]: logsumexp, and <out, dout>.
  """
  plan, r = plan
  dq_BTXD, dk_pbX, dv_pbX = grown
  padded_rows, N, G, D = resident.rows_held(rows[0], plan, K)
  b, scalars = keys.k_pbX.shape[1], len(plan)
  block = pl.BlockSpec((1, b, D), lambda m, block_M, *scalars: (block_M[m], 0, scalars[-1][1]))
  segment = pl.BlockSpec((1, 1, b), lambda m, block_M, *_: (block_M[m], 0, 0))
  lanes = [resident.lanes_of_chunk(x_BTX, plan, G) for x_BTX in stats]
  row_stats = pl.BlockSpec((N + 1, LANES), lambda *_: (0, 0))
  state = lambda dtype: pltpu.VMEM((padded_rows, G, D), dtype)
  dtype = dq_BTXD.dtype
  M = plan.block_M.size
  dq, dk, dv = pl.pallas_call(
      functools.partial(_backward_kernel, scale=scale, r=r),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=scalars, grid=(plan.place[2],),
          in_specs=[resident.IN_PLACE] * 3 + [row_stats] * 2 + [block, block, segment, block, block],
          out_specs=[resident.IN_PLACE, block, block],
          scratch_shapes=[state(dtype), state(dtype), state(jnp.float32), pltpu.SemaphoreType.DMA],
      ),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in grown],
      input_output_aliases={scalars + 2: 0, scalars + 8: 1, scalars + 9: 2},  # blocks not chosen keep what they have
      compiler_params=resident.params(padded_rows * G * D * (2 * dtype.itemsize + 4) + 4 * N * LANES * 4),
      cost_estimate=_cost(M, r * G, b, D, N * G, dtype, products=5, tensors=3),
      interpret=interpret, name='msa_attend_blocks_backward',
  )(*plan, *rows, dq_BTXD, *lanes, keys.k_pbX, keys.v_pbX, keys.segment_p1b, dk_pbX, dv_pbX)
  return (dq, dk, dv), None


def _cost(M, rows, b, D, N, dtype, products, tensors):
  return pl.CostEstimate(
      flops=2 * products * M * rows * b * D, transcendentals=M * rows * b,
      bytes_accessed=(tensors * N * D + 2 * M * b * D) * dtype.itemsize,
  )


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def _attend_kernel(
    block_ref, first_slot_ref, first_ref, query_ref, slot_ref, segment_ref, whole_ref, place_ref,
    q_all_ref, before_ref, k_all_ref, v_all_ref, key_segment_all_ref,
    out_all_ref, logsumexp_ref, q_ref, out_ref, top_ref, total_ref, k_ref, v_ref, key_segment_ref, sem, block_sem, *,
    scale, r):
  step, (_, W, b, D) = pl.program_id(0), k_ref.shape
  steps, now = pl.cdiv(place_ref[2], W), step % 2
  rows, G, _ = q_ref.shape
  N, u = slot_ref.shape[0] - 1, LANES // G

  def block_copies(step):
    head, half, ends = pl.ds(pl.multiple_of(place_ref[1] * D, D), D), step % 2, []
    for i in range(W):
      page = block_ref[step * W + i]
      ends += [(k_all_ref.at[page, :, head], k_ref.at[half, i]), (v_all_ref.at[page, :, head], v_ref.at[half, i])]
      ends += [(key_segment_all_ref.at[page], key_segment_ref.at[half, i])]
    return [pltpu.make_async_copy(*pair, block_sem.at[half]) for pair in ends]

  @pl.when(step == 0)
  def _():
    copies = resident.chunk_copies(place_ref, q_all_ref, q_ref, sem, N)
    resident.start(copies + block_copies(0))
    q_ref[N:] = jnp.zeros((rows - N, G, D), q_ref.dtype)

    @pl.loop(0, rows // u)
    def _(i):
      queries = pl.ds(i * u, u)
      out_ref[queries] = jnp.zeros((u, G, D), jnp.float32)
      top_ref[queries] = jnp.full((u, G, LANES), MASKED / 2, jnp.float32)
      total_ref[queries] = jnp.zeros((u, G, LANES), jnp.float32)

    resident.wait(copies)

  pl.when(step < steps - 1)(lambda: resident.start(block_copies(step + 1)))
  resident.wait(block_copies(step))
  slot_8b = lax.broadcasted_iota(jnp.int32, (8, b), 1)

  def masked(scores_Rb, queries, i):
    here_8b = slot_8b + first_slot_ref[step * W + i]
    segment_8b = jnp.broadcast_to(key_segment_ref[now, i], (8, b))
    seen = lambda n: (here_8b <= slot_ref[n]) & (segment_8b == segment_ref[n])
    scores = scores_Rb.reshape(r, G // 8, 8, b)
    return jnp.stack([jnp.where(seen(n), scores[j], MASKED) for j, n in enumerate(queries)]).reshape(r * G, b)

  def attend(mask):
    for i in range(W):
      queries = resident.queries_of(step * W + i, r, first_ref, query_ref, N)
      q_RD = jnp.concatenate([q_ref[n] for n in queries])
      scores_Rb = mask(kernel_product(q_RD, k_ref[now, i], 1, 1) * (scale * LOG2E), queries, i)
      own_R1 = jnp.max(scores_Rb, axis=1, keepdims=True)
      tops, fades = zip(*[
          resident.raise_tops(top_ref, some, own_R1[j * G : (j + len(some)) * G]) for j, some in resident.some_of(queries)
      ])
      weights_Rb = jnp.exp2(scores_Rb - resident.wide(jnp.concatenate(tops), b))
      out_RD = kernel_product(weights_Rb.astype(v_ref.dtype), v_ref[now, i], 1, 0)
      fade_RL, weights_RL = jnp.concatenate(fades), per_lane(weights_Rb)
      for j, some in resident.some_of(queries):
        of_some = slice(j * G, (j + len(some)) * G)
        resident.add_rows(out_ref, some, out_RD[of_some], resident.wide(fade_RL[of_some], D))
        resident.add_rows(total_ref, some, weights_RL[of_some], fade_RL[of_some])

  whole = functools.reduce(jnp.minimum, [whole_ref[block_ref[step * W + i]] for i in range(W)])
  pl.when(whole == 1)(lambda: attend(lambda scores_Rb, *_: scores_Rb))
  pl.when(whole == 0)(lambda: attend(masked))

  @pl.when(step == steps - 1)
  def _():
    @pl.loop(0, rows // u)
    def _(i):
      queries = pl.ds(i * u, u)
      total_R1 = jnp.sum(total_ref[queries].reshape(LANES, LANES), axis=1, keepdims=True)
      total_RL = jnp.broadcast_to(total_R1, (LANES, LANES))
      some_RL = jnp.where(total_RL > 0, total_RL, 1)
      out_RD = out_ref[queries].reshape(LANES, D) / resident.wide(some_RL, D)
      q_ref[queries] = out_RD.astype(q_ref.dtype).reshape(u, G, D)
      top_RL = top_ref[queries].reshape(LANES, LANES)
      logsumexp_RL = jnp.where(total_RL > 0, top_RL / LOG2E + jnp.log(some_RL), 0)
      logsumexp_ref[pl.ds(i, 1)] = logsumexp_RL.T[:1]

    copies = resident.chunk_copies(place_ref, out_all_ref, q_ref, sem, N, out=True)
    resident.start(copies)
    resident.wait(copies)


def per_lane(weights_Gb):
  """[G, L] of [G, b]: sums over keys that are left to be added up over lanes."""
  G, b = weights_Gb.shape
  whole = [weights_Gb[:, i : i + LANES] for i in range(0, b - LANES + 1, LANES)]
  rest = b % LANES
  if rest:
    sum_G1 = jnp.sum(weights_Gb[:, b - rest :], axis=1, keepdims=True) / LANES
    whole.append(jnp.broadcast_to(sum_G1, (G, LANES)))
  return sum(whole[1:], whole[0])


def _backward_kernel(
    block_ref, first_slot_ref, first_ref, query_ref, slot_ref, segment_ref, whole_ref, place_ref,
    q_all_ref, dout_all_ref, before_ref, logsumexp_ref, delta_ref, k_ref, v_ref, key_segment_ref, dk_before_ref,
    dv_before_ref, dq_all_ref, dk_ref, dv_ref, q_ref, dout_ref, dq_ref, sem, *, scale, r):
  m = pl.program_id(0)
  rows, G, D = q_ref.shape
  N, u = slot_ref.shape[0] - 1, LANES // G

  @pl.when(m == 0)
  def _():
    pairs = (q_all_ref, q_ref), (dout_all_ref, dout_ref)
    copies = [copy for pair in pairs for copy in resident.chunk_copies(place_ref, *pair, sem, N)]
    resident.start(copies)
    q_ref[N:] = jnp.zeros((rows - N, G, D), q_ref.dtype)
    dout_ref[N:] = jnp.zeros((rows - N, G, D), q_ref.dtype)

    @pl.loop(0, rows // u)
    def _(i):
      dq_ref[pl.ds(i * u, u)] = jnp.zeros((u, G, D), jnp.float32)

    resident.wait(copies)

  @pl.when((m == 0) | (block_ref[m] != block_ref[jnp.maximum(m - 1, 0)]))
  def _():
    dk_ref[...] = dk_before_ref[...]
    dv_ref[...] = dv_before_ref[...]

  queries = resident.queries_of(m, r, first_ref, query_ref, N)
  group_1L = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // G
  in_lanes = lambda of_query: resident.in_lanes([of_query(n) for n in queries], group_1L, G)
  limit_1R = in_lanes(lambda n: slot_ref[n] - first_slot_ref[m])
  segment_1R = in_lanes(lambda n: segment_ref[n])
  logsumexp_1R, delta_1R = (in_lanes(lambda n: ref[pl.ds(n, 1)]) for ref in (logsumexp_ref, delta_ref))

  q_RD, dout_RD = (jnp.concatenate([ref[n] for n in queries]) for ref in (q_ref, dout_ref))
  k_bD, v_bD = k_ref[0], v_ref[0]
  scores_bR = kernel_product(k_bD, q_RD, 1, 1) * (scale * LOG2E) - logsumexp_1R * LOG2E
  weights_bR = jnp.exp2(jnp.where(resident.visible(limit_1R, segment_1R, key_segment_ref), scores_bR, MASKED))
  dscores_bR = (weights_bR * (kernel_product(v_bD, dout_RD, 1, 1) - delta_1R) * scale).astype(k_bD.dtype)
  dk_ref[0] += kernel_product(dscores_bR, q_RD, 1, 0)
  dv_ref[0] += kernel_product(weights_bR.astype(v_bD.dtype), dout_RD, 1, 0)
  dq_RD = kernel_product(dscores_bR, k_bD, 0, 0)
  for j, some in resident.some_of(queries):
    resident.add_rows(dq_ref, some, dq_RD[j * G : (j + len(some)) * G])

  @pl.when(m == place_ref[2] - 1)
  def _():
    @pl.loop(0, rows // u)
    def _(i):
      queries = pl.ds(i * u, u)
      q_ref[queries] = dq_ref[queries].astype(q_ref.dtype)

    copies = resident.chunk_copies(place_ref, dq_all_ref, q_ref, sem, N, out=True)
    resident.start(copies)
    resident.wait(copies)
