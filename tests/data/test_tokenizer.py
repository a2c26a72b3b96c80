"""Tokenizers: exact round trips, exact byte counts, refusal of what is no tokenizer."""

import json

import numpy as np
import pytest
import tokenizers

from mmx.config import ConfigError
from mmx.data import tokenizer


def write_bpe(path, texts, special_tokens=('<eos>',), vocab_size=300):
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  model.train_from_iterator(
      texts,
      tokenizers.trainers.BpeTrainer(
          vocab_size=vocab_size, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
      ),
  )
  model.save(str(path))
  return str(path)


@pytest.fixture(scope='module')
def bpe(corpus, tmp_path_factory):
  return tokenizer.load(write_bpe(tmp_path_factory.mktemp('bpe') / 'tokenizer.json', corpus[1]))


def test_byte_tokenizer_makes_an_exact_round_trip_of_any_bytes():
  bytewise = tokenizer.load('byte')
  content = bytes(range(256)) + np.random.default_rng(0).bytes(1000)
  ids = bytewise.encode(content.decode('utf-8', 'surrogateescape'))
  assert ids.dtype == np.int32 and ids.tolist() == list(content)
  assert bytewise.decode(ids).encode('utf-8', 'surrogateescape') == content
  assert (bytewise.vocab_size, bytewise.eos_id) == (257, 256)
  assert bytewise.decode([104, 105, 256]) == 'hi<eos>'


def test_file_tokenizer_makes_an_exact_round_trip(corpus, bpe):
  for text in [*corpus[1], '  two  blanks \n\t', 'never seen: 🦀 Ω', '']:
    ids = bpe.encode(text)
    assert ids.dtype == np.int32 and bpe.decode(ids) == text
    assert not ids.size or ids.max() < bpe.vocab_size


def test_the_name_of_a_special_token_in_a_document_is_plain_text(bpe):
  ids = bpe.encode('before <eos> after')
  assert bpe.eos_id not in ids and bpe.decode(ids) == 'before <eos> after'


@pytest.fixture(scope='module')
def trimming(corpus, tmp_path_factory):
  """A tokenizer that drops the blanks around a text and leaves those around a token out of its offsets."""
  path = tmp_path_factory.mktemp('trimming') / 'tokenizer.json'
  model = tokenizers.Tokenizer.from_file(write_bpe(path, corpus[1]))
  model.normalizer = tokenizers.normalizers.Strip()
  model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  model.save(str(path))
  return tokenizer.load(str(path))


@pytest.mark.parametrize('text', ['plain words', '  lead and trail  ', 'über 猫猫 — 🦀\n', 'x', ''])
def test_byte_lengths_sum_to_the_bytes_of_the_text(bpe, trimming, text):
  for each in (bpe, trimming, tokenizer.load('byte')):
    lengths = each.byte_lengths(text)
    assert lengths.shape == each.encode(text).shape
    assert lengths.sum() == len(text.encode('utf-8')) and (lengths >= 0).all()


def test_fingerprint_follows_the_content_not_the_path(corpus, tmp_path):
  first = write_bpe(tmp_path / 'first.json', corpus[1])
  second = tmp_path / 'second.json'
  second.write_bytes((tmp_path / 'first.json').read_bytes())
  other = write_bpe(tmp_path / 'other.json', corpus[1], vocab_size=290)
  prints = [tokenizer.load(str(path)).fingerprint for path in (first, second, other)]
  assert prints[0] == prints[1] != prints[2] != tokenizer.load('byte').fingerprint


def test_truncation_written_in_the_file_does_not_shorten_documents(corpus, tmp_path):
  path = tmp_path / 'tokenizer.json'
  model = tokenizers.Tokenizer.from_file(write_bpe(path, corpus[1]))
  model.enable_truncation(4)
  model.save(str(path))
  loaded = tokenizer.load(str(path))
  assert loaded.decode(loaded.encode('a long enough text')) == 'a long enough text'


def test_end_of_document_is_found_under_its_known_names(corpus, tmp_path):
  path = write_bpe(tmp_path / 'minimax.json', corpus[1], special_tokens=('<pad>', '[e~['))
  assert tokenizer.load(path).eos_id == 1


def test_bad_tokenizer_ends_in_one_clear_line(corpus, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'minimax'}))
  unended = write_bpe(tmp_path / 'unended.json', corpus[1], special_tokens=('<pad>',))
  for path, message in [
      (tmp_path / 'missing.json', 'no such file'),
      (tmp_path / 'config.json', 'is not a tokenizer.json'),
      (unended, 'no end-of-document token; known are <eos>'),
  ]:
    with pytest.raises(ConfigError, match=message) as caught:
      tokenizer.load(str(path))
    assert '\n' not in str(caught.value) and 'data.tokenizer' in str(caught.value)
