"""The command as a person uses it: every arm and seed, stopped and continued, refused in one line, compiled once.

What a signal, an exit code or a start-up decides runs in a process of its own; the rest calls the command's `main`
here. `python tests/test_train.py SIGNAL STEP --config=...` is the command with a signal sent to it at a step.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from absl import app
from absl.testing import flagsaver

from mmx import checkpoint, config, sharding, train_step
from mmx.data import pipeline

EXPERIMENT = '''"""Coarse or fine experts, in the smallest size that trains?"""

from mmx import config

SCALES = ('cpu', 'huge')
SEEDS = {'cpu': (0, 1)}
PUBLISHED = '| fine wins | by a mile |'


def get_config(scale):
  return config.override(config.Experiment(), {@FIELDS@
      'train.histogram_every': 6, 'eval.every': 5, 'mesh.num_devices': 1,
  })


def arms(base):
  cut = {'model.moe.num_experts': 16, 'model.moe.top_k': 4, 'model.moe.d_ff': 12}
  return {'coarse': base, 'fine': config.override(base, cut)}
'''.replace('@FIELDS@', tiny.FIELDS)
OF_THE_MACHINE = ('time', 'tokens_per_second', 'mfu', 'memory/host')


# --- helpers ----------------------------------------------------------------------------------------------------------


def interrupted(make, name, at):
  """`pipeline.train_iterator` whose iterators send this process a signal when the batch of step `at` is asked for."""

  class Interrupted:
    def __init__(self, *args):
      self.iterator, self.step = make(*args), 0

    def __next__(self):
      self.step += 1
      if self.step == at:
        os.kill(os.getpid(), signal.Signals[name])
      return next(self.iterator)

    def __getattr__(self, name):
      return getattr(self.iterator, name)

  return Interrupted


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """The folder that the commands run in, with an experiment file and its text; they share compiled programs."""
  folder = tmp_path_factory.mktemp('train')
  (folder / 'question.py').write_text(EXPERIMENT)
  tiny.write_texts(folder)
  return folder


def command(place, *arguments, stopped_by=None):
  """The command in a process of its own, on one device, with `stopped_by` = (signal, step) sent to it if given."""
  script = [__file__, *map(str, stopped_by)] if stopped_by else ['-m', 'mmx.train']
  environment = os.environ | {
      'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_COMPILATION_CACHE_DIR': str(place / 'compiled')
  }
  return subprocess.run(
      [sys.executable, *script, '--config=question.py', *arguments],
      cwd=place, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip


@pytest.fixture(scope='module')
def whole(place):
  """Both arms and seeds, uninterrupted, in place / 'whole'."""
  return command(place, '--workdir=whole')


@pytest.fixture(scope='module')
def train():
  """mmx.train without its settings of the whole process, which other files share."""
  from mmx import host, train

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(host, 'cache_compilations', lambda: None)
    patch.setattr(host, 'use_every_core', lambda: None)
    patch.setattr(host, 'leave_holes', lambda: None)
    yield train


@pytest.fixture(scope='module')
def here(train, place):
  """here(*arguments): the command in this process, with its eight devices; the line it fails with, or None."""

  def run(*arguments, file='question.py'):
    with contextlib.chdir(place), flagsaver.flagsaver():
      try:
        return train.main(train.parse_flags(['train', *([f'--config={file}'] if file else []), *arguments]))
      except SystemExit as stopped:
        assert str(stopped.code).startswith('error: ') and '\n' not in str(stopped.code)
        return str(stopped.code).removeprefix('error: ')

  return run


def tree(folder):
  """{path: (size, time of change)} of every file below a folder."""
  return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob('*')}


def settings(**fields):
  """--set flags: model__moe__top_k=3 for model.moe.top_k=3."""
  return [f'--set={path.replace("__", ".")}={value}' for path, value in fields.items()]


def result(folder):
  return json.loads((folder / 'result.json').read_text())


def rows(folder):
  """metrics.jsonl without what the machine says."""
  found = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  return [{tag: row[tag] for tag in row if tag not in OF_THE_MACHINE and 'goodput/' not in tag} for row in found]


def saved(folder):
  """(step, flat list of arrays, metadata) of the newest checkpoint."""
  experiment = config.load(folder / 'config.gin')
  state = train_step.abstract_state(experiment, sharding.build_mesh(experiment.mesh))
  reader = checkpoint.Checkpointer(folder / 'checkpoints', keep=None)
  step, state, metadata = reader.restore(state, None)
  reader.close()
  return step, jax.tree.leaves(jax.device_get(state)), metadata


def assert_same_run(folder, other):
  mine, theirs = result(folder), result(other)
  for name in ('heldout_loss', 'heldout_bpb', 'train_loss', 'curve', 'load_max_over_mean', 'router_entropy', 'corpus'):
    assert mine[name] == theirs[name], name
  assert rows(folder) == rows(other)
  (step, arrays, metadata), (other_step, others, other_metadata) = saved(folder), saved(other)
  assert step == other_step and metadata == other_metadata and len(arrays) == len(others) > 20
  for array, expected in zip(arrays, others, strict=True):
    np.testing.assert_array_equal(array, expected, strict=True)
  positions = [path / 'checkpoints' / f'{step:08d}' / 'data.0-of-1.json' for path in (folder, other)]
  assert positions[0].read_text() == positions[1].read_text()


# --- all arms, all seeds ----------------------------------------------------------------------------------------------


def test_every_arm_and_seed_runs_and_is_compared(place, whole):
  assert whole.returncode == 0, whole.stderr
  assert 'Traceback' not in whole.stderr
  for arm in ('coarse', 'fine'):
    for seed in (0, 1):
      found = result(place / 'whole' / arm / f'seed{seed}')
      assert (found['arm'], found['seed'], found['steps'], found['tokens']) == (arm, seed, 12, 12 * 8 * 32)
      assert found['curve']['step'] == [5, 10, 12] and found['curve']['heldout_loss'][-1] == found['heldout_loss']
      assert found['heldout_loss'] < found['curve']['heldout_loss'][0] < 5.5  # ln 257 is 5.55
      assert found['tokens_per_second'] > 0 and 0 < found['mfu'] < 1
      assert f'{arm}/seed{seed} ' in whole.stderr and '12/12' in whole.stderr
  runs = [result(path.parent) for path in (place / 'whole').glob('*/*/result.json')]
  assert len({run['corpus'] for run in runs}) == 1
  seeds = {run['arm']: run['heldout_loss'] for run in runs if run['seed'] == 0}
  assert len({run['heldout_loss'] for run in runs}) == 4 and set(seeds) == {'coarse', 'fine'}

  summary = json.loads((place / 'whole/summary.json').read_text())
  assert [arm['name'] for arm in summary['arms']] == ['coarse', 'fine']
  assert summary['differences'][0]['seeds'] == [0, 1]
  table = (place / 'whole/summary.md').read_text()
  for text in (table, whole.stdout):
    assert 'Coarse or fine' in text and 'by a mile' in text and '2 paired seeds' in text
  assert (place / 'whole/loss_curves.png').read_bytes().startswith(b'\x89PNG')


def test_tensorboard_has_every_scalar_and_the_runs_side_by_side(place, whole):
  from tensorboard.backend.event_processing import plugin_event_multiplexer

  served = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(place / 'whole')).Reload()
  runs = {f'{arm}/seed{seed}' for arm in ('coarse', 'fine') for seed in (0, 1)}
  assert set(served.Runs()) == runs | {'summary'}
  for run in runs:
    tags = served.PluginRunToTagToContent('scalars')[run]
    steps = {tag: [event.step for event in served.Tensors(run, tag)] for tag in tags}
    for tag in (
        'loss', 'learning_rate', 'grad_norm', 'tokens_per_second', 'mfu', 'router/entropy', 'router/dropped',
        'load_max_over_mean', 'load_max_over_mean/layer_00', 'load_max_over_mean/layer_01', 'memory/host',
    ):
      assert steps[tag] == [3, 6, 9, 12], tag
    assert steps['heldout/loss'] == steps['heldout/bits_per_byte'] == [5, 10, 12]
    for layer in ('expert_load/layer_00', 'expert_load/layer_01'):
      assert [event.step for event in served.Tensors(run, layer)] == [6, 12]
    told = served.Tensors(run, 'config')[0].tensor_proto.string_val[0].decode()
    assert 'num_experts = ' + ('8' if run.startswith('coarse') else '16') in told
    assert {'_hparams_/experiment', '_hparams_/session_start_info', '_hparams_/session_end_info'} <= set(
        served.PluginRunToTagToContent('hparams')[run]
    )
  assert 'loss_curves' in served.PluginRunToTagToContent('images')['summary']
  assert served.Tensors('summary', 'comparison')[0].tensor_proto.string_val[0].decode().startswith('# Coarse or fine')


def test_run_folder_reads_back_as_the_config_it_ran(place, whole, train):
  arms = config.load_experiment(place / 'question.py').arms
  for arm, experiment in arms.items():
    expected = config.override(experiment, {'train.seed': 1, 'data.seed': 1})
    assert config.load(place / f'whole/{arm}/seed1/config.gin') == expected
    told = json.loads((place / f'whole/{arm}/seed1/run.json').read_text())
    assert told['versions']['jax'] == jax.__version__ and '40 documents' in told['corpus']


def test_a_finished_run_is_skipped_and_only_the_table_is_written_again(place, whole, here, capsys):
  folder = place / 'whole'
  (folder / 'summary.md').rename(folder / 'summary.old')
  before = {path: seen for path, seen in tree(folder).items() if path.parent.name.startswith('seed')}
  assert here('--workdir=whole') is None
  after = tree(folder)
  assert {path: after[path] for path in before} == before
  assert (folder / 'summary.md').read_text() == (folder / 'summary.old').read_text()
  assert '2 paired seeds' in capsys.readouterr().out


def test_print_config_shows_each_arm_and_its_difference_and_makes_nothing(place, here, capsys):
  before = tree(place)
  assert here('--print_config', '--set', 'train.steps=50') is None
  printed = capsys.readouterr().out
  assert printed.count('model.moe:\n') == 2 and printed.count('train.steps = 50  (default 200)') == 2
  assert '#   model.moe.num_experts = 16  (default 32)' in printed
  assert tree(place) == before


# --- stopped and continued --------------------------------------------------------------------------------------------


def test_sigterm_saves_and_the_same_command_continues_bit_for_bit(place, whole):
  arguments = '--workdir=terminated', '--seeds=0'
  stopped = command(place, *arguments, stopped_by=('SIGTERM', 7))
  folder = place / 'terminated'
  assert stopped.returncode == 0, stopped.stderr
  assert stopped.stderr.splitlines()[-1] == 'stopped by SIGTERM at step 7 of 12, saved; the same command continues'
  assert sorted(path.name for path in folder.iterdir()) == ['coarse']  # nothing else was begun
  assert not (folder / 'coarse/seed0/result.json').exists()
  assert saved(folder / 'coarse/seed0')[0] == 7
  again = command(place, *arguments)
  assert again.returncode == 0, again.stderr
  assert result(folder / 'coarse/seed0')['started_at_step'] == 7
  for arm in ('coarse', 'fine'):
    assert_same_run(folder / arm / 'seed0', place / 'whole' / arm / 'seed0')


def test_sigkill_loses_the_steps_since_the_checkpoint_and_nothing_else(place, whole):
  arguments = '--workdir=killed', '--seeds=0', '--arm=fine'
  killed = command(place, *arguments, stopped_by=('SIGKILL', 12))
  folder = place / 'killed/fine/seed0'
  assert killed.returncode == -signal.SIGKILL and not (folder / 'result.json').exists()
  again = command(place, *arguments)
  assert again.returncode == 0, again.stderr
  assert result(folder)['started_at_step'] in (4, 8)  # 8 may still have been on its way
  assert_same_run(folder, place / 'whole/fine/seed0')


def test_a_truncated_checkpoint_is_told_and_the_one_before_is_continued(place, whole):
  folder = shutil.copytree(place / 'whole/coarse/seed1', place / 'truncated/coarse/seed1')
  (folder / 'result.json').unlink()
  largest = max((folder / 'checkpoints/00000012/state').rglob('*'), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-100])
  again = command(place, '--workdir=truncated', '--seeds=1', '--arm=coarse')
  assert again.returncode == 0 and 'Traceback' not in again.stderr, again.stderr
  (told,) = [line for line in again.stderr.splitlines() if 'damaged' in line]
  assert '00000012 is damaged and passed over' in told and largest.name in told
  assert result(folder)['started_at_step'] == 8
  assert rows(folder) == rows(place / 'whole/coarse/seed1')
  for array, expected in zip(saved(folder)[1], saved(place / 'whole/coarse/seed1')[1], strict=True):
    np.testing.assert_array_equal(array, expected, strict=True)


# --- one arm in this process ------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def compiled(train, here):
  """(programs, events): what the first arm's two seeds had compiled, and when: each compilation and each check."""
  made, events = [], []
  programs, check = train.Programs, checkpoint.check_finite

  def note(event, seconds, **about):
    if event == '/jax/core/compile/backend_compile_duration':
      events.append(about['fun_name'])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'Programs', lambda experiment: made.append(programs(experiment)) or made[-1])
    patch.setattr(checkpoint, 'check_finite', lambda step, told: events.append((step, *told)) or check(step, told))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
      assert here('--workdir=compiled_once', '--arm=coarse') is None
    finally:
      jax.monitoring.unregister_event_duration_listener(note)
  return made, events


def test_each_arm_compiles_once_for_all_seeds_and_nothing_after_the_first_evaluation(compiled):
  made, events = compiled
  compilations = [event for event in events if isinstance(event, str)]
  assert compilations.count('jit(train_step)') == compilations.count('jit(eval_step)') == len(made) == 1, compilations
  first_evaluation, end = events.index((5, 'heldout/loss')), events.index((12, 'heldout/loss'))
  assert not [event for event in events[first_evaluation:end] if isinstance(event, str)]
  second_seed = [event for event in events[end:] if isinstance(event, str)]
  assert not second_seed, second_seed


class Changed:
  """Programs whose training step is another function of the real one."""

  def __init__(self, programs, train_step):
    self.programs, self.train_step = programs, train_step

  def __getattr__(self, name):
    return getattr(self.programs, name)


@pytest.fixture
def one_run(train, here, compiled, place, request, monkeypatch):
  """one_run(change=None, *arguments): the first arm without compiling, and with change(step, state, batch) as its step.

  Returns the line it fails with, or None, and its folder.
  """
  (programs,), _ = compiled

  def run(change=None, *arguments):
    step = (lambda state, batch: change(programs.train_step, state, batch)) if change else programs.train_step
    monkeypatch.setattr(train, 'Programs', lambda experiment: Changed(programs, step))
    workdir = request.node.name.replace('[', '_').rstrip(']')
    return here(f'--workdir={workdir}', '--arm=coarse', '--seeds=0', *arguments), place / workdir / 'coarse/seed0'

  return run


def poisoned_at(last_good):
  """A training step that is given NaN parameters after step `last_good`."""

  def change(step, state, batch):
    if int(state.step) == last_good:
      state = state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
    return step(state, batch)

  return change


@pytest.mark.parametrize('last_good', [6, 7])  # step 8 is one to save
def test_nan_is_named_and_the_last_good_checkpoint_remains(one_run, last_good):
  found, folder = one_run(poisoned_at(last_good))
  assert found.startswith(f'step {last_good + 1}: ') and 'loss = nan' in found and 'grad_norm = nan' in found
  step, arrays, _ = saved(folder)
  assert step == 4 and all(np.isfinite(array).all() for array in arrays)
  assert not (folder / 'result.json').exists()


def test_a_checkpoint_on_its_way_arrives_though_the_next_step_fails(one_run, monkeypatch):
  checksums = checkpoint._checksums
  monkeypatch.setattr(checkpoint, '_checksums', lambda paths: time.sleep(0.5) or checksums(paths))
  found, folder = one_run(poisoned_at(4))
  assert found.startswith('step 5: ') and saved(folder)[0] == 4


def test_a_full_disk_is_told_and_the_previous_checkpoint_remains(one_run, monkeypatch):
  usage, free = shutil.disk_usage, iter([10**12])
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(path)._replace(free=next(free, 1000)))
  found, folder = one_run()
  assert '00000008 was not written: No space left on device' in found and found.endswith('checkpoints/00000004')
  monkeypatch.undo()
  assert saved(folder)[0] == 4


def test_metrics_of_a_step_are_fetched_after_the_next_is_dispatched(one_run):
  dispatched, fetched = [0], {}

  class Late:
    """An array of one step's metrics that notes how many steps had been dispatched when it was looked at."""

    def __init__(self, value):
      self.step, self.value = dispatched[0], value

    def __array__(self, *args, **kwargs):
      fetched.setdefault(self.step, dispatched[0])
      return np.asarray(self.value)

  def noting(step, state, batch):
    state, metrics = step(state, batch)
    dispatched[0] += 1
    return state, jax.tree.map(Late, metrics)

  assert one_run(noting)[0] is None
  caught_up = {4, 5, 8, 10, 12}  # before an evaluation or a checkpoint there is nothing to run ahead of
  assert fetched == {step: step if step in caught_up else step + 1 for step in range(1, 13)}


def test_a_stop_during_the_last_step_ends_the_command_after_it(one_run, monkeypatch, capsys):
  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(pipeline, 'train_iterator', interrupted(pipeline.train_iterator, 'SIGTERM', 12))
  found, folder = one_run(None, '--seeds=0,1')
  assert found is None and (folder / 'result.json').exists() and not (folder.parent / 'seed1').exists()
  assert 'stopped by SIGTERM before coarse/seed1; the same command continues' in capsys.readouterr().err
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(place, one_run):
  import tokenizers

  def write_tokenizer(*words):
    vocabulary = {word: index for index, word in enumerate(['<eos>', '<unk>', *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(place / 'tokenizer.json'))

  write_tokenizer('alpha', 'beta', 'gamma', 'delta')
  arguments = settings(data__tokenizer='tokenizer.json')
  assert one_run(poisoned_at(5), *arguments)[0].startswith('step 6: ')
  write_tokenizer('delta', 'gamma', 'beta', 'alpha')
  found, folder = one_run(None, *arguments)
  assert found.startswith("data.tokenizer: 'tokenizer.json' (") and 'is not the tokenizer of the checkpoint in' in found
  assert saved(folder)[0] == 4 and not (folder / 'result.json').exists()


# --- every part at once -----------------------------------------------------------------------------------------------


@pytest.mark.slow  # 15 to 30 s; each part has tests of its own
def test_mtp_capacity_accumulation_cosine_and_bfloat16_train_through_the_command(here, place):
  assert here('--workdir=parts', '--arm=fine', '--seeds=3', *settings(
      model__mtp__depth=1, model__moe__capacity_factor=1.0, model__moe__balance_loss_weight=0.01,
      model__compute_dtype='bfloat16', model__tie_embeddings=True, optim__schedule='cosine', train__accumulate=2,
      data__packing='best_fit', train__steps=6, eval__every=6,
  )) is None  # fmt: skip
  first, last, evaluated = rows(place / 'parts/fine/seed3')
  assert last['loss'] < first['loss'] and evaluated['heldout/loss'] < 5.5
  assert 0 < last['mtp_loss_1'] < first['mtp_loss_1'] and 0 < last['router/dropped'] < 1
  assert first['learning_rate'] > last['learning_rate'] > 0 and first['mtp_weight'] > 0
  layers = sorted(tag for tag in last if tag.startswith('load_max_over_mean/'))
  assert layers == [f'load_max_over_mean/layer_{layer:02d}' for layer in range(3)]  # two layers and the module


@pytest.mark.slow  # 15 to 30 s; as test_train_step.py, which does without the command
def test_eight_devices_through_the_command_equal_one(place, here, compiled):
  mesh = settings(mesh__num_devices=8, mesh__expert=2, mesh__fsdp=2, mesh__tensor=2)
  assert here('--workdir=eight', '--arm=coarse', '--seeds=0', *mesh) is None
  one, eight = rows(place / 'compiled_once/coarse/seed0'), rows(place / 'eight/coarse/seed0')
  assert [row['step'] for row in eight] == [row['step'] for row in one] == [3, 5, 6, 9, 10, 12, 12]
  for alone, shared in zip(one, eight, strict=True):
    assert alone.keys() == shared.keys()
    for tag in alone.keys() & {'loss', 'grad_norm', 'heldout/loss', 'router/entropy'}:
      np.testing.assert_allclose(shared[tag], alone[tag], rtol=1e-3, err_msg=f'{tag} at step {alone["step"]}')


def test_expert_loads_are_listed_from_the_first_layer_to_the_last(train):
  def layer(*loads):
    return {'ffn': {'bias': np.array(loads, np.float32)[:, None]}}

  load = {
      'mtp_0': {'block': {'ffn': {'bias': np.array([8.0], np.float32)}}},
      'segment_0': {'layer_0': layer(1, 3), 'layer_2': layer(2, 4)},
      'segment_1': {'layer_0': layer(5, 6, 7)},
  }
  found = train.loads_by_layer(load, '(full full/dense full)*2 full*3')
  np.testing.assert_array_equal(found, np.arange(1.0, 9.0)[:, None])


# --- refused in one line ----------------------------------------------------------------------------------------------


def write(file, text):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)


REFUSED = {
    'no such data': (settings(data__source='text:none'), 'data.source: text:none: no such file or folder'),
    'empty data folder': (settings(data__source='text:empty'), 'data.source: text:empty: the folder holds no files'),
    'nothing to train on': (settings(data__heldout_fraction=0.9999999), 'none of 40 document(s) is left for training'),
    'no such tokenizer': (settings(data__tokenizer='none.json'), "data.tokenizer: no such file 'none.json'"),
    'small vocabulary': (settings(model__vocab_size=200), 'model.vocab_size: 200 is smaller than the 257 tokens'),
    'unknown arm': (['--arm=medium'], "question has no arm 'medium'; its arms are coarse, fine"),
    'unknown scale': (['--scale=tiny'], "question.py: unknown scale 'tiny'; it has cpu, huge"),
    'unknown field': (settings(train__stes=5), '--set train.stes: unknown field; did you mean train.steps?'),
    'wrong type': (settings(train__steps='many'), "--set train.steps = 'many': expected int, found str"),
    'no assignment': (['--set=train.steps'], '--set train.steps: expected path=value, such as train.steps=50'),
    'too many devices': (settings(mesh__num_devices=64), 'mesh.num_devices = 64: more than the 8 device(s) that exist'),
    'mesh too large': (settings(mesh__expert=16), 'asks for 16 devices: more than the 1 at hand'),
    'indivisible': (settings(mesh__num_devices=8, mesh__tensor=4), 'num_kv_heads = 2: does not divide by mesh.tensor'),
    'short schedule': (settings(train__steps=5), 'optim.warmup_steps = 2 + optim.decay_steps = 4: longer than'),
    'seeds': (['--seeds=0,one'], '--seeds: expected whole numbers, found 0,one'),
    'negative seed': (['--seeds=-1'], 'data.seed = -1: must not be negative'),
    'pattern as folder': (['--workdir=lr[1]'], 'lr[1]/coarse/seed0: a run cannot have [ in its path'),
    'unknown flag': (['--step=5'], "Unknown command line flag 'step'"),
    'flag of another type': (['--resume=perhaps'], 'flag --resume=perhaps'),
    'stray word': (['coarse'], "unexpected argument 'coarse'; every option starts with --"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input_ends_in_one_line_and_leaves_no_trace(place, here, case):
  arguments, said = REFUSED[case]
  (place / 'empty').mkdir(exist_ok=True)
  before = tree(place)
  assert said in here('--workdir=refused', *arguments)
  assert tree(place) == before


@pytest.mark.parametrize('name, text, said', [
    ('none.py', None, 'none.py: no such file'),
    ('bare.py', 'x = 1\n', 'bare.py: lacks get_config(scale), which returns the Experiment to run'),
    ('broken.py', 'def get_config(scale):\n  return 1 / 0\n', 'broken.py:2: ZeroDivisionError: division by zero'),
    ('unfair.py', EXPERIMENT.replace("'model.moe.d_ff': 12", "'model.moe.d_ff': 48"), 'arms coarse and fine are not c'),
    ('config.gin', 'train.stes = 5\n', 'config.gin:1: train.stes: unknown field; did you mean train.steps?'),
    ('config.yaml', '', 'config.yaml: an experiment is a .py or a .gin file'),
])  # fmt: skip
def test_bad_experiment_file_ends_in_one_line_and_leaves_no_trace(place, here, tmp_path, name, text, said):
  if text is not None:
    (tmp_path / name).write_text(text)
  before = tree(place)
  assert said in here(f'--workdir={tmp_path}/refused', file=tmp_path / name)
  assert tree(place) == before and not (tmp_path / 'refused').exists()


def test_a_missing_config_is_asked_for(here):
  assert here('--arm=coarse', file=None).startswith('--config is missing; name an experiment')


@pytest.mark.parametrize('workdir', ['texts/00.txt', 'texts/00.txt/below', '/dev/null'])
def test_a_workdir_that_cannot_be_written_is_told_before_anything_is_compiled(place, here, train, monkeypatch, workdir):
  monkeypatch.setattr(train.Programs, 'train_step', property(lambda self: pytest.fail('compiled')))
  before = tree(place)
  found = here(f'--workdir={workdir}', '--arm=coarse')
  assert 'Not a directory' in found and workdir in found
  assert tree(place) == before


def test_a_workdir_of_another_config_is_refused_before_the_first_run(place, whole, here):
  """The folder that differs is the last of four, and the first three are not there yet."""
  shutil.copytree(place / 'whole/fine/seed1', place / 'differs/fine/seed1')
  before = tree(place)
  found = here('--workdir=differs', *settings(optim__learning_rate=0.1, train__steps=20))
  assert found == (
      'differs/fine/seed1/config.gin: the run in this workdir has optim.learning_rate = 0.003, this one 0.1 '
      '(and 1 more); give another --workdir or the same config'
  )
  assert tree(place) == before


def test_noresume_refuses_what_is_there(place, whole, here):
  before = tree(place)
  assert here('--workdir=whole', '--noresume') == (
      'whole/coarse/seed0 holds a run already; without --noresume it is continued'
  )
  assert tree(place) == before


def test_the_process_says_its_error_on_one_line_and_fails(place):
  failed = command(place, '--workdir=refused', '--arm=medium')
  assert failed.returncode == 1 and failed.stdout == ''
  assert failed.stderr == "error: question has no arm 'medium'; its arms are coarse, fine\n"
  failed = command(place, '--workdir=refused', '--set=data.source=text:none')
  assert failed.returncode == 1 and failed.stdout == ''
  assert failed.stderr.splitlines()[-1] == 'error: data.source: text:none: no such file or folder'
  assert len([line for line in failed.stderr.splitlines() if line.startswith(('question at', '  '))]) == 3
  assert len(failed.stderr.splitlines()) == 4 and not (place / 'refused').exists()


if __name__ == '__main__':
  from mmx import train as command_line

  pipeline.train_iterator = interrupted(pipeline.train_iterator, sys.argv.pop(1), int(sys.argv.pop(1)))
  app.run(command_line.main, flags_parser=command_line.parse_flags)
