"""The two data scripts on a tiny folder, through their production functions and once from the command line."""

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from mmx.config import ConfigError, DataConfig
from mmx.data import pipeline, sources, tokenizer

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'


@pytest.fixture(scope='module')
def scripts():
  def load(name):
    known = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for flag in set(flags.FLAGS) - known:  # both scripts have a --source
      delattr(flags.FLAGS, flag)
    return module

  return {name: load(name) for name in ('prepare_data', 'train_tokenizer')}


def test_prepared_corpus_holds_the_same_documents_and_split(corpus, scripts, tmp_path):
  root, documents = corpus
  source = f'jsonl:{root / "jsonl"}'
  counts = scripts['prepare_data'].prepare(source, str(tmp_path / 'out'), 3, 'text')
  assert counts == (60, sum(len(document.encode()) for document in documents), 0, 0)
  assert len(list((tmp_path / 'out').iterdir())) == 3
  prepared = sources.open(f'arrayrecord:{tmp_path / "out"}')
  assert sorted(prepared[index] for index in range(len(prepared))) == sorted(documents)
  bytewise = tokenizer.load('byte')
  histograms = []
  for item in (source, prepared.name):
    config = DataConfig(source=item, seq_len=32, batch_size=4, heldout_fraction=0.2)
    batches = pipeline.heldout(config, bytewise, 10_000).batches
    histograms.append(sum(np.bincount(batch['tokens'][batch['segment_ids'] > 0], minlength=257) for batch in batches))
  np.testing.assert_array_equal(*histograms)
  assert next(pipeline.train_iterator(config, bytewise))['loss_mask'].any()


def test_prepare_counts_malformed_and_empty_rows_and_never_overwrites(scripts, tmp_path):
  (tmp_path / 'rows.jsonl').write_text('{"text": "one"}\n{"text"\n{"text": ""}\n{"text": 3}\n')
  prepare = scripts['prepare_data'].prepare
  assert prepare(f'jsonl:{tmp_path}', str(tmp_path / 'out'), 2, 'text') == (1, 3, 1, 2)
  assert sources.open(f'arrayrecord:{tmp_path / "out"}')[0] == 'one'
  with pytest.raises(ConfigError, match='holds ArrayRecord files already'):
    prepare(f'jsonl:{tmp_path}', str(tmp_path / 'out'), 2, 'text')
  (tmp_path / 'rows.jsonl').write_text('{"text"\n')
  with pytest.raises(ConfigError, match='no document in it .0 empty, 1 malformed'):
    prepare(f'jsonl:{tmp_path}', str(tmp_path / 'none'), 2, 'text')
  assert not list((tmp_path / 'none').iterdir())


def test_trained_tokenizer_never_saw_the_heldout_side(scripts, tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  for index in range(60):
    (folder / f'{index:02d}.txt').write_text(f'the quick brown fox number {index}\n' * 4)
  source, output = f'text:{folder}', str(tmp_path / 'tokenizer.json')
  learned = scripts['train_tokenizer'].train(source, 300, output, 'text', 0.3)
  assert learned.vocab_size <= 300 and learned.decode([learned.eos_id]) == '<eos>'
  assert scripts['train_tokenizer'].measure(learned, source, 'text', 0.3) > 2
  assert scripts['train_tokenizer'].measure(learned, source, 'text', 0.0) is None
  everything = scripts['train_tokenizer'].train(source, 400, str(tmp_path / 'all.json'), 'text', 0.0)
  without = scripts['train_tokenizer'].train(source, 400, str(tmp_path / 'some.json'), 'text', 0.3)
  assert everything.fingerprint != without.fingerprint
  config = DataConfig(source=source, tokenizer=output, seq_len=16, batch_size=4, heldout_fraction=0.3)
  heldout = pipeline.heldout(config, tokenizer.load(output), 3)
  assert 1.5 < heldout.bytes_per_token < 8
  batch = next(pipeline.train_iterator(config, learned))
  assert batch['tokens'].max() < learned.vocab_size


def test_bad_tokenizer_flags_are_refused(corpus, scripts, tmp_path):
  train, source = scripts['train_tokenizer'].train, f'text:{corpus[0] / "text"}'
  with pytest.raises(ConfigError, match='at least 257'):
    train(source, 100, str(tmp_path / 'x.json'), 'text', 0.1)
  with pytest.raises(ConfigError, match='folder of .* does not exist'):
    train(source, 300, str(tmp_path / 'missing' / 'x.json'), 'text', 0.1)


@pytest.mark.parametrize('script', ['prepare_data', 'train_tokenizer'])
def test_bad_source_on_the_command_line_is_one_line_and_status_1(script, tmp_path):
  command = [sys.executable, str(SCRIPTS / f'{script}.py'), '--source=text:/no/such', f'--output={tmp_path / "out"}']
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr.strip() == 'error: data.source: text:/no/such: no such file or folder'
  assert not list(tmp_path.iterdir())
