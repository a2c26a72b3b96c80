"""A watch over each process of a run: who is alive, where a hang stands, and an end to waiting for the dead.

A collective waits for every process and for ever, so one process that stalls or dies stops all others where they are.

  with Watch(folder, jax.process_index(), timeout=600) as watch:
    for step in ...:
      watch.beat(step)

  folder/heartbeat.<index>.json   time, step, pid and host of a process, written every PULSE_S by a thread; it is
                                  removed at an orderly end, and after an exception says which one
  folder/stacks.<index>.txt       where all threads of a process stood when it was ended for a hang

A process is ended with exit code ENDED and one line on stderr, after which the same command continues the run,
  - when `timeout` seconds have passed since its last beat;
  - when it fails because another process is gone (its heartbeat has not changed for GONE_S);
  - when another process has failed and this one has not within GONE_S: its next collective would never return.
It is ended hard, as each orderly way out waits for the process that is gone.

jax ends processes too: all others at once when process 0 dies, and those that wait in a collective of a TPU slice
distributed.HEARTBEAT_TIMEOUT_S after another one died. That is an abort from a thread of C++, and jax 0.10 takes no
function of Python to call before it, so a child process waits for that moment with the last words.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import jax
from etils import epath

from mmx import distributed
from mmx.metrics import write_whole

CONTINUES = 'the same command continues from the last checkpoint'
ENDED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the run itself
PULSE_S = 5
GONE_S = 20  # a thread of a living process is late by seconds, not by four pulses
WRITE_S = 10  # for the stacks: the folder may be what hangs, and they go to stderr then
READERS = 16  # of heartbeats at a time; an object store takes some 50 ms for each
SPEAK = 'import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)'  # what comes in means an end with words


class Watch:
  """Watches this process while the block runs.

  folder: of the run, shared by its processes, on a disk or gs://.
  index: of this process.
  timeout: seconds from one beat to the next; 0 only keeps heartbeats. It must be longer than the longest pause between
    steps: an evaluation with its compilation, or a checkpoint that waits for the one before. It counts from the first
    beat on: how long compiling and restoring take before that, nobody can say.
  """

  def __init__(self, folder: str | os.PathLike, index: int, timeout: float):
    self.folder = epath.Path(folder)
    self.index = index
    self.timeout = timeout
    self._beat: tuple[int, float] | None = None  # step, and when
    self._over = threading.Event()
    self._job = 0  # tells this job's heartbeats from those that an earlier one left
    self._others: dict[int, Peer] = {}
    self._threads = []
    self._last_words: subprocess.Popen | None = None

  def beat(self, step: int) -> None:
    """The loop is alive and at this step. Costs an assignment."""
    self._beat = step, time.monotonic()

  def __enter__(self) -> 'Watch':
    """All processes enter together."""
    self._job = int(distributed.gather([int.from_bytes(os.urandom(3))])[0, 0])
    self._others = {index: Peer(index) for index in range(jax.process_count()) if index != self.index}
    if self._others:
      words = (f'error: process {self.index} (pid {os.getpid()} on {socket.gethostname()}) was killed, or jax ended it '
               f'because another process is gone; {CONTINUES}')
      command = [sys.executable, '-I', '-S', '-c', SPEAK, words]
      self._last_words = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    # Two threads, as storage that hangs must not keep the other from its judgement.
    for target in (self._pulse, self._judge) if self.timeout else (self._pulse,):
      thread = threading.Thread(target=target, name=f'watch{target.__name__}', daemon=True)
      thread.start()
      self._threads.append(thread)
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
    self._over.set()
    for thread in self._threads:
      thread.join(WRITE_S)
    if isinstance(error, Exception):
      reason = _first_line(error)
      self._write(failed=reason)
      if lost := self._lost():
        self._end(f'{lost.phrase()}, noticed by {reason}')
    else:
      with contextlib.suppress(Exception):
        self._path(self.index).unlink(missing_ok=True)
    self._keep_quiet()

  # The threads.

  def _pulse(self) -> None:
    """Writes this process's heartbeat and reads others'.

    Process 0 reads all and the others read process 0's, lest reads grow with the square of their number; whoever has
    been still for half its time reads all too, to say of whom it hears nothing.
    """
    told = set()
    while True:
      self._write()
      wary = self.index == 0 or self.timeout and self._stillness() > self.timeout / 2
      heard = list(self._others) if wary else [0]
      if self._look(heard):
        for peer in [peer for index, peer in self._others.items() if index in heard and peer.silence() > GONE_S]:
          if peer.failed:
            self._end(f'{peer.phrase()}, and nothing goes on without it')
          if peer.index not in told:
            told.add(peer.index)
            print(f'watch: {peer.phrase()}', file=sys.stderr, flush=True)
      if self._over.wait(PULSE_S):
        return

  def _judge(self) -> None:
    """Ends the process when the loop has been still for too long."""
    while not self._over.wait(min(1, self.timeout / 4)):
      if (stillness := self._stillness()) > self.timeout:
        where = self._dump()
        silent = [peer.phrase() for peer in list(self._others.values()) if peer.silence() > GONE_S]
        self._end(
            f'process {self.index} on {socket.gethostname()} hangs: nothing for {stillness:.0f} s after step '
            f'{self._beat[0]}; its stacks are in {where}; ' + ('; '.join(silent) or 'no other heartbeat is old')
        )

  def _stillness(self) -> float:
    """Seconds since the last beat, 0 before the first."""
    return time.monotonic() - self._beat[1] if self._beat else 0.0

  def _end(self, line: str) -> NoReturn:
    self._keep_quiet()
    sys.stdout.flush()
    print(f'error: {line}; {CONTINUES}', file=sys.stderr, flush=True)
    os._exit(ENDED)

  def _keep_quiet(self) -> None:
    if self._last_words:
      self._last_words.communicate(b'.')

  # Heartbeats.

  def _path(self, index: int) -> epath.Path:
    return self.folder / f'heartbeat.{index}.json'

  def _write(self, **more: str) -> None:
    heartbeat = {
        'time': time.time(), 'step': self._beat and self._beat[0], 'pid': os.getpid(), 'host': socket.gethostname(),
        'job': self._job, **more,
    }  # fmt: skip
    with contextlib.suppress(Exception):  # the storage's bad minute is not the run's end
      write_whole(self._path(self.index), json.dumps(heartbeat))

  def _look(self, indices: list[int]) -> bool:
    """Notes which heartbeats have changed; False if the storage did not let it.

    Who has removed its own has come to an orderly end and counts no more.
    """

    def read(index):
      try:
        heartbeat = json.loads(self._path(index).read_text())
      except FileNotFoundError:
        return {}
      return heartbeat if heartbeat['job'] == self._job else {}

    wanted = [index for index in indices if index in self._others]
    try:
      with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(read, wanted))
    except Exception:
      return False
    for index, heartbeat in zip(wanted, found, strict=True):
      known = self._others[index].heartbeat
      if known and not heartbeat:
        del self._others[index]
      elif heartbeat != known:
        self._others[index] = Peer(index, heartbeat)
    return True

  def _lost(self) -> 'Peer | None':
    """A process that is gone; None as soon as all others are seen to have failed or ended too, or if they are alive."""
    until = time.monotonic() + GONE_S + 2 * PULSE_S
    while time.monotonic() < until:
      if self._look(list(self._others)):
        running = [peer for peer in self._others.values() if not peer.failed]
        if gone := [peer for peer in running if peer.silence() > GONE_S]:
          return gone[0]
        if not running:
          return None
      time.sleep(PULSE_S / 2)
    return None

  def _dump(self) -> str:
    """Writes where all threads stand; says where to."""
    with tempfile.TemporaryFile('w+') as file:
      faulthandler.dump_traceback(file, all_threads=True)
      file.seek(0)
      stacks = file.read()
    path = self.folder / f'stacks.{self.index}.txt'
    writer = threading.Thread(target=write_whole, args=(path, stacks), daemon=True)
    writer.start()
    writer.join(WRITE_S)
    if not writer.is_alive() and path.exists():
      return str(path)
    print(stacks, file=sys.stderr)
    return 'the lines above'


@dataclasses.dataclass(frozen=True)
class Peer:
  """The last heartbeat of another process. Its age is by this host's own clock, as hosts' clocks differ."""

  index: int
  heartbeat: dict = dataclasses.field(default_factory=dict)  # {}: none of this job so far
  since: float = dataclasses.field(default_factory=time.monotonic)

  @property
  def failed(self) -> str:
    """What ended it, '' while it runs."""
    return self.heartbeat.get('failed', '')

  def silence(self) -> float:
    """Seconds since the heartbeat was seen to change."""
    return time.monotonic() - self.since

  def phrase(self) -> str:
    if not self.heartbeat:
      return f'process {self.index} is gone: no heartbeat for {self.silence():.0f} s, since this job began'
    who = f'process {self.index} (pid {self.heartbeat["pid"]} on {self.heartbeat["host"]})'
    step = self.heartbeat['step']
    where = f'at step {step}' if step is not None else 'before its first step'
    if self.failed:
      return f'{who} failed {where}: {self.failed}'
    return f'{who} is gone: no heartbeat for {self.silence():.0f} s, the last one {where}'


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0][:200]}' if lines else type(error).__name__
