"""The one schema: frozen dataclasses under `Experiment`; files and flags only fill them in.

Order of precedence: dataclass defaults, included files, the file, the experiment, the arm, `--set`.
A default stands here and nowhere else. Letters: D d_model, H heads, K kv heads, Dh head dim, E experts, F their hidden.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import operator
import os
import pathlib
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class AttentionConfig:
  """Grouped-query attention (M2 report, section 2.1)."""

  num_heads: int = 4  # H, query heads
  num_kv_heads: int = 2  # K, each shared by H/K query heads
  head_dim: int = 32  # Dh
  rotary_dim: int = 16  # the first rotary_dim of Dh rotate (partial RoPE)
  rope_theta: float = 10_000.0
  qk_norm: Literal['none', 'full_width', 'per_head'] = 'full_width'  # M2: one RMSNorm over all heads; M3: one for each
  implementation: Literal['auto', 'reference', 'chunked', 'cudnn', 'splash'] = 'auto'


@dataclass(frozen=True)
class MoEConfig:
  """Sparse feed-forward layer: gate, experts, balance, and how tokens travel between expert shards."""

  num_experts: int = 32  # E
  top_k: int = 2  # experts per token
  d_ff: int = 256  # F, hidden width of one expert
  gate: Literal['sigmoid', 'softmax'] = 'sigmoid'
  routed_scaling: float = 1.0  # factor on the routed sum (M3: 2.0)
  shared_d_ff: int = 0  # hidden width of the always-on shared expert; 0 is none
  bias_update_rate: float = 1e-3  # step of the selection-only expert bias (aux-loss-free balancing); 0 freezes it
  balance_loss_weight: float = 0.0  # coefficient of the Switch-style balance loss
  capacity_factor: float = 0.0  # 0 is dropless; otherwise each expert keeps ceil(factor * tokens * top_k / E) per shard
  transport: Literal['ring', 'ragged', 'padded'] = 'ring'  # used when mesh.expert > 1
  implementation: Literal['auto', 'reference', 'loop', 'blocks', 'megablox'] = 'auto'  # grouped product over experts


@dataclass(frozen=True)
class MTPConfig:
  """Multi-token prediction: `depth` sequential modules, each predicting one token further (M2 report, section 2.3)."""

  depth: int = 0  # modules; 0 is off
  weight: float = 0.3  # loss weight until the learning-rate decay begins
  final_weight: float = 0.1  # reached linearly at the end of the decay


@dataclass(frozen=True)
class ModelConfig:
  """A decoder: `pattern` names each layer's mixer and, after a slash, its feed-forward ('moe' if left out).

  Grammar: items separated by blanks; `item*n` repeats; parentheses group. Each top-level item is one scanned segment:
  'full*62', '(lightning*7 full)*10', 'full/dense*3 full*57'.
  """

  vocab_size: int = 264  # rows of the embedding; at least the tokenizer's vocabulary
  d_model: int = 128  # D
  pattern: str = 'full*2'
  d_ff: int = 512  # hidden width of dense feed-forward layers
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'  # parameters are float32 always
  remat: Literal['none', 'full', 'dots', 'mixer'] = 'none'  # what the backward pass recomputes; see layers/block.py
  layer_loop: Literal['scan', 'unroll'] = 'scan'  # same parameters and values either way; unrolling compiles slower
  attention: AttentionConfig = field(default_factory=AttentionConfig)
  moe: MoEConfig = field(default_factory=MoEConfig)
  mtp: MTPConfig = field(default_factory=MTPConfig)


@dataclass(frozen=True)
class DataConfig:
  """Tokens in. `source` is a weighted mixture: 'kind:path@weight' items separated by blanks (see data/sources.py)."""

  source: str = 'stdlib'  # stdlib | text:DIR | jsonl:DIR_OR_FILE | arrayrecord:DIR_OR_FILE | synthetic:TASK
  tokenizer: str = 'byte'  # 'byte' or the path of a tokenizer.json
  text_field: str = 'text'  # field of a JSONL row that holds the document
  seq_len: int = 256  # T, tokens per row of a batch
  batch_size: int = 16  # rows per optimizer step over all processes
  packing: Literal['concat', 'first_fit', 'best_fit'] = 'concat'
  heldout_fraction: float = 0.05  # share of documents, chosen by content hash, never trained on
  seed: int = 0  # order of documents
  num_workers: int = 0  # grain worker processes; 0 reads in the training process


@dataclass(frozen=True)
class OptimConfig:
  """AdamW with decoupled decay on matrices only; the schedule is a function of the optimizer step."""

  name: Literal['adamw'] = 'adamw'
  learning_rate: float = 3e-3  # peak
  schedule: Literal['wsd', 'cosine', 'constant'] = 'wsd'  # warm-up, stable, decay
  warmup_steps: int = 20
  decay_steps: int = 60  # length of the final decay under 'wsd'
  final_lr_ratio: float = 0.1  # last learning rate over the peak
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # global gradient norm; 0 is no clipping


@dataclass(frozen=True)
class TrainConfig:
  """The loop."""

  steps: int = 200  # optimizer steps
  seed: int = 0  # initial parameters
  accumulate: int = 1  # microbatches per optimizer step
  loss_chunk: int = 0  # tokens per chunk of head and cross-entropy; 0 is all at once
  z_loss_weight: float = 0.0  # coefficient of mean(logsumexp(logits)^2)
  log_every: int = 10  # steps between scalars
  histogram_every: int = 50  # steps between expert-load histograms
  checkpoint_every: int = 100  # steps between checkpoints; one is always written at the end
  keep_checkpoints: int = 2  # newest ones kept


@dataclass(frozen=True)
class EvalConfig:
  """Held-out loss and bits per byte."""

  every: int = 50  # steps; also after the last
  batches: int = 8  # batches of data.batch_size rows, the same ones each time


@dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1, 'what is left'. Rows of a batch are split over the first three."""

  replica: int = 1  # parameters repeated
  fsdp: int = -1  # parameters and optimizer state split
  expert: int = 1  # experts split, tokens travel
  tensor: int = 1  # heads and hidden widths split
  num_devices: int = 0  # devices used; 0 is all


@dataclass(frozen=True)
class Experiment:
  """Everything that decides a run."""

  name: str = 'mmx'
  model: ModelConfig = field(default_factory=ModelConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optim: OptimConfig = field(default_factory=OptimConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)


class ConfigError(ValueError):
  """A configuration a person can mend; the message is one line that names file, line, field and what is allowed."""


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
      or difflib.get_close_matches(path, namesakes, n=1, cutoff=0)
      or difflib.get_close_matches(path, FIELDS, n=1, cutoff=0.8)  # lower, and optim.lr would mean optim.b1
  )
  if nearest:
    return f'unknown field; did you mean {nearest[0]}?'
  known = siblings or [f.name for f in dataclasses.fields(Experiment)]
  return f'unknown field; {parent if parent and siblings else "an experiment"} has {", ".join(known)}'


# --- layer patterns ---------------------------------------------------------------------------------------------------

MIXERS = ('full',)  # names of layers/mixer.py, repeated here because this file imports no layers; a test compares them
FFNS = ('moe', 'dense')


@dataclass(frozen=True)
class Layer:
  """What one layer consists of, by name."""

  mixer: str
  ffn: str


@dataclass(frozen=True)
class Segment:
  """`repeats` times the layers of `unit`: one scan."""

  unit: tuple[Layer, ...]
  repeats: int


@functools.cache
def parse_pattern(pattern: str) -> tuple[Segment, ...]:
  """Segments of a layer pattern; the grammar stands at `ModelConfig`.

  'full/dense*3 (lightning*7 full)*10' is two segments: one dense layer, three times, and a unit of eight, ten times.
  Only a top-level item is scanned; repeats inside a group are written out in its unit.

  Raises:
    ConfigError: names the column, what stands there and what may.
  """
  tokens = [(match.group(), match.start() + 1) for match in re.finditer(r'[()*]|[^\s()*]+', pattern)]
  tokens.append(('the end', len(pattern) + 1))
  position = 0

  def fail(expected):
    found, column = tokens[position]
    raise ConfigError(f'model.pattern = {pattern!r}, column {column}: expected {expected}, found {found}')

  def item():
    """One layer or group with its repeat -> Segment."""
    nonlocal position
    word, column = tokens[position]
    if word == '(':
      position += 1
      unit = sum((segment.unit * segment.repeats for segment in items()), ())
      if tokens[position][0] != ')':
        fail(f"')' for the '(' of column {column}")
    elif word in (')', '*', 'the end'):
      fail('a layer')
    else:
      mixer, slash, ffn = word.partition('/')
      if mixer not in MIXERS:
        fail(f'a mixer ({", ".join(MIXERS)})')
      if slash and ffn not in FFNS:
        fail(f'{mixer}/ and a feed-forward ({", ".join(FFNS)})')
      unit = (Layer(mixer, ffn or FFNS[0]),)
    position += 1
    repeats = 1
    if tokens[position][0] == '*':
      position += 1
      if not re.fullmatch(r'[1-9][0-9]*', tokens[position][0]):
        fail('a number of repeats, at least 1')
      repeats = int(tokens[position][0])
      position += 1
    return Segment(unit, repeats)

  def items():
    """Items up to a closing parenthesis or the end."""
    found = [item()]
    while tokens[position][0] not in (')', 'the end'):
      found.append(item())
    return found

  segments = items()
  if tokens[position][0] == ')':
    fail('a layer or the end')
  return tuple(segments)


def num_layers(pattern: str) -> int:
  """Layers of a pattern, all repeats counted."""
  return sum(segment.repeats * len(segment.unit) for segment in parse_pattern(pattern))


# --- validation -------------------------------------------------------------------------------------------------------

MESH_AXES = ('replica', 'fsdp', 'expert', 'tensor')
# A number must be positive, except these, where 0 switches something off or is a seed,
MAY_BE_ZERO = frozenset("""
    model.attention.rotary_dim model.moe.shared_d_ff model.moe.bias_update_rate model.moe.balance_loss_weight
    model.moe.capacity_factor model.mtp.depth model.mtp.weight model.mtp.final_weight data.seed data.num_workers
    optim.warmup_steps optim.decay_steps optim.final_lr_ratio optim.b1 optim.b2 optim.weight_decay optim.clip_norm
    train.seed train.loss_chunk train.z_loss_weight mesh.num_devices""".split())
# and these have an end as well (not included).
BELOW = {'data.heldout_fraction': 1, 'optim.b1': 1, 'optim.b2': 1, 'data.seed': 2**32, 'train.seed': 2**32}


def validate(experiment: Experiment, num_devices: int | None = None, num_processes: int | None = None) -> Experiment:
  """The experiment itself, if every value is in range and all shapes divide; None skips what hangs on that number.

  Raises:
    ConfigError: the first problem, in one line with the fields and their values.
  """
  for message, _ in _problems(experiment, num_devices, num_processes):
    raise ConfigError(message)
  return experiment


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
  """Sizes by axis, with -1 replaced by what is left: {'replica': 1, 'fsdp': 8, 'expert': 1, 'tensor': 1}.

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


def _problems(experiment: Experiment, num_devices: int | None, num_processes: int | None):
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
    ffns = {layer.ffn for segment in parse_pattern(model.pattern) for layer in segment.unit}
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

  heads, kv_heads = 'model.attention.num_heads', 'model.attention.num_kv_heads'
  rotary, head = 'model.attention.rotary_dim', 'model.attention.head_dim'
  experts, top_k = 'model.moe.num_experts', 'model.moe.top_k'
  yield from indivisible(heads, kv_heads, values[kv_heads])
  if values[rotary] % 2 or values[rotary] > values[head]:
    yield f'{shown(rotary)}: must be even and at most {shown(head)}', [rotary, head]
  if values[top_k] > values[experts]:
    yield f'{shown(top_k)}: more than {shown(experts)}', [top_k, experts]
  if model.mtp.depth + 1 >= experiment.data.seq_len:
    yield f'{shown("model.mtp.depth")}: looks past {shown("data.seq_len")}', ['model.mtp.depth', 'data.seq_len']

  sharded = [heads, kv_heads] + ['model.d_ff'] * ('dense' in ffns)
  if 'moe' in ffns:
    sharded += ['model.moe.d_ff', 'model.moe.shared_d_ff']
    yield from indivisible(experts, 'mesh.expert', mesh['expert'])
  for path in sharded:
    yield from indivisible(path, 'mesh.tensor', mesh['tensor'])

  yield from indivisible('data.batch_size', 'train.accumulate', train.accumulate)
  rows = experiment.data.batch_size // train.accumulate
  shards = [mesh[axis] for axis in MESH_AXES[:3]]
  if min(shards) > 0 and rows % math.prod(shards):
    product = f'mesh.replica * mesh.fsdp * mesh.expert = {" * ".join(map(str, shards))}'
    message = f'{shown("data.batch_size")}: its {rows} rows per microbatch do not divide by {product}'
    yield message, ['data.batch_size', 'train.accumulate', *axes[:3]]
  if num_processes:
    yield from indivisible('data.batch_size', 'the number of processes', num_processes)

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
  for message, paths in _problems(experiment, None, None):
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


def load_experiment(path: str | os.PathLike, scale: str = 'cpu') -> ExperimentFile:
  """Runs an experiment file, or wraps a gin file as the one arm 'main'. Arms are type-checked, not yet validated.

  A Python file must define `get_config(scale) -> Experiment` and may define `arms(base) -> {name: Experiment}`,
  `SCALES: tuple[str, ...]`, `SEEDS: {scale: (int, ...)}`, `PUBLISHED: str` (markdown) and `METRIC: str`.

  Raises:
    ConfigError: no such file, no `get_config`, an unknown scale, or whatever went wrong inside, as `file:line: what`.
  """
  file = find(path)
  if file.suffix == '.gin':
    if scale != 'cpu':
      raise ConfigError(f'{path}: a .gin file has no scales, so --scale={scale} means nothing; see configs/scales')
    base = load(path)
    return ExperimentFile(file.stem, '', base, {'main': base}, ('cpu',), (base.train.seed,), '', 'heldout_loss')
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
  return ExperimentFile(file.stem, doc, base, arms, scales, seeds, published, names.get('METRIC', 'heldout_loss'))


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
