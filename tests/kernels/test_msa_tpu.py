"""MSA from TPU kernels, as a whole and in interpret mode: equal to the oracle in both outputs and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import api, reference, resident_tpu, sparse_tpu
from mmx.kernels_pallas.msa_tpu import msa_pallas


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
  """A step of 256 queries, one after another, takes XLA for CPU 40 s to compile, tiles of 64 as long again."""
  monkeypatch.setattr(resident_tpu, 'TILE_ROWS', 64)
  monkeypatch.setattr(sparse_tpu, 'STEP_QUERIES', 16)


def inputs(B, T, H, K, Dh, Di, dtype=jnp.float32):
  """q, k, v, index_q, index_k, segment_ids: packed documents, the last row padded at its end."""
  rng = np.random.default_rng(0)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
  segments[-1, T - T // 5 :] = 0
  shapes = (B, T, H, Dh), (B, T, K, Dh), (B, T, K, Dh), (B, T, K, Di), (B, T, Di)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), jnp.asarray(segments)


@pytest.mark.parametrize(
    'B, T, H, K, block, top_k',
    [(2, 150, 4, 2, 16, 3), (1, 96, 2, 2, 32, 5)],
    ids=['packed rows, two heads a group', 'more k than blocks'],
)
def test_msa_pallas_equals_the_oracle_in_values_and_gradients(B, T, H, K, block, top_k):
  floats, segments = inputs(B, T, H, K, 32, 32)
  rng = np.random.default_rng(1)
  target, weight = jnp.asarray(rng.normal(size=floats[0].shape), jnp.float32), jnp.arange(1.0, B + 1)

  def run(function):
    def scalar(*floats):
      out, kl = function(*floats, segments, block, top_k)
      # Padding attends to padding, which no training step looks at.
      out = jnp.where((segments > 0)[..., None, None], out, 0)
      return jnp.sum(out * target) + jnp.sum(kl * weight), (out, kl)

    (_, outs), gradients = jax.jit(jax.value_and_grad(scalar, range(5), has_aux=True))(*floats)
    return *outs, *gradients

  for found, wanted in zip(run(lambda *a: msa_pallas(*a, interpret=True)), run(reference.msa), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4 * float(jnp.abs(wanted).max()))


def test_a_named_kernel_says_in_one_line_what_it_cannot_serve():
  array = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
  arguments = array(1, 64, 2, 64), array(1, 64, 2, 64), array(1, 64, 2, 64), array(1, 64, 2, 48), array(1, 64, 48)
  with pytest.raises(api.UnsupportedError, match="msa implementation 'pallas' cannot be used here: .*48"):
    api.msa(*arguments, jnp.ones((1, 64), jnp.int32), block_size=64, top_k=2, implementation='pallas', platform='tpu')
