"""One training step as a pure function: loss, gradients, accumulation, update, expert biases."""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding

from mmx import loss, optimizer, sharding, spikes
from mmx.config import Experiment, parse_pattern
from mmx.layers.moe import MoEAux, update_bias
from mmx.layers.mtp import shift_left
from mmx.layers.sparse import IndexAux
from mmx.model import Decoder, init_variables


@struct.dataclass
class TrainState:
  """Everything a step changes. `router` holds the expert biases, which the optimizer never sees.

  spikes: `spikes.Spikes` where a run looks for them, else None, and then no part of its checkpoints.
  """

  step: jax.Array  # int32, optimizer steps taken
  params: Any
  router: Any
  opt_state: Any
  spikes: Any = None


def abstract_state(experiment: Experiment, mesh: Mesh):
  """TrainState of ShapeDtypeStructs with shardings: what `init_state` returns and what a checkpoint restores into."""
  boxed = jax.eval_shape(lambda: _init(experiment, 0))
  placed = sharding.tree_shardings(boxed, mesh)
  return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), nn.unbox(boxed), placed
  )


def abstract_batch(experiment: Experiment, mesh: Mesh):
  """A batch [B, T] of ShapeDtypeStructs in its placement."""
  shape = experiment.data.batch_size, experiment.data.seq_len
  placed = NamedSharding(mesh, sharding.batch_spec())
  dtypes = dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), jnp.int32) | {'loss_mask': jnp.float32}
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for name, dtype in dtypes.items()}


def make_init(experiment: Experiment, mesh: Mesh) -> Callable:
  """init(seed: int32) -> TrainState, compiled once for all seeds; made in its placement and the same on every mesh."""
  placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment, mesh))
  return jax.jit(lambda seed: nn.unbox(_init(experiment, seed)), out_shardings=placed)


def init_state(experiment: Experiment, mesh: Mesh) -> TrainState:
  """The initial state of train.seed."""
  return make_init(experiment, mesh)(jnp.int32(experiment.train.seed))


def _init(experiment: Experiment, seed) -> TrainState:
  variables = init_variables(experiment.model, None, jax.random.key(seed))
  transform = optimizer.build(experiment.optim, experiment.train.steps)
  # The moments are built from boxed parameters, so that they inherit the logical axes.
  opt_state = transform.init(variables['params'])
  watched = spikes.start() if experiment.train.spike_deviations or experiment.train.skip_spikes else None
  return TrainState(jnp.zeros((), jnp.int32), variables['params'], variables.get('router', {}), opt_state, watched)


def loss_terms(
    experiment: Experiment, mesh: Mesh | None, params, router, batch, mtp_weight, token_count, warmup=None
):
  """Loss of one (micro)batch as its share of a step of `token_count` predicted tokens.

  batch: tokens, targets, segment_ids, positions int32 [B, T], loss_mask float32 [B, T]. warmup: MSA's, a bool scalar.

  Returns:
    (loss, (metrics, aux)): metrics are scalars that sum over microbatches; aux mirrors the router collection.
  """
  m = experiment.model
  variables = {'params': params, 'router': router}
  inputs = batch['tokens'], batch['positions'], batch['segment_ids']
  out = Decoder(m, mesh).apply(variables, *inputs, warmup=warmup)
  chunk, mask = experiment.train.loss_chunk, batch['loss_mask']
  z_loss_weight = experiment.train.z_loss_weight
  total, nll, correct = loss.cross_entropy(out.hidden, out.head, batch['targets'], mask, chunk, z_loss_weight, mesh)
  total /= token_count
  metrics = {'loss': nll / token_count, 'accuracy': correct / token_count}

  for i, hidden in enumerate(out.mtp):
    # Target of module i is i + 1 further than the next token; it must exist and lie in the same document.
    targets = shift_left(batch['targets'], i + 1)
    same = shift_left(batch['segment_ids'], i + 1) == batch['segment_ids']
    mtp_mask = shift_left(mask, i + 1) * same
    mtp_loss, mtp_nll, _ = loss.cross_entropy(hidden, out.head, targets, mtp_mask, chunk, mesh=mesh)
    metrics[f'mtp_loss_{i + 1}'] = mtp_nll / token_count
    total += mtp_weight / len(out.mtp) * mtp_loss / token_count

  microbatches = experiment.train.accumulate
  leaves = jax.tree.leaves(out.aux, is_leaf=_is_aux)
  if layers := [leaf for leaf in leaves if isinstance(leaf, MoEAux)]:
    mean = lambda field: jnp.mean(jnp.concatenate([jnp.ravel(getattr(a, field)) for a in layers])) / microbatches
    metrics |= {f'router/{field}': mean(field) for field in ('balance_loss', 'entropy', 'dropped')}
    total += m.moe.balance_loss_weight * metrics['router/balance_loss']
  if layers := [leaf for leaf in leaves if isinstance(leaf, IndexAux)]:
    metrics |= {name: value / microbatches for name, value in index_metrics(out.aux, m.pattern).items()}
    total += m.msa.kl_weight * sum(jnp.sum(a.kl) for a in layers) / microbatches
  return total, (metrics, out.aux)


def _is_aux(node):
  return isinstance(node, MoEAux | IndexAux)


def index_metrics(aux, pattern):
  """{'msa/kl/layer_03': ..., 'msa/block_recall/...', 'msa/score_recall/...'} of each MSA layer of the main model."""
  metrics, first_layer = {}, 0
  for s, segment in enumerate(parse_pattern(pattern)):
    for i, layer in enumerate(segment.unit):
      if layer.mixer == 'msa':
        told = aux[f'segment_{s}'][f'layer_{i}']['mixer']
        for repeat in range(segment.repeats):
          number = first_layer + i + repeat * len(segment.unit)
          for field in ('kl', 'block_recall', 'score_recall'):
            metrics[f'msa/{field}/layer_{number:02d}'] = getattr(told, field)[repeat]
    first_layer += len(segment.unit) * segment.repeats
  return metrics


def loads(aux, share):
  """Expert loads, times `share`, in the structure of the router collection: {'...': {'ffn': {'bias': [layers, E]}}}."""
  found = {}
  for name, node in aux.items():
    if isinstance(node, MoEAux):
      found[name] = {'bias': node.load_E * share}
    elif isinstance(node, dict) and (inside := loads(node, share)):
      found[name] = inside
  return found


def make_train_step(experiment: Experiment, mesh: Mesh) -> Callable:
  """train_step(state, batch) -> (state, metrics), to be jitted with the state donated.

  metrics: scalars (loss, grad_norm, learning_rate, ...) and 'load', the expert loads of every layer. Gradients of
  `accumulate` microbatches are summed, each weighted by its share of the step's predicted tokens, so that the result
  equals one big batch. A run that looks for spikes has 'spikes_in_a_row' too, and their number so far: 'skipped' where
  their batches are, else 'spikes'.
  """
  transform = optimizer.build(experiment.optim, experiment.train.steps)
  learning_rate = optimizer.schedule(experiment.optim, experiment.train.steps)
  mtp_schedule = optimizer.mtp_weight(experiment.model.mtp, experiment.optim, experiment.train.steps)
  microbatches = experiment.train.accumulate
  warmup_steps = experiment.model.msa.warmup_steps

  def train_step(state: TrainState, batch):
    token_count = jnp.maximum(jnp.sum(batch['loss_mask']), 1.0)
    routed_count = jnp.sum(batch['segment_ids'] > 0)
    weight = mtp_schedule(state.step)
    # Traced, so that one program serves both phases; None where there is no warm-up keeps it out of the program.
    warmup = state.step < warmup_steps if warmup_steps else None

    def gradients(microbatch):
      function = lambda params: loss_terms(
          experiment, mesh, params, state.router, microbatch, weight, token_count, warmup
      )
      (_, (metrics, aux)), grads = jax.value_and_grad(function, has_aux=True)(state.params)
      return grads, metrics, loads(aux, jnp.sum(microbatch['segment_ids'] > 0) / routed_count)

    if microbatches == 1:
      grads, metrics, load = gradients(batch)
    else:
      # Strided, so that every microbatch takes rows from every shard.
      split = lambda a: jnp.moveaxis(a.reshape(a.shape[0] // microbatches, microbatches, *a.shape[1:]), 1, 0)
      pieces = jax.tree.map(split, batch)
      shapes = jax.eval_shape(gradients, jax.tree.map(lambda a: a[0], pieces))
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      add = lambda total, piece: (jax.tree.map(jnp.add, total, gradients(piece)), None)
      (grads, metrics, load), _ = jax.lax.scan(add, zeros, pieces)

    metrics['grad_norm'] = optax.global_norm(grads)
    metrics['learning_rate'] = learning_rate(updates_taken(experiment, state))
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    rate = experiment.model.moe.bias_update_rate
    router = state.router
    if rate:
      router = jax.tree.map(lambda bias, share: update_bias(bias, share, rate), router, load)
    if experiment.model.mtp.depth:
      metrics['mtp_weight'] = weight
    metrics['load'] = load
    after = TrainState(state.step + 1, params, router, opt_state, state.spikes)
    if state.spikes is not None:
      after, metrics = look_for_spike(experiment, state, after, metrics)
    return after, metrics

  return train_step


def look_for_spike(experiment: Experiment, before: TrainState, after: TrainState, metrics):
  """(state, metrics) of a step that may be a spike: `after`, or `before` one step older where its batch is skipped."""
  t = experiment.train
  watched, spike = spikes.judge(before.spikes, metrics['loss'], metrics['grad_norm'], t.spike_deviations)
  if t.skip_spikes:
    after = spikes.choose(spike, before, after).replace(step=after.step)
  counted = {'skipped' if t.skip_spikes else 'spikes': watched.total, 'spikes_in_a_row': watched.in_a_row}
  return after.replace(spikes=watched), metrics | counted


def updates_taken(experiment: Experiment, state: TrainState):
  """Where the learning rate stands on its schedule: a skipped batch leaves the optimizer's own count behind."""
  return state.step - state.spikes.total if experiment.train.skip_spikes else state.step


def trace_train_step(experiment: Experiment, mesh: Mesh):
  """The training step traced at its abstract state and batch, the state donated and left in its placement.

  The mesh's devices need not be this host's: kernels that ask what chip they are for are told the mesh's.
  """
  state = abstract_state(experiment, mesh)
  placed = jax.tree.map(lambda leaf: leaf.sharding, state)
  step = jax.jit(make_train_step(experiment, mesh), donate_argnums=0, out_shardings=(placed, None))
  batch = abstract_batch(experiment, mesh)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return step.trace(state, batch)


def make_eval_step(experiment: Experiment, mesh: Mesh) -> Callable:
  """eval_step(params, router, batch) -> (summed nats, correct predictions, predicted tokens)."""

  def eval_step(params, router, batch):
    variables = {'params': params, 'router': router}
    out = Decoder(experiment.model, mesh).apply(variables, batch['tokens'], batch['positions'], batch['segment_ids'])
    mask = batch['loss_mask']
    chunk = experiment.train.loss_chunk
    _, nll, correct = loss.cross_entropy(out.hidden, out.head, batch['targets'], mask, chunk, mesh=mesh)
    return nll, correct, jnp.sum(mask)

  return eval_step
