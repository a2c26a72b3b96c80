"""Every axis of the mesh alone and every pair of them on eight devices: loss and gradients are those of one device."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from one_mixer import randomised

from mmx import config, distributed, sharding, train_step
from mmx.model import init_variables

SMALL = tiny.experiment(
    model__pattern='full', model__mtp__depth=1, model__key_shift='learned', model__attention__num_heads=8,
    model__attention__num_kv_heads=8, model__attention__head_dim=4, model__attention__rotary_dim=2,
    model__moe__shared_d_ff=8, model__moe__balance_loss_weight=0.01,
)  # fmt: skip
# Each mixer and both feed-forwards; half a minute for every mesh.
MIXED = config.override(SMALL, {
    'model.pattern': 'full lightning sliding/dense msa', 'model.lightning.num_heads': 8, 'model.lightning.head_dim': 4,
    'model.lightning.chunk': 4, 'model.sliding.window': 5, 'model.msa.block_size': 4, 'model.msa.top_k': 3,
    'model.msa.index_dim': 4,
})
ALONE = [(axis,) for axis in config.MESH_AXES]
PAIRS = list(itertools.combinations(config.MESH_AXES, 2))
# 10 to 30 s each; by default the axis that tests/test_train_step.py lays on no mesh.
BY_DEFAULT = [('expert', 'context')]
QUICK = [axes if axes in BY_DEFAULT else pytest.param(axes, marks=pytest.mark.slow) for axes in ALONE + PAIRS]


@functools.cache
def initial(base):
  """Parameters and router on one device, norms, gates and biases moved from their defaults."""
  return jax.jit(lambda: randomised(init_variables(base.model, None, jax.random.key(0)), seed=1))()


def gradients(base, **sizes):
  """(loss, gradients by all parameters, metrics and expert loads) of one batch on a mesh of these axes."""
  axes = {f'mesh.{axis}': sizes.get(axis, 1) for axis in config.MESH_AXES}
  experiment = config.override(base, axes | {'mesh.num_devices': math.prod(sizes.values())})
  config.validate(experiment, 8)
  mesh = sharding.build_mesh(experiment.mesh)
  state = train_step.abstract_state(experiment, mesh)
  tree = initial(base)
  params, router = (
      jax.tree.map(lambda a, placed: jax.device_put(a, placed.sharding), tree[name], getattr(state, name))
      for name in ('params', 'router')
  )
  batch = distributed.put_batch(tiny.batch(experiment), mesh, sharding.batch_spec())

  def loss(params):
    total, (metrics, aux) = train_step.loss_terms(
        experiment, mesh, params, router, batch, 0.3, jnp.sum(batch['loss_mask'])
    )
    return total, (metrics, train_step.loads(aux, 1.0))

  return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))


one_device = functools.cache(gradients)  # on more, tables of sharding that a test changes are no part of the key


def agree(found, wanted):
  for (path, a), w in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, w, rtol=0, atol=1e-5 * max(np.abs(w).max(), 1e-3), err_msg=str(path))


def equals_one_device(base, axes, monkeypatch):
  wanted = one_device(base)
  monkeypatch.setattr(sharding, 'LARGE', 1)  # every matrix is split as far as those of a large model
  agree(gradients(base, **dict(zip(axes, (8,) if len(axes) == 1 else (2, 4)))), wanted)


@pytest.mark.parametrize('axes', QUICK, ids='-'.join)
def test_axes_of_the_mesh_change_no_loss_and_no_gradient(axes, monkeypatch):
  equals_one_device(SMALL, axes, monkeypatch)


@pytest.mark.slow  # 10 s, the same axes once more
def test_experts_that_lie_whole_as_on_gpus_change_no_loss_and_no_gradient(monkeypatch):
  monkeypatch.setattr(sharding, 'MESH_AXIS_OF_LARGE', sharding.MESH_AXIS_OF_LARGE_ON_GPU)
  equals_one_device(SMALL, ('expert', 'context'), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('axes', ALONE + PAIRS, ids='-'.join)
def test_axes_of_the_mesh_change_no_loss_and_no_gradient_of_any_layer(axes, monkeypatch):
  equals_one_device(MIXED, axes, monkeypatch)
