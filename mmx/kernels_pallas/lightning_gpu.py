"""Lightning attention on Hopper: one pass over the chunks, forwards for o and dq, backwards for dk and dv.

Formulas as in mmx/kernels_pallas/lightning.py (MiniMax-01, section 2.2.2), with n_i the real tokens of a chunk up to
and with i, and S the state before it:

  o_i = exp(-s n_i) q_i S  +  sum over j <= i of exp(-s (n_i - n_j)) <q_i, k_j> v_j
  S'  = exp(-s n_c) S      +  sum over j of exp(-s (n_c - n_j)) k_j^T v_j

The derivative is of the same form, with other names in the three places. Where (q, k, v, S) gives o,

  (do, v, k, S^T) gives dq; from the last token to the first, (k, q, do, dS) gives dv and at the row's start dS,
  (v, do, q, dS^T) gives dk

so that one kernel serves all four, nothing but q, k, v is kept for the backward pass, and no state of a chunk is
stored. States of all chunks, computed first and read by chunks in parallel, would be written and read again: in float32
64 KiB a head and chunk of 64 tokens at Dh 128, as many bytes as its q, k, v and o. In order, a state's columns are
independent of each other: a block of threads has 64 of them, which makes 128 blocks of 64 heads at Dh 128 for the 132
multiprocessors of the card, and computes the scores once for each 64 columns.

Three warpgroups share a block. One copies chunks into a ring of shared memory. One has the state in registers, float32;
it leaves it in bfloat16 before every chunk, and adds the chunk's keys and faded values to it, these as sums of two
bfloat16 numbers: the state is exact to 2^-16, whatever the length. One computes o, from weights and states rounded to
bfloat16, and may lag behind by two states.

Steps between places are counted outside (lightning_tpu.count_steps): negative where nothing passes, as in another
document or, of a difference, the future. Padding, which has no place in the count, is zero in q, k and v. Heads stay
behind tokens: a copy in bulk takes rows that lie apart.

Letters: B batch, T tokens, H heads, Dh head dim, R rows of `STEPS`, c tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmx.kernels_pallas import hopper
from mmx.kernels_pallas.chunks import kept
from mmx.kernels_pallas.lightning_tpu import STEPS, count_steps, halves

CHUNKS = 64, 128
TILE = ROWS, COLUMNS = 64, 64  # what a warpgroup multiplies at a time: tokens, by value columns or tokens
MEMORY, STATE, OUTPUT = range(3)  # the warpgroups
REGISTERS = 40, 232, 232  # of a thread of each; 512 is what 128 threads of each may have together
MARGIN_BYTES = 2048  # of shared memory, for barriers and alignment


def unsupported(q_BTHDh, chunk):
  """'' or why `lightning_hopper` does not serve this on Hopper."""
  T, _, Dh = q_BTHDh.shape[1:]
  if q_BTHDh.dtype != jnp.bfloat16:
    return f'needs bfloat16, got {q_BTHDh.dtype}'
  if Dh not in (64, 128):
    return f'needs head_dim 64 or 128, got {Dh}'
  if chunk not in CHUNKS:
    return f'needs chunk of {CHUNKS}, got {chunk}'
  return '' if T >= ROWS else f'needs a length of at least {ROWS}, got {T}'


def lightning_hopper(
    q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, state_BHDhDh=None, *, chunk, interpret=False
):
  """`reference.lightning` on Hopper: o [B, T, H, Dh] in bfloat16, and the state behind the row, float32.

  The state and its gradient are exact to 2^-16 for what comes in, o and the other gradients as bfloat16 is.
  Differentiable in q, k, v and the state. What stands in q, k, v on padding is never used, whatever it is.
  """
  B, T, H, Dh = q_BTHDh.shape
  segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, -T % chunk)))

  def real(x_BTHDh):
    padded_BTHDh = jnp.pad(x_BTHDh, ((0, 0), (0, -T % chunk), (0, 0), (0, 0)))
    return _without_padding(padded_BTHDh, segment_ids_BT)

  if state_BHDhDh is None:
    state_BHDhDh = jnp.zeros((B, H, Dh, Dh), jnp.float32)
  o_BTHDh, state_BHDhDh = _lightning(
      real(q_BTHDh), real(k_BTHDh), real(v_BTHDh), state_BHDhDh.astype(jnp.float32),
      jax.lax.stop_gradient(slopes_H.astype(jnp.float32)), count_steps(segment_ids_BT, chunk), chunk, interpret,
  )
  return o_BTHDh[:, :T], state_BHDhDh


def _without_padding(x_BTHDh, segment_ids_BT):
  return jnp.where(segment_ids_BT[:, :, None, None] > 0, x_BTHDh, 0)


# --- the function and its derivative: q, k, v, o [B, T, H, Dh], T a multiple of c; states [B, H, Dh, Dh] float32 ------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _lightning(q, k, v, state, slopes_H, steps_BRT, chunk, interpret):
  return _pass(q, k, v, state, slopes_H, steps_BRT, chunk, interpret)


def _lightning_fwd(q, k, v, state, slopes_H, steps_BRT, chunk, interpret):
  return kept(_pass(q, k, v, state, slopes_H, steps_BRT, chunk, interpret)), (q, k, v, state, slopes_H, steps_BRT)


def _lightning_bwd(chunk, interpret, residuals, cotangents):
  q, k, v, state, slopes_H, steps_BRT = residuals
  do, dlast = cotangents
  do = _without_padding(do, steps_BRT[:, STEPS.index('segment')])
  turned = lambda state: state.swapaxes(2, 3)
  run = functools.partial(_pass, slopes_H=slopes_H, steps_BRT=steps_BRT, chunk=chunk, interpret=interpret)
  dq, _ = run(do, v, k, turned(state))
  dk, _ = run(v, do, q, turned(dlast), backwards=True)
  dv, dstate = run(k, q, do, dlast, backwards=True)
  return dq, dk, dv, dstate, None, None


_lightning.defvjp(_lightning_fwd, _lightning_bwd)


def _pass(q, k, v, state, slopes_H, steps_BRT, chunk, interpret, backwards=False):
  """(o, the last state) from the first token to the last, or backwards."""
  B, T, H, Dh = q.shape
  tiles = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=hopper.tiled(q.dtype))
  fixed_bytes = 2 * (2 * Dh * COLUMNS + 3 * ROWS * COLUMNS) + MARGIN_BYTES
  stage_bytes = 2 * chunk * (2 * Dh + COLUMNS) + 4 * len(STEPS) * chunk
  stages = min(4, (hopper.SHARED_BYTES - fixed_bytes) // stage_bytes)
  kernel = functools.partial(_kernel, backwards=backwards, interpret=interpret)
  return plgpu.kernel(
      kernel, out_type=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, state)],
      grid=(B, H, Dh // COLUMNS), grid_names=('row', 'head', 'part'), num_threads=len(REGISTERS), thread_name='group',
      scratch_types=dict(
          q_s=tiles(stages, chunk, Dh), k_s=tiles(stages, chunk, Dh), v_s=tiles(stages, chunk, COLUMNS),
          steps_s=plgpu.SMEM((stages, len(STEPS), chunk), jnp.int32),
          loaded=plgpu.Barrier(num_arrivals=4, num_barriers=stages),  # by the copies of q, k, v and steps
          used=plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # by the state's warpgroup and the output's
          states_s=tiles(2, Dh, COLUMNS), left=plgpu.Barrier(num_barriers=2), taken=plgpu.Barrier(num_barriers=2),
          upper_s=tiles(ROWS, COLUMNS), lower_s=tiles(ROWS, COLUMNS), o_s=tiles(ROWS, COLUMNS),
      ),
      compiler_params=hopper.parameters(approx_math=True), kernel_name='lightning', interpret=interpret,
  )(slopes_H, steps_BRT, q, k, v, state)


# --- the kernel: _g global memory, _s shared memory -------------------------------------------------------------------


def _kernel(slopes_g, steps_g, q_g, k_g, v_g, first_g, o_g, last_g, *, q_s, k_s, v_s, steps_s, loaded, used, states_s,
            left, taken, upper_s, lower_s, o_s, backwards, interpret):
  """All chunks of a row and head, for one part of the value columns."""
  b, h, part, group = (jax.lax.axis_index(name) for name in ('row', 'head', 'part', 'group'))
  columns = pl.ds(part * COLUMNS, COLUMNS)
  stages, chunk, _ = q_s.shape
  N = q_g.shape[1] // chunk
  start_of = lambda n: (N - 1 - n if backwards else n) * chunk
  slots = lambda n: (jax.lax.rem(n, stages), jax.lax.rem(n, 2))
  count, segment, *ends, through = range(len(STEPS))
  into, out = reversed(ends) if backwards else ends  # backwards, what went out of a token comes into it
  slope = slopes_g[h]

  def fade(steps):
    return jnp.exp(jnp.where(steps >= 0, -slope * steps.astype(jnp.float32), -1e30))

  def read_steps(row, slot, rows, axis):
    """Of the tokens that lie along `axis` of a tile."""
    return hopper.read(steps_s.at[slot, row, rows], plgpu.Layout.WGMMA.reduce(1 - axis), interpret)

  def spread(x, axis):
    return jax.lax.broadcast_in_dim(x, TILE, [axis])

  @pl.when(group == MEMORY)
  def _():
    plgpu.set_max_registers(REGISTERS[MEMORY], action='decrease')

    @pl.loop(0, N)
    def _(n):
      slot, _ = slots(n)
      pl.when(n >= stages)(lambda: plgpu.barrier_wait(used.at[slot]))
      tokens, barrier = pl.ds(start_of(n), chunk), loaded.at[slot]
      plgpu.copy_gmem_to_smem(q_g.at[b, tokens, h], q_s.at[slot], barrier)
      plgpu.copy_gmem_to_smem(k_g.at[b, tokens, h], k_s.at[slot], barrier)
      plgpu.copy_gmem_to_smem(v_g.at[b, tokens, h, columns], v_s.at[slot], barrier)
      plgpu.copy_gmem_to_smem(steps_g.at[b, :, tokens], steps_s.at[slot], barrier)

    # Every arrival is waited for, here and below: the simulator takes a barrier that is left in between for a mistake.
    pl.loop(max(N - stages, 0), N)(lambda n: plgpu.barrier_wait(used.at[slots(n)[0]]))

  @pl.when(group == STATE)
  def _():
    plgpu.set_max_registers(REGISTERS[STATE], action='increase')

    def one_chunk(n, state):
      slot, place = slots(n)
      pl.when(n >= 2)(lambda: plgpu.barrier_wait(taken.at[place]))
      states_s[place] = state.astype(states_s.dtype)
      plgpu.commit_smem()
      plgpu.barrier_arrive(left.at[place])
      plgpu.barrier_wait(loaded.at[slot])
      state = state * fade(steps_s[slot, through, 0])
      for start in range(0, chunk, ROWS):
        rows = pl.ds(start, ROWS)
        v = hopper.read(v_s.at[slot, rows], plgpu.Layout.WGMMA, interpret)
        faded = v.astype(jnp.float32) * spread(fade(read_steps(out, slot, rows, 0)), 0)
        upper_s[...], lower_s[...] = halves(faded, v.dtype)
        plgpu.commit_smem()
        for half_s in (upper_s, lower_s):
          state = hopper.product(k_s.at[slot, rows], half_s, interpret, transpose_a=True, start=state)
      plgpu.barrier_arrive(used.at[slot])
      return state

    first = hopper.read(first_g.at[b, h, :, columns], plgpu.Layout.WGMMA, interpret)
    last_g[b, h, :, columns] = jax.lax.fori_loop(0, N, one_chunk, first)
    pl.loop(max(N - 2, 0), N)(lambda n: plgpu.barrier_wait(taken.at[slots(n)[1]]))

  @pl.when(group == OUTPUT)
  def _():
    plgpu.set_max_registers(REGISTERS[OUTPUT], action='increase')

    @pl.loop(0, N)
    def _(n):
      slot, place = slots(n)
      plgpu.barrier_wait(loaded.at[slot])
      plgpu.barrier_wait(left.at[place])
      for start in range(0, chunk, ROWS):
        rows = pl.ds(start, ROWS)
        o = hopper.product(q_s.at[slot, rows], states_s.at[place], interpret)
        o = o * spread(fade(read_steps(into, slot, rows, 0)), 0)
        for other in range(start, chunk, ROWS) if backwards else range(0, start + ROWS, ROWS):
          others = pl.ds(other, ROWS)

          def decay():
            count_i, segment_i = (spread(read_steps(row, slot, rows, 0), 0) for row in (count, segment))
            count_j, segment_j = (spread(read_steps(row, slot, others, 1), 1) for row in (count, segment))
            between = count_j - count_i if backwards else count_i - count_j  # negative for the future
            return fade(jnp.where(segment_i == segment_j, between, -1))

          weights = _scores_times(decay, q_s.at[slot, rows], k_s.at[slot, others], interpret)
          o = hopper.product(weights.astype(v_s.dtype), v_s.at[slot, others], interpret, start=o)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the tile before to have left o_s
        o_s[...] = o.astype(o_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o_g.at[b, pl.ds(start_of(n) + start, ROWS), h, columns])
      plgpu.barrier_arrive(used.at[slot])
      plgpu.barrier_arrive(taken.at[place])

    plgpu.wait_smem_to_gmem(0)


def _scores_times(decay, q_ref, k_ref, interpret):
  """q k^T times decay(), which is computed while the matrix unit works; float32."""
  if interpret:
    return hopper.product(q_ref, k_ref, interpret, transpose_b=True) * decay()

  def multiply(scores_ref):
    plgpu.wgmma(scores_ref, q_ref, plgpu.transpose_ref(k_ref, (1, 0)))
    factor = decay()
    return scores_ref[...] * factor

  return pl.run_scoped(multiply, plgpu.ACC((q_ref.shape[0], k_ref.shape[0]), jnp.float32))
