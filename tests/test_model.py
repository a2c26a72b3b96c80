"""Invariants of the decoder, through `Decoder.apply`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tiny
from one_mixer import variables

from mmx import config, flops, sharding
from mmx.kernels_pallas.gated import ACTIVATIONS
from mmx.layers.attention import Attention
from mmx.layers.context import Context
from mmx.layers.embedding import look_up
from mmx.layers.mlp import MLP
from mmx.layers.moe import update_bias
from mmx.model import Decoder, init_variables
from mmx.train_step import loss_terms


@functools.cache  # compiled once for all tests of this file
def decoder(model):
  return jax.jit(Decoder(model).apply)


def outputs(model, tree, batch):
  return decoder(model)(tree, batch['tokens'], batch['positions'], batch['segment_ids'])


def hidden(model, tree, batch):
  return outputs(model, tree, batch).hidden


LONG = pytest.mark.slow  # compile for 10 to 30 s each; what stays beside them has their parts


def close(actual, wanted, tolerance=2e-5):
  scale = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(wanted))
  for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize('qk_norm', [pytest.param('none', marks=LONG), 'full_width', 'per_head'])
def test_no_gradient_flows_from_the_future(qk_norm):
  model = tiny.experiment(model__attention__qk_norm=qk_norm).model
  tree, batch = variables(model), tiny.batch()
  batch['segment_ids'] = jnp.ones_like(batch['segment_ids'])
  table = tree['params']['embedding']['table']
  batch['tokens'] = jnp.arange(24, dtype=jnp.int32)[None].repeat(8, 0)  # each position has its own embedding row

  def at_position(table):
    params = tree['params'] | {'embedding': tree['params']['embedding'] | {'table': table}}
    return jnp.sum(hidden(model, {'params': params, 'router': tree['router']}, batch)[0, 10])

  gradient = jnp.abs(jax.jit(jax.grad(at_position))(table)).sum(axis=-1)
  assert float(gradient[11:].max()) == 0 and float(gradient[:11].min()) > 0


def test_packing_isolates_documents():
  model = tiny.BASE.model
  tree, batch = variables(model), tiny.batch()
  before = hidden(model, tree, batch)
  second = batch['segment_ids'] == 2
  changed = batch | {'tokens': jnp.where(second, (batch['tokens'] + 7) % 61, batch['tokens'])}
  after = hidden(model, tree, changed)
  np.testing.assert_array_equal(before[~second], after[~second])
  assert float(jnp.abs(before - after)[second].max()) > 1e-3


def test_a_packed_document_equals_itself_alone():
  model = tiny.BASE.model
  tree, batch = variables(model), tiny.batch()
  row = np.flatnonzero(np.asarray(batch['segment_ids'][0]) == 2)
  alone = {name: a[:1, row] for name, a in batch.items()}
  close(hidden(model, tree, alone), hidden(model, tree, batch)[:1, row])


@functools.cache
def loss_and_gradients(experiment):
  loss = lambda params, router, batch: loss_terms(experiment, None, params, router, batch, 0.3, jnp.float32(100))[0]
  return jax.jit(jax.value_and_grad(loss))


def gradients(experiment, tree, batch):
  return loss_and_gradients(experiment)(tree['params'], tree['router'], batch)


FEW = {
    'model__sliding__window': 5, 'model__lightning__head_dim': 8, 'model__lightning__chunk': 8,
    'model__msa__block_size': 4, 'model__msa__top_k': 2, 'model__msa__index_dim': 8,
}  # fmt: skip
MIXED = FEW | {'model__pattern': '(sliding lightning/dense msa)*2'}
@pytest.mark.parametrize('pattern', [
    'full/dense*2 full*2',
    *(pytest.param(p, marks=LONG) for p in ('full*4', '(full full/dense)*2', MIXED['model__pattern'])),
])
def test_scan_equals_unrolled(pattern):
  scanned = tiny.experiment(**FEW | {'model__pattern': pattern})
  unrolled = config.override(scanned, {'model.layer_loop': 'unroll'})
  tree, batch = variables(scanned.model), tiny.batch()
  close(gradients(unrolled, tree, batch), gradients(scanned, tree, batch))


@pytest.mark.parametrize('remat, pattern', [
    ('full', {}), ('offload', {}), *(pytest.param(policy, {}, marks=LONG) for policy in ('mixer', 'dots')),
    pytest.param('full', MIXED, marks=LONG),
])
def test_remat_equals_no_remat(remat, pattern):
  kept = tiny.experiment(**pattern)
  tree, batch = variables(kept.model), tiny.batch()
  close(gradients(config.override(kept, {'model.remat': remat}), tree, batch), gradients(kept, tree, batch))


def test_offload_and_no_other_policy_sends_blocks_inputs_to_the_hosts_memory():
  tree, batch = variables(tiny.BASE.model), tiny.batch()

  def sent(remat):
    step = loss_and_gradients(config.override(tiny.BASE, {'model.remat': remat}))
    return str(step.trace(tree['params'], tree['router'], batch).jaxpr).count('device_put')

  assert sent('offload') > 0 == sent('full')


@pytest.mark.parametrize('norm, norm_of', [
    ('rms', lambda x, w: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * w),
    ('gemma', lambda x, w: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + w)),
])
@pytest.mark.parametrize('residual', ['pre_norm', 'post_norm'])
def test_block_is_the_published_form_of_its_family(norm, norm_of, residual):
  """One layer's stream, put together by hand from its branches: which norm, and what the residual is taken of."""
  factors = {'attention_alpha': 1.5, 'attention_beta': 0.7, 'ffn_alpha': 1.3, 'ffn_beta': 0.9}
  model = tiny.experiment(
      model__pattern='full/dense', model__norm=norm, model__residual=residual,
      **{f'model__post_norm__{name}': value for name, value in factors.items()},
  ).model  # fmt: skip
  tree, batch = variables(model), tiny.batch()
  layer = jax.tree.map(lambda a: a[0], tree['params']['segment_0']['layer_0'])
  context = Context(batch['positions'], batch['segment_ids'])
  x = np.asarray(tree['params']['embedding']['table'])[np.asarray(batch['tokens'])]
  mixer = lambda h: Attention(model, 1.0, None).apply({'params': layer['mixer']}, jnp.asarray(h), context, 0, None)[0]
  ffn = lambda h: MLP(model.d_ff, 'swiglu', 1.0, None).apply({'params': layer['ffn']}, jnp.asarray(h))
  for kind, branch in (('attention', mixer), ('ffn', ffn)):
    normed = norm_of(x, np.asarray(layer['mixer_norm' if kind == 'attention' else 'ffn_norm']['scale']))
    y = np.asarray(branch(normed))
    x = x + y if residual == 'pre_norm' else factors[f'{kind}_alpha'] * normed + factors[f'{kind}_beta'] * y
  wanted = norm_of(x, np.asarray(tree['params']['final_norm']['scale']))
  close(hidden(model, tree, batch), wanted)


def test_swiglu_oai_is_clamped_and_shifted():
  gate, up = np.array([-9.0, -1.0, 0.5, 8.0, 30.0]), np.array([-30.0, 2.0, -0.5, 7.5, 0.0])
  low, mid = np.minimum(gate, 7), np.clip(up, -7, 7)
  found = ACTIVATIONS['swiglu_oai'](jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
  np.testing.assert_allclose(found, (mid + 1) * low / (1 + np.exp(-1.702 * low)), rtol=1e-6)


def test_loss_in_chunks_equals_the_whole():
  tree, batch = variables(tiny.BASE.model), tiny.batch()
  close(gradients(tiny.experiment(train__loss_chunk=50), tree, batch), gradients(tiny.BASE, tree, batch))


@pytest.mark.parametrize('overrides', [
    {'model__attention__qk_norm': 'per_head', 'model__tie_embeddings': True},
    {'model__moe__shared_d_ff': 16, 'model__moe__gate': 'softmax', 'model__mtp__depth': 2},
    {'model__pattern': 'full/dense*1 full*3', 'model__attention__qk_norm': 'none'},
    MIXED | {'model__key_shift': 'learned', 'model__mtp__depth': 1},
    MIXED | {'model__msa__index_norm': 'none', 'model__norm': 'gemma', 'model__residual': 'post_norm'},
])
def test_parameters_are_as_many_as_the_formula_says(overrides):
  model = tiny.experiment(**overrides).model
  tree = jax.eval_shape(lambda: nn.unbox(init_variables(model, None, jax.random.key(0))))
  assert sum(leaf.size for leaf in jax.tree.leaves(tree['params'])) == flops.count_parameters(model).total


def test_bias_selects_but_never_weighs_and_gets_no_gradient():
  experiment = tiny.BASE
  tree, batch = variables(experiment.model), tiny.batch()
  tree = tree | {'router': jax.tree.map(jnp.zeros_like, tree['router'])}
  shifted = tree | {'router': jax.tree.map(lambda bias: bias + 5.0, tree['router'])}  # the same for all: same choice
  np.testing.assert_allclose(
      hidden(experiment.model, tree, batch), hidden(experiment.model, shifted, batch), atol=1e-6
  )
  function = lambda router: loss_terms(experiment, None, tree['params'], router, batch, 0.3, jnp.float32(100))[0]
  assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(jax.jit(jax.grad(function))(tree['router'])))


def test_bias_update_evens_the_load():
  """The sign rule on a fixed skewed gate: loads meet, as the bias decides the selection alone."""
  rng = np.random.default_rng(0)
  scores = jnp.asarray(1 / (1 + np.exp(-(rng.normal(size=(4096, 8)) + np.linspace(-2, 2, 8)))), jnp.float32)
  bias, worst = jnp.zeros(8), []
  for _ in range(400):
    ids = jax.lax.top_k(scores + bias[None], 2)[1]
    load = jnp.bincount(ids.ravel(), length=8) / ids.size
    worst.append(float(load.max() / load.mean()))
    bias = update_bias(bias, load, 2e-3)
  assert worst[0] > 3 and worst[-1] < 1.05
  assert abs(float(bias.mean())) < 1e-6


@pytest.mark.parametrize('mesh', [None, {'fsdp': 8}, {'replica': 2, 'expert': 2, 'context': 2}])
@pytest.mark.parametrize('large', [1, sharding.LARGE])
def test_a_table_s_gradient_is_added_up_in_float32_on_any_mesh(mesh, large, monkeypatch):
  monkeypatch.setattr(sharding, 'LARGE', large)
  mesh = mesh and sharding.build_mesh(config.MeshConfig(**{'fsdp': 1} | mesh))
  table = jax.random.normal(jax.random.key(0), (20, 16))
  tokens = jnp.zeros((8, 64), jnp.int32).at[:, 5].set(jnp.arange(8))
  ones = jnp.ones((8, 64, 16), jnp.bfloat16)  # 505 of them, which bfloat16 cannot count

  @jax.jit
  def rows_and_gradient(table):
    rows, back = jax.vjp(lambda table: look_up(table, tokens, jnp.bfloat16, mesh), table)
    return rows, back(ones)[0]

  rows, gradient = rows_and_gradient(table)
  np.testing.assert_array_equal(rows, table.astype(jnp.bfloat16)[tokens])
  np.testing.assert_array_equal(gradient[:, 0], np.bincount(np.asarray(tokens).ravel(), minlength=20))


def test_mtp_module_predicts_one_token_further():
  """With targets that only the module can see wrong, the main loss stands still and the module's moves."""
  experiment = tiny.experiment(model__mtp__depth=2)
  tree, batch = variables(experiment.model), tiny.batch()
  batch['segment_ids'] = jnp.ones_like(batch['segment_ids'])
  batch['loss_mask'] = jnp.ones_like(batch['loss_mask'])
  out = outputs(experiment.model, tree, batch)
  logits = jax.nn.log_softmax(out.mtp[0] @ out.head)
  T = batch['tokens'].shape[1]
  wanted = -jnp.take_along_axis(logits[:, : T - 1], batch['targets'][:, 1:, None], axis=-1).sum() / 100
  terms = jax.jit(lambda tree: loss_terms(experiment, None, tree['params'], tree['router'], batch, 0.3, jnp.float32(100)))
  _, (metrics, _) = terms(tree)
  np.testing.assert_allclose(metrics['mtp_loss_1'], wanted, rtol=1e-5)
  # Module 1 at position p has seen token p + 1 and nothing later.
  later = batch | {'tokens': batch['tokens'].at[:, 12].add(1) % 61}
  moved = outputs(experiment.model, tree, later).mtp
  change = [jnp.abs(a - b).max(axis=(0, 2)) for a, b in zip(out.mtp, moved)]
  assert float(change[0][:11].max()) == 0 and float(change[0][11]) > 0
  assert float(change[1][:10].max()) == 0 and float(change[1][10]) > 0


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
  experiment = tiny.experiment(model__compute_dtype='bfloat16')
  tree, batch = variables(experiment.model), tiny.batch()
  assert hidden(experiment.model, tree, batch).dtype == jnp.bfloat16
  loss, grads = gradients(experiment, tree, batch)
  exact, _ = gradients(tiny.BASE, tree, batch)
  assert abs(float(loss) - float(exact)) < 0.02 * float(exact)
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_parameters_are_made_on_a_host_that_the_named_kernels_do_not_serve():
  named = tiny.experiment(model__moe__implementation='megablox', model__attention__implementation='splash')
  shapes = lambda experiment: jax.eval_shape(lambda: init_variables(experiment.model, None, jax.random.key(0)))
  assert jax.tree.structure(shapes(named)) == jax.tree.structure(shapes(tiny.BASE))
