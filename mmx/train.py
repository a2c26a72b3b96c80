"""Trains every arm and seed of an experiment and compares them.

  python -m mmx.train --config=experiments/moe_ablation.py
  python -m mmx.train --config=experiments/moe_ablation.py --arm=e128_top8 --scale=h200 --set train.steps=500

A run lives in <workdir>/<arm>/seed<k>: config.gin, run.json, TensorBoard events, metrics.jsonl, checkpoints, and at the
end result.json. The same command continues what was stopped and skips what is finished; the table, the figure and
their TensorBoard run are rewritten in <workdir> whenever a run ends.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import mmap
import os
import pathlib
import subprocess
import sys
import time
from importlib import metadata

from absl import app, flags, logging

from mmx import config
from mmx.command import errors_in_one_line, stop

CONFIG = flags.DEFINE_string('config', None, 'Experiment: a .py file with get_config, or a .gin file.')
ARM = flags.DEFINE_list('arm', None, 'Arms to run, by name; all if left out.')
SCALE = flags.DEFINE_string('scale', 'cpu', 'Size of the experiment: cpu, h200, ... as its file allows.')
SEEDS = flags.DEFINE_list('seeds', None, 'Seeds to run; those of the experiment file if left out.')
SET = flags.DEFINE_multi_string('set', [], 'Override one field, e.g. --set train.steps=500. Repeatable.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the runs; runs/<experiment>_<scale> if left out.')
PRINT_CONFIG = flags.DEFINE_bool('print_config', False, 'Print each arm and its difference from the defaults; exit.')
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


def run_experiment():
  """What the flags ask for: seed by seed, each arm that has not finished, then the comparison of all that have."""
  experiment_file = config.load_experiment(CONFIG.value, SCALE.value)
  arms = {name: config.select_arm(experiment_file, name) for name in ARM.value or experiment_file.arms}
  for assignment in SET.value:
    field = dict([config.parse_assignment(assignment)])
    arms = {name: config.override(arm, field) for name, arm in arms.items()}
  if PRINT_CONFIG.value:
    return print_configs(arms)
  try:
    seeds = list(dict.fromkeys(int(seed) for seed in SEEDS.value or experiment_file.seeds))
  except ValueError:
    raise config.ConfigError(f'--seeds: expected whole numbers, found {",".join(SEEDS.value)}') from None
  workdir = pathlib.Path(WORKDIR.value or f'runs/{experiment_file.name}_{SCALE.value}')

  use_every_core()
  import jax  # after the flags, so that a mistake in them is told at once

  from mmx import distributed, flops, report
  from mmx.evals import report as evals_report

  cache_compilations()
  distributed.initialize()
  pairs = [(name, seed) for seed in seeds for name in arms]
  differs = arms_differ_in(arms)
  runs = [
      Run(name, seed, arms[name], workdir / name / f'seed{seed}', index, len(pairs), differs)
      for index, (name, seed) in enumerate(pairs, start=1)
  ]
  for run in runs:
    config.validate(run.experiment, jax.device_count(), jax.process_count())
    run.check_origin(experiment_file.arms, ahead=runs[: run.index - 1])
    if '[' in (path := str(run.folder.absolute())):  # Orbax would save, but not find the arrays again
      raise config.ConfigError(f'{path}: a run cannot have [ in its path, which Orbax reads as a pattern')
  flops.assert_comparable({name: arm.model for name, arm in arms.items()}, experiment_file.tolerance)
  say(f'{experiment_file.name} at scale {SCALE.value}: {len(arms)} arm(s) x {len(seeds)} seed(s) -> {workdir}')
  for name, arm in arms.items():
    count = flops.count_parameters(arm.model)
    say(
        f'  {name}: {count.total / 1e6:.3f}M parameters, {count.active_without_router / 1e6:.3f}M active per token '
        f'(+ {count.router / 1e6:.3f}M router)'
    )

  def write_summary():
    summary = report.write(workdir, experiment_file.metric, experiment_file.published, experiment_file.doc, list(arms))
    return f'{summary.to_terminal()}\n{evals_report.append(workdir, list(arms))}'

  waiting = [run for run in runs if not run.finished()]  # every folder is looked at before one is written to
  programs = {}
  with distributed.Preemption() as preemption:
    for run in waiting:
      if preemption.agreed():
        return say(f'stopped by {preemption.signal_name or "another process"} before {run.arm}/seed{run.seed}; '
                   'the same command continues')
      if run.arm not in programs:
        programs[run.arm] = Programs(arms[run.arm])
      if not train(run, programs[run.arm], experiment_file.arms, preemption):
        return
      if distributed.is_primary():
        summary = write_summary()
  if distributed.is_primary():
    if not waiting:
      summary = write_summary()
    print(f'\n{summary}\n{workdir}/summary.md has the table; tensorboard --logdir {workdir}')


def print_configs(arms):
  for name, arm in arms.items():
    print(f'# ---- arm {name}: resolved\n{config.dump(arm)}\n# ---- arm {name}: differs from the defaults in')
    for path, default, value in config.diff(config.Experiment(), arm):
      print(f'#   {path} = {value!r}  (default {default!r})')


def arms_differ_in(arms):
  """Dotted paths of the fields that are not the same in all arms."""
  first, *others = arms.values()
  return sorted({path for other in others for path, _, _ in config.diff(first, other)})


def use_every_core():
  """On CPU: a device per core, so that experts and rows are split over cores, and memory that is kept between steps.

  XLA runs a loop over experts on one thread; two devices of one core each took 0.75 of the time of one device of two.
  Leaves the devices alone where XLA_FLAGS or JAX_NUM_CPU_DEVICES speak of them already.
  """
  if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
    keep_memory(libc)
  import jax

  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  chosen = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if not chosen and jax.config.jax_num_cpu_devices < 1:
    jax.config.update('jax_num_cpu_devices', min(8, 1 << cores.bit_length() - 1))  # a power of two divides experts


def keep_memory(libc):
  """Has glibc keep what a step frees for the next, in huge pages.

  XLA allocates a step's temporaries anew each time, and glibc would return them to the system: 68,000 page faults, 0.1 s
  a step. Where the system gives huge pages on request only, the heap is grown once and asked for in them, as nothing
  else tells glibc to: 0.68 to 0.92 of the time of a step of the arms of `experiments/moe_ablation.py`.
  """
  ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -8, -4, -1, -2  # malloc.h
  for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**24)):
    libc.mallopt(parameter, value)
  MADV_HUGEPAGE, size, page = 14, 3 * 2**29, mmap.PAGESIZE  # 1.5 GiB of addresses, not of memory, until touched
  libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
  if heap := libc.malloc(size):
    start = -(-heap // page) * page
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size - page), MADV_HUGEPAGE)
    libc.free(heap)


def cache_compilations():
  """Keeps compiled programs between runs in ~/.cache/mmx, or where JAX_COMPILATION_CACHE_DIR says."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/mmx/compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def say(line):
  import jax

  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# one run


@dataclasses.dataclass(frozen=True)
class Run:
  """One arm at one seed, which decides initial parameters and data order; the arms of a seed share the latter."""

  arm: str
  seed: int
  base: config.Experiment
  folder: pathlib.Path
  index: int
  of: int
  differs: list[str]

  @functools.cached_property
  def experiment(self) -> config.Experiment:
    seeds = {'train.seed': self.seed, 'data.seed': self.base.data.seed + self.seed}
    return config.override(self.base, seeds)

  def origin(self, arms) -> pathlib.Path | None:
    """The folder whose parameters this run starts from, by train.init_from; None for new ones."""
    name = self.experiment.train.init_from
    if not name:
      return None
    return self.folder.parent.parent / name / self.folder.name if name in arms else pathlib.Path(name).expanduser()

  def check_origin(self, arms, ahead) -> None:
    """Raises ConfigError unless there is something to start from, or a run among those `ahead` will make it."""
    origin = self.origin(arms)
    if origin is None or origin in [run.folder for run in ahead] or (origin / 'config.gin').exists():
      return
    name = self.experiment.train.init_from
    raise config.ConfigError(
        f'{self.arm}: train.init_from = {name!r}: ' + (
            f'arm {name} has not run at seed {self.seed} in this workdir; run it first' if name in arms else
            f'no run folder there (config.gin is missing), and no arm of that name; arms are {", ".join(arms)}'
        )
    )

  def finished(self) -> bool:
    """Whether result.json of this very config is there. Refuses a folder that holds another config's run."""
    written = self.folder / 'config.gin'
    if written.exists():
      if not RESUME.value:
        raise config.ConfigError(f'{self.folder} holds a run already; without --noresume it is continued')
      different = config.diff(config.load(written), self.experiment)
      if different:
        path, there, here = different[0]
        more = f' (and {len(different) - 1} more)' if len(different) > 1 else ''
        raise config.ConfigError(
            f'{written}: the run in this workdir has {path} = {there!r}, this one {here!r}{more}; '
            'give another --workdir or the same config'
        )
    return (self.folder / 'result.json').exists()


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
    return self._lowered.compile()

  @functools.cached_property
  def eval_step(self):
    import jax

    from mmx import train_step

    step = train_step.make_eval_step(self.experiment, self.mesh)
    batch = train_step.abstract_batch(self.experiment, self.mesh)
    return jax.jit(step).lower(self.state.params, self.state.router, batch).compile()


def train(run: Run, programs: Programs, arms, preemption) -> bool:
  """Trains one run to its end and writes result.json; False if `preemption` asked to stop on the way.

  arms: names that train.init_from may mean.
  """
  import jax
  import numpy as np

  from mmx import checkpoint, distributed, flops, metrics, sharding
  from mmx.data import pipeline, tokenizer
  from mmx.evals import run as evals

  began = time.time()
  experiment, mesh = run.experiment, programs.mesh
  steps, primary = experiment.train.steps, distributed.is_primary()
  tokens_per_step = experiment.data.batch_size * experiment.data.seq_len

  # ---- data, before the folder: what cannot work leaves no trace, and is said before anything is compiled
  vocabulary = tokenizer.load(experiment.data.tokenizer)
  if vocabulary.vocab_size > experiment.model.vocab_size:
    raise config.ConfigError(
        f'model.vocab_size: {experiment.model.vocab_size} is smaller than the {vocabulary.vocab_size} tokens of '
        f'data.tokenizer = {experiment.data.tokenizer!r}'
    )
  shard = jax.process_index(), jax.process_count()
  iterator = pipeline.train_iterator(experiment.data, vocabulary, *shard)
  heldout = pipeline.heldout(experiment.data, vocabulary, experiment.eval.batches, *shard)
  put = functools.partial(distributed.put_batch, mesh=mesh, spec=sharding.batch_spec())
  heldout_batches = [put(batch) for batch in heldout.batches]
  corpus = pipeline.fingerprint(experiment.data, vocabulary)

  # ---- state: a checkpoint's or a new one
  checkpoints = checkpoint.Checkpointer(run.folder / 'checkpoints', experiment.train.keep_checkpoints)
  saved = checkpoints.latest_metadata()
  if saved and saved['tokenizer'] != vocabulary.fingerprint:
    raise config.ConfigError(
        f'data.tokenizer: {experiment.data.tokenizer!r} ({vocabulary.fingerprint}) is not the tokenizer of the '
        f'checkpoint in {run.folder} ({saved["tokenizer"]})'
    )
  restored = checkpoints.restore(programs.state, iterator)
  if restored:
    start, state, saved = restored
  else:
    start, state, saved = 0, programs.init(np.int32(run.seed)), {'curve': {}}
    if origin := run.origin(arms):
      state = start_from(origin, state)
      saved['seen'] = tokens_seen(origin)
  seen = saved.get('seen', 0)  # tokens behind the parameters that it started from
  curve = saved['curve'] or {'step': [], 'tokens': [], 'heldout_loss': []}
  if primary:
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / 'config.gin', config.dump(experiment))
    write_whole(run.folder / 'run.json', json.dumps(provenance(corpus, start), indent=1))

  # ---- what a researcher sees
  peak = flops.peak_flops(mesh.devices.flat[0], experiment.model.compute_dtype) * programs.devices
  flops_per_token = flops.step_flops(experiment)
  progress = metrics.Progress(run.arm, run.seed, steps, start_step=start, run=run.index, runs=run.of,
                              stream=sys.stderr if primary else open(os.devnull, 'w'))
  throughput = metrics.Throughput(tokens_per_step, flops_per_token, peak)
  late_metrics = metrics.LateMetrics()
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
    load_LE = loads_by_layer(values.pop('load'), experiment.model.pattern)
    checkpoint.check_finite(step, values)
    throughput.tick(step)
    interval.append(float(values['loss']))
    moving = throughput.moving()
    progress.update(step, float(values['loss']), moving.get('tokens_per_second'))
    last.update(values, load=load_LE)
    if writer and (step % experiment.train.log_every == 0 or step == steps):
      values = {name: float(value) for name, value in values.items()} | {'loss': float(np.mean(interval))}
      last['loss'] = values['loss']
      writer.scalars(step, values | moving | metrics.load_scalars(load_LE) | metrics.memory_stats())
      interval.clear()
    if writer and step % experiment.train.histogram_every == 0:
      writer.expert_load(step, load_LE)

  def catch_up():
    """Records what is still on its way, so that nothing unchecked is saved and no evaluation hides a step."""
    if (late := late_metrics.drain()) is not None:
      record(*late)

  def evaluate(step):
    with throughput.paused():
      # One at a time: on CPU devices, collectives of many queued programs can wait for each other for ever.
      sums = [jax.device_get(programs.eval_step(state.params, state.router, batch)) for batch in heldout_batches]
      nats, correct, count = np.sum(sums, axis=0, dtype=np.float64)
    loss = nats / count
    bits = loss / math.log(2) / heldout.bytes_per_token
    checkpoint.check_finite(step, {'heldout/loss': loss})
    for name, value in (('step', step), ('tokens', seen + step * tokens_per_step), ('heldout_loss', loss)):
      curve[name].append(value)
    last.update(heldout_loss=loss, heldout_bpb=bits)
    if writer:
      writer.scalars(step, {'heldout/loss': loss, 'heldout/bits_per_byte': bits, 'heldout/accuracy': correct / count})
    progress.update(step, float(last['loss']), throughput.moving().get('tokens_per_second'), heldout_loss=loss)

  def save(step):
    told = {
        'tokenizer': vocabulary.fingerprint, 'seen': seen, 'curve': curve, 'last': scalars(last), 'interval': interval,
    }
    with throughput.paused():
      checkpoints.save(step, state, iterator, told)

  # ---- the loop
  step = start
  with contextlib.closing(progress), contextlib.closing(checkpoints):  # a save on its way arrives, whatever happens
    for step in range(start + 1, steps + 1):
      state, values = programs.train_step(state, put(next(iterator)))
      if (late := late_metrics.push(step, values)) is not None:
        record(*late)
      stopping = preemption.agreed() if step % experiment.train.log_every == 0 or shard[1] == 1 else False
      if step % experiment.eval.every == 0 or step == steps:
        catch_up()
        evaluate(step)
      if step % experiment.train.checkpoint_every == 0 or step == steps or stopping:
        catch_up()
        save(step)
      if stopping:
        break
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
        'ruler': ruler, 'curve': curve, 'wall_seconds': time.time() - began,
        **provenance(corpus, start),
    }
    writer.finish()
    write_whole(run.folder / 'result.json', json.dumps(result, indent=1))
  distributed.barrier(f'{run.arm}/{run.seed}')
  return True


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


def write_whole(path, text):
  """A reader, or whoever comes after a crash, finds the whole text or the file before it."""
  partial = path.with_name(path.name + '.partial')
  partial.write_text(text)
  os.replace(partial, path)


def provenance(corpus, start):
  """Where the figures of a run come from."""
  import jax

  device = jax.devices()[0]
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  describe = ['git', 'describe', '--always', '--dirty']
  revision = ''
  with contextlib.suppress(OSError):  # no git here
    folder = pathlib.Path(__file__).parent
    revision = subprocess.run(describe, cwd=folder, capture_output=True, text=True).stdout.strip()
  return {
      'device': f'{jax.device_count()} x {device.device_kind}'
      + (f' ({os.cpu_count()} cores)' if device.platform == 'cpu' else ''),
      'versions': {'python': sys.version.split()[0]} | {name: metadata.version(name) for name in names},
      'git': revision, 'corpus': corpus, 'started_at_step': start, 'date': time.strftime('%Y-%m-%d'),
  }


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
