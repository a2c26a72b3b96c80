"""MSA's index branch on TPUs that are not here."""

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import index_tpu


def compile_selection(compile_for_tpu, B, T, S, K, Di, block, top_k, packed, dtype=jnp.bfloat16, sums=0):
  array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
  function = index_tpu.select_blocks_and_sum if sums else index_tpu.select_blocks_pallas
  select = lambda *a: function(*a, block, top_k)
  segments = (array(B, T), array(B, S)) if packed else None
  arguments = array(B, T, K, Di, dtype=dtype), array(B, S, Di, dtype=dtype), array(B, T), segments
  assert index_tpu.unsupported(*arguments[:2], block) == ''
  compiled = compile_for_tpu(select, *arguments)
  assert compiled.as_text().count('tpu_custom_call') == 2 + sums
  return compiled.memory_analysis().temp_size_in_bytes


def test_training_on_128k_tokens_holds_the_pooled_scores_of_one_chunk(compile_for_tpu):
  T, K, k = 2**17, 4, 16
  ids = T * K * k * 4
  # Pooled scores and sums of one chunk, and the ids as they are turned; those of all queries would be 4 GiB.
  size = compile_selection(compile_for_tpu, 1, T, T, K, 128, 128, k, True, sums=1)
  assert size < index_tpu.POOLED_BYTES + 3 * ids + 2**22


def test_a_prompt_of_1m_tokens_holds_the_pooled_scores_of_one_chunk(compile_for_tpu):
  T, S = 2048, 2**20
  assert T * 4 * (S // 128) * 4 == 4 * index_tpu.POOLED_BYTES
  assert compile_selection(compile_for_tpu, 1, T, S, 4, 128, 128, 16, False) < index_tpu.POOLED_BYTES + 2**22


@pytest.mark.parametrize('T, dtype', [(1, jnp.bfloat16), (8, jnp.bfloat16), (1, jnp.float8_e4m3fn)])
def test_decoding_against_1m_slots_copies_no_keys(compile_for_tpu, T, dtype):
  assert compile_selection(compile_for_tpu, 1, T, 2**20, 4, 128, 128, 16, False, dtype) < 2**23


def test_decoding_of_many_rows_fits_scalar_memory(compile_for_tpu):
  assert compile_selection(compile_for_tpu, 2048, 1, 4096, 4, 128, 128, 16, False) < 2**28


@pytest.mark.parametrize(
    'shape',
    [
        (2, 77, 100, 3, 32, 16, 5, True, jnp.float32),
        (2, 300, 5000, 2, 64, 8, 700, True),
        (1, 9, 5, 1, 256, 64, 1, False),
        (1, 512, 4096, 4, 256, 128, 16, True, jnp.float32),  # the largest tiles
        (2, 77, 1100, 3, 96, 16, 5, True, jnp.float8_e4m3fn),
        (1, 512, 4096, 4, 256, 128, 64, True, jnp.float32, 1),  # training's
        (1, 30, 2**20, 4, 128, 128, 16, True, jnp.bfloat16, 1),
        (2, 77, 1100, 3, 32, 8, 5, True, jnp.bfloat16, 1),
    ],
)
def test_odd_shapes_compile(compile_for_tpu, shape):
  assert compile_selection(compile_for_tpu, *shape) < 2**24
