"""Attention over selected blocks on TPU, in interpret mode, against a masked softmax made from the ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mmx.kernels_pallas import resident_tpu, sparse_pairs, sparse_tpu
from mmx.kernels_pallas.sparse_tpu import attend_blocks, unsupported

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
  """Chunks of few queries and tiles of few, so that every loop turns more than once."""
  monkeypatch.setattr(resident_tpu, 'vmem_bytes', lambda: 2**20)
  monkeypatch.setattr(resident_tpu, 'TILE_ROWS', 64)
  monkeypatch.setattr(sparse_tpu, 'STEP_QUERIES', 16)


def make(B=2, T=101, H=8, K=2, Dh=32, b=16, k=3, dtype=jnp.float32, segments=True, padded=5):
  """q, k, v, ids, slots, segments, b: two documents packed, the second's last `padded` queries padding.

  A query's own block is among its k, the others are any before it, of the other document too.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  slots = np.broadcast_to(np.where(np.arange(T) < T - padded, np.arange(T), -1), (B, T))
  ids = np.full((B, T, K, k), -1)
  for row, t, head in np.ndindex(B, T, K):
    if slots[row, t] >= 0:
      chosen = [t // b, *rng.permutation(t // b)[: k - 1]]
      ids[row, t, head, : len(chosen)] = chosen
  document = jnp.asarray(np.broadcast_to(np.where(np.arange(T) < T // 3, 1, 2), (B, T)), jnp.int32)
  segments = (document, document) if segments else None
  to_int = lambda x: jnp.asarray(x, jnp.int32)
  return normal(B, T, H, Dh), normal(B, T, K, Dh), normal(B, T, K, Dh), to_int(ids), to_int(slots), segments, b


def dense(q, k, v, ids, slots, segments, b):
  """Masked softmax over all slots: (out, logsumexp)."""
  (B, T, H, Dh), (S, K) = q.shape, k.shape[1:3]
  q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
  chosen = jax.nn.one_hot(ids, -(-S // b), dtype=bool).any(axis=3)
  visible = jnp.repeat(chosen, b, axis=-1)[..., :S] & (jnp.arange(S)[None, None] <= slots[..., None])[:, :, None]
  if segments is not None:
    visible &= (segments[0][:, :, None] == segments[1][:, None])[:, :, None]
  scores = jnp.einsum('btkgd,bskd->btkgs', q.reshape(B, T, K, H // K, Dh), k, precision='highest') * Dh**-0.5
  scores = jnp.where(visible[:, :, :, None], scores, -1e30)
  weights = jnp.where(visible[:, :, :, None], jax.nn.softmax(scores, axis=-1), 0)
  out = jnp.einsum('btkgs,bskd->btkgd', weights, v, precision='highest').reshape(B, T, H, Dh)
  sees = visible.any(axis=-1)[..., None]
  return out, jnp.where(sees, jax.nn.logsumexp(scores, axis=-1), 0)


def assert_close(got, want, dtype):
  got, want = (np.asarray(a, np.float32) for a in (got, want))
  assert got.shape == want.shape
  assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(1, np.abs(want).max())


def kernel(*inputs):
  return attend_blocks(*inputs, True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(attend, b, q, k, v, *rest):
  """(out, logsumexp), and the gradients of q, k, v under a cotangent that does not repeat."""
  def run(q, k, v):
    pair = attend(q, k, v, *rest, b)
    return jnp.sum(pair[0].astype(jnp.float32) * jnp.sin(jnp.arange(q.size).reshape(q.shape))), pair

  (_, pair), gradients = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(q, k, v)
  return pair, gradients


def assert_same(inputs, clean_inputs=None):
  """The kernel's values and gradients are those of the masked softmax, of `clean_inputs` where these are given."""
  *arrays, b = inputs
  dtype = arrays[0].dtype.type
  (out, logsumexp), gradients = value_and_gradients(kernel, b, *arrays)
  expected = value_and_gradients(dense, b, *(clean_inputs or inputs)[:-1])
  assert out.dtype == dtype and logsumexp.dtype == jnp.float32
  assert_close(out, expected[0][0], dtype)
  assert_close(logsumexp, expected[0][1], jnp.float32)
  for got, want in zip(gradients, expected[1], strict=True):
    assert got.dtype == dtype
    assert_close(got, want, dtype)


@pytest.mark.parametrize('shape', [
    dict(), dict(H=2, K=2, Dh=64, k=16, segments=False, padded=0, dtype=jnp.bfloat16),
    dict(B=1, T=131, H=16, K=1, Dh=160, b=128, k=2, dtype=jnp.bfloat16),
], ids=str)
def test_values_and_gradients_are_those_of_the_masked_softmax(shape):
  assert_same(make(**shape))


@pytest.mark.parametrize('tiles', [4, 16])
def test_how_many_tiles_a_step_takes_changes_nothing(tiles, monkeypatch):
  *inputs, b = make()
  monkeypatch.setattr(sparse_tpu, 'STEP_QUERIES', tiles)
  monkeypatch.setattr(resident_tpu, 'MOST_TILES', tiles)
  monkeypatch.setattr(resident_tpu, 'TILE_ROWS', 8)
  out, _ = jax.jit(lambda *a: kernel(*a, b))(*inputs)
  assert_close(out, dense(*inputs, b)[0], jnp.float32)


@pytest.mark.parametrize('start, end, some', [(20, 33, True), (32, 36, False), (70, 101, True), (0, 101, False)])
def test_keys_go_unmasked_only_where_every_query_of_the_chunk_sees_all_of_them(start, end, some):
  q, k, v, ids, slots, (segments, key_segments), b = make()  # the second document begins at 33
  keys = sparse_pairs.keys_in_blocks(k, v, slots, key_segments, b)
  queries = resident_tpu.Queries(*(x[:, start:end] for x in (ids, slots, segments)))
  slot, segment = (np.asarray(x)[:, start:end, None] for x in (slots, segments))
  sees = (np.arange(101) <= slot) & (np.asarray(key_segments)[:, None] == segment) | (slot < 0)
  want = np.pad(sees.all(axis=1), ((0, 0), (0, -101 % b))).reshape(-1, b).all(axis=1)
  assert want.any() == some and not want.all()
  assert (np.asarray(resident_tpu.seen_whole(queries, keys)) == want).all()


def test_all_blocks_chosen_are_full_causal_attention():
  q, k, v, ids, slots, _, b = make(B=1, T=45, k=3, segments=False, padded=0)
  assert (ids[:, -1] >= 0).all()
  out, _ = jax.jit(lambda *a: kernel(*a, None, b))(q, k, v, ids, slots)
  assert_close(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), jnp.float32)


def test_new_queries_attend_to_a_longer_cache():
  q, k, v, ids, slots, _, b = make(padded=0)
  last = slice(90, 93)
  inputs = q[:, last], k, v, ids[:, last], slots[:, last]
  out, _ = jax.jit(lambda *a: kernel(*a, None, b))(*inputs)
  assert_close(out, dense(*inputs, None, b)[0], jnp.float32)


def test_queries_that_chose_nothing_give_zeros():
  q, k, v, ids, slots, segments, b = make()
  result = value_and_gradients(kernel, b, q, k, v, jnp.full_like(ids, -1), slots, segments)
  assert not any(np.asarray(a).any() for a in jax.tree.leaves(result))


def test_nan_of_padded_queries_and_unused_slots_reaches_no_output_or_gradient():
  q, k, v, *rest = make(padded=3)  # the last block is used in part
  unused = (rest[1] < 0)[..., None, None]
  assert_same((*(jnp.where(unused, jnp.nan, x) for x in (q, k, v)), *rest), (q, k, v, *rest))


def test_copies_have_arrived_before_they_are_read_and_none_is_left(capfd):
  """In a simulator of memory and semaphores; what nothing wrote is NaN there, so a missed copy shows in the values."""
  pltpu.reset_tpu_interpret_mode_state()
  simulator = pltpu.InterpretParams(dma_execution_mode='on_wait', detect_races=True, uninitialized_memory='nan')
  *arrays, b = make(B=1, T=37, K=1, k=2)
  found = value_and_gradients(lambda *a: attend_blocks(*a, simulator), b, *arrays)
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(value_and_gradients(dense, b, *arrays)), strict=True):
    assert_close(got, want, jnp.float32)
  told = capfd.readouterr()
  assert 'RACE' not in told.out + told.err and 'non-zero count' not in told.out + told.err


@pytest.mark.parametrize('change, word', [
    (dict(H=7), 'kv heads'), (dict(b=24), 'block_size'), (dict(dtype=jnp.float16), 'float16'), (dict(), ''),
], ids=str)
def test_what_does_not_compile_is_named(change, word):
  shape = dict(H=8, b=128, dtype=jnp.bfloat16) | change
  array = lambda heads: jax.ShapeDtypeStruct((1, 256, heads, 64), shape['dtype'])
  reason = unsupported(array(shape['H']), array(2), shape['b'], 16)
  assert word in reason and bool(reason) == bool(word)
