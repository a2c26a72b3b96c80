"""Full attention of new tokens to a cache, as a Pallas kernel for TPU: a prompt's next chunk, or one decoded token.

The G heads of a kv head and some tokens are the rows of a step's products; for them the cache is copied tile by tile
into VMEM, the next tile, also of the next step, while one is at work. It stands where it is: [B, K, S, Dh] is, for each
row and head, memory without gaps. Of each step two numbers are known before it starts, how far any of its tokens sees
and how far all do. Behind the first nothing is read, below the second nothing is masked.

jax's own kernels for TPU need caches as pages of another layout (`paged_attention`, for one token), or keys of the same
length for all rows (splash).

Letters: B rows, T new tokens, S slots of the cache, H query heads, K kv heads, G = H/K, Dh head dim, t tokens of a step,
n steps of a row and kv head, R = t*G rows, s slots of a tile.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas.chunks import kernel_product
from mmx.kernels_pallas.shards import on_shards
from mmx.kernels_pallas.sparse import MASKED

ROWS = 1024  # most of a step
SCORES = 2**19  # most of a step and tile: with what is made of them 8 MiB
KEYS = 2048  # most of a tile
CORES = 2  # of the chips that share a grid's first axis among cores, v4 and v5p
VMEM_BYTES = 48 * 2**20  # at most, of v5p's 64 MiB; M2's heads take less than 10
MOST_HEADS = 128  # of a kv head, 16 tokens of which are the fewest of a step where there are several
LANES = 128
BITS = math.log2(math.e)  # exponentials are of base 2, as the chip's: a product with this less for each score


def unsupported(q_BTHDh, k_BKSDh) -> str:
  """'' where `attention_cached_pallas` compiles for TPU, else one reason. Takes anything with shape and dtype."""
  H = q_BTHDh.shape[2]
  K, S, Dh = k_BKSDh.shape[1:]
  if H % K:
    return f'{H} query heads are no multiple of {K} kv heads'
  if H // K > MOST_HEADS:
    return f'{H // K} query heads a kv head; at most {MOST_HEADS} are supported'
  if q_BTHDh.dtype not in (jnp.bfloat16, jnp.float32) or k_BKSDh.dtype != q_BTHDh.dtype:
    return f'dtypes {q_BTHDh.dtype} and {k_BKSDh.dtype}; bfloat16 or float32, the same for both, are supported'
  if Dh % LANES or Dh > 4 * LANES:
    return f'head dim {Dh}; multiples of {LANES} up to {4 * LANES} are supported'
  return f'{S} slots are no multiple of 16' if S % 16 else ''


def attention_cached_pallas(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, mesh=None, interpret=False):
  """`attention.attention_cached`: [B, T, H, Dh] of q's dtype, some finite mean at positions below 0. No gradient.

  Args:
    mesh: over whose devices rows and heads are split.
    interpret: as `pl.pallas_call` takes it.
  """
  shard = functools.partial(_attend, interpret=interpret)
  return on_shards(shard, mesh, q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, cached=True)


def _attend(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, interpret):
  B, T, H, Dh = q_BTHDh.shape
  K, S = k_BKSDh.shape[1:3]
  G = H // K
  n = 1 if T * G <= ROWS else -(-T // max(16, ROWS // G // 16 * 16))
  t = T if n == 1 else -(-T // (16 * n)) * 16  # whole tiles of memory, where there are several
  missing = ((0, 0), (0, n * t - T))
  positions_Bnt = jnp.pad(positions_BT, missing, constant_values=-1).reshape(B, n, t)
  q_BTKGDh = jnp.pad(q_BTHDh, (*missing, (0, 0), (0, 0))).reshape(B, n * t, K, G, Dh)
  high_Bn = jnp.max(positions_Bnt, axis=2)
  low_Bn = jnp.min(jnp.where(positions_Bnt < 0, S, positions_Bnt), axis=2)
  out_XRDh = _call(
      high_Bn, low_Bn, jnp.repeat(positions_Bnt, G, axis=2).reshape(B * n, 1, -1),
      q_BTKGDh.swapaxes(1, 2).reshape(-1, t * G, Dh), *(x.reshape(B * K, S, Dh) for x in (k_BKSDh, v_BKSDh)), interpret,
  )
  return out_XRDh.reshape(B, K, n * t, G, Dh).swapaxes(1, 2)[:, :T].reshape(q_BTHDh.shape)


def _call(high_Bn, low_Bn, positions_Y1R, q_XRDh, k_ZSDh, v_ZSDh, interpret):
  """Steps X = B*K*n, of positions Y = B*n and of keys Z = B*K."""
  (X, R, Dh), (Z, S, _) = q_XRDh.shape, k_ZSDh.shape
  n = X // Z
  K = X // high_Bn.size
  s = min(S, KEYS, max(1, SCORES // (R * LANES)) * LANES)
  parts = CORES if X % CORES == 0 else 1
  at = lambda part, step: part * (X // parts) + step
  of_step = lambda part, step, *_: (at(part, step), 0, 0)
  of_row = lambda part, step, *_: (at(part, step) // (K * n) * n + at(part, step) % n, 0, 0)
  rows = pl.BlockSpec((1, R, Dh), of_step)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  tile, column = pltpu.VMEM((2, s, Dh), k_ZSDh.dtype), pltpu.VMEM((R, LANES), jnp.float32)
  return pl.pallas_call(
      functools.partial(_kernel, n=n, K=K, scale=Dh**-0.5),
      out_shape=jax.ShapeDtypeStruct(q_XRDh.shape, q_XRDh.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(parts, X // parts),
          in_specs=[pl.BlockSpec((1, 1, R), of_row), rows, anywhere, anywhere], out_specs=rows,
          scratch_shapes=[
              tile, tile, column, column, pltpu.VMEM((R, Dh), jnp.float32), pltpu.SMEM((1,), jnp.int32),
              pltpu.SemaphoreType.DMA((2,)),
          ],
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          disable_bounds_checks=True,  # of copies, whose slots all exist
          vmem_limit_bytes=VMEM_BYTES,
      ),
      cost_estimate=pl.CostEstimate(  # of a full cache, as what it holds is not known
          flops=4 * X * R * S * Dh, transcendentals=X * R * S, bytes_accessed=2 * n * k_ZSDh.nbytes + 2 * q_XRDh.nbytes,
      ),
      interpret=interpret, name='attend_cache',
  )(high_Bn.reshape(-1), low_Bn.reshape(-1), positions_Y1R, q_XRDh, k_ZSDh, v_ZSDh)


def _kernel(high_ref, low_ref, position_ref, q_ref, k_ref, v_ref, out_ref, k_tiles, v_tiles, top_ref, total_ref, sum_ref,
            half_ref, arrived, *, n, K, scale):
  step, steps = pl.program_id(1), pl.num_programs(1)
  one = pl.program_id(0) * steps + step
  S, s = k_ref.shape[1], k_tiles.shape[1]
  row_of = lambda one: one // (K * n) * n + one % n
  tiles_of = lambda one: (high_ref[row_of(one)] + s) // s  # none where all is padding
  tiles = tiles_of(one)

  def copies(one, i, half):
    """Of tile i. The last reaches back where S is no multiple of s."""
    slots = pl.ds(pl.multiple_of(jnp.minimum(i * s, S - s), 16), s)
    pairs = (k_ref, k_tiles), (v_ref, v_tiles)
    return [pltpu.make_async_copy(all_.at[one // n, slots], tile.at[half], arrived.at[half]) for all_, tile in pairs]

  def start(one, i, half):
    for copy in copies(one, i, half):
      copy.start()

  @pl.when(step == 0)
  def _():
    half_ref[0] = 0
    pl.when(tiles > 0)(lambda: start(one, 0, 0))

  first_half = half_ref[0]
  following = jnp.minimum(one + 1, pl.num_programs(0) * steps - 1)
  follows = (step + 1 < steps) & (tiles_of(following) > 0)
  pl.when((tiles == 0) & follows)(lambda: start(following, 0, first_half))

  top_ref[...] = jnp.full(top_ref.shape, MASKED)
  total_ref[...] = jnp.zeros(total_ref.shape)
  sum_ref[...] = jnp.zeros(sum_ref.shape)

  def attend(i, masked):
    half = lax.rem(first_half + i, 2)
    within = i + 1 < tiles
    pl.when(within)(lambda: start(one, i + 1, 1 - half))
    pl.when(~within & follows)(lambda: start(following, 0, 1 - half))
    for copy in copies(one, i, half):
      copy.wait()
    k_sDh, v_sDh = k_tiles[half], v_tiles[half]
    scores = kernel_product(q_ref[0], k_sDh, 1, 1) * (scale * BITS)
    if masked:
      position_R1 = jnp.broadcast_to(position_ref[0], (8, scores.shape[0])).T[:, :1]
      slot = jnp.minimum(i * s, S - s)
      slot_1s = slot + lax.broadcasted_iota(jnp.int32, (1, s), 1)
      scores = jnp.where((slot_1s <= position_R1) & (slot_1s >= i * s), scores, MASKED)
      written_s1 = slot + lax.broadcasted_iota(jnp.int32, (s, 1), 0) <= high_ref[row_of(one)]
      v_sDh = jnp.where(written_s1, v_sDh, jnp.zeros_like(v_sDh))  # others may be NaN
    old_RL = top_ref[...]
    top_RL = jnp.maximum(old_RL, jnp.max(scores, axis=1, keepdims=True))
    weights, keep_RL = jnp.exp2(scores - _wide(top_RL, s)), jnp.exp2(old_RL - top_RL)
    top_ref[...] = top_RL
    total_ref[...] = total_ref[...] * keep_RL + _lanes(weights)
    sum_ref[...] = sum_ref[...] * _wide(keep_RL, q_ref.shape[2]) + kernel_product(weights.astype(v_sDh.dtype), v_sDh, 1, 0)

  whole = jnp.minimum((low_ref[row_of(one)] + 1) // s, tiles)
  whole = jnp.where(tiles * s > S, jnp.minimum(whole, tiles - 1), whole)  # where the last reaches back
  lax.fori_loop(0, whole, lambda i, _: attend(i, False), None)
  lax.fori_loop(whole, tiles, lambda i, _: attend(i, True), None)
  half_ref[0] = lax.rem(first_half + tiles, 2)
  total_R1 = jnp.sum(total_ref[...], axis=1, keepdims=True)
  out_ref[0] = (sum_ref[...] / jnp.where(total_R1 > 0, total_R1, 1)).astype(out_ref.dtype)


def _lanes(x_Rs):
  """Sums of what stands in equal lanes, [R, L]; to add those up can wait for the last tile."""
  whole = jnp.pad(x_Rs, ((0, 0), (0, -x_Rs.shape[1] % LANES)))
  return sum(whole[:, first : first + LANES] for first in range(0, whole.shape[1], LANES))


def _wide(x_RL, width):
  """Equal lanes, as many as are asked for."""
  return x_RL[:, :width] if width <= LANES else jnp.tile(x_RL, (1, -(-width // LANES)))[:, :width]
