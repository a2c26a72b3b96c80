"""What it costs to train in two processes: tokens per second and core against one process, on loopback.

  python scripts/bench_hosts.py --output=docs/results/bench_hosts_cpu.json
  chrt -f 1 python scripts/bench_hosts.py ...          on a machine that others use too

Three jobs take turns, each `python -m mmx.train` as it is, with a device per core and the same rows for each device:
one process on one core, two processes on a core each that talk through gloo, and one process on both cores, whose
devices talk in memory. Speed is the run's own: compilation, evaluations and checkpoints do not count.
"""

import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile

import measuring
from absl import app, flags

from mmx import config
from mmx.config import ConfigError

CONFIG = flags.DEFINE_string('config', 'experiments/moe_ablation.py', 'Experiment to train, at scale cpu.')
ARM = flags.DEFINE_string('arm', 'e32_top2', 'Its arm.')
SET = flags.DEFINE_multi_string('set', [], 'Override one field of every job. Repeatable.')
STEPS = flags.DEFINE_integer('steps', 30, 'Steps of one turn.', lower_bound=3)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds; in each, every job takes one turn.', lower_bound=1)
OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the figures; none is written if left out.')

JOBS = {'one_process': (1, 1), 'two_processes': (2, 1), 'one_process_two_devices': (1, 2)}  # processes, devices of each
TARGET = 0.8  # of one process's tokens per second and core


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; every option starts with --')
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    sys.exit(f'error: two processes need two cores, this one may use {len(cores)}')
  try:
    base = config.override(
        config.select_arm(config.load_experiment(CONFIG.value, 'cpu'), ARM.value),
        dict(map(config.parse_assignment, SET.value)),
    )
  except ConfigError as error:
    sys.exit(f'error: {error}')
  told = measuring.machine('jax', 'jaxlib', 'flax')
  told['shared_with_others'] = told['load_average_before'] > measuring.BUSY
  with tempfile.TemporaryDirectory() as folder:
    turns = {name: lambda shape=shape: train(base, *shape, cores, pathlib.Path(folder)) for name, shape in JOBS.items()}
    speeds = measuring.by_turns(turns, ROUNDS.value)
  per_core = {name: measuring.spread(values) for name, values in speeds.items()}
  ratios = {
      f'two_processes / {name}': statistics.median(map(float.__truediv__, speeds['two_processes'], speeds[name]))
      for name in ('one_process', 'one_process_two_devices')
  }
  for name, values in per_core.items():
    print(f'{name:24} {values["median"]:8.0f} tokens/s/core   ({values["min"]:.0f} to {values["max"]:.0f})')
  for name, ratio in ratios.items():
    print(f'{name:48} {ratio:.3f}')
  met = ratios['two_processes / one_process'] >= TARGET
  print(f'two processes reach {TARGET} of one: {"yes" if met else "no"}')
  if OUTPUT.value:
    figures = {
        'experiment': {
            'config': CONFIG.value, 'arm': ARM.value, 'set': SET.value, 'rows_per_device': base.data.batch_size,
            'tokens_per_row': base.data.seq_len, 'steps': STEPS.value, 'rounds': ROUNDS.value,
        },
        'device': 'CPU devices, one per core, collectives through gloo on loopback', 'machine': told,
        'tokens_per_second_per_core': per_core, 'ratios': ratios, 'target': TARGET,
    }  # fmt: skip
    pathlib.Path(OUTPUT.value).write_text(json.dumps(figures, indent=1) + '\n')
  sys.exit(not met)


def train(base, processes: int, devices: int, cores: list[int], folder: pathlib.Path) -> float:
  """Tokens per second and core of one job."""
  workdir = tempfile.mkdtemp(dir=folder)
  count = processes * devices
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    coordinator = f'127.0.0.1:{probe.getsockname()[1]}'
  command = [
      sys.executable, '-m', 'mmx.train', f'--config={CONFIG.value}', f'--arm={ARM.value}', '--seeds=0',
      f'--workdir={workdir}', *(f'--set={assignment}' for assignment in SET.value),
      f'--set=data.batch_size={base.data.batch_size * count}', '--set=mesh.num_devices=0',
      f'--set=train.steps={STEPS.value}', f'--set=train.checkpoint_every={STEPS.value}', '--set=optim.warmup_steps=1',
      '--set=optim.decay_steps=1', f'--set=eval.every={STEPS.value}', '--set=eval.batches=1',
  ]  # fmt: skip
  started = []
  for index in range(processes):
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': str(devices)}
    if processes > 1:
      environment |= {
          'MMX_COORDINATOR': coordinator, 'MMX_NUM_PROCESSES': str(processes), 'MMX_PROCESS_ID': str(index)
      }  # fmt: skip
    mine = cores[index * devices : (index + 1) * devices]
    started.append(subprocess.Popen(
        ['taskset', '-c', ','.join(map(str, mine)), *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ))  # fmt: skip
  told = [process.communicate()[1] for process in started]
  if any(process.returncode for process in started):
    sys.exit('\n'.join(told))
  result = json.loads((pathlib.Path(workdir) / ARM.value / 'seed0' / 'result.json').read_text())
  return result['tokens_per_second'] / count


if __name__ == '__main__':
  app.run(main)
