"""One run and its folder: arm and seed, what it starts from, whether it has finished, where its figures come from.

A folder is a path of this machine or an address such as gs://; `etils.epath` reads and writes both.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from importlib import metadata

from etils import epath

from mmx import config


@dataclasses.dataclass(frozen=True)
class Run:
  """One arm at one seed, which decides initial parameters and data order; the arms of a seed share the latter."""

  arm: str
  seed: int
  base: config.Experiment
  folder: epath.Path
  index: int
  of: int
  differs: list[str]

  @functools.cached_property
  def experiment(self) -> config.Experiment:
    seeds = {'train.seed': self.seed, 'data.seed': self.base.data.seed + self.seed}
    return config.override(self.base, seeds)

  def origin(self, arms) -> epath.Path | None:
    """The folder whose parameters this run starts from, by train.init_from; None for new ones."""
    name = self.experiment.train.init_from
    if not name:
      return None
    return self.folder.parent.parent / name / self.folder.name if name in arms else epath.Path(name).expanduser()

  def check_origin(self, arms, ahead) -> None:
    """Raises ConfigError unless there is something to start from, or a run among those `ahead` will make it."""
    origin = self.origin(arms)
    if origin is None or origin in [run.folder for run in ahead] or (origin / 'config.gin').exists():
      return
    name = self.experiment.train.init_from
    raise config.ConfigError(
        f'{self.arm}: train.init_from = {name!r}: ' + (
            f'arm {name} has not run at seed {self.seed} in this workdir; run it first' if name in arms else
            f'no run folder there (config.gin is missing), and no arm of that name; arms are {", ".join(arms)}'
        )
    )

  def finished(self, resume: bool = True) -> bool:
    """Whether result.json of this very config is there. Refuses a folder that holds another config's run."""
    written = self.folder / 'config.gin'
    if written.exists():
      if not resume:
        raise config.ConfigError(f'{self.folder} holds a run already; without --noresume it is continued')
      different = config.diff(load_config(written), self.experiment)
      if different:
        path, there, here = different[0]
        more = f' (and {len(different) - 1} more)' if len(different) > 1 else ''
        raise config.ConfigError(
            f'{written}: the run in this workdir has {path} = {there!r}, this one {here!r}{more}; '
            'give another --workdir or the same config'
        )
    return (self.folder / 'result.json').exists()


def load_config(path) -> config.Experiment:
  """`config.load`, by way of a local copy where the file is no local one."""
  if not is_remote(path):
    return config.load(path)
  with tempfile.TemporaryDirectory() as folder:
    local = pathlib.Path(folder) / path.name
    local.write_text(path.read_text())
    return config.load(local)


def absolute(path: epath.Path) -> epath.Path:
  return path if is_remote(path) else path.absolute()


def is_remote(path) -> bool:
  return '://' in os.fspath(path)


def provenance(corpus, start):
  """Where the figures of a run come from."""
  import jax

  device = jax.devices()[0]
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
  describe = ['git', 'describe', '--always', '--dirty']
  revision = ''
  with contextlib.suppress(OSError):  # no git here
    folder = pathlib.Path(__file__).parent
    revision = subprocess.run(describe, cwd=folder, capture_output=True, text=True).stdout.strip()
  return {
      'device': f'{jax.device_count()} x {device.device_kind}'
      + (f' ({os.cpu_count()} cores)' if device.platform == 'cpu' else ''),
      'versions': {'python': sys.version.split()[0]} | {name: metadata.version(name) for name in names},
      'git': revision, 'corpus': corpus, 'started_at_step': start, 'date': time.strftime('%Y-%m-%d'),
  }
