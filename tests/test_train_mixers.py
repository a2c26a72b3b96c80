"""The command on models of every mixer, and runs that start from another's parameters."""

import jax
import numpy as np
import pytest

from mmx import checkpoint_params, config, sharding, train_step
from test_train import EXPERIMENT, here, place, result, rows, settings, train  # noqa: F401 (fixtures)

CONVERSION = EXPERIMENT[: EXPERIMENT.index('def arms')] + '''def arms(base):
  sparse = {'model.pattern': 'msa*2', 'model.msa.block_size': 4, 'model.msa.top_k': 2, 'model.msa.index_dim': 8}
  begun = config.override(base, sparse | {'train.init_from': 'trunk', 'model.msa.warmup_steps': 6, 'data.seed': 100})
  return {'trunk': base, 'sparse': begun}


TOLERANCE = 0.2
'''


@pytest.fixture(scope='module')
def trunk(place, here):  # noqa: F811
  (place / 'conversion.py').write_text(CONVERSION)
  assert here('--workdir=converted', '--seeds=0', '--arm=trunk', file='conversion.py') is None
  return place / 'converted'


@pytest.fixture(scope='module')
def converted(trunk, here):  # noqa: F811
  assert here('--workdir=converted', '--seeds=0', file='conversion.py') is None
  return trunk


@pytest.mark.slow
def test_a_run_starts_from_another_arms_parameters_and_new_ones_where_it_has_none(converted, train):  # noqa: F811
  experiment = config.load(converted / 'sparse/seed0/config.gin')
  fresh = train_step.init_state(experiment, sharding.build_mesh(experiment.mesh))
  state = train.start_from(converted / 'trunk/seed0', fresh)
  saved = checkpoint_params.Parameters(converted / 'trunk/seed0')
  taken, new = [], []
  for (path, leaf), (_, before) in zip(
      jax.tree_util.tree_leaves_with_path({'params': state.params, 'router': state.router}),
      jax.tree_util.tree_leaves_with_path({'params': fresh.params, 'router': fresh.router}), strict=True,
  ):
    name = '/'.join(key.key for key in path)
    wanted = saved.open(name).read().result() if name in saved.leaves else before
    (taken if name in saved.leaves else new).append(name)
    np.testing.assert_array_equal(leaf, wanted, err_msg=name)
  assert len(taken) == len(saved.leaves) and all('index' in name for name in new) and len(new) == 4
  assert int(state.step) == 0


@pytest.mark.slow
def test_a_converted_run_is_warmed_up_learns_its_index_and_tells_of_it(converted):
  told = rows(converted / 'sparse/seed0')
  training = [row for row in told if 'loss' in row]
  trunk = result(converted / 'trunk/seed0')
  assert training[0]['loss'] < trunk['curve']['heldout_loss'][0]  # what trunk knew after five steps
  continued = result(converted / 'sparse/seed0')
  assert continued['tokens'] == 2 * trunk['tokens'] and continued['curve']['tokens'][0] > trunk['tokens']
  for layer in ('layer_00', 'layer_01'):
    kl = [row[f'msa/kl/{layer}'] for row in training]
    assert all(value > 0 for value in kl) and kl[-1] < kl[0]
    for name in ('block_recall', 'score_recall'):
      assert all(0 < row[f'msa/{name}/{layer}'] <= 1 for row in training)
  assert config.load(converted / 'sparse/seed0/config.gin').data.seed == 100  # seed 0: other documents than trunk's


def test_what_cannot_be_started_from_is_told_before_anything_runs(trunk, place, here):  # noqa: F811
  refused = lambda *arguments: here('--workdir=unstarted', '--seeds=0', *arguments, file='conversion.py')
  assert "init_from = 'trunk': arm trunk has not run at seed 0 in this workdir; run it first" in refused('--arm=sparse')
  said = refused('--arm=trunk', *settings(train__init_from='nowhere'))
  assert "init_from = 'nowhere': no run folder there (config.gin is missing), and no arm of that name" in said
  assert not (place / 'unstarted').exists()
  other = refused('--arm=trunk', *settings(train__init_from=str(trunk / 'trunk/seed0'), model__d_model=48))
  assert 'has another model: params/' in other


@pytest.mark.slow
def test_every_mixer_trains_through_the_command_on_a_mesh(place, here):  # noqa: F811
  assert here('--workdir=mixers', '--arm=coarse', '--seeds=0', *settings(
      model__pattern='sliding lightning/dense msa full', model__sliding__window=8, model__sliding__sink_tokens=2,
      model__lightning__head_dim=8, model__msa__block_size=4, model__msa__top_k=2, model__msa__index_dim=8,
      model__norm='gemma', model__activation='swiglu_oai', model__key_shift='learned', model__residual='post_norm',
      mesh__num_devices=8, mesh__expert=2, mesh__fsdp=2, mesh__tensor=2, train__steps=6, eval__every=6,
  )) is None  # fmt: skip
  first, *_, last = [row for row in rows(place / 'mixers/coarse/seed0') if 'loss' in row]
  assert last['loss'] < first['loss'] and first['msa/kl/layer_02'] > 0
