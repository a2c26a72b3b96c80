"""From a DataConfig to batches: an endless, restartable stream for training and a fixed list for evaluation.

The order is the same on any number of processes because every row of the batch is a stream of its own, a *lane*: lane
r of B reads the passages r, r + B, r + 2B, ... of the endless shuffled order of each source and packs them by itself. A
process reads, tokenizes and packs its own lanes and nothing else, so the cost per process falls with their number, and
concatenating the batches of all processes gives the batch of one. `data.batch_size` is part of the order;
the number of processes, `data.num_workers` and the prefetch thread are not.

The state of an iterator names its lanes' states, 50 to 110 bytes each, by row of the global batch. So the states of all
processes make up one, with which any number of processes goes on.
"""

import atexit
import functools
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from mmx.config import ConfigError, DataConfig
from mmx.data import mixture, packing, sources, symbols
from mmx.data.tokenizer import Tokenizer

PREFETCHED_BATCHES = 2  # made by a thread while the device computes
# No thread pool below the lanes: one each would be batch_size pools, and the prefetch thread keeps ahead of them all.
READING = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class HeldOut:
  """Batches of documents that training never sees.

  batches: this process's rows of each, fields as in packing.py. The last may end in empty rows (loss_mask 0).
  bytes_per_token: over the targets of all processes' batches, so bits per byte = nats / ln 2 / bytes_per_token.
  """

  batches: list[dict[str, np.ndarray]]
  bytes_per_token: float


def train_iterator(
    config: DataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> 'Batches':
  """Endless local batches [batch_size / process_count, T]; every epoch is reshuffled by data.seed and its number.

  With data.num_workers = n the local rows are made in n processes (absl flags must be parsed first).

  Raises:
    ConfigError: a source is missing, empty or without a training document, or rows do not divide by processes.
  """
  rows = local_rows(config, process_index, process_count)
  parts, passages = open_side(config, 'train')
  for part, training in zip(parts, passages, strict=True):
    if not training.any():
      raise ConfigError(
          f'data.source: {part.item}: none of {len(training.source)} document(s) is left for training '
          f'(data.heldout_fraction is {config.heldout_fraction}, {len(training.source.malformed)} malformed)'
      )
  shuffled = mixture.shuffle(passages, config.seed, endless=True)
  tokenize = functools.partial(packing.tokenize, tokenizer=tokenizer)

  def lane(row: int) -> grain.IterDataset:
    documents = mixture.weigh(parts, [dataset[row :: config.batch_size] for dataset in shuffled]).map(tokenize)
    return packing.pack(documents.to_iter_dataset(READING), config.packing, config.seq_len, seed=row)

  def block(rows: list[int]) -> grain.IterDataset:
    return grain.experimental.ZipIterDataset([lane(row) for row in rows]).map(packing.stack)

  if config.num_workers:
    shares = np.array_split(rows, min(config.num_workers, len(rows)))
    names = [f'rows {share[0]} to {share[-1]} by a worker' for share in shares]
    worker = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=PREFETCHED_BATCHES)
    dataset = grain.experimental.ZipIterDataset([block(list(share)).mp_prefetch(worker) for share in shares]).map(join)
  else:
    names = [f'row {row}' for row in rows]
    dataset = block(rows)
  iterator = iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=PREFETCHED_BATCHES))
  atexit.register(close, weakref.ref(iterator))
  return Batches(iterator, names)


class Batches(grain.DatasetIterator):
  """The stream of `train_iterator`.

  names: of the parts of each batch that have a state of their own: the rows, or the shares of the worker processes.
  """

  def __init__(self, iterator: grain.DatasetIterator, names: list[str]):
    super().__init__(iterator)
    self.iterator = iterator
    self.names = names

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self.iterator)

  def get_state(self) -> dict[str, Any]:
    """Where each part stands, exact and JSON-able. The states of all processes may be merged into one."""
    return dict(zip(self.names, self.iterator.get_state()['parents'], strict=True))

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on with the very next batch; what other processes make is left aside.

    Raises:
      ConfigError: a part is not in the state: it is another batch size's, or that of other worker processes.
    """
    for name in self.names:
      if name not in state:
        raise ConfigError(
            f'data: no position of {name} was saved, only of {", ".join(list(state)[:3])}, ... ({len(state)} in all); '
            'data.batch_size must be the same, and with data.num_workers that and the number of processes too'
        )
    self.iterator.set_state({'parents': [state[name] for name in self.names]})

  def close(self) -> None:
    """Ends the prefetch thread."""
    self.iterator.close()


def close(reference: 'weakref.ref[grain.DatasetIterator]') -> None:
  """Ends the prefetch thread before the interpreter takes modules apart under it, if the iterator still lives."""
  if (iterator := reference()) is not None:
    iterator.close()
    iterator.close = lambda: None  # its __del__ closes again, and by then grain's own imports are gone


def heldout(
    config: DataConfig, tokenizer: Tokenizer, num_batches: int, process_index: int = 0, process_count: int = 1
) -> HeldOut:
  """`num_batches` batches of held-out documents in one fixed order, the same for every data.seed.

  Each part of a mixture gives its share of the rows, one after the other; fewer if its held-out documents do not fill
  them, for each is read once at most. Every process packs all rows and keeps its own: for the 128 rows of the default
  0.1 s with bytes and 0.4 s with a BPE.

  Raises:
    ConfigError: nothing is held out, a source is missing or empty, or rows do not divide by processes.
  """
  rows = local_rows(config, process_index, process_count)
  parts, passages = open_side(config, 'heldout')
  tokenize = functools.partial(packing.tokenize, tokenizer=tokenizer, with_bytes=True)
  weights = np.array([part.weight for part in parts])
  ends = np.rint(np.cumsum(weights) / weights.sum() * num_batches * config.batch_size).astype(int)
  # Nineteen passages in twenty are the other side's: that is the split at work, not a filter gone wrong.
  quiet = grain.experimental.DatasetOptions(filter_warn_threshold_ratio=None)
  every_row = []
  for dataset, count in zip(mixture.shuffle(passages, seed=0, endless=False), np.diff(ends, prepend=0), strict=True):
    stream = grain.experimental.WithOptionsIterDataset(dataset.map(tokenize).to_iter_dataset(READING), quiet)
    features = ('tokens', 'targets', 'target_bytes')
    packed = packing.pack(stream, config.packing, config.seq_len, seed=0, features=features)
    every_row += itertools.islice(packed, count)
  if not every_row:
    counted = sum(len(part.source) for part in passages)
    raise ConfigError(
        f'data.heldout_fraction = {config.heldout_fraction} holds out none of the {counted} document(s) of '
        f'{config.source!r}; raise it or add documents'
    )
  empty = {name: np.zeros_like(value) for name, value in every_row[0].items()}
  every_row += [empty] * (-len(every_row) % config.batch_size)
  everything = packing.stack(tuple(every_row))
  target_bytes = everything.pop('target_bytes')
  bytes_per_token = float(target_bytes.sum(dtype=np.int64) / everything['loss_mask'].sum(dtype=np.float64))
  batches = []
  for start in range(0, len(every_row), config.batch_size):
    batches.append({name: value[start + np.asarray(rows)] for name, value in everything.items()})
  return HeldOut(batches, bytes_per_token)


def fingerprint(config: DataConfig, tokenizer: Tokenizer) -> str:
  """What the run was trained on, in a line: documents, bytes and hash of each source, and the tokenizer's hash."""
  corpus = []
  for part in mixture.parse(config.source):
    source = sources.open(part.item, config.text_field)
    size = f'{len(source)} documents, {source.stored_bytes} bytes' if source.stored_bytes else 'generated'
    kind = part.item.partition(':')[0]  # no path: a corpus that has moved is the same corpus
    corpus.append(f'{kind}@{part.weight:g}: {size}, {source.fingerprint}')
  return '; '.join([*corpus, f'tokenizer {tokenizer.fingerprint}'])


def open_side(
    config: DataConfig, side: str
) -> tuple[tuple[mixture.Part, ...], list[mixture.Passages | mixture.Course]]:
  """The parts of data.source, and of each its passages (or its course) on one side: 'train' or the held-out one."""
  parts, opened = mixture.parse(config.source), []
  for part in parts:
    source = sources.open(part.item, config.text_field)
    if isinstance(source, sources.Ruler):
      check_uncut(source.lessons, config)
      opened.append(mixture.Course(source.lessons, side))
    else:
      opened.append(mixture.Passages(source, config.seq_len, config.heldout_fraction, side))
    if isinstance(source, sources.Ruler) != (config.tokenizer == 'symbols'):
      raise ConfigError(
          f'data.tokenizer = {config.tokenizer!r} does not fit {part.item!r}: '
          "ruler: is written in 'symbols', and all else is text"
      )
  return parts, opened


def check_uncut(lessons: symbols.Lessons, config: DataConfig) -> None:
  """Raises ConfigError if a row's end could part a document's questions from the facts that they are about."""
  if config.packing == 'concat':
    raise ConfigError("data.packing = 'concat' would cut the documents of ruler:; choose 'first_fit' or 'best_fit'")
  longest = max(stage.length for stage in lessons.stages)
  if longest > config.seq_len:
    raise ConfigError(f'data.seq_len = {config.seq_len} would cut the {longest} symbols of a stage in data.source')


def local_rows(config: DataConfig, process_index: int, process_count: int) -> list[int]:
  """The rows of the global batch that a process makes: successive blocks, as a batch split over devices has them."""
  if config.batch_size % process_count:
    raise ConfigError(f'data.batch_size = {config.batch_size} does not divide by {process_count} processes')
  count = config.batch_size // process_count
  return list(range(process_index * count, (process_index + 1) * count))


def join(blocks: tuple[dict[str, np.ndarray], ...]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
