"""Documents of any length become rows of `seq_len` tokens, with what the model needs to keep them apart.

A row is a dict of arrays [T]; a batch stacks rows to [B, T]:
  tokens        int32    ids; a document is its tokens followed by the end-of-document token
  targets       int32    the next token of the same document, or what a document of `ruler:` asks for; 0 where nothing
  segment_ids   int32    1, 2, ... for the documents of the row, 0 on padding
  positions     int32    0, 1, ... from each document's first token in the row
  loss_mask     float32  1 where `targets` is real

A document that a row's end cuts goes on in the next row as a segment of its own: its positions restart at 0 and it does
not see what came before, but the last token of the row still has its target, so every token but a document's first is
predicted exactly once (and a passage's first; see mixture.py).

  concat     documents end to end, cut every T tokens: no padding, most cuts
  first_fit  longer ones cut to T, each put in the first of NUM_BINS open rows that has room
  best_fit   the same, in the row that it fills best
"""

from dataclasses import dataclass

import grain
import numpy as np

from mmx.data.mixture import Passage
from mmx.data.symbols import NO_TARGET, Document
from mmx.data.tokenizer import Tokenizer

TRAINING_FEATURES = ('tokens', 'targets')
NUM_BINS = 16  # rows open at a time under first_fit and best_fit; a checkpoint replays at most these


def tokenize(passage: Passage | Document, tokenizer: Tokenizer, with_bytes: bool = False) -> dict[str, np.ndarray]:
  """tokens, targets (NO_TARGET at the end) and, if asked, target_bytes: int32 [n], end-of-document where it ends here.

  target_bytes are the UTF-8 bytes that the target stands for; the end of a document stands for none. A document in
  symbols is tokens and targets already, and each of its answers counts as a byte.
  """
  if isinstance(passage, Document):
    features = {'tokens': passage.tokens, 'targets': passage.targets}
    return features | {'target_bytes': np.int32(passage.targets != NO_TARGET)} if with_bytes else features
  ids = tokenizer.encode(passage.text)
  features = {'tokens': np.append(ids, np.int32(tokenizer.eos_id)) if passage.last else ids}
  features['targets'] = np.append(features['tokens'][1:], np.int32(NO_TARGET))
  if with_bytes:
    lengths = np.append(tokenizer.byte_lengths(passage.text), np.int32(0))[: len(features['tokens'])]
    features['target_bytes'] = np.append(lengths[1:], np.int32(0))
  return features


def pack(
    documents: grain.IterDataset, method: str, seq_len: int, seed: int, features: tuple[str, ...] = TRAINING_FEATURES
) -> grain.IterDataset:
  """Packed rows: each of the `features` [T], with `tokens_segment_ids` and `tokens_positions` int32 [T].

  `seed` orders the rows that close at once. The iterator's state is a few numbers and exact: it names the last moment
  without open rows (concat: the document that is being cut), and restoring reads on from there.
  """
  if method == 'concat':
    return ConcatThenSplit(documents, seq_len)
  packer = {
      'first_fit': grain.experimental.FirstFitPackIterDataset,
      'best_fit': grain.experimental.BestFitPackIterDataset,
  }[method]
  pieces = grain.experimental.FlatMapIterDataset(documents, Cut(seq_len))
  lengths = dict.fromkeys(features, seq_len)
  return packer(pieces, length_struct=lengths, num_packing_bins=NUM_BINS, shuffle_bins=True, seed=seed)


@dataclass(frozen=True)
class Cut(grain.experimental.FlatMapTransform):
  """A document as pieces of at most `seq_len` tokens."""

  seq_len: int

  def flat_map(self, features: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    starts = range(0, len(features['tokens']), self.seq_len)
    return [{name: value[start : start + self.seq_len] for name, value in features.items()} for start in starts]


class ConcatThenSplit(grain.IterDataset):
  """Documents end to end, cut every `seq_len` tokens; the last row of a finite stream is padded.

  grain 0.2.18 has a dataset of this name, but its state holds tuples that JSON returns as lists, and then it loses the
  whole next document whenever a row happened to end where a document does.
  """

  def __init__(self, documents: grain.IterDataset, seq_len: int):
    super().__init__(documents)
    self.documents = documents
    self.seq_len = seq_len

  def __iter__(self) -> grain.DatasetIterator:
    return ConcatThenSplitIterator(iter(self.documents), self.seq_len)


class ConcatThenSplitIterator(grain.DatasetIterator):
  """State: where the stream stood before the document at hand, and how many tokens of that document are used up."""

  def __init__(self, documents: grain.DatasetIterator, seq_len: int):
    super().__init__(documents)
    self.documents = documents
    self.seq_len = seq_len
    self.before_document = documents.get_state()
    self.document = None
    self.used = 0

  def __next__(self) -> dict[str, np.ndarray]:
    pieces, filled = [], 0
    while filled < self.seq_len:
      if self.document is None or self.used == len(self.document['tokens']):
        self.before_document, self.document, self.used = self.documents.get_state(), None, 0
        try:
          self.document = next(self.documents)
        except StopIteration:
          if not pieces:
            raise
          break
      end = min(self.used + self.seq_len - filled, len(self.document['tokens']))
      pieces.append({name: value[self.used : end] for name, value in self.document.items()})
      filled += end - self.used
      self.used = end
    lengths = [len(piece['tokens']) for piece in pieces]
    columns = {name: [piece[name] for piece in pieces] for name in pieces[0]}
    columns['tokens_segment_ids'] = [np.full(length, number, np.int32) for number, length in enumerate(lengths, 1)]
    columns['tokens_positions'] = [np.arange(length, dtype=np.int32) for length in lengths]
    padding = np.zeros(self.seq_len - filled, np.int32)
    return {name: np.concatenate([*column, padding]) for name, column in columns.items()}

  def get_state(self) -> dict:
    return {'before_document': self.before_document, 'used': self.used}

  def set_state(self, state: dict) -> None:
    self.documents.set_state(state['before_document'])
    self.before_document, self.used = state['before_document'], state['used']
    self.document = next(self.documents) if self.used else None


def stack(rows: tuple[dict[str, np.ndarray], ...]) -> dict[str, np.ndarray]:
  """Packed rows as a batch, fields as above; `target_bytes` int32 [B, T] is kept if the rows have it."""
  columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  segment_ids = columns['tokens_segment_ids']
  has_target = (columns['targets'] != NO_TARGET) & (segment_ids > 0)
  batch = {
      'tokens': columns['tokens'],
      'targets': np.where(has_target, columns['targets'], 0),
      'segment_ids': segment_ids,
      'positions': columns['tokens_positions'],
      'loss_mask': has_target.astype(np.float32),
  }
  if 'target_bytes' in columns:
    batch['target_bytes'] = columns['target_bytes']
  return batch
