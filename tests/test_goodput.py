"""Goodput books every second of a run once, over all its attempts."""

import json

import pytest

from mmx.goodput import KINDS, Goodput


class Clock:
  """Seconds that a test sets."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def first_attempt(clock) -> Goodput:
  """10 s of start-up, 2 of them restoring; then 40 s: 5 for data, 3 for an evaluation, 2 for a save."""
  goodput = Goodput(clock=clock)
  clock.now += 8
  with goodput.spent('restore'):
    clock.now += 2
  goodput.resume(None, 0)
  goodput.begin_steps()
  clock.now += 30
  for kind, seconds in (('data', 5), ('evaluation', 3), ('checkpoint', 2)):
    with goodput.spent(kind):
      clock.now += seconds
  return goodput


def test_every_second_is_booked_once(clock):
  goodput = first_attempt(clock)
  assert goodput.seconds() == {
      'steps': 30, 'repeated': 0, 'startup': 8, 'restore': 2, 'data': 5, 'evaluation': 3, 'checkpoint': 2, 'stopped': 0,
  }  # fmt: skip
  assert goodput.shares()['goodput/steps'] == 30 / 50
  assert sum(goodput.shares().values()) == pytest.approx(1)
  assert goodput.summary() == {'share': 0.6, 'seconds': goodput.seconds(), 'attempts': 1}


def test_a_killed_attempt_costs_what_was_repeated_and_the_time_until_the_next(clock):
  note = first_attempt(clock).note(60)  # 30 s of steps for 60 steps
  clock.now += 100
  goodput = Goodput(clock=clock)
  clock.now += 4
  goodput.resume(note, start=40)  # 20 steps, 10 s of them, are done again
  goodput.begin_steps()
  clock.now += 6
  assert goodput.seconds() == {
      'steps': 20 + 6, 'repeated': 10, 'startup': 8 + 4, 'restore': 2, 'data': 5, 'evaluation': 3, 'checkpoint': 2,
      'stopped': 100,
  }  # fmt: skip
  assert sum(goodput.seconds().values()) == clock.now - 1000
  assert goodput.attempts == 2
  third = Goodput(clock=clock)
  third.resume(goodput.note(52), start=52)
  assert third.attempts == 3 and third.seconds() == goodput.seconds()


NO_SECONDS = b'{"step": 1, "time": 2, "attempts": 1, "seconds": {}}'


@pytest.mark.parametrize('note', [None, b'', b'{"step": 6', b'\xff', b'[]', NO_SECONDS])
def test_a_note_that_cannot_be_read_counts_as_none(clock, note):
  goodput = Goodput(clock=clock)
  goodput.resume(note, 0)
  assert goodput.attempts == 1 and set(goodput.seconds().values()) == {0}
  assert goodput.shares() == {}


def test_an_attempt_may_have_begun_before_it_is_counted(clock):
  goodput = Goodput(clock() - 7, clock)
  goodput.begin_steps()
  clock.now += 3
  assert (goodput.seconds()['startup'], goodput.seconds()['steps'], goodput.elapsed()) == (7, 3, 10)


def test_a_note_is_small_and_says_everything(clock):
  note = json.loads(first_attempt(clock).note(60))
  assert (note['step'], note['time'], note['attempts'], set(note['seconds'])) == (60, 1050, 1, set(KINDS))
