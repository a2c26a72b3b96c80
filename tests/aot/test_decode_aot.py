"""Decoding with MSA on TPUs that are not here: M3's heads, 64 and 4 of 128, 16 blocks of 128 of a million slots."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import api, decode_tpu
from mmx.layers import attention
from mmx.layers.context import Context

H, K, Dh, Di, S = 64, 4, 128, 128, 2**20
CHOICE = {'block_size': 128, 'top_k': 16, 'implementation': 'pallas', 'platform': 'tpu'}
MIB = 2**20


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def tokens(*shape):
  return array(*shape, dtype=jnp.int32)


@pytest.mark.parametrize('T', [1, 4])
def test_a_step_against_1m_slots_writes_its_keys_and_copies_no_cache(compile_for_tpu, T):
  """One new token, or one with three drafts: keys appended, blocks selected, attention."""

  def step(cache, q, index_q, new, positions, segments):
    cache = attention.append(cache, new, Context(positions, segments))
    slots = jnp.where(segments > 0, positions, -1)
    return api.msa_cached(q, cache['k'], cache['v'], index_q, cache['index_k'], slots, **CHOICE), cache

  cache = {'k': array(1, K, S, Dh), 'v': array(1, K, S, Dh), 'index_k': array(1, S, Di)}
  new = {'k': array(1, T, K, Dh), 'v': array(1, T, K, Dh), 'index_k': array(1, T, Di)}
  compiled = compile_for_tpu(step, cache, array(1, T, H, Dh), array(1, T, K, Di), new, tokens(1, T), tokens(1, T))
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3  # two for selection
  # The pooled scores of 8192 blocks against 128 lanes of queries; one head's keys alone would be 256 MiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 6 * MIB


def test_a_chunk_of_a_prompt_whose_choices_cover_the_cache_copies_it_once(compile_for_tpu):
  T, S = 512, 16384
  cached = functools.partial(api.msa_cached, **CHOICE)
  floats = array(1, T, H, Dh), array(1, K, S, Dh), array(1, K, S, Dh), array(1, T, K, Di), array(1, S, Di)
  compiled = compile_for_tpu(cached, *floats, tokens(1, T))
  assert 'msa_attend_blocks' in compiled.as_text()
  # 16 MiB each of keys and values, 128 MiB each of the pairs' queries and outputs; scores of all pairs: 1 GiB.
  pairs = T * 16 * H * Dh * 2
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * S * K * Dh * 2 + 2 * pairs


def test_a_pool_of_pages_is_not_copied(compile_for_tpu):
  B, P, pages = 16, 512, 8192
  pool = array(pages, K, 128, Dh)
  attend = lambda q, k, v, ids, slots, pages: decode_tpu.attend_chosen(q, k, v, ids, slots, 128, pages)
  compiled = compile_for_tpu(attend, array(B, 1, H, Dh), pool, pool, tokens(B, 1, K, 16), tokens(B, 1), tokens(B, P))
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * MIB


@pytest.mark.parametrize(
    'B, T, H, K, Dh, block, top_k, dtype',
    [
        (3, 2, 6, 6, 64, 16, 64, jnp.bfloat16),
        (2, 8, 8, 2, 64, 64, 5, jnp.float32),
        (1, 1, 3, 1, 128, 32, 1, jnp.bfloat16),
        (1, 1, 16, 1, 128, 128, 64, jnp.float32),  # the largest buffers that M3's head dimension asks for
        (1, 1, 4, 4, 256, 256, 64, jnp.bfloat16),  # and the largest there may be
        (16, 2048, 16, 1, 128, 128, 16, jnp.bfloat16),  # more pages than scalar memory holds
    ],
)
def test_every_shape_that_is_supported_compiles(compile_for_tpu, B, T, H, K, Dh, block, top_k, dtype):
  q, keys = array(B, T, H, Dh, dtype=dtype), array(B, K, 64 * block, Dh, dtype=dtype)
  assert decode_tpu.unsupported(q, keys, block, top_k) == ''
  attend = functools.partial(decode_tpu.attend_chosen, block_size=block)
  compile_for_tpu(attend, q, keys, keys, tokens(B, T, K, top_k), tokens(B, T))
