"""gs:// for tests: object storage over a folder of this machine, as gcsfs would be registered with fsspec."""

import contextlib

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Bucket(DirFileSystem):
  """gs://<bucket>/... is <root>/<bucket>/...; appending fails, as it does there."""

  protocol = ('gs', 'gcs')
  root = '/nowhere'

  def __init__(self, **_):
    super().__init__(path='/', fs=LocalFileSystem(auto_mkdir=True))

  def _join(self, path):
    return f'{self.root}/{self._strip_protocol(path)}' if isinstance(path, str) else [self._join(each) for each in path]

  def _relpath(self, path):
    return path.removeprefix(f'{self.root}/') if isinstance(path, str) else [self._relpath(each) for each in path]

  def open(self, path, mode='rb', **options):
    if 'a' in mode or '+' in mode:
      raise NotImplementedError('an object cannot be appended to')
    return super().open(path, mode, **options)


@contextlib.contextmanager
def mounted(root):
  """gs:// below `root` while the block runs."""
  for name in Bucket.protocol:
    fsspec.register_implementation(name, Bucket, clobber=True)
  Bucket.root = str(root)
  try:
    yield
  finally:
    Bucket.root = '/nowhere'
