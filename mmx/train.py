"""Trains every arm and seed of an experiment and compares them.

  python -m mmx.train --config=experiments/moe_ablation.py
  python -m mmx.train --config=experiments/moe_ablation.py --arm=e128_top8 --scale=h200 --set train.steps=500

A run lives in <workdir>/<arm>/seed<k>: config.gin, run.json, TensorBoard events, metrics.jsonl, goodput.json,
checkpoints, and at the end result.json. The same command continues what was stopped and skips what is finished; the
table, the figure and their TensorBoard run are rewritten in <workdir> whenever a run ends. A workdir may be gs://.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from typing import Any, Callable, NamedTuple

from absl import app, flags, logging
from etils import epath

from mmx import config, goodput, host, profiler
from mmx.command import errors_in_one_line, stop
from mmx.run import Run, absolute, provenance

CONFIG = flags.DEFINE_string('config', None, 'Experiment: a .py file with get_config, or a .gin file.')
ARM = flags.DEFINE_list('arm', None, 'Arms to run, by name; all if left out.')
SCALE = flags.DEFINE_string('scale', 'cpu', 'Size of the experiment: cpu, h200, ... as its file allows.')
SEEDS = flags.DEFINE_list('seeds', None, 'Seeds to run; those of the experiment file if left out.')
SET = flags.DEFINE_multi_string('set', [], 'Override one field, e.g. --set train.steps=500. Repeatable.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the runs; runs/<experiment>_<scale> if left out.')
PRINT_CONFIG = flags.DEFINE_bool('print_config', False, 'Print each arm and its difference from the defaults; exit.')
PROFILE = flags.DEFINE_string('profile', None, 'Steps to trace for TensorBoard: 20:25 is 20 to 24; so does SIGUSR1.')
RESUME = flags.DEFINE_bool('resume', True, 'Continue what the workdir holds; --noresume refuses to.')


def parse_flags(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    stop(' '.join(str(error).split()))


def main(argv):
  if len(argv) > 1:
    stop(f'unexpected argument {argv[1]!r}; every option starts with --')
  if CONFIG.value is None:
    stop('--config is missing; name an experiment, such as --config=experiments/moe_ablation.py')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  with errors_in_one_line():
    run_experiment()


# ----------------------------------------------------------------------------------------------------------------------
# all arms, all seeds


class Asked(NamedTuple):
  """What the flags ask for; mmx.sweep has the same ones."""

  file: config.ExperimentFile
  arms: dict[str, config.Experiment]
  seeds: list[int]
  workdir: epath.Path

  def runs(self) -> list[Run]:
    """Seed by seed, each arm; the arms of the file tell what distinguishes one, however few are asked for."""
    pairs = [(name, seed) for seed in self.seeds for name in self.arms]
    differs = arms_differ_in(self.file.arms)
    return [
        Run(name, seed, self.arms[name], self.workdir / name / f'seed{seed}', index, len(pairs), differs)
        for index, (name, seed) in enumerate(pairs, start=1)
    ]


def asked_for() -> Asked:
  """Raises ConfigError for a flag that cannot be meant."""
  file = config.load_experiment(CONFIG.value, SCALE.value)
  arms = {name: config.select_arm(file, name) for name in ARM.value or file.arms}
  for assignment in SET.value:
    field = dict([config.parse_assignment(assignment)])
    arms = {name: config.override(arm, field) for name, arm in arms.items()}
  try:
    seeds = list(dict.fromkeys(int(seed) for seed in SEEDS.value or file.seeds))
  except ValueError:
    raise config.ConfigError(f'--seeds: expected whole numbers, found {",".join(SEEDS.value)}') from None
  workdir = epath.Path(WORKDIR.value or f'runs/{file.name}_{SCALE.value}')
  try:
    workdir.exists()
  except ImportError as error:  # fsspec names the package
    raise config.ConfigError(f"--workdir={workdir}: {error}; pip install -e '.[gcs]' brings it") from None
  return Asked(file, arms, seeds, workdir)


def write_summary(asked: Asked) -> str:
  """Compares what has finished in the workdir, and returns it as a page of a terminal."""
  from mmx import report
  from mmx.evals import report as evals_report

  file, arms = asked.file, list(asked.arms)
  summary = report.write(asked.workdir, file.metric, file.published, file.doc, arms)
  return (f'\n{summary.to_terminal()}\n{evals_report.append(asked.workdir, arms)}\n'
          f'{asked.workdir}/summary.md has the table; tensorboard --logdir {asked.workdir}')


def run_experiment():
  """What the flags ask for: seed by seed, each arm that has not finished, then the comparison of all that have."""
  began = time.time()
  asked = asked_for()
  experiment_file, arms, seeds, workdir = asked
  if PRINT_CONFIG.value:
    return print_configs(arms)
  traced = profiler.parse_window(PROFILE.value)

  host.use_every_core()
  import jax  # after the flags, so that a mistake in them is told at once

  from mmx import distributed, flops

  host.cache_compilations()
  distributed.initialize()
  runs = asked.runs()
  for run in runs:
    config.validate(run.experiment, jax.device_count())
    run.check_origin(experiment_file.arms, ahead=runs[: run.index - 1])
    if '[' in (path := os.fspath(absolute(run.folder))):  # Orbax would save, but not find the arrays again
      raise config.ConfigError(f'{path}: a run cannot have [ in its path, which Orbax reads as a pattern')
  flops.assert_comparable({name: arm.model for name, arm in arms.items()}, experiment_file.tolerance)
  say(f'{experiment_file.name} at scale {SCALE.value}: {len(arms)} arm(s) x {len(seeds)} seed(s) -> {workdir}')
  for name, arm in arms.items():
    count = flops.count_parameters(arm.model)
    say(
        f'  {name}: {count.total / 1e6:.3f}M parameters, {count.active_without_router / 1e6:.3f}M active per token '
        f'(+ {count.router / 1e6:.3f}M router)'
    )

  waiting = [run for run in runs if not run.finished(RESUME.value)]  # all folders are looked at before one is written
  programs = {}
  tracer = profiler.Profiler(traced if distributed.is_primary() else range(0))
  with distributed.Preemption() as preemption, tracer:
    for run in waiting:
      if preemption.agreed():
        return say(f'stopped by {preemption.signal_name or "another process"} before {run.arm}/seed{run.seed}; '
                   'the same command continues')
      if run.arm not in programs:
        programs[run.arm] = Programs(arms[run.arm])
      if not train(run, programs[run.arm], experiment_file.arms, preemption, tracer, goodput.Goodput(began)):
        return
      began = time.time()
      if distributed.is_primary():
        summary = write_summary(asked)
  if distributed.is_primary():
    print(summary if waiting else write_summary(asked))


def print_configs(arms):
  for name, arm in arms.items():
    print(f'# ---- arm {name}: resolved\n{config.dump(arm)}\n# ---- arm {name}: differs from the defaults in')
    for path, default, value in config.diff(config.Experiment(), arm):
      print(f'#   {path} = {value!r}  (default {default!r})')


def arms_differ_in(arms):
  """Dotted paths of the fields that are not the same in all arms."""
  first, *others = arms.values()
  return sorted({path for other in others for path, _, _ in config.diff(first, other)})


def say(line):
  import jax

  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# one run


class Programs:
  """The compiled steps of one arm, shared by its seeds: made once, unable to recompile.

  The training step is traced at once, so that a model that cannot be built says so before a folder is made, and
  compiled when the loop asks for it.
  """

  def __init__(self, experiment: config.Experiment):
    import jax

    from mmx import sharding, train_step

    sizes = config.resolve_mesh(experiment.mesh, jax.device_count())
    self.experiment = experiment
    self.mesh = sharding.build_mesh(experiment.mesh)
    self.devices = math.prod(sizes.values())
    self._lowered = train_step.trace_train_step(experiment, self.mesh).lower()

  @functools.cached_property
  def state(self):
    from mmx import train_step

    return train_step.abstract_state(self.experiment, self.mesh)

  @functools.cached_property
  def init(self):
    from mmx import train_step

    return train_step.make_init(self.experiment, self.mesh)

  @functools.cached_property
  def train_step(self):
    return self._settled(self._lowered.compile())

  @functools.cached_property
  def eval_step(self):
    import jax

    from mmx import train_step

    step = train_step.make_eval_step(self.experiment, self.mesh)
    batch = train_step.abstract_batch(self.experiment, self.mesh)
    return self._settled(jax.jit(step).lower(self.state.params, self.state.router, batch).compile())

  def _settled(self, compiled):
    from mmx import sharding

    if sharding.platform_of(self.mesh) == 'cpu':  # its programs take their memory from the process's heap
      host.leave_holes()
    return compiled


class Data(NamedTuple):
  """What a run reads: batches without end, and those that it is judged by."""

  vocabulary: Any
  iterator: Any  # local batches of numpy arrays
  put: Callable  # local batch -> global arrays on the mesh
  heldout_batches: list
  bytes_per_token: float
  corpus: str  # its fingerprint


def open_data(experiment: config.Experiment, mesh) -> Data:
  """The data of a run. Raises ConfigError where a source, the tokenizer or the rows do not fit; writes nothing."""
  from mmx import distributed, sharding
  from mmx.data import pipeline, tokenizer

  vocabulary = tokenizer.load(experiment.data.tokenizer)
  if vocabulary.vocab_size > experiment.model.vocab_size:
    raise config.ConfigError(
        f'model.vocab_size: {experiment.model.vocab_size} is smaller than the {vocabulary.vocab_size} tokens of '
        f'data.tokenizer = {experiment.data.tokenizer!r}'
    )
  shard = distributed.data_shard(mesh)
  iterator = pipeline.train_iterator(experiment.data, vocabulary, *shard)
  heldout = pipeline.heldout(experiment.data, vocabulary, experiment.eval.batches, *shard)
  put = functools.partial(distributed.put_batch, mesh=mesh, spec=sharding.batch_spec())
  corpus = pipeline.fingerprint(experiment.data, vocabulary)
  return Data(vocabulary, iterator, put, [put(batch) for batch in heldout.batches], heldout.bytes_per_token, corpus)


def train(run: Run, programs: Programs, arms, preemption, tracer, spent) -> bool:
  """Trains one run to its end and writes result.json; False if `preemption` asked to stop on the way.

  arms: names that train.init_from may mean. tracer: `profiler.Profiler`. spent: `goodput.Goodput` of this attempt.

  Raises:
    ConfigError: the data do not fit, which leaves no trace, or another job has the folder.
    OSError: something cannot be written, such as on a full disk; it names a path.
  """
  from mmx import distributed

  data = open_data(run.experiment, programs.mesh)  # before the folder, and before anything is compiled
  try:
    with distributed.claim(run.folder):
      return train_claimed(run, programs, data, arms, preemption, tracer, spent)
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(run.folder)) from error  # a write does not say what it wrote


def train_claimed(run, programs, data, arms, preemption, tracer, spent) -> bool:
  """`train` in a folder that no other job writes to."""
  import jax
  import numpy as np

  from mmx import checkpoint, distributed, flops, metrics, watch
  from mmx.evals import run as evals

  experiment, mesh = run.experiment, programs.mesh
  t, steps, primary = experiment.train, experiment.train.steps, distributed.is_primary()
  tokens_per_step = experiment.data.batch_size * experiment.data.seq_len

  # ---- state: a checkpoint's or a new one
  stores = open_stores(run, programs.state)
  with spent.spent('restore'):
    newest = max(stores, key=lambda store: store.latest_valid() or 0)  # the first of equals is the one that all share
    saved = newest.latest_metadata()
    if saved and saved['tokenizer'] != data.vocabulary.fingerprint:
      raise config.ConfigError(
          f'data.tokenizer: {experiment.data.tokenizer!r} ({data.vocabulary.fingerprint}) is not the tokenizer of the '
          f'checkpoint in {run.folder} ({saved["tokenizer"]})'
      )
    restored = newest.restore(programs.state, data.iterator)
  if restored:
    start, state, saved = restored
  else:
    start, state, saved = 0, programs.init(np.int32(run.seed)), {'curve': {}}
    if origin := run.origin(arms):
      state = start_from(origin, state)
      saved['seen'] = tokens_seen(origin)
  seen = saved.get('seen', 0)  # tokens behind the parameters that it started from
  curve = saved['curve'] or {'step': [], 'tokens': [], 'heldout_loss': []}
  spent_file = run.folder / 'goodput.json'
  if primary:
    run.folder.mkdir(parents=True, exist_ok=True)
    metrics.write_whole(run.folder / 'config.gin', config.dump(experiment))
    metrics.write_whole(run.folder / 'run.json', json.dumps(provenance(data.corpus, start), indent=1))
    spent.resume(spent_file.read_bytes() if spent_file.exists() else None, start)

  # ---- what a researcher sees
  peak = flops.peak_flops(mesh.devices.flat[0], experiment.model.compute_dtype) * programs.devices
  flops_per_token = flops.step_flops(experiment)
  progress = metrics.Progress(run.arm, run.seed, steps, start_step=start, run=run.index, runs=run.of,
                              stream=sys.stderr if primary else open(os.devnull, 'w'))
  throughput = metrics.Throughput(tokens_per_step, flops_per_token, peak)
  late_metrics = metrics.LateMetrics()
  watched = watch.Watch(run.folder, jax.process_index(), t.hang_timeout)
  writer = metrics.RunWriter(run.folder, start) if primary else None
  if writer:
    writer.text('config', f'```\n{config.dump(experiment)}```')
    different = config.to_flat_dict(experiment)
    varying = {path: different[path] for path in run.differs}
    writer.hparams({'arm': run.arm, 'seed': run.seed} | varying, ['heldout/loss', 'heldout/bits_per_byte', 'loss'])
  # Losses since the last scalars and what the result will need: both go into a checkpoint and come back from it.
  interval, last = saved.get('interval', []), saved.get('last', {})

  def record(step, values):
    """Scalars of a finished step, which came one step late."""
    watched.beat(step)
    load_LE = loads_by_layer(values.pop('load'), experiment.model.pattern)
    spikes = int(values.pop('spikes_in_a_row', 0))
    skipped = spikes and t.skip_spikes
    if spikes:
      told = f'loss {values["loss"]:.3f}, gradient norm {values["grad_norm"]:.3g}'
      progress.note(f'step {step}: spike, {told}' + '; its batch is skipped' * bool(skipped))
    if not skipped:
      checkpoint.check_finite(step, values)
    elif spikes >= t.max_skips:
      raise checkpoint.NonFiniteError(f'step {step}: {spikes} batches skipped in a row, the last one with {told}')
    throughput.tick(step)
    if not skipped:
      interval.append(float(values['loss']))
    moving = throughput.moving()
    progress.update(step, float(values['loss']), moving.get('tokens_per_second'))
    last.update(values, load=load_LE)
    if writer and (step % t.log_every == 0 or step == steps):
      values = {name: float(value) for name, value in values.items()}
      values['loss'] = last['loss'] = float(np.mean(interval or [values['loss']]))
      writer.scalars(
          step, values | moving | metrics.load_scalars(load_LE) | metrics.memory_stats() | spent.shares()
      )
      metrics.write_whole(spent_file, spent.note(step))
      interval.clear()
    if writer and step % t.histogram_every == 0:
      writer.expert_load(step, load_LE)

  def catch_up():
    """Records what is still on its way, so that nothing unchecked is saved and no evaluation hides a step."""
    if (late := late_metrics.drain()) is not None:
      record(*late)

  def evaluate(step):
    sums = []
    with throughput.paused(), spent.spent('evaluation'):
      for batch in data.heldout_batches:
        # One at a time: on CPU devices, collectives of many queued programs can wait for each other for ever.
        sums.append(jax.device_get(programs.eval_step(state.params, state.router, batch)))
        watched.beat(step)
    nats, correct, count = np.sum(sums, axis=0, dtype=np.float64)
    loss = nats / count
    bits = loss / math.log(2) / data.bytes_per_token
    checkpoint.check_finite(step, {'heldout/loss': loss})
    for name, value in (('step', step), ('tokens', seen + step * tokens_per_step), ('heldout_loss', loss)):
      curve[name].append(value)
    last.update(heldout_loss=loss, heldout_bpb=bits)
    if writer:
      writer.scalars(step, {'heldout/loss': loss, 'heldout/bits_per_byte': bits, 'heldout/accuracy': correct / count})
    progress.update(step, float(last['loss']), throughput.moving().get('tokens_per_second'), heldout_loss=loss)

  def save(step, store):
    told = {
        'tokenizer': data.vocabulary.fingerprint, 'seen': seen, 'curve': curve, 'last': scalars(last),
        'interval': interval,
    }
    with throughput.paused(), spent.spent('checkpoint'):
      if writer:
        writer.flush()  # a run continued from here keeps the rows up to here
      store.save(step, state, data.iterator, told)
    if writer:
      metrics.write_whole(spent_file, spent.note(step))

  # ---- the loop
  step = start
  with contextlib.ExitStack() as ends:
    for closes in (*stores, progress):  # a save on its way arrives, whatever happens
      ends.enter_context(contextlib.closing(closes))
    train_step = programs.train_step
    if t.hang_timeout:
      programs.eval_step  # its compilation is no hang, and would be taken for one later
    ends.enter_context(watched)  # innermost: it ends a process whose saves would wait for one that is gone
    spent.begin_steps()
    for step in range(start + 1, steps + 1):
      if tracer.changes_at(step):
        catch_up()
        tracer.change(step, run.folder)
      with spent.spent('data'):
        rows = next(data.iterator)
      state, values = train_step(state, data.put(rows))
      if (late := late_metrics.push(step, values)) is not None:
        record(*late)
      stopping = preemption.agreed() if step % t.log_every == 0 or jax.process_count() == 1 else False
      if step % experiment.eval.every == 0 or step == steps:
        catch_up()
        evaluate(step)
      if step % t.checkpoint_every == 0 or step == steps or stopping:
        catch_up()
        save(step, stores[0])
      elif t.local_checkpoint_every and step % t.local_checkpoint_every == 0:
        catch_up()
        save(step, stores[1])
      if stopping:
        break
    tracer.stop()
  if step < steps:
    if writer:
      writer.close()
    say(f'stopped by {preemption.signal_name or "another process"} at step {step} of {steps}, saved; '
        'the same command continues')
    return False

  # ---- the result
  ruler = evals.evaluate(experiment, state.params, state.router, mesh)  # {} unless it was taught in RULER's tasks
  if writer:
    count = flops.count_parameters(experiment.model)
    load_LE = np.asarray(last['load'])
    result = {
        'arm': run.arm, 'seed': run.seed, 'steps': steps, 'tokens': seen + steps * tokens_per_step,
        'heldout_loss': last['heldout_loss'], 'heldout_bpb': last['heldout_bpb'], 'train_loss': float(last['loss']),
        **throughput.overall(),
        'params': {
            'total': count.total, 'active': count.active,
            'active_without_router': count.active_without_router, 'router': count.router,
        },
        'flops_per_token': flops_per_token,
        'load_max_over_mean': metrics.load_scalars(load_LE)['load_max_over_mean'],
        'router_entropy': float(last.get('router/entropy', math.nan)),
        'ruler': ruler, 'curve': curve, 'wall_seconds': spent.elapsed(), 'goodput': spent.summary(),
        **provenance(data.corpus, start),
    }
    writer.finish()
    metrics.write_whole(run.folder / 'result.json', json.dumps(result, indent=1))
  distributed.barrier(f'{run.arm}/{run.seed}')
  for store in stores[1:]:
    store.directory.rmtree()  # of no use to a run that is finished
  return True


def open_stores(run, state) -> list:
  """The run's checkpoints: those in its folder, and those of this process on its host's own disk if it has such.

  A run that begins anew forgets what an earlier one of the same folder left on the host's disk.
  """
  import jax

  from mmx import checkpoint

  t, new = run.experiment.train, not (run.folder / 'config.gin').exists()
  shared = checkpoint.Checkpointer(run.folder / 'checkpoints', t.keep_checkpoints)  # all have looked when it returns
  if not t.local_checkpoint_every:
    return [shared]
  below = '/'.join(absolute(run.folder).parts[1:])
  folder = epath.Path(t.local_checkpoint_dir).expanduser() / below / f'process{jax.process_index()}'
  if new:
    folder.rmtree(missing_ok=True)
  return [shared, checkpoint.Checkpointer(folder, keep=1, own=state)]


def start_from(folder, state):
  """A new state with the parameters and expert biases of a run folder or an imported checkpoint.

  What that model lacks, such as MSA's index branch in a model of full attention, stays as it was initialised.
  """
  import jax

  from mmx import checkpoint_params

  fresh = {'params': state.params, 'router': state.router}
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), fresh)
  variables, new = checkpoint_params.restore_params(folder, abstract, default=fresh)
  say(f'starts from {folder}' + (f'; new are {checkpoint_params.shown(new)}' if new else ''))
  return state.replace(**variables)


def tokens_seen(folder):
  """Tokens that a finished run has been trained on; 0 for an imported checkpoint, whose past is not known."""
  result = folder / 'result.json'
  return json.loads(result.read_text())['tokens'] if result.exists() else 0


def loads_by_layer(load, pattern):
  """Expert loads of the MoE layers [L, E] from first to last, MTP modules behind them; [1, 1] if there are none.

  load: as in the metrics of a step, {'segment_0': {'layer_1': {'ffn': {'bias': [repeats, E]}}}, 'mtp_0': ...}.
  """
  import jax
  import numpy as np

  layers = []
  for number, segment in enumerate(config.parse_pattern(pattern)):
    unit = load.get(f'segment_{number}', {})
    names = [name for index in range(len(segment.unit)) if (name := f'layer_{index}') in unit]
    layers += [unit[name]['ffn']['bias'][repeat] for repeat in range(segment.repeats) for name in names]
  modules = sorted((name for name in load if name.startswith('mtp_')), key=lambda name: (len(name), name))
  layers += [np.ravel(leaf) for name in modules for leaf in jax.tree.leaves(load[name])]
  return np.stack(layers) if layers else np.ones((1, 1))


def scalars(last):
  """`last` as JSON."""
  return {name: value.tolist() if hasattr(value, 'tolist') else value for name, value in last.items()}


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
