"""Which passage of which document comes when, and on which side of the held-out split it lies.

A *passage* is a stretch of whole lines of one document, about four rows of bytes long. Passages, not documents, are
shuffled and weighted: the standard library's mean file fills 64 rows of 256 bytes, so 200 steps of 16 rows read in
document order would see 50 of its 730 files, and each row of the batch the same file for a third of the run.

A source that makes its documents in an order of its own, such as a curriculum, keeps it and is made anew for each seed.

Everything here is a pure function of an index: the shuffle is a permutation computed from (seed, epoch), the weights
choose a source by the index in the mixture, the split looks at the content only. So no process needs to know what
another one has read.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import grain
import numpy as np

from mmx.config import ConfigError
from mmx.data import sources, symbols

ROWS_PER_PASSAGE = 4  # of seq_len bytes each
PASSAGES_PER_DOCUMENT = 64  # at most: reading one passage reads its whole document


class Part(NamedTuple):
  item: str  # 'kind:path'
  weight: float  # share of the passages, relative to the other parts


def parse(text: str) -> tuple[Part, ...]:
  """'stdlib@0.7 jsonl:/x@0.3' as parts; a part without '@weight' weighs 1. Paths hold no blanks."""
  parts = []
  for word in text.split():
    item, weight = re.fullmatch(r'(.+?)(?:@([-+.\deE]+))?', word).groups()
    try:
      parts.append(Part(item, 1.0 if weight is None else float(weight)))
    except ValueError:
      raise ConfigError(f'data.source: weight {weight!r} in {word!r} is not a number') from None
    if not 0 < parts[-1].weight < float('inf'):
      raise ConfigError(f'data.source: weight {weight} in {word!r} must be positive')
  if not parts:
    raise ConfigError("data.source is empty; name at least one source, such as 'stdlib'")
  return tuple(parts)


def is_heldout(document: str, fraction: float) -> bool:
  """True for about `fraction` of all contents. Equal documents share a side, in every source, run and seed."""
  content = hashlib.blake2b(document.encode('utf-8', 'surrogateescape'), digest_size=8, person=b'mmx held-out').digest()
  return int.from_bytes(content, 'little') < fraction * 2.0**64


def documents(source: sources.Source, heldout_fraction: float, side: str) -> Iterator[str]:
  """The whole documents of one side ('train' or 'heldout'), in the order of the source."""
  for index in range(len(source)):
    document = source[index]
    if document and is_heldout(document, heldout_fraction) == (side == 'heldout'):
      yield document


class Passage(NamedTuple):
  text: str
  last: bool  # the document ends here


class Passages:
  """Passages of the documents of one side of the split, by index.

  `[i]` is None where there is nothing to read: the document is on the other side or malformed, or its text is shorter
  than its record. A source that does not know its records' sizes has one passage a document.
  """

  def __init__(self, source: sources.Source, seq_len: int, heldout_fraction: float, side: str):
    self.source = source
    self.fraction = heldout_fraction
    self.side = side
    if source.record_bytes is None:
      self.limits = self.ends = None
    else:
      longest = -(-source.record_bytes // PASSAGES_PER_DOCUMENT)
      self.limits = np.maximum(ROWS_PER_PASSAGE * seq_len, longest)  # bytes
      self.ends = np.cumsum(-(-source.record_bytes // self.limits))  # passages up to and with each document

  def __len__(self) -> int:
    return len(self.source) if self.ends is None else int(self.ends[-1])

  def __getitem__(self, index: int) -> Passage | None:
    if self.ends is None:
      document_index = index
    else:
      document_index = int(np.searchsorted(self.ends, index, side='right'))
    document = self.source[document_index]
    if not document or is_heldout(document, self.fraction) != (self.side == 'heldout'):
      return None
    if self.ends is None:
      return Passage(document, last=True)
    limit = int(self.limits[document_index])
    position = index - (int(self.ends[document_index - 1]) if document_index else 0)
    content = document.encode('utf-8', 'surrogateescape')
    start, end = (line_border(content, place, limit) for place in (position * limit, (position + 1) * limit))
    if start == end:
      return None
    return Passage(content[start:end].decode('utf-8', 'surrogateescape'), last=end == len(content))

  def any(self) -> bool:
    return any(self[index] is not None for index in range(len(self)))


@dataclass(frozen=True)
class Course:
  """The documents of a `ruler:` source for one side of the split and one seed, by index, in the order of its lessons.

  Held out are documents of the last stage under seeds that no training document has.
  """

  lessons: symbols.Lessons
  side: str
  seed: int = 0

  def __len__(self) -> int:
    return len(self.lessons)

  def __getitem__(self, index: int) -> symbols.Document:
    if self.side == 'heldout':
      return self.lessons.final(symbols.HELDOUT + self.seed, index)
    return self.lessons.document(symbols.TRAIN + self.seed, index)

  def any(self) -> bool:
    return True


def line_border(content: bytes, place: int, reach: int) -> int:
  """The first end of a line (or of the content) within `reach` bytes after `place`, else the first of a character.

  Never further than place + reach, so borders of successive places come in order and their stretches tile the content.
  """
  if place == 0 or place >= len(content):
    return min(place, len(content))
  line_end = content.find(b'\n', place, place + reach)
  if line_end >= 0:
    return line_end + 1
  if len(content) <= place + reach:
    return len(content)
  while place < len(content) and content[place] & 0xC0 == 0x80:  # inside a UTF-8 character
    place += 1
  return place


def shuffle(passages: list[Passages | Course], seed: int, endless: bool) -> list[grain.MapDataset]:
  """One shuffled dataset for each part; an endless one is shuffled anew every epoch. A course keeps its order."""
  shuffled = []
  for number, part in enumerate(passages):
    # The shuffle of epoch e is that of seed + e, so neighbouring seeds must be spread or they would share epochs.
    spread = hashlib.blake2b(f'{seed} {number}'.encode(), digest_size=4).digest()
    part_seed = int.from_bytes(spread, 'little')
    if isinstance(part, Course):
      shuffled.append(grain.MapDataset.source(replace(part, seed=part_seed)))
    else:
      dataset = grain.MapDataset.source(part).shuffle(part_seed)
      shuffled.append(dataset.repeat() if endless else dataset)
  return shuffled


def weigh(parts: tuple[Part, ...], datasets: list[grain.MapDataset]) -> grain.MapDataset:
  """The part of element i is a function of i and the weights alone, and n elements hold weight * n of each part.

  What counts is passages: a source of one passage a document weighs as many tokens as its documents are long. Weights
  are rounded to 1% of the smallest.
  """
  return grain.MapDataset.mix(datasets, weights=[part.weight for part in parts])
