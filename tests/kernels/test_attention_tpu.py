"""Full attention to a cache by a TPU kernel, in interpret mode: a query sees what is written up to its own slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mmx import sharding
from mmx.config import MeshConfig
from mmx.kernels_pallas import api, attention, attention_tpu
from mmx.kernels_pallas.attention_tpu import attention_cached_pallas


def inputs(lengths, T, H, K, Dh, S, dtype=jnp.float32):
  """q, keys, values, positions of rows of these lengths whose last T tokens are asked; NaN in every slot behind."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(len(lengths), *shape)) for shape in ((T, H, Dh), (K, S, Dh), (K, S, Dh)))
  for row, length in enumerate(lengths):
    k[row, :, length:], v[row, :, length:] = np.nan, np.nan
  positions = np.maximum(np.array(lengths)[:, None] - T + np.arange(T), -1)
  return *(jnp.asarray(a, dtype) for a in (q, k, v)), jnp.asarray(positions, jnp.int32)


def assert_same(found, arguments, rtol=1e-5, atol=1e-6):
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
def test_new_tokens_see_what_the_cache_holds_up_to_their_own(shape, monkeypatch):
  *shape, keys, rows = shape
  monkeypatch.setattr(attention_tpu, 'KEYS', keys)
  monkeypatch.setattr(attention_tpu, 'ROWS', rows)
  arguments = inputs(*shape)
  assert_same(attention_cached_pallas(*arguments, interpret=True), arguments)


def test_bfloat16_is_rounded_once_before_each_product_and_at_the_end():
  arguments = inputs((600, 90), 2, 8, 2, 128, 608, jnp.bfloat16)
  assert_same(attention_cached_pallas(*arguments, interpret=True), arguments, rtol=0.02, atol=0.01)


@pytest.mark.parametrize('when', ['eager', 'on_wait'])
def test_copies_have_arrived_before_they_are_read_and_none_is_left(when, capfd, monkeypatch):
  """In a simulator of memory and semaphores; what nothing wrote is NaN there, so a missed copy shows in the values."""
  monkeypatch.setattr(attention_tpu, 'KEYS', 32)
  pltpu.reset_tpu_interpret_mode_state()
  arguments = inputs((80, 0, 9), 2, 4, 2, 128, 80)
  simulator = pltpu.InterpretParams(dma_execution_mode=when, detect_races=True, uninitialized_memory='nan')
  assert_same(attention_cached_pallas(*arguments, interpret=simulator), arguments)
  told = capfd.readouterr()
  assert 'RACE' not in told.out + told.err and 'non-zero count' not in told.out + told.err


def test_rows_and_heads_are_split_over_a_mesh():
  mesh = sharding.build_mesh(MeshConfig(fsdp=2, tensor=2, num_devices=4))
  arguments = inputs((70, 33), 2, 4, 2, 128, 96)
  attend = jax.jit(lambda *a: attention_cached_pallas(*a, mesh, interpret=True))
  assert_same(attend(*arguments), arguments)
  assert 'f32[1,1,96,128]' in str(jax.make_jaxpr(attend)(*arguments))  # a row's keys of one head


@pytest.mark.parametrize('implementation, platform, slots, kernel', [
    ('auto', 'tpu', 96, True), ('splash', 'tpu', 96, True), ('auto', 'tpu', 100, False), ('chunked', 'tpu', 96, False),
    ('auto', 'gpu', 96, False), ('auto', 'cpu', 96, False),
])
def test_it_serves_where_the_platform_and_the_cache_are_its_own(implementation, platform, slots, kernel):
  array = lambda *shape: jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16)
  attend = lambda *a: api.attend_cached(*a, implementation=implementation, platform=platform)
  keys = array(2, slots, 128)
  made = jax.make_jaxpr(attend)(array(1, 4, 128), keys, keys, jax.ShapeDtypeStruct((2, 1), jnp.int32))
  assert ('attend_cache' in str(made)) == kernel and made.out_avals[0].shape == (2, 1, 4, 128)


@pytest.mark.parametrize('change, word', [
    (dict(H=7), 'kv heads'), (dict(H=512), 'kv head;'), (dict(dtype=jnp.float16), 'float16'), (dict(Dh=64), 'head dim'),
    (dict(Dh=640), 'head dim'), (dict(S=100), 'slots'), (dict(), ''),
], ids=str)
def test_what_does_not_compile_is_named(change, word):
  shape = dict(H=8, Dh=128, S=96, dtype=jnp.bfloat16) | change
  q = jax.ShapeDtypeStruct((1, 2, shape['H'], shape['Dh']), shape['dtype'])
  keys = jax.ShapeDtypeStruct((1, 2, shape['S'], shape['Dh']), shape['dtype'])
  reason = attention_tpu.unsupported(q, keys)
  assert word in reason and bool(reason) == bool(word)
