"""Full attention on TPUs that are not here: M2's heads, 48 and 8 of 128; rows of 32K, and a cache of 192K."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import api, attention_tpu
from mmx.layers import attention
from mmx.layers.context import Context

H, K, Dh, T, S = 48, 8, 128, 32768, 196608
MIB = 2**20
CHOICE = {'implementation': 'pallas', 'platform': 'tpu'}


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def tokens(*shape):
  return array(*shape, dtype=jnp.int32)


def gradient(attend):
  return jax.grad(lambda *a: jnp.sum(attend(*a).astype(jnp.float32)), (0, 1, 2))


@pytest.mark.parametrize('window', [None, 1024])
def test_gradients_of_a_long_row_hold_no_scores(compile_for_tpu, window):
  """Keys of 32768 tokens are two spans on v5p, one on the others."""
  if window:
    slide = functools.partial(api.sliding, window=window, sink_tokens=0, **CHOICE)
    attend = lambda q, k, v, segments: slide(q, k, v, segments, segments)
  else:
    attend = functools.partial(api.attend, **CHOICE)
  compiled = compile_for_tpu(gradient(attend), array(1, T, H, Dh), *[array(1, T, K, Dh)] * 2, tokens(1, T))
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
  # Queries, outputs and their cotangents turned to rows of heads; those of queries in float32, where keys are cut.
  assert compiled.memory_analysis().temp_size_in_bytes < 6 * T * H * Dh * 2


@pytest.mark.parametrize('new', [1, 4096])
def test_new_tokens_are_written_and_attend_and_no_cache_is_copied(compile_for_tpu, new):
  """One decoded, or a chunk of a prompt."""

  def step(cache, q, new, positions, segments):
    cache = attention.append(cache, new, Context(positions, segments))
    return api.attend_cached(q, cache['k'], cache['v'], positions, platform='tpu'), cache

  keys = lambda *shape: {'k': array(*shape), 'v': array(*shape)}
  arguments = keys(1, K, S, Dh), array(1, new, H, Dh), keys(1, new, K, Dh), tokens(1, new), tokens(1, new)
  compiled = compile_for_tpu(step, *arguments)
  assert 'attend' in compiled.as_text()
  # The chunk's queries and outputs, 48 MiB each, are turned to rows of their heads. Keys alone are 384 MiB.
  assert compiled.memory_analysis().temp_size_in_bytes < MIB + 5 * new * H * Dh * 2


@pytest.mark.parametrize('B, T, H, K, Dh, S, dtype', [
    (3, 1, 6, 6, 128, 4096, jnp.bfloat16),  # a group of 1
    (2, 5, 9, 3, 256, 4112, jnp.bfloat16),
    (1, 300, 12, 2, 128, 96, jnp.bfloat16),  # several steps; a cache of less than 128
    (1, 300, 64, 1, 256, 1024, jnp.float32),  # the most heads of the largest
    (16, 2048, 16, 1, 128, 2048, jnp.float32),
])
def test_every_cache_that_is_supported_compiles(compile_for_tpu, B, T, H, K, Dh, S, dtype):
  q, keys = array(B, T, H, Dh, dtype=dtype), array(B, K, S, Dh, dtype=dtype)
  assert attention_tpu.unsupported(q, array(B, S, K, Dh, dtype=dtype)) == ''
  compile_for_tpu(attention_tpu.attention_cached_pallas, q, keys, keys, tokens(B, T))


@pytest.mark.parametrize('B, T, H, K, Dh, dtype', [
    (2, 100, 3, 3, 128, jnp.bfloat16),
    (2, 4224, 9, 3, 256, jnp.bfloat16),
    (1, 1000, 64, 1, 256, jnp.float32),  # the most heads of the largest
    (1, 2048, 16, 1, 128, jnp.float32),
    (1, 49152, 2, 1, 256, jnp.float32),  # several spans
])
def test_gradients_of_all_rows_that_are_supported_compile(compile_for_tpu, B, T, H, K, Dh, dtype):
  q, keys = array(B, T, H, Dh, dtype=dtype), array(B, T, K, Dh, dtype=dtype)
  assert attention_tpu.unsupported(q, keys) == ''
  compile_for_tpu(gradient(attention_tpu.attention_pallas), q, keys, keys, tokens(B, T))
