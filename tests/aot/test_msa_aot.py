"""MSA as training calls it, for TPUs that are not here: M3's heads, 64 and 4 of 128, 16 blocks of 128."""

import jax
import jax.numpy as jnp

from mmx.kernels_pallas import api

H, K, Dh, Di, BLOCK, TOP_K = 64, 4, 128, 128, 128, 16
CHOICE = {'block_size': BLOCK, 'top_k': TOP_K, 'implementation': 'pallas', 'platform': 'tpu'}
GIB = 2**30


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def test_training_holds_nothing_over_the_square_of_the_length(compile_for_tpu):
  T = 16384

  def total(q, k, v, index_q, index_k, segments):
    out, kl = api.msa(q, k, v, index_q, index_k, segments, **CHOICE)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(kl)

  floats = array(1, T, H, Dh), array(1, T, K, Dh), array(1, T, K, Dh), array(1, T, K, Di), array(1, T, Di)
  compiled = compile_for_tpu(jax.grad(total, range(5)), *floats, array(1, T, dtype=jnp.int32))
  assert compiled.as_text().count('tpu_custom_call') >= 6  # selection's and divergence's two, attention's two
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * GIB  # scores of all pairs of tokens: 64 GiB in float32
