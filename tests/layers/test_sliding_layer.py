"""The sliding-window layer: a full layer where the window is wide, a ring where it is not, decode = prefill = train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import one_mixer
import tiny
from one_mixer import close, packed, serve

from mmx.layers import attention, sliding
from mmx.layers.context import Context

LENGTH = 40
build = functools.partial(one_mixer.build, sliding.Sliding, length=LENGTH)


def model(window, sink_tokens=0, **overrides):
  sight = {'model__sliding__window': window, 'model__sliding__sink_tokens': sink_tokens}
  return tiny.experiment(**sight | {'model__key_shift': 'learned'} | overrides).model


@pytest.mark.parametrize('norm', ['rms', 'gemma'])
@pytest.mark.parametrize('qk_norm', ['full_width', 'per_head'])
def test_a_window_as_long_as_the_context_is_full_attention(norm, qk_norm):
  config = model(LENGTH, 0, model__norm=norm, model__attention__qk_norm=qk_norm)
  mixer, tree, x_BTD, context = build(config)
  full = attention.Attention(config, 1.0, None)
  (found, _, aux), (wanted, _, _) = (jax.jit(m.apply)(tree, x_BTD, context, 0, None) for m in (mixer, full))
  assert aux is None
  close(found, wanted)


# Ragged prefill, continued prefill, rows that sit a step or a prefill out, decoding to the end.
CHUNKS = [(20, (20, 9, 2)), (20, (10, 16, 20)), (1, (1, 0, 1)), (20, (0, 5, 12))]
CHUNKS += [(1, (1, 1, 1))] * 5 + [(1, (1, 1, 0))] * 4 + [(1, (0, 1, 0))]


@pytest.mark.parametrize('window, sink_tokens', [(7, 0), (7, 3), (2, 5), (64, 2)])
def test_decode_equals_prefill_equals_train(window, sink_tokens):
  config = model(window, sink_tokens)
  mixer, tree, x_BTD, context = build(config, rows=3)
  wanted, cache, _ = jax.jit(mixer.apply)(tree, x_BTD, context, jnp.int32(1), None)
  assert cache is None
  cache = sliding.init_cache(config, 3, LENGTH, jnp.float32)
  assert cache['k'].shape[1] == min(window + sink_tokens, LENGTH)
  found, last, _ = serve(mixer, tree, cache, x_BTD, CHUNKS)
  close(found, wanted)
  again, *_ = serve(mixer, tree, last, x_BTD, CHUNKS)  # a used cache: a row that starts at 0 is another document
  close(again, wanted)


def test_ring_holds_the_sinks_and_the_last_of_the_window():
  config = model(5, 2, model__key_shift='none')
  cache = sliding.init_cache(config, 2, 1000, jnp.bfloat16)
  positions_BT = jnp.asarray([np.arange(23), np.arange(23)], jnp.int32)
  segments_BT = jnp.asarray(np.arange(23) < np.array([[23], [4]]), jnp.int32)
  k = jnp.broadcast_to(positions_BT[..., None, None], (2, 23, 2, 8)).astype(jnp.float32)
  cache = sliding.remember(cache, k, -k, Context(positions_BT, segments_BT), 2)
  np.testing.assert_array_equal(cache['positions'], [[0, 1, 22, 18, 19, 20, 21], [0, 1, 2, 3, -1, -1, -1]])
  np.testing.assert_array_equal(cache['k'][0, :, 0, 0].astype(jnp.float32), [0, 1, 22, 18, 19, 20, 21])
  np.testing.assert_array_equal(cache['v'], -cache['k'])


def test_cache_and_step_are_the_same_for_a_million_tokens():
  config = model(16, 2)
  mixer, tree, x_BTD, _ = build(config)
  now = Context(jnp.full((1, 1), 999, jnp.int32), jnp.ones((1, 1), jnp.int32))
  traces = []
  for max_length in (1024, 2**20):
    cache = sliding.init_cache(config, 1, max_length, jnp.bfloat16)
    traces.append(str(jax.make_jaxpr(lambda x, cache: mixer.apply(tree, x, now, 1, cache)[:2])(x_BTD[:, :1], cache)))
  assert traces[0] == traces[1]


@pytest.mark.parametrize('sink_tokens', [0, 2])
def test_layer_sees_its_window_and_its_sinks_and_nothing_else_by_gradient(sink_tokens):
  mixer, tree, x_BTD, context = build(model(7, sink_tokens, model__key_shift='none'))
  at, slot = 30, np.arange(LENGTH)
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(mixer.apply(tree, x, context, 0, None)[0][0, at])))(x_BTD)
  seen = (slot <= at) & ((slot > at - 7) | (slot < sink_tokens))
  np.testing.assert_array_equal(np.abs(gradient[0]).sum(axis=-1) > 0, seen)


def test_packing_isolates_documents():
  mixer, tree, x_BTD, _ = build(model(7, 2))
  apply = jax.jit(lambda x, context: mixer.apply(tree, x, context, 0, None)[0])
  loud = jnp.where((jnp.arange(LENGTH) >= 11) & (jnp.arange(LENGTH) < 30), 1.0, 100.0)[None, :, None]
  close(apply(x_BTD * loud, packed(11, 19, 10))[:, 11:30], apply(x_BTD[:, 11:30], packed(19)))


def test_bfloat16_in_bfloat16_out():
  mixer, tree, x_BTD, context = build(model(7, 2))
  exact, _, _ = jax.jit(mixer.apply)(tree, x_BTD, context, 0, None)
  rounded, _, _ = jax.jit(mixer.apply)(tree, x_BTD.astype(jnp.bfloat16), context, 0, None)
  assert rounded.dtype == jnp.bfloat16
  close(rounded.astype(jnp.float32), exact, 0.04)
