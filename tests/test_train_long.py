"""Long runs through the command: little lost between checkpoints, spikes skipped, time accounted for."""

import errno
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from etils import epath

import bucket
from mmx import checkpoint, distributed, metrics
from mmx.data import pipeline
from mmx.goodput import KINDS
from test_train import (  # noqa: F401 (fixtures)
    compiled, here, one_run, place, poisoned_at, result, rows, saved, settings, train,
)  # fmt: skip


def local(tmp_path, every=3):
  return settings(train__local_checkpoint_every=every, train__local_checkpoint_dir=tmp_path)


def seconds(folder):
  return result(folder)['goodput']['seconds']


@pytest.mark.slow
@pytest.mark.parametrize('damaged', [False, True])
def test_the_newest_whole_checkpoint_of_both_places_is_continued(one_run, place, tmp_path, damaged):  # noqa: F811
  found, folder = one_run(poisoned_at(7), *local(tmp_path))
  assert found.startswith('step 8: ') and saved(folder)[0] == 4
  (own,) = tmp_path.rglob('process0')
  assert [path.name for path in own.iterdir()] == ['00000006']
  if damaged:
    (own / '00000006/metadata.json').write_text('{}')
  assert one_run(None, *local(tmp_path))[0] is None
  assert result(folder)['started_at_step'] == (4 if damaged else 6)
  assert rows(folder) == rows(place / 'compiled_once/coarse/seed0')
  assert not own.exists()  # of no use any more

  told = result(folder)['goodput']
  assert told['attempts'] == 2 and 0 < told['share'] < 1 and set(told['seconds']) == set(KINDS)
  assert (told['seconds']['repeated'] > 0) == damaged  # steps 5 and 6
  assert min(told['seconds'][kind] for kind in ('steps', 'startup', 'restore', 'checkpoint', 'evaluation')) > 0


def test_a_run_that_begins_anew_forgets_the_old_ones_local_checkpoint(one_run, tmp_path):  # noqa: F811
  _, folder = one_run(poisoned_at(7), *local(tmp_path))
  shutil.rmtree(folder)
  assert one_run(None, *local(tmp_path))[0] is None
  assert result(folder)['started_at_step'] == 0


def test_goodput_is_told_at_every_scalar_and_adds_up(compiled, place):  # noqa: F811
  folder = place / 'compiled_once/coarse/seed0'
  told = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  shares = [{tag: row[tag] for tag in row if tag.startswith('goodput/')} for row in told if 'loss' in row]
  assert len(shares) == 4 and all(share.keys() == {f'goodput/{kind}' for kind in KINDS} for share in shares)
  assert all(sum(share.values()) == pytest.approx(1) for share in shares)
  assert sum(seconds(folder).values()) == pytest.approx(result(folder)['wall_seconds'], rel=0.1, abs=0.2)


def test_a_window_of_the_profiler_lies_where_tensorboard_looks_for_it(one_run, capfd):  # noqa: F811
  found, folder = one_run(None, '--profile=6:8')
  assert found is None and list(folder.glob('plugins/profile/*/*.xplane.pb'))
  assert 'tracing steps 6 to 7 into ' in capfd.readouterr().err


def test_a_full_disk_is_told_with_the_folder_that_is_on_it(one_run, monkeypatch):  # noqa: F811
  def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(metrics.RunWriter, 'scalars', no_room)
  found, folder = one_run()
  assert found.startswith(f'[Errno {errno.ENOSPC}] No space left on device: ') and 'coarse/seed0' in found


def test_a_second_job_on_a_run_is_refused_and_harms_nothing(one_run, place):  # noqa: F811
  first, folder = one_run(poisoned_at(5))
  before = sorted(path for path in folder.rglob('*'))
  with distributed.claim(folder):
    found, _ = one_run()
  assert str(folder.relative_to(place)) in found and sorted(folder.rglob('*')) == before
  assert one_run()[0] is None


def test_a_run_lives_in_object_storage(train, here, compiled, place, tmp_path, monkeypatch):  # noqa: F811
  """All but the arrays, which Orbax writes to gs:// without the layer that stands in for it here."""
  (programs,), _ = compiled
  make = checkpoint.Checkpointer
  on_disk = lambda directory, *rest, **named: make(str(directory).replace('gs://', f'{tmp_path}/'), *rest, **named)
  monkeypatch.setattr(train, 'Programs', lambda experiment: programs)
  monkeypatch.setattr(checkpoint, 'Checkpointer', on_disk)
  with bucket.mounted(tmp_path):
    command = '--workdir=gs://ours/moe', '--arm=coarse', '--seeds=0', *local(tmp_path / 'local')
    assert here(*command) is None
    folder = epath.Path('gs://ours/moe/coarse/seed0')
    told = json.loads((folder / 'result.json').read_text())
    assert told['steps'] == 12 and json.loads((folder / 'goodput.json').read_text())['step'] == 12
    assert here(*command) is None  # finished: its config is read back, and nothing is run
    assert json.loads((folder / 'result.json').read_text()) == told
    assert 'train.steps = 20' in here(*command, *settings(train__steps=20)).replace('12, this one ', 'train.steps = ')


# --- spikes -----------------------------------------------------------------------------------------------------------


def nan_at(make, steps):
  """`pipeline.train_iterator` whose batches of these steps hold NaN."""

  class Broken:
    def __init__(self, *args):
      self.iterator, self.step = make(*args), 0

    def __next__(self):
      self.step += 1
      batch = next(self.iterator)
      return batch | {'loss_mask': batch['loss_mask'] * np.float32(np.nan)} if self.step in steps else batch

    def __getattr__(self, name):
      return getattr(self.iterator, name)

  return Broken


@pytest.fixture(scope='module')
def skipping(train, here, place):  # noqa: F811
  """skipping(workdir, steps): a run that skips the NaN batches of these steps; the line it fails with, its folder."""
  programs = functools.cache(train.Programs)  # of equal experiments

  def run(workdir, steps):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(train, 'Programs', programs)
      patch.setattr(pipeline, 'train_iterator', nan_at(pipeline.train_iterator, steps))
      flags = settings(train__skip_spikes=True, train__max_skips=3, train__log_every=1)
      return here(f'--workdir={workdir}', '--arm=coarse', '--seeds=0', *flags), place / workdir / 'coarse/seed0'

  return run


def test_a_nan_batch_is_skipped_told_and_counted(skipping, capfd):
  found, folder = skipping('skipped', {7, 9, 10})
  assert found is None
  lines = [line for line in capfd.readouterr().err.splitlines() if 'spike' in line]
  assert lines == [f'step {step}: spike, loss nan, gradient norm nan; its batch is skipped' for step in (7, 9, 10)]
  told = {row['step']: row for row in rows(folder) if 'loss' in row}
  assert [told[step]['skipped'] for step in range(6, 13)] == [0, 1, 1, 2, 3, 3, 3]
  assert all(np.isnan(told[step]['loss']) == (step in (7, 9, 10)) for step in told)
  assert np.isfinite(result(folder)['train_loss']) and all(np.isfinite(leaf).all() for leaf in saved(folder)[1])


def test_too_many_skips_in_a_row_end_the_run(skipping):
  found, folder = skipping('endless', set(range(6, 100)))
  assert found == 'step 8: 3 batches skipped in a row, the last one with loss nan, gradient norm nan'
  assert not (folder / 'result.json').exists()
  step, arrays, _ = saved(folder)
  assert step == 4 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays))
