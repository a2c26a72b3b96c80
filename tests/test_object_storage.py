"""Workdirs that several machines share: gs://, where nothing is ever appended to, and files that many write at once."""

import json
import subprocess
import sys

import bucket
import pytest
from etils import epath

from mmx import metrics, report


@pytest.fixture
def root(tmp_path):
  with bucket.mounted(tmp_path):
    yield epath.Path('gs://bucket/moe')


def result(arm, seed, loss):
  return {'arm': arm, 'seed': seed, 'heldout_loss': loss, 'heldout_bpb': loss, 'steps': 4, 'tokens': 64,
          'curve': {'step': [4], 'tokens': [64], 'heldout_loss': [loss]}}


def rows(folder):
  return [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_what_a_run_says_is_there_when_it_is_flushed_and_when_it_is_closed(root, tmp_path):
  folder = root / 'a' / 'seed0'
  writer = metrics.RunWriter(folder)
  for step in (1, 2, 3):
    writer.scalars(step, {'loss': 1.0 / step})
  assert rows(folder) == [1]  # at once; the next copy after UPLOAD_S
  writer.flush()
  assert rows(folder) == [1, 2, 3]
  writer.scalars(4, {'loss': 0.25})
  writer.close()
  assert rows(folder) == [1, 2, 3, 4]
  assert (tmp_path / 'bucket/moe/a/seed0/metrics.jsonl').exists()

  from tensorboard.backend.event_processing import plugin_event_multiplexer

  served = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory('gs://bucket/moe').Reload()
  assert [event.step for event in served.Tensors('a/seed0', 'loss')] == [1, 2, 3, 4]


def test_a_run_that_continues_keeps_the_rows_up_to_its_checkpoint(root):
  folder = root / 'a' / 'seed0'
  for start, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
    writer = metrics.RunWriter(folder, start)
    for step in steps:
      writer.scalars(step, {'loss': 1.0})
    writer.close()
  assert rows(folder) == [1, 2, 3, 4, 5]


def test_storage_that_fails_for_a_minute_costs_no_step_and_no_row(root, monkeypatch, caplog):
  monkeypatch.setattr(metrics, 'UPLOAD_S', 0)
  writer = metrics.RunWriter(root / 'a')
  writer.scalars(1, {'loss': 1.0})
  with monkeypatch.context() as broken:
    broken.setattr(type(root), 'write_bytes', lambda *_: (_ for _ in ()).throw(ConnectionError('503')))
    writer.scalars(2, {'loss': 1.0})
    with pytest.raises(ConnectionError):
      writer.flush()  # whoever asks for certainty is told
  assert '503' in caplog.text and rows(root / 'a') == [1]
  writer.scalars(3, {'loss': 1.0})
  assert rows(root / 'a') == [1, 2, 3]


def test_the_comparison_is_read_from_and_written_there(root, tmp_path):
  for arm, seed, loss in (('e8', 0, 2.0), ('e8', 1, 2.1), ('e32', 0, 1.5), ('e32', 1, 1.7)):
    metrics.write_whole(root / arm / f'seed{seed}' / 'result.json', json.dumps(result(arm, seed, loss)))
  summary = report.write(root)
  assert [arm.name for arm in summary.arms] == ['e8', 'e32'] and summary.differences[0].seeds == (0, 1)
  assert '| e32' in (root / 'summary.md').read_text()
  assert (root / 'loss_curves.png').read_bytes().startswith(b'\x89PNG')
  assert json.loads((root / 'summary.json').read_text())['differences'][0]['mean'] == pytest.approx(-0.45)
  assert list((root / 'summary').glob('events.*')) and not list(tmp_path.rglob('*.partial'))


WRITE_OFTEN = """
import sys
from mmx import metrics
for _ in range(300):
  metrics.write_whole(sys.argv[1], sys.argv[2] * 100_000)
"""


def test_who_reads_a_file_that_others_write_finds_one_text_whole(tmp_path):
  """As the jobs of a sweep that end together do with summary.md, and the sweep itself."""
  path = tmp_path / 'summary.md'
  path.write_text('c' * 100_000)
  writers = [subprocess.Popen([sys.executable, '-c', WRITE_OFTEN, path, letter]) for letter in 'ab']
  found = {path.read_text()}
  while any(writer.poll() is None for writer in writers):
    found.add(path.read_text())
  assert [writer.returncode for writer in writers] == [0, 0]
  assert found <= {letter * 100_000 for letter in 'abc'} and len(found) > 1
  assert list(tmp_path.iterdir()) == [path]
