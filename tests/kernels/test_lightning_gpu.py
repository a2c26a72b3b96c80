"""The Hopper kernel of Lightning attention, in the simulator: it is the recurrence, in values and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lightning_tpu import distance, inputs as inputs_in_float32

from mmx.kernels_pallas import hopper, lightning_gpu, reference

pytestmark = pytest.mark.usefixtures('compiled_once')

EXACT, ROUNDED = 2e-5, 0.01  # a state in bfloat16 is off by 1e-2, values in bfloat16 where they join it by 2e-3


def inputs(*shape):
  return inputs_in_float32(*shape, jnp.bfloat16)


@functools.partial(jax.jit, static_argnames='chunk')
def run(q, k, v, slopes, segments, state=None, chunk=64):
  return lightning_gpu.lightning_hopper(q, k, v, slopes, segments, state, chunk=chunk, interpret=hopper.simulator())


def values_and_gradients(function, q, k, v, slopes, segments, state):
  """o, the last state, and the gradients to q, k, v, state for cotangents that bfloat16 holds; slopes' are checked."""
  outputs, transpose = jax.vjp(lambda *a: function(*a[:4], segments, a[4]), q, k, v, slopes, state)
  normal = lambda a: jnp.asarray(np.random.default_rng(1).normal(size=a.shape), jnp.bfloat16).astype(a.dtype)
  *gradients, dslopes, dstate = jax.jit(transpose)(jax.tree.map(normal, outputs))
  np.testing.assert_array_equal(dslopes, 0)
  return *outputs, *gradients, dstate


@pytest.mark.parametrize('T, chunk, H, Dh', [
    (150, 64, 1, 128), pytest.param(200, 128, 2, 64, marks=pytest.mark.slow),  # 10 s each
])
def test_kernel_equals_recurrent_in_values_and_gradients(T, chunk, H, Dh):
  q, k, v, slopes, segments, state = inputs(2, T, H, Dh)
  found = values_and_gradients(functools.partial(run, chunk=chunk), q, k, v, slopes, segments, state)
  as_float32 = (a.astype(jnp.float32) for a in (q, k, v))
  wanted = values_and_gradients(jax.jit(reference.lightning), *as_float32, slopes, segments, state)
  names = 'o', 'last', 'dq', 'dk', 'dv', 'dstate'
  for name, one, other in zip(names, found, wanted):
    of_state = name in ('last', 'dstate')
    assert one.shape == other.shape and one.dtype == (jnp.float32 if of_state else jnp.bfloat16), name
    assert distance(one, other) < (EXACT if of_state else ROUNDED), name


def test_what_stands_on_padding_is_never_used():
  """NaN there, and in the cotangents of o there, changes nothing, bit for bit; o and the gradients there are 0."""
  q, k, v, slopes, segments, state = inputs(1, 150, 1, 64)
  padding = (segments == 0)[..., None, None]

  @jax.jit
  def with_padding(fill):
    filled = [jnp.where(padding, fill, a) for a in (q, k, v)]
    outputs, transpose = jax.vjp(lambda q, k, v, state: run(q, k, v, slopes, segments, state), *filled, state)
    return *outputs, *transpose((jnp.where(padding, fill, q), state))

  clean, poisoned = with_padding(jnp.bfloat16(1)), with_padding(jnp.bfloat16(jnp.nan))
  for one, other in zip(poisoned, clean):
    np.testing.assert_array_equal(one, other)
  o, _, *gradients, _ = clean
  for a in (o, *gradients):
    assert not np.any(np.where(padding, a, 0)) and np.any(a)


def test_padding_leaves_the_state_bit_for_bit_and_no_state_is_zeros():
  q, k, v, slopes, segments, state = inputs(1, 70, 1, 64)
  for given, wanted in ((state, state), (None, jnp.zeros_like(state))):
    _, last = run(q, k, v, slopes, jnp.zeros_like(segments), given)
    np.testing.assert_array_equal(last, wanted)


def test_packing_isolates_documents_whatever_stands_around():
  q, k, v, slopes, _, state = inputs(1, 190, 1, 64)
  segments = jnp.asarray(np.repeat([1, 2, 3], [31, 140, 19])[None], jnp.int32)
  inside = (segments == 2)[..., None, None]

  def between(loudness):
    around = [jnp.where(inside, a, a * jnp.bfloat16(loudness)) for a in (q, k, v)]
    return run(*around, slopes, segments, loudness * state)[0][:, 31:171]

  np.testing.assert_array_equal(between(1e8), between(0.0))


def test_state_chains_two_halves_to_the_whole():
  q, k, v, slopes, _, state = inputs(1, 200, 1, 64)
  segments = jnp.ones((1, 200), jnp.int32).at[0, 190:].set(2)
  part = lambda where, state: run(*(a[:, where] for a in (q, k, v)), slopes, segments[:, where], state)
  whole, last = part(slice(None), state)
  first, between = part(slice(100), state)
  second, found = part(slice(100, None), between)
  assert distance(jnp.concatenate([first, second], axis=1), whole.astype(jnp.float32)) < ROUNDED
  assert distance(found, last) < EXACT


def test_nothing_overflows_where_decay_is_fast_and_chunks_are_long():
  """exp(slope * chunk) is 1e50 for the fastest head of Text-01 and chunks of 128; a slope of 0 decays nothing."""
  q, k, v, _, segments, state = inputs(1, 300, 3, 64)
  slopes = jnp.array([0.917, 20.0, 0.0])
  o, last = run(q, k, v, slopes, segments, state, chunk=128)
  wanted, wanted_last = reference.lightning(*(a.astype(jnp.float32) for a in (q, k, v)), slopes, segments, state)
  assert distance(o, wanted) < ROUNDED and distance(last, wanted_last) < EXACT


@pytest.mark.parametrize('backwards', [False, True])
def test_copies_and_barriers_have_no_races(backwards, races):
  """Six chunks go through four stages of shared memory, and six states through two."""
  q, k, v, slopes, segments, state = inputs(1, 384, 1, 64)
  steps = lightning_gpu.count_steps(segments, 64)
  found = jax.jit(lambda *a: lightning_gpu._pass(*a, 64, hopper.simulator(detect_races=True), backwards))(
      q, k, v, state, slopes, steps
  )
  assert all(bool(jnp.isfinite(a).all()) for a in found)
  assert not races()


@pytest.mark.parametrize('chunk, Dh', [(64, 64), (128, 128)])
def test_what_is_supported_lowers_for_hopper_on_a_cpu_host(chunk, Dh):
  q, k, v, slopes, segments, state = inputs(1, 300, 2, Dh)
  assert lightning_gpu.unsupported(q, chunk) == ''

  def scalar(q, state):
    return jnp.sum(lightning_gpu.lightning_hopper(q, k, v, slopes, segments, state, chunk=chunk)[0].astype(jnp.float32))

  text = jax.jit(jax.grad(scalar, (0, 1))).trace(q, state).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('@mosaic_gpu_v2') == 2  # forwards, of o and dq, and backwards, of dk and dv


@pytest.mark.parametrize('shape, dtype, chunk, reason', [
    ((1, 256, 2, 96), jnp.bfloat16, 64, 'needs head_dim 64 or 128, got 96'),
    ((1, 256, 2, 64), jnp.float32, 64, 'needs bfloat16, got float32'),
    ((1, 256, 2, 64), jnp.bfloat16, 256, 'needs chunk of (64, 128), got 256'),
    ((1, 1, 2, 64), jnp.bfloat16, 64, 'needs a length of at least 64, got 1'),
])
def test_what_is_not_supported_says_why(shape, dtype, chunk, reason):
  assert lightning_gpu.unsupported(jax.ShapeDtypeStruct(shape, dtype), chunk) == reason
