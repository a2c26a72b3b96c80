"""Decoding with MSA on Hopper cards that are not here: M3's heads, 16 blocks of 128 of a million slots."""

import jax
import pytest
from test_decode_aot import MIB, Dh, Di, H, K, S, array, tokens

from mmx.kernels_pallas import api, decode_gpu
from mmx.layers import attention
from mmx.layers.context import Context

CHOICE = {'block_size': 128, 'top_k': 16, 'implementation': 'hopper', 'platform': 'gpu'}


@pytest.mark.parametrize('B, T', [(1, 1), (1, 4), (64, 1)])
def test_a_step_writes_its_keys_copies_no_cache_and_spills_nothing(compile_for_hopper, assembled, B, T):
  """One new token, one with three drafts, or one of each of many rows: keys appended, blocks selected, attention."""
  slots = S // B

  def step(cache, q, index_q, new, positions, segments):
    cache = attention.append(cache, new, Context(positions, segments))
    where = jax.numpy.where(segments > 0, positions, -1)
    return api.msa_cached(q, cache['k'], cache['v'], index_q, cache['index_k'], where, **CHOICE), cache

  cache = {'k': array(B, K, slots, Dh), 'v': array(B, K, slots, Dh), 'index_k': array(B, slots, Di)}
  new = {'k': array(B, T, K, Dh), 'v': array(B, T, K, Dh), 'index_k': array(B, T, Di)}
  arguments = cache, array(B, T, H, Dh), array(B, T, K, Di), new, tokens(B, T), tokens(B, T)
  compiled = compile_for_hopper(step, *arguments)
  kernels = assembled()
  for name, kernel in kernels.items():
    print(f'{name}: {kernel.registers} registers, {kernel.spilled} bytes spilled')
    assert kernel.spilled == 0 and 'wgmma.mma_async' in kernel.ptx and 'cp.async.bulk.tensor' in kernel.ptx
  assert any('msa_attend_chosen' in name for name in kernels)
  # Not donated, the cache goes out once more; one head's keys alone would be 256 MiB besides.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * MIB


@pytest.mark.parametrize('Dh, block', [(64, 64), (64, 128), (128, 64), (64, 16), (128, 32)])
def test_odd_shapes_compile(compile_for_hopper, assembled, Dh, block):
  cache, ids = array(2, 3, 512, Dh), tokens(2, 5, 3, 4)
  compile_for_hopper(lambda *a: decode_gpu.attend_chosen(*a, block), array(2, 5, 9, Dh), cache, cache, ids, tokens(2, 5))
  (kernel,) = assembled().values()
  assert kernel.spilled == 0
