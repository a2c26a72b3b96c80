"""Attention on TPUs that are not here."""

import jax
import jax.numpy as jnp

from mmx.kernels_pallas import api


def test_full_attention_is_the_library_kernel_with_no_scores_in_memory(compile_for_tpu):
  B, T, H, K, Dh = 1, 8192, 48, 8, 128
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((B, T), jnp.int32)

  def total(q, k, v, segments):
    return jnp.sum(api.attend(q, k, v, segments, implementation='auto', platform='tpu').astype(jnp.float32))

  gradient = jax.grad(total, (0, 1, 2))
  compiled = compile_for_tpu(gradient, array(B, T, H, Dh), array(B, T, K, Dh), array(B, T, K, Dh), segments)
  assert compiled.as_text().count('tpu_custom_call') >= 2
  assert compiled.memory_analysis().temp_size_in_bytes < T * T * H  # an eighth of the scores in float32 and less
