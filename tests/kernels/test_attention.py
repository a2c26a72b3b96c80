"""Every attention form equals the oracle, values and gradients, with packed segments and odd lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import api, attention, reference


def slow_attention(q, k, v, segments):
  """One query at a time, float64."""
  B, T, H, Dh = q.shape
  out = np.zeros(q.shape)
  for b in range(B):
    for h in range(H):
      kv = h // (H // k.shape[2])
      for t in range(T):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = np.array([q[b, t, h].astype(np.float64) @ k[b, s, kv] for s in seen]) / np.sqrt(Dh)
        weight = np.exp(scores - scores.max())
        out[b, t, h] = (weight / weight.sum()) @ v[b, seen, kv]
  return out


def inputs(B, T, H, K, Dh, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
  return tuple(jnp.asarray(rng.normal(size=(B, T, heads, Dh)), dtype) for heads in (H, K, K)) + (jnp.asarray(segments),)


def test_oracle_equals_slow_loop():
  args = inputs(2, 13, 4, 2, 8)
  np.testing.assert_allclose(reference.attention(*args), slow_attention(*map(np.asarray, args)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'B, T, H, K, Dh', [(2, 300, 4, 2, 16), (1, 128, 3, 3, 32), (2, 5, 8, 1, 8), (1, 1100, 2, 1, 8), (1, 2100, 1, 1, 4)]
)
def test_chunked_equals_oracle_in_values_and_gradients(B, T, H, K, Dh):
  q, k, v, segments = inputs(B, T, H, K, Dh)
  target = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

  def run(function):
    scalar = lambda q, k, v: (jnp.sum((y := function(q, k, v, segments)) * target), y)
    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)

  (_, y), gradients = run(attention.attention_chunked)
  (_, expected), wanted = run(reference.attention)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  for gradient, want in zip(gradients, wanted):
    np.testing.assert_allclose(gradient, want, rtol=1e-3, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize('name', ['chunked', 'reference'])
def test_attention_is_causal_by_gradient(name):
  q, k, v, segments = inputs(1, 140, 2, 1, 8)
  at = 70
  function = lambda v: jnp.sum(api.attend(q, k, v, segments, implementation=name, platform='cpu')[0, at])
  gradient = np.asarray(jax.jit(jax.grad(function))(v))[0]
  assert np.all(gradient[at + 1 :] == 0) and np.abs(gradient[at]).sum() > 0
  assert np.all(gradient[np.asarray(segments[0]) != int(segments[0, at])] == 0)


def test_named_implementation_never_falls_back():
  with pytest.raises(ValueError, match="'splash' cannot be used here: needs head_dim"):
    api.attend(*inputs(1, 16, 2, 1, 8), implementation='splash', platform='tpu')
  with pytest.raises(ValueError, match="'cudnn' cannot be used here: not for cpu|needs bfloat16"):
    api.attend(*inputs(1, 16, 2, 1, 8), implementation='cudnn', platform='cpu')


def test_splash_lowers_for_tpu_on_a_cpu_host():
  args = inputs(1, 256, 4, 2, 128, dtype=jnp.bfloat16)
  function = lambda *a: jnp.sum(api.attend(*a, implementation='auto', platform='tpu').astype(jnp.float32))
  text = jax.jit(jax.grad(function, argnums=(0, 1, 2))).trace(*args).lower(lowering_platforms=('tpu',)).as_text()
  assert 'tpu_custom_call' in text


@pytest.mark.parametrize('T, S, G', [(1, 700, 4), (5, 130, 1), (70, 300, 2), (130, 257, 2)])
def test_cached_equals_the_oracle_on_rows_of_unequal_length(T, S, G):
  """T last tokens of each row against a cache with garbage behind it, which no query may see."""
  rng, K, Dh = np.random.default_rng(T), 2, 8
  lengths = np.array([S, T, (S + T) // 2])
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, v = normal(3, S, K * G, Dh), normal(3, S, K, Dh), normal(3, S, K, Dh)
  wanted = np.asarray(reference.attention(*map(jnp.asarray, (q, k, v)), jnp.ones((3, S), jnp.int32)))
  positions = lengths[:, None] - T + np.arange(T)
  for row, length in enumerate(lengths):
    k[row, length:], v[row, length:] = 1e4, 1e4
  new = np.take_along_axis(q, positions[..., None, None], axis=1)
  got = jax.jit(api.attend_cached)(new, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(positions, jnp.int32))
  np.testing.assert_allclose(got, np.take_along_axis(wanted, positions[..., None, None], axis=1), rtol=0, atol=3e-6)
