"""Attention to stretches of keys on Hopper cards that are not here, at M2's heads: 48, 8 of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import api
from mmx.kernels_pallas.attention_gpu import attention_hopper, sliding_hopper
from mmx.kernels_pallas.chunks import Part

H, K = 48, 8


def compiled_gradients(compile_for_hopper, attend, T, S, Dh):
  array = lambda length, *rest: jax.ShapeDtypeStruct((1, length, *rest), jnp.bfloat16)
  segments = lambda length: jax.ShapeDtypeStruct((1, length), jnp.int32)

  def total(q, k, v, here, all_):
    return jnp.sum(attend(q, k, v, here=here, all_=all_).astype(jnp.float32))

  arguments = array(T, H, Dh), array(S, K, Dh), array(S, K, Dh), segments(T), segments(S)
  return compile_for_hopper(jax.grad(total, (0, 1, 2)), *arguments)


def part(segments_BS, T):
  """The first of 16 parts of their rows: its slices are the first and the last of 32."""
  S = segments_BS.shape[1]
  slots = np.concatenate([np.arange(T // 2), np.arange(S - T // 2, S)])[None].astype(np.int32)
  return Part(slots, jnp.int32(0), segments_BS)


FORMS = {
    'whole rows': (lambda *qkv, here, all_: attention_hopper(*qkv, all_), 32768, 32768),
    'a part of rows': (
        lambda *qkv, here, all_: attention_hopper(*qkv, here, part=part(all_, here.shape[1])), 12288, 196608
    ),
    'a window': (lambda *qkv, here, all_: sliding_hopper(*qkv, all_, 1024, start=1023), 8192, 9215),
}


@pytest.mark.parametrize('Dh', [128, 64])
@pytest.mark.parametrize('form', FORMS)
def test_three_kernels_spill_nothing_and_hold_neither_scores_nor_bias(form, Dh, compile_for_hopper, assembled):
  attend, T, S = FORMS[form]
  compiled = compiled_gradients(compile_for_hopper, attend, T, S, Dh)
  kernels = assembled()
  for name, kernel in kernels.items():
    print(f'{name}: {kernel.registers} registers, {kernel.spilled} bytes spilled')
  for kernel in kernels.values():
    assert kernel.spilled == 0 and 'wgmma.mma_async' in kernel.ptx and 'cp.async.bulk.tensor' in kernel.ptx
  assert len(kernels) == 3
  rows, keys = T * H * Dh * 2, S * K * Dh * 2
  print(compiled.memory_analysis().temp_size_in_bytes / rows)
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows + 4 * keys


@pytest.mark.parametrize('B, T', [(1, 1), (64, 1), (1, 8192)])
def test_a_cache_of_a_million_slots_is_read_where_it_stands(B, T, compile_for_hopper, assembled):
  array = lambda *shape: jax.ShapeDtypeStruct((B, *shape), jnp.bfloat16)
  cache = array(K, 2**20 // B, 128)
  choice = {'implementation': 'hopper', 'platform': 'gpu'}
  attend = lambda *a: api.attend_cached(*a, **choice)
  compiled = compile_for_hopper(attend, array(T, H, 128), cache, cache, jax.ShapeDtypeStruct((B, T), jnp.int32))
  (kernel,) = assembled().values()
  assert kernel.spilled == 0
  # Queries and their parts in tiles of 128 rows: less than a 64th of the cache's 4 GiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 2**26 + 4 * B * T * H * 128 * 2
