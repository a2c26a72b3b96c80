"""Attention of one or a few new tokens to the blocks that they chose, as a Mosaic GPU kernel for Hopper.

A query and kv head is the work of one block of threads, or of several that share its blocks where there are fewer
queries than multiprocessors; then each leaves what it has with its logsumexp, and XLA adds them up. One warpgroup
copies chosen blocks in bulk, as many ahead as shared memory holds; of blocks of fewer than 64 keys, as many together as
make 64. The other attends: the G heads are the first rows of a tile of 64, fewer than which the matrix unit does not
take. At block 128 and Dh 128 the products of all 64 rows are 0.6 us of a multiprocessor's peak, and the block takes
1.8 us to arrive at its share of an H200's 4.8 TB/s: computed, as none of it has run on a GPU.

The order of blocks and the pages in which a cache stands are those of `decode_tpu`: a query's own block, the only one
that it sees in part, is the first, and a number says how many keys it sees in all. What was not chosen is not read:
where fewer blocks are left than go together, the last is read again, unseen. What was not written is not used.

Letters: B rows, T new tokens, S key slots, H query heads, K kv heads, G = H/K, Dh head dim, b block size, k blocks per
query and kv head, N = B*T*K queries, R = G in whole tiles of 8, J parts of a query, n blocks computed together, s = n*b
keys of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmx.kernels_pallas import hopper
from mmx.kernels_pallas.decode_tpu import pages_of_choices
from mmx.kernels_pallas.sparse import MASKED
from mmx.kernels_pallas.sparse_gpu import BLOCKS

ROWS = 64  # of a warpgroup's product
LEAST_KEYS = 64  # computed together
MULTIPROCESSORS = 132  # of an H100 or H200
STAGES = 4  # most blocks of keys and values in shared memory at once
MARGIN_BYTES = 2048  # of shared memory, for barriers, logsumexp and alignment
MEMORY, ATTENTION = range(2)  # the warpgroups


def unsupported(q_BTHDh, k_BKSDh, block_size) -> str:
  """'' where `attend_chosen` compiles for Hopper, else one reason. Takes anything with shape and dtype."""
  H, Dh = q_BTHDh.shape[2:]
  K, S = k_BKSDh.shape[1:3]
  if H % K or H // K > ROWS:
    return f'{H} query heads on {K} kv heads; groups of up to {ROWS} are supported'
  if q_BTHDh.dtype != jnp.bfloat16 or k_BKSDh.dtype != jnp.bfloat16:
    return f'dtypes {q_BTHDh.dtype} and {k_BKSDh.dtype}; bfloat16 is supported'
  if Dh not in (64, 128):
    return f'head dim {Dh}; 64 and 128 are supported'
  if block_size not in BLOCKS:
    return f'block_size {block_size}; {", ".join(map(str, BLOCKS))} are supported'
  return '' if S % block_size == 0 else f'{S} slots are no multiple of block_size {block_size}'


def attend_chosen(q_BTHDh, k_BKSDh, v_BKSDh, ids_BTKk, slots_BT, block_size, pages_BP=None, interpret=False):
  """`decode_tpu.attend_chosen` on Hopper, in bfloat16; `interpret` is False for the card, `hopper.simulator()` for tests.

  Returns:
    [B, T, H, Dh] of q's dtype, zeros where nothing is seen. No gradient.
  """
  B, T, H, Dh = q_BTHDh.shape
  K = k_BKSDh.shape[1]
  N, G, k = B * T * K, H // K, ids_BTKk.shape[3]
  page_BTKk, seen_BTK = pages_of_choices(ids_BTKk, slots_BT, block_size, k_BKSDh.shape, pages_BP)
  q_NRDh = jnp.pad(q_BTHDh.reshape(N, G, Dh), ((0, 0), (0, -G % 8), (0, 0)))
  pages = lambda x: x.reshape(-1, block_size, Dh)
  n = max(1, LEAST_KEYS // block_size)
  steps = -(-k // n)
  each = -(-steps // min(steps, max(1, MULTIPROCESSORS // N)))
  out_JNRDh, *logsumexp_JNR = _attend(
      page_BTKk.reshape(N, k), seen_BTK.reshape(N), q_NRDh, pages(k_BKSDh), pages(v_BKSDh), n, each, interpret
  )
  out_NRDh = _sum_of_parts(out_JNRDh, *logsumexp_JNR, q_BTHDh.dtype) if logsumexp_JNR else out_JNRDh[0]
  return out_NRDh[:, :G].reshape(B, T, H, Dh)


def _sum_of_parts(out_JNRDh, logsumexp_JNR, dtype):
  weights_JNR = jax.nn.softmax(logsumexp_JNR, axis=0)
  return jnp.sum(weights_JNR[..., None] * out_JNRDh, axis=0).astype(dtype)


def _attend(page_Nk, seen_N, q_NRDh, k_pbDh, v_pbDh, n, each, interpret):
  """(out [J, N, R, Dh], logsumexp [J, N, R]), both float32, of parts of `each` times n blocks; of a single part (out,) in
  q's dtype."""
  (N, R, Dh), s, k = q_NRDh.shape, n * k_pbDh.shape[1], page_Nk.shape[1]
  J = -(-k // (n * each))
  dtype, out_dtype = q_NRDh.dtype, q_NRDh.dtype if J == 1 else jnp.dtype(jnp.float32)
  step_bytes = 2 * s * Dh * dtype.itemsize
  room = hopper.SHARED_BYTES - MARGIN_BYTES - ROWS * Dh * (dtype.itemsize + out_dtype.itemsize)
  stages = min(STAGES, each, room // step_bytes)
  tile = lambda dtype, *shape: plgpu.SMEM(shape, dtype, transforms=hopper.tiled(dtype))
  out_types = jax.ShapeDtypeStruct((J, N, R, Dh), out_dtype), jax.ShapeDtypeStruct((J, N, R), jnp.float32)
  return plgpu.kernel(
      functools.partial(_kernel, each=each, scale=Dh**-0.5, interpret=interpret), out_type=out_types[: 2 if J > 1 else 1],
      grid=(J, N), grid_names=('part', 'query'), num_threads=2, thread_name='group',
      scratch_types=dict(
          q_s=tile(dtype, ROWS, Dh), k_s=tile(dtype, stages, s, Dh), v_s=tile(dtype, stages, s, Dh),
          out_s=tile(out_dtype, ROWS, Dh), logsumexp_s=plgpu.SMEM((ROWS,), jnp.float32) if J > 1 else None,
          asked=plgpu.Barrier(), full=plgpu.Barrier(num_arrivals=2 * n, num_barriers=stages),
          free=plgpu.Barrier(num_barriers=stages),
      ),
      compiler_params=hopper.parameters(approx_math=True), kernel_name='msa_attend_chosen', interpret=interpret,
  )(page_Nk, seen_N, q_NRDh, k_pbDh, v_pbDh)


# --- the kernel: _g global memory, _s shared memory -------------------------------------------------------------------


def _kernel(page_g, seen_g, q_g, k_g, v_g, out_g, *logsumexp_g, q_s, k_s, v_s, out_s, logsumexp_s, asked, full, free,
            each, scale, interpret):
  """One part of one query's blocks: from n*first on, n at a time, `count` times."""
  part, query, group = (lax.axis_index(name) for name in ('part', 'query', 'group'))
  stages, s, Dh = k_s.shape
  b = k_g.shape[1]
  n = s // b
  R = q_g.shape[1]
  seen = seen_g[query]
  chosen = (seen + (b - 1)) // b
  first = part * each
  count = jnp.clip((chosen + (n - 1)) // n - first, 0, each)

  @pl.when(group == MEMORY)
  def _():
    @pl.loop(0, count)
    def _(i):
      stage = lax.rem(i, stages)
      pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))
      for j in range(n):
        page = page_g[query, jnp.minimum((first + i) * n + j, chosen - 1)]
        for source, memory in (k_g, k_s), (v_g, v_s):
          plgpu.copy_gmem_to_smem(source.at[page], memory.at[stage, pl.ds(j * b, b)], full.at[stage])

    # Every arrival is waited for: the simulator takes a barrier that is left in between for a mistake.
    pl.loop(jnp.maximum(count - stages, 0), count)(lambda i: plgpu.barrier_wait(free.at[lax.rem(i, stages)]))

  @pl.when(group == ATTENTION)
  def _():
    plgpu.copy_gmem_to_smem(q_g.at[query], q_s.at[pl.ds(0, R)], asked)
    plgpu.barrier_wait(asked)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    spread = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])
    own = seen - (chosen - 1) * b
    visible = lambda place: (place < own) | (place >= b) & (place < chosen * b)  # of keys in the order of choices

    def one_step(i, carry):
      top, total, out = carry
      stage = lax.rem(i, stages)
      plgpu.barrier_wait(full.at[stage])

      @pl.when(first + i == 0)
      def _():  # what was not written may be NaN, which a weight of zero would let through
        for start in range(0, s, ROWS):
          values = v_s.at[stage, pl.ds(start, ROWS)]
          written = visible(start + hopper.iota((ROWS, Dh), 0, plgpu.Layout.WGMMA, interpret))
          v = hopper.read(values, plgpu.Layout.WGMMA, interpret)
          values[...] = jnp.where(written, v, jnp.zeros_like(v))
        plgpu.commit_smem()

      scores = hopper.product(q_s, k_s.at[stage], interpret, transpose_b=True) * scale
      place = (first + i) * s + hopper.iota((ROWS, s), 1, plgpu.Layout.WGMMA, interpret)
      scores = jnp.where(visible(place), scores, MASKED)
      higher = jnp.maximum(top, jnp.max(scores, axis=1))
      weights, keep = jnp.exp(scores - spread(higher, scores.shape)), jnp.exp(top - higher)
      out = hopper.product(weights.astype(v_s.dtype), v_s.at[stage], interpret, start=out * spread(keep, out.shape))
      plgpu.barrier_arrive(free.at[stage])
      return higher, total * keep + jnp.sum(weights, axis=1), out

    start = (
        hopper.cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row, interpret),
        hopper.cast(jnp.zeros((ROWS,), jnp.float32), by_row, interpret),
        hopper.cast(jnp.zeros((ROWS, Dh), jnp.float32), plgpu.Layout.WGMMA, interpret),
    )
    top, total, out = lax.fori_loop(0, count, one_step, start)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out_s[...] = (out / spread(total, out.shape)).astype(out_s.dtype)
    if logsumexp_g:
      logsumexp_s[...] = jnp.where(some, top + jnp.log(total), MASKED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, R)], out_g.at[part, query])
    if logsumexp_g:
      plgpu.copy_smem_to_gmem(logsumexp_s.at[pl.ds(0, R)], logsumexp_g[0].at[part, query])
    plgpu.wait_smem_to_gmem(0)
