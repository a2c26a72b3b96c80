"""Attention over selected blocks on Hopper cards that are not here, at 64 heads, 4 of keys, 16 blocks of 128."""

import functools

import jax
import pytest
from test_sparse_aot import BLOCK, DH, K, inputs

from mmx.kernels_pallas.sparse_gpu import SHARES, attend_blocks

# Of one chunk: rows of queries and of outputs at 256 MiB each, and room for tiles that are not full. At T = 32768 scores
# in bfloat16 would take 128 GiB, the blocks gathered for each query and kv head 128 GiB.
CHUNK_BYTES = 704 * 2**20


def forward(*inputs):
  return attend_blocks(*inputs, BLOCK)[0]


def gradients(q, k, v, *rest, block=BLOCK):
  return jax.grad(lambda *a: attend_blocks(*a, *rest, block)[0].astype('float32').sum(), (0, 1, 2))(q, k, v)


@pytest.fixture
def temporaries(compile_for_hopper, assembled):
  def compile_(function, T, products):
    """Bytes of them, after the machine code was looked at: so many kernels with matrix products, none spills."""
    compiled = compile_for_hopper(function, *inputs(T))
    kernels = assembled().values()
    for kernel in kernels:
      print(f'{kernel.registers} registers, {kernel.spilled} bytes spilled')
      assert kernel.spilled == 0
    with_products = [kernel.ptx for kernel in kernels if 'wgmma.mma_async' in kernel.ptx]
    assert len(with_products) == products and all('cp.async.bulk.tensor' in ptx for ptx in with_products)
    return compiled.memory_analysis().temp_size_in_bytes

  return compile_


def test_forward_of_131072_tokens_holds_one_chunk_and_one_copy_of_keys_and_values(temporaries):
  T = 131072
  one_copy = 2 * T * K * DH * 2
  assert temporaries(forward, T, products=1) < CHUNK_BYTES + one_copy


def test_gradient_of_32768_tokens_adds_rows_of_one_chunk_and_keys_in_float32(temporaries):
  T = 32768
  copies, parts = 2 * T * K * DH * (2 + 4 + 4), 2 * SHARES * BLOCK * DH * 4
  assert temporaries(gradients, T, products=2) < 2 * CHUNK_BYTES + copies + parts


@pytest.mark.parametrize('block', [16, 32, 64])
def test_smaller_blocks_hold_as_much_but_keys_in_64_slots_a_block(temporaries, block):
  T, wide = 8192, 64 // block
  copies, parts = 2 * wide * T * K * DH * (2 + 4 + 4), 2 * SHARES * 64 * DH * 4
  assert temporaries(functools.partial(gradients, block=block), T, products=2) < 2 * CHUNK_BYTES + copies + parts
