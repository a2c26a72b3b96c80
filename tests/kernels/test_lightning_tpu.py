"""The TPU kernel of Lightning attention, in interpret mode: it is the recurrence, in values and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import lightning_tpu, reference

pallas = jax.jit(functools.partial(lightning_tpu.lightning_pallas, interpret=True), static_argnames='chunk')


def inputs(B, T, H, Dh, dtype=jnp.float32, seed=0):
  """q, k, v, slopes, packed segments with padding before, within and behind documents, a state."""
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
  segments[0, : T // 10] = 0
  segments[0, T // 2 : T // 2 + 3] = 0
  segments[-1, T - T // 4 :] = 0
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, H, Dh)), dtype) for _ in range(3))
  slopes = jnp.asarray(2.0 ** (-8 * np.arange(1, H + 1) / H), jnp.float32)
  return q, k, v, slopes, jnp.asarray(segments), jnp.asarray(rng.normal(size=(B, H, Dh, Dh)), jnp.float32)


def values_and_gradients(function, q, k, v, slopes, segments, state, **options):
  """o, the last state, and the gradients of a weighted sum of both to q, k, v, state; padding weighs nothing."""
  weigh = lambda a: jnp.asarray(np.random.default_rng(1).normal(size=a.shape), jnp.float32)

  def scalar(q, k, v, state):
    o, last = function(q, k, v, slopes, segments, state, **options)
    return jnp.sum(o * weigh(o)) + jnp.sum(last * weigh(last)), (o, last)

  (_, outputs), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1, 2, 3), has_aux=True))(q, k, v, state)
  return *outputs, *gradients


def distance(found, wanted):
  """The largest difference, as a share of the largest number."""
  return float(jnp.abs(found.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max())


@pytest.mark.parametrize('T, chunk, H, Dh', [(131, 32, 3, 32), (7, 16, 1, 32), (128, 64, 8, 64)])
def test_kernel_equals_recurrent_in_values_and_gradients(T, chunk, H, Dh):
  arguments = inputs(2, T, H, Dh)
  found = values_and_gradients(pallas, *arguments, chunk=chunk)
  wanted = values_and_gradients(reference.lightning, *arguments)
  for one, other in zip(found, wanted):
    assert one.shape == other.shape and distance(one, other) < 3e-6


def test_kernel_works_in_bfloat16_with_a_float32_state():
  q, k, v, slopes, segments, state = inputs(2, 150, 4, 32, jnp.bfloat16)
  found = values_and_gradients(pallas, q, k, v, slopes, segments, state, chunk=32)
  exact = values_and_gradients(
      reference.lightning, *(a.astype(jnp.float32) for a in (q, k, v)), slopes, segments, state
  )
  o, last, *gradients, dstate = found
  assert [a.dtype for a in (o, *gradients)] == [jnp.bfloat16] * 4 and last.dtype == dstate.dtype == jnp.float32
  # Factors cut to bfloat16 in the products with the state would be off by 2e-3 here, a state in bfloat16 by 1e-2.
  assert distance(last, exact[1]) < 2e-5
  for one, other in zip(found, exact):
    assert distance(one, other) < 0.01


def test_no_state_is_a_state_of_zeros():
  *arguments, state = inputs(1, 40, 2, 32)
  for one, other in zip(pallas(*arguments, chunk=16), pallas(*arguments, jnp.zeros_like(state), chunk=16)):
    np.testing.assert_array_equal(one, other)


def test_what_stands_on_padding_is_never_used():
  """NaN there, and in the cotangents of o there, changes nothing, bit for bit; o and the gradients there are 0."""
  q, k, v, slopes, segments, state = inputs(2, 75, 2, 32)
  padding = (segments == 0)[..., None, None]

  @jax.jit
  def run(fill):
    filled = [jnp.where(padding, fill, a) for a in (q, k, v)]
    outputs, transpose = jax.vjp(lambda q, k, v, s: pallas(q, k, v, slopes, segments, s, chunk=16), *filled, state)
    return *outputs, *transpose((jnp.where(padding, fill, q), state))

  clean, poisoned = run(1.0), run(jnp.nan)
  for one, other in zip(poisoned, clean):
    np.testing.assert_array_equal(one, other)
  o, _, *gradients, _ = clean
  for a in (o, *gradients):
    assert not np.any(np.where(padding, a, 0)) and np.any(a)


def test_padding_leaves_the_state_bit_for_bit():
  q, k, v, slopes, segments, state = inputs(1, 40, 2, 32)
  _, last = pallas(q, k, v, slopes, jnp.zeros_like(segments), state, chunk=16)
  np.testing.assert_array_equal(last, state)


def test_packing_isolates_documents_whatever_stands_around():
  q, k, v, slopes, _, state = inputs(1, 90, 2, 32)
  segments = jnp.asarray(np.repeat([1, 2, 3], [31, 40, 19])[None], jnp.int32)
  inside = (segments == 2)[..., None, None]

  def between(loudness):
    around = [jnp.where(inside, a, loudness * a) for a in (q, k, v)]
    return pallas(*around, slopes, segments, loudness * state, chunk=16)[0][:, 31:71]

  np.testing.assert_array_equal(between(1e8), between(0.0))


def test_state_chains_two_halves_to_the_whole():
  q, k, v, slopes, _, state = inputs(2, 50, 2, 32)
  segments = jnp.ones((2, 50), jnp.int32).at[1, 44:].set(2)
  run = lambda where, state: pallas(*(a[:, where] for a in (q, k, v)), slopes, segments[:, where], state, chunk=16)
  whole, last = run(slice(None), state)
  first, between = run(slice(25), state)
  second, found = run(slice(25, None), between)
  assert distance(jnp.concatenate([first, second], axis=1), whole) < 1e-5
  assert distance(found, last) < 1e-5


def test_nothing_overflows_where_decay_is_fast_and_chunks_are_long():
  """exp(slope * chunk) is 1e111 for the fastest head of Text-01 and chunks of 256; a slope of 0 decays nothing."""
  q, k, v, _, segments, state = inputs(1, 300, 3, 32)
  arguments = q, k, v, jnp.array([0.917, 20.0, 0.0]), segments, state
  found = values_and_gradients(pallas, *arguments, chunk=256)
  wanted = values_and_gradients(reference.lightning, *arguments)
  for one, other in zip(found, wanted):
    assert distance(one, other) < 1e-5


def test_slopes_get_no_gradient():
  q, k, v, slopes, segments, _ = inputs(1, 40, 2, 32)
  gradient = jax.grad(lambda slopes: jnp.sum(pallas(q, k, v, slopes, segments, chunk=16)[0]))(slopes)
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('dtype, chunk, Dh', [('bfloat16', 512, 64), ('bfloat16', 256, 128), ('float32', 128, 64)])
def test_what_is_supported_lowers_for_tpu_on_a_cpu_host(dtype, chunk, Dh):
  q, k, v, slopes, segments, state = inputs(1, 700, 2, Dh, dtype)
  assert lightning_tpu.unsupported(q, chunk) == ''

  def scalar(q, state):
    return jnp.sum(lightning_tpu.lightning_pallas(q, k, v, slopes, segments, state, chunk)[0].astype(jnp.float32))

  text = jax.jit(jax.grad(scalar, (0, 1))).trace(q, state).lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('@tpu_custom_call') == 2


@pytest.mark.parametrize('shape, dtype, chunk, reason', [
    ((1, 256, 2, 96), jnp.bfloat16, 256, 'needs head_dim 64 or 128, got 96'),
    ((1, 256, 2, 64), jnp.float16, 256, 'needs bfloat16 or float32, got float16'),
    ((1, 256, 2, 64), jnp.bfloat16, 64, 'needs chunk of (128, 256, 512) in bfloat16, got 64'),
    ((1, 256, 2, 64), jnp.float32, 512, 'needs chunk of (128, 256) in float32, got 512'),
    ((1, 1, 2, 64), jnp.bfloat16, 256, 'needs a length of at least 128, got 1'),
])
def test_what_is_not_supported_says_why(shape, dtype, chunk, reason):
  assert lightning_tpu.unsupported(jax.ShapeDtypeStruct(shape, dtype), chunk) == reason
