"""The MSA layer: full attention where it selects all, two branches that learn apart, decode = prefill = train."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import one_mixer
import tiny
from one_mixer import close, packed, serve
from flax import linen as nn

from mmx import sharding
from mmx.config import MeshConfig
from mmx.layers import attention, sparse

LENGTH = 42  # not a multiple of the block
INDEX = {'w_index_q', 'w_index_k', 'index_q_norm', 'index_k_norm'}
build = functools.partial(one_mixer.build, sparse.SparseAttention, length=LENGTH)


def model(top_k=3, **overrides):
  sizes = {'model__msa__block_size': 4, 'model__msa__top_k': top_k, 'model__msa__index_dim': 8}
  return tiny.experiment(**sizes | {'model__key_shift': 'learned'} | overrides).model


def run(mixer, tree, x_BTD, context):
  """(y, aux), compiled."""
  return jax.jit(lambda tree, x, context: mixer.apply(tree, x, context, 0, None)[::2])(tree, x_BTD, context)


def gradients(mixer, tree, x_BTD, loss, *contexts):
  """Of loss(y, aux) with respect to (parameters, x), for each context, by one compiled function."""
  scalar = lambda tree, x, context: loss(*mixer.apply(tree, x, context, 0, None)[::2])
  function = jax.jit(jax.grad(scalar, (0, 1)))
  return [(tree['params'], x) for tree, x in (function(tree, x_BTD, context) for context in contexts)]


def phases(context):
  """The context in the warm-up and after it."""
  return [dataclasses.replace(context, warmup=jnp.asarray(warmup)) for warmup in (True, False)]


def lm_loss(y_BTD, aux):
  return jnp.sum(jnp.sin(3 * y_BTD))


def kl_loss(y_BTD, aux):
  return aux.kl


# ----------------------------------------------------------------------------------------------------------------------
# what it computes


def test_parameters_have_the_names_and_shapes_of_the_family():
  config = model(model__attention__qk_norm='per_head')
  tree = build(config)[1]['params']
  shapes = {name: a.shape for name, a in tree.items()}
  assert shapes == {
      'w_q': (32, 4, 8), 'w_k': (32, 2, 8), 'w_v': (32, 2, 8), 'w_o': (4, 8, 32), 'q_norm': (8,), 'k_norm': (8,),
      'key_shift': (2, 32), 'w_index_q': (32, 2, 8), 'w_index_k': (32, 8), 'index_q_norm': (8,), 'index_k_norm': (8,),
  }
  assert not INDEX & build(model(model__msa__index_norm='none'))[1]['params'].keys() - {'w_index_q', 'w_index_k'}


def test_index_keys_start_as_the_first_index_query_head_when_asked():
  config = model(model__attention__qk_init='equal')
  mixer, _, x_BTD, context = build(config)
  tree = nn.unbox(jax.jit(lambda rng: mixer.init(rng, x_BTD, context, 0, None))(jax.random.key(3)))['params']
  np.testing.assert_array_equal(tree['w_index_k'], tree['w_index_q'][:, 0])


def test_index_branch_sees_the_layers_input_shifted_for_keys_then_normed_then_rotated(monkeypatch):
  """By hand, in M3's order and with its norm, (1 + w); the first 4 of 8 dimensions rotate, pairing i with i + 2."""
  mixer, tree, x_BTD, _ = build(model(model__norm='gemma', model__attention__qk_norm='per_head'))
  context = packed(19, 23)
  seen = []
  monkeypatch.setattr(sparse.api, 'msa', lambda *inputs, **_: (seen.extend(inputs), (inputs[0], jnp.zeros(1)))[1])
  mixer.apply(tree, x_BTD, context, 0, None)

  p = {name: np.asarray(a, np.float64) for name, a in tree['params'].items()}
  x, positions = np.asarray(x_BTD, np.float64)[0], np.asarray(context.positions_BT)[0]
  before = np.where(positions[:, None] > 0, np.roll(x, 1, axis=0), 0)
  keys_x = p['key_shift'][0] * x + p['key_shift'][1] * before

  def finish(heads, scale):
    """[T, heads, 8], normed and rotated."""
    normed = heads / np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)
    angle = positions[:, None, None] * 10_000.0 ** (-np.arange(2) / 2)
    a, b = normed[..., :2], normed[..., 2:4]
    rotated = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return np.concatenate([*rotated, normed[..., 4:]], axis=-1)

  index_q, index_k = seen[3:5]
  close(index_q[0], finish(np.einsum('td,dki->tki', x, p['w_index_q']), p['index_q_norm']))
  close(index_k[0], finish((keys_x @ p['w_index_k'])[:, None], p['index_k_norm'])[:, 0])


@pytest.mark.parametrize('family', [{}, {'model__norm': 'gemma', 'model__attention__qk_norm': 'per_head'}])
def test_msa_with_k_of_all_blocks_equals_full_attention_in_values_and_gradients(family):
  config = model(top_k=11, **family)
  mixer, tree, x_BTD, _ = build(config)
  context = packed(17, 20, padding=5)
  full = attention.Attention(config, 1.0, None)
  found, aux = run(mixer, tree, x_BTD, context)
  close(found, run(full, tree, x_BTD, context)[0])
  assert aux.block_recall == 1 and abs(aux.score_recall - 1) < 1e-6
  (found, found_x), = gradients(mixer, tree, x_BTD, lm_loss, context)
  (wanted, wanted_x), = gradients(full, tree, x_BTD, lm_loss, context)
  close(found_x, wanted_x)
  for name in tree['params'].keys() - INDEX:
    close(found[name], wanted[name])


def test_msa_with_few_blocks_differs_from_full_attention():
  mixer, tree, x_BTD, context = build(model(top_k=2))
  found, aux = run(mixer, tree, x_BTD, context)
  wanted, _ = run(attention.Attention(model(), 1.0, None), tree, x_BTD, context)
  assert jnp.abs(found - wanted)[0, :8].max() < 1e-5 < 0.01 < jnp.abs(found - wanted)[0, 8:].max()
  assert 0 < aux.block_recall < 1 and 0 < aux.score_recall < 1


def test_lm_loss_gives_index_parameters_no_gradient():
  mixer, tree, x_BTD, context = build(model())
  for found, x in gradients(mixer, tree, x_BTD, lm_loss, *phases(context)):
    assert {name for name, a in found.items() if jnp.any(a != 0)} == found.keys() - INDEX
    assert jnp.any(x != 0)


def test_index_branch_kl_moves_only_index_parameters():
  mixer, tree, x_BTD, context = build(model())
  for found, x in gradients(mixer, tree, x_BTD, kl_loss, *phases(context)):
    assert {name for name, a in found.items() if jnp.any(a != 0)} == INDEX
    assert not jnp.any(x != 0)


def test_warmup_is_full_attention_and_one_program_serves_both_phases():
  mixer, tree, x_BTD, context = build(model(top_k=2))
  phase = jax.jit(lambda warmup: mixer.apply(tree, x_BTD, dataclasses.replace(context, warmup=warmup), 0, None)[::2])
  (dense, dense_aux), (chosen, chosen_aux) = phase(jnp.asarray(True)), phase(jnp.asarray(False))
  assert phase._cache_size() == 1
  close(dense, run(attention.Attention(model(), 1.0, None), tree, x_BTD, context)[0])
  wanted, wanted_aux = run(mixer, tree, x_BTD, context)
  close(chosen, wanted)
  close(chosen_aux.kl, wanted_aux.kl)
  all_blocks = run(sparse.SparseAttention(model(top_k=11), 1.0, None), tree, x_BTD, context)[1]
  close(dense_aux.kl, all_blocks.kl)
  assert abs(dense_aux.kl - chosen_aux.kl) > 1e-3
  close(dense_aux.block_recall, wanted_aux.block_recall)


def test_index_branch_learns_to_follow_its_teacher():
  """Gradient descent on the divergence alone raises the share of the teacher's mass that is selected."""
  mixer, tree, x_BTD, context = build(model(top_k=3, model__key_shift='none'))
  context = dataclasses.replace(context, warmup=jnp.asarray(True))
  scalar = lambda tree: (lambda aux: (aux.kl, aux))(run(mixer, tree, x_BTD, context)[1])

  @jax.jit
  def step(tree):
    (_, aux), gradient = jax.value_and_grad(scalar, has_aux=True)(tree)
    return jax.tree.map(lambda a, g: a - 2.0 * g, tree, gradient), aux

  tree, before = step(tree)
  for _ in range(60):
    tree, after = step(tree)
  assert after.kl < 0.3 * before.kl
  assert after.block_recall > before.block_recall + 0.05 and after.score_recall > before.score_recall + 0.02


# ----------------------------------------------------------------------------------------------------------------------
# who sees whom


def test_msa_is_causal_by_gradient():
  mixer, tree, x_BTD, context = build(model())
  at = 25
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(run(mixer, tree, x, context)[0][0, at])))(x_BTD)[0]
  assert not jnp.any(gradient[at + 1 :]) and jnp.any(gradient[at]) and jnp.any(gradient[: at - 4])


def test_packing_isolates_documents():
  """No information passes: with k of all blocks as alone; with few, whatever the neighbour says."""
  lengths = 15, 19
  context = packed(*lengths, padding=LENGTH - sum(lengths))
  mixer, tree, x_BTD, _ = build(model(top_k=11))
  together = run(mixer, tree, x_BTD, context)[0]
  start = 0
  for length in lengths:
    alone = run(mixer, tree, x_BTD[:, start : start + length], packed(length))[0]
    close(together[:, start : start + length], alone)
    start += length

  mixer, tree, x_BTD, _ = build(model(top_k=2))
  here = np.asarray(context.segment_ids_BT)[0] == 2
  noise = jax.random.normal(jax.random.key(9), x_BTD.shape)
  other = jnp.where(here[None, :, None], x_BTD, 5 * noise)
  found, wanted = (run(mixer, tree, x, context)[0][:, here] for x in (other, x_BTD))
  np.testing.assert_array_equal(found, wanted)


def test_padding_counts_in_no_statistic():
  mixer, tree, x_BTD, _ = build(model(top_k=2))
  context = packed(30, padding=LENGTH - 30)
  noise = jnp.where(context.segment_ids_BT[..., None] > 0, x_BTD, 7.0)
  found, wanted = (run(mixer, tree, x, context)[1] for x in (noise, x_BTD))
  np.testing.assert_array_equal(jax.tree.leaves(found), jax.tree.leaves(wanted))
  alone = run(mixer, tree, x_BTD[:, :30], packed(30))[1]
  close(found.kl, alone.kl)


# ----------------------------------------------------------------------------------------------------------------------
# caches and devices


WHOLE = [(LENGTH, (LENGTH,) * 3)]
RAGGED = [(20, (20, 9, 2)), (15, (15, 15, 0)), (1, (1, 0, 1)), (39, (6, 18, 39))]
STEPS = [(13, (13, 13, 13))] + [(1, (1, 1, 1))] * 29


@pytest.mark.parametrize('top_k, chunks', [(2, WHOLE), (2, RAGGED), (20, STEPS), (2, STEPS)])
def test_decode_equals_prefill_equals_train(top_k, chunks):
  config = model(top_k)
  mixer, tree, x_BTD, context = build(config, rows=3)
  cache = sparse.init_cache(config, 3, LENGTH, jnp.float32)
  assert cache['k'].shape == (3, 2, 44, 8) and cache['index_k'].shape == (3, 44, 8)
  found, _, padding = serve(mixer, tree, cache, x_BTD, chunks)
  close(found, run(mixer, tree, x_BTD, context)[0])
  assert not padding.any(), 'padding attends to nothing'


@pytest.mark.parametrize('chunks', [RAGGED, STEPS])
def test_float8_index_selects_alike_in_training_and_from_a_cache_of_a_byte_a_key(chunks):
  mixer, tree, x_BTD, context = build(model(2, model__msa__index_dtype='float8_e4m3fn'), rows=3)
  wanted, aux = run(mixer, tree, x_BTD, context)
  cache = sparse.init_cache(mixer.model, 3, LENGTH, jnp.float32)
  assert cache['index_k'].dtype == jnp.float8_e4m3fn and cache['k'].dtype == jnp.float32
  close(serve(mixer, tree, cache, x_BTD, chunks)[0], wanted)
  exact, exact_aux = run(sparse.SparseAttention(model(2), 1.0, None), tree, x_BTD, context)
  assert jnp.any(exact != wanted), 'rounding moves some choices here'
  assert 0 < abs(exact_aux.kl - aux.kl) < 0.05 * exact_aux.kl


def test_rounding_saturates_and_passes_gradients_as_if_nothing_was_rounded():
  x = jnp.array([0.3, -1.07, 20.0, 500.0, -1e6, 1e-4], jnp.bfloat16)
  found, pull = jax.vjp(lambda x: sparse.rounded(x, jnp.dtype('float8_e4m3fn')), x)
  assert found.dtype == x.dtype and found.tolist() == [0.3125, -1.125, 20.0, 448.0, -448.0, 0.0]
  assert (pull(jnp.full(6, 3, x.dtype))[0] == 3).all()
  assert sparse.rounded(x, x.dtype) is x


@pytest.mark.slow  # 13 s
def test_a_mesh_serves_as_one_device_does():
  """Each device keeps the keys of its own rows and heads; the index keys of a row are on all that share it."""
  config = model(top_k=2)
  mixer, tree, x_BTD, _ = build(config, rows=4)
  mesh = sharding.build_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
  new = functools.partial(sparse.init_cache, config, 4, LENGTH, jnp.float32)
  chunks = [(25, (25, 9, 25, 1)), (17, (17, 16, 17, 17)), (24, (0, 17, 0, 24))]
  wanted, last, _ = serve(mixer, tree, new(), x_BTD, chunks)
  found, last_of_mesh, _ = serve(sparse.SparseAttention(config, 1.0, mesh), tree, new(), x_BTD, chunks)
  close(found, wanted)
  close(last_of_mesh['k'], last['k'])


def test_one_device_equals_eight_in_gradients():
  """Rows over four devices, kv heads over two."""
  config = model(top_k=2)
  mesh = sharding.build_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
  one, tree, x_BTD, context = build(config, rows=8)
  loss = lambda y, aux: lm_loss(y, aux) + 10 * aux.kl
  many = sparse.SparseAttention(config, 1.0, mesh)
  found, wanted = (gradients(mixer, tree, x_BTD, loss, *phases(context)) for mixer in (many, one))
  jax.tree.map(close, found, wanted)
