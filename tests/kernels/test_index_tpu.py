"""MSA's index branch on TPU, in interpret mode: the same blocks as the XLA form and the oracle, in the same order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import index_tpu, reference, sparse

select = jax.jit(functools.partial(index_tpu.select_blocks_pallas, interpret=True), static_argnums=(4, 5))
select_and_sum = jax.jit(functools.partial(index_tpu.select_blocks_and_sum, interpret=True), static_argnums=(4, 5))
select_xla = jax.jit(sparse.select_blocks, static_argnums=(4, 5))


def inputs(B, T, S, K, Di, seed=0, dtype=jnp.float32):
  """index_q, index_k, slots of T queries that end at different slots, packed segments of queries and keys."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  key_segments = np.sort(rng.integers(1, 4, (B, S)), axis=1).astype(np.int32)
  key_segments[-1, S - S // 5 :] = 0
  ends = rng.integers(T, S + 1, B)
  ends[0] = S
  slots = (ends[:, None] - T + np.arange(T)).astype(np.int32)
  query_segments = np.take_along_axis(key_segments, slots, axis=1)
  segments = jnp.asarray(query_segments), jnp.asarray(key_segments)
  return normal(B, T, K, Di), normal(B, S, Di), jnp.asarray(slots), segments


def assert_same_blocks(args, block, top_k):
  got, want = select(*args, block, top_k), select_xla(*args, block, top_k)
  assert got.dtype == jnp.int32 and got.shape == want.shape
  np.testing.assert_array_equal(got, want)
  return np.asarray(got)


@pytest.mark.parametrize(
    'B, T, S, K, Di, block, top_k, dtype, packed',
    [
        (2, 150, 2300, 4, 128, 128, 16, 'float32', True),  # the last tile of queries and block of keys not whole
        (1, 150, 2300, 4, 128, 128, 16, 'bfloat16', False),
        (2, 37, 1025, 3, 32, 16, 65, 'bfloat16', True),  # all blocks, 3 heads in 128 lanes, one key in the last tile
        (1, 300, 1100, 1, 64, 64, 3, 'float32', False),
        (2, 300, 9000, 4, 32, 128, 5, 'float32', True),  # tiles that are seen whole, of one document
        (3, 1, 3000, 4, 64, 32, 8, 'bfloat16', False),  # one new token a row
        (2, 70, 1100, 4, 64, 32, 8, 'float8_e4m3fn', True),
        (2, 8, 2048, 2, 128, 128, 1, 'float32', True),  # its own block alone
        (2, 5, 7, 2, 32, 8, 4, 'float32', True),  # less than one block, more k than blocks
    ],
)
def test_selection_equals_the_xla_form(B, T, S, K, Di, block, top_k, dtype, packed):
  *arrays, segments = inputs(B, T, S, K, Di, dtype=jnp.dtype(dtype))
  assert_same_blocks((*arrays, segments if packed else None), block, top_k)


def test_selection_of_whole_packed_rows_equals_the_oracle_in_many_chunks(monkeypatch):
  monkeypatch.setattr(index_tpu, 'ROWS', 128)
  monkeypatch.setattr(index_tpu, 'POOLED_BYTES', 2**18)
  index_q, index_k, slots, (segments, _) = inputs(2, 1100, 1100, 2, 32)
  small = jax.jit(lambda *a: index_tpu.select_blocks_pallas(*a, 32, 5, interpret=True))  # of the sizes set above
  got = small(index_q, index_k, slots, (segments, segments))
  np.testing.assert_array_equal(got, reference.msa_select(index_q, index_k, segments, 32, 5))


@pytest.mark.parametrize('B, T, S, K, Di, block, top_k, dtype, packed', [
    (2, 70, 2300, 4, 128, 128, 5, 'float32', True), (1, 37, 1025, 3, 32, 16, 65, 'bfloat16', False),
    (2, 8, 2048, 2, 64, 64, 1, 'bfloat16', True),
])
def test_logsumexp_is_that_of_the_scores_seen_in_the_chosen_blocks(
    monkeypatch, B, T, S, K, Di, block, top_k, dtype, packed
):
  """Also of queries that are padding, of blocks seen in part, of keys that are NaN where nobody looks."""
  monkeypatch.setattr(index_tpu, 'POOLED_BYTES', 2**20)
  index_q, index_k, slots, segments = inputs(B, T, S, K, Di, dtype=jnp.dtype(dtype))
  slots = jnp.where(jnp.arange(T) % 7 == 3, -1, slots - S // 8)
  index_k = jnp.where((jnp.arange(S)[None] > slots.max(axis=1, keepdims=True))[..., None], jnp.nan, index_k * 4)
  ids, found = select_and_sum(index_q, index_k, slots, segments if packed else None, block, top_k)
  np.testing.assert_array_equal(ids, select(index_q, index_k, slots, segments if packed else None, block, top_k))
  assert found.dtype == jnp.float32 and found.shape == (B, T, K)
  scores = np.einsum('btkd,bsd->btks', *(np.nan_to_num(np.asarray(x, np.float64)) for x in (index_q, index_k))) * Di**-0.5
  chosen = (np.asarray(ids)[..., None] == np.arange(-(-S // block))).any(axis=3).repeat(block, axis=3)[..., :S]
  seen = chosen & (np.arange(S) <= np.asarray(slots)[..., None])[:, :, None]
  if packed:
    seen &= (np.asarray(segments[0])[..., None] == np.asarray(segments[1])[:, None])[:, :, None]
  total = np.sum(np.where(seen, np.exp(scores), 0), axis=3)
  assert (total > 0).any() and not total[np.asarray(slots) < 0].any()
  np.testing.assert_allclose(found, np.where(total > 0, np.log(np.where(total > 0, total, 1)), 0), rtol=1e-6, atol=5e-6)


def test_segments_out_of_order_are_kept_apart():
  """Documents of a row need not ascend, nor stand together: only equality counts."""
  index_q, index_k, slots, _ = inputs(1, 64, 4200, 2, 32)
  rng = np.random.default_rng(1)
  segments = jnp.asarray(rng.permutation(np.repeat(np.arange(1, 13), 350)).reshape(1, 4200), jnp.int32)
  assert_same_blocks((index_q, index_k, slots, (segments[:, -64:], segments)), 64, 9)
  blocks_of_segments = jnp.asarray(np.repeat([3, 1, 2, 1, 3], 840)[None], jnp.int32)
  queries = jnp.asarray(np.repeat([1, 2], 32)[None], jnp.int32)
  assert_same_blocks((index_q, index_k, slots, (queries, blocks_of_segments)), 64, 9)


def test_ties_go_to_the_lower_block_after_the_own_block():
  B, T, S, K, Di, block = 1, 40, 2100, 2, 32, 16
  index_q, _, slots, _ = inputs(B, T, S, K, Di)
  rng = np.random.default_rng(2)
  three_keys = rng.normal(size=(3, Di))
  index_k = jnp.asarray(three_keys[rng.integers(0, 3, S)][None], jnp.float32)
  ids = assert_same_blocks((index_q, index_k, slots, None), block, 12)
  assert (np.diff(ids[..., 1:], axis=-1) > 0).all() and (ids[..., 0] == np.asarray(slots)[..., None] // block).all()


def test_own_block_comes_first_even_when_it_scores_worst():
  index_q, index_k = jnp.ones((1, 1, 1, 32)), jnp.ones((1, 1056, 32)).at[:, 1024:].set(-5.0)
  ids = assert_same_blocks((index_q, index_k, jnp.array([[1055]]), None), 32, 3)
  assert ids.ravel().tolist() == [32, 0, 1]


@pytest.mark.parametrize('packed', [False, True])
def test_padding_picks_nothing(packed):
  index_q, index_k, slots, segments = inputs(2, 70, 1300, 2, 32)
  padding = (np.arange(70) % 3 == 0) | (np.arange(70) > 50)
  ids = assert_same_blocks((index_q, index_k, jnp.where(padding, -1, slots), segments if packed else None), 64, 4)
  assert (ids[:, padding] == -1).all() and (ids[:, ~padding, :, 0] >= 0).all()
  assert_same_blocks((index_q, index_k, jnp.full_like(slots, -1), segments if packed else None), 64, 4)


def test_nan_in_keys_that_are_not_seen_never_reaches_the_ids():
  index_q, index_k, slots, _ = inputs(1, 20, 3000, 2, 64)
  slots = slots - 900  # garbage behind the last query, as in a cache
  key_segments = jnp.asarray(np.repeat([1, 2, 3], 1000)[None], jnp.int32)
  segments = jnp.full((1, 20), 2, jnp.int32).at[:, -5:].set(3), key_segments
  ids = lambda index_k: np.asarray(select(index_q, index_k, slots, segments, 64, 20))
  behind = jnp.arange(3000)[None] > slots.max()
  poisoned = jnp.where(((key_segments == 1) | behind)[..., None], jnp.nan, index_k)
  np.testing.assert_array_equal(ids(poisoned), ids(index_k))
  others = jnp.where((key_segments == 3)[..., None], jnp.nan, index_k)
  np.testing.assert_array_equal(ids(others)[:, :-5], ids(index_k)[:, :-5])


def test_tiles_of_keys_are_skipped_where_no_query_sees_them_and_masked_unless_all_see_them():
  key_segments = np.repeat(np.arange(1, 9), 512).astype(np.int32)[None]  # two documents a tile of keys
  slot = jnp.asarray([[[700, 900, 1500, 1600], [3000, -1, 2100, -1], [-1, -1, -1, -1]]], jnp.int32).reshape(1, 1, 12)
  segment = jnp.take_along_axis(jnp.asarray(key_segments)[:, None], jnp.maximum(slot, 0), axis=2)
  spans = jax.jit(index_tpu._spans, static_argnums=(3, 4))
  by_lanes = lambda segments: jnp.asarray(segments).reshape(1, -1, 128)
  first, last, _, last_whole = spans(slot, segment, by_lanes(key_segments), 4, 4)
  assert last.tolist() == [[1, 2, -1]] and first[0, :2].tolist() == [0, 2] and last_whole.tolist() == [[-1] * 3]
  first, last, first_whole, last_whole = spans(slot, None, None, 4, 4)
  assert (first.tolist(), last.tolist()) == ([[0, 0, 0]], [[1, 2, -1]])
  assert (first_whole.tolist(), last_whole.tolist()) == ([[0, 0, 0]], [[-1, 1, -1]])

  def whole(query_segments, key_segments, slots=(4095, -1, 4093, 4092)):
    rows = lambda x: jnp.asarray(x, jnp.int32).reshape(1, 1, 4)
    _, _, first, last = spans(rows(slots), rows(query_segments), by_lanes(np.repeat(key_segments, 512)), 4, 4)
    return (first[0, 0], last[0, 0])

  assert whole([2, 1, 2, 2], [1, 1, 1, 2, 2, 2, 2, 2]) == (2, 2)  # a tile of two documents, two of one, the last behind
  assert whole([2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2, 2], (3071, 3071, 4000, 4000)) == (1, 2)
  assert whole([2, 2, 1, 2], [2] * 8)[1] == -1  # queries of two documents
  assert whole([2, 2, 2, 2], [2, 2, 1, 1, 2, 2, 1, 1])[1] == -1  # a gap: all of its tiles are masked then


def test_selection_has_no_gradient():
  index_q, index_k, slots, segments = inputs(1, 4, 40, 1, 32)

  def total(index_q, index_k):
    ids = select(index_q, index_k, slots, segments, 8, 2)
    return jnp.sum(ids.astype(jnp.float32)) + 0 * jnp.sum(index_q)

  assert all((gradient == 0).all() for gradient in jax.jit(jax.grad(total, (0, 1)))(index_q, index_k))


def test_lowers_for_tpu_on_a_cpu_host():
  args = inputs(1, 256, 2048, 4, 128, dtype=jnp.bfloat16)
  function = lambda *a: index_tpu.select_blocks_pallas(*a, 128, 16)
  assert jax.jit(function).trace(*args).lower(lowering_platforms=('tpu',)).as_text().count('tpu_custom_call') == 2


def test_unsupported_names_what_it_cannot_serve():
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  reason = lambda Di=128, S=4096, block=128, dtype=jnp.bfloat16: index_tpu.unsupported(
      array(1, 64, 4, Di, dtype=dtype), array(1, S, Di), block
  )
  assert reason() == '' and reason(S=2**20) == ''
  for kwargs, word in [({'Di': 20}, '20'), ({'block': 24}, '24'), ({'S': 2**20, 'block': 64}, '16384'),
                       ({'dtype': jnp.float32}, 'index_q float32'), ({'dtype': jnp.float8_e4m3fn}, 'float8_e4m3fn and')]:
    assert word in reason(**kwargs)
