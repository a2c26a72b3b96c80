"""The table of task x length x arm says what the results say, with intervals paired by seed, and is drawn."""

import io
import json

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from tensorboard.backend.event_processing import event_accumulator

from mmx import report
from mmx.evals.report import Table, append
from mmx.report import Result

FULL, WINDOW = [0.98, 0.97, 0.99], [0.61, 0.66, 0.70]


def scored(vt, needle=None):
  cell = lambda score: {'score': score, 'half_width': 0.05, 'samples': 128}
  return {'vt': {'128': cell(vt), '512': cell(vt / 2)}} | ({'cwe': {'128': cell(needle)}} if needle is not None else {})


def results(**arms):
  runs = [(arm, seed, score) for arm, scores in arms.items() for seed, score in enumerate(scores)]
  return [Result(arm, seed, {'ruler': scored(score)}) for arm, seed, score in runs]


def test_cells_hold_the_mean_and_interval_over_seeds():
  rows = Table(results(full=FULL, window=WINDOW)).scores()
  assert rows[0] == ['task', 'length', 'full', 'window']
  assert [row[:2] for row in rows[1:]] == [['vt', '128'], ['vt', '512']]
  low, high = scipy.stats.t.interval(0.95, 2, np.mean(WINDOW), scipy.stats.sem(WINDOW))
  assert rows[1][3] == f'{np.mean(WINDOW):.3f} ± {(high - low) / 2:.3f}'


def test_one_seed_shows_the_interval_over_its_documents():
  assert Table(results(full=[0.9])).scores()[1] == ['vt', '128', '0.900 ± 0.050']


def test_differences_are_paired_by_seed_and_a_star_says_beyond_noise():
  rows = Table(results(full=FULL, window=WINDOW, twin=[0.97, 0.98, 0.99])).differences()
  assert rows[0] == ['task', 'length', 'window − full', 'twin − full']
  interval = scipy.stats.ttest_rel(WINDOW, FULL).confidence_interval(0.95)
  assert rows[1][2] == f'{np.mean(WINDOW) - np.mean(FULL):+.3f} ± {(interval.high - interval.low) / 2:.3f}*'
  assert not rows[1][3].endswith('*')


def test_ranking_orders_the_arms_and_tells_what_is_noise():
  table = Table(results(window=WINDOW, full=FULL, twin=[0.97, 0.98, 0.99]))
  assert table.rankings()[0] == 'vt at 128: full 0.980 ≈ twin 0.980 > window 0.657'


def test_a_task_that_only_some_arms_have_leaves_their_column_empty():
  found = [Result('full', 0, {'ruler': scored(0.9)}), Result('window', 0, {'ruler': scored(0.5, needle=0.2)})]
  table = Table(found)
  assert table.scores()[3] == ['cwe', '128', '', '0.200 ± 0.050']
  assert table.differences()[3] == ['cwe', '128', '']
  assert table.rankings()[2] == 'cwe at 128: window 0.200'
  assert table.heat_map()


def test_runs_without_scores_are_left_out():
  found = [*results(full=FULL), Result('plain', 0, {'heldout_loss': 2.0})]
  assert Table(found).arms == ['full']


def save(root, arm, seed, values):
  folder = root / arm / f'seed{seed}'
  folder.mkdir(parents=True)
  (folder / 'result.json').write_text(json.dumps({'arm': arm, 'seed': seed, 'heldout_loss': 1.0, **values}))


def test_append_adds_to_what_the_comparison_wrote(tmp_path):
  for arm, scores in (('full', FULL), ('window', WINDOW)):
    for seed, score in enumerate(scores):
      save(tmp_path, arm, seed, {'ruler': scored(score)})
  summary = report.write(tmp_path, 'ruler.vt.128.score', '| published |', 'Title', ['full', 'window'])
  assert summary.differences[0].mean == pytest.approx(np.mean(WINDOW) - np.mean(FULL))
  before = (tmp_path / 'summary.md').read_text()
  terminal = append(tmp_path, ['full', 'window'])
  after = (tmp_path / 'summary.md').read_text()
  assert after.startswith(before) and '(ruler.png)' in after and 'window − full' in after
  assert max(map(len, terminal.splitlines())) <= report.COLUMNS and 'vt at 512: full 0.490 > window 0.328' in terminal
  told = json.loads((tmp_path / 'summary.json').read_text())
  assert told['metric'] == 'ruler.vt.128.score' and told['ruler'][0]['scores'] == {'0': 0.98, '1': 0.97, '2': 0.99}

  events = event_accumulator.EventAccumulator(str(tmp_path / 'summary' / 'ruler')).Reload()
  png = events.Images('ruler')[0].encoded_image_string
  assert png == (tmp_path / 'ruler.png').read_bytes()
  assert matplotlib.image.imread(io.BytesIO(png)).std() > 0
  assert event_accumulator.EventAccumulator(str(tmp_path / 'summary')).Reload().Images('loss_curves')


def test_append_writes_nothing_where_no_run_has_scores(tmp_path):
  save(tmp_path, 'full', 0, {})
  assert append(tmp_path) == '' and not list(tmp_path.glob('ruler*'))
