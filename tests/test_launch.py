"""A sweep as a person uses it: all runs end in one table, whatever is skipped, killed, preempted or refused on the way.

One sweep is real, each job a process that trains; elsewhere the trainer, gcloud, xpk and Slurm are played (fakes.py).
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import bucket
import pytest
import tiny
from absl.testing import flagsaver
from fakes import Fakes, heed_signals

from mmx import config, launch, train

EXPERIMENT = '''"""Coarse or fine experts, in the smallest size that trains?"""

import os
import pathlib
import signal
import sys

from mmx import config

SEEDS = {'cpu': (0, 1)}


def get_config(scale):
  return config.override(config.Experiment(), {@FIELDS@
      'model.pattern': 'full', 'eval.every': 6, 'mesh.num_devices': 1,
  })


def arms(base):
  cut = {'model.moe.num_experts': 16, 'model.moe.top_k': 4, 'model.moe.d_ff': 12}
  return {'coarse': base, 'fine': config.override(base, cut)}


if os.environ.get('KILL_ONCE') and {'mmx.train', '--arm=fine', '--seeds=1'} <= set(sys.orig_argv):
  from mmx.data import pipeline

  make, mark = pipeline.train_iterator, pathlib.Path(os.environ['KILL_ONCE'])

  class Killed:
    def __init__(self, *args):
      self.iterator, self.step = make(*args), 0

    def __next__(self):
      self.step += 1
      if self.step == 7 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
      return next(self.iterator)

    def __getattr__(self, name):
      return getattr(self.iterator, name)

  pipeline.train_iterator = Killed
'''.replace('@FIELDS@', tiny.FIELDS)
STARTING = '''

def arms(base):
  return {'trunk': base, 'branch': config.override(base, {'train.init_from': 'trunk'})}
'''
RUNS = [('coarse', 0), ('fine', 0), ('coarse', 1), ('fine', 1)]  # in the order of a sweep
PYTHON = sys.executable
OF_THE_MACHINE = ('tokens_per_second', 'mfu', 'wall_seconds', 'date', 'started_at_step', 'git', 'versions', 'goodput')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """The folder that the commands run in, with experiment files and text."""
  folder = tmp_path_factory.mktemp('launch')
  (folder / 'question.py').write_text(EXPERIMENT)
  (folder / 'starting.py').write_text(EXPERIMENT + STARTING)
  tiny.write_texts(folder)
  return folder


def command(module, place, *arguments, **environment):
  """`python -m module` as a process; each training process has one device."""
  environment = os.environ | {
      'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_COMPILATION_CACHE_DIR': str(place / 'compiled'), **environment,
  }  # fmt: skip
  return subprocess.run(
      [PYTHON, '-m', module, '--config=question.py', *arguments],
      cwd=place, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip


def result(folder):
  return json.loads((folder / 'result.json').read_text())


def finished(run, experiment, loss=2.0):
  """What a run leaves: {path below the workdir: text}."""
  arm, seed = run
  ended = {'arm': arm, 'seed': seed, 'heldout_loss': loss, 'tokens': 3072, 'steps': 12}
  seeded = config.override(experiment, {'train.seed': seed, 'data.seed': seed})
  return {f'{arm}/seed{seed}/config.gin': config.dump(seeded), f'{arm}/seed{seed}/result.json': json.dumps(ended)}


def metrics_rows(run, step):
  arm, seed = run
  return {f'{arm}/seed{seed}/metrics.jsonl': ''.join(f'{{"step": {at}, "loss": 1.0}}\n' for at in range(1, step + 1))}


def below(folder, files):
  return {f'{folder}/{path}': text for path, text in files.items()}


@pytest.fixture
def sweep(place, tmp_path, monkeypatch, capsys):
  """sweep(*arguments) -> (exit status or error line, stdout, stderr), in this process; the trainer is a fake."""
  fakes = Fakes(tmp_path / 'fakes', ['trainer', 'gcloud', 'xpk', 'sbatch', 'squeue', 'tar', 'git'])
  for name, value in fakes.environment.items():
    monkeypatch.setenv(name, value)
  for name, value in {'ZONE': 'us-central1-a', 'ACCELERATOR_TYPE': 'v5litepod-8', 'CLUSTER': 'mmx'}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('LOGS', str(tmp_path / 'slurm'))
  monkeypatch.setattr(launch, 'LOOK_SECONDS', 0.02)
  monkeypatch.setattr(sys, 'executable', str(fakes.bin / 'trainer'))

  def run(*arguments, file='question.py'):
    with contextlib.chdir(place), flagsaver.flagsaver():
      try:
        launch.main(train.parse_flags(['sweep', f'--config={file}', *arguments]))
      except SystemExit as stopped:
        told = capsys.readouterr()
        return stopped.code, told.out, told.err
    raise AssertionError('a command ends with a status')

  run.fakes, run.workdir = fakes, tmp_path / 'runs'
  run.arms = config.load_experiment(place / 'question.py').arms
  return run


def states(printed):
  """{run: state} of the table."""
  return dict(re.findall(r'^(\w+/seed\d+) +(\w+)', printed, re.MULTILINE))


# --- a real one -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def both(place):
  """(mmx.train of all runs in place / 'whole', a sweep of the same in place / 'swept' with a job killed on the way)."""
  whole = command('mmx.train', place, '--workdir=whole')
  jobs = f'--jobs={min(2, os.cpu_count())}'
  return whole, command('mmx.sweep', place, '--workdir=swept', jobs, KILL_ONCE=str(place / 'killed'))


@pytest.mark.slow
def test_a_sweep_with_a_killed_job_ends_in_the_table_of_one_command(place, both):
  whole, swept = both
  assert whole.returncode == 0, whole.stderr
  assert swept.returncode == 0, swept.stderr + (place / 'swept/logs/fine.seed1.log').read_text()
  for arm, seed in RUNS:
    mine, other = (result(place / folder / arm / f'seed{seed}') for folder in ('swept', 'whole'))
    assert {k: v for k, v in mine.items() if k not in OF_THE_MACHINE} == {
        k: v for k, v in other.items() if k not in OF_THE_MACHINE
    }
  summaries = [json.loads((place / folder / 'summary.json').read_text()) for folder in ('swept', 'whole')]
  for summary in summaries:
    for arm in summary['arms']:
      arm['means'] = {name: value for name, value in arm['means'].items() if name not in OF_THE_MACHINE}
  assert summaries[0] == summaries[1] and [arm['seeds'] for arm in summaries[0]['arms']] == [[0, 1], [0, 1]]
  assert '2 paired seeds' in swept.stdout and swept.stdout.splitlines()[-1] in whole.stdout.replace('whole', 'swept')
  assert states(swept.stdout) == {f'{arm}/seed{seed}': 'finished' for arm, seed in RUNS}
  assert list((place / 'swept/summary').glob('events.*'))


@pytest.mark.slow
def test_a_killed_job_is_started_again_from_its_checkpoint(place, both):
  swept = both[1].stderr
  assert (place / 'killed').exists() and swept.count('fine/seed1  running') == 2
  assert 'fine/seed1  preempted: ended by SIGKILL at step 6' in swept
  assert result(place / 'swept/fine/seed1')['started_at_step'] == 4


@pytest.mark.slow
def test_the_same_command_starts_nothing_that_has_finished(place, both):
  before = {path: path.stat().st_mtime_ns for path in (place / 'swept').glob('*/seed*/*')}
  again = command('mmx.sweep', place, '--workdir=swept')
  assert again.returncode == 0 and 'running' not in again.stderr and '2 paired seeds' in again.stdout
  assert {path: path.stat().st_mtime_ns for path in (place / 'swept').glob('*/seed*/*')} == before


# --- which job is started when ----------------------------------------------------------------------------------------


def test_a_job_that_ends_with_an_error_is_not_started_again_and_the_others_go_on(sweep):
  fine = below(sweep.workdir, finished(('fine', 0), sweep.arms['fine']))
  sweep.fakes.play({
      '--arm=coarse': [{'status': 1, 'err': 'step 1\nerror: data.source: no such folder\n'}],
      '--arm=fine': [{'write': fine}],
  })
  status, printed, _ = sweep(f'--workdir={sweep.workdir}', '--seeds=0')
  assert status == 1 and states(printed) == {'coarse/seed0': 'failed', 'fine/seed0': 'finished'}
  assert 'data.source: no such folder (' in printed and '| fine' in (sweep.workdir / 'summary.md').read_text()
  assert [words[4] for words in sweep.fakes.calls()] == ['--arm=coarse', '--arm=fine']


@pytest.mark.parametrize('answer', [{'signal': 9}, {'status': 75}, {'status': 137}, {'status': 0}], ids=str)
def test_what_was_taken_away_is_started_again_a_bounded_number_of_times(sweep, answer):
  sweep.fakes.play({'trainer': [answer]})
  flags = f'--workdir={sweep.workdir}', '--seeds=0', '--arm=fine'
  status, printed, _ = sweep(*flags, '--retries=2')
  assert status == 1 and len(sweep.fakes.calls()) == 3
  assert states(printed) == {'fine/seed0': 'failed'} and 'started 3 times without a step further' in printed
  done = {'write': below(sweep.workdir, finished(('fine', 0), sweep.arms['fine']))}
  sweep.fakes.play({'trainer': [answer, answer, done]})
  assert sweep(*flags, '--retries=2')[0] == 0 and len(sweep.fakes.calls()) == 3


def test_a_job_that_gets_further_each_time_is_never_given_up(sweep):
  steps = (1, 1, 2, 2, 3, 3)  # every other time in vain
  preempted = [{'signal': 9, 'write': below(sweep.workdir, metrics_rows(('fine', 0), step))} for step in steps]
  done = {'write': below(sweep.workdir, finished(('fine', 0), sweep.arms['fine']))}
  sweep.fakes.play({'trainer': [*preempted, done]})
  assert sweep(f'--workdir={sweep.workdir}', '--seeds=0', '--arm=fine', '--retries=1')[0] == 0
  assert len(sweep.fakes.calls()) == 7


def test_jobs_at_a_time_are_no_more_than_asked_for_each_with_cores_of_its_own(sweep, monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {3, 5, 6, 8, 9})
  _, printed, _ = sweep(f'--workdir={sweep.workdir}', '--jobs=2', '--dry_run')
  cores = re.findall(r'^taskset --cpu-list (\S+) ', printed, re.MULTILINE)
  assert cores == ['3,5', '6,8', '3,5', '6,8']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,4,7')
  _, printed, _ = sweep(f'--workdir={sweep.workdir}', '--jobs=2', '--dry_run')
  assert re.findall(r'^env CUDA_VISIBLE_DEVICES=(\S+) ', printed, re.MULTILINE) == ['0,1', '4,7'] * 2
  assert sweep('--jobs=5')[0] == 'error: --jobs=5: this machine has 4 GPUs'
  assert 'taskset' not in sweep(f'--workdir={sweep.workdir}', '--dry_run')[1]


def test_a_run_that_starts_from_another_waits_for_it(sweep, place):
  arms = config.load_experiment(place / 'starting.py').arms
  sweep.fakes.play({
      '--arm=trunk': [{'signal': 9}, {'write': below(sweep.workdir, finished(('trunk', 0), arms['trunk']))}],
      '--arm=branch': [{'write': below(sweep.workdir, finished(('branch', 0), arms['branch']))}],
  })
  flags = f'--workdir={sweep.workdir}', '--seeds=0'
  status, _, told = sweep(*flags, file='starting.py')
  assert status == 0 and 'branch/seed0  waiting: for trunk/seed0' in told
  assert [words[4] for words in sweep.fakes.calls()] == ['--arm=trunk', '--arm=trunk', '--arm=branch']
  (sweep.workdir / 'trunk/seed0/result.json').unlink()
  (sweep.workdir / 'branch/seed0/result.json').unlink()
  sweep.fakes.play({'trainer': [{'status': 1}]})
  status, printed, _ = sweep(*flags, file='starting.py')
  assert status == 1 and states(printed) == {'trunk/seed0': 'failed', 'branch/seed0': 'failed'}
  assert len(sweep.fakes.calls()) == 1


def test_the_command_ends_with_its_jobs(sweep, place):
  sweep.fakes.play({'trainer': [{'sleep': True}]})
  script = f'import sys\nfrom mmx import launch\nsys.executable = {sys.executable!r}\nlaunch.command()'
  command = [PYTHON, '-c', script, '--config=question.py', f'--workdir={sweep.workdir}', '--seeds=0', '--jobs=2']
  environment = os.environ | {'CUDA_VISIBLE_DEVICES': '0,1', 'PYTHONPATH': os.pathsep.join(sys.path)}
  running = subprocess.Popen(
      command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals
  )
  deadline = time.monotonic() + 60
  while len(sweep.fakes.calls()) < 2 and time.monotonic() < deadline and running.poll() is None:
    time.sleep(0.05)
  running.send_signal(signal.SIGINT)
  told = running.communicate(timeout=60)[1]
  states_left = json.loads((sweep.workdir / 'sweep.json').read_text())
  assert {state['state'] for state in states_left.values()} == {'waiting'}
  assert running.returncode == 1 and told.splitlines()[-1] == 'error: stopped; the same command continues'
  workdir = f'--workdir={sweep.workdir}'.encode()
  deadline = time.monotonic() + 30
  while any(workdir in arguments for arguments in of_processes()) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(workdir in arguments for arguments in of_processes())


def of_processes():
  """Command lines of this machine."""
  for entry in os.listdir('/proc'):
    if entry.isdigit():
      with contextlib.suppress(OSError), open(f'/proc/{entry}/cmdline', 'rb') as file:
        yield file.read()


# --- elsewhere --------------------------------------------------------------------------------------------------------


def requests(fakes, *verbs):
  """(verb, name) of what gcloud was asked to do."""
  calls = [words for words in fakes.calls('gcloud') if 'describe' not in words]
  return [(words[4], words[5].rstrip(':')) for words in calls if words[4] in verbs]


@pytest.fixture
def cloud(sweep, tmp_path):
  """The same sweep with a workdir in a bucket; `there` is where that lies."""
  with bucket.mounted(tmp_path):
    sweep.there = tmp_path / 'ours/moe'
    yield sweep


ABSENT = {'status': 1, 'err': 'NOT_FOUND'}
READY = {'tpu-vm describe': [{'out': 'READY'}]}
TPU = '--launcher=tpu', '--workdir=gs://ours/moe'


def test_a_preempted_slice_is_asked_for_anew_and_its_run_is_collected(cloud):
  done = {'write': below(cloud.there, finished(('fine', 0), cloud.arms['fine'], loss=1.25))}
  states_of_request = [
      ABSENT, {'out': 'WAITING_FOR_RESOURCES'}, {'out': 'ACTIVE'}, {'out': 'SUSPENDED'},  # create, watch, after ssh
      {'out': 'SUSPENDED'}, {'out': 'ACTIVE'}, {'out': 'ACTIVE'},  # create, watch, delete
  ]  # fmt: skip
  cloud.fakes.play({
      'queued-resources describe': states_of_request, 'tpu-vm ssh': [{'status': 255}, done], **READY,
  })
  status, printed, told = cloud(*TPU, '--seeds=0', '--arm=fine')
  assert status == 0, told
  name = re.fullmatch(r'fine-s0-[0-9a-f]{6}', requests(cloud.fakes, 'create')[0][1])[0]
  assert requests(cloud.fakes, 'create', 'delete', 'ssh') == [
      ('create', name), ('ssh', name), ('delete', name), ('create', name), ('ssh', name), ('delete', name)
  ]
  assert states(printed) == {'fine/seed0': 'finished'} and '1.2500' in printed
  assert 'preempted: ended by status 75' in told and 'waiting: WAITING_FOR_RESOURCES' in told
  assert 'fine' in (cloud.there / 'summary.md').read_text() and (cloud.there / 'sweep.json').exists()
  ssh = next(words for words in cloud.fakes.calls('gcloud') if 'ssh' in words)
  assert f'worker.sh {name} python -m mmx.train --config=question.py --arm=fine --seeds=0' in ssh[-1]


def test_a_config_error_on_a_slice_is_not_tried_again_and_the_slice_is_given_back(cloud, place):
  cloud.fakes.play({
      'queued-resources describe': [ABSENT, {'out': 'ACTIVE'}], **READY,
      'tpu-vm ssh': [{'status': 1, 'err': 'mesh.expert: 3 does not divide 8 devices\n'}],
  })
  log = place / 'runs/question_cpu/logs/fine.seed0.log'
  log.parent.mkdir(parents=True, exist_ok=True)
  log.write_text('state: running\nerror: of another day\n')
  status, printed, told = cloud(*TPU, '--seeds=0', '--arm=fine')
  assert status == 1 and states(printed) == {'fine/seed0': 'failed'} and 'another day' not in printed + told
  assert 'mesh.expert: 3 does not divide 8 devices' in printed
  assert [verb for verb, _ in requests(cloud.fakes, 'create', 'delete', 'ssh')] == ['create', 'ssh', 'delete']


def test_each_run_has_a_slice_of_its_own_and_all_at_once(cloud):
  written = {}
  for arm, seed in RUNS:
    written |= below(cloud.there, finished((arm, seed), cloud.arms[arm]))
  cloud.fakes.play({'queued-resources describe': [{'out': 'ACTIVE'}], **READY, 'tpu-vm ssh': [{'write': written}]})
  assert cloud(*TPU)[0] == 0
  assert len({name for _, name in requests(cloud.fakes, 'delete')}) == 4
  cloud.fakes.play({'queued-resources describe': [{'out': 'ACTIVE'}, ABSENT], **READY})
  assert cloud(*TPU)[0] == 0  # as after a sweep that was stopped when its last run had just finished
  assert [verb for verb, _ in requests(cloud.fakes, 'create', 'ssh', 'delete')] == ['delete']


def test_a_slice_that_could_not_be_deleted_is_told(cloud):
  done = {'write': below(cloud.there, finished(('fine', 0), cloud.arms['fine']))}
  cloud.fakes.play({
      'queued-resources describe': [{'out': 'ACTIVE'}], **READY, 'tpu-vm ssh': [done],
      'queued-resources delete': [{'status': 1, 'err': 'ERROR: PERMISSION_DENIED\n'}],
  })
  _, printed, told = cloud(*TPU, '--seeds=0', '--arm=fine')
  assert 'could not be given back' in printed and 'could not be given back' in told


def test_xpk_sends_waits_and_collects(cloud):
  done = {'write': below(cloud.there, finished(('fine', 0), cloud.arms['fine']))}
  name = launch.job_name(run_of('fine', 0), 'gs://ours/moe')
  cloud.fakes.play({
      'FINISHED': [{}], 'QUEUED': [{}], 'EVERYTHING': [{}, {'out': f'{name}  medium'}],
      '--wait-for-job-completion': [done],
  })
  status, printed, told = cloud('--launcher=xpk', '--workdir=gs://ours/moe', '--seeds=0', '--arm=fine')
  assert status == 0, told
  created = next(words for words in cloud.fakes.calls('xpk') if 'create' in words)
  assert f'--workload={name}' in created and '--arm=fine --seeds=0 --workdir=gs://ours/moe' in created[-1]


def test_slurm_sends_waits_and_tells_an_error_from_a_preemption(sweep):
  name = launch.job_name(run_of('fine', 0), sweep.workdir)
  logs = os.environ['LOGS']
  done = below(sweep.workdir, finished(('fine', 0), sweep.arms['fine'])) | {f'{logs}/{name}.status': '0\n'}
  flags = '--launcher=slurm', f'--workdir={sweep.workdir}', '--seeds=0', '--arm=fine'
  queue = [{}, {'out': 'RUNNING'}, {}, {}, {'out': 'PENDING'}, {}]  # for run.sh and watch.sh, twice
  sweep.fakes.play({'squeue': queue, 'sbatch': [{}, {'write': done}]})
  status, _, told = sweep(*flags)
  assert status == 0 and 'preempted: ended by status 75' in told and len(sweep.fakes.calls('sbatch')) == 2
  assert sweep.fakes.calls('sbatch')[0][-7:] == [
      sys.executable, '-m', 'mmx.train', '--config=question.py', '--arm=fine', '--seeds=0', f'--workdir={sweep.workdir}'
  ]
  (sweep.workdir / 'fine/seed0/result.json').unlink()
  failed = {f'{logs}/{name}.status': '1\n', f'{logs}/{name}.log': 'error: no\n'}
  sweep.fakes.play({'squeue': [{}], 'sbatch': [{'write': failed}]})
  status, printed, _ = sweep(*flags)
  assert status == 1 and states(printed) == {'fine/seed0': 'failed'} and ' no (' in printed
  assert len(sweep.fakes.calls('sbatch')) == 1


# --- what a person reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('launcher, firsts', [
    ('local', ['trainer']), ('tpu', ['gcloud', 'gcloud', 'git', 'gcloud', 'gcloud', 'gcloud']), ('xpk', ['xpk', 'xpk']),
    ('slurm', ['sbatch', 'squeue']),
])  # fmt: skip
def test_a_dry_run_prints_each_command_in_a_line_and_changes_nothing(cloud, place, launcher, firsts):
  before = sorted(place.rglob('*'))
  spaced = '--set=model.pattern=(full *1)'
  status, printed, _ = cloud(f'--launcher={launcher}', '--workdir=gs://ours/moe', '--dry_run', '--seeds=7', spaced)
  assert status == 0 and not cloud.fakes.calls() and not cloud.there.exists() and sorted(place.rglob('*')) == before
  lines = printed.splitlines()
  assert [line for line in lines if line.startswith('#')] == ['# coarse/seed7', '# fine/seed7']
  assert [os.path.basename(line.split()[0]) for line in lines if not line.startswith('#')] == firsts * 2
  told = [words for line in lines for words in subprocess_words(line) if 'mmx.train' in words]
  assert len(told) == 2 and all('--set=model.pattern=(full *1)' in words for words in told)


def subprocess_words(line):
  """The words of a command line, and those of a command line within one of them."""
  words = shlex.split(line, comments=True)
  return [words, *(shlex.split(word.partition('=')[2]) for word in words if word.startswith('--command='))]


def test_watch_shows_every_run_and_changes_nothing(sweep):
  files = finished(('coarse', 0), sweep.arms['coarse'], loss=1.5) | metrics_rows(('fine', 0), 7)
  for path, text in below(sweep.workdir, files).items():
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
      file.write(text)
  (sweep.workdir / 'sweep.json').write_text(json.dumps({
      'fine/seed0': {'state': 'running', 'note': 'start 2'},
      'fine/seed1': {'state': 'failed', 'note': 'no such folder'},
  }))
  before = {path: path.stat().st_mtime_ns for path in sweep.workdir.rglob('*')}
  status, printed, _ = sweep(f'--workdir={sweep.workdir}', '--watch')
  assert status == 0 and states(printed) == {
      'coarse/seed0': 'finished', 'fine/seed0': 'running', 'coarse/seed1': 'waiting', 'fine/seed1': 'failed'
  }
  assert '7/12' in printed and 'held-out loss 1.5000' in printed and 'no such folder' in printed
  assert {path: path.stat().st_mtime_ns for path in sweep.workdir.rglob('*')} == before and not sweep.fakes.calls()


@pytest.mark.parametrize('flags, line', [
    (['--arm=course'], "question has no arm 'course'; its arms are coarse, fine"),
    (['--seeds=a'], '--seeds: expected whole numbers, found a'),
    (['--launcher=tpu'], '--workdir=runs/question_cpu: with --launcher=tpu it must be one that every machine can'),
    (['--launcher=xpk', '--workdir=/shared'], '--workdir=/shared: with --launcher=xpk it must be one'),
    (['--launcher=mpi'], 'flag --launcher=mpi: value should be one of <local|tpu|xpk|slurm>'),
    (['--jobs=0'], 'flag --jobs=0: 0 is not a positive integer'),
    (['--set=model.moe.top_k=3'], 'coarse'),
    (['extra'], "unexpected argument 'extra'; every option starts with --"),
])  # fmt: skip
def test_bad_input_is_one_line_and_starts_nothing(sweep, flags, line):
  stopped = sweep(*flags)[0]
  assert isinstance(stopped, str) and stopped.startswith('error: ') and '\n' not in stopped and line in stopped
  assert not sweep.fakes.calls()


def test_help_is_about_the_command_and_lists_its_flags(place):
  told = command('mmx.sweep', place, '--help').stdout
  assert told.strip().startswith('Runs the arms and seeds of an experiment as jobs')
  assert all(flag in told for flag in ('--launcher', '--[no]dry_run', '--jobs', '--config', '--arm'))


def test_another_configs_workdir_is_refused(sweep):
  for path, text in below(sweep.workdir, finished(('fine', 0), sweep.arms['fine'])).items():
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
      file.write(text)
  stopped = sweep(f'--workdir={sweep.workdir}', '--set=train.steps=13')[0]
  assert 'train.steps = 12, this one 13' in stopped and '\n' not in stopped and not sweep.fakes.calls()


@pytest.mark.parametrize('launcher, program', [('tpu', 'gcloud'), ('xpk', 'xpk'), ('slurm', 'sbatch')])
def test_a_missing_program_or_variable_stops_the_sweep_before_its_first_job(cloud, monkeypatch, launcher, program):
  flags = f'--launcher={launcher}', '--workdir=gs://ours/moe'
  if launcher != 'slurm':
    with monkeypatch.context() as bare:
      bare.delenv('ZONE')
      assert cloud(*flags)[0].startswith('error: ZONE is not set')
  (cloud.fakes.bin / program).unlink()
  assert cloud(*flags)[0] == f'error: {program} is not on PATH; docs/cloud.md says where it comes from'
  assert not cloud.fakes.calls() and not cloud.there.exists()


def test_a_bucket_without_its_package_is_one_line(sweep):
  with pytest.MonkeyPatch.context() as patch:
    fail = lambda _: (_ for _ in ()).throw(ImportError('Please install gcsfs'))
    patch.setattr(type(launch.epath.Path('gs://a')), 'exists', fail)
    stopped = sweep('--workdir=gs://ours/moe')[0]
  assert stopped == "error: --workdir=gs://ours/moe: Please install gcsfs; pip install -e '.[gcs]' brings it"


def run_of(arm, seed):
  return launch.Run(arm, seed, config.Experiment(), None, 1, 1, [])


def test_names_suit_every_scheduler_and_no_two_runs_share_one():
  arms = ['e128_top8', 'e128-top8', 'num_experts=128+top_k=8+learning_rate=0.001', '8x', 'É', 'fine', 'FINE']
  runs = [run_of(arm, seed) for arm in arms for seed in (0, 1, 12345)]
  names = [launch.job_name(run, workdir) for run in runs for workdir in ('gs://a', 'gs://b')]
  assert len(set(names)) == len(names) == 42
  assert all(re.fullmatch(r'[a-z]([-a-z0-9]{0,26}[a-z0-9])?', name) for name in names), names
  assert launch.job_name(run_of('a', 0), 'runs') == launch.job_name(run_of('a', 0), os.path.abspath('runs'))
