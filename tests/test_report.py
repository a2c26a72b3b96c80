"""The comparison is honest: paired by seed, with an interval, and it says in words what one cannot tell."""

import io
import json
import math

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from tensorboard.backend.event_processing import event_accumulator

from mmx import report
from mmx.report import Result

PUBLISHED = '| | 32/2 | 128/8 |\n|---|---|---|\n| MMLU | 39.8 | 40.2 |'


def result(arm, seed, loss, **values):
  return Result(arm, seed, {'arm': arm, 'seed': seed, 'heldout_loss': loss, **values})


def arm_results(arm, losses, **values):
  return [result(arm, seed, loss, **values) for seed, loss in enumerate(losses)]


def full_values(arm, seed, loss, **values):
  steps = [0, 50, 100, 150]
  losses = [loss + 3 * math.exp(-step / 40) for step in steps[:-1]] + [loss]
  return {
      'arm': arm, 'seed': seed, 'steps': 150, 'tokens': 614_400, 'heldout_loss': loss,
      'heldout_bpb': loss / math.log(2), 'train_loss': loss,
      'tokens_per_second': 5214.0, 'mfu': 0.41, 'flops_per_token': 7e6, 'load_max_over_mean': 4.7,
      'router_entropy': 0.9, 'device': 'cpu (2 cores)', 'corpus': 'stdlib (12.1 MB)', 'wall_seconds': 140.0,
      'params': {'total': 6_460_000, 'active': 1_200_000, 'active_without_router': 1_190_000, 'router': 10_000},
      'curve': {'step': steps, 'tokens': [4096 * step for step in steps], 'heldout_loss': losses}, 'versions': {},
      **values,
  }


def save(root, values):
  folder = root / values['arm'] / f'seed{values["seed"]}'
  folder.mkdir(parents=True)
  (folder / 'result.json').write_text(json.dumps(values))


# --- statistics -------------------------------------------------------------------------------------------------------


def test_interval_is_that_of_the_paired_t_test():
  ours, theirs = [2.11, 2.19, 2.02, 2.4, 2.2], [2.1, 2.15, 2.03, 2.31, 2.18]
  (difference,) = report.summarize(arm_results('a', theirs) + arm_results('b', ours)).differences
  expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
  assert difference.seeds == (0, 1, 2, 3, 4)
  assert difference.mean - difference.half_width == pytest.approx(expected.low)
  assert difference.mean + difference.half_width == pytest.approx(expected.high)
  assert difference.beyond_noise == (expected.low > 0 or expected.high < 0)


def test_pairing_takes_out_what_seeds_have_in_common():
  shared = np.array([0.5, -0.5, 0.1])  # a hundred times the difference
  results = arm_results('a', 2 + shared) + arm_results('b', 2 + shared - [0.004, 0.005, 0.006])
  (difference,) = report.summarize(results).differences
  assert difference.beyond_noise and difference.mean == pytest.approx(-0.005)


def test_pairs_go_by_seed_whatever_the_order_of_the_results():
  results = [result('a', 7, 1.0), result('a', 3, 2.0), result('b', 3, 2.5), result('b', 9, 100.0), result('b', 7, 1.25)]
  summary = report.summarize(results)
  (difference,) = summary.differences
  assert difference.seeds == (3, 7) and difference.mean == pytest.approx(0.375)
  assert any('b and a do not share seeds [9]' in note for note in summary.notes)


@pytest.mark.parametrize('mean, deviation', [(0.003, 0.004), (0.003, 0.03), (1.0, 0.01), (-0.5, 0.5)])
def test_seeds_needed_is_the_first_count_that_clears_the_interval(mean, deviation):
  def clears(count):
    return scipy.stats.t.ppf(0.975, count - 1) * deviation / math.sqrt(count) < abs(mean)

  needed = report.seeds_needed(mean, deviation)
  assert clears(needed) and (needed == 2 or not clears(needed - 1))


def test_no_number_of_seeds_is_promised_where_none_is_known():
  assert report.seeds_needed(0.0, 0.1) is None
  assert report.seeds_needed(1e-9, 0.1) is None
  assert report.seeds_needed(math.nan, math.nan) is None
  assert report.seeds_needed(0.1, math.nan) is None


# --- words ------------------------------------------------------------------------------------------------------------


def test_sentence_says_larger_than_the_noise_only_when_the_interval_excludes_zero():
  larger, = report.summarize(arm_results('a', [2.0, 2.1, 2.2]) + arm_results('b', [1.9, 2.001, 2.099])).sentences()
  assert larger.startswith('b is lower than a by 0.1000 ± 0.0025 nats per token (95% CI, 3 paired seeds)')
  assert larger.endswith('larger than the noise.')
  drowned, = report.summarize(arm_results('a', [2.0, 2.1, 2.2]) + arm_results('b', [2.1, 2.1, 2.21])).sentences()
  assert 'b is higher than a by 0.0367 ± 0.1368' in drowned
  assert 'not distinguishable from the noise; at this spread about 12 seeds would be needed' in drowned
  assert 'larger' not in drowned


def test_one_seed_cannot_tell():
  summary = report.summarize(arm_results('a', [2.0]) + arm_results('b', [1.0]))
  assert not summary.differences[0].beyond_noise
  sentence, = summary.sentences()
  assert 'b is lower than a by 1.0000 nats per token with one seed: one seed cannot tell' in sentence
  assert '-1.0000 one seed' in summary.to_terminal()


def test_arms_without_a_common_seed_are_not_compared():
  summary = report.summarize([result('a', 0, 2.0), result('b', 1, 1.0)])
  assert summary.sentences() == ['b and a have no seed in common: they cannot be compared.']
  assert 'no common seed' in summary.to_markdown()


def test_a_run_that_diverged_is_left_out_and_named():
  results = arm_results('a', [2.0, 2.1, 2.2]) + arm_results('b', [2.0, math.nan, 2.1])
  summary = report.summarize(results)
  assert summary.arms[1].seeds == (0, 2) and summary.arms[1].mean == pytest.approx(2.05)
  assert any('b seed 1 has no finite heldout_loss' in note for note in summary.notes)


@pytest.mark.parametrize('key, there, expected', [
    ('tokens', 700_000, 'tokens differs between runs (614400, 700000): the arms did not train equally long'),
    ('corpus', 'other', 'corpus differs between runs (other, stdlib (12.1 MB)): the arms did not read the same text'),
    ('device', 'gpu', 'device differs between runs (cpu (2 cores), gpu): tokens/s is not comparable'),
    ('params', {'total': 6_600_000, 'active': 1_200_000}, 'b has +2.2% total parameters: not an equal-size comparis'),
    (
        'params', {'total': 6_460_000, 'active': 1_230_000, 'active_without_router': 1_190_000},
        'b has +2.5% active parameters, +0.0% without its router.',
    ),
])
def test_an_unfair_comparison_is_called_so(key, there, expected):
  fair = [Result('a', 0, full_values('a', 0, 2.0)), Result('b', 0, full_values('b', 0, 2.0))]
  assert report.summarize(fair).notes == ()
  unfair = [fair[0], Result('b', 0, full_values('b', 0, 2.0, **{key: there}))]
  assert any(note.startswith(expected) for note in report.summarize(unfair).notes)


def test_many_comparisons_are_warned_of():
  results = arm_results('a', [2.0]) + arm_results('b', [2.0]) + arm_results('c', [2.0])
  assert any('2 comparisons at 95%' in note for note in report.summarize(results).notes)


def test_published_figures_stand_apart_and_are_not_called_a_replication():
  results = arm_results('a', [2.0]) + arm_results('b', [2.0])
  summary = report.summarize(results, published=PUBLISHED)
  for text in (summary.to_markdown(), summary.to_terminal()):
    assert PUBLISHED in text and 'neither replicate nor refute it' in ' '.join(text.split())
  assert 'replicate' not in report.summarize(results).to_markdown()


# --- tables -----------------------------------------------------------------------------------------------------------


def three_arms(tmp_path):
  for arm, offset, speed in (('e32_top2', 0.0, 9300.0), ('e128_top8', 0.003, 8010.0), ('e8_top1', 0.05, 9000.0)):
    for seed in range(3):
      save(tmp_path, full_values(arm, seed, 2.1 + offset + 0.001 * seed * len(arm), tokens_per_second=speed))
  return ['e32_top2', 'e128_top8', 'e8_top1']


def test_terminal_table_fits_and_markdown_table_is_square(tmp_path):
  summary = report.summarize(report.load_results(tmp_path, three_arms(tmp_path)), docs='Do finer experts help?\n\nWhy.')
  terminal = summary.to_terminal()
  assert max(map(len, terminal.splitlines())) <= 96
  assert terminal.startswith('Do finer experts help?\n150 steps, 614,400 tokens a run, corpus stdlib (12.1 MB), on cpu')
  row = next(line for line in terminal.splitlines() if line.startswith('e128_top8'))
  assert row.split()[:5] == ['e128_top8', '3', '2.1120', '±', '0.0090']
  assert '8.01k ×0.86' in terminal and '6.46M ×1.000' in terminal and '41.0%' in terminal
  markdown = summary.to_markdown()
  assert markdown.startswith('# Do finer experts help?\n\nWhy.\n')
  for table in (block for block in markdown.split('\n\n') if block.startswith('|')):
    assert len({line.count('|') for line in table.splitlines()}) == 1 and len({*map(len, table.splitlines())}) == 1


def test_small_differences_keep_two_digits_of_their_interval():
  results = arm_results('a', [2.0, 2.0, 2.0]) + arm_results('b', [2.000001, 2.000002, 2.000003])
  assert '0.0000020 ± 0.0000025' in report.summarize(results).sentences()[0]


def test_json_is_strict_and_complete(tmp_path):
  summary = report.summarize(report.load_results(tmp_path, three_arms(tmp_path)))

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  content = json.loads(summary.to_json(), parse_constant=refuse)
  assert [arm['name'] for arm in content['arms']] == ['e32_top2', 'e128_top8', 'e8_top1']
  assert content['differences'][1]['mean'] == pytest.approx(summary.differences[1].mean)
  assert content['differences'][1]['beyond_noise'] is summary.differences[1].beyond_noise
  assert content['sentences'] == summary.sentences()
  json.loads(report.summarize(arm_results('a', [2.0]) + arm_results('b', [1.0])).to_json(), parse_constant=refuse)


def test_other_metrics_compare_too_and_missing_numbers_leave_no_empty_column():
  results = [result('a', 0, 2.0, accuracy=0.5), result('b', 0, 2.0, accuracy=0.75)]
  summary = report.summarize(results, metric='accuracy')
  assert summary.sentences()[0].startswith('b is higher than a by 0.2500 with one seed')
  assert 'MFU' not in summary.to_terminal() and 'bits/byte' not in summary.to_terminal()


# --- files ------------------------------------------------------------------------------------------------------------


def test_results_load_in_the_order_asked_for_or_in_natural_order(tmp_path):
  arms = three_arms(tmp_path)
  assert [(r.arm, r.seed) for r in report.load_results(tmp_path, arms)] == [(a, s) for a in arms for s in range(3)]
  assert list(dict.fromkeys(r.arm for r in report.load_results(tmp_path))) == ['e8_top1', 'e32_top2', 'e128_top8']
  assert {r.arm for r in report.load_results(tmp_path, ['e32_top2', 'unfinished'])} == {'e32_top2'}


@pytest.mark.parametrize('text', ['{"arm": "a", "se', '[]', '{"arm": "a"}', '{"arm": "a", "seed": "x"}'])
def test_a_file_that_is_no_result_is_named_in_one_line(tmp_path, text):
  folder = tmp_path / 'a' / 'seed0'
  folder.mkdir(parents=True)
  (folder / 'result.json').write_text(text)
  with pytest.raises(report.ReportError, match='a/seed0/result.json: not a result') as error:
    report.load_results(tmp_path)
  assert '\n' not in str(error.value)


def test_nothing_to_compare_is_said(tmp_path):
  with pytest.raises(report.ReportError, match='no finished run; expected <arm>/seed<k>/result.json'):
    report.load_results(tmp_path)
  with pytest.raises(report.ReportError, match="no run has a finite 'heldout_loss'"):
    report.summarize([result('a', 0, math.nan)])


def test_write_leaves_table_json_figure_and_a_tensorboard_run(tmp_path):
  arms = three_arms(tmp_path)
  summary = report.write(tmp_path, docs='Title', published=PUBLISHED, arms=arms)
  report.write(tmp_path, docs='Title again', arms=arms)
  assert (tmp_path / 'summary.md').read_text().startswith('# Title again')
  assert json.loads((tmp_path / 'summary.json').read_text())['sentences'] == summary.sentences()
  events = event_accumulator.EventAccumulator(str(tmp_path / 'summary')).Reload()
  assert '# Title again' in events.Tensors('comparison')[-1].tensor_proto.string_val[0].decode()
  (image,) = events.Images('loss_curves')
  assert image.encoded_image_string == (tmp_path / 'loss_curves.png').read_bytes()
  assert len(report.load_results(tmp_path)) == 9  # what was written is not taken for an arm


# --- figure -----------------------------------------------------------------------------------------------------------


def pixels(results):
  return matplotlib.image.imread(io.BytesIO(report.figure(results)))[..., :3]


def share(image, colour):
  """Share of pixels of an exact colour."""
  rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  return float((np.round(image * 255) == rgb).all(axis=-1).mean())


def test_figure_draws_each_arm_and_the_difference_panel(tmp_path):
  arms = three_arms(tmp_path)
  image = pixels(report.load_results(tmp_path, arms))
  height, width, _ = image.shape
  for colour in report.COLOURS[:3]:
    assert share(image[:, : width // 2], colour) > 1e-4
  assert share(image[:, width // 2 :], report.COLOURS[0]) == 0  # the reference is the zero line
  assert share(image[:, width // 2 :], report.COLOURS[1]) > 1e-4
  alone = pixels(report.load_results(tmp_path, arms[:1]))
  assert alone.shape[1] < width and share(alone, report.COLOURS[0]) > 1e-4


def test_figure_stands_one_seed_short_curves_and_missing_ones():
  short = full_values('b', 0, 2.0, curve={'step': [0, 50], 'tokens': [0, 4096 * 50], 'heldout_loss': [5.0, None]})
  results = [Result('a', 0, full_values('a', 0, 2.1)), Result('a', 1, full_values('a', 1, 2.2)), Result('b', 0, short)]
  results.append(result('c', 0, 2.0))
  assert pixels(results).std() > 0.01
