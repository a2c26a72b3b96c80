"""Full attention to a cache on TPUs that are not here: M2's heads, 48 and 8 of 128, against 192K slots."""

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import api, attention_tpu
from mmx.layers import attention
from mmx.layers.context import Context

H, K, Dh, S = 48, 8, 128, 196608
MIB = 2**20


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def tokens(*shape):
  return array(*shape, dtype=jnp.int32)


@pytest.mark.parametrize('T', [1, 4096])
def test_new_tokens_are_written_and_attend_and_no_cache_is_copied(compile_for_tpu, T):
  """One decoded, or a chunk of a prompt."""

  def step(cache, q, new, positions, segments):
    cache = attention.append(cache, new, Context(positions, segments))
    return api.attend_cached(q, cache['k'], cache['v'], positions, platform='tpu'), cache

  cache, new = ({'k': array(*shape), 'v': array(*shape)} for shape in ((1, K, S, Dh), (1, T, K, Dh)))
  compiled = compile_for_tpu(step, cache, array(1, T, H, Dh), new, tokens(1, T), tokens(1, T))
  assert 'attend_cache' in compiled.as_text()
  # The chunk's queries and outputs, 48 MiB each, are turned to rows of their heads. Keys alone are 384 MiB.
  assert compiled.memory_analysis().temp_size_in_bytes < MIB + 5 * T * H * Dh * 2


@pytest.mark.parametrize('B, T, H, K, Dh, S, dtype', [
    (3, 1, 6, 6, 128, 4096, jnp.bfloat16),  # a group of 1
    (2, 5, 9, 3, 256, 4112, jnp.bfloat16),
    (1, 300, 12, 2, 128, 96, jnp.bfloat16),  # two steps; a cache of less than 128
    (1, 300, 128, 1, 512, 1024, jnp.float32),
    (16, 2048, 16, 1, 128, 2048, jnp.float32),
])
def test_every_shape_that_is_supported_compiles(compile_for_tpu, B, T, H, K, Dh, S, dtype):
  q, keys = array(B, T, H, Dh, dtype=dtype), array(B, K, S, Dh, dtype=dtype)
  assert attention_tpu.unsupported(q, keys) == ''
  compile_for_tpu(attention_tpu.attention_cached_pallas, q, keys, keys, tokens(B, T))
