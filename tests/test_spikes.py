"""A spike is found inside the step, from statistics that the state carries, and its batch changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from mmx import distributed, sharding, spikes, train_step

JUDGE = jax.jit(spikes.judge, static_argnums=3)


def after(losses, norms=None, deviations=6.0):
  """(statistics, spikes found) after batches of these losses."""
  found, state = [], spikes.start()
  for loss, norm in zip(losses, norms if norms is not None else np.ones(len(losses)), strict=True):
    state, spike = JUDGE(state, jnp.float32(loss), jnp.float32(norm), deviations)
    found.append(bool(spike))
  return state, found


def noisy(count, level=3.0, seed=0):
  return level + 0.1 * np.random.default_rng(seed).normal(size=count)


def test_only_what_stands_out_upwards_is_a_spike():
  losses = noisy(300)
  assert not any(after(losses)[1])
  losses[100], losses[200] = 4.0, 2.0  # 10 deviations up, 10 down
  state, found = after(losses)
  assert [step for step, spike in enumerate(found) if spike] == [100]
  assert int(state.total) == 1 and int(state.in_a_row) == 0
  losses[100], losses[105] = 1e4, 4.0  # the first does not blind for the second
  assert [step for step, spike in enumerate(after(losses)[1]) if spike] == [100, 105]
  norms = np.exp(noisy(300, level=0))
  norms[150] *= 5
  assert [step for step, spike in enumerate(after(noisy(300), norms)[1]) if spike] == [150]


def test_a_falling_loss_is_none_and_the_first_batches_are_not_judged():
  assert not any(after(5.5 - 3 * np.linspace(0, 1, 200) ** 0.3)[1])
  losses = noisy(spikes.UNJUDGED + 1)
  assert not after(np.where(np.arange(len(losses)) == spikes.UNJUDGED - 1, 9.0, losses))[1][-2]
  assert after(np.where(np.arange(len(losses)) == spikes.UNJUDGED, 9.0, losses))[1][-1]


@pytest.mark.parametrize('deviations', [0.0, 6.0])
def test_what_is_not_finite_is_a_spike_at_once_and_leaves_the_statistics(deviations):
  losses = noisy(40)
  plain, _ = after(losses, deviations=deviations)
  broken, found = after([np.nan, *losses, np.inf], deviations=deviations)
  assert found[0] and found[-1] and not any(found[1:-1])
  for name in ('seen', 'mean', 'variance'):
    np.testing.assert_array_equal(getattr(broken, name), getattr(plain, name), err_msg=name)
  assert (int(broken.total), int(broken.in_a_row)) == (2, 1)


def test_statistics_are_those_of_numpy_until_they_begin_to_forget():
  losses, norms = noisy(spikes.MEMORY), np.exp(noisy(spikes.MEMORY, seed=1))
  state, _ = after(losses, norms, deviations=0.0)
  both = np.stack([losses, np.log(norms)])
  np.testing.assert_allclose(state.mean, both.mean(axis=1), rtol=1e-5)
  np.testing.assert_allclose(state.variance, both.var(axis=1), rtol=1e-4)


def test_a_lasting_change_is_accepted_in_time():
  state, found = after(np.concatenate([noisy(200), noisy(400, level=4.0)]))
  assert found[200] and not any(found[-100:])


# --- in the training step ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def skipping():
  """(experiment, mesh, initial state, compiled step) of a run that skips spikes."""
  experiment = tiny.experiment(train__skip_spikes=True)
  mesh = sharding.build_mesh(experiment.mesh)
  step = jax.jit(train_step.make_train_step(experiment, mesh))
  return experiment, mesh, train_step.init_state(experiment, mesh), step


def batch_of(experiment, mesh, seed, poisoned=False):
  batch = tiny.batch(experiment, seed=seed)
  mask = batch['loss_mask'] * (np.nan if poisoned else 1)
  return distributed.put_batch(batch | {'loss_mask': mask}, mesh, sharding.batch_spec())


def test_a_skipped_batch_changes_nothing_but_the_step_and_the_count(skipping):
  experiment, mesh, state, step = skipping
  state, _ = step(state, batch_of(experiment, mesh, 0))
  after, metrics = step(state, batch_of(experiment, mesh, 1, poisoned=True))
  assert np.isnan(metrics['loss']) and (int(metrics['skipped']), int(metrics['spikes_in_a_row'])) == (1, 1)
  for name in ('params', 'router', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
  assert int(after.step) == int(state.step) + 1
  then, metrics = step(after, batch_of(experiment, mesh, 2))
  without, expected = step(state, batch_of(experiment, mesh, 2))
  jax.tree.map(np.testing.assert_array_equal, then.params, without.params)  # the learning rate too
  assert metrics['learning_rate'] == expected['learning_rate']
  assert (int(metrics['skipped']), int(metrics['spikes_in_a_row'])) == (1, 0)


def test_without_a_spike_the_update_is_the_same(skipping):
  """Up to the last bits, which a compiler may round otherwise in another program."""
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
  experiment, mesh, state, step = skipping
  plain_state = train_step.init_state(tiny.BASE, mesh)
  plain = jax.jit(train_step.make_train_step(tiny.BASE, mesh))
  for seed in range(3):
    state, _ = step(state, batch_of(experiment, mesh, seed))
    plain_state, _ = plain(plain_state, batch_of(experiment, mesh, seed))
  for name in ('params', 'router', 'opt_state'):
    jax.tree.map(close, getattr(state, name), getattr(plain_state, name))


def test_where_nobody_looks_for_spikes_state_and_metrics_are_as_ever():
  mesh = sharding.build_mesh(tiny.BASE.mesh)
  names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(
      train_step.abstract_state(tiny.BASE, mesh))}
  assert not [name for name in names if 'spikes' in name]
  told = jax.eval_shape(train_step.make_train_step(tiny.BASE, mesh), train_step.abstract_state(tiny.BASE, mesh),
                        train_step.abstract_batch(tiny.BASE, mesh))[1]
  assert not {'skipped', 'spikes', 'spikes_in_a_row'} & told.keys()
  watched = train_step.abstract_state(tiny.experiment(train__spike_deviations=6.0), mesh)
  assert watched.spikes.mean.shape == (2,)
