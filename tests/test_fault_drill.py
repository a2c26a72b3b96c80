"""The drill of faults loses nothing, and would say so if it did."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / 'scripts/fault_drill.py'


@pytest.fixture(scope='module')
def script():
  """scripts/fault_drill.py as a module."""
  spec = importlib.util.spec_from_file_location('fault_drill', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules['fault_drill'] = module  # where its dataclasses look for their annotations
  spec.loader.exec_module(module)
  yield module
  del sys.modules['fault_drill']


def drilled(tmp_path, *arguments) -> dict:
  """The figures of a drill in which nothing was lost."""
  output = tmp_path / 'figures.json'
  environment = os.environ | {'XLA_FLAGS': ''}
  command = [sys.executable, SCRIPT, f'--output={output}', *arguments]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stdout + done.stderr
  return json.loads(output.read_text())


@pytest.mark.slow
def test_a_kill_with_a_flipped_byte_and_a_full_disk_lose_nothing(tmp_path):
  figures = drilled(tmp_path, '--drills=2', '--kinds=flip,disk', '--seed=0')
  assert figures['lost_nothing'] == 2
  flipped, full = figures['each']
  assert flipped['ends'][0][0] == -9 and flipped['damaged'] and flipped['ends'][-1][0] == 0
  assert full['ends'][0][0] == 1 and 'No space left on device' in full['ends'][0][1] and full['ends'][-1][0] == 0


@pytest.mark.slow
def test_every_kind_of_fault_loses_nothing(tmp_path):
  assert drilled(tmp_path, '--drills=20', '--seed=7')['lost_nothing'] == 20


def test_faults_follow_from_the_seed(script):
  drawn = [[script.draw(kind, seed, 3) for kind in script.KINDS] for seed in (1, 1, 2)]
  assert drawn[0] == drawn[1] != drawn[2]
  for faults in drawn:
    for fault in faults:
      assert all(1 <= strike.step <= script.STEPS for strike in fault.strikes)
      assert (fault.nan_step is not None) == (fault.kind == 'nan')


def test_a_difference_is_told(script):
  same = {'metrics.jsonl': ['[1, {"loss": NaN}]', '[2, {"loss": 2.0}]'], 'held-out curve': '{}'}
  assert script.difference_of(same, same) == ''
  other = same | {'metrics.jsonl': ['[1, {"loss": NaN}]', '[2, {"loss": 2.1}]']}
  assert script.difference_of(other, same) == 'metrics.jsonl: [2, {"loss": 2.1}] instead of [2, {"loss": 2.0}]'
  shorter = same | {'metrics.jsonl': same['metrics.jsonl'][:1]}
  assert script.difference_of(shorter, same) == 'metrics.jsonl: nothing instead of [2, {"loss": 2.0}]'
  assert script.difference_of(same | {'held-out curve': '[]'}, same) == 'held-out curve: [] instead of {}'
  assert script.difference_of({'unreadable': 'no such file'}, same) == 'no such file'
