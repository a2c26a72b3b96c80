"""Attention over selected blocks on TPUs that are not here, at the production shape: 64 heads, 4 of keys, 16 blocks."""

import jax
import jax.numpy as jnp

from mmx.kernels_pallas.sparse_tpu import attend_blocks

H, K, DH, BLOCK, TOP_K = 64, 4, 128, 128, 16
MIB = 2**20
# Pairs of a chunk, sorted; at T = 32768 scores in bfloat16 would take 128 GiB, the rows of pairs' queries 8 GiB.
CHUNK_BYTES = 16 * MIB


def inputs(T):
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, T, *shape), dtype)
  integers = lambda *shape: array(*shape, dtype=jnp.int32)
  return (
      array(H, DH), array(K, DH), array(K, DH), integers(K, TOP_K), integers(), (integers(), integers()),
  )


def forward(*inputs):
  return attend_blocks(*inputs, BLOCK)[0]


def gradients(q, k, v, *rest):
  return jax.grad(lambda *a: jnp.sum(forward(*a, *rest).astype(jnp.float32)), (0, 1, 2))(q, k, v)


def test_forward_of_131072_tokens_holds_no_rows_and_one_copy_of_keys_and_values(compile_for_tpu):
  T = 131072
  compiled = compile_for_tpu(forward, *inputs(T))
  assert 'msa_attend_blocks' in compiled.as_text() and 'tpu_custom_call' in compiled.as_text()
  one_copy = 2 * T * K * DH * 2
  assert compiled.memory_analysis().temp_size_in_bytes < CHUNK_BYTES + one_copy + T * 128 * 4 * 2


def test_gradient_of_32768_tokens_adds_the_output_and_keys_in_float32(compile_for_tpu):
  T = 32768
  compiled = compile_for_tpu(gradients, *inputs(T))
  assert compiled.as_text().count('tpu_custom_call') >= 2
  copies, output = 2 * T * K * DH * (2 + 4 + 4), T * H * DH * 2
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * CHUNK_BYTES + copies + output
