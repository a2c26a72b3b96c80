"""What a run writes reads back through TensorBoard's own loaders, also after a resume."""

import io
import json
import math
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import data_provider, event_accumulator, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from mmx import metrics
from mmx.metrics import LateMetrics, Progress, RunWriter, Throughput

PNG = (  # one transparent pixel
    b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\6\0\0\0\x1f\x15\xc4\x89\0\0\0\rIDATx\x9cc\0\1\0\0\5\0\1'
    b'\r\n-\xb4\0\0\0\0IEND\xaeB`\x82'
)


def accumulator(logdir):
  return event_accumulator.EventAccumulator(str(logdir), size_guidance={event_accumulator.TENSORS: 0}).Reload()


def points(logdir, tag):
  return [(event.step, event.value) for event in accumulator(logdir).Scalars(tag)]


def multiplexer(root):
  """What the TensorBoard server holds."""
  return plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(root)).Reload()


def rows(logdir):
  return [json.loads(line) for line in (logdir / 'metrics.jsonl').read_text().splitlines()]


# --- RunWriter --------------------------------------------------------------------------------------------------------


def test_scalars_histograms_text_and_images_read_back(tmp_path):
  writer = RunWriter(tmp_path)
  writer.scalars(10, {'loss': 2.5, 'grad_norm': np.float32(0.5)})
  writer.scalars(20, {'loss': 2.25})
  writer.histogram(20, 'weights', np.array([[0.0, 1.0, math.nan], [3.0, 3.0, math.inf]]))
  writer.text('config', '# Config\n\n| a | b |')
  writer.image(20, 'curve', PNG)
  writer.close()

  events = accumulator(tmp_path)
  assert points(tmp_path, 'loss') == [(10, 2.5), (20, 2.25)]
  assert points(tmp_path, 'grad_norm') == [(10, 0.5)]
  (histogram,) = events.Tensors('weights')
  buckets = np.frombuffer(histogram.tensor_proto.tensor_content, np.float64).reshape(-1, 3)
  assert histogram.step == 20 and buckets[:, 2].sum() == 4 and (buckets[0, 0], buckets[-1, 1]) == (0.0, 3.0)
  assert events.Tensors('config')[0].tensor_proto.string_val[0].decode() == '# Config\n\n| a | b |'
  (image,) = events.Images('curve')
  assert (image.width, image.height, image.encoded_image_string) == (1, 1, PNG)
  found = rows(tmp_path)
  assert [{**row, 'time': 0} for row in found] == [
      {'step': 10, 'time': 0, 'loss': 2.5, 'grad_norm': 0.5}, {'step': 20, 'time': 0, 'loss': 2.25}
  ]
  assert found[0]['time'] > 1.6e9


def test_hparams_tab_has_a_row_per_arm_and_seed_with_final_metrics(tmp_path):
  for arm, experts in (('e32', 32), ('e128', 128)):
    for seed in (0, 1):
      writer = RunWriter(tmp_path / arm / f'seed{seed}')
      hparams = {'arm': arm, 'seed': seed, 'experts': experts, 'tied': False, 'mesh': (1, 2)}
      writer.hparams(hparams, metrics=['heldout_loss'])
      for step, loss in ((10, 9.0), (20, experts + seed)):
        writer.scalars(step, {'loss': 0.0, 'heldout_loss': loss})
      writer.finish(succeeded=(arm, seed) != ('e128', 1))

  provider = data_provider.MultiplexerDataProvider(multiplexer(tmp_path), str(tmp_path))
  plugin = backend_context.Context(base_plugin.TBContext(data_provider=provider))
  names = ('arm', 'seed', 'experts', 'tied', 'mesh')
  shown = [api_pb2.ColParams(hparam=name, include_in_result=True) for name in names]
  request = api_pb2.ListSessionGroupsRequest(
      col_params=shown, slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
  )
  found = list_session_groups.Handler(RequestContext(), plugin, '', request).run()

  groups = {group.name: group for group in found.session_groups}
  assert sorted(groups) == ['e128/seed0', 'e128/seed1', 'e32/seed0', 'e32/seed1']
  finals = {name: {m.name.tag: m.value for m in group.metric_values} for name, group in groups.items()}
  assert finals['e32/seed1'] == {'heldout_loss': 33.0} and finals['e128/seed0'] == {'heldout_loss': 128.0}
  hparams = groups['e128/seed1'].hparams
  assert hparams['arm'].string_value == 'e128' and hparams['experts'].number_value == 128
  assert hparams['tied'].HasField('bool_value') and hparams['mesh'].string_value == '(1, 2)'
  statuses = {name: group.sessions[0].status for name, group in groups.items()}
  assert statuses['e32/seed0'] == api_pb2.STATUS_SUCCESS and statuses['e128/seed1'] == api_pb2.STATUS_FAILURE


def test_resumed_run_shows_nothing_of_the_steps_that_were_lost(tmp_path):
  first = RunWriter(tmp_path)
  first.text('config', 'kept')
  for step in range(10, 60, 10):
    first.scalars(step, {'loss': 1.0, 'first_only': 1.0})
    first.histogram(step, 'load', np.arange(4.0))
  first.close()
  second = RunWriter(tmp_path, start_step=30)
  second.scalars(45, {'loss': 2.0})
  second.close()

  assert points(tmp_path, 'loss') == [(10, 1.0), (20, 1.0), (30, 1.0), (45, 2.0)]
  assert points(tmp_path, 'first_only') == [(10, 1.0), (20, 1.0), (30, 1.0)]
  served = multiplexer(tmp_path)
  assert [event.step for event in served.Tensors('.', 'load')] == [10, 20, 30]
  assert [event.step for event in served.Tensors('.', 'config')] == [0]
  assert [(row['step'], row['loss']) for row in rows(tmp_path)] == points(tmp_path, 'loss')

  third = RunWriter(tmp_path)  # afresh
  third.scalars(5, {'loss': 3.0})
  third.close()
  assert points(tmp_path, 'loss') == [(5, 3.0)] and [row['step'] for row in rows(tmp_path)] == [5]


def test_rows_survive_a_crash_while_they_are_cut_and_a_half_written_line_goes(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  before = '{"step": 10, "loss": 1}\n{"step": 20, "loss": 1}\n{"step": 30, "lo'
  path.write_text(before)

  def crash(*_):
    raise OSError('No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(metrics.os, 'replace', crash)
    with pytest.raises(OSError, match='No space'):
      RunWriter(tmp_path, start_step=10)
  assert path.read_text() == before
  RunWriter(tmp_path, start_step=30).close()
  assert [row['step'] for row in rows(tmp_path)] == [10, 20]


def test_writing_needs_neither_tensorflow_nor_a_jax_import(tmp_path):
  (tmp_path / 'tensorflow.py').write_text('raise SystemExit("tensorflow was imported")')
  script = textwrap.dedent(f"""
      import sys
      sys.path.insert(0, {str(tmp_path)!r})
      from mmx.metrics import RunWriter
      assert not sys.modules.keys() & {{'jax', 'tensorboard', 'matplotlib', 'tqdm'}}
      writer = RunWriter({str(tmp_path / 'run')!r})
      writer.scalars(1, {{'loss': 1.0}})
      writer.expert_load(1, [[1, 2, 3]])
      writer.text('config', 'text')
      writer.image(1, 'image', {PNG!r})
      writer.hparams({{'arm': 'a', 'seed': 0}}, ['loss'])
      writer.flush()
      writer.finish()
      assert 'jax' not in sys.modules
  """)
  subprocess.run([sys.executable, '-c', script], check=True, timeout=60)


# --- expert load ------------------------------------------------------------------------------------------------------


def test_expert_load_is_relative_to_balance_whatever_the_number_of_experts(tmp_path):
  load_LE = np.array([[4, 0, 2, 2, 2], [7, 7, 7, 7, 7], [0, 0, 0, 0, 0]])
  writer = RunWriter(tmp_path)
  writer.expert_load(50, load_LE)
  writer.close()
  events = accumulator(tmp_path)
  assert events.Tags()['tensors'] == ['expert_load/layer_00', 'expert_load/layer_01', 'expert_load/layer_02']
  buckets = np.frombuffer(events.Tensors('expert_load/layer_00')[0].tensor_proto.tensor_content).reshape(-1, 3)
  assert buckets[0, 0] == 0.0 and buckets[-1, 1] == 2.0  # idle, and twice the mean
  assert buckets[:, 2].sum() == 5 and buckets[0, 2] == buckets[-1, 2] == 1

  scalars = metrics.load_scalars(load_LE)
  assert scalars['load_max_over_mean'] == scalars['load_max_over_mean/layer_00'] == 2.0
  assert scalars['load_max_over_mean/layer_01'] == scalars['load_max_over_mean/layer_02'] == 1.0
  assert scalars['idle_experts'] == pytest.approx(1 / 15)
  assert metrics.load_scalars(load_LE / 10) == pytest.approx(scalars)  # shares do as well as counts


# --- the loop ---------------------------------------------------------------------------------------------------------


class Leaf:
  """Stands for an array on the device and records when its copy is started and when it is waited for."""

  def __init__(self, value, log):
    self.value, self.log = value, log

  def copy_to_host_async(self):
    self.log.append(f'start {self.value}')

  def __array__(self):
    self.log.append(f'wait {self.value}')
    return np.asarray(self.value)


def test_metrics_of_a_step_are_waited_for_only_after_the_next_was_dispatched():
  log, late = [], LateMetrics()
  assert late.push(1, {'loss': Leaf(1, log)}) is None
  assert log == ['start 1']
  log.append('dispatch 2')
  step, values = late.push(2, {'loss': Leaf(2, log)})
  assert (step, values) == (1, {'loss': 1})
  assert log.index('dispatch 2') < log.index('start 2') < log.index('wait 1')
  assert 'wait 2' not in log
  assert late.drain() == (2, {'loss': 2})
  assert late.drain() is None


def test_late_metrics_keep_the_tree_and_the_values():
  late, add = LateMetrics(), jax.jit(lambda x: {'loss': x.sum(), 'load': {'layer': x * 2}})
  late.push(3, add(jnp.arange(3.0)))
  step, values = late.drain()
  assert step == 3 and values['loss'] == 3.0
  assert isinstance(values['load']['layer'], np.ndarray) and values['load']['layer'].tolist() == [0.0, 2.0, 4.0]


def test_throughput_counts_training_alone():
  now = [100.0]
  throughput = Throughput(tokens_per_step=1000, flops_per_token=2e6, peak_flops=8e9, window=2, clock=lambda: now[0])
  assert throughput.moving() == throughput.overall() == {}
  for step in (1, 2, 3):  # 1 s a step; the compile before the first tick does not count
    throughput.tick(step)
    now[0] += 1.0
  with throughput.paused():
    now[0] += 60.0
  now[0] += 1.0
  throughput.tick(4)  # 2 s
  assert throughput.overall() == pytest.approx({'tokens_per_second': 750.0, 'mfu': 0.1875})
  assert throughput.moving() == pytest.approx({'tokens_per_second': 2000 / 3, 'mfu': 1 / 6})
  assert 'mfu' not in Throughput(1000).overall()


class Terminal(io.StringIO):
  encoding = 'utf-8'

  def isatty(self):
    return True


def show(progress, now, steps=200):
  for step in range(10, steps + 1, 10):
    progress.update(step, loss=3.0, tokens_per_second=5214.0, heldout_loss=2.5 if step == 50 else None)
    now[0] += 10.0
  progress.close()


def test_progress_prints_plain_lines_where_there_is_no_terminal():
  now, stream = [0.0], io.StringIO()
  show(Progress('e32', 1, 200, run=2, runs=4, stream=stream, clock=lambda: now[0]), now)
  lines = stream.getvalue().splitlines()
  assert len(lines) == 11 and all(line.isprintable() for line in lines)
  assert lines[0] == 'e32/seed1 [2/4]  10/200  loss 3.000  5.21k tok/s'  # nothing is known of the pace yet
  # 1 s a step: 100 s of this run, and 2 runs of 200 s each
  assert lines[5] == 'e32/seed1 [2/4]  100/200  loss 3.000  held-out 2.500  5.21k tok/s  1:40 left, all 8:20'
  assert lines[-1].startswith('e32/seed1 [2/4]  200/200')


def test_progress_draws_one_bar_on_a_terminal(monkeypatch):
  monkeypatch.setenv('COLUMNS', '120')
  now, stream = [0.0], Terminal()
  progress = Progress('e32', 1, 200, start_step=100, stream=stream, clock=lambda: now[0])
  assert 'compiling' in stream.getvalue() and '100/200' in stream.getvalue()
  progress.update(110, loss=3.25, heldout_loss=2.5)
  progress.note('saved')
  now[0] += 20.0
  progress.update(150, loss=3.0, tokens_per_second=5214.0)
  progress.update(150, loss=3.0, tokens_per_second=5214.0, heldout_loss=2.25)
  assert 'held-out 2.250' in stream.getvalue()
  progress.close()
  frames = stream.getvalue().replace('\n', '\r').split('\r')
  assert 'saved' in [frame.strip() for frame in frames]
  last = [frame for frame in frames if frame.strip()][-1]
  assert last.startswith('e32/seed1 █') and '150/200, loss 3.000 held-out 2.250 5.21k tok/s 0:25 left' in last
  assert max(map(len, frames)) < 120


@pytest.mark.parametrize('value, text', [
    (0, '0'), (0.1234, '0.123'), (42, '42'), (812.4, '812'), (999.7, '1.00k'), (5214, '5.21k'), (9996, '10.0k'),
    (81_920, '81.9k'), (999_600, '1.00M'), (17.8e9, '17.8B'), (230e9, '230B'), (1.979e15, '1979T'), (-5214, '-5.21k'),
])
def test_short_numbers_show_three_digits(value, text):
  assert metrics.short_number(value) == text


def test_clock_times_carry_over():
  assert [metrics.clock_time(s) for s in (0, 59.6, 727, 11109)] == ['0:00', '1:00', '12:07', '3:05:09']


def test_memory_stats_are_in_gib():
  memory = metrics.memory_stats()
  assert 0.01 < memory['memory/host'] < 1024
  assert all(key.startswith('memory/') and value >= 0 for key, value in memory.items())
