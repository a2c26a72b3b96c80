"""Attention to stretches of keys on Hopper, in its simulator, against the oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention_tpu import assert_same, make as in_either_dtype

from mmx import sharding
from mmx.config import MeshConfig
from mmx.kernels_pallas import api, attention, attention_gpu, hopper, reference
from mmx.kernels_pallas.attention_gpu import (
    FEW, KEYS, TILE, attention_cached_hopper, attention_hopper, sliding_hopper, unsupported,
)
from mmx.kernels_pallas.chunks import Part, sight
from mmx.layers import context_parallel
from mmx.layers.context_parallel import swapped_slots

pytestmark = pytest.mark.usefixtures('compiled_once')


def make(B, S, H, K, Dh):
  return in_either_dtype(B, S, H, K, jnp.bfloat16, Dh)


@pytest.mark.parametrize('shape', [
    (2, 200, 2, 1, 64), pytest.param((1, 130, 3, 3, 128), marks=pytest.mark.slow),  # 8 s
], ids=str)
def test_values_and_gradients_are_those_of_full_attention_within_documents(shape):
  *floats, segments = make(*shape)
  attend = lambda q, k, v: attention_hopper(q, k, v, segments, interpret=hopper.simulator())
  assert_same(attend, lambda q, k, v: reference.attention(q, k, v, segments), *floats)


@pytest.mark.parametrize('index', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_part_of_the_queries_sees_keys_of_whole_rows(index):
  """Two runs of 70 queries, in rising order of slots and in falling."""
  *floats, segments = make(1, 280, 2, 1, 64)
  slots = swapped_slots(2, 140)
  part = Part(slots, jnp.int32(index), segments)
  attend = lambda q, k, v: attention_hopper(
      q, k, v, segments[:, slots[index]], part=part, interpret=hopper.simulator()
  )
  assert_same(attend, lambda q, k, v: reference.attention(q, k, v, segments), *floats, slots=slots[index])


@pytest.mark.parametrize('window, start', [pytest.param(50, 0, marks=pytest.mark.slow), (129, 37)])
def test_a_window_sees_what_the_sliding_oracle_does(window, start):
  *floats, segments = make(1, 200, 2, 1, 64)
  slots = np.arange(start, 200)
  # In place of positions in documents: within one, their differences are the same.
  positions = jnp.arange(200, dtype=jnp.int32)[None]
  attend = lambda q, k, v: sliding_hopper(q, k, v, segments, window, start=start, interpret=hopper.simulator())
  oracle = lambda q, k, v: reference.sliding(q, k, v, segments, positions, window, 0)
  assert_same(attend, oracle, *floats, slots=slots)


@pytest.mark.parametrize('lengths, T, H, K, processors', [
    ((300, 41), 1, 4, 2, 132),  # parts of one tile of keys, of which the second row has but one
    ((250, 2), 4, 3, 1, 5),  # two parts; padding in front
    pytest.param((400,), 50, 6, 2, 2, marks=pytest.mark.slow),  # two tiles of queries, in one part
], ids=str)
def test_new_tokens_see_what_the_cache_holds_up_to_their_own(lengths, T, H, K, processors, monkeypatch):
  monkeypatch.setattr(attention_gpu, 'MULTIPROCESSORS', processors)
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  q, k, v = (normal(len(lengths), *shape) for shape in ((T, H, 64), (K, 512, 64), (K, 512, 64)))
  positions = jnp.maximum(jnp.array(lengths, jnp.int32)[:, None] + jnp.arange(T, dtype=jnp.int32)[None] - T, -1)
  found = jax.jit(lambda *a: attention_cached_hopper(*a, interpret=hopper.simulator()))(q, k, v, positions)
  wanted = attention.attention_cached(*(x.astype(jnp.float32) for x in (q, k, v)), positions)
  assert found.dtype == jnp.bfloat16 and jnp.all(found[positions < 0] == 0)
  wanted = jnp.where((positions >= 0)[..., None, None], wanted, 0)
  np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=0, atol=1e-2 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize('slots, kernels', [(256, True), (200, False)])
def test_a_cache_of_other_lengths_than_whole_tiles_is_served_all_the_same(slots, kernels):
  array = lambda *shape: jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16)
  attend = lambda *a: api.attend_cached(*a, implementation='hopper', platform='gpu')
  made = jax.make_jaxpr(attend)(array(1, 4, 64), *[array(2, slots, 64)] * 2, jax.ShapeDtypeStruct((2, 1), jnp.int32))
  assert ('wgmma' in str(made)) == kernels and made.out_avals[0].shape == (2, 1, 4, 64)


def in_xla(q, k, v, first, last, n, interpret):
  """In place of the kernels, which the simulator runs on one device only."""
  (B, T, H, Dh), (S, K) = q.shape, k.shape[1:3]
  key = jnp.arange(S, dtype=jnp.int32)[None, None]
  seen = (first[:, :, None] <= key) & (key <= last[:, :, None])
  scores = jnp.einsum('btkgd,bskd->bkgts', q.reshape(B, T, K, H // K, Dh), k) * Dh**-0.5
  weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum('bkgts,bskd->btkgd', weights, v).reshape(q.shape)


@pytest.mark.parametrize('axes, heads', [
    ({'context': 4}, (2, 4, 2)), ({'context': 2, 'tensor': 2}, (2, 4, 2)), ({'fsdp': 2, 'tensor': 2}, (2, 4, 2)),
    ({'fsdp': 2, 'expert': 2, 'tensor': 2}, (2, 3, 1)), ({'fsdp': 2}, (3, 2, 1)),  # some axes divide neither
], ids=str)
@pytest.mark.parametrize('what', ['full', 'window'])
def test_shards_of_rows_tokens_and_heads_are_told_what_they_see(what, axes, heads, monkeypatch):
  monkeypatch.setattr(attention_gpu, '_attend', in_xla)
  mesh = sharding.build_mesh(MeshConfig(**{'fsdp': 1} | axes, num_devices=int(np.prod(list(axes.values())))))
  B, H, K = heads
  *floats, segments = make(B, 160, H, K, 64)
  positions = jnp.broadcast_to(jnp.arange(160, dtype=jnp.int32), segments.shape)
  choice = {'mesh': mesh, 'implementation': 'hopper', 'platform': 'gpu'}
  if what == 'full':
    attend = lambda *qkv: context_parallel.attend(*qkv, segments, **choice)
    oracle = lambda *qkv: reference.attention(*qkv, segments)
  else:
    attend = lambda *qkv: context_parallel.slide(*qkv, segments, positions, window=90, sink_tokens=0, **choice)
    oracle = lambda *qkv: reference.sliding(*qkv, segments, positions, 90)
  assert 'shard_map' in str(jax.make_jaxpr(attend)(*floats[:3]))
  assert_same(attend, oracle, *floats)


def test_nothing_races_where_memory_is_used_again(races):
  """Five tiles of keys through room for two, forward and backward."""
  q, k, v, cotangent, _ = make(1, 300, 1, 1, 64)
  segments = jnp.ones((1, 300), jnp.int32)
  attend = lambda q, k, v: attention_hopper(q, k, v, segments, interpret=hopper.simulator(detect_races=True))
  assert_same(attend, lambda q, k, v: reference.attention(q, k, v, segments), q, k, v, cotangent)
  assert not races()


def test_nan_of_tiles_that_a_document_does_not_meet_reaches_none_of_its_values_and_gradients():
  *floats, _ = make(1, 2 * TILE, 2, 1, 64)
  segments = jnp.repeat(jnp.array([[1, 2]], jnp.int32), TILE, axis=1)
  first = lambda x: x[:, :TILE]
  poisoned = lambda x: jnp.concatenate([x, jnp.full_like(x, jnp.nan)], axis=1)
  attend = lambda *a: first(attention_hopper(*map(poisoned, a), segments, interpret=hopper.simulator()))
  oracle = lambda *a: reference.attention(*a, first(segments))
  assert_same(attend, oracle, *map(first, floats))


@pytest.mark.parametrize('window', [None, 1, 100, 700])
def test_tiles_that_meet_are_those_of_which_any_query_sees_any_key(window):
  T = S = 1024
  segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, S)), axis=1), jnp.int32)
  slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
  first, last = sight(segments, slots, window)
  sights = jnp.stack([first, last], axis=1)
  key = np.arange(S)
  seen = (np.asarray(first)[:, :, None] <= key) & (key <= np.asarray(last)[:, :, None])
  tiles = lambda rows, keys: seen.reshape(2, T // rows, rows, S // keys, keys)
  for keys in (KEYS, FEW):
    begin, end, whole, whole_end = (np.asarray(attention_gpu._met_keys(sights, S, keys))[..., i, None] for i in range(4))
    tile = np.arange(S // keys)
    np.testing.assert_array_equal((begin <= tile) & (tile < end), tiles(TILE, keys).any(axis=(2, 4)))
    np.testing.assert_array_equal((whole <= tile) & (tile < whole_end), tiles(TILE, keys).all(axis=(2, 4)))
  begin, end = (np.asarray(attention_gpu._met_queries(sights, 2, S))[:, :, 0, i, None] for i in range(2))
  tile = np.arange(T // FEW)
  np.testing.assert_array_equal((begin <= tile) & (tile < end), tiles(FEW, TILE).any(axis=(2, 4)).swapaxes(1, 2))


@pytest.mark.parametrize('change, word', [
    (dict(H=7), 'kv heads'), (dict(dtype=jnp.float32), 'float32'), (dict(Dh=96), 'head dim'), (dict(), ''),
], ids=str)
def test_what_does_not_compile_is_named(change, word):
  shape = dict(H=8, Dh=64, dtype=jnp.bfloat16) | change
  array = lambda heads: jax.ShapeDtypeStruct((1, 256, heads, shape['Dh']), shape['dtype'])
  reason = unsupported(array(shape['H']), array(2))
  assert word in reason and bool(reason) == bool(word)
