"""The command judges a run folder as it stands, in text or in symbols, and says in one line what it cannot do."""

import json

import pytest

import tiny

from mmx import config, sharding, train_step
from mmx.checkpoint import Checkpointer
from mmx.data import symbols
from mmx.evals import __main__ as command
from mmx.evals import ruler

TEXT = tiny.experiment(model__vocab_size=257, model__pattern='full/dense')
SYMBOLS = tiny.experiment(
    model__vocab_size=symbols.VOCAB_SIZE, model__pattern='full/dense', data__source='ruler:vt:24',
    data__tokenizer='symbols', data__packing='first_fit',
)


def run_folder(root, experiment):
  """A run folder with a checkpoint of untrained parameters."""
  state = train_step.init_state(experiment, sharding.build_mesh(experiment.mesh))
  root.mkdir(parents=True)
  (root / 'config.gin').write_text(config.dump(experiment))
  checkpoints = Checkpointer(root / 'checkpoints', keep=1)
  checkpoints.save(0, state, None, {})
  checkpoints.close()
  return root


@pytest.fixture(scope='module')
def text_run(tmp_path_factory):
  return run_folder(tmp_path_factory.mktemp('runs') / 'text', TEXT)


@pytest.fixture(scope='module')
def symbol_run(tmp_path_factory):
  return run_folder(tmp_path_factory.mktemp('runs') / 'symbols', SYMBOLS)


def test_checkpoint_of_text_is_asked_in_text(text_run, capsys):
  command.main([f'--checkpoint={text_run}', '--tasks=niah_single', '--lengths=500', '--samples=3', '--batch=2'])
  told = json.loads((text_run / 'ruler.json').read_text())
  cell = told['ruler']['niah_single']['500']
  assert cell['samples'] == 3 and cell['score'] == 0  # untrained
  assert 'niah_single     500  0.000 ± 0.000' in capsys.readouterr().out


def test_checkpoint_in_symbols_answers_every_task(symbol_run, tmp_path, capsys):
  command.main([f'--checkpoint={symbol_run}', '--lengths=40', '--samples=4', f'--json={tmp_path / "out.json"}'])
  told = json.loads((tmp_path / 'out.json').read_text())
  printed = capsys.readouterr().out
  for task in ruler.TASKS:
    assert told['ruler'][task]['40']['samples'] == 4 and task in printed


@pytest.mark.parametrize('options, message', [
    (['--tasks=vtt'], "error: --tasks: unknown task 'vtt'; ruler, or some of niah_single"),
    (['--lengths=4x'], "error: --lengths: '4x' is not a length; write 4k, 4096 or 1M"),
    (['--lengths=64', '--tasks=vt'], 'error: vt in 64 tokens: the question alone takes'),
    (['--samples=0'], 'error: --samples=0: must be positive'),
    (['--checkpoint=nowhere'], 'error: nowhere: no config.gin here'),
    (['--surprise'], 'error: unrecognized arguments: --surprise'),
])
def test_mistakes_end_in_one_line(text_run, options, message):
  with pytest.raises(SystemExit) as told:
    command.main([f'--checkpoint={text_run}', *options])
  assert str(told.value).startswith(message) and '\n' not in str(told.value)


def test_lengths_are_read_as_people_write_them():
  assert [command.tokens(text) for text in ('500', '1k', '128K', '1M')] == [500, 1024, 131072, 1048576]
  assert command.chosen_tasks('vt,ruler') == ['vt', *(task for task in ruler.TASKS if task != 'vt')]
