"""The shell scripts against programs that write down what they are asked: exact arguments, and how each script ends."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import tarfile
import time

import pytest
from fakes import Fakes, heed_signals

SCRIPTS = pathlib.Path(__file__).parents[1] / 'scripts'
SHELL = sorted(path for path in SCRIPTS.rglob('*') if path.suffix in ('.sh', '.sbatch'))
PLACE = ['--zone=us-central1-a', '--quiet']
TPUS = ['gcloud', 'compute', 'tpus']
NOT_FOUND = {'status': 1, 'err': 'ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource ...\n'}
HARD_WORDS = ['--set', "model.pattern=(full*2 'msa')*2", '--set', 'data.source=text:$HOME/my "texts"']
TRAIN = ['python', '-m', 'mmx.train', *HARD_WORDS]
AGAIN = 75


@pytest.fixture
def fakes(tmp_path):
  """tar and git too: the real ones would pack this working tree."""
  return Fakes(tmp_path, ['gcloud', 'xpk', 'sbatch', 'squeue', 'scancel', 'srun', 'tar', 'git', 'uv'])


@pytest.fixture
def script(fakes):
  """script('tpu/create', 'name', ZONE='...') -> (status, stdout lines, stderr lines)."""

  def run(what, *arguments, **environment):
    place = {'ZONE': 'us-central1-a', 'ACCELERATOR_TYPE': 'v5litepod-8', 'CLUSTER': 'mmx'}
    done = subprocess.run(
        [SCRIPTS / (what if '.' in what else f'{what}.sh'), *arguments], capture_output=True, text=True, timeout=60,
        env=fakes.environment | place | {'LOGS': f'{fakes.folder}/logs'} | environment, cwd=fakes.folder,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

  return run


def states(*names):
  return [{'out': name} for name in names]


# --- every script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', SHELL, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_shell_is_sound(path):
  assert subprocess.run(['bash', '-n', path], capture_output=True, text=True).stderr == ''
  if shutil.which('shellcheck'):
    check = ['shellcheck', '--external-sources', path]
    checked = subprocess.run(check, capture_output=True, text=True, cwd=path.parent)
    assert checked.returncode == 0, checked.stdout
  sourced = path.name in ('launching.sh', 'place.sh')
  assert sourced or 'set -euo pipefail' in path.read_text()
  assert os.access(path, os.X_OK) != sourced
  assert max(map(len, path.read_text().splitlines())) <= 120


JOBS = [
    ('tpu/create', ['first-run']), ('tpu/run', ['first-run', *TRAIN]), ('tpu/delete', ['first-run']),
    ('xpk/create', []), ('xpk/run', ['first-run', *TRAIN]), ('xpk/delete', ['first-run']),
    ('xpk/delete', ['--cluster']), ('slurm/run', ['first-run', *TRAIN]), ('slurm/delete', ['first-run']),
]  # fmt: skip
LOOKING = ('describe', 'workload list', 'squeue')  # what a script asks before it acts


@pytest.mark.parametrize('what, arguments', JOBS, ids=[' '.join([what, *rest[:1]]) for what, rest in JOBS])
def test_a_dry_run_prints_what_the_run_does_and_does_nothing(fakes, script, what, arguments):
  fakes.play({'queued-resources describe': [NOT_FOUND] if 'create' in what else states('ACTIVE'),
              'tpu-vm describe': states('READY')})
  status, printed, said = script(what, *arguments, DRY_RUN='1')
  assert (status, said, fakes.calls()) == (0, [], [])
  assert script(what, *arguments)[0] == 0
  done = [words for words in fakes.calls() if not any(look in ' '.join(words) for look in LOOKING)]
  piped = [shlex.split(line) for lines in printed for line in lines.split(' | ')]
  assert sorted(piped) == sorted(done) and done


@pytest.mark.parametrize('what, arguments, missing', [
    ('tpu/create', ['a'], 'ZONE'), ('tpu/create', ['a'], 'ACCELERATOR_TYPE'), ('tpu/run', ['a', 'b'], 'ZONE'),
    ('tpu/watch', ['a'], 'ZONE'), ('tpu/delete', ['a'], 'ZONE'), ('xpk/create', [], 'CLUSTER'),
    ('xpk/run', ['a', 'b'], 'ACCELERATOR_TYPE'), ('xpk/watch', ['a'], 'ZONE'), ('xpk/delete', ['a'], 'CLUSTER'),
])  # fmt: skip
def test_a_missing_variable_is_named_in_one_line(fakes, script, what, arguments, missing):
  status, _, (said,) = script(what, *arguments, **{missing: ''})
  assert status == 1 and said.startswith(f'error: {missing} is not set: export {missing}, ')
  assert not fakes.calls()


@pytest.mark.parametrize('name', ['', 'First', '1st', 'a_b', 'a-', 'a b', '-a', 'a' * 29, '$(touch x)'])
@pytest.mark.parametrize('what', ['tpu/create', 'xpk/run', 'slurm/delete'])
def test_a_name_that_no_scheduler_takes_is_refused_in_one_line(fakes, script, what, name):
  status, _, (said,) = script(what, name, 'true')
  assert status == 1 and said.startswith('error: the name of a job is 1 to 28 of a-z, 0-9 and -')
  assert f"'{name}'" in said and not fakes.calls()


@pytest.mark.parametrize('what, program', [
    ('tpu/create', 'gcloud'), ('tpu/delete', 'gcloud'), ('xpk/run', 'xpk'), ('xpk/delete', 'xpk'),
    ('slurm/run', 'squeue'),
])  # fmt: skip
def test_a_missing_program_is_named_in_one_line(fakes, script, what, program):
  (fakes.bin / program).unlink()
  status, _, (said,) = script(what, 'first-run', *(['true'] if 'run' in what else []))
  assert status == 1 and said == f'error: {program} is not on PATH; docs/cloud.md says where it comes from'


# --- Cloud TPU --------------------------------------------------------------------------------------------------------


CREATE = [*TPUS, 'queued-resources', 'create', 'first-run', '--node-id=first-run']
DELETE = [*TPUS, 'queued-resources', 'delete', 'first-run', '--force', *PLACE]


@pytest.mark.parametrize('kind, runtime', [
    ('v5litepod-8', 'v2-alpha-tpuv5-lite'), ('v5p-128', 'v2-alpha-tpuv5'), ('v6e-256', 'v2-alpha-tpuv6e'),
    ('v4-8', 'tpu-ubuntu2204-base'),
])  # fmt: skip
def test_a_slice_is_asked_for_with_the_runtime_of_its_chip(fakes, script, kind, runtime):
  fakes.play({'queued-resources describe': [NOT_FOUND]})
  assert script('tpu/create', 'first-run', ACCELERATOR_TYPE=kind)[0] == 0
  kinds = [f'--accelerator-type={kind}', f'--runtime-version={runtime}']
  assert fakes.calls()[-1] == [*CREATE, *kinds, *PLACE]
  more = {'SPOT': '1', 'PROJECT_ID': 'p', 'RUNTIME_VERSION': 'mine'}
  assert script('tpu/create', 'first-run', ACCELERATOR_TYPE=kind, **more)[0] == 0
  place = ['--zone=us-central1-a', '--project=p', '--quiet']
  assert fakes.calls()[-1] == [*CREATE, kinds[0], '--runtime-version=mine', '--spot', *place]


@pytest.mark.parametrize('kind', ['v5e-8', 'v5litepod-', 'v5p', 'h100-8', 'v6e-0'])
def test_an_unknown_chip_is_refused_in_one_line(fakes, script, kind):
  status, _, (said,) = script('tpu/create', 'first-run', ACCELERATOR_TYPE=kind)
  assert status == 1 and said.startswith(f'error: ACCELERATOR_TYPE={kind}: ') and not fakes.calls()


@pytest.mark.parametrize('request_, node, asked', [
    ('WAITING_FOR_RESOURCES', '', []), ('PROVISIONING', '', []), ('ACTIVE', 'READY', []),
    ('SUSPENDED', '', [DELETE[3:5], CREATE[3:5]]), ('FAILED', '', [DELETE[3:5], CREATE[3:5]]),
    ('ACTIVE', 'PREEMPTED', [DELETE[3:5], CREATE[3:5]]),
])  # fmt: skip
def test_what_is_there_is_kept_and_what_was_preempted_is_asked_for_anew(fakes, script, request_, node, asked):
  fakes.play({'queued-resources describe': states(request_), 'tpu-vm describe': states(node)})
  assert script('tpu/create', 'first-run')[0] == 0
  assert [words[3:5] for words in fakes.calls() if 'describe' not in words] == asked


def test_an_error_of_gcloud_is_not_taken_for_an_absent_slice(fakes, script):
  fakes.play({'queued-resources describe': [{'status': 1, 'err': 'ERROR: PERMISSION_DENIED\n'}]})
  for what in ('tpu/create', 'tpu/watch', 'tpu/delete'):
    status, _, said = script(what, 'first-run')
    assert status == 1 and said == ['ERROR: PERMISSION_DENIED', 'error: gcloud could not say the state of first-run']
  assert all('describe' in words for words in fakes.calls())


def test_watching_says_each_state_once_until_the_slice_is_there(fakes, script):
  waits = ['WAITING_FOR_RESOURCES'] * 3 + ['PROVISIONING'] * 2 + ['ACTIVE']
  fakes.play({'queued-resources describe': states(*waits), 'tpu-vm describe': states('READY')})
  status, printed, _ = script('tpu/watch', 'first-run')
  assert status == 0 and printed == ['state: WAITING_FOR_RESOURCES', 'state: PROVISIONING', 'state: ACTIVE']
  assert fakes.calls()[0] == [
      *TPUS, 'queued-resources', 'describe', 'first-run', *PLACE, '--format=value(state.state)'
  ]
  fakes.play({'queued-resources describe': states('WAITING_FOR_RESOURCES')})
  assert script('tpu/watch', 'first-run', '--once')[:2] == (0, ['state: WAITING_FOR_RESOURCES'])


@pytest.mark.parametrize('request_, node, status', [
    ('FAILED', '', 1), ('SUSPENDED', '', AGAIN), ('SUSPENDING', '', AGAIN), ('ACTIVE', 'PREEMPTED', AGAIN),
])  # fmt: skip
def test_watching_tells_a_failed_request_from_a_slice_that_was_taken_away(fakes, script, request_, node, status):
  fakes.play({'queued-resources describe': states(request_), 'tpu-vm describe': states(node)})
  assert script('tpu/watch', 'first-run')[0] == status
  fakes.play({'queued-resources describe': [NOT_FOUND]})
  assert script('tpu/watch', 'first-run')[0] == 1


def test_the_command_arrives_word_by_word_on_every_worker(fakes, script):
  assert script('tpu/run', 'first-run', *TRAIN)[:2] == (0, ['state: running'])
  git, tar, copy, start = sorted(fakes.calls(), key=lambda words: (words[0] == 'gcloud', 'ssh' in words))
  packed = f'{fakes.folder}/first-run.tar.gz'
  assert copy == [
      *TPUS, 'tpu-vm', 'scp', packed, str(SCRIPTS / 'tpu/worker.sh'), 'first-run:', '--worker=all', *PLACE
  ]
  assert start[:-1] == [*TPUS, 'tpu-vm', 'ssh', 'first-run', '--worker=all', *PLACE]
  line = start[-1].removeprefix('--command=')
  there = subprocess.run(['bash', '-c', f'bash() {{ printf "%s\\n" "$@"; }}; {line}'], capture_output=True, text=True)
  assert there.stdout.splitlines() == ['worker.sh', 'first-run', *TRAIN]
  assert sorted(words[0] for words in (git, tar)) == ['git', 'tar'] and packed in (*git, *tar)


@pytest.mark.parametrize('ssh, request_, node, expected', [
    (1, 'ACTIVE', 'READY', 1),  # a config error: for good
    (137, 'ACTIVE', 'READY', 137),  # killed there
    (AGAIN, 'ACTIVE', 'READY', AGAIN),  # mmx.train's word for: again
    (255, 'ACTIVE', 'READY', AGAIN),  # ssh's word for a connection that broke
    (1, 'SUSPENDED', '', AGAIN), (255, 'ACTIVE', 'PREEMPTED', AGAIN),
])  # fmt: skip
def test_a_run_ends_as_its_command_unless_its_slice_was_taken_away(fakes, script, ssh, request_, node, expected):
  there = {'queued-resources describe': states(request_), 'tpu-vm describe': states(node)}
  fakes.play({'tpu-vm ssh': [{'status': ssh}], **there})
  assert script('tpu/run', 'first-run', 'true')[0] == expected
  fakes.play({'tpu-vm scp': [{'status': 1}], **there})
  assert script('tpu/run', 'first-run', 'true')[0] == (1 if node == 'READY' else AGAIN)
  assert not [words for words in fakes.calls() if 'ssh' in words]


def test_only_a_slice_that_is_there_is_deleted(fakes, script):
  fakes.play({'queued-resources describe': [NOT_FOUND]})
  assert script('tpu/delete', 'first-run')[0] == 0 and len(fakes.calls()) == 1
  fakes.play({'queued-resources describe': states('SUSPENDED')})
  assert script('tpu/delete', 'first-run')[0] == 0 and fakes.calls()[-1] == DELETE


@pytest.fixture
def worker(fakes, tmp_path):
  """worker(*command): worker.sh in a folder of its own with a packed tree, as on a machine of a slice."""
  (fakes.bin / 'tar').unlink()
  for tool in ('tar', 'gzip'):
    (fakes.bin / tool).symlink_to(shutil.which(tool))
  home = tmp_path / 'home'
  home.mkdir()
  shutil.copy(SCRIPTS / 'tpu/worker.sh', home)
  (tmp_path / 'setup.py').write_text('')
  with tarfile.open(home / 'job.tar.gz', 'w:gz') as packed:
    packed.add(tmp_path / 'setup.py', 'setup.py')

  def run(*command):
    words = ['bash', 'worker.sh', 'job', *command]
    out = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(
        words, cwd=home, env=fakes.environment, start_new_session=True, preexec_fn=heed_signals, **out
    )

  return run


def test_a_worker_ends_as_its_command_with_its_output(fakes, worker):
  first = worker('bash', '-c', 'echo "it is $1"; [[ -f setup.py ]] && exit 3', 'x', 'two  words')
  assert first.communicate(timeout=60)[0] == 'it is two  words\n' and first.returncode == 3
  assert fakes.calls('uv') == [
      ['uv', 'venv', '--quiet', '--python', '3.13', 'venv'],
      ['uv', 'pip', 'install', '--quiet', '--python', 'venv/bin/python', '-e', './job[tpu,gcs]'],
  ]
  assert worker('bash', '-c', 'kill -9 $$').wait(60) == 137
  assert worker('bash', '-c', 'kill -9 $PPID').wait(60) == 137  # with nobody left to say so
  assert worker('true').wait(60) == 0


def test_a_command_outlives_its_connection_and_is_found_again(tmp_path, worker):
  command = ('bash', '-c', 'echo started >> ../starts; while [[ ! -f ../go ]]; do sleep 0.05; done; exit 4')
  first = worker(*command)
  deadline = time.monotonic() + 30
  while not (tmp_path / 'home/starts').exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  os.killpg(first.pid, signal.SIGHUP)  # as sshd does
  first.wait(60)
  second = worker(*command)
  time.sleep(0.5)
  (tmp_path / 'home/go').touch()
  assert second.wait(60) == 4 and (tmp_path / 'home/starts').read_text() == 'started\n'


# --- XPK --------------------------------------------------------------------------------------------------------------


CLUSTER = ['--cluster=mmx', '--zone=us-central1-a']


def listing(*names):
  """What `xpk workload list` prints."""
  table = ['Jobset Name    Priority', *(f'{name}    medium' for name in names)]
  return {'out': '\n'.join(['[XPK] Starting workload list', *table])}


@pytest.mark.parametrize('environment, capacity', [
    ({}, '--on-demand'), ({'SPOT': '1'}, '--spot'), ({'RESERVATION': 'ours', 'SPOT': '1'}, '--reservation=ours')
])  # fmt: skip
def test_a_cluster_has_the_chips_that_are_asked_for(fakes, script, environment, capacity):
  assert script('xpk/create', **environment)[0] == 0
  assert fakes.calls() == [
      ['xpk', 'cluster', 'create', *CLUSTER, '--tpu-type=v5litepod-8', '--num-slices=1', capacity]
  ]
  assert script('xpk/create', ACCELERATOR_TYPE='h200-141gb-8')[0] == 0
  assert fakes.calls()[-1][4:] == ['--zone=us-central1-a', '--device-type=h200-141gb-8', '--num-nodes=1', '--on-demand']


def test_a_workload_becomes_the_command_so_that_signals_reach_it(fakes, script):
  assert script('xpk/run', 'first-run', *TRAIN)[0] == 0
  *words, command = fakes.calls()[-1]
  tree = str(SCRIPTS.parent)
  assert words == [
      'xpk', 'workload', 'create', '--workload=first-run', *CLUSTER, '--tpu-type=v5litepod-8',
      '--base-docker-image=python:3.12', f'--script-dir={tree}', '--max-restarts=10', '--restart-on-exit-codes=75',
      '--termination-grace-period-seconds=300',
  ]  # fmt: skip
  install, _, line = command.removeprefix('--command=').partition(' && ')
  assert install == "pip install --quiet -e '.[tpu,gcs]'" and shlex.split(line) == ['exec', *TRAIN]
  more = {'IMAGE': 'gcr.io/p/mmx', 'ACCELERATOR_TYPE': 'h200-141gb-8', 'RESTARTS': '0'}
  assert script('xpk/run', 'first-run', *TRAIN, **more)[0] == 0
  *words, command = fakes.calls()[-1]
  assert words[6:11] == [
      '--device-type=h200-141gb-8', '--num-nodes=1', '--docker-image=gcr.io/p/mmx', '--max-restarts=0',
      '--restart-on-exit-codes=75',
  ]  # fmt: skip
  assert shlex.split(command.removeprefix('--command=')) == ['exec', *TRAIN]


def test_a_workload_that_waits_or_runs_is_kept_and_one_that_ended_is_replaced(fakes, script):
  running = [listing('first-run', 'first-run-2')]
  fakes.play({'--filter-by-status=FINISHED': [listing()], '--filter-by-status=EVERYTHING': running})
  assert script('xpk/run', 'first-run', 'true')[0] == 0
  assert all('list' in words for words in fakes.calls())
  fakes.play({'--filter-by-status=FINISHED': [listing('first-run')]})
  assert script('xpk/run', 'first-run', 'true')[0] == 0
  assert [words[2] for words in fakes.calls()] == ['list', 'delete', 'create']
  assert fakes.calls()[1] == ['xpk', 'workload', 'delete', '--workload=first-run', *CLUSTER, '--force']
  fakes.play({'workload list': [listing('first-run-2')]})
  assert script('xpk/run', 'first-run', 'true')[0] == 0
  assert [words[2] for words in fakes.calls()] == ['list', 'list', 'create']


@pytest.mark.parametrize('waited, status', [(0, 0), (125, 1), (124, AGAIN), (1, AGAIN)])
def test_watching_a_workload_ends_as_xpk_says(fakes, script, waited, status):
  queued = [listing('first-run'), listing('first-run'), listing()]
  fakes.play({'--filter-by-status=QUEUED': queued, '--filter-by-status=EVERYTHING': [listing('first-run')],
              '--wait-for-job-completion': [{'status': waited}]})
  found, printed, _ = script('xpk/watch', 'first-run')
  assert found == status and [line for line in printed if 'state' in line] == ['state: QUEUED', 'state: running']
  assert fakes.calls()[-1] == ['xpk', 'workload', 'list', *CLUSTER, '--wait-for-job-completion=first-run']


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_a_job_is_sent_once(fakes, script, tmp_path):
  assert script('slurm/run', 'first-run', *TRAIN, NODES='4')[0] == 0
  queue, send = fakes.calls()
  assert queue[0] == 'squeue' and '--name=first-run' in queue
  assert send == [
      'sbatch', '--job-name=first-run', '--nodes=4', f'--output={tmp_path}/logs/first-run.log',
      f'--export=ALL,MMX_STATUS_FILE={tmp_path}/logs/first-run.status', str(SCRIPTS / 'slurm/run.sbatch'), *TRAIN,
  ]  # fmt: skip
  fakes.play({'squeue': states('PENDING')})
  assert script('slurm/run', 'first-run', *TRAIN)[:2] == (0, ['state: PENDING'])
  assert not fakes.calls('sbatch')
  status, _, (said,) = script('slurm/run', 'first-run', 'true', NODES='two')
  assert status == 1 and said == 'error: NODES=two: expected a whole number, at least 1'


def test_a_job_runs_every_word_under_srun_and_leaves_how_it_ended(fakes, script, tmp_path):
  fakes.play({'srun': [{'status': 3}]})
  left = tmp_path / 'first-run.status'
  assert script('slurm/run.sbatch', *TRAIN, MMX_STATUS_FILE=str(left))[0] == 3
  assert fakes.calls() == [['srun', '--kill-on-bad-exit=1', *TRAIN]] and left.read_text() == '3\n'
  assert script('slurm/run.sbatch', 'true')[0] == 3  # by hand, with nobody to tell


def test_watching_a_job_ends_as_it_did_or_says_that_it_was_taken_away(fakes, script, tmp_path):
  queue = states('PENDING', 'PENDING', 'RUNNING', '')
  (tmp_path / 'logs').mkdir()
  (tmp_path / 'logs/first-run.log').write_text('step 3\n')
  fakes.play({'squeue': queue})
  status, printed, (said,) = script('slurm/watch', 'first-run')
  assert status == AGAIN and said.startswith('first-run left the queue without an exit status')
  assert printed == ['state: PENDING', 'state: running', 'step 3']
  (tmp_path / 'logs/first-run.status').write_text('1\n')
  fakes.play({'squeue': queue})
  assert script('slurm/watch', 'first-run')[0] == 1
