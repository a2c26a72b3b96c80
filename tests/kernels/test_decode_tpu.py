"""Decoding by TPU kernels, in interpret mode: a query attends to what it chose and sees, whatever else memory holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import api, decode_tpu, resident_tpu, sparse, sparse_tpu
from mmx.kernels_pallas.decode_tpu import attend_chosen
from mmx.kernels_pallas.msa_tpu import msa_cached_pallas
from mmx.kernels_pallas.sparse_pairs import covers


def inputs(lengths, T, H, K, Dh, block, top_k, dtype=jnp.float32, seed=0):
  """q, keys, values, ids, slots for rows of these lengths whose last T tokens are asked; NaN in every slot behind."""
  rng = np.random.default_rng(seed)
  B, S = len(lengths), -(-max(max(lengths), T) // block) * block + 2 * block
  normal = lambda *shape: rng.normal(size=shape)
  q, k, v = normal(B, T, H, Dh), normal(B, K, S, Dh), normal(B, K, S, Dh)
  slots = np.array(lengths)[:, None] - T + np.arange(T)
  ids = np.full((B, T, K, top_k), -1)
  for row, t, head in np.ndindex(B, T, K):
    own = slots[row, t] // block
    others = rng.permutation(own)[: top_k - 1] if own >= 0 else []
    ids[row, t, head, : 1 + len(others)] = [own, *others]  # -1 for padding
  for row, length in enumerate(lengths):
    k[row, :, max(length, 0) :], v[row, :, max(length, 0) :] = np.nan, np.nan
  floats = (jnp.asarray(a, dtype) for a in (q, k, v))
  return *floats, jnp.asarray(ids, jnp.int32), jnp.asarray(np.maximum(slots, -1), jnp.int32)


def slow_attention(q, k, v, ids, slots, block):
  """One query at a time, float64."""
  q, k, v, ids, slots = (np.asarray(a, np.float64 if a.dtype != jnp.int32 else int) for a in (q, k, v, ids, slots))
  B, T, H, Dh = q.shape
  out = np.zeros(q.shape)
  for row, t, h in np.ndindex(B, T, H):
    head = h // (H // k.shape[1])
    seen = [s for s in range(slots[row, t] + 1) if s // block in ids[row, t, head]]
    if seen:
      scores = k[row, head, seen] @ q[row, t, h] / np.sqrt(Dh)
      weight = np.exp(scores - scores.max())
      out[row, t, h] = weight / weight.sum() @ v[row, head, seen]
  return out


SHAPES = {  # lengths, T, H, K, Dh, block, k
    'one token, a group of 16, more k than blocks': ((150, 33), 1, 16, 1, 32, 16, 64),
    'a few tokens, padding in front, one head a group': ((70, 2, 1), 4, 3, 3, 64, 16, 3),
    'an odd number of queries, its own block alone': ((41,), 1, 3, 3, 32, 32, 1),
    'blocks in several parts': ((3000,), 2, 4, 2, 32, 128, 20),
}


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_a_query_attends_to_what_it_chose_and_sees(shape):
  arguments = inputs(*shape)
  found = attend_chosen(*arguments, shape[5], interpret=True)
  np.testing.assert_allclose(found, slow_attention(*arguments, shape[5]), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_rounded_once_before_each_product_and_at_the_end():
  arguments = inputs((600, 90), 2, 8, 2, 64, 32, 6, jnp.bfloat16)
  found = attend_chosen(*arguments, 32, interpret=True)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), slow_attention(*arguments, 32), rtol=0.02, atol=0.01)


def test_pages_in_any_order_that_rows_share_equal_a_cache_of_each_row():
  """Two rows with one beginning in the same pages, behind them their own, all shuffled among NaN."""
  block, K, Dh = 16, 2, 32
  q, k, v, ids, slots = inputs((70, 41), 2, 4, K, Dh, block, 3)
  k, v = k.at[1, :, :32].set(k[0, :, :32]), v.at[1, :, :32].set(v[0, :, :32])
  P = k.shape[2] // block
  rng = np.random.default_rng(1)
  pages = rng.permutation(40)[: 2 * P].reshape(2, P)
  pages[1, :2] = pages[0, :2]

  def pool(x):
    blocks = np.asarray(x).reshape(2, K, P, block, Dh).swapaxes(1, 2)
    found = np.full((40, K, block, Dh), np.nan, np.float32)
    found[pages] = blocks
    return jnp.asarray(found)

  found = attend_chosen(q, pool(k), pool(v), ids, slots, block, jnp.asarray(pages, jnp.int32), interpret=True)
  np.testing.assert_array_equal(found, attend_chosen(q, k, v, ids, slots, block, interpret=True))


def test_more_queries_than_pages_fit_scalar_memory_go_in_several_calls(monkeypatch):
  arguments = inputs((70, 41), 3, 4, 2, 32, 16, 3)
  wanted = attend_chosen(*arguments, 16, interpret=True)
  monkeypatch.setattr(decode_tpu, 'CALL_PAIRS', 5 * 3)  # 5 of 12 queries
  np.testing.assert_array_equal(attend_chosen(*arguments, 16, interpret=True), wanted)


@pytest.mark.parametrize('when', ['eager', 'on_wait'])
def test_copies_have_arrived_before_they_are_read_and_none_is_left(when, capfd):
  """In a simulator of memory and semaphores; what nothing wrote is NaN there, so a missed copy shows in the values."""
  pltpu.reset_tpu_interpret_mode_state()
  arguments = inputs((40, 9), 2, 2, 1, 32, 16, 3)
  simulator = pltpu.InterpretParams(dma_execution_mode=when, detect_races=True, uninitialized_memory='nan')
  found = attend_chosen(*arguments, 16, interpret=simulator)
  np.testing.assert_allclose(found, slow_attention(*arguments, 16), rtol=1e-4, atol=1e-5)
  told = capfd.readouterr()
  assert 'RACE' not in told.out + told.err and 'non-zero count' not in told.out + told.err


@pytest.mark.parametrize('T, top_k', [(1, 3), (2, 3), (30, 4)], ids=['a token', 'a few', 'a prompt, keys outside'])
def test_msa_cached_pallas_equals_msa_cached_gather(T, top_k, monkeypatch):
  monkeypatch.setattr(resident_tpu, 'TILE_ROWS', 64)  # larger tiles take XLA for CPU long to compile
  monkeypatch.setattr(sparse_tpu, 'STEP_QUERIES', 16)
  """NaN behind each row for the kernels, 0 for the form that multiplies by 0."""
  q, k, v, _, slots = inputs((100, 59), T, 4, 2, 32, 16, top_k)
  assert covers(T, top_k, 16, k.shape[2]) == (T == 30)
  rng = np.random.default_rng(2)
  index_q = jnp.asarray(rng.normal(size=(2, T, 2, 32)), jnp.float32)
  index_k = jnp.asarray(rng.normal(size=(2, k.shape[2], 32)), jnp.float32) + 0 * k[:, 0]
  slots = slots.at[1, -1].set(-1)  # padding
  found = msa_cached_pallas(q, k, v, index_q, index_k, slots, 16, top_k, interpret=True)
  wanted = sparse.msa_cached_gather(q, *map(jnp.nan_to_num, (k, v)), index_q, jnp.nan_to_num(index_k), slots, 16, top_k)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert not np.any(found[1, -1])


def test_a_named_kernel_says_in_one_line_what_it_cannot_serve():
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  reasons = {
      'top_k 65 of blocks': (array(1, 1, 4, 256), array(1, 2, 2**14, 256), 256, 65),
      '100 slots': (array(1, 1, 4, 64), array(1, 2, 100, 64), 16, 2),
      'block_size 24': (array(1, 1, 4, 64), array(1, 2, 96, 64), 24, 2),
      '4 query heads are no multiple of 3': (array(1, 1, 4, 64), array(1, 3, 96, 64), 16, 2),
      'dtypes float32 and bfloat16': (jax.ShapeDtypeStruct((1, 1, 4, 64), jnp.float32), array(1, 2, 96, 64), 16, 2),
  }
  for reason, arguments in reasons.items():
    assert decode_tpu.unsupported(*arguments).startswith(reason)
  choice = {'block_size': 16, 'top_k': 2, 'implementation': 'pallas', 'platform': 'tpu'}
  floats = array(1, 1, 4, 64), array(1, 2, 96, 64), array(1, 2, 96, 64), array(1, 1, 2, 48), array(1, 96, 48)
  with pytest.raises(api.UnsupportedError, match="'pallas' cannot be used here: .*48"):
    jax.eval_shape(lambda *a: api.msa_cached(*a, **choice), *floats, jax.ShapeDtypeStruct((1, 1), jnp.int32))
