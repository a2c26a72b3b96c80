"""Documents by index: `open('kind:path')` gives a `Source` whose `[i]` is the text of one document.

Kinds: `stdlib` (the interpreter's own library), `text:` (a document a file), `jsonl:` (a document a row),
`arrayrecord:` (a document a record, UTF-8), `synthetic:` (generated from the index), `ruler:` (long-context tasks in
symbols with targets of their own, see symbols.py). A document that cannot be read is
None; its place is logged and counted in `source.malformed`, and the pipeline goes on without it. Sources read at
access, so a large corpus opens fast; `stdlib` alone is held in memory (12 MB), because removing its duplicates reads
everything anyway.
"""

import abc
import builtins
import hashlib
import json
import logging
import os
import pathlib
import sysconfig
from dataclasses import dataclass, field

import numpy as np

from mmx.config import ConfigError
from mmx.data import symbols, synthetic

KINDS = ('stdlib', 'text', 'jsonl', 'arrayrecord', 'synthetic', 'ruler')
STDLIB_EXCLUDED = frozenset({'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'})
SHOWN_IN_FULL = 5  # malformed rows logged one by one; after that the count is logged at 10, 100, 1000, ...

logger = logging.getLogger(__name__)


def open(item: str, text_field: str = 'text') -> 'Source':
  """Opens one source, 'kind' or 'kind:path'. Raises ConfigError if there is no such kind, folder, file or document."""
  kind, _, where = item.partition(':')
  if kind not in KINDS:
    raise ConfigError(f'data.source: unknown kind {kind!r} in {item!r}; one of {", ".join(KINDS)}')
  if kind == 'stdlib':
    if where:
      raise ConfigError(f'data.source: {item!r}: stdlib takes no path')
    return standard_library()
  if not where:
    what = 'task' if kind in ('synthetic', 'ruler') else 'path'
    raise ConfigError(f'data.source: {item!r} names no {what}; write {kind}:...')
  if kind == 'synthetic':
    return Synthetic(where)
  if kind == 'ruler':
    return Ruler(where)
  if kind == 'text':
    return TextFiles(where)
  if kind == 'jsonl':
    return JsonLines(where, text_field)
  return ArrayRecords(where)


@dataclass
class Malformed:
  """Places that could not be read, each counted once however often it is visited."""

  source: str
  places: set[str] = field(default_factory=set)

  def __len__(self) -> int:
    return len(self.places)

  def report(self, place: str, reason: str) -> None:
    if place in self.places:
      return
    self.places.add(place)
    count = len(self.places)
    if count <= SHOWN_IN_FULL:
      logger.warning('%s: malformed, left out: %s', place, reason)
    elif str(count).strip('0') == '1':
      logger.warning('%s: %d malformed rows so far, the latest %s: %s', self.source, count, place, reason)


class Source(abc.ABC):
  """`len(source)` documents; `source[i]` is a str, or None if that one is malformed.

  Attributes:
    name: the item it was opened with.
    record_bytes: int64 [n], stored size of each record, at least the bytes of its text; None if only reading tells.
    stored_bytes: bytes of the whole corpus as stored.
    fingerprint: hash of what identifies the corpus, free of absolute paths.
    malformed: what could not be read so far.
  """

  def __init__(self, name: str, record_bytes: np.ndarray | None, stored_bytes: int, fingerprint: str):
    self.name = name
    self.record_bytes = record_bytes
    self.stored_bytes = stored_bytes
    self.fingerprint = fingerprint
    self.malformed = Malformed(name)

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def __getitem__(self, index: int) -> str | None: ...

  def decode(self, content: bytes, place: str) -> str | None:
    """UTF-8 text, or None with a report. A NUL byte marks a binary file, which no tokenizer should learn from."""
    if b'\0' in content:
      return self.malformed.report(place, 'binary (NUL byte)')
    try:
      return content.decode('utf-8')
    except UnicodeDecodeError as error:
      return self.malformed.report(place, f'bad UTF-8: byte {content[error.start]:#04x} at offset {error.start}')


class InMemory(Source):
  """Documents that are already here."""

  def __init__(self, name: str, documents: list[str]):
    sizes = np.array([len(document.encode('utf-8')) for document in documents], np.int64)
    super().__init__(name, sizes, int(sizes.sum()), digest(documents))
    self.documents = documents

  def __len__(self) -> int:
    return len(self.documents)

  def __getitem__(self, index: int) -> str:
    return self.documents[index]


def standard_library() -> InMemory:
  """Source of the running interpreter's standard library, no tests: 730 different files, 12.1 MB on Python 3.11."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  documents = []
  for path in files_below(root, suffixes=('.py',), excluded=STDLIB_EXCLUDED):
    try:
      documents.append(path.read_bytes().decode('utf-8'))
    except UnicodeDecodeError:
      pass  # a library file in another encoding is the interpreter's affair, not a row of somebody's corpus
  documents = [document for document in dict.fromkeys(documents) if document]
  if not documents:
    raise ConfigError(f'data.source: stdlib: this interpreter ships no library source (looked in {root})')
  return InMemory('stdlib', documents)


class TextFiles(Source):
  """Every regular file below a folder (hidden ones excepted), or a single file, as one document each."""

  def __init__(self, where: str):
    name = f'text:{where}'
    self.paths = [path for path in existing_files(name, where) if path.stat().st_size]
    if not self.paths:
      raise ConfigError(f'data.source: {name}: every file is empty')
    sizes = np.array([path.stat().st_size for path in self.paths], np.int64)
    super().__init__(name, sizes, int(sizes.sum()), digest(index_of(where, self.paths)))

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> str | None:
    path = self.paths[index]
    return self.decode(path.read_bytes(), str(path))


class JsonLines(Source):
  """Rows of .jsonl files; `text_field` of each row's object is the document. Empty lines are not rows.

  Opening scans the files for line ends (about 1 GB/s) and keeps 24 bytes a row; rows are parsed at access.
  """

  def __init__(self, where: str, text_field: str):
    name = f'jsonl:{where}'
    self.text_field = text_field
    self.paths = existing_files(name, where, suffixes=('.jsonl', '.ndjson', '.json'))
    indexes = [line_index(path) for path in self.paths]
    self.file_of_row = np.repeat(np.arange(len(self.paths), dtype=np.int32), [len(index[0]) for index in indexes])
    self.starts, sizes, self.line_numbers = (np.concatenate(column) for column in zip(*indexes, strict=True))
    if not sizes.size:
      raise ConfigError(f'data.source: {name}: no rows in {len(self.paths)} file(s)')
    super().__init__(name, sizes, int(sizes.sum()), digest(index_of(where, self.paths)))

  def __len__(self) -> int:
    return len(self.record_bytes)

  def __getitem__(self, index: int) -> str | None:
    path = self.paths[self.file_of_row[index]]
    place = f'{path}:{self.line_numbers[index]}'
    with builtins.open(path, 'rb') as file:
      file.seek(self.starts[index])
      line = self.decode(file.read(self.record_bytes[index]), place)
    if line is None:
      return None
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      return self.malformed.report(place, f'not JSON: {error.msg} at column {error.colno}')
    except RecursionError:
      return self.malformed.report(place, 'JSON nested too deeply')
    if not isinstance(row, dict):
      return self.malformed.report(place, f'expected an object, found {type(row).__name__}')
    if self.text_field not in row:
      return self.malformed.report(place, f'no field {self.text_field!r}; it has {", ".join(map(repr, row)) or "none"}')
    text = row[self.text_field]
    if not isinstance(text, str):
      return self.malformed.report(place, f'field {self.text_field!r} is {type(text).__name__}, not a string')
    try:
      text.encode('utf-8')
    except UnicodeEncodeError:
      return self.malformed.report(place, f'field {self.text_field!r} holds half of a surrogate pair')
    return text


def line_index(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(start, size, line number from 1) of every line that is not empty, each int64 [rows], read in 16 MiB blocks."""
  ends, offset = [], 0
  with builtins.open(path, 'rb') as file:
    while block := file.read(16 << 20):
      ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord('\n')) + offset)
      offset += len(block)
  ends = np.concatenate([*ends, [offset]]).astype(np.int64)  # the last line may lack its line end
  starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
  sizes = ends - starts
  kept = np.flatnonzero(sizes > 0)
  return starts[kept], sizes[kept], kept + 1


class ArrayRecords(Source):
  """Records of .arrayrecord files, each the UTF-8 text of one document (scripts/prepare_data.py writes them)."""

  def __init__(self, where: str):
    name = f'arrayrecord:{where}'
    paths = existing_files(name, where, suffixes=('.arrayrecord', '.array_record'))
    from array_record.python import array_record_data_source

    try:
      self.records = array_record_data_source.ArrayRecordDataSource([str(path) for path in paths])
    except Exception as error:  # the reader raises bare RuntimeError and ValueError from C++
      raise ConfigError(f'data.source: {name}: not readable as ArrayRecord: {" ".join(str(error).split())}') from error
    if not len(self.records):
      raise ConfigError(f'data.source: {name}: no records in {len(paths)} file(s)')
    super().__init__(name, None, sum(path.stat().st_size for path in paths), digest(index_of(where, paths)))

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> str | None:
    return self.decode(self.records[index], f'{self.name}, record {index}')


class Synthetic(Source):
  """A generated task (see synthetic.py): a million documents, none stored."""

  def __init__(self, task: str):
    if task not in synthetic.TASKS:
      raise ConfigError(f'data.source: unknown task {task!r} in synthetic:{task}; one of {", ".join(synthetic.TASKS)}')
    super().__init__(f'synthetic:{task}', None, 0, task)
    self.document = synthetic.TASKS[task]

  def __len__(self) -> int:
    return synthetic.NUM_DOCUMENTS

  def __getitem__(self, index: int) -> str:
    return self.document(index)


class Ruler(Source):
  """Long-context tasks as a course of lessons (symbols.py); mixture.Course gives its documents a seed and a side."""

  def __init__(self, lessons: str):
    super().__init__(f'ruler:{lessons}', None, 0, lessons)
    self.lessons = symbols.Lessons.parse(lessons)

  def __len__(self) -> int:
    return len(self.lessons)

  def __getitem__(self, index: int) -> symbols.Document:
    return self.lessons.document(symbols.TRAIN, index)


def existing_files(name: str, where: str, suffixes: tuple[str, ...] = ('',)) -> list[pathlib.Path]:
  """The file itself, or the files below the folder. Raises ConfigError if there is none."""
  path = pathlib.Path(where).expanduser()
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise ConfigError(f'data.source: {name}: no such file or folder')
  found = files_below(path, suffixes, excluded=frozenset({'__pycache__'}))
  if not found:
    wanted = ' or '.join(f'*{suffix}' for suffix in suffixes) if any(suffixes) else 'files'
    raise ConfigError(f'data.source: {name}: the folder holds no {wanted}')
  return found


def files_below(root: pathlib.Path, suffixes: tuple[str, ...], excluded: frozenset[str]) -> list[pathlib.Path]:
  """Regular files with one of the suffixes, hidden and excluded names left out, sorted by path relative to `root`."""
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in excluded and not name.startswith('.')]
    found += [pathlib.Path(folder, name) for name in names if name.endswith(suffixes) and not name.startswith('.')]
  return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def index_of(where: str, paths: list[pathlib.Path]) -> list[str]:
  """Relative names and sizes: what tells two corpora apart without reading them, on any machine."""
  root = pathlib.Path(where).expanduser()
  return [f'{path.relative_to(root).as_posix() if path != root else path.name} {path.stat().st_size}' for path in paths]


def digest(texts: list[str]) -> str:
  """Sixteen hex digits that depend on every text and on the borders between them."""
  state = hashlib.blake2b(digest_size=8)
  for text in texts:
    content = text.encode('utf-8', 'surrogateescape')
    state.update(len(content).to_bytes(8, 'little'))
    state.update(content)
  return state.hexdigest()
