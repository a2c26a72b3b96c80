"""From files and flags to an `Experiment` (mmx/schema.py), checked: overrides, validation, gin files, experiment files.

Order of precedence: dataclass defaults, included files, the file, the experiment, the arm, `--set`.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import os
import pathlib
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from mmx.schema import (  # everybody imports the schema from here
    FFNS as FFNS,
    MIXERS as MIXERS,
    AttentionConfig as AttentionConfig,
    ConfigError as ConfigError,
    DataConfig as DataConfig,
    EvalConfig as EvalConfig,
    Experiment as Experiment,
    Layer as Layer,
    LightningConfig as LightningConfig,
    MeshConfig as MeshConfig,
    ModelConfig as ModelConfig,
    MoEConfig as MoEConfig,
    MSAConfig as MSAConfig,
    MTPConfig as MTPConfig,
    OptimConfig as OptimConfig,
    PostNormConfig as PostNormConfig,
    Segment as Segment,
    SlidingConfig as SlidingConfig,
    TrainConfig as TrainConfig,
    num_layers as num_layers,
    parse_pattern as parse_pattern,
)

# --- fields by dotted path --------------------------------------------------------------------------------------------


def _leaves(group, prefix=''):
  """(dotted path, declared type) of every field below a dataclass."""
  for f in dataclasses.fields(group):
    if dataclasses.is_dataclass(f.type):
      yield from _leaves(f.type, f'{prefix}{f.name}.')
    else:
      yield prefix + f.name, f.type


FIELDS = dict(_leaves(Experiment))  # {'model.d_model': int, ...} in the order of the schema


def to_flat_dict(experiment: Experiment) -> dict[str, Any]:
  """{'model.d_model': 128, ...}, in the order of the schema."""
  return {path: operator.attrgetter(path)(experiment) for path in FIELDS}


def diff(a: Experiment, b: Experiment) -> list[tuple[str, Any, Any]]:
  """(path, value in a, value in b) of every field that differs; `diff(Experiment(), e)` is what somebody chose."""
  others = to_flat_dict(b)
  return [(path, value, others[path]) for path, value in to_flat_dict(a).items() if value != others[path]]


def override(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
  """A copy with fields replaced: `override(e, {'model.moe.top_k': 8})`. Types are checked, shapes are not: `validate`.

  Raises:
    ConfigError: a path is no field (names the nearest) or a value is not of its type.
  """
  for path, value in overrides.items():
    experiment = _replace(experiment, path.split('.'), _checked(path, value))
  return experiment


def parse_assignment(text: str) -> tuple[str, Any]:
  """('optim.schedule', 'cosine') from `--set optim.schedule=cosine`: a literal, or a bare word where text is expected.

  Raises:
    ConfigError: no '=', an unknown field, or a value of the wrong type.
  """
  path, equals, literal = (part.strip() for part in text.partition('='))
  if not equals:
    raise ConfigError(f'--set {text}: expected path=value, such as train.steps=50')
  try:
    value = ast.literal_eval(literal)
  except (ValueError, SyntaxError, TypeError):
    value = literal
  if not isinstance(value, str) and FIELDS.get(path) not in (int, float, bool):
    value = literal  # the name of a run may well be 123
  try:
    return path, _checked(path, value)
  except ConfigError as error:
    raise ConfigError(f'--set {error}') from None


def _replace(group, names, value):
  name, *rest = names
  return dataclasses.replace(group, **{name: _replace(getattr(group, name), rest, value) if rest else value})


def _checked(path: str, value: Any) -> Any:
  """The value as the field's own type: an int serves as a float, and nothing else is converted."""
  if path not in FIELDS:
    raise ConfigError(f'{path}: {_unknown(path)}')
  declared = FIELDS[path]
  if get_origin(declared) is Literal:
    allowed = get_args(declared)
    if isinstance(value, str) and value in allowed:
      return value
    nearest = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f'; did you mean {nearest[0]!r}?' if nearest else ''
    raise ConfigError(f'{path} = {value!r}: allowed are {", ".join(map(repr, allowed))}{hint}')
  accepted = (int, float) if declared is float else declared
  if not isinstance(value, accepted) or isinstance(value, bool) and declared is not bool:
    raise ConfigError(f'{path} = {value!r}: expected {declared.__name__}, found {type(value).__name__}')
  return declared(value)


def _unknown(path: str) -> str:
  """What is wrong with a path that is no field, and which right one is nearest."""
  if inside := [field for field in FIELDS if field.startswith(f'{path}.')]:
    return f'is a group of fields, not a field; set one of them, such as {inside[0]}'
  parent, _, name = path.rpartition('.')
  group = f'{parent}.' if parent else ''
  siblings = list(dict.fromkeys(f.removeprefix(group).split('.')[0] for f in FIELDS if f.startswith(group)))
  namesakes = [field for field in FIELDS if field.rpartition('.')[2] == name]
  nearest = (
      [group + sibling for sibling in difflib.get_close_matches(name, siblings, n=1)]
      or namesakes
      or difflib.get_close_matches(path, FIELDS, n=1, cutoff=0.8)  # lower, and optim.lr would mean optim.b1
  )
  if nearest:
    return f'unknown field; did you mean {" or ".join(nearest)}?'
  known = siblings or [f.name for f in dataclasses.fields(Experiment)]
  return f'unknown field; {parent if parent and siblings else "an experiment"} has {", ".join(known)}'


# --- validation -------------------------------------------------------------------------------------------------------

MESH_AXES = ('replica', 'fsdp', 'expert', 'tensor', 'context')
# A number must be positive, except these, where 0 switches something off or is a seed,
MAY_BE_ZERO = frozenset("""
    model.attention.rotary_dim model.moe.shared_d_ff model.moe.bias_update_rate model.moe.balance_loss_weight
    model.moe.capacity_factor model.sliding.sink_tokens model.msa.kl_weight model.msa.warmup_steps
    model.mtp.depth model.mtp.weight model.mtp.final_weight data.seed data.num_workers
    optim.warmup_steps optim.decay_steps optim.final_lr_ratio optim.b1 optim.b2 optim.weight_decay optim.clip_norm
    train.seed train.loss_chunk train.z_loss_weight train.local_checkpoint_every train.spike_deviations
    train.hang_timeout mesh.num_devices""".split())
# and these have an end as well (not included).
BELOW = {'data.heldout_fraction': 1, 'optim.b1': 1, 'optim.b2': 1, 'data.seed': 2**32, 'train.seed': 2**32}


def validate(experiment: Experiment, num_devices: int | None = None) -> Experiment:
  """The experiment itself, if every value is in range and all shapes divide; None skips what hangs on that number.

  Raises:
    ConfigError: the first problem, in one line with the fields and their values.
  """
  for message, _ in _problems(experiment, num_devices):
    raise ConfigError(message)
  return experiment


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
  """Sizes by axis, with -1 replaced by what is left: {'replica': 1, 'fsdp': 8, 'expert': 1, ...}.

  Raises:
    ConfigError: the sizes do not multiply to the devices used, or more are asked for than exist.
  """
  sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
  shown = ' * '.join(f'{axis} {size}' for axis, size in sizes.items())
  used = mesh.num_devices or num_devices
  if used > num_devices:
    raise ConfigError(f'mesh.num_devices = {used}: more than the {num_devices} device(s) that exist')
  if bad := [axis for axis, size in sizes.items() if size < 1 and size != -1]:
    raise ConfigError(f'mesh.{bad[0]} = {sizes[bad[0]]}: must be positive, or -1 for what is left')
  left = [axis for axis, size in sizes.items() if size == -1]
  if len(left) > 1:
    raise ConfigError(f'mesh.{left[0]} and mesh.{left[1]} are both -1: only one axis can take what is left')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if fixed > used:
    raise ConfigError(f'mesh ({shown}) asks for {fixed} devices: more than the {used} at hand')
  if used % fixed or not left and fixed != used:
    remedy = f'set mesh.num_devices = {fixed} or one axis to -1' if not left else f'{used} does not divide by {fixed}'
    raise ConfigError(f'mesh ({shown}) does not multiply to the {used} devices at hand: {remedy}')
  return sizes | {axis: used // fixed for axis in left}


def _problems(experiment: Experiment, num_devices: int | None):
  """(message, paths of the fields involved), one after the other; later ones may rely on earlier ones being absent."""
  values = to_flat_dict(experiment)
  axes = [f'mesh.{axis}' for axis in MESH_AXES]
  model, optim, train = experiment.model, experiment.optim, experiment.train

  def shown(path):
    return f'{path} = {values[path]}'

  def indivisible(path, by, ways):
    """One problem, if the field does not divide by `ways` (-1: not known yet), which `by` describes."""
    if ways > 0 and values[path] % ways:
      yield f'{shown(path)}: does not divide by {by} = {ways}', [path, by]

  for path, value in values.items():
    if isinstance(value, int | float) and not isinstance(value, bool) and path not in axes:
      if not math.isfinite(value):
        yield f'{shown(path)}: must be finite', [path]
      elif value < 0 or value == 0 and path not in MAY_BE_ZERO:
        yield f'{shown(path)}: must {"not be negative" if path in MAY_BE_ZERO else "be positive"}', [path]
      elif value >= BELOW.get(path, math.inf):
        yield f'{shown(path)}: must be below {BELOW[path]}', [path]
  if not re.fullmatch(r'[\w.+=-]+', experiment.name):
    yield f'name = {experiment.name!r}: must be letters, digits and . _ - + =, as it names a folder', ['name']
  try:
    layers = {layer for segment in parse_pattern(model.pattern) for layer in segment.unit}
  except ConfigError as error:
    yield str(error), ['model.pattern']
    return
  try:
    mesh = {axis: getattr(experiment.mesh, axis) for axis in MESH_AXES}
    if known := num_devices or experiment.mesh.num_devices:
      mesh = resolve_mesh(experiment.mesh, known)
    else:  # the fewest devices that would do, so that all but their number is checked
      resolve_mesh(experiment.mesh, math.prod(size for size in mesh.values() if size > 0))
  except ConfigError as error:
    yield str(error), [*axes, 'mesh.num_devices']
    return

  mixers, ffns = {layer.mixer for layer in layers}, {layer.ffn for layer in layers}
  heads, kv_heads = 'model.attention.num_heads', 'model.attention.num_kv_heads'
  rotary, head = 'model.attention.rotary_dim', 'model.attention.head_dim'
  experts, top_k = 'model.moe.num_experts', 'model.moe.top_k'
  yield from indivisible(heads, kv_heads, values[kv_heads])
  if values[rotary] % 2 or values[rotary] > values[head]:
    yield f'{shown(rotary)}: must be even and at most {shown(head)}', [rotary, head]
  index, window = 'model.msa.index_dim', 'model.sliding.window'
  if 'msa' in mixers and values[rotary] > values[index]:
    yield f'{shown(rotary)}: the index branch rotates as many, so at most {shown(index)}', [rotary, index]
  if 'sliding' in mixers and values[window] > values['data.seq_len']:
    yield f'{shown(window)}: larger than {shown("data.seq_len")}', [window, 'data.seq_len']
  if 'msa' in mixers and values['model.msa.warmup_steps'] > train.steps:
    message = f'{shown("model.msa.warmup_steps")}: more than {shown("train.steps")}'
    yield message, ['model.msa.warmup_steps', 'train.steps']
  if values[top_k] > values[experts]:
    yield f'{shown(top_k)}: more than {shown(experts)}', [top_k, experts]
  if model.mtp.depth + 1 >= experiment.data.seq_len:
    yield f'{shown("model.mtp.depth")}: looks past {shown("data.seq_len")}', ['model.mtp.depth', 'data.seq_len']

  sharded = [heads, kv_heads] * bool(mixers - {'lightning'}) + ['model.lightning.num_heads'] * ('lightning' in mixers)
  sharded += ['model.d_ff'] * ('dense' in ffns)
  if 'moe' in ffns:
    sharded += ['model.moe.d_ff', 'model.moe.shared_d_ff']
    yield from indivisible(experts, 'mesh.expert', mesh['expert'])
  for path in sharded:
    yield from indivisible(path, 'mesh.tensor', mesh['tensor'])

  yield from indivisible('data.seq_len', 'mesh.context', mesh['context'])
  yield from indivisible('data.batch_size', 'train.accumulate', train.accumulate)
  rows = experiment.data.batch_size // train.accumulate
  shards = [mesh[axis] for axis in MESH_AXES[:3]]
  if min(shards) > 0 and rows % math.prod(shards):
    product = f'mesh.replica * mesh.fsdp * mesh.expert = {" * ".join(map(str, shards))}'
    message = f'{shown("data.batch_size")}: its {rows} rows per microbatch do not divide by {product}'
    yield message, ['data.batch_size', 'train.accumulate', *axes[:3]]

  if optim.final_lr_ratio > 1:
    yield f'{shown("optim.final_lr_ratio")}: must be at most 1', ['optim.final_lr_ratio']
  phases = ['optim.warmup_steps'] + ['optim.decay_steps'] * (optim.schedule == 'wsd')
  if sum(values[path] for path in phases) > train.steps:
    message = f'{" + ".join(map(shown, phases))}: longer than {shown("train.steps")}'
    yield message, [*phases, 'optim.schedule', 'train.steps']


# --- files ------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike) -> Experiment:
  """The experiment that a gin file describes, from the defaults up; `include`d files count as written in its place.

  The path is looked up below the working directory, then below the repository root.

  Raises:
    ConfigError: `file:line: what`, for bad syntax, an unknown field, a wrong type, a missing include, a value out of
      range or shapes that do not divide.
  """
  from mmx import gin_syntax  # here: the parser comes with gin-config, which only files need

  experiment, line_of = Experiment(), {}
  for binding in gin_syntax.read(find(path)):
    try:
      experiment = override(experiment, {binding.path: binding.value})
    except ConfigError as error:
      raise ConfigError(f'{binding.where}: {error}') from None
    line_of.pop(binding.path, None)
    line_of[binding.path] = binding.where
  for message, paths in _problems(experiment, None):
    lines = [where for field, where in line_of.items() if field in paths]
    raise ConfigError(f'{lines[-1] if lines else path}: {message}')
  return experiment


def dump(experiment: Experiment) -> str:
  """Gin text of every field; `load` of it gives an equal experiment."""
  from mmx import gin_syntax

  return gin_syntax.write(to_flat_dict(experiment))


def find(path: str | os.PathLike, *folders: pathlib.Path) -> pathlib.Path:
  """An existing file, looked up below `folders`, the working directory and the repository root, in this order.

  Raises:
    ConfigError: there is none; names the most similar file if one is near.
  """
  path = pathlib.Path(path).expanduser()
  places = [*folders, pathlib.Path(), pathlib.Path(__file__).parents[1]]
  for place in places:
    if (place / path).is_file():
      return place / path
  neighbours = {str(path.parent / n.name) for p in places for n in (p / path).parent.glob(f'*{path.suffix}')}
  nearest = difflib.get_close_matches(str(path), neighbours, n=1)
  raise ConfigError(f'{path}: no such file' + (f'; did you mean {nearest[0]}?' if nearest else ''))


@dataclass(frozen=True)
class ExperimentFile:
  """What `--config` names: one question, its arms, and what is known about the answer."""

  name: str
  doc: str  # question, arms, metric, source, cost; its first line is a title
  base: Experiment
  arms: dict[str, Experiment]  # the first is what the others are compared with
  scales: tuple[str, ...]  # values of --scale
  seeds: tuple[int, ...]
  published: str  # markdown; '' where nothing is
  metric: str  # key of result.json that the arms are compared by
  tolerance: float  # by which the arms may differ in parameters (flops.assert_comparable)


def load_experiment(path: str | os.PathLike, scale: str = 'cpu') -> ExperimentFile:
  """Runs an experiment file, or wraps a gin file as the one arm 'main'. Arms are type-checked, not yet validated.

  A Python file must define `get_config(scale) -> Experiment` and may define `arms(base) -> {name: Experiment}`,
  `SCALES: tuple[str, ...]`, `SEEDS: {scale: (int, ...)}`, `PUBLISHED: str` (markdown), `METRIC: str` and `TOLERANCE:
  float`.

  Raises:
    ConfigError: no such file, no `get_config`, an unknown scale, or whatever went wrong inside, as `file:line: what`.
  """
  file = find(path)
  if file.suffix == '.gin':
    if scale != 'cpu':
      raise ConfigError(f'{path}: a .gin file has no scales, so --scale={scale} means nothing; see configs/scales')
    base = load(path)
    return ExperimentFile(file.stem, '', base, {'main': base}, ('cpu',), (base.train.seed,), '', 'heldout_loss', 0.01)
  if file.suffix != '.py':
    raise ConfigError(f'{path}: an experiment is a .py or a .gin file')

  names: dict[str, Any] = {'__name__': f'experiment {file.stem}', '__file__': str(file)}
  with _naming_the_line(path, file):
    # Not imported: no entry in sys.modules, so two experiments of one name cannot meet there.
    exec(compile(file.read_text(), str(file), 'exec'), names)
  if not callable(names.get('get_config')):
    raise ConfigError(f'{path}: lacks get_config(scale), which returns the Experiment to run')
  scales = names.get('SCALES', (scale,))
  if scale not in scales:
    raise ConfigError(f'{path}: unknown scale {scale!r}; it has {", ".join(scales)}')
  with _naming_the_line(path, file):
    base = names['get_config'](scale)
    arms = names['arms'](base) if 'arms' in names else {'main': base}
  if not isinstance(base, Experiment):
    raise ConfigError(f'{path}: get_config({scale!r}) returned {type(base).__name__}, not an Experiment')
  if not isinstance(arms, dict) or not arms or not all(isinstance(arm, Experiment) for arm in arms.values()):
    raise ConfigError(f'{path}: arms(base) must return {{name: Experiment}} with at least one arm')
  seeds = tuple(names.get('SEEDS', {}).get(scale, (base.train.seed,)))
  doc, published = inspect.cleandoc(names.get('__doc__') or ''), inspect.cleandoc(names.get('PUBLISHED', ''))
  metric, tolerance = names.get('METRIC', 'heldout_loss'), names.get('TOLERANCE', 0.01)
  return ExperimentFile(file.stem, doc, base, arms, scales, seeds, published, metric, tolerance)


def select_arm(file: ExperimentFile, name: str) -> Experiment:
  """The arm of that name. Raises ConfigError, which lists the arms, if there is none."""
  if name not in file.arms:
    raise ConfigError(f'{file.name} has no arm {name!r}; its arms are {", ".join(file.arms)}')
  return file.arms[name]


@contextlib.contextmanager
def _naming_the_line(path, file):
  """Turns any exception into `path:line: what`, with the innermost line of `file` that was on the stack."""
  try:
    yield
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
      lines.append(error.lineno)
    what = str(error) if isinstance(error, ConfigError) else f'{type(error).__name__}: {" ".join(str(error).split())}'
    raise ConfigError(f'{path}:{lines[-1]}: {what}' if lines else f'{path}: {what}') from error
