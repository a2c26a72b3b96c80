"""Gin text in and out. Only the syntax is gin's: no registry, no `@configurable`, no state beyond one call of `read`.

    include 'configs/models/moe_cpu.gin'  # beside this file, below the working directory, or below the repository
    D = 128                               # UPPER_CASE is a macro; as in gin, its last value counts everywhere
    model.d_model = %D
    model.moe:                            # block form
      num_experts = 32
      top_k = 2

Values are literals. Scopes, @references and imports are refused.
"""

import dataclasses
import difflib
import inspect
import pathlib
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from gin import config_parser

from mmx import config
from mmx.config import ConfigError

LINE_LENGTH = 120


class Binding(NamedTuple):
  """One assignment of a file."""

  path: str  # 'model.moe.top_k'; not yet known to be a field
  value: Any
  where: str  # 'configs/x.gin:7'


class _Macro(NamedTuple):
  name: str


class _Reference(NamedTuple):
  name: str


class _Placeholders(config_parser.ParserDelegate):
  """What the parser makes of %NAME and @name: resolved, or refused, once the line is known."""

  def macro(self, name):
    return _Macro(name)

  def configurable_reference(self, name, evaluate):
    return _Reference(name)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(file: pathlib.Path) -> list[Binding]:
  """Assignments of a file and of what it includes, in the order in which they take effect, macros replaced.

  Raises:
    ConfigError: `file:line: what`.
  """
  macros: dict[str, Any] = {}
  bindings = list(_bindings(file, macros, ()))
  return [binding._replace(value=_resolve(binding.value, binding.where, macros)) for binding in bindings]


def _bindings(file: pathlib.Path, macros: dict[str, Any], including: tuple[pathlib.Path, ...]) -> Iterator[Binding]:
  """`including` are the files whose include led here."""
  line_of: dict[str, int] = {}
  for statement in _statements(file):
    line = statement.location.line_num
    where = f'{file}:{line}'
    if isinstance(statement, config_parser.ImportStatement):
      raise ConfigError(f'{where}: a config file imports nothing; Python belongs in experiments/')
    if isinstance(statement, config_parser.IncludeStatement):
      yield from _bindings(_included(statement.filename, where, (*including, file)), macros, (*including, file))
      continue
    if statement.scope:
      raise ConfigError(f'{where}: scope {statement.scope!r} before {statement.selector}: there are no scopes here')
    if isinstance(statement, config_parser.BlockDeclaration):
      continue  # its assignments follow as statements of their own
    path = f'{statement.selector}.{statement.arg_name}' if statement.arg_name else statement.selector
    if path in line_of:
      raise ConfigError(f'{where}: {path} is already set in line {line_of[path]} of this file')
    line_of[path] = line
    if re.fullmatch(r'[A-Z][A-Z0-9_]*', path):
      macros[path] = statement.value
    else:
      yield Binding(path, statement.value, where)


def _statements(file: pathlib.Path) -> Iterator[Any]:
  """Statements of gin's parser; its errors as one line."""
  try:
    yield from config_parser.ConfigParser(file.read_text(encoding='utf-8'), _Placeholders())
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{file}: cannot be read: {error}') from None
  except (SyntaxError, tokenize.TokenError) as error:
    syntax = isinstance(error, SyntaxError)
    line, reason = (error.lineno, error.msg) if syntax else (error.args[1][0], error.args[0])
    reason = reason.strip().splitlines()[-1].strip().rstrip('.')
    raise ConfigError(f'{file}:{line}: {reason}; expected path.to.field = literal, text in quotes') from None


def _included(name: str, where: str, including: tuple[pathlib.Path, ...]) -> pathlib.Path:
  try:
    file = config.find(name, including[-1].parent)
  except ConfigError as error:
    raise ConfigError(f'{where}: include {error}') from None
  if file.resolve() in [each.resolve() for each in including]:
    raise ConfigError(f'{where}: include {name}: includes itself, by way of {" → ".join(map(str, including))}')
  return file


def _resolve(value: Any, where: str, macros: Mapping[str, Any], through: tuple[str, ...] = ()) -> Any:
  """The literal behind a value; `through` are the macros that led here."""
  if isinstance(value, _Reference):
    raise ConfigError(f'{where}: @{value.name}: values are literals; there are no references here')
  if not isinstance(value, _Macro):
    return value
  if value.name in through:
    raise ConfigError(f'{where}: macro {value.name} is defined by itself')
  if value.name not in macros:
    nearest = difflib.get_close_matches(value.name, macros, n=1)
    raise ConfigError(f'{where}: unknown macro %{value.name}' + (f'; did you mean %{nearest[0]}?' if nearest else ''))
  return _resolve(macros[value.name], where, macros, (*through, value.name))


# --- writing ----------------------------------------------------------------------------------------------------------


def write(values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> str:
  """Gin text of {dotted path: literal}, a block for each group; `notes` are comments by path of a field or a group."""
  notes = notes or {}
  groups: dict[str, list[str]] = {}
  for path in values:
    groups.setdefault(path.rpartition('.')[0], []).append(path)
  blocks = [
      '\n'.join([
          *_comment(notes.get(group, '')),
          *([f'{group}:'] if group else []),
          *(line for path in paths for line in _assignment(path, values[path], notes.get(path, ''))),
      ])
      for group, paths in groups.items()
  ]
  return '\n\n'.join(blocks) + '\n'


def _assignment(path: str, value: Any, note: str) -> list[str]:
  """One line, or two if the comment does not fit beside the value."""
  group, _, name = path.rpartition('.')
  indent = '  ' if group else ''
  line = f'{indent}{name} = {value!r}'
  if len(f'{line}  # {note}') <= LINE_LENGTH:
    return [f'{line}  # {note}' if note else line]
  return [*(indent + comment for comment in _comment(note)), line]


def _comment(note: str) -> list[str]:
  return [f'# {line}' for part in note.split('\n\n') for line in textwrap.wrap(part, LINE_LENGTH - 4)]


def annotated_defaults() -> str:
  """The text of configs/base.gin: every field with its default, its allowed values and its comment in mmx/config.py."""
  title = 'Every field with its default. Generated from mmx/config.py: UPDATE_GOLDEN=1 pytest tests/test_config.py'
  notes = {'': title}
  _annotate(config.Experiment, '', notes)
  return write(config.to_flat_dict(config.Experiment()), notes)


def _annotate(group: type, prefix: str, notes: dict[str, str]) -> None:
  comments = dict(re.findall(r'^  (\w+): .*?  # (.*)$', inspect.getsource(group), re.MULTILINE))
  for field in dataclasses.fields(group):
    path = prefix + field.name
    if dataclasses.is_dataclass(field.type):
      notes[path] = inspect.getdoc(field.type)
      _annotate(field.type, f'{path}.', notes)
    else:
      allowed = ' | '.join(map(repr, get_args(field.type))) if get_origin(field.type) is Literal else ''
      notes[path] = '; '.join(filter(None, [allowed, comments.get(field.name)]))
