"""Arms and sweeps as pure functions on override dicts, `{'model.moe.top_k': 8, …}`.

    sweep = prod(zipit(axis('model.moe.num_experts', [32, 128]), axis('model.moe.top_k', [2, 8])),
                 axis('optim.learning_rate', [1e-3, 3e-3]))
    arms = expand(base, sweep)    # {'num_experts=32+top_k=2+learning_rate=0.001': Experiment, …}, four arms

A sweep is a list of such dicts; the order is kept, and the first arm is the one that reports compare the others with.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mmx.config import ConfigError, Experiment, override

Sweep = list[dict[str, Any]]


def axis(path: str, values: Iterable[Any]) -> Sweep:
  """One field, several values."""
  return [{path: value} for value in values]


def prod(*axes: Sweep) -> Sweep:
  """Every combination; the last axis varies fastest."""
  return [_merge(choice) for choice in itertools.product(*axes)]


def zipit(*axes: Sweep) -> Sweep:
  """Side by side: the first of each, the second of each, … .

  Raises:
    ConfigError: the axes differ in length.
  """
  if len({len(each) for each in axes}) > 1:
    lengths = ', '.join(f"{' and '.join(each[0]) if each else 'an empty axis'} has {len(each)}" for each in axes)
    raise ConfigError(f'zipit needs axes of one length: {lengths}')
  return [_merge(choice) for choice in zip(*axes, strict=True)]


def chain(*sweeps: Sweep) -> Sweep:
  """One after the other."""
  return [dict(overrides) for sweep in sweeps for overrides in sweep]


def _merge(choice: Sequence[dict[str, Any]]) -> dict[str, Any]:
  merged = {}
  for overrides in choice:
    if twice := sorted(merged.keys() & overrides.keys()):
      raise ConfigError(f'{twice[0]} is set by two axes of one sweep; an arm can take only one value of it')
    merged |= overrides
  return merged


def name_of(overrides: dict[str, Any], among: Iterable[str] = ()) -> str:
  """A short name that is also a folder: 'num_experts=128+top_k=8', or 'base' for no override.

  Args:
    overrides: one arm.
    among: further paths to be told apart; a field keeps as many parents as that takes (`train.seed`, `data.seed`).
  """
  paths = overrides.keys() | set(among)
  parts = [f'{_short_path(path, paths)}={_short_value(value)}' for path, value in overrides.items()]
  return '+'.join(parts) or 'base'


def _short_path(path: str, paths: Iterable[str]) -> str:
  """The shortest tail of `path` that no other path ends in."""
  fields = path.split('.')
  tails = ['.'.join(fields[-count:]) for count in range(1, len(fields) + 1)]
  return next((tail for tail in tails if not any(o != path and f'.{o}'.endswith(f'.{tail}') for o in paths)), path)


def _short_value(value: Any) -> str:
  """Letters, digits and . _ - alone, so that the name works as a folder, in a shell and in TensorBoard's filter."""
  return re.sub(r'[^\w.-]+', '_', str(value)).strip('_')


def expand(
    base: Experiment, sweep: Sweep, name: Callable[[dict[str, Any]], str] | None = None
) -> dict[str, Experiment]:
  """One experiment per arm, by name, in the order of the sweep.

  Args:
    base: what every arm starts from.
    sweep: override dicts.
    name: names an arm from its overrides; `name_of` among the sweep's paths if left out.

  Raises:
    ConfigError: the sweep is empty, two arms share a name, or an override does not fit the schema.
  """
  if not sweep:
    raise ConfigError('the sweep has no arms; an axis may have no values')
  paths = {path for overrides in sweep for path in overrides}
  arms, overrides_of = {}, {}
  for overrides in sweep:
    arm = name(overrides) if name else name_of(overrides, paths)
    if arm in arms:
      raise ConfigError(f'two arms are named {arm!r}: {overrides_of[arm]} and {overrides}')
    arms[arm], overrides_of[arm] = override(base, overrides), overrides
  return arms


if __name__ == '__main__':
  from mmx import launch  # here: it stands on mmx.train, and this file on nothing but the config

  launch.command()
