"""The divergence of MSA's warm-up on TPUs that are not here: M3's heads, 64 and 4 of 128, index dim 128."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import api, warmup_tpu


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def arguments(B, T, H, K, Dh, Di, dtype=jnp.bfloat16):
  floats = (T, H, Dh), (T, K, Dh), (T, K, Di), (T, Di)
  return *(array(B, *shape, dtype=dtype) for shape in floats), array(B, T, dtype=jnp.int32)


def gradient(diverge):
  return jax.grad(lambda *a: jnp.sum(diverge(*a)), (2, 3))


def test_a_long_row_is_scored_with_no_scores_in_memory(compile_for_tpu):
  """Keys of 32768 tokens are two spans on v5p, one on the others."""
  T, H = 32768, 64
  diverge = functools.partial(api.msa_prefix_kl, implementation='auto', platform='tpu')
  compiled = compile_for_tpu(gradient(diverge), *arguments(1, T, H, 4, 128, 128))
  assert 'msa_warmup_divergence' in compiled.as_text()
  # Queries turned to rows of heads, and outputs of the pass that makes logsumexps: 512 MiB each.
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * T * H * 128 * 2


@pytest.mark.parametrize('B, T, H, K, Dh, Di, dtype', [
    (2, 100, 3, 3, 128, 128, jnp.bfloat16),
    (1, 1000, 16, 1, 256, 256, jnp.float32),  # the most heads of the largest
    (2, 4224, 12, 2, 128, 256, jnp.bfloat16),
])
def test_every_shape_that_is_supported_compiles(compile_for_tpu, B, T, H, K, Dh, Di, dtype):
  inputs = arguments(B, T, H, K, Dh, Di, dtype)
  assert warmup_tpu.unsupported(*inputs[:3]) == ''
  compile_for_tpu(gradient(warmup_tpu.msa_prefix_kl_pallas), *inputs)
