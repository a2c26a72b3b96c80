"""One job to a folder: two that write the same checkpoints and curves would spoil both.

`claim.json` in the folder says who has it. Where the file system has locks, a lock keeps it, which dies with its
process, so that a killed job bars nobody. Elsewhere (gs://, some network mounts) the file is written again every
RENEW_S seconds, and one that stays the same for LEASE_S has lapsed: after a kill, the next start waits that long.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TextIO

from etils import epath

from mmx.config import ConfigError
from mmx.metrics import write_whole

RENEW_S, LEASE_S = 10, 45
SETTLE_S = 2  # after writing a claim, for another job that did so at the same moment


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
  """Keeps a folder, made if need be, to this process until the end of the block.

  Raises:
    ConfigError: another has it; the line says who and since when.
    OSError: it cannot be written.
  """
  folder = epath.Path(workdir)
  remote = '://' in os.fspath(folder)
  made = [] if remote else [parent for parent in (folder, *folder.parents) if not parent.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'claim.json'
  claimant = {'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.strftime('%Y-%m-%d %H:%M:%S %z')}
  try:
    lock = None if remote else _lock(path)
    if lock is None:
      with _lease(path, claimant):
        yield
    else:
      with lock:
        lock.truncate(0)
        lock.write(json.dumps(claimant))
        lock.flush()
        try:
          yield
        finally:
          path.unlink(missing_ok=True)  # while it is locked: who waits for it finds out and makes a new one
  finally:
    for parent in made:  # a job that was refused or failed at once leaves nothing behind
      with contextlib.suppress(OSError):
        os.rmdir(parent)


def _lock(path: epath.Path) -> TextIO | None:
  """The open and locked file, or None on a file system that has no locks."""
  while True:
    try:
      file = open(path, 'a+')
    except FileNotFoundError:  # a job that has just ended took its empty folder along
      path.parent.mkdir(parents=True, exist_ok=True)
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      with file:
        file.seek(0)
        raise _taken(path, file.read()) from None
    except OSError:
      file.close()
      return None
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        return file
    file.close()  # of a job that has just ended: its file is gone, and the lock with it


@contextlib.contextmanager
def _lease(path: epath.Path, claimant: dict) -> Iterator[None]:
  """A claim without a lock: it is alive as long as its text changes. No clocks of two hosts are compared."""
  found = _text(path)
  lapses = time.monotonic() + LEASE_S
  while found and time.monotonic() < lapses:
    time.sleep(min(1, LEASE_S / 10))
    if (now := _text(path)) and now != found:
      raise _taken(path, now)
    found = now
  token, renewed = uuid.uuid4().hex, 0

  def text():
    return json.dumps(claimant | {'token': token, 'renewed': renewed})

  write_whole(path, text())
  time.sleep(SETTLE_S)
  if (now := _text(path)) != text():  # two came at once, and the last writer has it
    raise _taken(path, now)
  over = threading.Event()

  def renew():
    nonlocal renewed
    while not over.wait(RENEW_S):
      renewed += 1
      with contextlib.suppress(Exception):  # the storage's bad minute; LEASE_S bears four
        write_whole(path, text())

  thread = threading.Thread(target=renew, name='claim', daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join(RENEW_S)
    path.unlink(missing_ok=True)


def _text(path: epath.Path) -> str:
  try:
    return path.read_text()
  except FileNotFoundError:
    return ''


def _taken(path: epath.Path, text: str) -> ConfigError:
  try:
    holder = json.loads(text)
    by = f'by process {holder["pid"]} on {holder["host"]} since {holder["since"]}'
  except (ValueError, KeyError, TypeError):  # it is just being written
    by = 'by another job'
  return ConfigError(f'{path.parent} is in use {by}; wait for it, stop it, or give another --workdir')
