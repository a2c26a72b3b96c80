"""Passages tile their documents, the split looks at content alone, weights are kept at every prefix."""

import collections

import grain
import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.data import mixture, sources


def passages_of(documents, seq_len=10, fraction=0.0, side='train'):
  return mixture.Passages(sources.InMemory('memory', documents), seq_len, fraction, side)


def test_passages_tile_their_document_at_line_ends():
  random = np.random.default_rng(0)
  documents = [
      'x',
      '\n'.join('w' * int(length) for length in random.integers(0, 30, 40)),  # lines of all lengths
      'ü猫🦀' * 50,  # no line end at all: cut between characters
      '\n' * 333,
      'a' * 40,  # exactly one passage
      'a' * 39 + '\n' + 'b',
  ]
  passages = passages_of(documents)
  found = [passages[index] for index in range(len(passages))]
  texts, ended = [''], 0
  for passage in filter(None, found):
    texts[-1] += passage.text
    assert len(passage.text.encode()) <= 80
    if passage.last:
      ended += 1
      texts.append('')
  assert texts == [*documents, ''] and ended == len(documents)
  inner = [passage.text for passage in filter(None, found) if not passage.last and 'w' in passage.text]
  assert len(inner) > 5 and all(text.endswith('\n') for text in inner)


def test_a_document_has_at_most_64_passages():
  assert len(passages_of(['word\n' * 50_000])) <= mixture.PASSAGES_PER_DOCUMENT


def test_heldout_and_training_share_no_content_even_across_sources(corpus):
  root, documents = corpus
  sides = collections.defaultdict(set)
  for item in (f'text:{root / "text"}', f'jsonl:{root / "jsonl"}'):
    for side in ('train', 'heldout'):
      sides[side] |= set(mixture.documents(sources.open(item), 0.3, side))
  assert not sides['train'] & sides['heldout']
  assert sides['train'] | sides['heldout'] == set(documents)
  assert 5 <= len(sides['heldout']) <= 35


def test_heldout_share_is_close_to_the_fraction_and_grows_with_it():
  documents = [f'document {index}' for index in range(4000)]
  small, large = ({d for d in documents if mixture.is_heldout(d, fraction)} for fraction in (0.05, 0.2))
  assert abs(len(small) / 4000 - 0.05) < 0.012 and abs(len(large) / 4000 - 0.2) < 0.02
  assert small < large
  assert not any(mixture.is_heldout(d, 0.0) for d in documents) and all(mixture.is_heldout(d, 1.0) for d in documents)


def test_passages_of_both_sides_make_up_the_corpus():
  documents = [f'{index} ' + 'line\n' * index for index in range(80)]
  sides = [passages_of(documents, fraction=0.4, side=side) for side in ('train', 'heldout')]
  for index in range(len(sides[0])):
    first, second = (side[index] for side in sides)
    assert first is None or second is None
  texts = [''.join(p.text for p in (s[i] for i in range(len(s))) if p) for s in sides]
  assert sum(len(text) for text in texts) == sum(len(document) for document in documents) and all(texts)


def test_mixture_keeps_its_weights_at_every_prefix():
  parts = mixture.parse('a@0.7 b@0.3')
  mixed = mixture.weigh(parts, [grain.MapDataset.source([name]).repeat() for name in 'ab'])
  count = 0
  for index in range(3000):
    count += mixed[index] == 'a'
    assert abs(count - 0.7 * (index + 1)) < 2.5
  assert mixed[1234] == mixed[1234]


def test_endless_shuffle_visits_everything_each_epoch_in_a_new_order():
  passages = passages_of([f'document {index}' for index in range(37)])
  (dataset,) = mixture.shuffle([passages], seed=0, endless=True)
  epochs = [[dataset[epoch * 37 + index].text for index in range(37)] for epoch in range(3)]
  assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == 37 for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  (neighbour,) = mixture.shuffle([passages], seed=1, endless=True)
  assert [neighbour[index].text for index in range(37)] not in epochs  # seeds do not share epochs


def test_parse_reads_weights_and_leaves_paths_alone():
  assert mixture.parse('stdlib@0.7 jsonl:/x@0.3') == (('stdlib', 0.7), ('jsonl:/x', 0.3))
  assert mixture.parse('text:/data/v1@home/x') == (('text:/data/v1@home/x', 1.0),)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'is empty'),
        ('stdlib@0', 'must be positive'),
        ('stdlib@-1', 'must be positive'),
        ('stdlib@1.2.3', 'not a number'),
    ],
)
def test_bad_mixture_ends_in_one_clear_line(text, message):
  with pytest.raises(ConfigError, match=message):
    mixture.parse(text)
