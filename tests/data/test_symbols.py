"""Tasks in symbols: answerable from the facts alone, the same everywhere, learned by a course that an index decides."""

import dataclasses
import json

import numpy as np
import pytest

from mmx.config import ConfigError, DataConfig
from mmx.data import mixture, packing, pipeline, problems, symbols, tokenizer

COURSE = 'ruler:vt+niah_multiquery:16/1*4k,32/2*4k,64/3'
CONFIG = DataConfig(source=COURSE, tokenizer='symbols', seq_len=64, batch_size=4, packing='first_fit')
SYMBOLS = tokenizer.load('symbols')


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def pairs(document, end=None):
  """(name, symbol behind it) wherever a name is followed by a name or a value, up to `end`."""
  tokens = document.tokens[:end].tolist()
  return [(a, b) for a, b in zip(tokens, tokens[1:]) if a in symbols.NAMES and b in [*symbols.VALUES, *symbols.NAMES]]


def solved(task, document):
  """The answers of each question, found by reading the document as a person would: lists of sets."""
  tokens = document.tokens.tolist()
  asked = [tokens[place] for place in document.places]
  if task == 'vt':
    root = {}
    for place in range(1, len(tokens) - 1):
      name, content = tokens[place], tokens[place + 1]
      if name in symbols.NAMES and (content in symbols.VALUES or root.get(content)) and name not in root:
        root[name] = content if content in symbols.VALUES else root[content]
    return [{root[name]} for name in asked]
  if task in ('cwe', 'fwe'):
    counts = {word: tokens.count(word) for word in tokens if word in symbols.NAMES}
    return [set(sorted(counts, key=counts.get)[-document.answers.shape[1] :])]
  held = {}
  for name, value in pairs(document):
    if value in symbols.VALUES:
      held.setdefault(name, set()).add(value)
  return [held[name] for name in asked]


@pytest.mark.parametrize('length', [33, 128, 512])
@pytest.mark.parametrize('task', problems.TASKS)
def test_answers_follow_from_the_facts(task, length):
  for index in range(8):
    document = symbols.document(task, length, 3, index)
    assert len(document.tokens) == len(document.targets) == length and document.tokens[0] == symbols.START
    expected = [set(answers) for answers in document.answers.tolist()]
    assert solved(task, document) == expected
    assert all(len(answers) == document.answers.shape[1] for answers in expected)
    assert set(document.targets[document.targets != symbols.NO_TARGET]) <= set(document.answers.ravel())


@pytest.mark.parametrize('task', problems.TASKS)
def test_answers_are_not_fed_back(task):
  """A target never stands in the text at the place behind its question, as the next token of ordinary text does."""
  document = symbols.document(task, 256, 0, 0)
  marked = np.flatnonzero(document.targets != symbols.NO_TARGET)
  behind = document.tokens[np.minimum(marked + 1, 255)]
  assert np.mean(behind == document.targets[marked]) < 0.5  # the commonest word of fwe is most of the text


def test_chains_are_followed_for_the_hops_that_are_told():
  document = symbols.document('vt', 128, 0, 0, hops=3)
  assert sorted(set(document.hops.tolist())) == [1, 2, 3]
  assert np.bincount(document.hops)[1:].tolist() == [len(document.hops) // 3] * 3
  assert len(set(document.answers.ravel().tolist())) == 7  # 128 symbols hold seven chains, each with a value of its own


def test_a_question_with_several_answers_is_asked_as_often_and_in_no_order():
  first = []
  for index in range(40):
    document = symbols.document('niah_multivalue', 128, 0, index)
    for place, answers in zip(document.places, document.answers, strict=True):
      asked = document.targets[place - 3 : place + 1]
      assert sorted(asked) == sorted(answers) and len(set(document.tokens[place - 3 : place + 1])) == 1
      in_text = [value for name, value in pairs(document, document.places[0] - 3) if name == document.tokens[place]]
      first.append(in_text.index(asked[0]))
  assert min(np.bincount(first, minlength=4)) > len(first) / 8


def test_sample_is_a_function_of_task_length_seed_and_index():
  same = symbols.document('vt', 64, 5, 7)
  for name, value in symbols.document('vt', 64, 5, 7)._asdict().items():
    np.testing.assert_array_equal(value, getattr(same, name))
  for other in [('vt', 64, 5, 8), ('vt', 64, 6, 7), ('niah_multikey', 64, 5, 7)]:
    assert (symbols.document(*other).tokens != same.tokens).any()


def test_course_gets_longer_and_harder_by_its_index_alone():
  lessons = symbols.Lessons.parse('vt+niah_single:16/1*160,32/2*64,64')
  assert lessons.stages[:2] == ((16, 1, 10), (32, 2, 2)) and lessons.stages[2][:2] == (64, 3)
  sizes = [(len(document.tokens), document.hops.max()) for document in map(lambda i: lessons.document(0, i), range(16))]
  assert sizes[:10] == [(16, 1)] * 10 and sizes[10:12] == [(32, 2), (32, 1)] and sizes[12:14] == [(64, 3), (64, 1)]
  assert len(lessons.final(0, 0).tokens) == 64


def test_documents_reach_the_batch_whole_with_their_own_targets():
  lessons = symbols.Lessons.parse(COURSE.partition(':')[2])
  (course,) = pipeline.open_side(CONFIG, 'train')[1]
  seeded = mixture.shuffle([course], CONFIG.seed, endless=True)[0]
  assert lessons == course.lessons
  waiting = {tuple(document.tokens.tolist()): document for document in (seeded[i] for i in range(1200))}
  lengths = set()
  for batch in take(pipeline.train_iterator(CONFIG, SYMBOLS), 60):
    assert batch['tokens'].shape == (4, 64)
    for row in range(4):
      for segment in range(1, batch['segment_ids'][row].max() + 1):
        here = batch['segment_ids'][row] == segment
        document = waiting.pop(tuple(batch['tokens'][row][here].tolist()))  # each once, and never a part of one
        asked = document.targets != packing.NO_TARGET
        np.testing.assert_array_equal(batch['loss_mask'][row][here], asked)
        np.testing.assert_array_equal(batch['targets'][row][here], np.where(asked, document.targets, 0))
        np.testing.assert_array_equal(batch['positions'][row][here], np.arange(here.sum()))
        lengths.add(int(here.sum()))
  assert lengths == {16, 32, 64}


def test_course_is_the_same_on_any_number_of_processes_and_continues_anywhere():
  whole = pipeline.train_iterator(CONFIG, SYMBOLS)
  batches, states = [], []
  for _ in range(50):
    states.append(json.dumps(whole.get_state()))
    batches.append(next(whole))
  halves = [take(pipeline.train_iterator(CONFIG, SYMBOLS, process, 2), 50) for process in (0, 1)]
  joined = [pipeline.join(blocks) for blocks in zip(*halves, strict=True)]
  for batch, other in zip(batches, joined, strict=True):
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])
  for done in (1, 17, 33):
    resumed = pipeline.train_iterator(CONFIG, SYMBOLS)
    resumed.set_state(json.loads(states[done]))
    np.testing.assert_array_equal(next(resumed)['tokens'], batches[done]['tokens'])


def test_held_out_documents_are_of_the_last_stage_and_of_no_training_stream():
  heldout = pipeline.heldout(CONFIG, SYMBOLS, 2)
  held = {tuple(row.tolist()) for batch in heldout.batches for row in batch['tokens']}
  assert all((batch['segment_ids'] == 1).all() for batch in heldout.batches) and len(held) == 8
  assert heldout.bytes_per_token == 1
  final, seen = dataclasses.replace(CONFIG, source='ruler:vt+niah_multiquery:64/3'), []
  for seed in (0, 1):
    trained = take(pipeline.train_iterator(dataclasses.replace(final, seed=seed), SYMBOLS), 10)
    seen.append({tuple(row.tolist()) for batch in trained for row in batch['tokens']})
  assert not held & seen[0] and not held & seen[1] and not seen[0] & seen[1]
  again = pipeline.heldout(dataclasses.replace(CONFIG, seed=9), SYMBOLS, 2)
  np.testing.assert_array_equal(again.batches[1]['tokens'], heldout.batches[1]['tokens'])


@pytest.mark.parametrize('changes, message', [
    ({'source': 'ruler:vtt:64'}, "unknown task 'vtt'; one of niah_single"),
    ({'source': 'ruler:'}, 'names no task'),
    ({'source': 'ruler:vt'}, "stage '' is not LENGTH"),
    ({'source': 'ruler:vt:64*2k'}, 'the last goes on for ever'),
    ({'source': 'ruler:vt:32,64'}, "stage '32': every stage but the last needs"),
    ({'source': 'ruler:vt:64/9'}, 'from 1 to LENGTH/8 hops'),
    ({'source': 'ruler:vt:128'}, 'data.seq_len = 64 would cut the 128 symbols'),
    ({'packing': 'concat'}, "choose 'first_fit' or 'best_fit'"),
    ({'tokenizer': 'byte'}, "data.tokenizer = 'byte' does not fit"),
    ({'source': 'synthetic:copy'}, "data.tokenizer = 'symbols' does not fit"),
])
def test_mistakes_end_in_one_line(changes, message):
  config = dataclasses.replace(CONFIG, **changes)
  with pytest.raises(ConfigError) as error:
    pipeline.train_iterator(config, tokenizer.load(config.tokenizer))
  assert message in str(error.value) and '\n' not in str(error.value)


def test_symbols_make_the_round_trip_as_numbers():
  ids = symbols.document('vt', 64, 0, 0).tokens
  text = SYMBOLS.decode(ids)
  np.testing.assert_array_equal(SYMBOLS.encode(text), ids)
  assert SYMBOLS.byte_lengths(text).sum() == len(text)
