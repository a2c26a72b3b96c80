"""One chip's part of rows that are split over four, for TPUs that are not here."""

import jax
import jax.numpy as jnp
import numpy as np

from mmx.kernels_pallas import api
from mmx.kernels_pallas.chunks import Part
from mmx.layers.context_parallel import swapped_slots

SHARDS, T, Dh = 4, 4096, 128
S = SHARDS * T


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


IDS = array(1, T, dtype=jnp.int32), array(1, S, dtype=jnp.int32), array(dtype=jnp.int32)


def test_full_attention_of_a_part_is_the_library_kernel_with_no_scores_in_memory(compile_for_tpu):
  def total(q, k, v, segments, key_segments, index):
    part = Part(swapped_slots(SHARDS, T), index, key_segments)
    return jnp.sum(api.attend(q, k, v, segments, implementation='auto', platform='tpu', part=part).astype(jnp.float32))

  floats = array(1, T, 48, Dh), array(1, S, 8, Dh), array(1, S, 8, Dh)
  compiled = compile_for_tpu(jax.grad(total, (0, 1, 2)), *floats, *IDS)
  assert compiled.as_text().count('tpu_custom_call') >= 3  # forwards, and backwards for queries and for keys
  assert compiled.memory_analysis().temp_size_in_bytes < T * S * 48  # a quarter of the scores in float32


def test_sparse_attention_of_a_part_is_our_kernels(compile_for_tpu):
  H, K, Di, choice = 64, 4, 128, {'block_size': 128, 'top_k': 16, 'implementation': 'pallas', 'platform': 'tpu'}

  def total(q, k, v, index_q, index_k, segments, key_segments, index):
    part = Part(np.arange(S, dtype=np.int32).reshape(SHARDS, T), index, key_segments)
    out, kl = api.msa(q, k, v, index_q, index_k, segments, part=part, **choice)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(kl)

  floats = array(1, T, H, Dh), array(1, S, K, Dh), array(1, S, K, Dh), array(1, T, K, Di), array(1, S, Di)
  compiled = compile_for_tpu(jax.grad(total, range(5)), *floats, *IDS)
  assert compiled.as_text().count('tpu_custom_call') >= 6  # selection's and divergence's two, attention's two
  assert compiled.memory_analysis().temp_size_in_bytes < T * S * H  # a quarter of the scores in float32
