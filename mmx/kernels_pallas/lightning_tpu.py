"""Lightning attention as a TPU kernel: the chunks of `lightning.py`, the state never leaving the chip's fast memory.

Formulas as in mmx/kernels_pallas/lightning.py (MiniMax-01, section 2.2.2), with n_i the real tokens of a chunk up to
and with i, and S the state before it:

  o_i = exp(-s n_i) q_i S  +  sum over j <= i of exp(-s (n_i - n_j)) <q_i, k_j> v_j
  S'  = exp(-s n_c) S      +  sum over j of exp(-s (n_c - n_j)) k_j^T v_j

The grid is (rows, tiles of heads, chunks). Chunks run in order, and S is the output block that all chunks of a head
share: it stays in VMEM from the first to the last. The backward pass goes over the chunks from the last to the first
with dS in that place; it makes the weights of a chunk again, and reads S before each chunk, which the forward pass left
if it is differentiated: as many bytes as q at chunks of 256.

How many decays lie between two places is a matter of [B, T] integers, made outside (`count_steps`); a negative number
says that nothing passes: another document, or the future. The kernel turns them into exp(-s steps), so that no exponent
is above 0. Padding is zero in q, k and v by then, and needs no mask inside.

Letters: B batch, T tokens, H heads, Dh head dim, N chunks, c tokens of a chunk. Heads come before tokens inside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas.chunks import kept

STEPS = ('count', 'segment', 'into', 'out', 'through')  # the rows of `count_steps`
HEADS = 4, 2, 1  # of a tile, the most that divides H: they share a chunk's steps
CHUNKS = {jnp.dtype('bfloat16'): (128, 256, 512), jnp.dtype('float32'): (128, 256)}  # fits 16 MiB of VMEM


def unsupported(q_BTHDh, chunk):
  """'' or why `lightning_pallas` does not serve this on a TPU (interpret mode takes any size)."""
  T, _, Dh = q_BTHDh.shape[1:]
  if q_BTHDh.dtype not in CHUNKS:
    return f'needs bfloat16 or float32, got {q_BTHDh.dtype}'
  if Dh not in (64, 128):
    return f'needs head_dim 64 or 128, got {Dh}'
  if chunk not in CHUNKS[q_BTHDh.dtype]:
    return f'needs chunk of {CHUNKS[q_BTHDh.dtype]} in {q_BTHDh.dtype}, got {chunk}'
  return '' if T >= 128 else f'needs a length of at least 128, got {T}'


def lightning_pallas(q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, state_BHDhDh=None, chunk=256,
                     interpret=False):
  """`reference.lightning` on TPU: o [B, T, H, Dh] in the dtype of q, and the state behind the row, float32.

  Products with the state are exact to 2^-16 for bfloat16 inputs, to 2^-24 for float32 ones. Differentiable in q, k,
  v and the state. What stands in q, k, v on padding is never used, whatever it is.
  """
  B, T, H, Dh = q_BTHDh.shape
  segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, -T % chunk)))

  def heads_first(x_BTHDh):
    padded_BTHDh = jnp.pad(x_BTHDh, ((0, 0), (0, -T % chunk), (0, 0), (0, 0)))
    return jnp.where(segment_ids_BT[:, :, None, None] > 0, padded_BTHDh, 0).swapaxes(1, 2)

  if state_BHDhDh is None:
    state_BHDhDh = jnp.zeros((B, H, Dh, Dh), jnp.float32)
  o_BHTDh, state_BHDhDh = _lightning(
      heads_first(q_BTHDh), heads_first(k_BTHDh), heads_first(v_BTHDh), state_BHDhDh.astype(jnp.float32),
      jax.lax.stop_gradient(slopes_H.astype(jnp.float32)), count_steps(segment_ids_BT, chunk), chunk, interpret,
  )
  # o is 0 on padding as it stands; this keeps cotangents there out of the backward pass.
  o_BTHDh = jnp.where(segment_ids_BT[:, :, None, None] > 0, o_BHTDh.swapaxes(1, 2), 0)
  return o_BTHDh[:, :T], state_BHDhDh


def count_steps(segment_ids_BT, chunk):
  """Decays between places, int32 [B, R, T], T a multiple of the chunk; negative where nothing passes. By row:

  the count n of the chunk's real tokens up to and with this one; the segment; from the state before the chunk into the
  token; from the token to the chunk's end; through the whole chunk, the same number on all its tokens.
  """
  B, T = segment_ids_BT.shape
  segments_BNc = segment_ids_BT.reshape(B, -1, chunk)
  count_BNc = jnp.cumsum(segments_BNc > 0, axis=2, dtype=jnp.int32)
  total_BN1 = count_BNc[:, :, -1:]
  # The document that the state belongs to: at the start, the row's first; ids of a row ascend.
  first_B1 = jnp.min(jnp.where(segment_ids_BT > 0, segment_ids_BT, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
  documents_BN = jax.lax.cummax(jnp.concatenate([first_B1, segments_BNc.max(axis=2)], axis=1), axis=1)
  before_BN1, behind_BN1 = documents_BN[:, :-1, None], documents_BN[:, 1:, None]
  into_BNc = jnp.where(segments_BNc == before_BN1, count_BNc, -1)
  out_BNc = jnp.where(segments_BNc == behind_BN1, total_BN1 - count_BNc, -1)
  through_BNc = jnp.broadcast_to(jnp.where(before_BN1 == behind_BN1, total_BN1, -1), segments_BNc.shape)
  rows = count_BNc, segments_BNc, into_BNc, out_BNc, through_BNc
  return jnp.stack([row_BNc.reshape(B, T) for row_BNc in rows], axis=1)


# --- the function and its derivative: q, k, v, o [B, H, T, Dh]; states [B, H, Dh, Dh] float32 -------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _lightning(q, k, v, state, slopes_H, steps_BRT, chunk, interpret):
  inputs = {'slopes': [slopes_H], 'steps': [steps_BRT], 'tokens': [q, k, v], 'state': [state]}
  outputs = {'tokens': [q], 'state': [state]}
  return _call(_forward_kernel, inputs, outputs, chunk, interpret)


def _lightning_fwd(q, k, v, state, slopes_H, steps_BRT, chunk, interpret):
  B, H, T, Dh = q.shape
  starts_BHNDhDh = jax.ShapeDtypeStruct((B, H, T // chunk, Dh, Dh), jnp.float32)
  inputs = {'slopes': [slopes_H], 'steps': [steps_BRT], 'tokens': [q, k, v], 'state': [state]}
  outputs = {'tokens': [q], 'state': [state], 'starts': [starts_BHNDhDh]}
  o, last, starts_BHNDhDh = kept(_call(_forward_kernel, inputs, outputs, chunk, interpret))
  return (o, last), (q, k, v, starts_BHNDhDh, slopes_H, steps_BRT)


def _lightning_bwd(chunk, interpret, residuals, cotangents):
  q, k, v, starts_BHNDhDh, slopes_H, steps_BRT = residuals
  do, dlast = cotangents
  inputs = {
      'slopes': [slopes_H], 'steps': [steps_BRT], 'tokens': [q, k, v, do], 'starts': [starts_BHNDhDh], 'state': [dlast]
  }
  outputs = {'tokens': [q, k, v], 'state': [dlast]}
  return *_call(_backward_kernel, inputs, outputs, chunk, interpret, backwards=True), None, None


_lightning.defvjp(_lightning_fwd, _lightning_bwd)


def _call(kernel, inputs, outputs, chunk, interpret, backwards=False):
  """The kernel over (rows, tiles of heads, chunks); `inputs` and `outputs` are arrays, or their likes, by kind."""
  B, H, T, Dh = inputs['tokens'][0].shape
  N = T // chunk
  heads = next(n for n in HEADS if H % n == 0)
  at = (lambda n: N - 1 - n) if backwards else (lambda n: n)
  specs = {
      'slopes': pl.BlockSpec(memory_space=pltpu.SMEM),
      'steps': pl.BlockSpec((None, len(STEPS), chunk), lambda b, h, n: (b, 0, at(n))),
      'tokens': pl.BlockSpec((None, heads, chunk, Dh), lambda b, h, n: (b, h, at(n), 0)),
      'state': pl.BlockSpec((None, heads, Dh, Dh), lambda b, h, n: (b, h, 0, 0)),
      'starts': pl.BlockSpec((None, heads, None, Dh, Dh), lambda b, h, n: (b, h, at(n), 0, 0)),
  }
  flat = lambda trees: [(specs[kind], array) for kind, arrays in trees.items() for array in arrays]
  in_specs, arrays = zip(*flat(inputs))
  out_specs, likes = zip(*flat(outputs))
  products = 5 if backwards else 2  # of [c, c] with [c, Dh]; with the state, one less or as many
  return pl.pallas_call(
      kernel, grid=(B, H // heads, N), in_specs=in_specs, out_specs=out_specs,
      out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like in likes],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
      cost_estimate=pl.CostEstimate(
          flops=2 * products * B * H * T * Dh * (chunk + Dh), transcendentals=B * H * T * chunk,
          bytes_accessed=sum(array.size * array.dtype.itemsize for array in (*arrays, *likes)),
      ),
      interpret=interpret,
  )(*arrays)


# --- the kernels: one chunk of a tile of heads; refs without the row's axis -------------------------------------------


def _forward_kernel(slopes_ref, steps_ref, q_ref, k_ref, v_ref, start_ref, o_ref, state_ref, *starts_ref):
  def one_head(h, fade, within_cc, into_c1, out_c1, through_11):
    q_cDh, k_cDh, v_cDh, state_DhDh = q_ref[h], k_ref[h], v_ref[h], state_ref[h]
    weights_cc = _product(q_cDh, k_cDh, 1, 1) * fade(within_cc)
    o_cDh = _product(weights_cc.astype(v_cDh.dtype), v_cDh, 1, 0) + _product(q_cDh, state_DhDh, 1, 0) * fade(into_c1)
    o_ref[h] = o_cDh.astype(o_ref.dtype)
    for ref in starts_ref:  # of the pass that will be differentiated
      ref[h] = state_DhDh
    state_ref[h] = state_DhDh * fade(through_11) + _product(k_cDh * fade(out_c1), v_cDh, 0, 0)

  _each_head(one_head, slopes_ref, steps_ref, start_ref, state_ref)


def _backward_kernel(
    slopes_ref, steps_ref, q_ref, k_ref, v_ref, do_ref, starts_ref, dlast_ref, dq_ref, dk_ref, dv_ref, dstate_ref
):
  """dstate is of the state behind the chunk when the chunk begins, of the state before it when it ends."""

  def one_head(h, fade, within_cc, into_c1, out_c1, through_11):
    q_cDh, k_cDh, v_cDh, do_cDh = q_ref[h], k_ref[h], v_ref[h], do_ref[h]
    state_DhDh, dstate_DhDh = starts_ref[h], dstate_ref[h]
    into, out, decay_cc = fade(into_c1), fade(out_c1), fade(within_cc)
    weights_cc = (_product(q_cDh, k_cDh, 1, 1) * decay_cc).astype(q_cDh.dtype)
    dscores_cc = (_product(do_cDh, v_cDh, 1, 1) * decay_cc).astype(q_cDh.dtype)
    dq_cDh = _product(dscores_cc, k_cDh, 1, 0) + _product(do_cDh, state_DhDh, 1, 1) * into
    dk_cDh = _product(dscores_cc, q_cDh, 0, 0) + _product(v_cDh, dstate_DhDh, 1, 1) * out
    dv_cDh = _product(weights_cc, do_cDh, 0, 0) + _product(k_cDh, dstate_DhDh, 1, 0) * out
    dq_ref[h], dk_ref[h], dv_ref[h] = (d.astype(dq_ref.dtype) for d in (dq_cDh, dk_cDh, dv_cDh))
    dstate_ref[h] = dstate_DhDh * fade(through_11) + _product(q_cDh, do_cDh * into, 0, 0)

  _each_head(one_head, slopes_ref, steps_ref, dlast_ref, dstate_ref)


def _each_head(one_head, slopes_ref, steps_ref, start_ref, state_ref):
  """one_head(h, fade, *steps of the chunk) for each head of the tile; a row's first chunk begins with `start`."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    state_ref[...] = start_ref[...]

  heads = state_ref.shape[0]
  first = pl.program_id(1) * heads
  steps = _read_steps(steps_ref)

  @pl.loop(0, heads, unroll=min(heads, 2))
  def _(h):
    one_head(h, functools.partial(_fade, slopes_ref[first + h]), *steps)


def _read_steps(steps_ref):
  """Steps within the chunk [c, c], into and out of tokens [c, 1], through it [1, 1]; see `count_steps`."""
  steps_Rc = steps_ref[...]
  count_c1, segment_c1, into_c1, out_c1, _ = (column for column in jnp.split(steps_Rc.T, len(STEPS), axis=1))
  count_1c, segment_1c, _, _, through_1c = jnp.split(steps_Rc, len(STEPS), axis=0)
  c = count_c1.shape[0]
  ahead_cc = jax.lax.broadcasted_iota(jnp.int32, (c, c), 0) >= jax.lax.broadcasted_iota(jnp.int32, (c, c), 1)
  within_cc = jnp.where(ahead_cc & (segment_c1 == segment_1c), count_c1 - count_1c, -1)
  return within_cc, into_c1, out_c1, through_1c[:, :1]


def _fade(slope, steps):
  """exp(-slope * steps), 0 where steps is negative."""
  return jnp.exp(jnp.where(steps >= 0, -slope * steps.astype(jnp.float32), -1e30))


def _product(a, b, axis_a, axis_b):
  """Matrix product over axis_a and axis_b, float32.

  A float32 factor beside a bfloat16 one goes in as the sum of two bfloat16 numbers: two passes through the matrix unit,
  exact to 2^-16, where precision='highest' takes six. The upper half is cut off by its bits, as XLA, which runs
  interpret mode, may drop a cast to bfloat16 and back.
  """
  dot = lambda a, b, precision=None: jax.lax.dot_general(
      a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )
  if a.dtype == b.dtype:
    return dot(a, b, 'highest' if a.dtype == jnp.float32 else None)
  if a.dtype == jnp.float32:
    return sum(dot(half, b) for half in halves(a, b.dtype))
  return sum(dot(a, half) for half in halves(b, a.dtype))


def halves(x, dtype):
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
  upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return upper.astype(dtype), (x - upper).astype(dtype)
