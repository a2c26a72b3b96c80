"""The profiler's window opens where it was asked to and nowhere else."""

import os
import signal

import pytest

from mmx.config import ConfigError
from mmx.profiler import SIGNALLED_STEPS, Profiler, parse_window


@pytest.fixture
def traces(monkeypatch):
  """What would have been traced: ('start', folder) and 'stop'."""
  import jax

  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append(('start', folder)))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  return calls


def traced_steps(profiler, steps, signalled_at=None):
  """The steps during which a trace goes on."""
  found, going_on = [], False
  for step in steps:
    if step == signalled_at:
      os.kill(os.getpid(), signal.SIGUSR1)
    if profiler.changes_at(step):
      profiler.change(step, 'run')
      going_on = not going_on
    if going_on:
      found.append(step)
  return found


def test_a_window_traces_its_steps(traces):
  with Profiler(parse_window('3:5')) as profiler:
    assert traced_steps(profiler, range(1, 10)) == [3, 4]
  assert traces == [('start', 'run'), 'stop']


def test_a_run_that_is_continued_inside_the_window_traces_the_rest_of_it_and_ends_what_is_open(traces):
  with Profiler(parse_window('3:9')) as profiler:
    assert traced_steps(profiler, range(5, 7)) == [5, 6]
  assert traces == [('start', 'run'), 'stop']


def test_a_signal_traces_the_next_few_steps_and_the_old_handler_returns(traces):
  before = signal.getsignal(signal.SIGUSR1)
  with Profiler() as profiler:
    assert traced_steps(profiler, range(1, 20), signalled_at=4) == list(range(4, 4 + SIGNALLED_STEPS))
  assert traces == [('start', 'run'), 'stop']
  assert signal.getsignal(signal.SIGUSR1) == before


def test_unasked_it_does_nothing(traces):
  with Profiler() as profiler:
    assert traced_steps(profiler, range(1, 20)) == []
  assert traces == []


@pytest.mark.parametrize('text', ['5', '5:', '5:5', '6:5', '0:3', '-1:3', 'a:b', '1.0:3'])
def test_a_window_that_is_none_is_told(text):
  with pytest.raises(ConfigError, match='--profile: expected START:STOP, two step numbers such as 20:25, found'):
    parse_window(text)


def test_no_flag_is_no_window():
  assert not parse_window(None)
