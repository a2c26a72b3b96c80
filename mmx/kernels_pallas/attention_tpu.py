"""Attention to one stretch of keys on TPU: causal within documents, within a window, of parts of rows, to a cache.

What a query sees is one stretch of slots, `chunks.sight`: two numbers. G heads of a kv head and some tokens are the rows
of a step's products. Of each step is known before it starts which tiles of keys any of its queries meets, and which all
of them see whole: others are neither copied nor multiplied, and these not masked.

Forward, the tiles of keys are copied into VMEM one while the one before is at work, also from step to step. Keys stand
in memory as [B, K, S, Dh], one stretch for each row and kv head, so a cache is read where it is.

Backward, a kv head's keys stay in VMEM with their gradients while its queries come by, tile by tile, and each pair of
tiles is met once: five products for splash attention's seven. Rows of more keys than VMEM holds are cut into spans, and
what queries' gradients are of each is added up in memory. Scores are [keys, queries] there, whose logsumexps are lanes.
Nothing is added in an order that could change: equal inputs give equal bits. No kernel states what it costs, as that is
not known before it runs; `mmx/proof.py` shares attention's FLOPs out among those that do not.

Letters: B rows, T queries, S key slots, H query heads, K kv heads, G = H/K, Dh head dim, t queries of a step and n steps
of them, R = t*G rows, s keys of a tile, Z = B*K, X = Z*n, N = n*t.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas.chunks import kept, kernel_product
from mmx.kernels_pallas.resident_tpu import vmem_bytes
from mmx.kernels_pallas.shards import on_documents, on_shards, on_windows
from mmx.kernels_pallas.sparse import MASKED

ROWS = 1024  # most of a step
SCORES = 2**19  # most of a step and tile, 2 MiB
KEYS = 2048  # most of a tile
FEW = 512  # backward, where four products' results are at hand
CORES = 2  # of the chips that share a grid's first axis among cores, v4 and v5p
WORK_BYTES = 34 * 2**20  # of VMEM for what is made of a step and tile: float32 with heads of 256 asks for 31
MOST_HEADS = 64  # of a kv head, 16 tokens of which are the fewest of a step where there are several
LANES = 128
SLOTS = 16  # of a cache whole multiples are served
BITS = math.log2(math.e)  # exponentials are of base 2, as the chip's: a product with this less for each score
IN_PLACE = pl.BlockSpec(memory_space=pl.ANY)


def unsupported(q_BTHDh, k_BSKDh) -> str:
  """'' where the kernels compile for TPU, else one reason. Takes anything with shape and dtype."""
  H, Dh = q_BTHDh.shape[2:]
  K = k_BSKDh.shape[2]
  if H % K:
    return f'{H} query heads are no multiple of {K} kv heads'
  if H // K > MOST_HEADS:
    return f'{H // K} query heads a kv head; at most {MOST_HEADS} are supported'
  if q_BTHDh.dtype not in (jnp.bfloat16, jnp.float32) or k_BSKDh.dtype != q_BTHDh.dtype:
    return f'dtypes {q_BTHDh.dtype} and {k_BSKDh.dtype}; bfloat16 or float32, the same for both, are supported'
  return '' if Dh in (LANES, 2 * LANES) else f'head dim {Dh}; {LANES} and {2 * LANES} are supported'


def sliding_unsupported(q_BTHDh, k_BSKDh, sink_tokens) -> str:
  """The same of `sliding_pallas`."""
  return f'serves no sink tokens, got {sink_tokens}' if sink_tokens else unsupported(q_BTHDh, k_BSKDh)


def attention_pallas(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT, mesh=None, part=None, interpret=False):
  """`reference.attention` where each document stands in one piece: [B, T, H, Dh] of q's dtype.

  Args:
    mesh: of whole rows, over whose devices rows and heads are split.
    part: see `chunks.Part`; within a shard_map.
    interpret: as `pl.pallas_call` takes it.
  """
  attend = functools.partial(_attend_rows, interpret=interpret)
  return on_documents(attend, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT, mesh, part)


def sliding_pallas(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS, window, mesh=None, start=None, interpret=False):
  """`reference.sliding` without sink tokens and past keys.

  With `start`, within a shard_map, queries are those at the slots from there on; else `mesh` as in `attention_pallas`.
  """
  attend = functools.partial(_attend_rows, interpret=interpret)
  return on_windows(attend, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS, window, mesh, start)


def attention_cached_pallas(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, mesh=None, interpret=False):
  """`attention.attention_cached` where S is a multiple of SLOTS; the cache stays where it is. [B, T, H, Dh], no gradient.

  At positions below 0 it is some finite mean.
  """
  def shard(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT):
    B, T, H, Dh = q_BTHDh.shape
    K = k_BKSDh.shape[1]
    G = H // K
    if T * G <= ROWS:  # tokens beside their heads, as one of a token's few would fill no tile of memory
      rows = q_BTHDh.reshape(B, T, K, G, Dh).swapaxes(1, 2).reshape(B * K, T * G, Dh)
      positions_BT = jnp.repeat(positions_BT, G, axis=1)
      out, _ = _forward_call(rows, k_BKSDh, v_BKSDh, jnp.zeros_like(positions_BT), positions_BT, 1, T * G, interpret)
      return out.reshape(B, K, T, G, Dh).swapaxes(1, 2).reshape(q_BTHDh.shape)
    t = _tokens(G)
    last_BN = whole(positions_BT, t, constant_values=-1)
    rows = heads_first(whole(q_BTHDh, t))
    out, _ = _forward_call(rows, k_BKSDh, v_BKSDh, jnp.zeros_like(last_BN), last_BN, G, t, interpret)
    return tokens_first(out, B)[:, :T]

  return on_shards(shard, mesh, q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, cached=True)


def whole(x, tile, **how):
  """With so many tokens that they are whole tiles."""
  missing = -x.shape[1] % tile
  return jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)], **how) if missing else x


def _tokens(G):
  """Of a step: a power of two, which divides rows of whole lanes where it is below 128."""
  return max(16, 2 ** ((ROWS // G).bit_length() - 1))


def heads_first(x_BTHDh):
  B, T, H, Dh = x_BTHDh.shape
  return x_BTHDh.swapaxes(1, 2).reshape(B * H, T, Dh)


def tokens_first(x_YTDh, B):
  return x_YTDh.reshape(B, -1, *x_YTDh.shape[1:]).swapaxes(1, 2)


def _attend_rows(q_BTHDh, k_BSKDh, v_BSKDh, first_BT, last_BT, interpret):
  """Each query on the keys first..last."""
  B, T, H, _ = q_BTHDh.shape
  G = H // k_BSKDh.shape[2]
  # Queries that are not there see what the last one sees: their rows are zeros, and their gradients.
  first_BT, last_BT = (whole(x, LANES, mode='edge') for x in (first_BT, last_BT))
  q_YTDh = heads_first(whole(q_BTHDh, LANES))
  keys = (whole(x, LANES).swapaxes(1, 2) for x in (k_BSKDh, v_BSKDh))
  t = math.gcd(q_YTDh.shape[1], _tokens(G))
  return tokens_first(_attend(q_YTDh, *keys, first_BT, last_BT, G, t, interpret), B)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q_YTDh, k_BKSDh, v_BKSDh, first_BT, last_BT, G, t, interpret):
  return _forward_call(q_YTDh, k_BKSDh, v_BKSDh, first_BT, last_BT, G, t, interpret)[0]


def _forward(q_YTDh, k_BKSDh, v_BKSDh, first_BT, last_BT, G, t, interpret):
  out, bits = kept(_forward_call(q_YTDh, k_BKSDh, v_BKSDh, first_BT, last_BT, G, t, interpret))
  return out, (q_YTDh, k_BKSDh, v_BKSDh, first_BT, last_BT, out, bits)


def _backward(G, t, interpret, residuals, dout_YTDh):
  q_YTDh, k_BKSDh, v_BKSDh, first_BT, last_BT, out_YTDh, bits_X1R = residuals
  (B, K, S, Dh), T = k_BKSDh.shape, q_YTDh.shape[1]
  delta_YT = jnp.sum(out_YTDh.astype(jnp.float32) * dout_YTDh.astype(jnp.float32), axis=-1)
  delta_X1R = delta_YT.reshape(B * K, G, T // t, t).swapaxes(1, 2).reshape(bits_X1R.shape)
  s = math.gcd(S, FEW)
  spans, span = cut(S, s, 2 * Dh * (k_BKSDh.dtype.itemsize + 4))
  bounds_Bn4, sights_Y2R = met(first_BT, last_BT, t, s, S), sights(first_BT, last_BT, G, t)
  keys = [x.reshape(B * K, S, Dh) for x in (k_BKSDh, v_BKSDh)]
  call = functools.partial(
      _backward_call, bounds_Bn4, sights_Y2R, q_YTDh, dout_YTDh.astype(q_YTDh.dtype),
      jnp.stack([bits_X1R, delta_X1R], axis=1), keys, s=s, span=span, interpret=interpret,
  )
  if spans == 1:
    dq, dk, dv = call(None, 0)
  else:
    def one_span(dq, i):
      dq, *dkeys = call(dq, i)
      return dq, dkeys

    dq, (dk, dv) = lax.scan(one_span, jnp.zeros(q_YTDh.shape, jnp.float32), jnp.arange(spans, dtype=jnp.int32))
    dk, dv = (joined(x, S) for x in (dk, dv))
  return dq.astype(q_YTDh.dtype), dk.reshape(k_BKSDh.shape), dv.reshape(v_BKSDh.shape), None, None


_attend.defvjp(_forward, _backward)


def cut(S, s, key_bytes):
  """(spans that S keys are cut into, keys of a span in whole tiles of s), where each takes so many bytes of VMEM."""
  spans = -(-S * key_bytes // (vmem_bytes() - WORK_BYTES // 2))
  span = -(-S // (spans * s)) * s
  return -(-S // span), span


def joined(x_jZsDh, S):
  """[Z, S, Dh] of spans of which the last begins within the one before."""
  spans, Z, span, Dh = x_jZsDh.shape
  before = x_jZsDh[:-1].swapaxes(0, 1).reshape(Z, (spans - 1) * span, Dh)
  return jnp.concatenate([before, x_jZsDh[-1, :, spans * span - S :]], axis=1)


def met(first_BT, last_BT, t, s, S):
  """Of each step's queries the first tile of s keys and the end, and the same of those that all of them see whole.

  int32 [B, n, 4]. A query whose last is below its first, such as -1, is not there.
  """
  B = first_BT.shape[0]
  first_Bnt, last_Bnt = (x.reshape(B, -1, t) for x in (first_BT, last_BT))
  there = first_Bnt <= last_Bnt
  least = lambda x, otherwise: jnp.min(jnp.where(there, x, otherwise), axis=2)
  most = lambda x, otherwise: jnp.max(jnp.where(there, x, otherwise), axis=2)
  end = (most(last_Bnt, -1) + s) // s
  begin = jnp.minimum(least(first_Bnt, S) // s, end)
  whole = jnp.clip(-(-most(first_Bnt, 0) // s), begin, end)
  whole_end = jnp.clip(jnp.minimum(least(last_Bnt, S) + 1, S) // s, whole, end)
  return jnp.stack([begin, end, whole, whole_end], axis=-1)


def logsumexps(q_BTHDh, k_BSKDh, first_BT, last_BT, interpret=False):
  """Of each query's scores of the keys first..last, in bits: [B, H, T] float32; T is a multiple of LANES."""
  (B, T, H, _), K = q_BTHDh.shape, k_BSKDh.shape[2]
  G, k_BKSDh = H // K, k_BSKDh.swapaxes(1, 2)
  t = math.gcd(T, _tokens(G))
  _, bits = _forward_call(heads_first(q_BTHDh), k_BKSDh, k_BKSDh, first_BT, last_BT, G, t, interpret)
  return bits.reshape(B, K, T // t, G, t).swapaxes(2, 3).reshape(B, H, T)


def sights(first_BT, last_BT, G, t):
  """Of each row of a step, int32 [B*n, 2, R]."""
  rows = lambda x: jnp.tile(x.reshape(-1, t), (1, G))
  return jnp.stack([rows(first_BT), rows(last_BT)], axis=1)


# ----------------------------------------------------------------------------------------------------------------------
# forward


def _forward_call(q_YNDh, k_BKSDh, v_BKSDh, first_BN, last_BN, G, t, interpret):
  """(out like q, logsumexps of the scores in bits [X, 1, R] float32); queries of Z*G heads, t of them a step."""
  (_, N, Dh), (B, K, S, _) = q_YNDh.shape, k_BKSDh.shape
  Z, n, R = B * K, N // t, t * G
  X, s = Z * n, min(S, KEYS, max(LANES, 2 ** ((SCORES // R).bit_length() - 1)))
  parts = CORES if X % CORES == 0 else 1
  at = lambda part, step: part * (X // parts) + step
  of_step = lambda part, step, *_: (at(part, step), 0, 0)
  of_row = lambda part, step, *_: (at(part, step) // (K * n) * n + at(part, step) % n, 0, 0)
  rows = pl.BlockSpec((G, t, Dh), lambda part, step, *_: (at(part, step) // n, at(part, step) % n, 0))
  tile, column = pltpu.VMEM((2, s, Dh), k_BKSDh.dtype), pltpu.VMEM((R, LANES), jnp.float32)
  return pl.pallas_call(
      functools.partial(_forward_kernel, n=n, K=K, scale=Dh**-0.5 * BITS),
      out_shape=[jax.ShapeDtypeStruct(q_YNDh.shape, q_YNDh.dtype), jax.ShapeDtypeStruct((X, 1, R), jnp.float32)],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(parts, X // parts),
          in_specs=[pl.BlockSpec((1, 2, R), of_row), rows, IN_PLACE, IN_PLACE],
          out_specs=[rows, pl.BlockSpec((1, 1, R), of_step)],
          scratch_shapes=[
              tile, tile, column, column, pltpu.VMEM((R, Dh), jnp.float32), pltpu.SMEM((1,), jnp.int32),
              pltpu.SemaphoreType.DMA((2,)),
          ],
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          disable_bounds_checks=True,  # of copies, whose slots all exist
          vmem_limit_bytes=WORK_BYTES,
      ),
      interpret=interpret, name='attend',
  )(
      met(first_BN, last_BN, t, s, S).reshape(-1), jnp.max(last_BN.reshape(-1, t), axis=1),
      sights(first_BN, last_BN, G, t), q_YNDh, *(x.reshape(Z, S, Dh) for x in (k_BKSDh, v_BKSDh)),
  )


def _forward_kernel(met_ref, last_ref, sight_ref, q_ref, k_ref, v_ref, out_ref, bits_ref, k_tiles, v_tiles, top_ref,
                    total_ref, sum_ref, half_ref, arrived, *, n, K, scale):
  step, steps = pl.program_id(1), pl.num_programs(1)
  one = pl.program_id(0) * steps + step
  S, s = k_ref.shape[1], k_tiles.shape[1]
  (R, Dh), q_RDh = sum_ref.shape, q_ref[...].reshape(sum_ref.shape)
  row_of = lambda one: one // (K * n) * n + one % n
  bound = lambda one, i: met_ref[row_of(one) * 4 + i]
  begin, end, whole, whole_end = (bound(one, i) for i in range(4))

  def copies(one, tile, half):
    """The last tile reaches back where S is no multiple of s."""
    slots = pl.ds(pl.multiple_of(jnp.minimum(tile * s, S - s), SLOTS), s)
    pairs = (k_ref, k_tiles), (v_ref, v_tiles)
    return [pltpu.make_async_copy(all_.at[one // n, slots], some.at[half], arrived.at[half]) for all_, some in pairs]

  def start(one, tile, half):
    for copy in copies(one, tile, half):
      copy.start()

  following = jnp.minimum(one + 1, pl.num_programs(0) * steps - 1)
  follows = (step + 1 < steps) & (bound(following, 0) < bound(following, 1))

  @pl.when(step == 0)
  def _():
    half_ref[0] = 0
    pl.when(begin < end)(lambda: start(one, begin, 0))

  first_half = half_ref[0]
  pl.when((begin == end) & follows)(lambda: start(following, bound(following, 0), first_half))
  top_ref[...] = jnp.full(top_ref.shape, MASKED)
  total_ref[...] = jnp.zeros(total_ref.shape)
  sum_ref[...] = jnp.zeros(sum_ref.shape)

  def attend(tile, masked):
    half = lax.rem(first_half + tile - begin, 2)
    within = tile + 1 < end
    pl.when(within)(lambda: start(one, tile + 1, 1 - half))
    pl.when(~within & follows)(lambda: start(following, bound(following, 0), 1 - half))
    for copy in copies(one, tile, half):
      copy.wait()
    k_sDh, v_sDh = k_tiles[half], v_tiles[half]
    scores = kernel_product(q_RDh, k_sDh, 1, 1) * scale
    if masked:
      slot = jnp.minimum(tile * s, S - s)
      slot_1s = slot + lax.broadcasted_iota(jnp.int32, (1, s), 1)
      first_RL, last_RL = (jnp.broadcast_to(sight_ref[0, i : i + 1], (LANES, R)).T for i in range(2))
      first_RL = jnp.maximum(first_RL, tile * s)
      scores = jnp.where((slot_1s >= _wide(first_RL, s)) & (slot_1s <= _wide(last_RL, s)), scores, MASKED)
      some_s1 = slot + lax.broadcasted_iota(jnp.int32, (s, 1), 0) <= last_ref[row_of(one)]
      v_sDh = jnp.where(some_s1, v_sDh, jnp.zeros_like(v_sDh))  # behind what is written may be NaN
    old_RL = top_ref[...]
    top_RL = jnp.maximum(old_RL, jnp.max(scores, axis=1, keepdims=True))
    weights, keep_RL = jnp.exp2(scores - _wide(top_RL, s)), jnp.exp2(old_RL - top_RL)
    top_ref[...] = top_RL
    total_ref[...] = total_ref[...] * keep_RL + _lanes(weights)
    sum_ref[...] = sum_ref[...] * _wide(keep_RL, Dh) + kernel_product(weights.astype(v_sDh.dtype), v_sDh, 1, 0)

  lax.fori_loop(begin, whole, lambda tile, _: attend(tile, True), None)
  lax.fori_loop(whole, whole_end, lambda tile, _: attend(tile, False), None)
  lax.fori_loop(whole_end, end, lambda tile, _: attend(tile, True), None)
  half_ref[0] = lax.rem(first_half + end - begin, 2)
  total_R1 = jnp.sum(total_ref[...], axis=1, keepdims=True)
  total_R1 = jnp.where(total_R1 > 0, total_R1, 1)
  out_ref[...] = (sum_ref[...] / total_R1).astype(out_ref.dtype).reshape(out_ref.shape)
  bits_ref[0] = (top_ref[...] + jnp.log2(total_R1)).T[:1]


def _lanes(x_Rs):
  """Sums of what stands in equal lanes, [R, L]; to add those up can wait for the last tile."""
  whole = jnp.pad(x_Rs, ((0, 0), (0, -x_Rs.shape[1] % LANES)))
  return sum(whole[:, first : first + LANES] for first in range(0, whole.shape[1], LANES))


def _wide(x_RL, width):
  """Equal lanes, as many as are asked for."""
  return x_RL[:, :width] if width <= LANES else jnp.tile(x_RL, (1, -(-width // LANES)))[:, :width]


# ----------------------------------------------------------------------------------------------------------------------
# backward


def _backward_call(bounds_Bn4, sights_Y2R, q_YTDh, dout_YTDh, stats_X21R, keys, dq_YTDh, i, *, s, span, interpret):
  """(gradients of queries, of the keys and values of span i [Z, span, Dh]).

  dq: None, or what other spans gave, float32; then its sum with this one's is returned.
  """
  (Y, T, Dh), (Z, S, _), dtype = q_YTDh.shape, keys[0].shape, q_YTDh.dtype
  B, n, _ = bounds_Bn4.shape
  K, G, t = Z // B, Y // Z, T // n
  R = t * G
  # The last span begins within the one before, whose tiles it does not meet again.
  first = jnp.minimum(i * span, S - span)
  bounds_Bn4 = jnp.clip(bounds_Bn4, i * span // s, (first + span) // s)
  meets_Bn = bounds_Bn4[..., 0] < bounds_Bn4[..., 1]
  order_Bn = jnp.argsort(~meets_Bn, axis=1, stable=True).astype(jnp.int32)  # those that meet any key first
  count_B = jnp.sum(meets_Bn, axis=1, dtype=jnp.int32)
  place = lambda z, m, count, order: order[z // K * n + jnp.maximum(jnp.minimum(m, count[z // K] - 1), 0)]
  rows = pl.BlockSpec((G, t, Dh), lambda z, m, first, count, order, *_: (z, place(z, m, count, order), 0))
  of_row = pl.BlockSpec(
      (1, 2, R), lambda z, m, first, count, order, *_: (z // K * n + place(z, m, count, order), 0, 0))
  of_step = pl.BlockSpec(
      (1, 2, 1, R), lambda z, m, first, count, order, *_: (z * n + place(z, m, count, order), 0, 0, 0))
  grown = () if dq_YTDh is None else (dq_YTDh,)
  mine, sums = pltpu.VMEM((span, Dh), dtype), pltpu.VMEM((span, Dh), jnp.float32)
  of_keys = jax.ShapeDtypeStruct((Z, span, Dh), dtype)
  return pl.pallas_call(
      functools.partial(_backward_kernel, n=n, K=K, s=s, grown=bool(grown), scale=Dh**-0.5),
      out_shape=[jax.ShapeDtypeStruct(q_YTDh.shape, jnp.float32 if grown else dtype), of_keys, of_keys],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=4, grid=(Z, n),
          in_specs=[of_row, of_step, rows, rows, IN_PLACE, IN_PLACE, *[rows for _ in grown]],
          out_specs=[rows, IN_PLACE, IN_PLACE],
          scratch_shapes=[mine, mine, sums, sums, pltpu.VMEM((Dh, R), jnp.float32), pltpu.SemaphoreType.DMA],
      ),
      input_output_aliases={10: 0} if grown else {},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), disable_bounds_checks=True,
          vmem_limit_bytes=2 * span * Dh * (dtype.itemsize + 4) + WORK_BYTES,
      ),
      interpret=interpret, name='attend_backward',
  )(
      first.reshape(1), count_B, order_Bn.reshape(-1), bounds_Bn4.reshape(-1), sights_Y2R, stats_X21R, q_YTDh,
      dout_YTDh, *keys, *grown,
  )


def _backward_kernel(first_ref, count_ref, order_ref, met_ref, sight_ref, stats_ref, q_ref, dout_ref, k_ref, v_ref, *rest,
                     n, K, s, grown, scale):
  grown_ref = rest[0] if grown else None
  dq_ref, dk_ref, dv_ref, k_mine, v_mine, dk_sum, dv_sum, dq_sum, sem = rest[grown:]
  z, m = pl.program_id(0), pl.program_id(1)
  row = z // K
  slot_0 = pl.multiple_of(first_ref[0], LANES)

  @pl.when(m == 0)
  def _():
    slots = pl.ds(slot_0, k_mine.shape[0])
    copies = [pltpu.make_async_copy(all_.at[z, slots], mine, sem) for all_, mine in ((k_ref, k_mine), (v_ref, v_mine))]
    for copy in copies:
      copy.start()
    dk_sum[...] = jnp.zeros(dk_sum.shape)
    dv_sum[...] = jnp.zeros(dv_sum.shape)
    dq_ref[...] = grown_ref[...] if grown else jnp.zeros_like(dq_ref)
    for copy in copies:
      copy.wait()

  @pl.when(m < count_ref[row])
  def _():
    R = dq_sum.shape[1]
    q_RDh, dout_RDh = (ref[...].reshape(R, -1) for ref in (q_ref, dout_ref))
    bits_1R, delta_1R = stats_ref[0, 0], stats_ref[0, 1]
    begin, end, whole, whole_end = (met_ref[(row * n + order_ref[row * n + m]) * 4 + i] for i in range(4))
    dq_sum[...] = jnp.zeros(dq_sum.shape)

    def one_tile(tile, masked):
      here = pl.ds(pl.multiple_of(tile * s - slot_0, LANES), s)
      k_sDh, v_sDh = k_mine[here], v_mine[here]
      weights_sR = jnp.exp2(kernel_product(k_sDh, q_RDh, 1, 1) * (scale * BITS) - bits_1R)
      dscores_sR = weights_sR * (kernel_product(v_sDh, dout_RDh, 1, 1) - delta_1R)
      if masked:
        slot_s1 = tile * s + lax.broadcasted_iota(jnp.int32, (s, 1), 0)
        seen_sR = (slot_s1 >= sight_ref[0, :1]) & (slot_s1 <= sight_ref[0, 1:])
        weights_sR, dscores_sR = (jnp.where(seen_sR, x, 0) for x in (weights_sR, dscores_sR))
      weights_sR, dscores_sR = (x.astype(q_RDh.dtype) for x in (weights_sR, dscores_sR))
      dv_sum[here] += kernel_product(weights_sR, dout_RDh, 1, 0)
      dk_sum[here] += kernel_product(dscores_sR, q_RDh, 1, 0)
      dq_sum[...] += kernel_product(k_sDh, dscores_sR, 0, 0)

    lax.fori_loop(begin, whole, lambda tile, _: one_tile(tile, True), None)
    lax.fori_loop(whole, whole_end, lambda tile, _: one_tile(tile, False), None)
    lax.fori_loop(whole_end, end, lambda tile, _: one_tile(tile, True), None)
    dq = (dq_sum[...].T * scale).reshape(dq_ref.shape)
    dq_ref[...] = grown_ref[...] + dq if grown else dq.astype(dq_ref.dtype)

  @pl.when(m == n - 1)
  def _():
    copies = []
    for mine, sums, out, factor in (k_mine, dk_sum, dk_ref, scale), (v_mine, dv_sum, dv_ref, 1):
      mine[...] = (sums[...] * factor).astype(mine.dtype)
      copies.append(pltpu.make_async_copy(mine, out.at[z], sem))
      copies[-1].start()
    for copy in copies:
      copy.wait()
