"""The whole model against transformers' MiniMax-M2: the same weights give the same loss, logits, gradients, training.

Weights, names and layouts go through mmx/convert. transformers runs its plain forms, a loop over experts and explicit
softmax attention; one case runs the forms that the benchmark times.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import linen as nn

import tiny

from mmx import sharding, train, train_step
from mmx.model import Decoder, init_variables

pytestmark = pytest.mark.hf

PLAIN = {'experts': 'eager', 'attention': 'eager'}
TIMED = {'experts': 'grouped_mm', 'attention': 'sdpa'}

# name: (fields that differ from tiny.BASE, whether rows hold several documents, forms of transformers)
CASES = {
    'no_shared_keys_top1': (
        {'model__attention__num_heads': 2, 'model__attention__num_kv_heads': 2, 'model__moe__top_k': 1,
         'data__seq_len': 23}, False, PLAIN,
    ),
    'three_heads_a_key_top3': (
        {'model__attention__num_heads': 6, 'model__moe__top_k': 3,
         'model__pattern': 'full*2 full', 'data__seq_len': 37}, False, PLAIN,
    ),
    'units_of_two_layers_all_dimensions_rotate': (
        {'model__pattern': '(full full)*2', 'model__attention__rotary_dim': 8, 'model__moe__top_k': 8}, False, PLAIN,
    ),
    'several_chunks_and_blocks_long_theta': (
        {'data__seq_len': 261, 'data__batch_size': 2, 'model__attention__rope_theta': 5e6, 'model__norm_eps': 1e-3},
        False, PLAIN,
    ),
    'packed_documents': ({'data__seq_len': 29}, True, PLAIN),
    'forms_that_are_timed': ({'data__seq_len': 31, 'model__moe__top_k': 3}, False, TIMED),
}


@pytest.fixture(scope='module')
def bench():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  known = set(flags.FLAGS)
  assert train.CONFIG.name in known  # the script imports mmx.train too, and its flags are to stay
  path = pathlib.Path(__file__).parents[1] / 'scripts/bench_train.py'
  spec = importlib.util.spec_from_file_location('bench_train', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for flag in set(flags.FLAGS) - known:  # scripts share names of flags
    delattr(flags.FLAGS, flag)
  return module


def randomised(model):
  """(params, router): initialised, then norm scales spread by 0.3 and biases by 0.2, enough to change the experts."""
  variables = nn.unbox(init_variables(model, None, jax.random.key(0)))
  random = np.random.default_rng(1)

  def spread(path, leaf):
    name = path[-1].key
    scale = 0.2 if name == 'bias' else 0.3 if name == 'scale' or name.endswith('_norm') else 0.0
    return leaf + jnp.asarray(scale * random.normal(size=leaf.shape), leaf.dtype)

  variables = jax.tree_util.tree_map_with_path(spread, variables)
  return variables['params'], variables['router']


def batch_of(experiment, packed):
  batch = tiny.batch(experiment)
  if not packed:
    batch['segment_ids'] = jnp.ones_like(batch['segment_ids'])
    batch['positions'] = jnp.broadcast_to(jnp.arange(experiment.data.seq_len), batch['tokens'].shape)
  return batch


def ours(experiment, params, router, batch):
  """(loss, logits, gradients), the loss by the function that training differentiates."""

  @jax.jit
  def compute(params, router, batch):
    count = batch['loss_mask'].sum()
    function = lambda p: train_step.loss_terms(experiment, None, p, router, batch, 0.0, count)[0]
    variables = {'params': params, 'router': router}
    out = Decoder(experiment.model).apply(variables, batch['tokens'], batch['positions'], batch['segment_ids'])
    value, grads = jax.value_and_grad(function)(params)
    return value, out.hidden @ out.head, grads

  return compute(params, router, batch)


def error(actual, wanted):
  """Largest difference over the largest value."""
  actual, wanted = np.asarray(actual), np.asarray(wanted)
  assert actual.shape == wanted.shape
  return float(np.abs(actual - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize('case', CASES)
def test_loss_logits_and_gradients_are_those_of_transformers(bench, case):
  overrides, packed, forms = CASES[case]
  experiment = tiny.experiment(**overrides)
  params, router = randomised(experiment.model)
  batch = batch_of(experiment, packed)
  value, logits, grads = ours(experiment, params, router, batch)

  hf = bench.hf_model(experiment.model, params, router, **forms)
  inputs = bench.hf_batch(batch)
  out = hf(**inputs, labels=inputs['shift_labels'])
  out.loss.backward()
  read = np.asarray(batch['segment_ids'] > 0)  # what stands at padding is nobody's business
  wanted = {name: weight.grad.numpy() for name, weight in hf.named_parameters()}
  found = bench.hf_weights(experiment.model, params=grads)
  assert found.keys() == wanted.keys()
  if experiment.model.moe.top_k == 1:  # the weight of the only expert is s / s = 1: the gate learns nothing
    gates = [(found.pop(name), wanted.pop(name)) for name in list(wanted) if 'mlp.gate' in name]
    assert max(np.abs(gradient).max() for pair in gates for gradient in pair) < 1e-7
  errors = {name: error(found[name], wanted[name]) for name in wanted}
  worst = max(errors, key=errors.get)
  loss_error = abs(float(value) - out.loss.item()) / out.loss.item()
  logits_error = error(np.asarray(logits)[read], out.logits.detach().numpy()[read])
  print(f'{case}: loss {loss_error:.1e}, logits {logits_error:.1e}, gradients up to {errors[worst]:.1e} ({worst})')
  assert loss_error < 2e-6
  assert logits_error < 2e-5
  assert errors[worst] < 2e-5, worst


def test_expert_biases_choose_experts_in_both(bench):
  """Guards the test above: the biases that it sets must matter, and matter alike."""
  experiment = tiny.experiment(model__moe__top_k=3)
  params, router = randomised(experiment.model)
  batch = batch_of(experiment, False)
  without = jax.tree.map(jnp.zeros_like, router)
  logits = [ours(experiment, params, biases, batch)[1] for biases in (router, without)]
  assert error(*logits) > 0.01
  hf = bench.hf_model(experiment.model, params, without, **PLAIN)
  assert error(logits[1], hf(bench.hf_batch(batch)['input_ids']).logits.detach().numpy()) < 2e-5


def test_training_is_that_of_torch(bench):
  """Five steps of clipping and AdamW with decay: the same losses, then the same weights."""
  experiment = tiny.experiment(
      optim__schedule='constant', optim__warmup_steps=0, optim__learning_rate=1e-2, optim__weight_decay=0.3,
      optim__clip_norm=0.5, optim__eps=1e-4,  # 1e-8 would turn gradients at rounding level into whole steps
      model__moe__bias_update_rate=0.0, data__seq_len=21,
  )
  params, router = randomised(experiment.model)
  batch = tiny.batch(experiment)
  hf = bench.hf_model(experiment.model, params, router, **PLAIN)
  optimizer, inputs = bench.hf_optimizer(hf, experiment.optim), bench.hf_batch(batch)
  wanted = [bench.hf_step(hf, optimizer, experiment.optim.clip_norm, inputs).item() for _ in range(5)]

  mesh = sharding.build_mesh(experiment.mesh)
  state = train_step.init_state(experiment, mesh).replace(params=params, router=router)
  step = jax.jit(train_step.make_train_step(experiment, mesh))
  found = []
  for _ in range(5):
    state, metrics = step(state, batch)
    assert metrics['grad_norm'] > experiment.optim.clip_norm
    found.append(float(metrics['loss']))
  weights, start = (bench.hf_weights(experiment.model, params=tree) for tree in (state.params, params))
  # Against how far a weight went, not against its size.
  errors = {n: error(weights[n] - start[n], w.detach().numpy() - start[n]) for n, w in hf.named_parameters()}
  worst = max(errors, key=errors.get)
  print(f'training: losses {wanted} and {found}, distances up to {errors[worst]:.1e} ({worst})')
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert wanted[0] - wanted[-1] > 0.3
  assert errors[worst] < 1e-3, worst
