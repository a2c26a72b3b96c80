"""MSA's index branch on Hopper, in the simulator: the same blocks as the XLA form and the oracle, in the same order.

Queries and keys are small integers: their products and sums are exact, in whatever order they are added up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_index_tpu import inputs as normal_inputs, select_xla

from mmx.kernels_pallas import hopper, index_gpu, reference

pytestmark = pytest.mark.usefixtures('compiled_once')

DIM = 256  # of which the root, that the XLA form divides by, is a power of two
SHAPE = 1, 24, 640, 2, 64  # B, T, S, K, Di of most tests, which then share what was compiled
BLOCK, TOP_K = 64, 6


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
  """Keys are not split in parts, but where a test asks for it: a program costs tenths of a second."""
  monkeypatch.setattr(index_gpu, 'CORES', 1)


def select(index_q, index_k, slots, segments, block=BLOCK, top_k=TOP_K, **options):
  kernel = simulated(block, top_k, index_gpu.CORES, index_gpu.STAGE_BYTES, index_gpu.MOST, **options)
  return np.asarray(kernel(index_q, index_k, slots, segments))


@functools.cache
def simulated(block, top_k, *sizes, **options):
  return jax.jit(lambda *a: index_gpu.select_blocks_gpu(*a, block, top_k, interpret=hopper.simulator(**options)))


def inputs(B, T, S, K, Di, dtype=jnp.bfloat16):
  """index_q, index_k of integers, slots of T queries that end at different slots, segments of queries and keys."""
  index_q, index_k, slots, segments = normal_inputs(B, T, S, K, Di)
  return jnp.round(6 * index_q).astype(dtype), jnp.round(6 * index_k).astype(dtype), slots, segments


def assert_same_blocks(args, block=BLOCK, top_k=TOP_K, **options):
  wide = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, DIM - x.shape[-1]),))
  got, want = select(*args, block, top_k, **options), select_xla(*map(wide, args[:2]), *args[2:], block, top_k)
  assert got.dtype == jnp.int32 and got.shape == want.shape
  np.testing.assert_array_equal(got, want)
  return got


@pytest.mark.parametrize(
    'B, T, S, K, Di, block, top_k, dtype, packed',
    [
        (2, 40, 300, 4, 64, 128, 3, 'bfloat16', True),  # the last tile of queries and block of keys not whole
        (1, 70, 640, 3, 128, 64, 5, 'bfloat16', False),  # tiles that need a mask and tiles that do not
        (1, 20, 270, 2, 256, 32, 9, 'float16', True),  # all blocks, one warpgroup
        (1, 30, 400, 1, 64, 16, 6, 'bfloat16', False),  # eight blocks a tile
        (1, 40, 300, 2, 128, 32, 4, 'float8_e4m3fn', False),
        (2, 5, 7, 2, 64, 64, 2, 'bfloat16', True),  # less than one block, more k than blocks
    ],
)
def test_selection_equals_the_xla_form(B, T, S, K, Di, block, top_k, dtype, packed):
  *arrays, segments = inputs(B, T, S, K, Di, dtype=dtype)
  assert_same_blocks((*arrays, segments if packed else None), block, top_k)


@pytest.mark.parametrize('B, T, S, top_k, packed', [(1, 1, 1500, 8, False), (2, 4, 700, 3, True)])
def test_decoding_merges_the_parts_that_keys_are_split_in(monkeypatch, B, T, S, top_k, packed):
  monkeypatch.setattr(index_gpu, 'CORES', 132)
  *arrays, segments = inputs(B, T, S, 4, 64)
  assert_same_blocks((*arrays, segments if packed else None), 32, top_k)


def test_further_passes_over_keys_in_parts_find_the_blocks_behind(monkeypatch):
  monkeypatch.setattr(index_gpu, 'CORES', 3)
  monkeypatch.setattr(index_gpu, 'MOST', 2)
  *arrays, _ = inputs(*SHAPE)
  assert_same_blocks((*arrays, None), top_k=4)


def test_selection_of_whole_packed_rows_equals_the_oracle():
  index_q, index_k, slots, (segments, _) = inputs(1, 300, 300, 1, 64)
  got = select(index_q, index_k, slots, (segments, segments))
  np.testing.assert_array_equal(got, reference.msa_select(index_q, index_k, segments, BLOCK, TOP_K))


def test_segments_out_of_order_are_kept_apart():
  """Documents of a row need not ascend, nor stand together: only equality counts."""
  index_q, index_k, slots, _ = inputs(*SHAPE)
  rng = np.random.default_rng(1)
  segments = jnp.asarray(rng.permutation(np.repeat(np.arange(1, 5), 160)).reshape(1, 640), jnp.int32)
  assert_same_blocks((index_q, index_k, slots, (segments[:, -24:], segments)))
  runs = jnp.asarray(np.repeat([3, 1, 2, 1, 3], 128)[None], jnp.int32)
  for queries in ([1, 2], [1, 1]):
    assert_same_blocks((index_q, index_k, slots, (jnp.asarray(np.repeat(queries, 12)[None], jnp.int32), runs)))


@pytest.mark.parametrize('cores', [1, 3])
def test_ties_go_to_the_lower_block_after_the_own_block(monkeypatch, cores):
  monkeypatch.setattr(index_gpu, 'CORES', cores)
  index_q, _, slots, _ = inputs(*SHAPE)
  index_q = jnp.where(jnp.arange(24)[None, :, None, None] < 12, index_q, 0)
  rng = np.random.default_rng(2)
  keys = rng.integers(-4, 5, (12, 64))
  keys[6:] = keys[5]
  index_k = jnp.asarray(keys[rng.integers(0, 12, 640)][None], jnp.bfloat16)
  ids = assert_same_blocks((index_q, index_k, slots, None))
  assert (np.diff(ids[:, 12:, :, 1:], axis=-1) > 0).all()
  assert (ids[..., 0] == np.asarray(slots)[..., None] // BLOCK).all()


def test_own_block_comes_first_even_when_it_scores_worst():
  index_q, index_k, slots, _ = inputs(*SHAPE)
  index_q, index_k = jnp.ones_like(index_q), jnp.ones_like(index_k).at[:, 576:].set(-5)
  assert (assert_same_blocks((index_q, index_k, slots, None)) == [9, 0, 1, 2, 3, 4]).all()
  assert (assert_same_blocks((index_q, index_k, slots, None), top_k=1) == 9).all()


@pytest.mark.parametrize('packed', [False, True])
def test_padding_picks_nothing(packed):
  index_q, index_k, slots, segments = inputs(*SHAPE)
  padding = (np.arange(24) % 3 == 0) | (np.arange(24) > 20)
  ids = assert_same_blocks((index_q, index_k, jnp.where(padding, -1, slots), segments if packed else None))
  assert (ids[:, padding] == -1).all() and (ids[:, ~padding, :, 0] >= 0).all()
  assert (select(index_q, index_k, jnp.full_like(slots, -1), segments if packed else None) == -1).all()


def test_nan_in_keys_that_are_not_seen_never_reaches_the_ids():
  index_q, index_k, slots, _ = inputs(*SHAPE)
  slots = slots - 180  # garbage behind the last query, as in a cache
  key_segments = jnp.asarray(np.repeat([1, 2, 3, 4], 160)[None], jnp.int32)
  segments = jnp.full((1, 24), 2, jnp.int32).at[:, -5:].set(3), key_segments
  poison = lambda unseen: jnp.where(unseen[..., None], jnp.nan, index_k)
  behind = jnp.arange(640)[None] > slots.max()
  np.testing.assert_array_equal(select(index_q, poison(behind), slots, None), select(index_q, index_k, slots, None))
  ids = lambda unseen: select(index_q, poison(unseen), slots, segments)
  nothing = jnp.zeros_like(behind)
  np.testing.assert_array_equal(ids((key_segments == 1) | behind), ids(nothing))
  np.testing.assert_array_equal(ids(key_segments == 3)[:, :-5], ids(nothing)[:, :-5])


def test_tiles_that_no_query_sees_are_skipped_and_those_that_all_see_are_not_masked():
  slots = jnp.asarray([[70, 90, 150, -1, 300, -1, 256, 511, 511, 540, -1, 600, -1, -1, -1, -1]], jnp.int32)
  tiles = jax.jit(lambda *a: index_gpu._tiles(*a, 4, 6))
  # From the first tile of 128 keys on, to the end; without a mask from, to.
  assert tiles(slots, None).tolist() == [[[0, 2, 0, 0], [0, 4, 0, 2], [0, 5, 0, 4], [0, 0, 0, 0]]]
  key_segments = np.repeat([1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 5, 5], 64).astype(np.int32)[None]
  segments = jnp.take_along_axis(jnp.asarray(key_segments), jnp.maximum(slots, 0), axis=1)
  first, second, third, nothing = tiles(slots, (segments, jnp.asarray(key_segments)))[0].tolist()
  assert (first[:2], second[:2], third, nothing[:2]) == ([0, 2], [1, 4], [1, 5, 6, 6], [0, 0])
  third = jnp.asarray([[511, 540, -1, 575]], jnp.int32)
  assert tiles(third, (jnp.full((1, 4), 4), jnp.asarray(key_segments))).tolist() == [[[1, 5, 2, 4]]]


def test_copies_and_barriers_have_no_races(monkeypatch, races):
  """Five tiles of keys go through two stages of shared memory, into two warpgroups."""
  monkeypatch.setattr(index_gpu, 'STAGE_BYTES', 2 * index_gpu.KEYS * 64 * 2)
  *arrays, segments = inputs(1, 40, 640, 2, 64)
  assert_same_blocks((*arrays, segments), 128, 3, detect_races=True)
  assert not races()


def test_selection_has_no_gradient():
  index_q, index_k, slots, segments = inputs(1, 4, 40, 1, 64)

  def total(index_q, index_k):
    ids = index_gpu.select_blocks_gpu(index_q, index_k, slots, segments, 8, 2, interpret=hopper.simulator())
    return jnp.sum(ids.astype(jnp.float32)) + 0 * jnp.sum(index_q.astype(jnp.float32))

  assert all((gradient == 0).all() for gradient in jax.jit(jax.grad(total, (0, 1)))(index_q, index_k))


def test_lowers_for_hopper_on_a_cpu_host():
  args = inputs(1, 64, 512, 4, 128)
  function = lambda *a: index_gpu.select_blocks_gpu(*a, 128, 16)
  assert jax.jit(function).trace(*args).lower(lowering_platforms=('cuda',)).as_text().count('mosaic_gpu_v2') == 1


def test_unsupported_names_what_it_cannot_serve():
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  reason = lambda Di=128, block=128, dtype=jnp.bfloat16: index_gpu.unsupported(
      array(1, 64, 4, Di, dtype=dtype), array(1, 2**20, Di), block
  )
  assert reason() == ''
  for kwargs, word in [({'Di': 32}, '32'), ({'block': 24}, '24'), ({'dtype': jnp.float32}, 'float32'),
                       ({'dtype': jnp.float8_e4m3fn}, 'float8_e4m3fn and')]:
    assert word in reason(**kwargs)
