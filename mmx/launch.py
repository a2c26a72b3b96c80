"""Runs the arms and seeds of an experiment as jobs of their own and sees them through: `python -m mmx.sweep`.

  python -m mmx.sweep --config=experiments/moe_ablation.py --jobs=2
  python -m mmx.sweep --config=experiments/moe_ablation.py --launcher=tpu --workdir=gs://my-bucket/moe --dry_run

A job is mmx.train with one arm and one seed: here, on a Cloud TPU slice of its own, in GKE by XPK, or under Slurm. The
scripts of scripts/<launcher> do what is to be done elsewhere; the environment says where (docs/cloud.md).

What has a result is skipped. A job that was preempted, killed or cut off is started again, `--retries` times in a row
without a step further; one that ended with an error is not, as it would end so again. The comparison is written anew
whenever one finishes. Ctrl-C stops jobs here, which save, and leaves jobs elsewhere alone. The same command continues,
and finds again what still runs. --watch shows how each job stands, also from another terminal.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags, logging
from etils import epath

from mmx import config, flops, train
from mmx.command import errors_in_one_line, stop
from mmx.run import Run, is_remote

LAUNCHER = flags.DEFINE_enum('launcher', 'local', ['local', 'tpu', 'xpk', 'slurm'], 'Where the jobs run.')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the commands, one a line, and run none.')
JOBS = flags.DEFINE_integer('jobs', None, 'Jobs at a time; 1 here and all elsewhere if left out.', lower_bound=1)
RETRIES = flags.DEFINE_integer('retries', 3, 'New starts in a row of a job that gets no further.', lower_bound=0)
WATCH = flags.DEFINE_bool('watch', False, 'Show how each job stands, and exit.')

SCRIPTS = pathlib.Path(__file__).parents[1] / 'scripts'
PROGRAM = {'tpu': 'gcloud', 'xpk': 'xpk', 'slurm': 'sbatch'}
AGAIN = 75  # of the scripts and of mmx/watch.py: nothing is wrong with the job itself
LOOK_SECONDS = 0.5  # from one look at the jobs to the next
NAME_LENGTH = 28  # characters that XPK leaves to the name of a workload
STATES = 'sweep.json'  # in the workdir: how each job stood when one last changed


def main(argv):
  if len(argv) > 1:
    stop(f'unexpected argument {argv[1]!r}; every option starts with --')
  if train.CONFIG.value is None:
    stop('--config is missing; name an experiment, such as --config=experiments/moe_ablation.py')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  with errors_in_one_line():
    sys.exit(run_sweep())


def run_sweep() -> int:
  """What the flags ask for; the exit status, 0 if every job has finished."""
  asked = train.asked_for()
  if train.PRINT_CONFIG.value:
    train.print_configs(asked.arms)
    return 0
  check_reach(asked)
  jobs = make_jobs(asked)
  if WATCH.value:
    recall(asked, jobs)
    print(table(jobs))
    return 0
  check_place(jobs)
  if DRY_RUN.value:
    print_commands(jobs)
    return 0
  with ended_with_us(asked, jobs):
    see_through(asked, jobs)
  print(f'\n{table(jobs)}')
  if any(job.state == 'finished' for job in jobs):
    print(train.write_summary(asked))
  return 0 if all(job.state == 'finished' for job in jobs) else 1


# ----------------------------------------------------------------------------------------------------------------------
# what is to be done


@dataclasses.dataclass
class Job:
  """One arm at one seed."""

  run: Run
  start: list[list[str]]  # commands, each after the other has ended well
  after: list[list[str]]  # that give back what `start` took, once the job is over
  log: pathlib.Path
  state: str = 'waiting'  # waiting, running, preempted, finished or failed
  note: str = ''
  starts: int = 0
  tries: int = 0  # starts since it last got a step further
  step: int = 0  # that it had got to at the last start
  log_begins: int = 0  # bytes that were in the log before the last start
  process: subprocess.Popen | None = None
  giving_back: subprocess.Popen | None = None

  @property
  def title(self) -> str:
    return f'{self.run.arm}/seed{self.run.seed}'

  def said(self) -> list[str]:
    """Lines of the log since the last start."""
    return self.log.read_bytes()[self.log_begins :].decode(errors='replace').splitlines()


def check_reach(asked: train.Asked) -> None:
  """Raises ConfigError for a workdir or a config that the machines of the jobs would not have."""
  if LAUNCHER.value in ('local', 'slurm'):
    return
  if not is_remote(asked.workdir):
    raise config.ConfigError(f'--workdir={asked.workdir}: with --launcher={LAUNCHER.value} it must be one that every '
                             'machine can write and this one read, such as gs://my-bucket/moe')
  if os.path.isabs(train.CONFIG.value):
    raise config.ConfigError(f'--config={train.CONFIG.value}: with --launcher={LAUNCHER.value} it must be a path '
                             'relative to the working tree, which is what is sent')


def logs_of(asked: train.Asked) -> pathlib.Path:
  """A folder of this machine: what runs elsewhere is followed from here."""
  local = f'runs/{asked.file.name}_{train.SCALE.value}' if is_remote(asked.workdir) else os.fspath(asked.workdir)
  return pathlib.Path(local) / 'logs'


def make_jobs(asked: train.Asked) -> list[Job]:
  """A job for each run. Refuses arms that cannot be compared, another config's workdir, and a start from nothing."""
  flops.assert_comparable({name: arm.model for name, arm in asked.arms.items()}, asked.file.tolerance)
  runs, jobs = asked.runs(), []
  for run in runs:
    run.check_origin(asked.file.arms, ahead=runs)
    job = Job(run, *commands(run, asked.workdir), log=logs_of(asked) / f'{run.arm}.seed{run.seed}.log')
    if run.finished(train.RESUME.value):
      job.state, job.note = 'finished', outcome(run)
    jobs.append(job)
  return jobs


def commands(run: Run, workdir: epath.Path) -> tuple[list[list[str]], list[list[str]]]:
  """(start, after) of a job."""
  given = [
      line for flag in flags.FLAGS.flags_by_module_dict()['mmx.train'] if flag.present
      and flag.name not in ('arm', 'seeds', 'workdir', 'resume') for line in flag.serialize().split('\n')
  ]
  python = 'python' if LAUNCHER.value in ('tpu', 'xpk') else sys.executable
  trained = [python, '-m', 'mmx.train', *given, f'--arm={run.arm}', f'--seeds={run.seed}', f'--workdir={workdir}']
  name = job_name(run, workdir)
  script = lambda what, *more: [os.path.relpath(SCRIPTS / LAUNCHER.value / f'{what}.sh'), name, *more]
  return {
      'local': ([trained], []),
      'tpu': ([script('create'), script('watch'), script('run', *trained)], [script('delete')]),
      'xpk': ([script('run', *trained), script('watch')], []),
      'slurm': ([script('run', *trained), script('watch')], []),
  }[LAUNCHER.value]


def job_name(run: Run, workdir: os.PathLike) -> str:
  """'e128-top8-s0-1f3a9c': a name for Cloud TPU, Kubernetes and Slurm, the same whenever the same run is asked for."""
  folder = os.fspath(workdir)
  folder = folder if '://' in folder else os.path.abspath(folder)
  digest = hashlib.sha256(f'{folder}/{run.arm}/{run.seed}'.encode()).hexdigest()[:6]
  tail = f'-s{run.seed}-{digest}'
  words = re.sub(r'[^a-z0-9]+', '-', run.arm.lower()).strip('-')
  words = words if words[:1].isalpha() else f'arm-{words}'
  return words[: NAME_LENGTH - len(tail)].rstrip('-') + tail


def check_place(jobs: list[Job]) -> None:
  """One line at once for what would stop every job: no program to send it with, a variable that is not set."""
  if LAUNCHER.value == 'local':
    return
  if not (SCRIPTS / LAUNCHER.value).is_dir():
    raise config.ConfigError(f'{SCRIPTS}: no such folder; --launcher={LAUNCHER.value} works from a checkout of mmx')
  program = PROGRAM[LAUNCHER.value]
  if not DRY_RUN.value and not shutil.which(program):
    raise config.ConfigError(f'{program} is not on PATH; docs/cloud.md says where it comes from')
  for command in jobs[0].start:
    shown(command)


def print_commands(jobs: list[Job]) -> None:
  prefixes = shares(JOBS.value or 1)
  for index, job in enumerate(job for job in jobs if job.state != 'finished'):
    print(f'# {job.title}')
    for command in [*job.start, *job.after]:
      print(shlex.join([*prefixes[index % len(prefixes)], *command]) if LAUNCHER.value == 'local' else shown(command))


def shown(command: list[str]) -> str:
  """What a script would run."""
  told = subprocess.run(command, env=os.environ | {'DRY_RUN': '1'}, capture_output=True, text=True)
  if told.returncode:
    raise config.ConfigError(told.stderr.strip().removeprefix('error: '))
  return told.stdout.strip()


def shares(count: int) -> list[list[str]]:
  """What to put before the command of each of `count` jobs at a time, so that each has its own GPUs or cores here."""
  if count == 1 or LAUNCHER.value != 'local':
    return [[]] * count
  if glob.glob('/dev/accel[0-9]*'):
    raise config.ConfigError(f'--jobs={count}: the chips of a TPU host serve one process; leave --jobs out')
  gpus = visible_gpus()
  if not gpus and not hasattr(os, 'sched_getaffinity'):
    return [[]] * count  # a system that does not bind processes to cores
  things, what = (gpus, 'GPUs') if gpus else ([str(core) for core in sorted(os.sched_getaffinity(0))], 'cores')
  size = len(things) // count
  if not size:
    raise config.ConfigError(f'--jobs={count}: this machine has {len(things)} {what}')
  parts = [','.join(things[index * size : (index + 1) * size]) for index in range(count)]
  return [['env', f'CUDA_VISIBLE_DEVICES={part}'] if gpus else ['taskset', '--cpu-list', part] for part in parts]


def visible_gpus() -> list[str]:
  """As CUDA numbers them; none where there is no driver."""
  if 'CUDA_VISIBLE_DEVICES' in os.environ:
    return [gpu for gpu in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if gpu.strip()]
  if not shutil.which('nvidia-smi'):
    return []
  listed = subprocess.run(['nvidia-smi', '--list-gpus'], capture_output=True, text=True).stdout
  return [str(index) for index, _ in enumerate(line for line in listed.splitlines() if line.startswith('GPU '))]


# ----------------------------------------------------------------------------------------------------------------------
# doing it


def see_through(asked: train.Asked, jobs: list[Job]) -> None:
  """Starts jobs as there is room and looks at them until each has finished or failed."""
  width = JOBS.value or (1 if LAUNCHER.value == 'local' else len(jobs))
  free = shares(width)
  prefix_of = {}
  told = {job.title: ('waiting', '') for job in jobs}
  for job in jobs:
    if job.state == 'finished':
      give_back(job)  # what a sweep that was stopped may have left

  def tell():
    """A line for each job whose state or note has changed, for whoever looks on and for --watch."""
    changed = [job for job in jobs if told.get(job.title) != (job.state, job.note)]
    for job in changed:
      told[job.title] = job.state, job.note
      done = sum(other.state == 'finished' for other in jobs)
      print(f'{time.strftime("%H:%M:%S")}  {job.title}  {job.state}' + (f': {job.note}' if job.note else '')
            + f'  [{done}/{len(jobs)}]', file=sys.stderr, flush=True)
    if changed:
      remember(asked, jobs)

  while True:
    for job in jobs:
      if job.process is None:
        continue
      look_at(job)
      if job.process is None:
        free.append(prefix_of.pop(job.title))
        if job.state == 'finished':
          train.write_summary(asked)
    tell()
    for job in jobs:
      if job.process is None and job.state in ('waiting', 'preempted') and ready(job, jobs) and free:
        prefix_of[job.title] = free.pop(0)
        start(job, prefix_of[job.title])
    tell()
    if len(free) == width:  # nothing runs and nothing could be started
      break
    time.sleep(LOOK_SECONDS)
  for job in jobs:
    if job.giving_back is not None and job.giving_back.wait():
      job.note += f'; what it ran on could not be given back, see {job.log}'
  tell()


def ready(job: Job, jobs: list[Job]) -> bool:
  """Whether the run that this one starts from, if it is one of these, has finished; without it this one fails."""
  origin = job.run.origin({other.run.arm for other in jobs})
  before = next((other for other in jobs if other.run.folder == origin), None)
  if before is None or before.state == 'finished':
    return True
  job.note = f'for {before.title}'
  if before.state == 'failed':
    job.state, job.note = 'failed', f'{before.title}, from which it starts, has failed'
  return False


def start(job: Job, prefix: list[str]) -> None:
  """Its commands in one process, which ends with the first of them that fails, as that one did."""
  step = last_step(job.run.folder)
  job.starts += 1
  job.tries = 1 if step > job.step else job.tries + 1
  job.step = step
  script = ' && '.join(shlex.join([*prefix, *command]) for command in job.start)
  job.log_begins = job.log.stat().st_size if job.log.exists() else 0
  job.process = in_background(script, job.log)
  job.state = 'running' if LAUNCHER.value == 'local' else 'waiting'
  job.note = f'start {job.starts}' if job.starts > 1 else ''


def give_back(job: Job) -> None:
  """Of a job that is over. Takes minutes, which nobody waits for before the end."""
  if job.after:
    job.giving_back = in_background(' && '.join(map(shlex.join, job.after)), job.log)


def in_background(script: str, log: pathlib.Path) -> subprocess.Popen:
  """In a session of its own: Ctrl-C reaches this command alone, which then stops its jobs with one signal each."""
  log.parent.mkdir(parents=True, exist_ok=True)
  with open(log, 'a') as file:
    file.write(f'$ {script}\n')
    file.flush()
    bash = ['bash', '-c', script]
    return subprocess.Popen(bash, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)


def look_at(job: Job) -> None:
  """Brings the state of a job with a process up to date; without one it is over, or to be started again."""
  status = job.process.poll()
  if status is None:
    if job.state == 'waiting' and (states := [line for line in job.said() if line.startswith('state: ')]):
      state = states[-1].removeprefix('state: ')
      job.state, job.note = ('running', '') if state == 'running' else ('waiting', state)
    return
  job.process = None
  if job.run.finished():
    job.state, job.note = 'finished', outcome(job.run)
  elif status not in (0, AGAIN) and 0 < status < 128:  # a signal is 128 + its number, or negative
    job.state, job.note = 'failed', f'{last_words(job)} ({job.log})'
  elif last_step(job.run.folder) <= job.step and job.tries > RETRIES.value:
    job.state, job.note = 'failed', f'started {job.tries} times without a step further ({job.log})'
  else:
    by = signal.Signals(-status).name if status < 0 else f'status {status}'
    job.state, job.note = 'preempted', f'ended by {by} at step {last_step(job.run.folder)}'
  if job.state != 'preempted':
    give_back(job)


@contextlib.contextmanager
def ended_with_us(asked: train.Asked, jobs: list[Job]):
  """However the block ends, so do the processes of its jobs: by SIGTERM, upon which mmx.train saves."""
  def interrupt(*_):
    raise KeyboardInterrupt

  previous = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  except KeyboardInterrupt:
    stop('stopped; ' + ('' if LAUNCHER.value == 'local' else 'what has been sent goes on, and ')
         + 'the same command continues')
  finally:
    signal.signal(signal.SIGTERM, previous)
    running = [job for job in jobs if job.process is not None and job.process.poll() is None]
    for job in running:
      os.killpg(job.process.pid, signal.SIGTERM)
    for job in running:
      job.process.wait()
      job.state, job.note = 'waiting', 'for this command to be given again'
    if running:
      remember(asked, jobs)


# ----------------------------------------------------------------------------------------------------------------------
# saying how it stands


def table(jobs: list[Job]) -> str:
  """run, state, step, note."""
  from mmx.report import terminal_table

  rows = [['run', 'state', 'step', '']]
  for job in jobs:
    step = f'{last_step(job.run.folder)}/{job.run.experiment.train.steps}'
    rows.append([job.title, job.state, step, job.note])
  left = [max(len(row[column]) for row in rows) for column in (1, 3)]
  lines = terminal_table([[row[0], row[1].ljust(left[0]), row[2], row[3].ljust(left[1])] for row in rows]).splitlines()
  return '\n'.join(line.rstrip() for line in lines)


def remember(asked: train.Asked, jobs: list[Job]) -> None:
  """For --watch in another terminal."""
  from mmx.metrics import write_whole

  asked.workdir.mkdir(parents=True, exist_ok=True)
  states = {job.title: {'state': job.state, 'note': job.note} for job in jobs}
  write_whole(asked.workdir / STATES, json.dumps(states, indent=1))


def recall(asked: train.Asked, jobs: list[Job]) -> None:
  states = json.loads((asked.workdir / STATES).read_text()) if (asked.workdir / STATES).exists() else {}
  for job in jobs:
    if job.state != 'finished' and job.title in states:
      job.state, job.note = states[job.title]['state'], states[job.title]['note']


def outcome(run: Run) -> str:
  return f'held-out loss {json.loads((run.folder / "result.json").read_text())["heldout_loss"]:.4f}'


def last_step(folder: epath.Path) -> int:
  """Of metrics.jsonl; 0 if nothing has been written."""
  file = folder / 'metrics.jsonl'
  if not file.exists():
    return 0
  lines = [line for line in file.read_text().splitlines() if line.endswith('}')]
  return json.loads(lines[-1])['step'] if lines else 0


def last_words(job: Job) -> str:
  """The error that a job ended with, or whatever it said last."""
  lines = [line.strip() for line in job.said() if line.strip()]
  errors = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
  return (errors or lines)[-1][:200]


def command() -> None:
  """`python -m mmx.sweep`. What --help says is this file's, though that one was called."""
  sys.modules['__main__'].__doc__ = __doc__
  for module in ('mmx.launch', 'mmx.train'):
    for flag in flags.FLAGS.flags_by_module_dict()[module]:
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(main, flags_parser=train.parse_flags)
