"""A window of steps traced by jax.profiler, asked for by a flag or by a signal.

  python -m mmx.train --config=... --profile=20:25    # traces steps 20 to 24 of each run, on the first process
  kill -USR1 <pid>                                    # traces the next few steps, on the process that gets it

The trace lies in the run folder under plugins/profile, where the profile plugin of TensorBoard finds it (`pip install
tensorboard-plugin-profile`); `xplane.pb` also opens in Perfetto by way of `xprof`. All processes run one program, so the
flag traces the first alone; a signal looks at a host that is suspected of being slow. Nothing is traced unless asked
for, and then whole steps: before the first and behind the last the loop waits for the device.
"""

import os
import re
import signal
import sys

from mmx.config import ConfigError

SIGNALLED_STEPS = 5


def parse_window(text: str | None) -> range:
  """'20:25' is steps 20 to 24; None is none. Raises ConfigError for anything else."""
  if text is None:
    return range(0)
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or not 0 < int(match[1]) < int(match[2]):
    raise ConfigError(f'--profile: expected START:STOP, two step numbers such as 20:25, found {text!r}')
  return range(int(match[1]), int(match[2]))


class Profiler:
  """Traces the steps of `window`, and `SIGNALLED_STEPS` more whenever SIGUSR1 comes while it is entered.

    with Profiler(window) as profiler:
      for step in ...:
        if profiler.changes_at(step):
          ...                            # wait for the device
          profiler.change(step, folder)
        ...
      profiler.stop()

  Only the main thread may enter. On exit the handler found at entry is back.
  """

  def __init__(self, window: range = range(0)):
    self._window = window
    self._requested = False
    self._until: int | None = None  # first step behind the trace that is going on

  def __enter__(self) -> 'Profiler':
    self._previous = signal.signal(signal.SIGUSR1, self._request)
    return self

  def __exit__(self, *_) -> None:
    self.stop()
    signal.signal(signal.SIGUSR1, self._previous)

  def _request(self, *_) -> None:
    self._requested = True

  def changes_at(self, step: int) -> bool:
    """Whether a trace begins or ends before this step."""
    if self._until is not None:
      return step >= self._until
    return self._requested or step in self._window

  def change(self, step: int, folder: str | os.PathLike) -> None:
    """Ends the trace that is going on, or begins one in `folder`."""
    import jax

    if self._until is not None:
      return self.stop()
    self._until = step + SIGNALLED_STEPS if self._requested else self._window.stop
    self._requested = False
    jax.profiler.start_trace(os.fspath(folder))
    print(f'tracing steps {step} to {self._until - 1} into {folder}/plugins/profile', file=sys.stderr, flush=True)

  def stop(self) -> None:
    """Writes the trace that is going on, if any."""
    import jax

    if self._until is not None:
      self._until = None
      jax.profiler.stop_trace()
