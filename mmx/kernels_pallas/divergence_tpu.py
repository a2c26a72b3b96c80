"""The divergence of MSA's index branch as a Pallas kernel for TPU, a chunk's queries in VMEM: see `resident_tpu`;
`divergence_pairs` says what its sweep makes.

Layout. Keys are in sublanes and queries in lanes, [b, r*G] scores of attention and [b, r] of the index branch. A query's
G heads are neighbours in lanes, so their sum is a product with a matrix of zeros and ones: that is exact in bfloat16, and
probabilities enter it in as many bfloat16 parts as the inputs' dtype asks for. Keys that a query does not see are masked
in the mean, once for G heads.
The index keys' gradient grows in VMEM from tile to tile of a block, the index queries' and the divergence over a chunk.

None of it has run on a TPU. Letters as in `resident_tpu` and `divergence_pairs`, and R = r*G.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import resident_tpu as resident
from mmx.kernels_pallas.chunks import kernel_product
from mmx.kernels_pallas.divergence_pairs import divergence, index_keys_in_blocks
from mmx.kernels_pallas.sparse_pairs import LANES, whole_lanes

ROWS = 8  # at once, where all that a chunk has are set or read
LEAST_QUERIES = 2  # of a tile: a product with one row of bfloat16 does not compile
NEVER = 1e30  # a logsumexp against which nothing has probability
PARTS = {jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.float32): 3}  # numbers of 8 bits that make up a probability


def selected_divergence_pallas(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexps, segment_ids_BT,
                               block_size, interpret=False, part=None):
  """`divergence_pairs.divergence` by the kernel below, of both logsumexps: kl [B] float32.

  Shapes are those that `msa_tpu.unsupported` has nothing to say of; `interpret` is as `pl.pallas_call` takes it.
  """
  arguments = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexps, segment_ids_BT
  return divergence(*arguments, block_size, functools.partial(_divergence, interpret=interpret), part)


def _divergence(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, index_logsumexp_BTK, slots_BT,
                segments, block_size, interpret):
  B, T, H, Dh = q_BTHDh.shape
  K, Di = index_q_BTKDi.shape[2:]
  q_BTXD, queries, keys, starts = resident.sides(q_BTHDh, k_BTKDh, k_BTKDh, ids_BTKk, slots_BT, segments, block_size)
  index_k_pbD, index_q_BTKD = index_keys_in_blocks(index_k_BTDi, keys, block_size), whole_lanes(index_q_BTKDi)
  more = q_BTXD.shape[2] // K - H // K
  logsumexp_BTKG = jnp.pad(logsumexp_BTKG, ((0, 0),) * 3 + ((0, more),), constant_values=NEVER)
  logsumexp_BTX = logsumexp_BTKG.reshape(B, T, -1)

  def one(plan, carried):
    N = plan[0].slot_N1.size - 1
    place = 0, plan[0].place[0], plan[0].place[1], 0
    index_q_ND = lax.dynamic_slice(index_q_BTKD, place, (B, N // B, 1, index_q_BTKD.shape[3])).reshape(N, -1)
    index_q_N1D = jnp.pad(index_q_ND, ((0, 1), (0, 0))).astype(jnp.float32)
    both = (q_BTXD, index_q_N1D), (logsumexp_BTX, index_logsumexp_BTK)
    return diverge(plan, carried, keys, index_k_pbD, *both, K, H // K, (Dh**-0.5, Di**-0.5), interpret)

  zeros = jnp.zeros((B, 1, LANES)), jnp.zeros((*index_k_pbD.shape[:2], K * index_k_pbD.shape[2]), jnp.float32)
  (kl_B1L, dindex_k), dindex_q = resident.each_chunk_and_head(one, zeros, queries, keys, starts, LEAST_QUERIES)
  dindex_k_BTKD = dindex_k.reshape(B, -1, K, index_k_pbD.shape[2])[:, : index_k_BTDi.shape[1], :, :Di]
  dindex_q_BTKDi = resident.joined(dindex_q, B, T)[..., :Di]
  return jnp.sum(kl_B1L, axis=(1, 2)), dindex_q_BTKDi, jnp.sum(dindex_k_BTKD, axis=2).astype(index_k_BTDi.dtype)


def diverge(plan, carried, keys, index_k_pbD, queries, logsumexps, K, G_real, scales, interpret=False):
  """Of a chunk and kv head: (kl of each row so far, [B, 1, L] to be added up, and the index keys' gradient so far as
  each kv head has it, float32 [B*P, b, K*D], both with this one's added), and the index queries' gradient [N, D].

  `logsumexps` are attention's, [B, T, X], and the index branch's, [B, T, K].
  """
  plan, r = plan
  q_BTXD, index_q_N1D = queries
  rows, N, G, D = resident.rows_held(q_BTXD, plan, K)
  (b, Di), parts = index_k_pbD.shape[1:], PARTS[q_BTXD.dtype]
  P = index_k_pbD.shape[0] // q_BTXD.shape[0]
  scalars = *plan, plan.block_M // P
  block = lambda *shape: pl.BlockSpec((1, *shape), lambda m, block_M, *_: (block_M[m], 0, 0))
  of_head = lambda D: pl.BlockSpec((1, b, D), lambda m, block_M, *more: (block_M[m], 0, more[-2][1]))
  whole = lambda *shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
  kl_B1L, dindex_k_pbX = carried
  M, first = plan.block_M.size, len(scalars)
  logsumexps, dtype = (resident.lanes_of_chunk(x, plan, n) for x, n in zip(logsumexps, (G, 1))), q_BTXD.dtype
  inputs = q_BTXD, index_q_N1D, *logsumexps
  kl_B1L, dindex_k_pbX, dindex_q = pl.pallas_call(
      functools.partial(_diverge_kernel, scales=scales, parts=parts, r=r, G_real=G_real),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=first, grid=(plan.place[2],),
          in_specs=[
              resident.IN_PLACE, *[whole(*x.shape) for x in inputs[1:]], whole(*kl_B1L.shape), of_head(D),
              block(b, Di), block(1, b), of_head(Di),
          ],
          out_specs=[whole(*kl_B1L.shape), of_head(Di), whole(rows, Di)],
          scratch_shapes=[pltpu.VMEM((rows, G, D), dtype), pltpu.SemaphoreType.DMA],
      ),
      out_shape=[
          jax.ShapeDtypeStruct(kl_B1L.shape, jnp.float32), jax.ShapeDtypeStruct(dindex_k_pbX.shape, jnp.float32),
          jax.ShapeDtypeStruct((rows, Di), jnp.float32),
      ],
      input_output_aliases={first + 4: 0, first + 8: 1},  # blocks that no query chose keep what they have
      compiler_params=resident.params(rows * (G * D * dtype.itemsize + (4 * Di + 4 * LANES) * 4)),
      cost_estimate=pl.CostEstimate(
          flops=2 * M * b * r * (G * D + parts * r * G * (G > 1) + 3 * Di), transcendentals=M * b * r * (G + 2),
          bytes_accessed=N * (G * D + 2 * Di) * dtype.itemsize + M * b * (D + Di) * dtype.itemsize,
      ),
      interpret=interpret, name='msa_divergence',
  )(*scalars, *inputs, kl_B1L, keys.k_pbX, index_k_pbD, keys.segment_p1b, dindex_k_pbX)
  return (kl_B1L, dindex_k_pbX), dindex_q[:N].astype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def _diverge_kernel(
    block_ref, first_slot_ref, first_ref, query_ref, slot_ref, segment_ref, whole_ref, place_ref, row_ref,
    q_all_ref, index_q_ref, logsumexp_ref, index_logsumexp_ref, kl_before_ref, k_ref, index_k_ref, key_segment_ref,
    before_ref, kl_ref, dindex_k_ref, dindex_q_ref, q_ref, sem, *, scales, parts, r, G_real):
  m = pl.program_id(0)
  rows, G, D = q_ref.shape
  N = slot_ref.shape[0] - 1

  @pl.when(m == 0)
  def _():
    copies = resident.chunk_copies(place_ref, q_all_ref, q_ref, sem, N)
    resident.start(copies)
    q_ref[N:] = jnp.zeros((rows - N, G, D), q_ref.dtype)

    @pl.loop(0, rows // ROWS)
    def _(i):
      dindex_q_ref[pl.ds(i * ROWS, ROWS)] = jnp.zeros((ROWS, dindex_q_ref.shape[1]), jnp.float32)

    kl_ref[...] = kl_before_ref[...]
    resident.wait(copies)

  @pl.when((m == 0) | (block_ref[m] != block_ref[jnp.maximum(m - 1, 0)]))
  def _():
    dindex_k_ref[...] = before_ref[...]

  queries = resident.queries_of(m, r, first_ref, query_ref, N)
  lane_1L = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  per_head = lambda of_query: resident.in_lanes([of_query(n) for n in queries], lane_1L // G, G)
  per_query = lambda of_query: resident.in_lanes([of_query(n) for n in queries], lane_1L, 1)
  limit_1r, segment_1r = per_query(lambda n: slot_ref[n] - first_slot_ref[m]), per_query(lambda n: segment_ref[n])
  visible_br = resident.visible(limit_1r, segment_1r, key_segment_ref)

  index_k_bD = index_k_ref[0]
  index_q_rD = jnp.concatenate([index_q_ref[pl.ds(n, 1)] for n in queries]).astype(index_k_bD.dtype)
  q_RD, logsumexp_1R = jnp.concatenate([q_ref[n] for n in queries]), per_head(lambda n: logsumexp_ref[pl.ds(n, 1)])
  teacher_br = _teacher(q_RD, k_ref[0], logsumexp_1R, scales[0], r, parts) * (G / G_real)
  teacher_br = jnp.where(visible_br, teacher_br, 0)
  scores_br = kernel_product(index_k_bD, index_q_rD, 1, 1) * scales[1]
  log_student_br = jnp.where(visible_br, scores_br - per_query(lambda n: index_logsumexp_ref[pl.ds(n, 1)]), 0)
  log_teacher_br = jnp.log(jnp.maximum(teacher_br, jnp.finfo(jnp.float32).tiny))  # where P is 0, its share is 0
  kl_1r = jnp.sum(teacher_br * (log_teacher_br - log_student_br), axis=0, keepdims=True)
  kl_ref[row_ref[m]] += jnp.sum(kl_1r, axis=1, keepdims=True) * jnp.where(lane_1L == 0, 1.0, 0.0)
  dscores_br = (jnp.where(visible_br, jnp.exp(log_student_br), 0) - teacher_br) * scales[1]
  dscores_br = dscores_br.astype(index_k_bD.dtype)
  dindex_k_ref[0] += kernel_product(dscores_br, index_q_rD, 1, 0)
  dindex_q_rD = kernel_product(dscores_br, index_k_bD, 0, 0)
  for j, some in resident.some_of(queries):
    resident.add_rows(dindex_q_ref, some, dindex_q_rD[j : j + len(some)])


def _teacher(q_RD, k_bD, logsumexp_1R, scale, r, parts):
  """[b, r]: the mean of the heads of each of r queries; no matter what for keys that a query does not see."""
  # Those may score above what it sees, and infinity would reach the tile's other queries.
  rest_bR = jnp.exp(jnp.minimum(kernel_product(k_bD, q_RD, 1, 1) * scale - logsumexp_1R, 0))
  R = q_RD.shape[0]
  G = R // r
  if G == 1:
    return rest_bR
  head_Rr, query_Rr = (lax.broadcasted_iota(jnp.int32, (R, r), axis) for axis in (0, 1))
  is_of_Rr = (head_Rr >= query_Rr * G) & (head_Rr < query_Rr * G + G)
  is_of_Rr = jnp.where(is_of_Rr, 1.0, 0.0).astype(jnp.bfloat16)
  total_br = jnp.zeros((k_bD.shape[0], r))
  for _ in range(parts):
    part_bR = rest_bR.astype(jnp.bfloat16)
    total_br += kernel_product(part_bR, is_of_Rr, 1, 0)
    rest_bR -= part_bR.astype(jnp.float32)
  return total_br / G
