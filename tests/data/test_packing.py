"""Packing: rows hold documents apart, lose nothing, and predict every token that has one before it."""

import json

import grain
import numpy as np
import pytest

from mmx.data import packing, tokenizer
from mmx.data.mixture import Passage

METHODS = ('concat', 'first_fit', 'best_fit')
# Lengths around the row length of 8 (the end-of-document token adds one): below, equal, above, multiples.
LENGTHS = [3, 7, 11, 2, 4, 7, 6, 1, 7, 15, 1, 3, 8, 30, 5, 5, 6, 2, 9, 1, 1, 1, 4]
BYTES = tokenizer.load('byte')


def letters(index: int) -> str:
  return ''.join(chr(ord('a') + (index + step) % 26) for step in range(LENGTHS[index]))


def stream(method, seq_len=8, repeat=1):
  """Packed rows of the documents above; each document's tokens differ from its neighbours'."""
  passages = [Passage(letters(index), last=True) for index in range(len(LENGTHS))]
  documents = grain.MapDataset.source(passages).map(lambda passage: packing.tokenize(passage, BYTES)).repeat(repeat)
  reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(packing.pack(documents.to_iter_dataset(reading), method, seq_len, seed=3))


def segments(batch):
  """(row, number, slice of columns) of every segment, checking that padding comes last and numbers run 1, 2, ..."""
  for row, ids in enumerate(batch['segment_ids']):
    used = int((ids > 0).sum())
    assert (ids[:used] > 0).all() and (np.diff(ids[:used]) >= 0).all()
    for number in range(1, ids.max() + 1):
      columns = np.flatnonzero(ids == number)
      assert columns.size
      yield row, number, slice(columns[0], columns[-1] + 1)


@pytest.mark.parametrize('method', METHODS)
def test_packing_isolates_documents(method):
  batch = packing.stack(tuple(stream(method)))
  for row, _, columns in segments(batch):
    tokens, targets, mask = (batch[name][row, columns] for name in ('tokens', 'targets', 'loss_mask'))
    assert (batch['positions'][row, columns] == np.arange(len(tokens))).all()
    ends = np.flatnonzero(tokens == BYTES.eos_id)
    assert ends.size == 0 or ends.tolist() == [len(tokens) - 1]  # one document a segment
    assert (targets[:-1] == tokens[1:]).all() and mask[:-1].all()
    if ends.size:
      assert mask[-1] == 0 and targets[-1] == 0
    else:  # the row's end cut it: its next token is still its target
      assert mask[-1] == 1 and targets[-1] > 0
  padding = batch['segment_ids'] == 0
  assert not any(batch[name][padding].any() for name in ('tokens', 'targets', 'positions', 'loss_mask'))


@pytest.mark.parametrize('method', METHODS)
def test_packing_predicts_every_token_after_a_first_exactly_once(method):
  batch = packing.stack(tuple(stream(method)))
  predicted = sorted(batch['targets'][batch['loss_mask'] > 0].tolist())
  expected = sorted(token for index in range(len(LENGTHS)) for token in [*letters(index).encode()[1:], BYTES.eos_id])
  assert predicted == expected
  assert int((batch['segment_ids'] > 0).sum()) == sum(LENGTHS) + len(LENGTHS)


def test_concat_leaves_no_padding_but_at_the_end_of_the_stream():
  batch = packing.stack(tuple(stream('concat')))
  assert (batch['segment_ids'][:-1] > 0).all()
  joined = batch['tokens'].ravel()[: sum(LENGTHS) + len(LENGTHS)]
  assert joined.tolist() == [token for i in range(len(LENGTHS)) for token in [*letters(i).encode(), BYTES.eos_id]]


@pytest.mark.parametrize('method', ['first_fit', 'best_fit'])
def test_documents_that_fit_are_never_cut(method):
  batch = packing.stack(tuple(stream(method, seq_len=31)))
  starts = batch['tokens'][(batch['positions'] == 0) & (batch['segment_ids'] > 0)]
  assert sorted(starts.tolist()) == sorted(ord(letters(index)[0]) for index in range(len(LENGTHS)))


@pytest.mark.parametrize('method', METHODS)
def test_state_is_exact_after_every_row_through_json(method):
  reference, rows, states = stream(method, repeat=2), [], []
  states.append(json.dumps(reference.get_state()))
  for row in reference:
    rows.append(row)
    states.append(json.dumps(reference.get_state()))
  for done, state in enumerate(states):
    restored = stream(method, repeat=2)
    restored.set_state(json.loads(state))
    rest = list(restored)
    assert len(rest) == len(rows) - done
    for row, expected in zip(rest, rows[done:], strict=True):
      for name in expected:
        np.testing.assert_array_equal(row[name], expected[name])


def test_batch_has_the_dtypes_and_shapes_of_the_contract():
  batch = packing.stack(tuple(stream('concat')))
  rows = -(-(sum(LENGTHS) + len(LENGTHS)) // 8)
  for name in ('tokens', 'targets', 'segment_ids', 'positions'):
    assert batch[name].dtype == np.int32 and batch[name].shape == (rows, 8)
  assert batch['loss_mask'].dtype == np.float32 and set(batch) == {
      'tokens', 'targets', 'segment_ids', 'positions', 'loss_mask'
  }


def test_end_of_document_follows_the_last_passage_only():
  inner = packing.tokenize(Passage('ab', last=False), BYTES, with_bytes=True)
  assert inner['tokens'].tolist() == [97, 98] and inner['targets'].tolist() == [98, packing.NO_TARGET]
  last = packing.tokenize(Passage('ab', last=True), BYTES, with_bytes=True)
  assert last['tokens'].tolist() == [97, 98, 256] and last['targets'].tolist() == [98, 256, packing.NO_TARGET]
  assert last['target_bytes'].tolist() == [1, 0, 0]
