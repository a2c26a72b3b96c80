"""The divergence of MSA's dense warm-up as a Pallas kernel for TPU: of the index branch from attention, over all that a
query sees.

What a query sees is one stretch of keys, as `attention_tpu` has it, whose forward kernel also makes both branches'
logsumexps. One sweep then makes the divergence and its gradient in closed form (MSA, appendix B): a kv head's keys and
index keys stay in VMEM with the latter's gradient, its queries come by. Probabilities of the G heads are [keys, G*t], so
that those of one query stand t lanes apart and their mean is a sum of slices. Nothing of [T, S] is in memory, and what
no query sees is not computed; the form in XLA writes scores of every head and key.

None of it has run on a TPU. Letters as in `attention_tpu`; Di index dim, t = 128 queries of a step, R = t*G.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import attention_tpu
from mmx.kernels_pallas.attention_tpu import BITS, IN_PLACE, LANES, WORK_BYTES, cut, heads_first, met, sights, whole
from mmx.kernels_pallas.chunks import kept, kernel_product, places, sight
from mmx.kernels_pallas.sparse import per_row

KEYS = 256  # of a tile
MOST_HEADS = 16  # of a kv head: R of 2048
TINY = float(jnp.finfo(jnp.float32).tiny)


def unsupported(q_BTHDh, k_BSKDh, index_q_BTKDi) -> str:
  """'' where the kernel compiles for TPU, else one reason. Takes anything with shape and dtype."""
  G, Di = q_BTHDh.shape[2] // k_BSKDh.shape[2], index_q_BTKDi.shape[3]
  if reason := attention_tpu.unsupported(q_BTHDh, k_BSKDh):
    return reason
  if G > MOST_HEADS:
    return f'{G} query heads a kv head; at most {MOST_HEADS} are supported'
  return '' if Di in (LANES, 2 * LANES) else f'index dim {Di}; {LANES} and {2 * LANES} are supported'


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def msa_prefix_kl_pallas(q_BTHDh, k_BSKDh, index_q_BTKDi, index_k_BSDi, segment_ids_BT, part=None, interpret=False):
  """`reference.msa_prefix_kl` where each document stands in one piece: kl [B] float32. Gradients are the index branch's.

  Args:
    part: see `chunks.Part`; within a shard_map.
    interpret: as `pl.pallas_call` takes it.
  """
  return _forward(q_BTHDh, k_BSKDh, index_q_BTKDi, index_k_BSDi, segment_ids_BT, part, interpret)[0]


def _forward(q_BTHDh, k_BSKDh, index_q_BTKDi, index_k_BSDi, segment_ids_BT, part, interpret):
  B, T, H, _ = q_BTHDh.shape
  S, K = k_BSKDh.shape[1:3]
  slots_BT, (_, key_segments_BS) = places(segment_ids_BT, part)
  first_BT, last_BT = (whole(x, LANES, mode='edge') for x in sight(key_segments_BS, slots_BT))
  q_BTHDh, index_q_BTKDi, counts_BT = (whole(x, LANES) for x in (q_BTHDh, index_q_BTKDi, segment_ids_BT > 0))
  k_BSKDh, index_k_BS1Di = (whole(x, LANES) for x in (k_BSKDh, index_k_BSDi[:, :, None]))
  sums = functools.partial(attention_tpu.logsumexps, first_BT=first_BT, last_BT=last_BT, interpret=interpret)
  bits_BHT, index_bits_BKT = sums(q_BTHDh, k_BSKDh), sums(index_q_BTKDi, index_k_BS1Di)
  n = counts_BT.shape[1] // LANES
  steps = lambda x_BXT: x_BXT.reshape(B * K, -1, n, LANES).swapaxes(1, 2).reshape(B * K * n, 1, -1)
  numbers = steps(bits_BHT), steps(index_bits_BKT), counts_BT.astype(jnp.float32).reshape(B * n, 1, LANES)
  s = math.gcd(k_BSKDh.shape[1], KEYS)
  bounds_Bn4, sight_Y2t = met(first_BT, last_BT, LANES, s, k_BSKDh.shape[1]), sights(first_BT, last_BT, 1, LANES)
  queries = heads_first(q_BTHDh), heads_first(index_q_BTKDi)
  keys = k_BSKDh.swapaxes(1, 2).reshape(B * K, *k_BSKDh.shape[1::2]), index_k_BS1Di[:, :, 0]
  key_bytes = sum(x.shape[2] * x.dtype.itemsize for x in keys) + 4 * keys[1].shape[2]
  spans, span = cut(keys[0].shape[1], s, key_bytes)
  call = functools.partial(_call, bounds_Bn4, sight_Y2t, numbers, queries, keys, s=s, span=span, interpret=interpret)

  def one_span(carried, i):
    kl_Z, dq_ZTDi = carried
    kl_Z1t, more_ZTDi, dk_ZsDi = call(i)
    return (kl_Z + jnp.sum(kl_Z1t, axis=(1, 2)), dq_ZTDi + more_ZTDi), jnp.sum(dk_ZsDi.reshape(B, K, span, -1), axis=1)

  zeros = jnp.zeros(B * K), jnp.zeros(queries[1].shape)
  (kl_Z, dq_ZTDi), dk_jBsDi = lax.scan(one_span, zeros, jnp.arange(spans, dtype=jnp.int32))
  dindex_q_BTKDi = dq_ZTDi.reshape(B, K, *dq_ZTDi.shape[1:]).swapaxes(1, 2)[:, :T]
  dindex_k_BSDi = attention_tpu.joined(dk_jBsDi, keys[1].shape[1])[:, :S]
  gradients = dindex_q_BTKDi.astype(index_q_BTKDi.dtype), dindex_k_BSDi.astype(index_k_BSDi.dtype)
  return jnp.sum(kl_Z.reshape(B, K), axis=1), kept(gradients)


def _backward(interpret, gradients, dkl_B):
  return None, None, *(per_row(dkl_B, x) for x in gradients), None, None


msa_prefix_kl_pallas.defvjp(_forward, _backward)


def _call(bounds_Bn4, sight_Y2t, numbers, queries, keys, i, *, s, span, interpret):
  """Of span i, float32: (divergences [Z, 1, t], gradients of index queries [Z, T, Di], of index keys [Z, span, Di])."""
  (k_ZSDh, index_k_BSDi), (q_YTDh, index_q_ZTDi) = keys, queries
  (Z, S, Dh), (B, _, Di), (Y, T, _), dtype = k_ZSDh.shape, index_k_BSDi.shape, q_YTDh.shape, q_YTDh.dtype
  K, G, n, t = Z // B, Y // Z, T // LANES, LANES
  first = jnp.minimum(i * span, S - span)  # the last span begins within the one before, and meets none of its tiles again
  bounds_Bn4 = jnp.clip(bounds_Bn4, i * span // s, (first + span) // s)
  of_row = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda z, m, *_: (z // K * n + m, 0, 0))
  of_step = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda z, m, *_: (z * n + m, 0, 0))
  rows = lambda x, heads: pl.BlockSpec((heads, t, x.shape[2]), lambda z, m, *_: (z, m, 0))
  bits, index_bits, counts = numbers
  head = pl.BlockSpec((1, 1, t), lambda z, m, *_: (z, 0, 0))
  floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return pl.pallas_call(
      functools.partial(_kernel, K=K, n=n, s=s, scales=(Dh**-0.5, Di**-0.5)),
      out_shape=[floats(Z, 1, t), floats(*index_q_ZTDi.shape), floats(Z, span, Di)],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(Z, n),
          in_specs=[of_row(sight_Y2t), of_step(bits), of_step(index_bits), of_row(counts), rows(q_YTDh, G),
                    rows(index_q_ZTDi, 1), IN_PLACE, IN_PLACE],
          out_specs=[head, rows(index_q_ZTDi, 1), IN_PLACE],
          scratch_shapes=[
              pltpu.VMEM((span, Dh), dtype), pltpu.VMEM((span, Di), index_k_BSDi.dtype),
              pltpu.VMEM((span, Di), jnp.float32), pltpu.VMEM((Di, t), jnp.float32), pltpu.SemaphoreType.DMA,
          ],
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), disable_bounds_checks=True,
          vmem_limit_bytes=span * (Dh * dtype.itemsize + Di * (index_k_BSDi.dtype.itemsize + 4)) + WORK_BYTES,
      ),
      interpret=interpret, name='msa_warmup_divergence',
  )(first.reshape(1), bounds_Bn4.reshape(-1), sight_Y2t, *numbers, *queries, *keys)


def _kernel(first_ref, met_ref, sight_ref, bits_ref, index_bits_ref, counts_ref, q_ref, index_q_ref, k_ref, index_k_ref,
            kl_ref, dq_ref, dk_ref, k_mine, index_k_mine, dk_sum, dq_sum, sem, *, K, n, s, scales):
  z, m = pl.program_id(0), pl.program_id(1)
  slot_0 = pl.multiple_of(first_ref[0], LANES)
  scale, index_scale = scales

  @pl.when(m == 0)
  def _():
    slots = pl.ds(slot_0, k_mine.shape[0])
    sources = k_ref.at[z, slots], index_k_ref.at[z // K, slots]
    copies = [pltpu.make_async_copy(*pair, sem) for pair in zip(sources, (k_mine, index_k_mine))]
    for copy in copies:
      copy.start()
    dk_sum[...] = jnp.zeros(dk_sum.shape)
    kl_ref[...] = jnp.zeros(kl_ref.shape)
    for copy in copies:
      copy.wait()

  G, t, Dh = q_ref.shape
  q_RDh, index_q_tDi = q_ref[...].reshape(G * t, Dh), index_q_ref[0]
  begin, end, all_from, all_to = (met_ref[(z // K * n + m) * 4 + i] for i in range(4))
  dq_sum[...] = jnp.zeros(dq_sum.shape)

  def one_tile(tile, masked):
    here = pl.ds(pl.multiple_of(tile * s - slot_0, LANES), s)
    index_k_sDi = index_k_mine[here]
    shares_sR = jnp.exp2(kernel_product(k_mine[here], q_RDh, 1, 1) * (scale * BITS) - bits_ref[0])
    teacher_st = sum(shares_sR[:, g * t : (g + 1) * t] for g in range(G)) * (1 / G)
    log_student_st = kernel_product(index_k_sDi, index_q_tDi, 1, 1) * (index_scale * BITS) - index_bits_ref[0]
    student_st = jnp.exp2(log_student_st)
    if masked:
      slot_s1 = tile * s + lax.broadcasted_iota(jnp.int32, (s, 1), 0)
      seen_st = (slot_s1 >= sight_ref[0, :1]) & (slot_s1 <= sight_ref[0, 1:])
      teacher_st, log_student_st, student_st = (
          jnp.where(seen_st, x, 0) for x in (teacher_st, log_student_st, student_st)
      )
    terms_st = teacher_st * (jnp.log2(jnp.maximum(teacher_st, TINY)) - log_student_st)
    kl_ref[0] += jnp.sum(terms_st, axis=0, keepdims=True) * (counts_ref[0] * (1 / BITS))
    dscores_st = ((student_st - teacher_st) * (counts_ref[0] * index_scale)).astype(index_q_tDi.dtype)
    dk_sum[here] += kernel_product(dscores_st, index_q_tDi, 1, 0)
    dq_sum[...] += kernel_product(index_k_sDi, dscores_st, 0, 0)

  lax.fori_loop(begin, all_from, lambda tile, _: one_tile(tile, True), None)
  lax.fori_loop(all_from, all_to, lambda tile, _: one_tile(tile, False), None)
  lax.fori_loop(all_to, end, lambda tile, _: one_tile(tile, True), None)
  dq_ref[0] = dq_sum[...].T

  @pl.when(m == n - 1)
  def _():
    copy = pltpu.make_async_copy(dk_sum, dk_ref.at[z], sem)
    copy.start()
    copy.wait()
