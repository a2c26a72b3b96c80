"""MSA from Hopper's kernels, as a whole and in their simulator: equal to the oracle in outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_msa_tpu import inputs

from mmx.kernels_pallas import hopper, index_gpu, msa_gpu, reference, sparse_gpu
from mmx.kernels_pallas.msa_gpu import msa_cached_hopper, msa_hopper, unsupported
from mmx.kernels_pallas.sparse import msa_cached_gather

pytestmark = pytest.mark.usefixtures('compiled_once')


def test_msa_hopper_equals_the_oracle_in_values_and_gradients(monkeypatch):
  """Three documents and padding in one row of three blocks, of which each query attends to two."""
  monkeypatch.setattr(sparse_gpu, 'SHARES', 1)
  monkeypatch.setattr(index_gpu, 'CORES', 1)
  floats, segments = inputs(1, 150, 8, 1, 64, 64, jnp.bfloat16)
  target = jnp.asarray(np.random.default_rng(1).normal(size=floats[0].shape), jnp.float32)

  def run(function):
    def scalar(*floats):
      out, kl = function(*floats, segments, 64, 2)
      # Padding attends to padding, which no training step looks at.
      out = jnp.where((segments > 0)[..., None, None], out, 0)
      return jnp.sum(out * target) + jnp.sum(kl), (out, kl)

    (_, outs), gradients = jax.jit(jax.value_and_grad(scalar, range(5), has_aux=True))(*floats)
    return *outs, *gradients

  simulated = run(lambda *a: msa_hopper(*a, interpret=hopper.simulator()))
  for found, wanted in zip(simulated, run(reference.msa), strict=True):
    assert found.dtype == wanted.dtype
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2 * float(np.abs(wanted).max()))


def test_selection_by_float8_is_that_of_the_same_values_in_bfloat16(monkeypatch):
  monkeypatch.setattr(sparse_gpu, 'SHARES', 1)
  monkeypatch.setattr(index_gpu, 'CORES', 1)
  monkeypatch.setattr(msa_gpu.divergence_gpu, 'selected_divergence_hopper', lambda *a: jnp.zeros(1))
  (q, k, v, *index), segments = inputs(1, 150, 8, 1, 64, 128, jnp.bfloat16)
  float8 = jnp.dtype('float8_e4m3fn')
  index = [x.astype(float8).astype(x.dtype) for x in index]
  seen, select = [], index_gpu.select_blocks_gpu
  monkeypatch.setattr(index_gpu, 'select_blocks_gpu', lambda *a, **named: (seen.append(a[:2]), select(*a, **named))[1])
  run = lambda dtype: jax.jit(
      lambda *a: msa_hopper(*a, segments, 64, 2, interpret=hopper.simulator(), index_dtype=dtype)[0]
  )(q, k, v, *index)
  narrow, wide = run(float8), run(None)
  assert [x.dtype for pair in seen for x in pair] == [float8] * 2 + [jnp.bfloat16] * 2
  np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (narrow, wide)))


def test_against_a_cache_as_the_xla_form_does(monkeypatch):
  """Two new tokens of one row, of which the second row has none, each with its blocks of a cache half full."""
  monkeypatch.setattr(index_gpu, 'CORES', 1)
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  q, k, v = normal(2, 2, 4, 64), normal(2, 2, 256, 64), normal(2, 2, 256, 64)
  index_q, index_k = normal(2, 2, 2, 64), normal(2, 256, 64)
  arguments = q, k, v, index_q, index_k, jnp.array([[140, 141], [-1, -1]], jnp.int32)
  found = jax.jit(lambda *a: msa_cached_hopper(*a, 64, 2, interpret=hopper.simulator()))(*arguments)
  wanted = jax.jit(lambda *a: msa_cached_gather(*a, 64, 2))(*arguments)
  np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))
  assert np.asarray(found[0], np.float32).any() and not np.asarray(found[1], np.float32).any()


@pytest.mark.parametrize('block, Di, word', [(8, 64, 'block_size'), (64, 48, 'index dim'), (64, 64, '')])
def test_what_either_kernel_cannot_serve_is_said_in_one_line(block, Di, word):
  array = lambda *shape: jax.ShapeDtypeStruct((1, 128, *shape), jnp.bfloat16)
  reason = unsupported(array(4, 64), array(2, 64), array(2, Di), array(Di), block, 2)
  assert word in reason and bool(reason) == bool(word)
