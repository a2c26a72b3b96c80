"""The index branch's divergence with its gradient on Hopper cards that are not here, at M3's heads: 64, 4 of keys."""

import jax
import jax.numpy as jnp
import pytest
from test_divergence_aot import BLOCK, DH, DI, TOP_K, H, K

from mmx.kernels_pallas.divergence_gpu import selected_divergence_hopper
from mmx.kernels_pallas.sparse_gpu import SHARES

# Of one chunk: rows of queries at 256 MiB, of index queries and of their gradient at 16 MiB each, and what is gathered
# and sorted on the way. A tile has room for 64 index queries, however few it has.
CHUNK_BYTES = 2**29


def compile_gradients(compile_for_hopper, T, H, K, b):
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, T, *shape), dtype)
  floats = array(H, DH), array(K, DH), array(K, DI), array(DI)
  arguments = *floats, array(K, TOP_K, dtype=jnp.int32), array(K, H // K, dtype=jnp.float32), array(dtype=jnp.int32)

  def total(index_q, index_k, q, k, *rest):
    return jnp.sum(selected_divergence_hopper(q, k, index_q, index_k, *rest, b))

  gradients = lambda q, k, index_q, index_k, *rest: jax.grad(total, (0, 1))(index_q, index_k, q, k, *rest)
  return compile_for_hopper(gradients, *arguments)


def looked_at(assembled):
  kernels = assembled()
  for name, kernel in kernels.items():
    print(f'{name}: {kernel.registers} registers, {kernel.spilled} bytes spilled')
    assert kernel.spilled == 0
  with_products = [kernel.ptx for kernel in kernels.values() if 'wgmma.mma_async' in kernel.ptx]
  assert len(with_products) == 2 and all('cp.async.bulk.tensor' in ptx for ptx in with_products)


def test_gradient_of_32768_tokens_holds_rows_of_one_chunk_and_index_keys_of_each_head(compile_for_hopper, assembled):
  T = 32768
  compiled = compile_gradients(compile_for_hopper, T, H, K, BLOCK)
  looked_at(assembled)
  copy_of_keys, index_keys_of_each_head, parts = T * K * DH * 2, T * K * DI * 4, SHARES * BLOCK * DI * 4
  held = copy_of_keys + 2 * index_keys_of_each_head + parts
  assert compiled.memory_analysis().temp_size_in_bytes < CHUNK_BYTES + held


@pytest.mark.parametrize('heads, kv_heads, b', [(6, 1, 64), (3, 3, 128), (16, 1, 16)])
def test_other_groups_compile(compile_for_hopper, assembled, heads, kv_heads, b):
  compile_gradients(compile_for_hopper, 2048, heads, kv_heads, b)
  looked_at(assembled)
