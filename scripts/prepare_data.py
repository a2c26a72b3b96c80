"""Copies a corpus into ArrayRecord files, one document a record, for fast random access from a disk or a bucket.

  python scripts/prepare_data.py --source=jsonl:corpus --output=prepared --shards=8
  python -m mmx.train --set data.source=arrayrecord:prepared ...

Records hold text, not tokens: one copy serves every tokenizer, and the held-out split, made by content, stays the same.
Malformed rows are named, left out and counted. Files get their final names only when all of them are complete.
"""

import contextlib
import pathlib
import sys
from typing import NamedTuple

from absl import app, flags

from mmx.config import ConfigError, DataConfig
from mmx.data import mixture, sources

_SOURCE = flags.DEFINE_string('source', None, 'Corpus, as in data.source; weights are ignored.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write; must hold no ArrayRecord yet.', required=True)
_SHARDS = flags.DEFINE_integer('shards', 1, 'Files to write.', lower_bound=1)
_TEXT_FIELD = flags.DEFINE_string('text_field', DataConfig.text_field, 'Field of a JSONL row that holds the document.')


class Counts(NamedTuple):
  documents: int
  bytes: int  # of text
  empty: int
  malformed: int


def prepare(source: str, output: str, shards: int, text_field: str) -> Counts:
  """Writes document i to shard i mod `shards`. Raises ConfigError on a bad corpus or an output folder in use."""
  from array_record.python.array_record_module import ArrayRecordWriter

  opened = [sources.open(part.item, text_field) for part in mixture.parse(source)]
  folder = pathlib.Path(output)
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'--output: {output} is a file')
  if any(folder.glob('*.arrayrecord')):
    raise ConfigError(f'--output: {output} holds ArrayRecord files already; name another folder')
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f'documents-{shard:05d}-of-{shards:05d}.arrayrecord' for shard in range(shards)]
  partial = [path.with_suffix('.partial') for path in paths]
  documents = num_bytes = empty = 0
  with contextlib.ExitStack() as stack:
    # One record a chunk, as random access wants it: otherwise each read would decompress its neighbours too.
    writers = [ArrayRecordWriter(str(path), 'group_size:1') for path in partial]
    for writer in writers:
      stack.callback(writer.close)
    for corpus in opened:
      for text in (corpus[index] for index in range(len(corpus))):
        if text:
          content = text.encode('utf-8')
          writers[documents % shards].write(content)
          documents += 1
          num_bytes += len(content)
        elif text is not None:
          empty += 1
  malformed = sum(len(corpus.malformed) for corpus in opened)
  if not documents:
    for path in partial:
      path.unlink()
    raise ConfigError(f'--source: {source}: no document in it ({empty} empty, {malformed} malformed)')
  for path, final in zip(partial, paths, strict=True):
    path.rename(final)
  return Counts(documents, num_bytes, empty, malformed)


def main(_):
  try:
    counts = prepare(_SOURCE.value, _OUTPUT.value, _SHARDS.value, _TEXT_FIELD.value)
  except ConfigError as error:
    sys.exit(f'error: {error}')
  print(f'{_OUTPUT.value}: {counts.documents} documents, {counts.bytes} bytes in {_SHARDS.value} file(s)')
  print(f'left out: {counts.malformed} malformed, {counts.empty} empty')


if __name__ == '__main__':
  app.run(main)
