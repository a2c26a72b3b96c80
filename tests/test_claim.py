"""One job to a folder, with locks and without."""

import json
import os
import signal
import subprocess
import sys

import pytest
from etils import epath

from mmx import claim, distributed
from mmx.config import ConfigError

HOLDER = """
import sys
from mmx import claim
if sys.argv[2] == 'unlocked':
  claim._lock = lambda path: None
  claim.RENEW_S, claim.LEASE_S, claim.SETTLE_S = 0.1, 1, 0.1
sys.stdin.readline()
with claim.held(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture(params=['locked', 'unlocked'])
def kind(request, monkeypatch):
  """Of the file system; without locks, time runs faster here."""
  if request.param == 'unlocked':
    monkeypatch.setattr(claim, '_lock', lambda path: None)
    for name, value in {'RENEW_S': 0.1, 'LEASE_S': 1, 'SETTLE_S': 0.1}.items():
      monkeypatch.setattr(claim, name, value)
  return request.param


@pytest.fixture
def holder(tmp_path, kind):
  """Another process that has claimed tmp_path / 'run'."""
  command = [sys.executable, '-c', HOLDER, str(tmp_path / 'run'), kind]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    process.stdin.write('go\n')
    process.stdin.flush()
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()


def test_the_second_job_is_refused_and_told_who_has_the_folder_since_when(tmp_path, holder):
  with pytest.raises(ConfigError) as refused, distributed.claim(tmp_path / 'run'):
    pass
  since = json.loads((tmp_path / 'run/claim.json').read_text())['since']
  host = os.uname().nodename
  assert str(refused.value) == (
      f'{tmp_path}/run is in use by process {holder.pid} on {host} since {since}; '
      'wait for it, stop it, or give another --workdir'
  )
  assert holder.poll() is None and '\n' not in str(refused.value)


def test_a_killed_job_bars_nobody(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / 'run/claim.json').exists()
  with distributed.claim(tmp_path / 'run'):
    assert json.loads((tmp_path / 'run/claim.json').read_text())['pid'] == os.getpid()


def test_an_ended_job_leaves_no_claim_and_no_empty_folder(tmp_path, kind):
  (tmp_path / 'old').mkdir()
  with claim.held(tmp_path / 'old/arm/seed0'), claim.held(tmp_path / 'old/arm/seed1'):
    (tmp_path / 'old/arm/seed1/result.json').write_text('{}')
  with pytest.raises(ZeroDivisionError), claim.held(tmp_path / 'new/arm/seed0'):
    1 / 0
  assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob('*'))] == [
      'old', 'old/arm', 'old/arm/seed1', 'old/arm/seed1/result.json'
  ]  # fmt: skip
  with claim.held(tmp_path / 'old/arm/seed1'):  # again
    pass


def test_of_many_that_come_at_once_one_has_the_folder(tmp_path, kind):
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  command = [sys.executable, '-c', HOLDER, str(tmp_path / 'run'), kind]
  jobs = [subprocess.Popen(command, **pipes) for _ in range(4)]
  try:
    for job in jobs:
      job.stdin.write('go\n')
      job.stdin.flush()
    held = [job for job in jobs if job.stdout.readline() == 'held\n']
    told = [job.communicate(timeout=60)[1] for job in jobs]
    assert len(held) == 1 and [f'in use by process {held[0].pid} on' in text for text in told].count(True) == 3
  finally:
    for job in jobs:
      job.kill()


def test_a_claim_that_is_let_go_while_another_waits_for_the_lock_is_made_anew(tmp_path, monkeypatch):
  """The file that was opened is no longer the folder's: its lock would keep nobody out."""
  path = epath.Path(tmp_path / 'claim.json')
  flock, removed = claim.fcntl.flock, []

  def meanwhile(file, how):
    flock(file, how)
    if not removed:
      removed.append(path.unlink())

  monkeypatch.setattr(claim.fcntl, 'flock', meanwhile)
  with claim._lock(path) as lock:
    assert os.path.samestat(os.fstat(lock.fileno()), os.stat(path))


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match=r'file'), distributed.claim(tmp_path / 'file/run'):
    pass
