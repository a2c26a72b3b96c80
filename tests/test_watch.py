"""Hangs and processes that are gone: told in a line and ended with a code of their own, never on a false alarm.

`python tests/test_watch.py FOLDER INDEX TIMEOUT STORY` is one watched process, without jax's part.
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
import pytest
from etils import epath

from mmx import watch

PULSE_S, GONE_S = 0.1, 1  # here
AGAIN = 'the same command continues from the last checkpoint'


def worker(folder: str, index: int, timeout: float, story: str) -> None:
  """Beats ten times and then does as it is told."""
  watch.PULSE_S, watch.GONE_S = PULSE_S, GONE_S
  if story == 'waits alone':
    jax.process_count = lambda: 2
  with watch.Watch(folder, index, timeout) as watched:
    print('watched', flush=True)
    sys.stdin.readline()
    if story == 'compiles':
      time.sleep(3 * timeout)
    for step in range(1, 11):
      watched.beat(step)
      time.sleep(0.02)
    if story == 'hangs':
      waits_for_ever()
    if story == 'fails':
      raise ValueError('no such luck\nand more')
    if story.startswith('waits'):
      sys.stdin.readline()


def waits_for_ever():
  threading.Event().wait()


class Process:
  """A worker and what it says."""

  def __init__(self, folder, index, story, timeout=0.0):
    command = [sys.executable, __file__, str(folder), str(index), str(timeout), story]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    self.process = subprocess.Popen(command, **pipes)
    self.pid = self.process.pid
    assert self.process.stdout.readline() == 'watched\n'

  def go(self):
    self.process.stdin.write('go\n')
    self.process.stdin.flush()
    return self

  def ended(self, code):
    """Its lines on stderr, when it has ended with this code."""
    _, errors = self.process.communicate(timeout=60)
    assert self.process.returncode == code, errors
    return errors.splitlines()


@pytest.fixture
def start():
  started = []

  def start(*args, **kwargs):
    started.append(Process(*args, **kwargs))
    return started[-1]

  yield start
  for each in started:
    each.process.kill()
    each.process.wait()


def test_a_hang_is_ended_with_every_stack_and_one_line(tmp_path, start):
  hung = start(tmp_path, 3, 'hangs', timeout=1).go()
  (line,) = hung.ended(watch.ENDED)
  assert re.fullmatch(
      rf'error: process 3 on {os.uname().nodename} hangs: nothing for \d s after step 10; its stacks are in '
      rf'{tmp_path}/stacks.3.txt; no other heartbeat is old; {AGAIN}', line
  )  # fmt: skip
  stacks = (tmp_path / 'stacks.3.txt').read_text()
  assert 'in waits_for_ever' in stacks and 'in _pulse' in stacks


def test_a_hang_names_the_processes_that_are_silent(tmp_path, start):
  killed, hung = start(tmp_path, 0, 'waits'), start(tmp_path, 1, 'hangs', timeout=3)
  killed.go(), hung.go()
  time.sleep(1)
  killed.process.kill()
  *others, line = hung.ended(watch.ENDED)
  gone = f'process 0 (pid {killed.pid} on {os.uname().nodename}) is gone: no heartbeat for '
  assert line.startswith('error: process 1 on ') and gone in line and 'the last one at step 10' in line
  assert len(others) == 1 and others[0].startswith(f'watch: {gone}')


def test_what_comes_before_the_first_beat_is_not_timed(tmp_path, start):
  assert start(tmp_path, 0, 'compiles', timeout=0.5).go().ended(0) == []
  assert list(tmp_path.iterdir()) == []


def test_heartbeats_tell_time_step_pid_and_host_and_go_with_an_orderly_end(tmp_path, start):
  process = start(tmp_path, 2, 'waits').go()
  path = tmp_path / 'heartbeat.2.json'
  until = time.monotonic() + 30
  while (found := json.loads(path.read_text()))['step'] != 10 and time.monotonic() < until:
    time.sleep(PULSE_S)
  assert (found['step'], found['pid'], found['host']) == (10, process.pid, os.uname().nodename)
  time.sleep(5 * PULSE_S)
  assert json.loads(path.read_text())['time'] > found['time']  # it beats though no step passes
  assert process.go().ended(0) == [] and not path.exists()


def test_a_process_that_fails_takes_the_others_along_and_says_why(tmp_path, start):
  waiting, failing = start(tmp_path, 0, 'waits'), start(tmp_path, 1, 'fails')
  waiting.go(), failing.go()
  assert failing.ended(1)[-2:] == ['ValueError: no such luck', 'and more']
  (line,) = waiting.ended(watch.ENDED)
  assert line == (
      f'error: process 1 (pid {failing.pid} on {os.uname().nodename}) failed at step 10: ValueError: no such luck, '
      f'and nothing goes on without it; {AGAIN}'
  )
  assert json.loads((tmp_path / 'heartbeat.1.json').read_text())['failed'] == 'ValueError: no such luck'


def test_an_error_that_another_process_caused_by_dying_is_told_as_such(tmp_path, start):
  killed, failing = start(tmp_path, 0, 'waits'), start(tmp_path, 1, 'fails')
  killed.go()
  time.sleep(1)
  killed.process.kill()
  *_, line = failing.go().ended(watch.ENDED)
  assert line.startswith(f'error: process 0 (pid {killed.pid} on ') and 'the last one at step 10' in line
  assert line.endswith(f', noticed by ValueError: no such luck; {AGAIN}')


def test_an_error_of_all_processes_is_everyones_own(tmp_path, start):
  both = [start(tmp_path, index, 'fails') for index in range(2)]
  for each in both:
    each.go()
  for each in both:
    assert each.ended(1)[-2:] == ['ValueError: no such luck', 'and more']


def test_heartbeats_of_an_earlier_job_are_nobodys(tmp_path, start):
  for index, more in ((1, {}), (2, {'failed': 'OSError: full'})):
    heartbeat = {'time': 0, 'step': 7, 'pid': 1, 'host': 'h', **more}
    (tmp_path / f'heartbeat.{index}.json').write_text(json.dumps(heartbeat))
  process = start(tmp_path, 0, 'waits').go()
  time.sleep(3 * GONE_S)
  assert process.process.poll() is None and process.go().ended(0) == []


def test_a_killed_process_of_several_has_last_words_and_one_that_ends_has_none(tmp_path, start):
  killed, ended = start(tmp_path, 0, 'waits alone').go(), start(tmp_path, 1, 'waits alone').go()
  killed.process.kill()
  assert killed.ended(-signal.SIGKILL) == [
      f'error: process 0 (pid {killed.pid} on {os.uname().nodename}) was killed, or jax ended it because another process '
      f'is gone; {AGAIN}'
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
  worker(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
