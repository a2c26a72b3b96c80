"""Attention of one or a few new tokens to the blocks that they chose, as a Pallas kernel for TPU.

A query and kv head is one step: its G heads are the rows of its products, and the k blocks that it chose are copied
from the cache into one stretch of VMEM while the step before computes. The block at its own slot, the only one that it
sees in part, goes behind the others, so that what is visible are the first keys of the stretch: one number masks all,
and what was not chosen or not written is neither read nor computed.

Memory. A cache of keys or values stands as pages [pages, b, Dh], each one block of one head: [B, K, S, Dh] does without
a copy, and so does a pool [pages, K, b, Dh] that rows share by a table. The kernel is told numbers of pages and knows
neither rows nor heads. Tokens of one row are queries of their own: each reads its own blocks. Where Dh is no multiple
of 128, XLA lays a program's arguments out with S in lanes and a cache is copied after all, for this as for other forms.

Letters: B rows, T new tokens, S key slots, H query heads, K kv heads, G = H/K, Dh head dim, b block size, P = S/b,
k blocks per query and kv head, N = B*T*K queries, n blocks computed at once, s = n*b keys of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas.chunks import join, kernel_product, split
from mmx.kernels_pallas.sparse import MASKED

KEYS = 1024  # most keys computed at once: 16 rows of scores are 16 vector registers
CALL_PAIRS = 2**17  # most N*k of one call, whose pages stand in 512 KiB of the 1 MiB for scalars
CORES = 2  # of the chips that share a grid's first axis among cores, v4 and v5p
BUFFER_BYTES = 2**25  # most for the chosen blocks of two queries; a v5p has 64 MiB of VMEM
LANES = 128


def unsupported(q_BTHDh, k_BKSDh, block_size, top_k) -> str:
  """'' where `attend_chosen` compiles for TPU, else one reason. Takes anything with shape and dtype."""
  H = q_BTHDh.shape[2]
  K, S, Dh = k_BKSDh.shape[1:]
  if H % K:
    return f'{H} query heads are no multiple of {K} kv heads'
  if q_BTHDh.dtype not in (jnp.bfloat16, jnp.float32) or k_BKSDh.dtype != q_BTHDh.dtype:
    return f'dtypes {q_BTHDh.dtype} and {k_BKSDh.dtype}; bfloat16 or float32, the same for both, are supported'
  if block_size % 16 or not 16 <= block_size <= 256:
    return f'block_size {block_size}; multiples of 16 from 16 to 256 are supported'
  if S % block_size:
    return f'{S} slots are no multiple of block_size {block_size}'
  if _buffer_bytes(block_size, top_k, Dh, k_BKSDh.dtype) > BUFFER_BYTES:
    return f'top_k {top_k} of blocks [{block_size}, {Dh}]; those of two queries must fit {BUFFER_BYTES >> 20} MiB'
  return ''


def _buffer_bytes(block_size, top_k, Dh, dtype):
  """Of keys and values of two queries, rows of Dh padded to whole lanes."""
  n = _at_once(block_size, top_k)
  return 4 * -(-top_k // n) * n * block_size * -(-Dh // LANES) * LANES * jnp.dtype(dtype).itemsize


def _at_once(block_size, top_k):
  """Blocks computed at once: top_k cut into equal parts of at most KEYS keys."""
  return -(-top_k // -(-top_k * block_size // KEYS))


def attend_chosen(q_BTHDh, k_BKSDh, v_BKSDh, ids_BTKk, slots_BT, block_size, pages_BP=None, interpret=False):
  """Softmax attention of each query and kv head over its blocks, up to the query's slot.

  Args:
    q_BTHDh, k_BKSDh, v_BKSDh: bfloat16 or float32; S is a multiple of block_size.
    ids_BTKk: int32 blocks of each query as `sparse.select_blocks` returns them: its own first, none twice, -1 last.
    slots_BT: int32 slot of each query; -1 for padding.
    pages_BP: int32 page of each block of each row, for keys and values [pages, K, block_size, Dh] that rows share.
    interpret: as `pl.pallas_call` takes it.

  Returns:
    [B, T, H, Dh] of q's dtype, zeros where nothing is seen. No gradient.
  """
  B, T, H, Dh = q_BTHDh.shape
  K = k_BKSDh.shape[1]
  k = ids_BTKk.shape[3]
  page_BTKk, seen_BTK = pages_of_choices(ids_BTKk, slots_BT, block_size, k_BKSDh.shape, pages_BP)
  pages = lambda x: x.reshape(-1, block_size, Dh)
  call = functools.partial(_call, pages(k_BKSDh), pages(v_BKSDh), interpret)
  N = B * T * K
  per_call = min(N, CALL_PAIRS // k)
  queries = q_BTHDh.reshape(1, N, H // K, Dh), page_BTKk.reshape(1, N, k), seen_BTK.reshape(1, N)
  out = lax.map(lambda parts: call(*(x[0] for x in parts))[None], tuple(split(x, per_call) for x in queries))
  return join(out, N).reshape(B, T, H, Dh)


def pages_of_choices(ids_BTKk, slots_BT, block_size, cache_shape, pages_BP):
  """(pages [B, T, K, k] that hold the chosen blocks, keys [B, T, K] that are seen of them, 0 for none), int32.

  cache_shape, pages_BP: of the cache that `attend_chosen` takes. A query sees its own block, the first, in part.
  """
  B, _, K, _ = ids_BTKk.shape
  head_11K1 = jnp.arange(K, dtype=jnp.int32).reshape(1, 1, K, 1)
  if pages_BP is None:
    row_B111 = jnp.arange(B, dtype=jnp.int32).reshape(B, 1, 1, 1)
    page_BTKk = (row_B111 * K + head_11K1) * (cache_shape[2] // block_size) + ids_BTKk
  else:
    page_BX = jnp.take_along_axis(pages_BP, jnp.maximum(ids_BTKk, 0).reshape(B, -1), axis=1)
    page_BTKk = page_BX.reshape(ids_BTKk.shape) * K + head_11K1
  chosen_BTK = jnp.sum(ids_BTKk >= 0, axis=-1, dtype=jnp.int32)
  seen_BTK = (chosen_BTK - 1) * block_size + slots_BT[..., None] % block_size + 1
  return page_BTKk, jnp.where((chosen_BTK > 0) & (slots_BT >= 0)[..., None], seen_BTK, 0)


def _call(k_pbDh, v_pbDh, interpret, q_NGDh, page_Nk, seen_N):
  """The queries of one call, [N, G, Dh]. `seen_N`: keys that each sees, 0 for none."""
  N, G, Dh = q_NGDh.shape
  k, b = page_Nk.shape[1], k_pbDh.shape[1]
  n = _at_once(b, k)
  parts = CORES if N % CORES == 0 else 1
  query = pl.BlockSpec((1, G, Dh), lambda part, step, *_: (part * (N // parts) + step, 0, 0))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  buffer = pltpu.VMEM((2, -(-k // n), n, b, Dh), k_pbDh.dtype)
  return pl.pallas_call(
      functools.partial(_kernel, k=k, scale=Dh**-0.5),
      out_shape=jax.ShapeDtypeStruct(q_NGDh.shape, q_NGDh.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(parts, N // parts), in_specs=[query, anywhere, anywhere], out_specs=query,
          scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,))],
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          disable_bounds_checks=True,  # of copies, whose pages all exist
          vmem_limit_bytes=_buffer_bytes(b, k, Dh, k_pbDh.dtype) + 2**23,
      ),
      cost_estimate=pl.CostEstimate(
          flops=4 * N * G * k * b * Dh, transcendentals=N * G * k * b,
          bytes_accessed=2 * N * k * b * Dh * k_pbDh.dtype.itemsize + 2 * q_NGDh.nbytes,
      ),
      interpret=interpret, name='msa_attend_chosen',
  )(page_Nk.reshape(-1), seen_N, q_NGDh, k_pbDh, v_pbDh)


def _kernel(page_ref, seen_ref, q_ref, k_ref, v_ref, out_ref, k_buffer, v_buffer, arrived, *, k, scale):
  step, steps = pl.program_id(1), pl.num_programs(1)
  query = pl.program_id(0) * steps + step
  half = lax.rem(step, 2)
  _, _, n, b, Dh = k_buffer.shape
  s = n * b
  blocks = lambda query: pl.cdiv(seen_ref[query], b)

  def copies(page, half, place):
    at = half, place // n, lax.rem(place, n)
    pairs = (k_ref, k_buffer), (v_ref, v_buffer)
    return [pltpu.make_async_copy(all_.at[page], some.at[at], arrived.at[half]) for all_, some in pairs]

  def start(query, half):
    def one(choice, _):
      place = jnp.where(choice == 0, blocks(query), choice) - 1  # the query's own block behind the others
      for copy in copies(page_ref[query * k + choice], half, place):
        copy.start()

    lax.fori_loop(0, blocks(query), one, None)

  @pl.when(step == 0)
  def _():
    start(query, half)

  @pl.when(step + 1 < steps)
  def _():
    start(query + 1, 1 - half)

  def wait(place, _):
    for copy in copies(0, half, place):
      copy.wait()

  lax.fori_loop(0, blocks(query), wait, None)

  def attend(i, carry, seen=None):
    """Adds keys i*s to i*s + s; of them the first `seen` are visible, all if None."""
    top, total, out = carry
    k_sDh, v_sDh = (buffer[half, i].reshape(s, Dh) for buffer in (k_buffer, v_buffer))
    scores = kernel_product(q_ref[0], k_sDh, 1, 1) * scale
    if seen is not None:
      scores = jnp.where(lax.broadcasted_iota(jnp.int32, (1, s), 1) < seen, scores, MASKED)
      v_sDh = jnp.where(lax.broadcasted_iota(jnp.int32, (s, 1), 0) < seen, v_sDh, jnp.zeros_like(v_sDh))  # may be NaN
    higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    weights, keep = jnp.exp(scores - higher), jnp.exp(top - higher)
    total = total * keep + jnp.sum(weights, axis=1, keepdims=True)
    return higher, total, out * keep + kernel_product(weights.astype(v_sDh.dtype), v_sDh, 1, 0)

  @pl.when(seen_ref[query] > 0)
  def _():
    G = q_ref.shape[1]
    start = jnp.full((G, 1), MASKED), jnp.zeros((G, 1)), jnp.zeros((G, Dh))
    last = (seen_ref[query] - 1) // s
    carry = lax.fori_loop(0, last, attend, start)
    _, total, out = attend(last, carry, seen_ref[query] - last * s)
    out_ref[0] = (out / total).astype(out_ref.dtype)

  @pl.when(seen_ref[query] == 0)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)
