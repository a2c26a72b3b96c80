"""Attention to stretches of keys by TPU kernels, in interpret mode, against the oracles in values and gradients; and to
what is written of a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mmx import sharding
from mmx.config import MeshConfig
from mmx.kernels_pallas import api, attention, attention_tpu, reference
from mmx.kernels_pallas.attention_tpu import attention_cached_pallas, attention_pallas, sliding_pallas
from mmx.kernels_pallas.chunks import Part, sight
from mmx.layers import context_parallel
from mmx.layers.context_parallel import swapped_slots


@pytest.fixture
def small(monkeypatch):
  """small(rows, keys, span): steps, tiles and spans of at most so many, as in longer rows."""
  def make(rows=64, keys=128, span=None):
    monkeypatch.setattr(attention_tpu, 'ROWS', rows)
    monkeypatch.setattr(attention_tpu, 'KEYS', keys)
    monkeypatch.setattr(attention_tpu, 'FEW', keys)
    if span:
      monkeypatch.setattr(attention_tpu, 'cut', lambda S, *_: (-(-S // span), span))

  return make


# ----------------------------------------------------------------------------------------------------------------------
# rows


def make(B, S, H, K, dtype=jnp.float32, Dh=128):
  """q, k, v, a cotangent, segments: documents packed, the first row's last 9 tokens padding."""
  rng = np.random.default_rng(0)
  normal = lambda heads: jnp.asarray(rng.normal(size=(B, S, heads, Dh)), dtype)
  segments = np.sort(rng.integers(1, 4, (B, S)), axis=1)
  segments[0, S - 9 :] = 0
  return normal(H), normal(K), normal(K), normal(H), jnp.asarray(segments, jnp.int32)


def assert_same(attend, oracle, q, k, v, cotangent, slots=None):
  """Of attend(queries at `slots`, k, v) and oracle(q, k, v) there: outputs and gradients."""
  here = lambda x: x if slots is None else x[:, slots]
  float32 = lambda *arrays: tuple(x.astype(jnp.float32) for x in arrays)
  tolerance = 1e-5 if q.dtype == jnp.float32 else 1e-2

  def run(function, *arrays):
    def total(*arrays):
      out = function(*arrays)
      return jnp.sum(out.astype(jnp.float32) * here(cotangent).astype(jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
    return out, *gradients

  found = run(attend, here(q), k, v)
  out, dq, *rest = run(lambda *a: here(oracle(*a)), *float32(q, k, v))
  for got, want in zip(found, (out, here(dq), *rest), strict=True):
    assert got.dtype == q.dtype and got.shape == want.shape
    got, want = np.asarray(got, np.float32), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize('shape, span', [
    ((2, 200, 4, 2), None), ((1, 384, 3, 1), 256),  # the last span begins within the one before
    ((1, 130, 2, 2, jnp.bfloat16), None), pytest.param((1, 256, 2, 1, jnp.float32, 256), None, marks=pytest.mark.slow),
], ids=str)
def test_values_and_gradients_are_those_of_full_attention_within_documents(shape, span, small):
  small(span=span)
  *floats, segments = make(*shape)
  attend = lambda q, k, v: attention_pallas(q, k, v, segments, interpret=True)
  assert_same(attend, lambda q, k, v: reference.attention(q, k, v, segments), *floats)


@pytest.mark.parametrize('index', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_part_of_the_queries_sees_keys_of_whole_rows(index, small):
  """Two runs of 128 queries, of which a step never has some of both; spans that no query of a part's sees."""
  small(span=128)
  *floats, segments = make(1, 512, 2, 1)
  slots = swapped_slots(2, 256)
  part = Part(slots, jnp.int32(index), segments)
  attend = lambda q, k, v: attention_pallas(q, k, v, segments[:, slots[index]], part=part, interpret=True)
  assert_same(attend, lambda q, k, v: reference.attention(q, k, v, segments), *floats, slots=slots[index])


@pytest.mark.parametrize('window, start, span', [
    (50, 0, 128), pytest.param(129, 37, None, marks=pytest.mark.slow),
])
def test_a_window_sees_what_the_sliding_oracle_does(window, start, span, small):
  small(span=span)
  *floats, segments = make(2, 300, 2, 1)
  slots = np.arange(start, 300)
  # In place of positions in documents: within one, their differences are the same.
  positions = jnp.broadcast_to(jnp.arange(300, dtype=jnp.int32), segments.shape)
  attend = lambda q, k, v: sliding_pallas(q, k, v, segments, window, start=start, interpret=True)
  oracle = lambda q, k, v: reference.sliding(q, k, v, segments, positions, window, 0)
  assert_same(attend, oracle, *floats, slots=slots)


@pytest.mark.parametrize('what, axes', [
    ('full', {'context': 2, 'tensor': 2}), ('full', {'fsdp': 2, 'tensor': 2}), ('window', {'context': 2, 'tensor': 2}),
    pytest.param('window', {'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow),
], ids=str)
def test_shards_of_rows_tokens_and_heads_are_told_what_they_see(what, axes, small, monkeypatch):
  small()
  for name in ('attention_pallas', 'sliding_pallas'):
    monkeypatch.setattr(attention_tpu, name, functools.partial(getattr(attention_tpu, name), interpret=True))
  mesh = sharding.build_mesh(MeshConfig(**{'fsdp': 1} | axes, num_devices=4))
  *floats, segments = make(2, 160, 4, 2)
  positions = jnp.broadcast_to(jnp.arange(160, dtype=jnp.int32), segments.shape)
  choice = {'mesh': mesh, 'implementation': 'pallas', 'platform': 'tpu'}
  if what == 'full':
    attend = lambda *qkv: context_parallel.attend(*qkv, segments, **choice)
    oracle = lambda *qkv: reference.attention(*qkv, segments)
  else:
    attend = lambda *qkv: context_parallel.slide(*qkv, segments, positions, window=90, sink_tokens=0, **choice)
    oracle = lambda *qkv: reference.sliding(*qkv, segments, positions, 90)
  text = str(jax.make_jaxpr(attend)(*floats[:3]))
  assert 'shard_map' in text and 'name=attend' in text
  assert_same(attend, oracle, *floats)


def test_nan_of_tiles_that_a_document_does_not_meet_reaches_none_of_its_values_and_gradients(small):
  small()
  *floats, _ = make(1, 256, 2, 1)
  segments = jnp.repeat(jnp.array([[1, 2]], jnp.int32), 128, axis=1)
  first = lambda x: x[:, :128]
  poisoned = lambda x: jnp.concatenate([x, jnp.full_like(x, jnp.nan)], axis=1)
  attend = lambda *a: first(attention_pallas(*map(poisoned, a), segments, interpret=True))
  oracle = lambda *a: reference.attention(*a, first(segments))
  assert_same(attend, oracle, *map(first, floats))


@pytest.mark.parametrize('window', [None, 1, 100, 700])
def test_tiles_that_meet_are_those_of_which_any_query_sees_any_key(window):
  S, t, s = 1024, 64, 128
  segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, S)), axis=1), jnp.int32)
  slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (2, S))
  first, last = sight(segments, slots, window)
  begin, end, whole, whole_end = (np.asarray(attention_tpu.met(first, last, t, s, S))[..., i, None] for i in range(4))
  key, tile = np.arange(S), np.arange(S // s)
  seen = (np.asarray(first)[:, :, None] <= key) & (key <= np.asarray(last)[:, :, None])
  tiles = seen.reshape(2, S // t, t, S // s, s)
  np.testing.assert_array_equal((begin <= tile) & (tile < end), tiles.any(axis=(2, 4)))
  np.testing.assert_array_equal((whole <= tile) & (tile < whole_end), tiles.all(axis=(2, 4)))
  assert np.all((begin <= whole) & (whole <= whole_end) & (whole_end <= end))


# ----------------------------------------------------------------------------------------------------------------------
# a cache


def inputs(lengths, T, H, K, Dh, S, dtype=jnp.float32):
  """q, keys, values, positions of rows of these lengths whose last T tokens are asked; NaN in every slot behind."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(len(lengths), *shape)) for shape in ((T, H, Dh), (K, S, Dh), (K, S, Dh)))
  for row, length in enumerate(lengths):
    k[row, :, length:], v[row, :, length:] = np.nan, np.nan
  positions = np.maximum(np.array(lengths)[:, None] - T + np.arange(T), -1)
  return *(jnp.asarray(a, dtype) for a in (q, k, v)), jnp.asarray(positions, jnp.int32)


def assert_as_in_xla(found, arguments, rtol=1e-5, atol=1e-6):
  """As the form in XLA, which multiplies what it masks by 0."""
  *floats, positions = arguments
  assert found.dtype == floats[0].dtype and np.all(np.isfinite(found))
  wanted = attention.attention_cached(*(jnp.nan_to_num(x.astype(jnp.float32)) for x in floats), positions)
  there = np.asarray(positions >= 0)
  np.testing.assert_allclose(np.asarray(found, np.float32)[there], np.asarray(wanted)[there], rtol=rtol, atol=atol)


SHAPES = {  # lengths, T, H, K, Dh, S; tiles of at most so many keys, steps of at most so many rows
    'a token, tiles that are not read': ((300, 41), 1, 4, 2, 128, 640, 128, 1024),
    'a group of 3, an odd number of steps, a tile that reaches back': ((250, 140, 2), 4, 9, 3, 128, 272, 128, 1024),
    'several steps, the last not full': ((400, 130), 50, 8, 2, 128, 416, 128, 64),
    'rows without tokens before and behind others': ((0, 70, 0, 5), 3, 2, 2, 256, 96, 32, 1024),
}


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_new_tokens_see_what_the_cache_holds_up_to_their_own(shape, small):
  *shape, keys, rows = shape
  small(rows, keys)
  arguments = inputs(*shape)
  assert_as_in_xla(attention_cached_pallas(*arguments, interpret=True), arguments)


def test_bfloat16_is_rounded_once_before_each_product_and_at_the_end():
  arguments = inputs((600, 90), 2, 8, 2, 128, 608, jnp.bfloat16)
  assert_as_in_xla(attention_cached_pallas(*arguments, interpret=True), arguments, rtol=0.02, atol=0.01)


def test_rows_and_heads_are_split_over_a_mesh():
  mesh = sharding.build_mesh(MeshConfig(fsdp=2, tensor=2, num_devices=4))
  arguments = inputs((70, 33), 2, 4, 2, 128, 96)
  attend = jax.jit(lambda *a: attention_cached_pallas(*a, mesh, interpret=True))
  assert_as_in_xla(attend(*arguments), arguments)
  assert 'f32[1,1,96,128]' in str(jax.make_jaxpr(attend)(*arguments))  # a row's keys of one head


@pytest.mark.parametrize('implementation, platform, slots, kernel', [
    ('auto', 'tpu', 96, True), ('splash', 'tpu', 96, True), ('pallas', 'tpu', 96, True), ('pallas', 'tpu', 100, False),
    ('chunked', 'tpu', 96, False), ('auto', 'gpu', 96, False), ('auto', 'cpu', 96, False),
])
def test_a_cache_is_served_where_the_platform_and_its_length_allow(implementation, platform, slots, kernel):
  array = lambda *shape: jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16)
  attend = lambda *a: api.attend_cached(*a, implementation=implementation, platform=platform)
  keys = array(2, slots, 128)
  made = jax.make_jaxpr(attend)(array(1, 4, 128), keys, keys, jax.ShapeDtypeStruct((2, 1), jnp.int32))
  assert ('name=attend' in str(made)) == kernel and made.out_avals[0].shape == (2, 1, 4, 128)


# ----------------------------------------------------------------------------------------------------------------------
# all


@pytest.mark.parametrize('when', ['eager', 'on_wait'])
@pytest.mark.parametrize('what', ['rows', 'cache'])
def test_copies_have_arrived_before_they_are_read_and_none_is_left(what, when, capfd, small):
  """In a simulator of memory and semaphores; what nothing wrote is NaN there, so a missed copy shows in the values."""
  pltpu.reset_tpu_interpret_mode_state()
  simulator = pltpu.InterpretParams(dma_execution_mode=when, detect_races=True, uninitialized_memory='nan')
  if what == 'rows':
    small(rows=64, span=256)
    *floats, segments = make(1, 384, 2, 1)
    attend = lambda q, k, v: attention_pallas(q, k, v, segments, interpret=simulator)
    assert_same(attend, lambda q, k, v: reference.attention(q, k, v, segments), *floats)
  else:
    small(keys=32)
    arguments = inputs((80, 0, 9), 2, 4, 2, 128, 80)
    assert_as_in_xla(attention_cached_pallas(*arguments, interpret=simulator), arguments)
  told = capfd.readouterr()
  assert 'RACE' not in told.out + told.err and 'non-zero count' not in told.out + told.err


@pytest.mark.parametrize('change, word', [
    (dict(H=7), 'kv heads'), (dict(H=256), 'kv head;'), (dict(dtype=jnp.float16), 'float16'), (dict(Dh=64), 'head dim'),
    (dict(), ''),
], ids=str)
def test_what_does_not_compile_is_named(change, word):
  shape = dict(H=8, Dh=128, dtype=jnp.bfloat16) | change
  array = lambda heads: jax.ShapeDtypeStruct((1, 96, heads, shape['Dh']), shape['dtype'])
  reason = attention_tpu.unsupported(array(shape['H']), array(2))
  assert word in reason and bool(reason) == bool(word)
  if reason:
    attend = functools.partial(api.attend, implementation='pallas', platform='tpu')
    with pytest.raises(api.UnsupportedError, match=f"'pallas' cannot be used here: .*{word}"):
      jax.eval_shape(attend, array(shape['H']), array(2), array(2), jax.ShapeDtypeStruct((1, 96), jnp.int32))


def test_lengths_that_splash_does_not_serve_are_served_on_tpu():
  array = lambda heads: jax.ShapeDtypeStruct((1, 200, heads, 128), jnp.bfloat16)
  attend = functools.partial(api.attend, implementation='auto', platform='tpu')
  made = jax.make_jaxpr(attend)(array(4), array(2), array(2), jax.ShapeDtypeStruct((1, 200), jnp.int32))
  assert 'name=attend' in str(made)
