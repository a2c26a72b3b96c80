"""Text to token ids and back: bytes as they are, a Hugging Face `tokenizer.json`, or symbols that are no text.

All kinds have `vocab_size`, `eos_id` (the end-of-document token that follows every document), `fingerprint` (a hash of
the content; a checkpoint trained with another tokenizer is refused by it), `encode`, `decode` and `byte_lengths`.
"""

import hashlib
import pathlib
from typing import Protocol

import numpy as np

from mmx.config import ConfigError
from mmx.data import symbols

END_OF_DOCUMENT = ('<eos>', '</s>', '[e~[', '<|endoftext|>', '<|end_of_text|>')  # '[e~[' is MiniMax's


class Tokenizer(Protocol):
  """What the data pipeline and the trainer ask of a tokenizer."""

  vocab_size: int
  eos_id: int
  fingerprint: str

  def encode(self, text: str) -> np.ndarray:
    """Token ids, int32 [n], with no special token added."""

  def decode(self, ids) -> str:
    """The text of the ids; special tokens appear by name."""

  def byte_lengths(self, text: str) -> np.ndarray:
    """UTF-8 bytes that each token of `encode(text)` stands for, int32 [n]; they sum to the bytes of the text."""


def load(name_or_path: str) -> Tokenizer:
  """'byte', 'symbols', or the path of a tokenizer.json. Raises ConfigError if there is no such file or it is none."""
  own = {'byte': ByteTokenizer, 'symbols': SymbolTokenizer}
  return own[name_or_path]() if name_or_path in own else FileTokenizer(name_or_path)


class ByteTokenizer:
  """Ids 0 to 255 are the bytes, 256 ends a document.

  Any bytes make the round trip: those that are no UTF-8 travel in the str as surrogate escapes.
  """

  vocab_size = 257
  eos_id = 256
  fingerprint = 'byte'

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode('utf-8', 'surrogateescape'), np.uint8).astype(np.int32)

  def decode(self, ids) -> str:
    pieces = [b'<eos>' if id == self.eos_id else bytes([id]) for id in np.asarray(ids).tolist()]
    return b''.join(pieces).decode('utf-8', 'surrogateescape')

  def byte_lengths(self, text: str) -> np.ndarray:
    return np.ones(len(text.encode('utf-8', 'surrogateescape')), np.int32)


class SymbolTokenizer:
  """The symbols of `ruler:` sources (symbols.py); in text, their numbers with blanks between."""

  vocab_size = symbols.VOCAB_SIZE
  eos_id = symbols.PADDING
  fingerprint = 'symbols'

  def encode(self, text: str) -> np.ndarray:
    return np.array(text.split(), np.int32)

  def decode(self, ids) -> str:
    return ' '.join(str(id) for id in np.asarray(ids).tolist())

  def byte_lengths(self, text: str) -> np.ndarray:
    """A symbol's number and the blank before it."""
    return np.array([len(word) + (place > 0) for place, word in enumerate(text.split())], np.int32)


class FileTokenizer:
  """A tokenizer.json of the `tokenizers` library. Special tokens are never recognised inside a document's text."""

  def __init__(self, path: str):
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      raise ConfigError(f"data.tokenizer: no such file {path!r}; give 'byte', 'symbols' or a path of a tokenizer.json")
    content = file.read_bytes()
    import tokenizers

    try:
      self.model = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
      raise ConfigError(f'data.tokenizer: {path} is not a tokenizer.json: {" ".join(str(error).split())}') from error
    self.model.no_truncation()
    self.model.no_padding()
    self.model.encode_special_tokens = True  # '<eos>' written in a document is text, not the end of that document
    vocabulary = self.model.get_vocab(with_added_tokens=True)
    known = [name for name in END_OF_DOCUMENT if name in vocabulary]
    if not known:
      raise ConfigError(f'data.tokenizer: {path} has no end-of-document token; known are {" ".join(END_OF_DOCUMENT)}')
    self.eos_id = vocabulary[known[0]]
    self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps, and the embedding needs a row for the largest
    self.fingerprint = hashlib.blake2b(content, digest_size=8).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    return np.array(self.model.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids) -> str:
    return self.model.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

  def byte_lengths(self, text: str) -> np.ndarray:
    """Each token reaches from where the one before ended to its own end, so a blank trimmed from an offset still counts
    and a character split over several tokens counts once."""
    offsets = self.model.encode(text, add_special_tokens=False).offsets
    if not offsets:
      return np.zeros(0, np.int32)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64))
    ends[-1] = len(text)
    bytes_before = np.concatenate([[0], np.cumsum([len(character.encode('utf-8')) for character in text])])
    return np.diff(bytes_before[ends], prepend=0).astype(np.int32)
