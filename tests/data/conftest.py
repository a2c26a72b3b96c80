"""A small corpus on disk, the same in every session."""

import json

import numpy as np
import pytest

WORDS = 'salt river über lantern 猫 copper the of — morning glass'.split()


def small_documents(count: int = 60) -> list[str]:
  """Different documents of 0 to 59 lines, some words of more than one byte, half of them without a last line end."""
  documents = []
  for index in range(count):
    random = np.random.default_rng(index)
    lines = [' '.join(random.choice(WORDS, 5)) for _ in range(index)]
    documents.append('\n'.join([f'document {index}', *lines]) + '\n' * (index % 2))
  return documents


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """A folder with the documents as text/NN.txt, as rows.jsonl in two files, and the list itself."""
  root = tmp_path_factory.mktemp('corpus')
  documents = small_documents()
  (root / 'text' / 'deep').mkdir(parents=True)
  for index, document in enumerate(documents):
    folder = root / 'text' / 'deep' if index % 3 == 0 else root / 'text'
    (folder / f'{index:02d}.txt').write_text(document, encoding='utf-8')
  (root / 'jsonl').mkdir()
  for name, part in (('a', documents[:25]), ('b', documents[25:])):
    rows = [json.dumps({'id': index, 'text': document}) for index, document in enumerate(part)]
    (root / 'jsonl' / f'{name}.jsonl').write_text('\n'.join(rows), encoding='utf-8')
  return root, documents
