"""Invariants of the training step, through `make_train_step`, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from mmx import distributed, optimizer, sharding, train_step
from mmx.model import Decoder


@functools.cache  # compiled once for all tests of this file
def begun(experiment, large):
  """Mesh, first state and step where arrays of `large` elements are split further."""
  assert large == sharding.LARGE
  mesh = sharding.build_mesh(experiment.mesh)
  return mesh, train_step.init_state(experiment, mesh), jax.jit(train_step.make_train_step(experiment, mesh))


def run(experiment, steps=2, change_batch=lambda batch: batch):
  """State and last metrics after a few steps on this experiment's mesh."""
  mesh, state, step = begun(experiment, sharding.LARGE)
  for i in range(steps):
    batch = distributed.put_batch(change_batch(tiny.batch(experiment, seed=i)), mesh, sharding.batch_spec())
    state, metrics = step(state, batch)
  return jax.device_get((state, metrics))


def close(actual, wanted, tolerance):
  for (path, a), w in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * max(np.abs(w).max(), 1e-3), err_msg=str(path))


@pytest.fixture(scope='module')
def one_device():
  return run(tiny.BASE)


MESHES = {
    'replica8': dict(mesh__replica=8, mesh__fsdp=1),
    'fsdp8': dict(mesh__fsdp=8),
    'fsdp2 tensor2 replica2': dict(mesh__fsdp=2, mesh__tensor=2, mesh__replica=2),
    'expert4 fsdp2 ring': dict(mesh__expert=4, mesh__fsdp=2),
    'expert2 tensor2 fsdp2 ragged': dict(mesh__expert=2, mesh__tensor=2, mesh__fsdp=2, model__moe__transport='ragged'),
    'expert8 padded': dict(mesh__expert=8, mesh__fsdp=1, model__moe__transport='padded'),
}


SLOW = 'replica8', 'fsdp8', 'fsdp2 tensor2 replica2', 'expert8 padded'  # 10 to 15 s each; others have their axes too


@pytest.mark.parametrize('mesh, large', [
    *(pytest.param(mesh, sharding.LARGE, marks=pytest.mark.slow if mesh in SLOW else ()) for mesh in MESHES),
    pytest.param('expert4 fsdp2 ring', 1, marks=pytest.mark.slow),  # as test_mesh_axes.py does on other meshes
])
def test_eight_devices_equal_one(one_device, mesh, large, monkeypatch):
  monkeypatch.setattr(sharding, 'LARGE', large)  # at 1 every matrix is split over 'expert' too
  state, metrics = run(tiny.experiment(mesh__num_devices=8, **MESHES[mesh]))
  close(metrics, one_device[1], 1e-5)
  # Adam divides by the root of the second moment: where a gradient is near zero, rounding is felt in the parameter.
  close(state.params, one_device[0].params, 2e-3)
  close(state.router, one_device[0].router, 1e-6)


def test_of_a_large_model_only_norms_and_routers_are_held_twice(monkeypatch):
  monkeypatch.setattr(sharding, 'LARGE', 1)
  mesh = sharding.build_mesh(tiny.experiment(mesh__num_devices=8, mesh__expert=4, mesh__fsdp=2).mesh)
  for path, leaf in jax.tree_util.tree_leaves_with_path(train_step.abstract_state(tiny.BASE, mesh).params):
    parts = leaf.size // np.prod(leaf.sharding.shard_shape(leaf.shape))
    name = path[-1].key
    assert (parts == 1 if name in ('scale', 'w_router') or name.endswith('_norm') else parts == 8), (path, leaf)


def test_z_loss_adds_the_squared_logsumexp_to_the_loss_and_to_its_gradient():
  weight, batch = 0.1, tiny.batch(tiny.BASE)
  state = train_step.init_state(tiny.BASE, sharding.build_mesh(tiny.BASE.mesh))
  count = batch['loss_mask'].sum()

  def total(params, z_loss_weight):
    experiment = tiny.experiment(train__z_loss_weight=z_loss_weight)
    return train_step.loss_terms(experiment, None, params, state.router, batch, 0.3, count)[0]

  def wanted(params):
    variables = {'params': params, 'router': state.router}
    out = Decoder(tiny.BASE.model).apply(variables, batch['tokens'], batch['positions'], batch['segment_ids'])
    logsumexp_BT = jax.nn.logsumexp(out.hidden @ out.head, axis=-1)
    return total(params, 0.0) + weight * jnp.sum(logsumexp_BT**2 * batch['loss_mask']) / count

  found = jax.jit(jax.value_and_grad(lambda params: total(params, weight)))(state.params)
  close(found, jax.jit(jax.value_and_grad(wanted))(state.params), 1e-5)


def test_accumulation_equals_a_big_batch():
  big, wanted = run(tiny.BASE, steps=1)
  state, metrics = run(tiny.experiment(train__accumulate=4), steps=1)
  for name in ('loss', 'grad_norm', 'accuracy', 'learning_rate'):
    np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, err_msg=name)
  close(state.params, big.params, 2e-3)
  close(metrics['load'], wanted['load'], 1e-6)


def test_padding_tokens_have_no_influence_on_the_step(one_device):
  change = lambda batch: batch | {'tokens': jnp.where(batch['segment_ids'] == 0, 3, batch['tokens'])}
  state, metrics = run(tiny.BASE, change_batch=change)
  close(metrics, one_device[1], 1e-6)


def test_same_seed_same_bits_and_arms_share_what_has_the_same_shape():
  mesh = sharding.build_mesh(tiny.BASE.mesh)
  first, again = (train_step.init_state(tiny.BASE, mesh) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  finer = train_step.init_state(tiny.experiment(model__moe__num_experts=16, model__moe__d_ff=12), mesh)
  layer = lambda state: state.params['segment_0']['layer_0']['mixer']
  jax.tree.map(np.testing.assert_array_equal, layer(first), layer(finer))
  np.testing.assert_array_equal(first.params['embedding']['table'], finer.params['embedding']['table'])


def test_router_bias_moves_by_its_rate_and_only_then():
  rate = tiny.BASE.model.moe.bias_update_rate
  state, _ = run(tiny.BASE, steps=1)
  bias = state.router['segment_0']['layer_0']['ffn']['bias']
  assert bias.shape == (2, 8) and 0 < np.abs(bias).max() <= 2 * rate + 1e-9
  frozen, _ = run(tiny.experiment(model__moe__bias_update_rate=0.0), steps=1)
  assert np.abs(frozen.router['segment_0']['layer_0']['ffn']['bias']).max() == 0


def test_capacity_reports_what_it_drops():
  _, dropless = run(tiny.BASE, steps=1)
  _, tight = run(tiny.experiment(model__moe__capacity_factor=0.5), steps=1)
  assert dropless['router/dropped'] == 0 and 0.4 < tight['router/dropped'] < 0.9


def test_balance_loss_is_one_when_even_and_in_the_loss_when_weighted():
  _, metrics = run(tiny.BASE, steps=1)
  assert 0.9 < metrics['router/balance_loss'] < 2
  weighted, _ = run(tiny.experiment(model__moe__balance_loss_weight=0.1), steps=1)
  plain, _ = run(tiny.BASE, steps=1)
  gate = lambda state: state.params['segment_0']['layer_0']['ffn']['w_router']
  assert np.abs(gate(weighted) - gate(plain)).max() > 0


@pytest.mark.parametrize('norm', [0.5, 1e3])
def test_clipping_is_that_of_optax(norm):
  grads = {'a': jnp.arange(6.0).reshape(2, 3) - 2, 'b': jnp.full(4, 1e-3)}
  clipped = [transform.update(grads, transform.init(grads))[0]
             for transform in (optimizer.clip(norm), optax.clip_by_global_norm(norm))]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *clipped)


def test_decay_touches_matrices_only():
  mesh = sharding.build_mesh(tiny.BASE.mesh)
  params = train_step.init_state(tiny.BASE, mesh).params
  flags = jax.tree_util.tree_leaves_with_path(optimizer.decays(params))
  decayed = {jax.tree_util.keystr(path): flag for path, flag in flags}
  kept = {path.rsplit("['", 1)[1].rstrip("']") for path, flag in decayed.items() if not flag}
  assert kept == {'scale', 'q_norm', 'k_norm'}


@pytest.mark.parametrize('name, wanted', [
    ('wsd', {0: 0.5, 1: 1.0, 7: 1.0, 10: 0.55, 12: 0.1}),
    ('cosine', {0: 0.5, 1: 1.0, 7: 0.55, 12: 0.1}),
    ('constant', {0: 0.5, 1: 1.0, 12: 1.0}),
])
def test_schedule_is_what_its_name_says(name, wanted):
  optim = tiny.experiment(optim__schedule=name, optim__learning_rate=1.0).optim
  function = optimizer.schedule(optim, 12)
  for step, value in wanted.items():
    np.testing.assert_allclose(function(step), value, rtol=1e-5, err_msg=f'step {step}')


def test_mtp_weight_is_annealed_while_the_learning_rate_decays():
  experiment = tiny.experiment(model__mtp__depth=1)
  weight = optimizer.mtp_weight(experiment.model.mtp, experiment.optim, 12)
  np.testing.assert_allclose([weight(0), weight(8), weight(10), weight(12)], [0.3, 0.3, 0.2, 0.1], rtol=1e-6)
