"""Lightning attention: every form equals the recurrence, documents do not meet, the state is all there is to know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import api, lightning, reference


def slow_lightning(q, k, v, slopes, segments, state):
  """No recurrence: every pair of tokens of a document, decayed by the tokens between them; float64."""
  B, T, H, Dh = q.shape
  out, last = np.zeros(q.shape), np.array(state, np.float64)
  for b in range(B):
    document = 0
    for t in range(T):
      if not segments[b, t]:
        continue
      before = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
      document = document or segments[b, t]
      for h in range(H):
        start = state[b, h] if segments[b, t] == document else np.zeros((Dh, Dh))
        total = np.exp(-slopes[h] * len(before)) * start.astype(np.float64)
        for distance, s in enumerate(reversed(before)):
          total += np.exp(-slopes[h] * distance) * np.outer(k[b, s, h], v[b, s, h])
        out[b, t, h], last[b, h] = q[b, t, h].astype(np.float64) @ total, total
  return out, last


def inputs(B, T, H, Dh, seed=0, dtype=jnp.float32, padding=True):
  """q, k, v, slopes, packed segments (the last row ends in padding), a state."""
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
  if padding:
    segments[-1, T - T // 4 :] = 0
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, H, Dh)), dtype) for _ in range(3))
  slopes = jnp.asarray(2.0 ** (-8 * np.arange(1, H + 1) / H), jnp.float32)
  return q, k, v, slopes, jnp.asarray(segments), jnp.asarray(rng.normal(size=(B, H, Dh, Dh)), jnp.float32)


def close(found, wanted, tolerance=1e-5):
  np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize('hole', [False, True])
def test_oracle_equals_slow_loop(hole):
  q, k, v, slopes, segments, state = inputs(3, 11, 2, 4)
  segments = segments.at[0, 5].set(0) if hole else segments
  found = reference.lightning(q, k, v, slopes, segments, state)
  for one, other in zip(found, slow_lightning(*map(np.asarray, (q, k, v, slopes, segments, state)))):
    close(one, other)


@pytest.mark.parametrize('T, chunk', [(64, 16), (67, 16), (1, 16), (7, 64), (130, 64), (33, 1)])
def test_chunked_equals_recurrent_in_values_and_gradients(T, chunk):
  q, k, v, slopes, segments, state = inputs(2, T, 3, 8)
  weigh = lambda a: jnp.asarray(np.random.default_rng(1).normal(size=a.shape), jnp.float32)

  def run(function, **options):
    def scalar(q, k, v, state):
      o, last = function(q, k, v, slopes, segments, state, **options)
      return jnp.sum(o * weigh(o)) + jnp.sum(last * weigh(last)), (o, last)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, state)

  (_, outputs), gradients = run(lightning.lightning_chunked, chunk=chunk)
  (_, expected), wanted = run(reference.lightning)
  for one, other in zip((*outputs, *gradients), (*expected, *wanted)):
    close(one, other, 3e-5)


def test_chunked_works_in_bfloat16_with_a_float32_state():
  q, k, v, slopes, segments, _ = inputs(2, 150, 2, 16, dtype=jnp.bfloat16)

  def run(function, *arrays):
    scalar = lambda *arrays: (jnp.sum((o := function(*arrays, slopes, segments))[0].astype(jnp.float32) ** 2), o)
    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(*arrays)

  (_, (o, state)), gradients = run(lightning.lightning_chunked, q, k, v)
  (_, (exact, exact_state)), wanted = run(reference.lightning, *(a.astype(jnp.float32) for a in (q, k, v)))
  assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  # A state kept in bfloat16 would be off by 1e-2 here.
  assert float(jnp.abs(state - exact_state).max() / jnp.abs(exact_state).max()) < 1e-5
  for one, other in zip((o, *gradients), (exact, *wanted)):
    assert one.dtype == jnp.bfloat16
    assert float(jnp.abs(one - other).max() / jnp.abs(other).max()) < 0.02


def test_nothing_overflows_where_decay_is_fast_and_chunks_are_long():
  """exp(slope * chunk) is 1e111 for the fastest head of Text-01 and chunks of 256."""
  q, k, v, _, segments, _ = inputs(1, 700, 2, 8)
  slopes = jnp.array([0.917, 20.0])
  run = lambda function, **options: jax.jit(
      jax.value_and_grad(lambda k: jnp.sum(function(q, k, v, slopes, segments, **options)[0]))
  )(k)
  found, wanted = run(lightning.lightning_chunked, chunk=256), run(reference.lightning)
  assert bool(jnp.isfinite(found[1]).all())
  close(found[0], wanted[0], 1e-4)
  close(found[1], wanted[1], 1e-4)


@pytest.mark.parametrize('cut', [1, 37])
def test_state_chains_two_halves_to_the_whole(cut):
  q, k, v, slopes, _, state = inputs(2, 50, 2, 8)
  segments = jnp.ones((2, 50), jnp.int32).at[1, 44:].set(2)
  chunked = jax.jit(lambda q, k, v, segments, state: lightning.lightning_chunked(q, k, v, slopes, segments, state, 16))
  run = lambda where, state: chunked(q[:, where], k[:, where], v[:, where], segments[:, where], state)
  whole, last = run(slice(None), state)
  first, between = run(slice(cut), state)
  second, found = run(slice(cut, None), between)
  close(jnp.concatenate([first, second], axis=1), whole)
  close(found, last)


def test_packing_isolates_documents_whatever_stands_before():
  q, k, v, slopes, _, _ = inputs(1, 90, 2, 8)
  segments = jnp.asarray(np.repeat([1, 2, 3], [31, 40, 19])[None], jnp.int32)
  loud = jnp.where(segments == 2, 1.0, 1e8)[..., None, None]
  run = jax.jit(lambda q, k, v, segments: lightning.lightning_chunked(q, k, v, slopes, segments, chunk=16)[0])
  packed = run(q, k * loud, v * loud, segments)
  alone = run(*(a[:, 31:71] for a in (q, k, v, segments)))
  close(packed[:, 31:71], alone)


def test_padding_leaves_the_state_bit_for_bit():
  q, k, v, slopes, _, state = inputs(1, 40, 2, 8)
  segments = jnp.asarray(np.repeat([1, 0], [29, 11])[None], jnp.int32)
  run = jax.jit(lambda q, k, v, segments: lightning.lightning_chunked(q, k, v, slopes, segments, state, chunk=8))
  padded, last = run(q, k, v, segments)
  short, wanted = run(*(a[:, :29] for a in (q, k, v, segments)))
  np.testing.assert_array_equal(last, wanted)
  np.testing.assert_array_equal(padded[:, :29], short)
  np.testing.assert_array_equal(padded[:, 29:], 0)
  _, nothing = run(q, k, v, jnp.zeros((1, 40), jnp.int32))
  np.testing.assert_array_equal(nothing, state)


@pytest.mark.parametrize('name', ['chunked', 'reference'])
def test_lightning_is_causal_by_gradient(name):
  q, k, v, slopes, _, _ = inputs(1, 70, 2, 4)
  segments, at = jnp.ones((1, 70), jnp.int32).at[0, :9].set(0), 40
  choice = {'chunk': 16, 'implementation': name, 'platform': 'cpu'}
  function = lambda v: jnp.sum(api.lightning(q, k, v, slopes, segments, **choice)[0][0, at])
  seen = np.abs(np.asarray(jax.grad(function)(v))[0]).sum(axis=(1, 2)) > 0
  np.testing.assert_array_equal(seen, (np.arange(70) <= at) & (np.arange(70) >= 9))


def largest_array(function, *args):
  """Elements of the largest array that a trace mentions, at any depth."""
  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (value.aval.size for value in equation.outvars if hasattr(value.aval, 'size'))
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, 'eqns')):
        if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
          yield from sizes(getattr(inner, 'jaxpr', inner))

  return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


def test_memory_grows_with_the_length_and_never_with_its_square():
  def largest(T):
    q, k, v, slopes, segments, _ = inputs(1, T, 2, 8)
    scalar = lambda q, k, v: jnp.sum(lightning.lightning_chunked(q, k, v, slopes, segments, chunk=32)[0])
    return largest_array(jax.grad(scalar, argnums=(0, 1, 2)), q, k, v)

  assert largest(4096) == 2 * largest(2048) < 4096 * 2 * 8 * 2  # twice the size of q


def test_named_implementation_is_used_or_refused():
  q, k, v, slopes, segments, _ = inputs(1, 8, 2, 4)
  for name, told in (('triton', 'is unknown; one of'), ('pallas', 'cannot be used here: needs head_dim')):
    with pytest.raises(ValueError, match=f"'{name}' {told}"):
      api.lightning(q, k, v, slopes, segments, chunk=8, implementation=name, platform='tpu')


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_auto_choice_lowers_for_accelerators_on_a_cpu_host(platform):
  q, k, v, slopes, segments, state = inputs(1, 200, 2, 16, dtype=jnp.bfloat16)
  choice = {'chunk': 64, 'implementation': 'auto', 'platform': {'cuda': 'gpu'}.get(platform, platform)}
  function = lambda q, state: jnp.sum(api.lightning(q, k, v, slopes, segments, state, **choice)[0].astype(jnp.float32))
  assert jax.jit(jax.grad(function, (0, 1))).trace(q, state).lower(lowering_platforms=(platform,)).as_text()
