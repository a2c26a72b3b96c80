"""Trains a byte-level BPE tokenizer on the training side of a corpus.

  python scripts/train_tokenizer.py --source=stdlib --vocab_size=4096 --output=tokenizer.json

Held-out documents (the ones that training never sees) are not learned from; the bytes per token printed at the end are
measured on them, after checking that each decodes to itself. Weights of a mixture are ignored: every document counts
once. Use the result with `--set data.tokenizer=tokenizer.json --set model.vocab_size=...`.
"""

import pathlib
import sys
import time

from absl import app, flags

from mmx.config import ConfigError, DataConfig
from mmx.data import mixture, sources, tokenizer

SMALLEST_VOCABULARY = 257  # every byte, and the end of a document

_SOURCE = flags.DEFINE_string('source', 'stdlib', 'Corpus, as in data.source.')
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 4096, 'Entries, the 256 bytes and <eos> among them.')
_OUTPUT = flags.DEFINE_string('output', 'tokenizer.json', 'File to write.')
_TEXT_FIELD = flags.DEFINE_string('text_field', DataConfig.text_field, 'Field of a JSONL row that holds the document.')
_HELDOUT_FRACTION = flags.DEFINE_float('heldout_fraction', DataConfig.heldout_fraction, 'As in data.heldout_fraction.')


def train(source: str, vocab_size: int, output: str, text_field: str, heldout_fraction: float) -> tokenizer.Tokenizer:
  """Trains, writes `output` and reads it back. Raises ConfigError on a bad corpus, size or output folder."""
  import tokenizers

  if vocab_size < SMALLEST_VOCABULARY:
    raise ConfigError(f'--vocab_size = {vocab_size} must be at least {SMALLEST_VOCABULARY}: 256 bytes and <eos>')
  if not pathlib.Path(output).resolve().parent.is_dir():
    raise ConfigError(f'--output: the folder of {output!r} does not exist')
  opened = [sources.open(part.item, text_field) for part in mixture.parse(source)]
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = byte_level
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=['<eos>'],
      initial_alphabet=byte_level.alphabet(),
      show_progress=False,
  )
  texts = (text for corpus in opened for text in mixture.documents(corpus, heldout_fraction, 'train'))
  model.train_from_iterator(texts, trainer)
  model.save(output)
  return tokenizer.load(output)


def measure(learned: tokenizer.Tokenizer, source: str, text_field: str, heldout_fraction: float) -> float | None:
  """Bytes per token of the held-out documents, their ends not counted; None if there are none.

  Raises RuntimeError if a document does not decode to itself.
  """
  num_bytes = num_tokens = 0
  for part in mixture.parse(source):
    for text in mixture.documents(sources.open(part.item, text_field), heldout_fraction, 'heldout'):
      ids = learned.encode(text)
      if learned.decode(ids) != text:
        raise RuntimeError(f'{part.item}: the document that begins {text[:40]!r} does not decode to itself')
      num_bytes += len(text.encode('utf-8'))
      num_tokens += len(ids)
  return num_bytes / num_tokens if num_tokens else None


def main(_):
  start = time.perf_counter()
  corpus = (_SOURCE.value, _TEXT_FIELD.value, _HELDOUT_FRACTION.value)
  try:
    learned = train(corpus[0], _VOCAB_SIZE.value, _OUTPUT.value, *corpus[1:])
    bytes_per_token = measure(learned, *corpus)
  except ConfigError as error:
    sys.exit(f'error: {error}')
  print(f'{_OUTPUT.value}: {learned.vocab_size} entries in {time.perf_counter() - start:.1f} s')
  print(f'{bytes_per_token:.3f} held-out bytes per token' if bytes_per_token else 'nothing held out to measure on')


if __name__ == '__main__':
  app.run(main)
