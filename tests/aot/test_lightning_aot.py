"""Lightning attention on TPUs that are not here."""

import jax
import jax.numpy as jnp

from mmx.kernels_pallas import lightning_tpu


def test_lightning_keeps_its_tokens_and_one_state_per_chunk_and_no_scores(compile_for_tpu):
  B, T, H, Dh, chunk = 1, 32768, 64, 128, 256
  tokens = jax.ShapeDtypeStruct((B, T, H, Dh), jnp.bfloat16)
  slopes, segments = jax.ShapeDtypeStruct((H,), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)

  def total(q, k, v, slopes, segments):
    o, state = lightning_tpu.lightning_pallas(q, k, v, slopes, segments, chunk=chunk)
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state)

  assert lightning_tpu.unsupported(tokens, chunk) == ''
  compiled = compile_for_tpu(jax.grad(total, (0, 1, 2)), tokens, tokens, tokens, slopes, segments)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
  # 512 MiB each: q, k, v, o with heads before tokens, the states, and on v5p two of the gradients besides. The scores
  # within all chunks, were they stored, would be 2048 MiB more, those of the whole length 256 GiB.
  states = H * (T // chunk) * Dh * Dh * 4
  assert compiled.memory_analysis().temp_size_in_bytes < (6 * tokens.size * 2 + states) * 1.01
