"""Attention over selected blocks on Hopper, in its simulator, against a masked softmax made from the ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_tpu import assert_close, dense, make, value_and_gradients

from mmx.kernels_pallas import hopper, sparse_gpu, sparse_pairs
from mmx.kernels_pallas.sparse_gpu import attend_blocks, unsupported

pytestmark = pytest.mark.usefixtures('compiled_once')


def kernel(*inputs):
  return attend_blocks(*inputs, hopper.simulator())


def kernel_watched(*inputs):
  return attend_blocks(*inputs, hopper.simulator(detect_races=True))


def assert_same(inputs, clean_inputs=None, kernel=kernel):
  """The kernels' values and gradients are those of the masked softmax, of `clean_inputs` where these are given."""
  *arrays, b = inputs
  found = jax.tree.leaves(value_and_gradients(kernel, b, *arrays))
  wanted = jax.tree.leaves(value_and_gradients(dense, b, *(clean_inputs or inputs)[:-1]))
  assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
  for got, want in zip(found, wanted, strict=True):
    assert_close(got, want, jnp.bfloat16)


@pytest.mark.parametrize('shares, elements, shape', [
    (3, 2**20, dict(T=100, H=8, b=64, k=2)),  # pages that lie in two and in three shares
    (1, 2**17, dict(T=150, H=6, Dh=64, b=128, k=2, segments=False)),  # two chunks; 60 rows of a strip's 64
    (2, 2**20, dict(T=100, H=8, K=2, Dh=64, b=16, k=3, segments=False)),  # held in 64
    pytest.param(2, 2**20, dict(B=2, T=77, H=4, Dh=64, b=32, k=2), marks=pytest.mark.slow),  # 6 s
], ids=str)
def test_values_and_gradients_are_those_of_the_masked_softmax(monkeypatch, shares, elements, shape):
  monkeypatch.setattr(sparse_gpu, 'SHARES', shares)
  monkeypatch.setattr(sparse_pairs, 'CHUNK_ELEMENTS', elements)
  assert_same(make(**dict(B=1, K=1, Dh=128, dtype=jnp.bfloat16) | shape))


def test_nan_of_padded_queries_and_unused_slots_reaches_no_output_and_nothing_races(monkeypatch, races):
  monkeypatch.setattr(sparse_gpu, 'SHARES', 1)
  q, k, v, *rest = make(B=1, T=140, H=8, K=1, Dh=128, b=128, k=2, dtype=jnp.bfloat16)
  unused = (rest[1] < 0)[..., None, None]
  poisoned = (jnp.where(unused, jnp.nan, x) for x in (q, k, v))
  assert_same((*poisoned, *rest), (q, k, v, *rest), kernel_watched)
  assert not races()


@pytest.mark.parametrize('counts', [[1, 5, 1, 2], [9], [1, 1, 1], [2, 1, 4, 7]], ids=str)
def test_parts_of_a_page_are_all_added_once(monkeypatch, counts):
  """Whatever tiles its pages have: parts that `_add_kernel` adds are those of shares that begin amid the page."""
  monkeypatch.setattr(sparse_gpu, 'SHARES', 5)
  strips, pages = 2, np.repeat(np.arange(len(counts)), counts)
  tiles = sparse_pairs.Tiles(jnp.asarray([*pages, 8, 8], jnp.int32), jnp.int32(len(pages)), *[None] * 5)
  each = -(-len(pages) * strips // 5)
  page_of = lambda s: pages[s // strips]
  starts = [s for s in range(each, len(pages) * strips, each) if page_of(s) == page_of(s - 1)]
  page_C, length_C = (np.asarray(x) for x in sparse_gpu.chains(tiles, strips))
  added = [(i + j, page_C[i]) for i in range(5) for j in range(length_C[i])]
  assert added == [(s // each, page_of(s)) for s in starts]


@pytest.mark.parametrize('change, word', [
    (dict(H=7), 'kv heads'), (dict(b=48), 'block_size'), (dict(dtype=jnp.float32), 'float32'),
    (dict(Dh=192), 'head dim'), (dict(), ''),
], ids=str)
def test_what_does_not_compile_is_named(change, word):
  shape = dict(H=8, b=128, Dh=64, dtype=jnp.bfloat16) | change
  array = lambda heads: jax.ShapeDtypeStruct((1, 256, heads, shape['Dh']), shape['dtype'])
  reason = unsupported(array(shape['H']), array(2), shape['b'], 16)
  assert word in reason and bool(reason) == bool(word)
