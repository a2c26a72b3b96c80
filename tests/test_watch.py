"""Hangs and processes that are gone: told in a line and ended with a code of their own, never on a false alarm.

`python tests/test_watch.py FOLDER INDEX COUNT TIMEOUT STORY` is one watched process of COUNT, without jax's part.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath

from mmx import distributed, watch

PULSE_S, GONE_S = 0.1, 1  # here
JOB = 7
HOST = os.uname().nodename
AGAIN = 'the same command continues from the last checkpoint'


def worker(folder: str, index: int, count: int, timeout: float, story: str) -> None:
  """Beats ten times and then does as it is told."""
  watch.PULSE_S, watch.GONE_S = PULSE_S, GONE_S
  jax.process_count, distributed.gather = lambda: count, lambda _: np.array([[JOB]] * count)
  print('ready', flush=True)
  sys.stdin.readline()
  if story == 'never comes':
    waits_for_ever()
  with watch.Watch(folder, index, timeout) as watched:
    if story == 'compiles':
      time.sleep(3 * timeout)
    for step in range(1, 11):
      watched.beat(step)
      time.sleep(0.02)
    if story == 'hangs':
      waits_for_ever()
    if story == 'fails later':
      sys.stdin.readline()
    if story.startswith('fails'):
      raise ValueError('no such luck\nand more')
    if story == 'waits':
      sys.stdin.readline()


def waits_for_ever():
  threading.Event().wait()


class Process:
  """A worker and what it says."""

  def __init__(self, *arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    self.process = subprocess.Popen(command, **pipes)
    self.pid = self.process.pid

  def go(self):
    """Lets it begin, and 'waits' end."""
    self.process.stdin.write('go\n')
    self.process.stdin.flush()
    return self

  def ended(self, code):
    """Its lines on stderr, when it has ended with this code."""
    _, errors = self.process.communicate(timeout=60)
    assert self.process.returncode == code, errors
    return errors.splitlines()


@pytest.fixture
def start(tmp_path):
  """start(story, ...): that many processes of one job, which begin together."""
  started = []

  def start(*stories, timeout=0.0):
    some = [Process(tmp_path, index, len(stories), timeout, story) for index, story in enumerate(stories)]
    started.extend(some)
    for each in some:
      assert each.process.stdout.readline() == 'ready\n'
    return [each.go() for each in some]

  yield start
  for each in started:
    each.process.kill()
    each.process.wait()


def beaten(folder, index, step=10):
  """The heartbeat of a process once it has come to a step."""
  path, until = folder / f'heartbeat.{index}.json', time.monotonic() + 60
  while time.monotonic() < until:
    if path.exists() and (heartbeat := json.loads(path.read_text()))['step'] == step:
      return heartbeat
    time.sleep(PULSE_S)
  pytest.fail(f'process {index} never came to step {step}')


def test_a_hang_is_ended_with_every_stack_and_one_line(tmp_path, start):
  (hung,) = start('hangs', timeout=1)
  (line,) = hung.ended(watch.ENDED)
  assert re.fullmatch(
      rf'error: process 0 on {HOST} hangs: nothing for \d s after step 10; its stacks are in {tmp_path}/stacks.0.txt; '
      rf'no other heartbeat is old; {AGAIN}', line
  )  # fmt: skip
  stacks = (tmp_path / 'stacks.0.txt').read_text()
  assert 'in waits_for_ever' in stacks and 'in _pulse' in stacks


@pytest.mark.slow
def test_a_hang_names_the_processes_that_are_silent(tmp_path, start):
  killed, second, third = start('waits', 'hangs', 'hangs', timeout=5)
  beaten(tmp_path, 0)
  killed.process.kill()
  gone = rf'process 0 \(pid {killed.pid} on {HOST}\) is gone: no heartbeat for \d s, the last one at step 10'
  for hung in (second, third):
    other, line = hung.ended(watch.ENDED)
    assert re.fullmatch(rf'error: process . on {HOST} hangs: .*; {gone}; {AGAIN}', line)
    assert re.fullmatch(rf'watch: {gone}', other)


def test_what_comes_before_the_first_beat_is_not_timed(tmp_path, start):
  (process,) = start('compiles', timeout=0.5)
  assert process.ended(0) == []
  assert list(tmp_path.iterdir()) == []


def test_heartbeats_tell_time_step_pid_and_host_and_go_with_an_orderly_end(tmp_path, start):
  (process,) = start('waits')
  found = beaten(tmp_path, 0)
  assert (found['pid'], found['host']) == (process.pid, HOST)
  time.sleep(5 * PULSE_S)
  assert beaten(tmp_path, 0)['time'] > found['time']  # it beats though no step passes
  assert process.go().ended(0) == [] and list(tmp_path.iterdir()) == []


def test_a_process_that_fails_takes_the_others_along_and_says_why(tmp_path, start):
  waiting, failing, third = start('waits', 'fails', 'waits')
  assert failing.ended(1)[-2:] == ['ValueError: no such luck', 'and more']
  (line,) = waiting.ended(watch.ENDED)
  assert line == (
      f'error: process 1 (pid {failing.pid} on {HOST}) failed at step 10: ValueError: no such luck, '
      f'and nothing goes on without it; {AGAIN}'
  )
  assert json.loads((tmp_path / 'heartbeat.1.json').read_text())['failed'] == 'ValueError: no such luck'
  third.process.kill()  # jax would, as process 0 has ended


def test_an_error_that_another_process_caused_by_dying_is_told_as_such(tmp_path, start):
  killed, failing = start('waits', 'fails later')
  beaten(tmp_path, 0), beaten(tmp_path, 1)
  killed.process.kill()
  *_, line = failing.go().ended(watch.ENDED)
  assert line.startswith(f'error: process 0 (pid {killed.pid} on ') and 'the last one at step 10' in line
  assert line.endswith(f', noticed by ValueError: no such luck; {AGAIN}')


def test_an_error_of_all_processes_is_everyones_own(start):
  for each in start('fails', 'fails'):
    assert each.ended(1)[-2:] == ['ValueError: no such luck', 'and more']


def test_heartbeats_of_an_earlier_job_are_nobodys_and_who_never_came_is_missed(tmp_path, start):
  heartbeat = {'time': 0, 'step': 7, 'pid': 1, 'host': 'h', 'job': JOB + 1, 'failed': 'OSError: full'}
  (tmp_path / 'heartbeat.1.json').write_text(json.dumps(heartbeat))
  process, late = start('waits', 'never comes')
  time.sleep(3 * GONE_S)
  (line,) = process.go().ended(0)
  assert re.fullmatch(r'watch: process 1 is gone: no heartbeat for \d s, since this job began', line)
  late.process.kill()


def test_a_killed_process_of_several_has_last_words_and_one_that_ends_has_none(tmp_path, start):
  killed, ended = start('waits', 'waits')
  beaten(tmp_path, 0), beaten(tmp_path, 1)
  killed.process.kill()
  assert killed.ended(-signal.SIGKILL) == [
      f'error: process 0 (pid {killed.pid} on {HOST}) was killed, '
      f'or jax ended it because another process is gone; {AGAIN}'
  ]
  assert not [line for line in ended.go().ended(0) if line.startswith('error')]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_storage_that_fails_or_hangs_ends_nothing_and_hides_no_hang(tmp_path, monkeypatch, capfd):
  slow = threading.Event()
  monkeypatch.setattr(watch, 'PULSE_S', 0.05)
  monkeypatch.setattr(watch, 'WRITE_S', 0.2)
  monkeypatch.setattr(watch, 'write_whole', lambda *_: slow.wait())
  exits = []
  monkeypatch.setattr(os, '_exit', lambda code: exits.append(code) or sys.exit())
  watched = watch.Watch(epath.Path(tmp_path), 0, timeout=0.3)
  with watched:
    watched.beat(1)
    until = time.monotonic() + 30
    while not exits and time.monotonic() < until:
      time.sleep(0.05)
  slow.set()
  assert exits == [watch.ENDED]
  told = capfd.readouterr().err
  assert 'its stacks are in the lines above' in told and 'in test_storage_that_fails_or_hangs' in told

  def refuse(*_):
    raise OSError('no space')

  monkeypatch.setattr(watch, 'write_whole', refuse)
  with watch.Watch(tmp_path, 0, timeout=0) as watched:
    watched.beat(1)
    time.sleep(0.3)
  assert capfd.readouterr().err == ''


if __name__ == '__main__':
  worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
