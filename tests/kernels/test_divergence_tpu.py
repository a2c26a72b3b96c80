"""The index branch's divergence on TPU, in interpret mode: the oracle's value, and its gradients by differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import divergence_tpu, reference, resident_tpu
from mmx.layers.block import REMAT_POLICIES

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}
kernel = functools.partial(divergence_tpu.selected_divergence_pallas, interpret=True)


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
  """Chunks of few queries and tiles of few, so that every loop turns more than once."""
  monkeypatch.setattr(resident_tpu, 'vmem_bytes', lambda: 2**20)
  monkeypatch.setattr(resident_tpu, 'TILE_ROWS', 64)


def make(B=2, T=101, H=8, K=2, Dh=32, Di=32, b=16, k=3, dtype=jnp.float32, padded=7):
  """(q, k, index_q, index_k, segments), b, top_k: documents packed, the last row's last `padded` tokens padding."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
  segments[-1, T - padded :] = 0
  arrays = normal(B, T, H, Dh), normal(B, T, K, Dh), normal(B, T, K, Di), normal(B, T, Di)
  return (*arrays, jnp.asarray(segments, jnp.int32)), b, k


@functools.partial(jax.jit, static_argnums=(1, 2))
def by_oracle(inputs, b, top_k):
  """kl and its gradients of index_q and index_k under row weights that differ; ids and logsumexps for the kernel."""
  *arrays, segments = inputs
  q, k, index_q, index_k = (a.astype(jnp.float32) for a in arrays)

  def total(index_q, index_k):
    kl = reference.msa(q, k, k, index_q, index_k, segments, b, top_k)[1]
    return jnp.sum(kl * jnp.arange(1.0, 1 + kl.size)), kl

  (_, kl), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(index_q, index_k)
  (B, T, H, Dh), K = q.shape, k.shape[2]
  ids = reference.msa_select(index_q, index_k, segments, b, top_k)
  chosen = jnp.repeat(jax.nn.one_hot(ids, -(-T // b), dtype=bool).any(axis=3), b, axis=3)[..., :T]
  visible = chosen & reference.msa_visible(segments)[:, :, None]
  scores = jnp.einsum('btkgd,bskd->btkgs', q.reshape(B, T, K, H // K, Dh), k, precision='highest') * Dh**-0.5
  index_scores = jnp.einsum('btkd,bsd->btks', index_q, index_k, precision='highest') * index_q.shape[-1] ** -0.5
  logsumexp = lambda scores, seen: jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)
  return (kl, *gradients), ids, (logsumexp(scores, visible[:, :, :, None]), logsumexp(index_scores, visible))


def total_of(function, ids, segments, b):
  """The oracle's scalar through `function`, and its kl, from floats alone."""
  def total(q, k, index_q, index_k, logsumexps):
    kl = function(q, k, index_q, index_k, ids, logsumexps, segments, b)
    return jnp.sum(kl * jnp.arange(1.0, 1 + kl.size)), kl

  return total


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_gradients(function, inputs, ids, logsumexps, b):
  """(kl, gradients of index_q and index_k), gradients of q, k and the logsumexps."""
  *arrays, segments = inputs
  total = total_of(function, ids, segments, b)
  (_, kl), (dq, dk, *dindex, dlogsumexps) = jax.value_and_grad(total, range(5), has_aux=True)(*arrays, logsumexps)
  return (kl, *dindex), (dq, dk, *dlogsumexps)


def assert_close(got, want, tolerance=TOLERANCE[jnp.float32]):
  for a, wanted in zip(got, want, strict=True):
    a, wanted = np.asarray(a, np.float32), np.asarray(wanted, np.float32)
    assert a.shape == wanted.shape
    assert np.abs(a - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize('shape', [
    dict(), dict(B=1, H=2, k=9, Di=64, padded=0), dict(H=16, K=1, Dh=160, b=64, k=2),
    dict(H=16, K=2, dtype=jnp.bfloat16), dict(B=1, T=150, H=1, K=1, Di=160, dtype=jnp.bfloat16),
], ids=str)
def test_value_and_gradients_are_the_oracles_and_attention_gets_none(shape):
  inputs, b, top_k = make(**shape)
  dtype = inputs[0].dtype.type
  want, *given = by_oracle(inputs, b, top_k)
  got, others = value_and_gradients(kernel, inputs, *given, b)
  assert got[0].dtype == jnp.float32 and got[1].dtype == got[2].dtype == dtype
  assert_close(got, want, TOLERANCE[dtype])
  assert not any(np.asarray(a).any() for a in others)


def test_a_teacher_that_is_zero_on_most_keys_adds_nothing_there_and_unseen_keys_of_any_score_reach_nobody():
  (q, *rest), b, top_k = make(T=64)
  inputs = q * 100, *rest
  want, *given = by_oracle(inputs, b, top_k)
  got, _ = value_and_gradients(kernel, inputs, *given, b)
  assert_close(got, want, 1e-5)  # a score of some hundreds is rounded to 3e-5


def test_nan_of_padding_reaches_no_value_or_gradient():
  (*arrays, segments), b, top_k = make(T=64)
  want, ids, logsumexps = by_oracle((*arrays, segments), b, top_k)
  poison = lambda a: jnp.where((segments == 0).reshape(*segments.shape, *[1] * (a.ndim - 2)), jnp.nan, a)
  got, _ = value_and_gradients(kernel, (*map(poison, arrays), segments), ids, [*map(poison, logsumexps)], b)
  assert_close(got, want)


def test_rows_of_padding_alone_give_zeros():
  (*arrays, segments), b, top_k = make(T=64)
  inputs = *arrays, jnp.zeros_like(segments)
  _, *given = by_oracle(inputs, b, top_k)
  result = value_and_gradients(kernel, inputs, *given, b)
  assert not any(np.asarray(a).any() for a in jax.tree.leaves(result))


@pytest.mark.parametrize('remat, runs', [('none', 1), ('mixer', 1), ('full', 2)])
def test_scores_are_made_once_for_value_and_gradient_where_remat_lets_them(remat, runs):
  (*arrays, segments), b, top_k = make(T=64)
  B, T, H, _ = arrays[0].shape
  K = arrays[1].shape[2]
  total = total_of(kernel, jnp.zeros((B, T, K, top_k), jnp.int32), segments, b)
  total = jax.checkpoint(total, policy=REMAT_POLICIES[remat]) if remat in REMAT_POLICIES else total
  step = jax.value_and_grad(total, (2, 3), has_aux=True)
  program = str(jax.make_jaxpr(step)(*arrays, (jnp.zeros((B, T, K, H // K)), jnp.zeros((B, T, K)))))
  assert program.count('name=msa_divergence') == runs


def test_the_mean_of_the_heads_is_as_exact_as_float32():
  """A sum on the matrix unit, of probabilities in bfloat16 parts."""
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(rows, 32)), jnp.float32) for rows in (24, 16))
  scores = jnp.einsum('bd,rd->br', k, q, precision='highest')
  logsumexp = jnp.max(scores, axis=0, keepdims=True)
  wanted = np.asarray(jnp.exp(scores - logsumexp), np.float64).reshape(16, 6, 4).mean(axis=2)
  found = divergence_tpu._teacher(q, k, logsumexp, 1.0, 6, divergence_tpu.PARTS[q.dtype])
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1.5e-7)


def test_copies_have_arrived_before_they_are_read_and_none_is_left(capfd):
  """In a simulator of memory and semaphores; what nothing wrote is NaN there, so a missed copy shows in the values."""
  pltpu.reset_tpu_interpret_mode_state()
  simulator = pltpu.InterpretParams(dma_execution_mode='on_wait', detect_races=True, uninitialized_memory='nan')
  inputs, b, k = make(B=1, T=37, K=1, k=2)
  expected, *given = by_oracle(inputs, b, k)
  simulated = functools.partial(divergence_tpu.selected_divergence_pallas, interpret=simulator)
  assert_close(value_and_gradients(simulated, inputs, *given, b)[0], expected)
  told = capfd.readouterr()
  assert 'RACE' not in told.out + told.err and 'non-zero count' not in told.out + told.err
