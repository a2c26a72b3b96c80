"""Several processes on loopback are one training: same curve, same parameters, and nothing is lost when one is killed.

Each job is `python -m mmx.train` with CPU devices that talk through gloo. `python tests/test_hosts.py STEP ...` is the
command that kills itself when the batch of STEP is asked for, with a watch that is quicker to judge.

Sums of two addends are the same in any order, so two devices give the same bits in one process and in two. Of four,
gloo adds them in another order than XLA does within a process: equal are all jobs of several processes, and one process
to about the last bit.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from absl import app

from mmx import checkpoint, config, sharding, train_step, watch
from mmx.data import pipeline

pytestmark = pytest.mark.slow  # two real processes by default are those of tests/test_distributed.py

EXPERIMENT = '''"""Do hosts matter?"""

from mmx import config


def get_config(scale):
  return config.override(config.Experiment(), {@FIELDS@
      'model.pattern': 'full', 'eval.every': 5,
  })
'''.replace('@FIELDS@', tiny.FIELDS)
OF_THE_MACHINE = ('time', 'tokens_per_second', 'mfu', 'memory/host')
GONE_S = 3  # here


# --- jobs -------------------------------------------------------------------------------------------------------------


class Killed:
  """`pipeline.train_iterator` whose iterators kill this process when the batch of step `at` is asked for."""

  def __init__(self, iterator, at):
    self.iterator, self.at, self.step = iterator, at, 0

  def __next__(self):
    self.step += 1
    if self.step == self.at:
      os.kill(os.getpid(), signal.SIGKILL)
    return next(self.iterator)

  def __getattr__(self, name):
    return getattr(self.iterator, name)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """The folder that the jobs run in, with an experiment file and its text; they share compiled programs."""
  folder = tmp_path_factory.mktemp('hosts')
  (folder / 'question.py').write_text(EXPERIMENT)
  tiny.write_texts(folder)
  return folder


@pytest.fixture(scope='module')
def job(place):
  """job(workdir, processes, devices of each, ...): starts them, waits until all have ended, returns them in order.

  Each has its `pid`, `returncode` and `lines` on stderr. kill: {process: step} at whose batch it kills itself.
  """

  def run(workdir, processes, devices, *arguments, kill=None):
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    started = []
    for index in range(processes):
      script = [__file__, str(kill.get(index, 0))] if kill else ['-m', 'mmx.train']
      command = [sys.executable, *script, '--config=question.py', f'--workdir={workdir}', *arguments]
      environment = os.environ | {
          'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices),
          'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_COMPILATION_CACHE_DIR': str(place / 'compiled'),
      }  # fmt: skip
      if processes > 1:
        environment |= {
            'MMX_COORDINATOR': f'127.0.0.1:{port}', 'MMX_NUM_PROCESSES': str(processes), 'MMX_PROCESS_ID': str(index)
        }  # fmt: skip
      pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
      started.append(subprocess.Popen(command, cwd=place, env=environment, **pipes))
    try:
      for process in started:
        process.lines = process.communicate(timeout=300)[1].splitlines()
    finally:
      for process in started:
        process.kill()
    return started

  return run


def run_folder(place, workdir):
  return place / workdir / 'main' / 'seed0'


def result(folder):
  return json.loads((folder / 'result.json').read_text())


def rows(folder):
  """metrics.jsonl without what the machine says."""
  found = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  mine = lambda tag: tag in OF_THE_MACHINE or tag.startswith('goodput/')
  return [{tag: value for tag, value in row.items() if not mine(tag)} for row in found]


def saved(folder):
  """(step, flat list of arrays) of the newest checkpoint."""
  experiment = config.load(folder / 'config.gin')
  state = train_step.abstract_state(experiment, sharding.build_mesh(experiment.mesh))
  reader = checkpoint.Checkpointer(folder / 'checkpoints', keep=None)
  step, state, _ = reader.restore(state, None)
  reader.close()
  return step, jax.tree.leaves(jax.device_get(state))


def assert_same_run(folder, other, rtol=0.0):
  """Curves and final parameters, bit for bit or nearly."""
  (step, arrays), (other_step, others) = saved(folder), saved(other)
  assert step == other_step == 12 and len(arrays) == len(others) > 20
  mine, theirs = rows(folder), rows(other)
  curve, expected = result(folder)['curve'], result(other)['curve']
  assert [row.keys() for row in mine] == [row.keys() for row in theirs]
  if rtol == 0:
    assert mine == theirs and curve == expected
    for array, wanted in zip(arrays, others, strict=True):
      np.testing.assert_array_equal(array, wanted, strict=True)
  else:
    for row, wanted in zip(mine, theirs, strict=True):
      np.testing.assert_allclose(list(row.values()), list(wanted.values()), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(curve['heldout_loss'], expected['heldout_loss'], rtol=rtol)


@pytest.fixture(scope='module')
def one(place, job):
  """One process with two devices, undisturbed."""
  (process,) = job('one', 1, 2)
  assert process.returncode == 0, process.lines
  return run_folder(place, 'one')


@pytest.fixture(scope='module')
def killed(place, job):
  """(its folder, process 0, process 1): two processes, of which process 1 is killed in step 7."""
  return run_folder(place, 'killed'), *job('killed', 2, 1, kill={1: 7})


def test_one_process_killed_stops_the_other_and_the_same_command_continues_bit_for_bit(place, job, one, killed):
  folder, first, second = killed
  assert second.returncode == -signal.SIGKILL and first.returncode == watch.ENDED
  assert re.fullmatch(
      rf'error: process 1 \(pid {second.pid} on .+\) is gone: no heartbeat for \d+ s, the last one at step [56], '
      r'noticed by .+; the same command continues from the last checkpoint', first.lines[-1]
  )  # fmt: skip
  assert second.lines[-1].startswith(f'error: process 1 (pid {second.pid} on ')
  assert not (folder / 'result.json').exists()
  shutil.copytree(folder.parent.parent, place / 'killed.copy')  # for those who continue otherwise
  again = job('killed', 2, 1)
  assert [process.returncode for process in again] == [0, 0], again[0].lines
  assert result(folder)['started_at_step'] == 4
  assert_same_run(folder, one)
  # Only process 0 writes: one file of events for each start, and nothing on the terminal of process 1.
  events = [path.name for path in sorted(folder.glob('events*'))]
  assert [int(name.rsplit('.', 1)[1]) for name in events] == [first.pid, again[0].pid]
  assert not [line for line in again[1].lines if not line.startswith('[Gloo]')]
  assert not list(folder.glob('heartbeat*')) and not (folder / 'claim.json').exists()


@pytest.mark.parametrize('axis', ['fsdp', 'expert', 'tensor', 'context'])
def test_two_processes_train_exactly_like_one(place, job, axis):
  mesh = ['--set=mesh.num_devices=2', '--set=mesh.fsdp=1', f'--set=mesh.{axis}=2']
  for name, shape in {'one': (1, 2), 'two': (2, 1)}.items():
    processes = job(f'{name}.{axis}', *shape, *mesh)
    assert [process.returncode for process in processes] == [0] * shape[0], processes[0].lines
  assert_same_run(run_folder(place, f'two.{axis}'), run_folder(place, f'one.{axis}'))


def test_four_processes_train_exactly_like_two_and_nearly_like_one(place, job):
  for name, shape in {'1x4': (1, 4), '2x2': (2, 2), '4x1': (4, 1)}.items():
    processes = job(name, *shape)
    assert [process.returncode for process in processes] == [0] * shape[0], processes[0].lines
  assert_same_run(run_folder(place, '4x1'), run_folder(place, '2x2'))
  assert_same_run(run_folder(place, '4x1'), run_folder(place, '1x4'), rtol=1e-5)


def test_process_0_killed_stops_the_other_and_the_same_command_continues_bit_for_bit(place, job, one):
  first, second = job('first_killed', 2, 1, kill={0: 7})
  assert first.returncode == -signal.SIGKILL and second.returncode in (-signal.SIGABRT, watch.ENDED)
  assert 'another process is gone' in second.lines[-1] or 'process 0 ' in second.lines[-1]
  assert second.lines[-1].endswith('the same command continues from the last checkpoint')
  again = job('first_killed', 2, 1)
  assert [process.returncode for process in again] == [0, 0], again[0].lines
  assert_same_run(run_folder(place, 'first_killed'), one)


@pytest.mark.parametrize(('processes', 'devices', 'rtol'), [(1, 2, 0), (4, 1, 1e-5)])
def test_what_two_processes_saved_is_continued_by_any_number(place, job, one, killed, processes, devices, rtol):
  workdir = f'two_to_{processes}'
  source = place / 'killed.copy' if (place / 'killed.copy').exists() else killed[0].parent.parent
  shutil.copytree(source, place / workdir)
  again = job(workdir, processes, devices)
  assert [process.returncode for process in again] == [0] * processes, again[0].lines
  assert result(run_folder(place, workdir))['started_at_step'] == 4
  assert_same_run(run_folder(place, workdir), one, rtol=rtol)


def test_a_checkpoint_of_eight_devices_is_continued_by_two_processes_and_by_one(place, job, one):
  (process,) = job('eight', 1, 8, kill={0: 7})
  assert process.returncode == -signal.SIGKILL
  for processes in (2, 1):
    workdir = f'eight_to_{processes}'
    shutil.copytree(place / 'eight', place / workdir)
    again = job(workdir, processes, 1)
    assert [process.returncode for process in again] == [0] * processes, again[0].lines
    assert result(run_folder(place, workdir))['started_at_step'] == 4
    assert_same_run(run_folder(place, workdir), one, rtol=1e-5)


def test_more_processes_than_rows_is_one_line_of_each(job):
  processes = job('too_many', 3, 1)
  for index, process in enumerate(processes):
    (line,) = [line for line in process.lines if line.startswith('error')]
    assert process.returncode == 1 and 'data.batch_size = 8' in line, index


if __name__ == '__main__':
  from mmx import train

  kill_at, make = int(sys.argv.pop(1)), pipeline.train_iterator
  pipeline.train_iterator = lambda *arguments: Killed(make(*arguments), kill_at)
  watch.PULSE_S, watch.GONE_S = 0.2, GONE_S
  app.run(train.main, flags_parser=train.parse_flags)
