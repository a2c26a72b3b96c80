"""The index branch's divergence with its gradient on TPUs that are not here, at M3's heads: 64, 4 of keys, 16 blocks."""

import jax
import jax.numpy as jnp

from mmx.kernels_pallas.divergence_tpu import selected_divergence_pallas

H, K, DH, DI, BLOCK, TOP_K = 64, 4, 128, 128, 128, 16
# Of one chunk: index queries, their gradient and sorted pairs. Rows of its pairs' queries would take 128 MiB, scores of
# all pairs of tokens in bfloat16 128 GiB.
CHUNK_BYTES = 2**25


def gradients(T):
  """A gradient through the divergence, and its arguments."""
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, T, *shape), dtype)
  floats = array(H, DH), array(K, DH), array(K, DI), array(DI)
  logsumexps = array(K, H // K, dtype=jnp.float32), array(K, dtype=jnp.float32)
  arguments = *floats, array(K, TOP_K, dtype=jnp.int32), logsumexps, array(dtype=jnp.int32)

  def total(index_q, index_k, q, k, *rest):
    return jnp.sum(selected_divergence_pallas(q, k, index_q, index_k, *rest, BLOCK))

  return lambda q, k, index_q, index_k, *rest: jax.grad(total, (0, 1))(index_q, index_k, q, k, *rest), *arguments


def test_gradient_of_32768_tokens_holds_no_rows_and_index_keys_of_each_head(compile_for_tpu):
  T = 32768
  compiled = compile_for_tpu(*gradients(T))
  text = compiled.as_text()
  assert 'msa_divergence' in text and text.count('tpu_custom_call') >= 1
  copy_of_keys, index_keys_of_each_head, gradient = T * K * DH * 2, T * K * DI * 4, T * K * DI * 2
  # Index queries' gradient once as it is made and once in row order; v5p has no VMEM for what weighs it by the rows.
  held = copy_of_keys + 2 * (index_keys_of_each_head + gradient) + 2 * gradient
  assert compiled.memory_analysis().temp_size_in_bytes < CHUNK_BYTES + held
