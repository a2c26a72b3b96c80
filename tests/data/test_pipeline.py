"""The stream of batches: the same on any number of processes, restartable at any batch, blind to held-out documents."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave

from mmx.config import ConfigError, DataConfig
from mmx.data import mixture, pipeline, sources, tokenizer

BYTES = tokenizer.load('byte')


@pytest.fixture(scope='module')
def config(corpus):
  return DataConfig(source=f'jsonl:{corpus[0] / "jsonl"}', seq_len=21, batch_size=8, heldout_fraction=0.2)


def mixture_of(corpus):
  return f'text:{corpus[0] / "text"}@0.5 synthetic:mqar@0.2 jsonl:{corpus[0] / "jsonl"}@0.3'


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_same(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    assert batch.keys() == other.keys()
    for name in other:
      np.testing.assert_array_equal(batch[name], other[name])


def differ(batches, others):
  return any((batch['tokens'] != other['tokens']).any() for batch, other in zip(batches, others, strict=True))


@pytest.mark.parametrize('packing', ['concat', 'first_fit', 'best_fit'])
@pytest.mark.parametrize('process_count', [2, 4])
def test_global_order_is_the_same_on_any_number_of_processes(corpus, config, packing, process_count):
  config = dataclasses.replace(config, source=mixture_of(corpus), packing=packing)
  whole = take(pipeline.train_iterator(config, BYTES), 25)
  local = [take(pipeline.train_iterator(config, BYTES, i, process_count), 25) for i in range(process_count)]
  joined = [pipeline.join(blocks) for blocks in zip(*local, strict=True)]
  assert_same(joined, whole)
  assert local[0][0]['tokens'].shape == (8 // process_count, 21)


@pytest.mark.parametrize('packing', ['concat', 'first_fit', 'best_fit'])
@pytest.mark.parametrize('mixed', [False, True])
def test_train_k_batches_and_resume_equals_uninterrupted(corpus, config, packing, mixed):
  config = dataclasses.replace(config, packing=packing)
  if mixed:
    config = dataclasses.replace(config, source=mixture_of(corpus))
  uninterrupted = pipeline.train_iterator(config, BYTES)
  batches, states = [], [json.dumps(uninterrupted.get_state())]
  for _ in range(60):  # past the end of the first epoch
    batches.append(next(uninterrupted))
    states.append(json.dumps(uninterrupted.get_state()))
  for done in (0, 1, 7, 33, 55):
    resumed = pipeline.train_iterator(config, BYTES)
    take(resumed, 3)  # restoring must also undo what this iterator has read and prefetched
    resumed.set_state(json.loads(states[done]))
    assert_same(take(resumed, 5), batches[done : done + 5])
  assert max(map(len, states)) < 300 * config.batch_size


@pytest.mark.parametrize('packing', ['concat', 'best_fit'])
def test_the_states_of_any_number_of_processes_are_one_and_any_number_goes_on_with_it(corpus, config, packing):
  config = dataclasses.replace(config, source=mixture_of(corpus), packing=packing)
  whole = pipeline.train_iterator(config, BYTES)
  take(whole, 9)
  expected = take(pipeline.train_iterator(config, BYTES), 14)[9:]
  state = json.dumps(whole.get_state())
  for saving in (2, 4):
    merged = {}
    for index in range(saving):
      part = pipeline.train_iterator(config, BYTES, index, saving)
      take(part, 9)
      merged |= part.get_state()
    assert json.loads(json.dumps(merged)) == json.loads(state)
  for resuming in (1, 2, 8):
    parts = [pipeline.train_iterator(config, BYTES, index, resuming) for index in range(resuming)]
    for part in parts:
      part.set_state(json.loads(state))
    assert_same([pipeline.join(blocks) for blocks in zip(*(take(part, 5) for part in parts), strict=True)], expected)


def test_a_state_that_lacks_a_row_is_refused_in_one_line(config):
  half = pipeline.train_iterator(config, BYTES, 0, 2).get_state()
  message = r'^data: no position of row 4 was saved, only of row 0, row 1, row 2, ... \(4 in all\); data.batch_size must'
  with pytest.raises(ConfigError, match=message):
    pipeline.train_iterator(config, BYTES).set_state(half)
  with pytest.raises(ConfigError, match='no position of row 0 was saved, only of parents'):  # of an older mmx
    pipeline.train_iterator(config, BYTES).set_state({'parents': []})


def test_state_travels_in_an_orbax_checkpoint(config, tmp_path):
  iterator = pipeline.train_iterator(config, BYTES)
  take(iterator, 6)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(6, args=ocp.args.Composite(data=CheckpointSave(iterator)))
    manager.wait_until_finished()
    expected = take(iterator, 4)
    fresh = pipeline.train_iterator(config, BYTES)
    manager.restore(6, args=ocp.args.Composite(data=CheckpointRestore(fresh)))
  assert_same(take(fresh, 4), expected)


def test_data_seed_decides_the_order_and_every_epoch_has_its_own(config):
  first, second, other = (
      take(pipeline.train_iterator(dataclasses.replace(config, seed=seed), BYTES), 4) for seed in (0, 0, 1)
  )
  assert_same(first, second)
  assert differ(first, other)


def passages_in(batches):
  """The texts of all segments."""
  for batch in batches:
    for row in range(len(batch['tokens'])):
      for number in range(1, batch['segment_ids'][row].max() + 1):
        yield BYTES.decode(batch['tokens'][row, batch['segment_ids'][row] == number])


def test_heldout_documents_never_reach_training(corpus, config):
  # Every document begins with a line of its own.
  config = dataclasses.replace(config, seq_len=64)
  first_lines = {document.split('\n')[0] for document in corpus[1]}

  def seen(batches):
    ended = (text.replace('<eos>', '\n').split('\n', 1) for text in passages_in(batches))
    return first_lines & {parts[0] for parts in ended if len(parts) == 2}  # a row's end may cut 'document 13' to 1

  trained = seen(take(pipeline.train_iterator(config, BYTES), 150))
  evaluated = seen(pipeline.heldout(config, BYTES, 100).batches)
  assert len(trained) > 20 and len(evaluated) > 3
  assert not trained & evaluated


def test_heldout_is_the_same_for_every_seed_and_number_of_processes(corpus, config):
  config = dataclasses.replace(config, source=f'text:{corpus[0] / "text"} jsonl:{corpus[0] / "jsonl"}')
  whole = pipeline.heldout(config, BYTES, 3)
  assert len(whole.batches) == 3
  other_seed = pipeline.heldout(dataclasses.replace(config, seed=9), BYTES, 3)
  assert_same(other_seed.batches, whole.batches)
  halves = [pipeline.heldout(config, BYTES, 3, index, 2) for index in range(2)]
  assert_same([pipeline.join(pair) for pair in zip(*(half.batches for half in halves), strict=True)], whole.batches)
  assert {half.bytes_per_token for half in halves} == {whole.bytes_per_token}


def test_heldout_rows_follow_the_weights_and_a_tiny_part_does_not_end_them(corpus, config, tmp_path):
  (tmp_path / 'tiny.txt').write_text('a single tiny document')
  source = f'jsonl:{corpus[0] / "jsonl"}@3 text:{tmp_path}@1'
  whole = pipeline.heldout(dataclasses.replace(config, source=source), BYTES, 4)
  rows = sum((batch['segment_ids'][:, 0] > 0).sum() for batch in whole.batches)
  assert 24 <= rows <= 25  # three quarters of 32, and the tiny part's own row if it is held out


def test_heldout_reads_each_document_once_and_pads_the_last_batch(corpus, config):
  heldout = pipeline.heldout(config, BYTES, 10_000)
  texts = list(mixture.documents(sources.open(config.source), config.heldout_fraction, 'heldout'))
  tokens = np.concatenate([batch['tokens'][batch['segment_ids'] > 0] for batch in heldout.batches])
  assert len(tokens) == sum(len(text.encode()) + 1 for text in texts)
  assert (tokens == BYTES.eos_id).sum() == len(texts)
  assert all(batch['tokens'].shape == (8, 21) for batch in heldout.batches)


@pytest.mark.parametrize('packing', ['concat', 'best_fit'])
def test_bytes_per_token_counts_exactly_the_targets_that_are_scored(config, packing):
  heldout = pipeline.heldout(dataclasses.replace(config, packing=packing), BYTES, 10_000)
  targets = np.concatenate([batch['targets'][batch['loss_mask'] > 0] for batch in heldout.batches])
  assert heldout.bytes_per_token == pytest.approx((targets != BYTES.eos_id).mean(), abs=1e-12)
  assert 0.9 < heldout.bytes_per_token < 1


def test_worker_processes_do_not_change_the_batches(config):
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['test'])
  workers = pipeline.train_iterator(dataclasses.replace(config, num_workers=2), BYTES)
  alone = pipeline.train_iterator(config, BYTES)
  assert_same(take(workers, 3), take(alone, 3))
  state = json.loads(json.dumps(workers.get_state()))
  workers.close()
  resumed = pipeline.train_iterator(dataclasses.replace(config, num_workers=2), BYTES)
  resumed.set_state(state)
  assert_same(take(resumed, 3), take(alone, 3))
  resumed.close()


def test_malformed_rows_are_left_out_and_the_rest_is_trained_on(tmp_path):
  rows = [json.dumps({'text': f'document {index}'}) for index in range(20)]
  rows[3:3] = ['{broken', '[]']
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(rows))
  config = DataConfig(source=f'jsonl:{path}', seq_len=13, batch_size=2, packing='first_fit', heldout_fraction=0.0)
  texts = {text.removesuffix('<eos>') for text in passages_in(take(pipeline.train_iterator(config, BYTES), 120))}
  assert {f'document {index}' for index in range(20)} <= texts
  assert not any('broken' in text or '[' in text for text in texts)


@pytest.mark.parametrize(('fraction', 'side'), [(1.0, 'train'), (0.0, 'heldout')])
def test_a_side_without_documents_is_refused(config, fraction, side):
  config = dataclasses.replace(config, heldout_fraction=fraction)
  with pytest.raises(ConfigError, match='heldout_fraction') as caught:
    pipeline.train_iterator(config, BYTES) if side == 'train' else pipeline.heldout(config, BYTES, 1)
  assert '60 document' in str(caught.value) and '\n' not in str(caught.value)


def test_rows_that_do_not_divide_by_processes_are_refused(config):
  with pytest.raises(ConfigError, match='batch_size = 8 does not divide by 3'):
    pipeline.train_iterator(config, BYTES, 0, 3)


def test_importing_the_pipeline_stays_light():
  code = 'import mmx.data.pipeline, sys; print(*sys.modules)'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  heavy = {'tensorflow', 'tokenizers', 'matplotlib'}  # grain brings jax, orbax and array_record itself
  assert not heavy & set(done.stdout.split())


def test_fingerprint_follows_the_corpus_and_the_tokenizer_not_the_seed(corpus, config):
  line = pipeline.fingerprint(config, BYTES)
  assert '60 documents' in line and '\n' not in line and str(corpus[0]) not in line
  assert line == pipeline.fingerprint(dataclasses.replace(config, seed=5), BYTES)
  assert line != pipeline.fingerprint(dataclasses.replace(config, source='synthetic:copy'), BYTES)
