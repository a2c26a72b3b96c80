"""MSA's index branch on Hopper cards that are not here."""

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import index_gpu


@pytest.fixture
def compile_selection(compile_for_hopper, assembled):
  def compile_(B, T, S, K, Di, block, top_k, packed, dtype=jnp.bfloat16, spilled=0):
    """Bytes of temporaries, after the machine code was looked at."""
    array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    segments = (array(B, T), array(B, S)) if packed else None
    arguments = array(B, T, K, Di, dtype=dtype), array(B, S, Di, dtype=dtype), array(B, T), segments
    assert index_gpu.unsupported(*arguments[:2], block) == ''
    compiled = compile_for_hopper(lambda *a: index_gpu.select_blocks_gpu(*a, block, top_k), *arguments)
    kernels = assembled()
    assert kernels
    for name, kernel in kernels.items():
      print(f'{name}: {kernel.registers} registers, {kernel.spilled} bytes spilled')
      assert 'wgmma.mma_async' in kernel.ptx and 'cp.async.bulk.tensor' in kernel.ptx
      assert kernel.spilled <= spilled
    return compiled.memory_analysis().temp_size_in_bytes

  return compile_


@pytest.mark.parametrize('T, packed', [(2**17, False), (2**17, True), (2**20, False), (2**20, True)])
def test_training_and_prefill_hold_no_scores(compile_selection, T, packed):
  K, k = 4, 16
  ids = T * K * k * 4
  # The ids before they are turned, and a slot and a segment of each row.
  assert compile_selection(1, T, T, K, 128, 128, k, packed) < 1.5 * ids < T * K * (T // 128) * 4 / 40


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float8_e4m3fn])
def test_decoding_against_1m_slots_copies_no_keys(compile_selection, dtype):
  assert compile_selection(1, 1, 2**20, 4, 128, 128, 16, False, dtype) < 2**21


def test_float8_is_multiplied_as_it_is(compile_selection, assembled):
  T, K, k = 2**20, 4, 16
  assert compile_selection(1, T, T, K, 128, 128, k, False, jnp.float8_e4m3fn) < 1.5 * T * K * k * 4
  assert all('wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3' in kernel.ptx for kernel in assembled().values())


@pytest.mark.parametrize(
    'shape',
    [
        (2, 77, 100, 3, 64, 16, 5, True, jnp.float16),
        (2, 300, 5000, 2, 64, 8, 64, True),  # three passes over the keys
        (1, 512, 4096, 4, 256, 128, 25, True),  # the largest tiles and the longest list
        (1, 9, 5, 1, 192, 64, 2, False),
        (2, 77, 100, 3, 256, 16, 25, True, jnp.float8_e4m3fn),
    ],
)
def test_odd_shapes_compile(compile_selection, shape):
  assert compile_selection(*shape, spilled=16) < 2**24  # jax 0.12 spills a few registers of the largest
