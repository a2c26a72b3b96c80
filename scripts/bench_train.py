"""Training speed on CPU against Hugging Face transformers' MiniMax-M2 in torch, the two taking turns in one run.

  pip install -e '.[hf]'
  python scripts/bench_train.py --peer=transformers --output=docs/results/bench_train_cpu.json

Both train every arm in float32 from the same weights on the same tokens: forward, backward, clipping, AdamW. Each lives
in a process of its own with its own threads and waits while the other works. The losses of the first step are compared,
so that a peer that computes something else cannot pass for a fast one. A row counts as one document, as transformers
takes a faster path then; ours has none, so it does the work of packed rows either way.

Ours is the step that `mmx.train` runs, compiled by the same `Programs`; the peer's is plain eager torch with
experts_implementation='grouped_mm', scaled-dot-product attention and torch.optim.AdamW's own choice of loops. Ours also
does what the peer leaves out: expert biases, router statistics, accuracy and the learning-rate schedule.
"""

import importlib.util
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from operator import attrgetter

import numpy as np
from absl import app, flags, logging

from mmx import config, host, train
from mmx.config import ConfigError, Experiment, ModelConfig
from mmx.convert import m2, mapping

PEER = flags.DEFINE_enum('peer', 'transformers', ['transformers'], 'What to compare with.')
STEPS = flags.DEFINE_integer('steps', 12, 'Steps of one turn.', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds; in each, both sides take one turn on every arm.', lower_bound=1)
THREADS = flags.DEFINE_integer('threads', 2, 'CPU cores and threads of each side.', lower_bound=1)
OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the figures; none is written if left out.')
_SIDE = flags.DEFINE_enum('side', None, ['ours', 'transformers'], 'Be this side, ordered about on stdin. Internal.')

WARM_UP = 3  # steps; the first compiles or fills torch's caches, and both settle their memory within three
BATCHES = 8  # different ones, used in turn
PAUSE = 0.3  # seconds between turns: worker threads of both libraries spin for some milliseconds before they sleep
FINE_OVER_COARSE = 0.7  # tokens/s that an arm must keep of the first arm's; arms are equal in FLOPs


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; every option starts with --')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if _SIDE.value:
      work(SIDES[_SIDE.value], load_arms())
    else:
      compare(load_arms())
  except ConfigError as error:
    sys.exit(f'error: {error}')


def load_arms() -> dict[str, Experiment]:
  experiment_file = config.load_experiment(train.CONFIG.value, train.SCALE.value)
  overrides = dict(map(config.parse_assignment, train.SET.value))
  names = train.ARM.value or experiment_file.arms
  return {name: config.override(config.select_arm(experiment_file, name), overrides) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# the parent: whose turn it is, and what comes out


def compare(arms: dict[str, Experiment]):
  missing = [name for name in ('torch', 'transformers') if importlib.util.find_spec(name) is None]
  if missing:
    raise ConfigError(f"--peer={PEER.value} needs {' and '.join(missing)}: pip install -e '.[hf]'")
  if THREADS.value > len(os.sched_getaffinity(0)):
    raise ConfigError(f'--threads={THREADS.value}: this machine has {len(os.sched_getaffinity(0))} CPU core(s)')
  for experiment in arms.values():
    config.validate(experiment, num_devices=1)
    hf_fields(experiment.model)

  result = provenance(arms)
  if (load := result['load_average_before']) > 0.5:
    print(f'warning: the machine is busy (load {load:.1f}): figures will be off', file=sys.stderr)
  sides = {name: Side(name) for name in SIDES}
  first_loss = {arm: {name: side.go(arm, WARM_UP)['loss'] for name, side in sides.items()} for arm in arms}
  for arm, losses in first_loss.items():
    ours, peer = losses.values()
    if abs(ours - peer) > 1e-4 * peer:
      sys.exit(f'error: {arm}: not the same computation: the first loss is {ours:.6f} here and {peer:.6f} there')

  rounds, idle = [], {name: [] for name in sides}
  for number in range(ROUNDS.value):
    seconds = {arm: {} for arm in arms}
    for arm in arms:
      for name in sorted(sides, reverse=number % 2 == 1):  # who begins alternates, so that slow drift cancels
        turn = sides[name].go(arm, STEPS.value)
        seconds[arm][name] = turn['seconds'] / STEPS.value
        idle[name].append(turn['idle_cpu_share'])
        time.sleep(PAUSE)
    rounds.append(seconds)
    steps = '; '.join(
        f'{arm} ' + ', '.join(f'{name} {1e3 * seconds[arm][name]:.0f} ms' for name in sides) for arm in arms
    )
    print(f'round {number + 1}/{ROUNDS.value}, per step: {steps}', file=sys.stderr, flush=True)
  for side in sides.values():
    side.close()

  waiting = {name: max(shares) for name, shares in idle.items()}
  result |= {'first_loss': first_loss, 'idle_cpu_share': waiting, 'arms': {}, 'seconds_per_step': rounds}
  reference = next(iter(arms))
  for arm, experiment in arms.items():
    tokens = experiment.data.batch_size * experiment.data.seq_len
    result['arms'][arm] = {
        'tokens_per_second': {name: spread([tokens / r[arm][name] for r in rounds]) for name in sides},
        'ours_over_peer': spread([r[arm][PEER.value] / r[arm]['ours'] for r in rounds]),
        f'ours_over_ours_{reference}': spread([r[reference]['ours'] / r[arm]['ours'] for r in rounds]),
    }
  show(result, reference)
  if OUTPUT.value:
    path = pathlib.Path(OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')


def spread(values):
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def show(result, reference):
  print(f'{result["cpu"]}, {result["threads"]} threads each; median of {ROUNDS.value} rounds (lowest to highest)')
  for arm, figures in result['arms'].items():
    speed, ratio = figures['tokens_per_second'], figures['ours_over_peer']
    print(
        f'{arm}: ours {speed["ours"]["median"]:,.0f} tokens/s, '
        f'{PEER.value} {speed[PEER.value]["median"]:,.0f} tokens/s, '
        f'ratio {ratio["median"]:.2f} ({ratio["min"]:.2f} to {ratio["max"]:.2f})'
    )
    if arm != reference:
      ratio = figures[f'ours_over_ours_{reference}']
      print(
          f'{arm} over {reference}, ours: {ratio["median"]:.2f} ({ratio["min"]:.2f} to {ratio["max"]:.2f}), '
          f'aim {FINE_OVER_COARSE}'
      )


def provenance(arms):
  model_names = [line.partition(':')[2].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')]
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'transformers')
  return {
      'device': 'cpu', 'cpu': model_names[0] if model_names else platform.machine(), 'cores': os.cpu_count(),
      'threads': THREADS.value, 'load_average_before': os.getloadavg()[0], 'date': time.strftime('%Y-%m-%d'),
      'versions': {'python': platform.python_version()} | {name: metadata.version(name) for name in packages},
      'config': train.CONFIG.value, 'scale': train.SCALE.value, 'set': train.SET.value,
      'batch': {arm: [e.data.batch_size, e.data.seq_len] for arm, e in arms.items()},
      'steps_per_turn': STEPS.value, 'rounds': ROUNDS.value,
  }


class Side:
  """A process that computes when told to and otherwise blocks on its standard input."""

  def __init__(self, name):
    threads = str(THREADS.value)
    self.process = subprocess.Popen(
        [sys.executable, __file__, f'--side={name}', *sys.argv[1:]], text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads},
    )

  def go(self, arm, steps):
    """{'seconds': of all steps, 'loss': of the first, 'idle_cpu_share': CPU seconds per second of the wait before}."""
    self.process.stdin.write(f'{arm} {steps}\n')
    answer = self.process.stdout.readline()
    if not answer:
      sys.exit(f'error: the process with {self.process.args[2]} ended early, for the reason above')
    return json.loads(answer)

  def close(self):
    self.process.stdin.close()
    self.process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# the sides


def work(trainer, arms):
  """Serves orders 'arm steps', one a line; the first order for an arm builds and compiles it."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: THREADS.value])  # before any library counts the cores
  trainers = {}
  cpu, clock = time.process_time(), time.perf_counter()
  for line in sys.stdin:
    idle = (time.process_time() - cpu) / (time.perf_counter() - clock)
    arm, steps = line.split()
    if arm not in trainers:
      trainers[arm] = trainer(arms[arm])
    began = time.perf_counter()
    loss = trainers[arm].run(int(steps))
    clock = time.perf_counter()
    print(json.dumps({'seconds': clock - began, 'loss': loss, 'idle_cpu_share': idle}), flush=True)
    cpu, clock = time.process_time(), time.perf_counter()


def batches(experiment: Experiment) -> list[dict[str, np.ndarray]]:
  """The first batches of training, with every row taken as one document."""
  from mmx.data import pipeline, tokenizer

  iterator = pipeline.train_iterator(experiment.data, tokenizer.load(experiment.data.tokenizer))
  drawn = list(itertools.islice(iterator, BATCHES))
  pipeline.close(lambda: iterator)  # its thread must not work ahead while the clock runs
  for batch in drawn:
    batch['segment_ids'] = np.ones_like(batch['segment_ids'])
    batch['positions'] = np.broadcast_to(np.arange(experiment.data.seq_len, dtype=np.int32), batch['tokens'].shape)
  return drawn


class Ours:
  """The production step."""

  def __init__(self, experiment):
    host.use_every_core()
    import jax

    from mmx import distributed, sharding, train_step

    host.cache_compilations()
    programs = train.Programs(experiment)
    put = lambda batch: distributed.put_batch(batch, programs.mesh, sharding.batch_spec())
    self.batches = itertools.cycle([put(batch) for batch in batches(experiment)])
    self.state = train_step.init_state(experiment, programs.mesh)
    self.step = programs.train_step
    self.wait = jax.block_until_ready

  def run(self, steps):
    losses = []
    for batch in itertools.islice(self.batches, steps):
      self.state, metrics = self.step(self.state, batch)
      losses.append(metrics['loss'])
    self.wait(self.state)
    return float(losses[0])


class Transformers:
  """transformers' model and torch's optimizer."""

  def __init__(self, experiment):
    import jax
    import torch

    from mmx import sharding, train_step

    torch.set_num_threads(THREADS.value)
    state = jax.device_get(train_step.init_state(experiment, sharding.build_mesh(experiment.mesh)))
    self.model = hf_model(experiment.model, state.params, state.router, experts='grouped_mm', attention='sdpa')
    self.optimizer = hf_optimizer(self.model, experiment.optim)
    self.clip_norm = experiment.optim.clip_norm
    self.batches = itertools.cycle([hf_batch(batch) for batch in batches(experiment)])

  def run(self, steps):
    losses = [hf_step(self.model, self.optimizer, self.clip_norm, b) for b in itertools.islice(self.batches, steps)]
    return losses[0].item()


SIDES = {'ours': Ours, 'transformers': Transformers}

# ----------------------------------------------------------------------------------------------------------------------
# our model as transformers' MiniMax-M2

# What the comparison leaves out, though the architecture has it or an equal.
PLAIN = {
    'moe.balance_loss_weight': 0.0, 'moe.capacity_factor': 0.0, 'mtp.depth': 0, 'tie_embeddings': False,
    'compute_dtype': 'float32',
}


def hf_fields(model: ModelConfig) -> dict:
  """Arguments of transformers' MiniMaxM2Config.

  Raises:
    ConfigError: the model has something that MiniMax-M2 in transformers lacks.
  """
  m2.FAMILY.require(model)
  for path, needed in PLAIN.items():
    if (found := attrgetter(path)(model)) != needed:
      raise ConfigError(f'model.{path} = {found!r}: transformers\' MiniMax-M2 is compared at {needed!r} only')
  fields = m2.FAMILY.write(model)
  of_the_file = ('architectures', 'model_type')
  return {name: value for name, value in fields.items() if name not in of_the_file} | {
      'bos_token_id': None, 'eos_token_id': None, 'use_cache': False,
  }


def hf_config(model: ModelConfig):
  """transformers' config of the same model; raises as `hf_fields`."""
  from transformers import MiniMaxM2Config

  return MiniMaxM2Config(**hf_fields(model))


def hf_weights(model: ModelConfig, **collections) -> dict[str, np.ndarray]:
  """Our params and router, or gradients, under the names and in the layouts that transformers has in memory."""
  return mapping.to_theirs(model, m2.TRANSFORMERS, collections)


def hf_model(model: ModelConfig, params, router, *, experts, attention):
  """transformers' MiniMaxM2ForCausalLM with our weights; every one of its own must be given."""
  import torch
  from transformers import MiniMaxM2ForCausalLM

  hf = MiniMaxM2ForCausalLM._from_config(
      hf_config(model), experts_implementation=experts, attn_implementation=attention
  )
  weights = hf_weights(model, params=params, router=router)
  hf.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()}, strict=True)
  return hf.train()


def hf_optimizer(hf, optim: config.OptimConfig):
  """AdamW at the peak learning rate, with decay on matrices only."""
  import torch

  matrices = [weight for weight in hf.parameters() if weight.ndim > 1]
  scales = [weight for weight in hf.parameters() if weight.ndim == 1]
  return torch.optim.AdamW(
      [{'params': matrices, 'weight_decay': optim.weight_decay}, {'params': scales, 'weight_decay': 0.0}],
      lr=optim.learning_rate, betas=(optim.b1, optim.b2), eps=optim.eps,
  )


def hf_batch(batch):
  """Tokens and the targets of our batch; -100 is transformers' mask. Positions tell documents apart, if need be."""
  import torch

  labels = np.where(batch['loss_mask'] > 0, batch['targets'], -100)
  fields = {'input_ids': batch['tokens'], 'shift_labels': labels}
  if np.any(np.diff(batch['positions']) != 1):
    fields['position_ids'] = batch['positions']
  return {name: torch.tensor(np.asarray(value), dtype=torch.long) for name, value in fields.items()}


def hf_step(hf, optimizer, clip_norm, batch):
  import torch

  optimizer.zero_grad(set_to_none=True)
  # The loss reads shift_labels; `labels` only asks for it.
  loss = hf(**batch, labels=batch['shift_labels']).loss
  loss.backward()
  torch.nn.utils.clip_grad_norm_(hf.parameters(), clip_norm)
  optimizer.step()
  return loss.detach()


if __name__ == '__main__':
  flags.set_default(train.CONFIG, 'experiments/moe_ablation.py')
  app.run(main)
