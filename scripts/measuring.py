"""What every benchmark here shares: turns, their spread, and on what machine it ran."""

import datetime
import os
import platform
import statistics
import sys
from importlib import metadata

BUSY = 0.5  # load average above which another's work is in the figures


def spread(values) -> dict[str, float]:
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def by_turns(turns, rounds) -> dict[str, list[float]]:
  """{name: seconds of one call, of every round} for {name: function that takes a turn and returns such seconds}.

  Who begins alternates from round to round, so that slow drift cancels.
  """
  seconds = {name: [] for name in turns}
  for number in range(rounds):
    for name in sorted(turns, reverse=number % 2 == 1):
      seconds[name].append(turns[name]())
  return seconds


def machine(*packages) -> dict:
  """Host, date, versions and load, for a file of figures; warns where others' work will be in them."""
  names = [line.partition(':')[2].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')]
  load = os.getloadavg()[0]
  alone = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)  # chrt -f 1: others do not run beside it
  if load > BUSY and not alone:
    print(f'warning: the machine is busy (load {load:.1f}): figures will be off', file=sys.stderr)
  return {
      'cpu': names[0] if names else platform.machine(), 'cores': len(os.sched_getaffinity(0)),
      'load_average_before': load, 'real_time_priority': alone,
      'date': datetime.date.today().isoformat(),
      'versions': {'python': platform.python_version()} | {name: metadata.version(name) for name in packages},
  }
