"""Goodput: what share of a run's wall time went into steps that lasted, and what the rest was spent on.

Time counts from the first start of a run to now, over all its attempts; what earlier ones spent is kept in a small file
of the run folder. The kinds:

  steps       steps of the optimizer that are part of the run: what no other kind has taken
  repeated    steps that a kill undid, from the one that the next attempt restored to the last that was noted
  startup     from the beginning of an attempt to its first step: imports, tracing, data, compilation
  restore     finding, checking and reading a checkpoint
  data        waiting for a batch; the device may be busy with the step before, so this is an upper bound
  evaluation  held-out batches, their compilation too
  checkpoint  the part of a save that the loop waits for
  stopped     between attempts, and in the one before from what it noted last to its end
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator

KINDS = ('steps', 'repeated', 'startup', 'restore', 'data', 'evaluation', 'checkpoint', 'stopped')


class Goodput:
  """Books the wall time of one attempt, and on top of it that of the attempts before.

    goodput = Goodput()
    with goodput.spent('restore'):
      ...
    goodput.resume(content of the file or None, start)
    goodput.begin_steps()
    for step in ...:
      with goodput.spent('data'):
        ...
      goodput.shares()                   # {'goodput/steps': 0.93, 'goodput/data': 0.01, ...}, 1 in all
      goodput.note(step)                 # text for the file

  began: when this attempt did, if that was before now.
  clock: seconds since the epoch, as it is compared across attempts.
  """

  def __init__(self, began: float | None = None, clock: Callable[[], float] = time.time):
    self._clock = clock
    self._began = clock() if began is None else began
    self._spent = dict.fromkeys(KINDS, 0.0)  # of this attempt; its steps are the remainder
    self._before = dict.fromkeys(KINDS, 0.0)
    self.attempts = 1

  @contextlib.contextmanager
  def spent(self, kind: str) -> Iterator[None]:
    """Time in this block is of that kind; blocks do not nest."""
    start = self._clock()
    try:
      yield
    finally:
      self._spent[kind] += max(0.0, self._clock() - start)

  def resume(self, noted: bytes | None, start: int) -> None:
    """Takes over what earlier attempts noted. This one continues from step `start`: what they did after it is repeated.

    A note that cannot be read counts as none.
    """
    try:
      before = json.loads(noted or b'')
      last, ended = int(before['step']), float(before['time'])
      self._before |= {kind: float(before['seconds'][kind]) for kind in KINDS}
      self.attempts = int(before['attempts']) + 1
    except (KeyError, TypeError, ValueError):
      return
    self._before['stopped'] += max(0.0, self._began - ended)
    if last > start:
      lost = self._before['steps'] * (last - start) / last
      self._before['steps'] -= lost
      self._before['repeated'] += lost

  def begin_steps(self) -> None:
    """What went before the first step and was not booked is start-up."""
    self._spent['startup'] += self._remainder()

  def seconds(self) -> dict[str, float]:
    """Of all attempts, by kind."""
    spent = self._spent | {'steps': self._remainder()}
    return {kind: self._before[kind] + spent[kind] for kind in KINDS}

  def elapsed(self) -> float:
    """Seconds since this attempt began."""
    return self._clock() - self._began

  def shares(self) -> dict[str, float]:
    """Of the wall time since the first attempt began, under the tags of TensorBoard."""
    seconds = self.seconds()
    total = sum(seconds.values())
    return {f'goodput/{kind}': value / total for kind, value in seconds.items()} if total else {}

  def note(self, step: int) -> str:
    """What the next attempt resumes from; `step` is the last that is finished."""
    seconds = {kind: round(value, 3) for kind, value in self.seconds().items()}
    return json.dumps({'step': step, 'time': round(self._clock(), 3), 'attempts': self.attempts, 'seconds': seconds})

  def summary(self) -> dict:
    """For result.json: share of steps that lasted, wall seconds by kind, attempts."""
    seconds = self.seconds()
    share = seconds['steps'] / max(sum(seconds.values()), 1e-9)
    return {'share': share, 'seconds': seconds, 'attempts': self.attempts}

  def _remainder(self) -> float:
    """Seconds of this attempt that nothing has claimed."""
    return max(0.0, self.elapsed() - sum(self._spent.values()))
