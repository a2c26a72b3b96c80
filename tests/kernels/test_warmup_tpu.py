"""The divergence of MSA's warm-up by its TPU kernel, in interpret mode, against the oracle in value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import api, attention_tpu, reference, warmup_tpu
from mmx.kernels_pallas.chunks import Part
from mmx.kernels_pallas.warmup_tpu import msa_prefix_kl_pallas


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """small(span): steps, tiles and spans of at most so many, as in longer rows."""
  monkeypatch.setattr(attention_tpu, 'ROWS', 64)
  for module in (attention_tpu, warmup_tpu):
    monkeypatch.setattr(module, 'KEYS', 128)
  return lambda span: monkeypatch.setattr(warmup_tpu, 'cut', lambda S, *_: (-(-S // span), span))


def make(B, S, H, K, dtype=jnp.float32, Di=128):
  """q, k, index q and k, segments: documents packed, the first row's last 9 tokens padding."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=(B, S, *shape)), dtype)
  segments = np.sort(rng.integers(1, 4, (B, S)), axis=1)
  segments[0, S - 9 :] = 0
  return normal(H, 128), normal(K, 128), normal(K, Di), normal(Di), jnp.asarray(segments, jnp.int32)


def with_gradients(diverge, q, k, *index):
  """kl [B] and the index branch's gradients, rows weighed differently; none to attention's own."""
  weighed = lambda *a: (lambda kl: (jnp.sum(kl * jnp.arange(1.0, len(kl) + 1)), kl))(diverge(*a))
  (_, kl), (dq, dk, *gradients) = jax.jit(jax.value_and_grad(weighed, range(4), has_aux=True))(q, k, *index)
  assert not np.any(dq) and not np.any(dk)
  return kl, *gradients


def assert_same(diverge, arrays, segments):
  tolerance = 1e-5 if arrays[0].dtype == jnp.float32 else 1e-2
  fixed = lambda *a: reference.msa_prefix_kl(*map(jax.lax.stop_gradient, a[:2]), *a[2:], segments)
  wanted = with_gradients(fixed, *(x.astype(jnp.float32) for x in arrays))
  found = with_gradients(diverge, *arrays)
  for got, want, like in zip(found, wanted, (wanted[0], *arrays[2:]), strict=True):
    assert got.dtype == like.dtype and got.shape == want.shape
    got, want = np.asarray(got, np.float32), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize('shape, span', [
    ((2, 200, 4, 2), None), ((1, 384, 3, 1, jnp.float32, 256), 256),  # the last span begins within the one before
    ((1, 130, 2, 2, jnp.bfloat16), None),
], ids=str)
def test_value_and_gradients_are_those_of_the_oracle(shape, span, small):
  if span:
    small(span)
  *arrays, segments = make(*shape)
  assert_same(lambda *a: msa_prefix_kl_pallas(*a, segments, None, True), arrays, segments)


def test_parts_of_a_row_add_up_to_it():
  *arrays, segments = make(1, 256, 2, 1)
  slots = np.arange(256, dtype=np.int32).reshape(2, 128)

  def in_parts(q, k, index_q, index_k):
    at = lambda x, i: x[:, slots[i]]
    one = lambda i: msa_prefix_kl_pallas(
        at(q, i), k, at(index_q, i), index_k, at(segments, i), Part(slots, jnp.int32(i), segments), True
    )
    return one(0) + one(1)

  assert_same(in_parts, arrays, segments)


def test_nan_of_another_document_reaches_nothing_and_padding_counts_for_nothing():
  *arrays, _ = make(1, 256, 2, 1)
  first = lambda x: x[:, :128]
  diverge = lambda segments: lambda *a: msa_prefix_kl_pallas(*a, segments, None, True)
  alone = with_gradients(diverge(jnp.ones((1, 128), jnp.int32)), *map(first, arrays))
  behind = [jnp.concatenate([first(x), jnp.full_like(first(x), np.nan)], axis=1) for x in arrays[:2]] + arrays[2:]
  padded = with_gradients(diverge(jnp.repeat(jnp.array([[1, 0]], jnp.int32), 128, axis=1)), *arrays)
  for got, want in zip(padded, alone):
    np.testing.assert_allclose(got[:, :128] if got.ndim > 1 else got, want, rtol=1e-5, atol=1e-6)
    assert got.ndim == 1 or not np.any(got[:, 128:])
  segments = jnp.repeat(jnp.array([[1, 2]], jnp.int32), 128, axis=1)
  _, *poisoned = with_gradients(diverge(segments), *behind)
  for got, want in zip(poisoned, alone[1:]):
    np.testing.assert_allclose(got[:, :128], want, rtol=1e-5, atol=1e-6)


def test_copies_have_arrived_before_they_are_read_and_none_is_left(small, capfd):
  """In a simulator of memory and semaphores; what nothing wrote is NaN there, so a missed copy shows in the values."""
  small(128)
  pltpu.reset_tpu_interpret_mode_state()
  simulator = pltpu.InterpretParams(dma_execution_mode='on_wait', detect_races=True, uninitialized_memory='nan')
  *arrays, segments = make(1, 256, 2, 1)
  assert_same(lambda *a: msa_prefix_kl_pallas(*a, segments, None, simulator), arrays, segments)
  told = capfd.readouterr()
  assert 'RACE' not in told.out + told.err and 'non-zero count' not in told.out + told.err


@pytest.mark.parametrize('implementation, platform, heads, taken', [
    ('auto', 'tpu', 4, True), ('pallas', 'tpu', 4, True), ('gather', 'tpu', 4, False), ('auto', 'gpu', 4, False),
    ('hopper', 'gpu', 4, False), ('pallas', 'tpu', 17, False), ('auto', 'cpu', 4, False),
])
def test_it_serves_on_tpu_what_it_supports(implementation, platform, heads, taken):
  array = lambda *shape: jax.ShapeDtypeStruct((1, 64, *shape), jnp.bfloat16)
  diverge = functools.partial(api.msa_prefix_kl, implementation=implementation, platform=platform)
  inputs = array(heads, 128), array(1, 128), array(1, 128), array(128), jax.ShapeDtypeStruct((1, 64), jnp.int32)
  assert ('msa_warmup_divergence' in str(jax.make_jaxpr(diverge)(*inputs))) == taken
  reason = warmup_tpu.unsupported(*inputs[:3])
  assert bool(reason) == (heads == 17)
  assert heads == 17 or '96' in warmup_tpu.unsupported(*inputs[:2], array(1, 96))
