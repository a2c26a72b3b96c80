"""Every kind of source gives its documents by index; what cannot be read is reported, counted and left out."""

import json
import logging
import pickle
import time

import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.data import sources, synthetic


def read_all(source):
  return [source[index] for index in range(len(source))]


def test_stdlib_is_real_code_without_tests_or_duplicates_in_a_fixed_order():
  start = time.perf_counter()
  source = sources.open('stdlib')
  assert time.perf_counter() - start < 2.0
  documents = read_all(source)
  assert len(documents) == len(set(documents)) > 400
  assert 5e6 < source.stored_bytes == sum(len(document.encode()) for document in documents) < 5e7
  assert any('class OrderedDict(dict)' in document for document in documents)
  assert not any('class TestOrderedDict' in document or 'class OrderedDictTests' in document for document in documents)
  again = sources.open('stdlib')
  assert again.fingerprint == source.fingerprint and again[17] == documents[17]


def test_text_folder_holds_every_file_at_any_depth_in_order_of_relative_path(corpus):
  root, documents = corpus
  source = sources.open(f'text:{root / "text"}')
  order = sorted(range(len(documents)), key=lambda i: f'deep/{i:02d}.txt' if i % 3 == 0 else f'{i:02d}.txt')
  assert read_all(source) == [documents[index] for index in order]
  assert source.record_bytes.tolist() == [len(documents[index].encode()) for index in order]
  single = sources.open(f'text:{root / "text" / "07.txt"}')
  assert read_all(single) == [documents[7]]


def test_text_folder_reports_binary_and_bad_utf8_and_skips_hidden_and_empty_files(tmp_path, caplog):
  (tmp_path / 'good.md').write_text('good')
  (tmp_path / 'bad.txt').write_bytes(b'ok \xff')
  (tmp_path / 'image.png').write_bytes(b'\x89PNG\0\0')
  (tmp_path / '.hidden').write_text('hidden')
  (tmp_path / 'empty.py').write_text('')
  source = sources.open(f'text:{tmp_path}')
  with caplog.at_level(logging.WARNING):
    assert read_all(source) == [None, 'good', None]
  assert len(source.malformed) == 2
  assert 'bad.txt' in caplog.text and '0xff at offset 3' in caplog.text and 'NUL byte' in caplog.text


def test_jsonl_gives_random_access_over_files(corpus):
  root, documents = corpus
  source = sources.open(f'jsonl:{root / "jsonl"}')
  for index in (59, 0, 24, 25, 31):
    assert source[index] == documents[index]
  assert len(source) == 60 and not len(source.malformed)
  assert all(source.record_bytes >= [len(document.encode()) for document in documents])


def test_jsonl_reports_every_malformed_row_with_file_and_line_once(tmp_path, caplog):
  rows = [
      b'{"text": "first"}',
      b'',
      b'{"text": "torn',
      b'{"body": "other"}',
      b'{"text": 7}',
      b'["text"]',
      b'{"text": "\xff"}',
      b'{"text": "\\ud800"}',
      b'\r{"text": "last"}\r',
  ]
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'\n'.join(rows))
  source = sources.open(f'jsonl:{path}')
  with caplog.at_level(logging.WARNING):
    assert read_all(source) == ['first', None, None, None, None, None, None, 'last']
    assert read_all(source)[0] == 'first'
  assert source.malformed.places == {f'{path}:{line}' for line in range(3, 9)}
  assert len(caplog.records) == sources.SHOWN_IN_FULL
  for part in (f'{path}:3: malformed, left out: not JSON', "no field 'text'; it has 'body'", 'is int', 'found list'):
    assert part in caplog.text


def test_malformed_counts_go_on_after_the_first_few(caplog):
  malformed = sources.Malformed('jsonl:x')
  with caplog.at_level(logging.WARNING):
    for line in [0, 0, *range(120), 0]:  # a later epoch meets the same rows again
      malformed.report(f'x:{line}', 'why')
  assert len(malformed) == 120
  assert len(caplog.records) == sources.SHOWN_IN_FULL + 2  # and at 10 and 100


def test_jsonl_lines_are_found_across_read_blocks(tmp_path, monkeypatch):
  path = tmp_path / 'long.jsonl'
  texts = ['x' * (9 << 20), 'y', 'z' * (9 << 20)]
  path.write_text('\n\n'.join(json.dumps({'text': text}) for text in texts) + '\n')
  starts, sizes, numbers = sources.line_index(path)
  assert numbers.tolist() == [1, 3, 5] and sizes.tolist() == [len(text) + 12 for text in texts]
  assert read_all(sources.open(f'jsonl:{path}')) == texts


@pytest.mark.parametrize('item', ['text:{}/text', 'jsonl:{}/jsonl'])
def test_sources_survive_pickling_for_worker_processes(corpus, item):
  source = sources.open(item.format(corpus[0]))
  assert pickle.loads(pickle.dumps(source))[11] == source[11]


@pytest.mark.parametrize('task', synthetic.TASKS)
def test_synthetic_documents_depend_on_the_index_alone(task):
  source = sources.open(f'synthetic:{task}')
  assert source[123_456] == sources.open(f'synthetic:{task}')[123_456]
  documents = [source[index] for index in range(50)]
  assert len(set(documents)) == 50
  assert all(document.isascii() and document.isprintable() for document in documents)


def test_synthetic_answers_follow_from_the_questions():
  for index in range(40):
    first, second = synthetic.copy(index).split('|')
    assert first == second
    table, queries = synthetic.mqar(index).split('|')
    pairs = [{text[at : at + 2] for at in range(0, len(text), 2)} for text in (table, queries)]
    assert pairs[0] == pairs[1] and len({pair[0] for pair in pairs[0]}) == len(table) // 2
    path = synthetic.induction(index)
    successors = {}
    for step in (step for step in range(1, 128) if step % 8):
      assert successors.setdefault(path[step - 1], path[step]) == path[step]


@pytest.mark.parametrize(
    ('item', 'message'),
    [
        ('parquet:x', "unknown kind 'parquet'.*stdlib, text, jsonl"),
        ('text:', 'names no path'),
        ('stdlib:x', 'takes no path'),
        ('synthetic:sort', 'one of copy, induction, mqar'),
        ('text:{tmp}/missing', 'missing: no such file or folder'),
        ('text:{tmp}/empty', 'the folder holds no files'),
        ('jsonl:{tmp}/empty', r'the folder holds no \*.jsonl'),
        ('jsonl:{tmp}/blank.jsonl', 'no rows'),
        ('text:{tmp}/nothing.txt', 'every file is empty'),
        ('arrayrecord:{tmp}/blank.jsonl', 'not readable as ArrayRecord|no records'),
        ('arrayrecord:{tmp}/torn.arrayrecord', 'not readable as ArrayRecord|no records'),
    ],
)
def test_bad_source_ends_in_one_clear_line(tmp_path, item, message):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'blank.jsonl').write_text('\n\n')
  (tmp_path / 'nothing.txt').write_text('')
  (tmp_path / 'torn.arrayrecord').write_bytes(np.arange(5000, dtype=np.int32).tobytes())
  with pytest.raises(ConfigError, match=message) as caught:
    sources.open(item.format(tmp=tmp_path))
  assert '\n' not in str(caught.value)
