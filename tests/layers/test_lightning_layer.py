"""The Lightning layer: the published equations, one state for any context, decode = prefill = train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import one_mixer
import tiny
from one_mixer import close, packed, serve

from mmx import sharding
from mmx.config import MeshConfig
from mmx.layers import lightning
from mmx.layers.context import Context

LENGTH, LAYERS = 40, 5
build = functools.partial(one_mixer.build, lightning.Lightning, length=LENGTH)


def model(**overrides):
  small = {'model__lightning__num_heads': 4, 'model__lightning__head_dim': 8, 'model__lightning__chunk': 16}
  depth = {'model__pattern': f'full*{LAYERS}'}  # of the pattern, a layer's decay asks for the depth alone
  return tiny.experiment(**small | depth | overrides).model


SHIFTED = model(model__key_shift='learned')


def test_slopes_are_the_published_ones():
  first = lightning.slopes(64, 0, 80)
  np.testing.assert_allclose(first, 2.0 ** (-np.arange(1, 65) / 8) * (1 + 1e-5), rtol=1e-6)
  np.testing.assert_allclose(first[jnp.array([0, 63])], [0.917, 0.0039], rtol=2e-3)
  np.testing.assert_allclose(lightning.slopes(8, 3, 5), 2.0 ** -np.arange(1.0, 9) * (0.25 + 1e-5), rtol=1e-5)
  np.testing.assert_allclose(lightning.slopes(8, 4, 5)[0], 0.5e-5, rtol=1e-5)
  np.testing.assert_allclose(lightning.slopes(1, 0, 1), [2**-8 * (1 + 1e-5)], rtol=1e-6)
  traced = jax.jit(lightning.slopes, static_argnums=(0, 2))(8, jnp.int32(3), 5)
  np.testing.assert_allclose(traced, lightning.slopes(8, 3, 5), rtol=1e-6)


@pytest.mark.parametrize('heads', [1, 2, 3, 6, 12, 40])
def test_slopes_of_any_number_of_heads_follow_alibi(heads):
  def alibi(n):
    if n & (n - 1) == 0:
      start = 2.0 ** (-8 / n)
      return [start * start**i for i in range(n)]
    below = 1 << (n.bit_length() - 1)
    return alibi(below) + alibi(2 * below)[0::2][: n - below]

  np.testing.assert_allclose(lightning.slopes(heads, 0, 2), np.array(alibi(heads)) * (1 + 1e-5), rtol=1e-6)


def test_layer_equals_the_published_equations_token_by_token():
  mixer, tree, x_BTD, context = build(SHIFTED)
  layer = 2
  found, _, aux = jax.jit(mixer.apply)(tree, x_BTD, context, jnp.int32(layer), None)
  p = {name: np.asarray(a, np.float64) for name, a in tree['params'].items()}
  assert aux is None and {name: a.shape for name, a in p.items()} == {
      'w_q': (32, 4, 8), 'w_k': (32, 4, 8), 'w_v': (32, 4, 8), 'w_gate': (32, 4, 8), 'out_norm': (32,),
      'w_o': (4, 8, 32), 'key_shift': (2, 32),
  }
  silu = lambda a: a / (1 + np.exp(-a))
  x = np.asarray(x_BTD[0], np.float64)
  state = np.zeros((4, 8, 8))
  for t in range(LENGTH):
    keys_x = p['key_shift'][0] * x[t] + p['key_shift'][1] * (x[t - 1] if t else 0)
    q, k, v = (silu(np.einsum('d,dhe->he', a, p[w])) for a, w in ((x[t], 'w_q'), (keys_x, 'w_k'), (x[t], 'w_v')))
    decay = np.exp(-(2.0 ** (-2 * np.arange(1, 5))) * (1 - layer / (LAYERS - 1) + 1e-5))
    state = decay[:, None, None] * state + np.einsum('hd,he->hde', k, v)
    o = np.einsum('hd,hde->he', q, state).reshape(-1)
    o = o / np.sqrt(np.mean(o**2) + 1e-6) * p['out_norm']
    gate = 1 / (1 + np.exp(-np.einsum('d,dhe->he', x[t], p['w_gate'])))
    close(found[0, t], jnp.asarray(np.einsum('he,hed->d', gate * o.reshape(4, 8), p['w_o'])))


# Ragged prefill, continued prefill, rows that sit a step or a prefill out, decoding to the end.
CHUNKS = [(20, (20, 9, 2)), (20, (10, 16, 20)), (1, (1, 0, 1)), (20, (0, 5, 12))]
CHUNKS += [(1, (1, 1, 1))] * 5 + [(1, (1, 1, 0))] * 4 + [(1, (0, 1, 0))]


@pytest.mark.parametrize('key_shift', ['none', 'learned'])
def test_decode_equals_prefill_equals_train(key_shift):
  config = model(model__key_shift=key_shift)
  mixer, tree, x_BTD, context = build(config, rows=3)
  wanted, cache, _ = jax.jit(mixer.apply)(tree, x_BTD, context, jnp.int32(1), None)
  assert cache is None
  found, last, _ = serve(mixer, tree, lightning.init_cache(config, 3, LENGTH, jnp.float32), x_BTD, CHUNKS)
  close(found, wanted)
  again, *_ = serve(mixer, tree, last, x_BTD, CHUNKS)  # a used cache: a row that starts at 0 is another document
  close(again, wanted)


def test_a_mesh_serves_as_one_device_does():
  """Each device keeps the states of its own rows and heads."""
  config = model()
  mixer, tree, x_BTD, _ = build(config, rows=2)
  mesh = sharding.build_mesh(MeshConfig(fsdp=2, expert=1, tensor=4))
  chunks = [(20, (20, 9)), (20, (20, 20)), (11, (0, 11))]
  new = functools.partial(lightning.init_cache, config, 2, LENGTH, jnp.float32)
  wanted, last, _ = serve(mixer, tree, new(), x_BTD, chunks)
  found, last_of_mesh, _ = serve(lightning.Lightning(config, 1.0, mesh), tree, new(), x_BTD, chunks)
  close(found, wanted)
  close(last_of_mesh['state'], last['state'])


def test_cache_is_as_small_for_a_million_tokens_and_a_step_costs_the_same():
  mixer, tree, x_BTD, _ = build(SHIFTED)
  now = Context(jnp.full((1, 1), 999, jnp.int32), jnp.ones((1, 1), jnp.int32))
  traces = []
  for max_length in (1024, 2**20):
    cache = lightning.init_cache(SHIFTED, 1, max_length, jnp.bfloat16)
    assert cache['state'].shape == (1, 4, 8, 8) and cache['state'].dtype == jnp.float32
    traces.append(str(jax.make_jaxpr(lambda x, cache: mixer.apply(tree, x, now, 1, cache)[:2])(x_BTD[:, :1], cache)))
  assert traces[0] == traces[1]


def test_layer_is_causal_by_gradient():
  mixer, tree, x_BTD, context = build(SHIFTED)
  at = 21
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(mixer.apply(tree, x, context, 1, None)[0][0, at])))(x_BTD)
  np.testing.assert_array_equal(np.abs(gradient[0]).sum(axis=-1) > 0, np.arange(LENGTH) <= at)


def test_packing_isolates_documents():
  mixer, tree, x_BTD, _ = build(SHIFTED)
  apply = jax.jit(lambda x, context: mixer.apply(tree, x, context, 1, None)[0])
  loud = jnp.where((jnp.arange(LENGTH) >= 11) & (jnp.arange(LENGTH) < 30), 1.0, 100.0)[None, :, None]
  close(apply(x_BTD * loud, packed(11, 19, 10))[:, 11:30], apply(x_BTD[:, 11:30], packed(19)))


def test_equal_init_starts_keys_as_queries():
  mixer = lightning.Lightning(model(model__attention__qk_init='equal', model__key_shift='learned'), 1.0, None)
  params = nn.unbox(mixer.init(jax.random.key(0), jnp.zeros((1, LENGTH, 32)), packed(LENGTH), 0, None))['params']
  np.testing.assert_array_equal(params['w_k'], params['w_q'])
  np.testing.assert_array_equal(params['key_shift'], 0.5)
  assert float(jnp.abs(params['w_v'] - params['w_q']).max()) > 0.1


def test_bfloat16_in_bfloat16_out():
  mixer, tree, x_BTD, context = build(SHIFTED)
  exact, _, _ = jax.jit(mixer.apply)(tree, x_BTD, context, 1, None)
  rounded, _, _ = jax.jit(mixer.apply)(tree, x_BTD.astype(jnp.bfloat16), context, 1, None)
  assert rounded.dtype == jnp.bfloat16
  close(rounded.astype(jnp.float32), exact, 0.04)
