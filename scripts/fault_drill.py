"""Breaks a small training on purpose, again and again, and checks that nothing is lost.

  python scripts/fault_drill.py                                        # 30 drills
  python scripts/fault_drill.py --drills=10 --seed=1 --kinds=kill,flip
  python scripts/fault_drill.py --output=docs/results/fault_drill_cpu.json

A drill is one run of `python -m mmx.train` in processes of its own, struck at a random moment and started again with
the same command until it is finished. Its training loss and gradient norm at every step, its held-out curve, and the
metadata and data position of its last checkpoint must then be, bit for bit, those of a run that nothing happened to;
where the fault is in the data (corrupt rows, NaN batches), of a run with the same fault in its data and no other.

The faults follow from --seed. A moment is a step and milliseconds behind the request of its batch, so the very
instruction that a signal meets differs from time to time. A full disk is a tmpfs of its own, filled to the last byte
where mounting is permitted; elsewhere every write of a checkpoint fails as on a full disk.
"""

import argparse
import concurrent.futures
import dataclasses
import errno
import functools
import importlib.metadata
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, SAVE_LOCALLY_EVERY = 16, 4, 3
MAX_ATTEMPTS = 5  # a run is struck twice at most
ATTEMPT_TIMEOUT_S = 240
DISK_MB = 32
COMPARED = ('loss', 'grad_norm', 'accuracy', 'learning_rate', 'skipped', 'heldout/loss', 'heldout/accuracy')

EXPERIMENT = f'''"""A model and a corpus so small that a run takes seconds."""
from mmx import config

def get_config(scale):
  return config.override(config.Experiment(), {{
      'model.vocab_size': 260, 'model.d_model': 32, 'model.attention.num_heads': 4, 'model.attention.num_kv_heads': 2,
      'model.attention.head_dim': 8, 'model.attention.rotary_dim': 4,
      'model.moe.num_experts': 8, 'model.moe.top_k': 2, 'model.moe.d_ff': 24,
      'data.source': 'jsonl:rows.jsonl', 'data.seq_len': 32, 'data.batch_size': 8, 'data.heldout_fraction': 0.2,
      'optim.warmup_steps': 2, 'optim.decay_steps': 4, 'train.steps': {STEPS}, 'train.log_every': 1,
      'train.checkpoint_every': {SAVE_EVERY}, 'eval.every': 5, 'eval.batches': 2, 'mesh.num_devices': 1,
  }})
'''
KINDS = {
    'kill': 'SIGKILL', 'kill_twice': 'SIGKILL, and again', 'term': 'SIGTERM', 'disk': 'full disk',
    'truncate': 'SIGKILL and a truncated file', 'delete': 'SIGKILL and a deleted file',
    'flip': 'SIGKILL and a flipped byte', 'ruin': 'SIGKILL and every checkpoint damaged',
    'rows': 'corrupt rows and SIGKILL', 'nan': 'NaN batch and SIGKILL',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Strike:
  """What hits a process: 'SIGKILL', 'SIGTERM' or 'FULL', so long after the batch of a step is asked for."""

  what: str
  step: int
  delay_ms: int

  def __str__(self):
    return f'{self.what} at step {self.step} + {self.delay_ms} ms'


@dataclasses.dataclass(frozen=True)
class Fault:
  """One drill: strikes[i] hits attempt i; between the first two, files of checkpoints are damaged."""

  kind: str
  strikes: tuple[Strike, ...]
  local: bool  # checkpoints on the host's own disk too
  nan_step: int | None
  seed: int  # of the choice of files and rows

  def __str__(self):
    told = [*map(str, self.strikes)]
    told += [f'NaN batch at step {self.nan_step}'] * (self.nan_step is not None)
    return f'{KINDS[self.kind]}: {", ".join(told)}' + ', local checkpoints' * self.local


def main():
  if sys.argv[1:2] == ['--attempt']:
    return attempt(json.loads(sys.argv[2]), sys.argv[3:])
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--drills', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kinds', default=','.join(KINDS), help='comma-separated, of ' + ', '.join(KINDS))
  parser.add_argument('--jobs', type=int, default=2, help='drills at a time')
  parser.add_argument('--output', type=pathlib.Path, help='JSON file for the figures')
  flags = parser.parse_args()
  kinds = flags.kinds.split(',')
  if unknown := [kind for kind in kinds if kind not in KINDS]:
    sys.exit(f'error: --kinds: unknown {unknown[0]!r}; one of {", ".join(KINDS)}')

  faults = [draw(kinds[number % len(kinds)], flags.seed, number) for number in range(flags.drills)]
  began = time.time()
  with tempfile.TemporaryDirectory(prefix='fault_drill_') as folder:
    place = Place(pathlib.Path(folder))
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as threads:
      found = []
      for told in threads.map(functools.partial(drill, place), range(len(faults)), faults):
        found.append(told)
        verdict = 'same' if told['same'] else f'LOST: {told["difference"]}'
        print(f'{len(found):3}/{len(faults)}  {told["fault"]:<76}  {told["attempts"]} attempts  {verdict}', flush=True)
  passed = sum(told['same'] for told in found)
  print(f'{passed} of {len(found)} drills lost nothing ({time.time() - began:.0f} s)')
  if flags.output:
    flags.output.write_text(json.dumps(about(flags, found, place.disks, time.time() - began), indent=1) + '\n')
  sys.exit(passed < len(found))


def draw(kind: str, seed: int, number: int) -> Fault:
  """The fault of a drill: moments are uniform over the run, as far as there is a checkpoint to be damaged."""
  rng = random.Random(f'{seed} {number} {kind}')
  damages = kind in ('truncate', 'delete', 'flip', 'ruin')
  what = {'term': 'SIGTERM', 'disk': 'FULL'}.get(kind, 'SIGKILL')
  first = rng.randint(SAVE_EVERY + 2 if damages else 1, STEPS)
  strikes = [Strike(what, first, rng.randint(0, 60))]
  if kind == 'kill_twice':
    strikes.append(Strike(what, rng.randint(first, STEPS), rng.randint(0, 60)))
  nan_step = rng.randint(1, STEPS) if kind == 'nan' else None
  return Fault(kind, tuple(strikes), rng.random() < 0.5, nan_step, rng.randrange(2**32))


# --- one drill --------------------------------------------------------------------------------------------------------


class Place:
  """The folder of all drills: the experiment, the corpus, programs compiled once, and runs that nothing happened to."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.disks = 'no full disk was drilled'
    self._lock = threading.Lock()
    self._undisturbed = {}
    (folder / 'drill.py').write_text(EXPERIMENT)
    words = random.Random(0)
    rows = [' '.join(words.choices(['alpha', 'beta', 'gamma', 'delta'], k=180)) for _ in range(40)]
    (folder / 'rows.jsonl').write_text('\n'.join(json.dumps({'text': row}) for row in rows) + '\n')

  def undisturbed(self, fault: Fault) -> dict:
    """Curves of a run with the fault's data and no strike."""
    key = (fault.nan_step, fault.seed if fault.kind == 'rows' else None)
    with self._lock:  # one at a time: the first one compiles for all
      if key not in self._undisturbed:
        workdir = self.folder / f'undisturbed{len(self._undisturbed)}'
        calm = dataclasses.replace(fault, strikes=(), local=False)
        process = self.run(calm, workdir, 0)
        if process.returncode:
          raise RuntimeError(f'a run that nothing happened to failed: {process.stderr[-2000:]}')
        self._undisturbed[key] = curves(workdir)
      return self._undisturbed[key]

  def run(self, fault: Fault, workdir: pathlib.Path, number: int) -> subprocess.CompletedProcess:
    """One attempt of a run: the command of training, struck by strikes[number] if there is one."""
    workdir.mkdir(exist_ok=True)
    strike = dataclasses.asdict(fault.strikes[number]) if number < len(fault.strikes) else None
    plan = {'strike': strike, 'nan_step': fault.nan_step, 'ballast': str(workdir / 'ballast'),
            'mounted': os.path.ismount(workdir)}
    settings = {'data.source': f'jsonl:{rows_of(self.folder, fault)}', 'train.skip_spikes': fault.nan_step is not None}
    if fault.local:
      settings |= {'train.local_checkpoint_every': SAVE_LOCALLY_EVERY,
                   'train.local_checkpoint_dir': f'{self.folder}/local'}
    command = [sys.executable, __file__, '--attempt', json.dumps(plan), '--config=drill.py', f'--workdir={workdir}']
    environment = os.environ | {
        'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': f'{self.folder}/compiled',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    return subprocess.run(
        [*command, *(f'--set={path}={value}' for path, value in settings.items())], cwd=self.folder, env=environment,
        capture_output=True, text=True, timeout=ATTEMPT_TIMEOUT_S,
    )  # fmt: skip


def drill(place: Place, number: int, fault: Fault) -> dict:
  """Runs one drill; whether its curves are those of the undisturbed run, and how it went."""
  expected = place.undisturbed(fault)
  began = time.time()
  workdir = place.folder / f'drill{number:02d}'
  told = {'number': number, 'kind': fault.kind, 'fault': str(fault), 'attempts': 0, 'ends': []}
  with disk(place, workdir, fault.kind == 'disk'):
    finished = lambda: told['ends'] and told['ends'][-1][0] == 0 and (run_folder(workdir) / 'result.json').exists()
    while told['attempts'] < MAX_ATTEMPTS and not finished():
      process = place.run(fault, workdir, told['attempts'])
      told['attempts'] += 1
      last_line = (process.stderr.strip().splitlines() or [''])[-1].replace(f'{place.folder}/', '')
      told['ends'].append([process.returncode, last_line])
      (workdir / 'ballast').unlink(missing_ok=True)
      if told['attempts'] == 1:
        told['damaged'] = damage(place, workdir, fault)
    difference = difference_of(curves(workdir), expected)
  ends = [code for code, _ in told['ends']]
  if not difference and ends[-1] != 0:
    difference = f'the last attempt ended with {ends[-1]}: {told["ends"][-1][1]}'
  return told | {'same': not difference, 'difference': difference, 'seconds': round(time.time() - began, 1)}


def curves(workdir: pathlib.Path) -> dict:
  """What must not be lost, as text: NaN is not equal to itself."""
  folder = run_folder(workdir)
  try:
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    result = json.loads((folder / 'result.json').read_text())
    last = max((folder / 'checkpoints').iterdir())
    metadata = json.loads((last / 'metadata.json').read_text())['metadata']
    return {
        'metrics.jsonl': [json.dumps([row['step'], {tag: row[tag] for tag in COMPARED if tag in row}]) for row in rows],
        'held-out curve': json.dumps(result['curve']), 'train_loss': json.dumps(result['train_loss']),
        'checkpoint': json.dumps([last.name.split('.')[0], metadata]),
        'data position': (last / 'data.0-of-1.json').read_text(),
    }  # fmt: skip
  except (OSError, ValueError) as error:
    return {'unreadable': f'{type(error).__name__}: {error}'}


def difference_of(found: dict, expected: dict) -> str:
  """The first difference, '' if there is none."""
  if 'unreadable' in found:
    return found['unreadable']
  for name, wanted in expected.items():
    if found[name] != wanted:
      if name == 'metrics.jsonl':
        pairs = zip([*found[name], 'nothing'], [*wanted, 'nothing'])
        return f'{name}: {next(f"{one} instead of {other}" for one, other in pairs if one != other)}'
      return f'{name}: {found[name]} instead of {wanted}'
  return ''


def run_folder(workdir: pathlib.Path) -> pathlib.Path:
  return workdir / 'main/seed0'


# --- faults -----------------------------------------------------------------------------------------------------------


class disk:
  """A small file system mounted on the workdir, if it is to be filled and mounting is permitted."""

  def __init__(self, place: Place, workdir: pathlib.Path, wanted: bool):
    self.place, self.workdir, self.wanted, self.mounted = place, workdir, wanted, False

  def __enter__(self):
    self.workdir.mkdir()
    if self.wanted:
      mount = ['mount', '-t', 'tmpfs', '-o', f'size={DISK_MB}m', 'tmpfs', str(self.workdir)]
      self.mounted = bool(shutil.which('mount')) and not subprocess.run(mount, capture_output=True).returncode
      self.place.disks = f'a tmpfs of {DISK_MB} MB, filled' if self.mounted else 'writes of checkpoints made to fail'

  def __exit__(self, *_):
    if self.mounted:
      subprocess.run(['umount', str(self.workdir)], check=True)


def rows_of(folder: pathlib.Path, fault: Fault) -> str:
  """The corpus, or a copy in which one row in eight is damaged."""
  if fault.kind != 'rows':
    return 'rows.jsonl'
  rng, name = random.Random(fault.seed), f'rows_{fault.seed}.jsonl'
  rows = (folder / 'rows.jsonl').read_bytes().splitlines()
  for number in rng.sample(range(len(rows)), len(rows) // 8):
    middle = rng.randrange(1, len(rows[number]))
    rows[number] = rng.choice([
        rows[number][:middle], rows[number][:middle] + b'\xff\xfe' + rows[number][middle:], b'\0' * 40, b'[1, 2]',
        b'{"text": 5}', b'{"other": "text"}',
    ])
  if not (folder / name).exists():
    (folder / name).write_bytes(b'\n'.join(rows) + b'\n')
  return name


def damage(place: Place, workdir: pathlib.Path, fault: Fault) -> list[str]:
  """Damages a file of the newest whole checkpoint, or one of every whole checkpoint; returns what was done."""
  rng = random.Random(fault.seed)
  local = place.folder / 'local' / str(run_folder(workdir)).lstrip('/') / 'process0'
  both = [folder for folder in (run_folder(workdir) / 'checkpoints', local) if folder.exists()]
  sealed = [path.parent for folder in both for path in folder.glob('*/seal.0-of-1.json')]
  checkpoints = sorted(sealed, key=lambda path: path.name)
  if fault.kind in ('truncate', 'delete', 'flip'):
    checkpoints = checkpoints[-1:]
  elif fault.kind != 'ruin':
    return []
  done = []
  for checkpoint in checkpoints:
    files = sorted(path for path in checkpoint.rglob('*') if path.is_file() and path.stat().st_size)
    path, how = rng.choice(files), fault.kind if fault.kind != 'ruin' else rng.choice(['truncate', 'delete', 'flip'])
    content = bytearray(path.read_bytes())
    place_in_file = rng.randrange(len(content))
    if how == 'delete':
      path.unlink()
    elif how == 'truncate':
      path.write_bytes(content[:place_in_file])
    else:
      content[place_in_file] ^= 1 << rng.randrange(8)
      path.write_bytes(content)
    done.append(f'{how} {checkpoint.name}/{path.relative_to(checkpoint)}')
  return done


# --- inside the process that is struck --------------------------------------------------------------------------------


def attempt(plan: dict, flags: list[str]) -> None:
  """`python -m mmx.train` with these flags, on batches that strike."""
  from absl import app

  from mmx import checkpoint, train
  from mmx.data import pipeline

  open_iterator = pipeline.train_iterator
  strike = plan['strike'] or {'what': None, 'step': None, 'delay_ms': 0}

  def fill_disk():
    if not plan['mounted']:

      def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

      checkpoint.Checkpointer._require_space = no_room
      return
    with open(plan['ballast'], 'wb', buffering=0) as file:
      for size in (2**20, 2**10, 1):
        try:
          while file.write(bytes(size)) == size:
            pass
        except OSError:
          pass

  def hit():
    if strike['what'] == 'FULL':
      fill_disk()
    else:
      os.kill(os.getpid(), signal.Signals[strike['what']])

  class Striking:
    """A data iterator that strikes when the batch of a step is asked for; it knows its step after a restart too."""

    def __init__(self, *arguments):
      self.inner, self.step = open_iterator(*arguments), 0

    def __next__(self):
      self.step += 1
      if self.step == strike['step']:
        threading.Timer(strike['delay_ms'] / 1000, hit).start()
      batch = next(self.inner)
      return batch | {'loss_mask': batch['loss_mask'] * float('nan')} if self.step == plan['nan_step'] else batch

    def get_state(self):
      return {'step': self.step, 'inner': self.inner.get_state()}

    def set_state(self, state):
      self.step = state['step']
      self.inner.set_state(state['inner'])

  pipeline.train_iterator = Striking
  app.run(train.main, argv=['train', *flags], flags_parser=train.parse_flags)


# --- the record -------------------------------------------------------------------------------------------------------


def about(flags, found: list[dict], disks: str, seconds: float) -> dict:
  """The figures, and where they come from."""
  names = ('jax', 'jaxlib', 'orbax-checkpoint', 'grain')
  return {
      'command': f'python scripts/fault_drill.py --drills={flags.drills} --seed={flags.seed} --kinds={flags.kinds}',
      'drills': len(found), 'lost_nothing': sum(told['same'] for told in found), 'seconds': round(seconds),
      'steps': STEPS, 'checkpoint_every': SAVE_EVERY, 'local_checkpoint_every': SAVE_LOCALLY_EVERY, 'full_disk': disks,
      'device': f'{os.cpu_count()} CPU cores, {flags.jobs} drills at a time, load average {os.getloadavg()[2]:.0f}',
      'versions': {'python': sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names},
      'date': time.strftime('%Y-%m-%d'), 'each': found,
  }  # fmt: skip


if __name__ == '__main__':
  main()
