"""The index branch's divergence on Hopper, in its simulator: the oracle's value, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import pytest
from test_divergence_tpu import TOLERANCE, assert_close, by_oracle, make, value_and_gradients

from mmx.kernels_pallas import divergence_gpu, hopper, sparse_gpu, sparse_pairs

pytestmark = pytest.mark.usefixtures('compiled_once')


def simulated(*arguments, **options):
  """Of the attention's logsumexp alone."""
  *floats, ids, logsumexps, segments, b = arguments
  interpret = hopper.simulator(**options)
  return divergence_gpu.selected_divergence_hopper(*floats, ids, logsumexps[0], segments, b, interpret)


watched = functools.partial(simulated, detect_races=True)


@pytest.mark.parametrize('shares, elements, shape', [
    (3, 2**20, dict(B=1, T=100, H=16, K=1, Dh=128, Di=64, b=64, k=2)),  # pages that lie in two and in three shares
    (2, 2**20, dict(B=2, T=77, H=4, K=1, Dh=64, Di=64, b=16, k=3)),  # held in 64
    # Two chunks, two heads of keys, three queries' heads where eight have room; 25 s.
    pytest.param(1, 2**16, dict(B=1, T=130, H=6, K=2, b=128, k=2, padded=0), marks=pytest.mark.slow),
], ids=str)
def test_value_and_gradients_are_the_oracles_and_attention_gets_none(monkeypatch, shares, elements, shape):
  monkeypatch.setattr(sparse_gpu, 'SHARES', shares)
  monkeypatch.setattr(sparse_pairs, 'CHUNK_ELEMENTS', elements)
  inputs, b, top_k = make(**shape, dtype=jnp.bfloat16)
  want, *given = by_oracle(inputs, b, top_k)
  got, others = value_and_gradients(simulated, inputs, *given, b)
  assert got[0].dtype == jnp.float32 and got[1].dtype == got[2].dtype == jnp.bfloat16
  assert_close(got, want, TOLERANCE[jnp.bfloat16])
  assert not any(jnp.any(a) for a in others)


def test_nan_of_padding_reaches_no_value_or_gradient_and_nothing_races(monkeypatch, races):
  monkeypatch.setattr(sparse_gpu, 'SHARES', 1)
  (*arrays, segments), b, top_k = make(B=1, T=140, H=8, K=1, Dh=64, Di=64, b=128, k=2, dtype=jnp.bfloat16, padded=9)
  want, ids, logsumexps = by_oracle((*arrays, segments), b, top_k)
  poison = lambda a: jnp.where((segments == 0).reshape(*segments.shape, *[1] * (a.ndim - 2)), jnp.nan, a)
  got, _ = value_and_gradients(watched, (*map(poison, arrays), segments), ids, [*map(poison, logsumexps)], b)
  assert_close(got, want, TOLERANCE[jnp.bfloat16])
  assert not races()


@pytest.mark.parametrize('H, Di, word', [(34, 64, 'per kv head'), (16, 192, 'index dim'), (32, 128, '')])
def test_what_does_not_compile_is_named(H, Di, word):
  array = lambda *shape: jax.ShapeDtypeStruct((1, 256, *shape), jnp.bfloat16)
  reason = divergence_gpu.unsupported(array(H, 64), array(2, 64), array(2, Di))
  assert word in reason and bool(reason) == bool(word)
