"""Documents generated from their index alone: recall tasks in printable ASCII, one symbol a byte.

Every document depends on nothing but its index, so the corpus needs no storage, is the same on every machine and
process, and can be entered anywhere. The symbols are single bytes: with the byte tokenizer one token is one symbol.
"""

import numpy as np

NUM_DOCUMENTS = 1_000_000
SYMBOLS = np.frombuffer(bytes(range(ord('!'), ord('~') + 1)), np.uint8)  # 94 printable bytes; '|' is the separator
SYMBOLS = SYMBOLS[SYMBOLS != ord('|')]
KEYS, VALUES = SYMBOLS[:46], SYMBOLS[46:92]


def generator(task: int, index: int) -> np.random.Generator:
  return np.random.Generator(np.random.PCG64([task, index]))


def text(*parts: np.ndarray) -> str:
  return b'|'.join(part.tobytes() for part in parts).decode('ascii')


def copy(index: int) -> str:
  """`s|s`: 8 to 64 random symbols, then the same again; the second half is predictable from the first."""
  random = generator(1, index)
  symbols = random.choice(SYMBOLS, random.integers(8, 65))
  return text(symbols, symbols)


def induction(index: int) -> str:
  """128 symbols in which a symbol is always followed by the same symbol, the one of this document's random permutation.

  Every eighth step jumps to a random symbol; after a symbol's first visit its successor is known (induction heads:
  Olsson et al. 2022, In-context Learning and Induction Heads).
  """
  random = generator(2, index)
  alphabet = random.choice(SYMBOLS, 16, replace=False)
  successor = random.permutation(16)
  jumps = random.integers(0, 16, 128)
  path = np.zeros(128, np.int64)
  for step in range(1, 128):
    path[step] = jumps[step] if step % 8 == 0 else successor[path[step - 1]]
  return text(alphabet[path])


def mqar(index: int) -> str:
  """Multi-query associative recall: 4 to 32 pairs of key and value, then all of the pairs again in another order.

  Zoology (Arora et al. 2023), with single bytes: in the second part every other symbol, the value, is predictable.
  """
  random = generator(3, index)
  pairs = random.integers(4, 33)
  keys = random.choice(KEYS, pairs, replace=False)
  table = np.stack([keys, random.choice(VALUES, pairs)], axis=1)
  return text(table, table[random.permutation(pairs)])


TASKS = {'copy': copy, 'induction': induction, 'mqar': mqar}
