"""Decoding on Hopper, in its simulator: a query attends to what it chose and sees, whatever else memory holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode_tpu import inputs, slow_attention

from mmx.kernels_pallas import decode_gpu, hopper
from mmx.kernels_pallas.decode_gpu import attend_chosen

pytestmark = pytest.mark.usefixtures('compiled_once')

SHAPES = {  # lengths, T, H, K, Dh, block, k; processors
    'a group of 16, more k than blocks, a part for each block': (((150,), 1, 16, 1, 128, 64, 5), 132),
    'a few tokens, padding in front, in parts of two blocks': (((300, 2), 3, 3, 1, 64, 64, 3), 12),
    'more queries than processors, its own block alone': (((200,), 2, 20, 2, 64, 128, 1), 2),
    'small blocks, two times four and one more, a part for each': (((300, 20), 1, 4, 1, 64, 16, 9), 132),
    'small blocks, three times two in one part': (((90, 200), 2, 2, 1, 64, 32, 6), 1),
}


@pytest.mark.parametrize('shape, processors', SHAPES.values(), ids=SHAPES)
def test_a_query_attends_to_what_it_chose_and_sees(shape, processors, monkeypatch):
  """Behind each row's tokens stands NaN."""
  monkeypatch.setattr(decode_gpu, 'MULTIPROCESSORS', processors)
  arguments, block = inputs(*shape, jnp.bfloat16), shape[5]
  found = jax.jit(lambda *a: attend_chosen(*a, block, interpret=hopper.simulator()))(*arguments)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), slow_attention(*arguments, block), rtol=0.02, atol=0.01)


@pytest.mark.parametrize('block', [64, 16])
def test_pages_in_any_order_equal_a_cache_of_each_row_and_nothing_races(block, monkeypatch, races):
  """Two rows with one beginning in the same page, behind it their own, all shuffled among NaN."""
  monkeypatch.setattr(decode_gpu, 'MULTIPROCESSORS', 1)  # all blocks of a query pass through the same memory
  monkeypatch.setattr(decode_gpu, 'STAGES', 2)
  K, Dh = 1, 64
  q, k, v, ids, slots = inputs((150, 130), 1, 2, K, Dh, block, 3 * 64 // block, jnp.bfloat16)
  k, v = k.at[1, :, :block].set(k[0, :, :block]), v.at[1, :, :block].set(v[0, :, :block])
  P = k.shape[2] // block
  pages = np.random.default_rng(1).permutation(3 * P)[: 2 * P].reshape(2, P)
  pages[1, 0] = pages[0, 0]

  def pool(x):
    blocks = np.asarray(x, np.float32).reshape(2, K, P, block, Dh).swapaxes(1, 2)
    found = np.full((3 * P, K, block, Dh), np.nan, np.float32)
    found[pages] = blocks
    return jnp.asarray(found, x.dtype)

  run = jax.jit(lambda *a, **named: attend_chosen(*a, block, **named, interpret=hopper.simulator(detect_races=True)))
  found = run(q, pool(k), pool(v), ids, slots, pages_BP=jnp.asarray(pages, jnp.int32))
  np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (found, run(q, k, v, ids, slots))))
  assert np.any(np.asarray(found, np.float32)) and not races()


@pytest.mark.parametrize('change, word', [
    (dict(H=7), 'kv heads'), (dict(b=48), 'block_size'), (dict(dtype=jnp.float32), 'float32'), (dict(Dh=96), 'head dim'),
    (dict(S=100), '100 slots'), (dict(), ''),
], ids=str)
def test_what_does_not_compile_is_named(change, word):
  shape = dict(H=8, b=128, Dh=64, S=256, dtype=jnp.bfloat16) | change
  q = jax.ShapeDtypeStruct((1, 1, shape['H'], shape['Dh']), shape['dtype'])
  reason = decode_gpu.unsupported(q, jax.ShapeDtypeStruct((1, 2, shape['S'], shape['Dh']), shape['dtype']), shape['b'])
  assert word in reason and bool(reason) == bool(word)
