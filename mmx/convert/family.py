"""What the families share: reading and writing config.json, and which family a folder or a model belongs to."""

import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from mmx.config import ConfigError, Layer, ModelConfig, num_layers
from mmx.convert.mapping import Naming, layer_places, shortest_pattern


@dataclass(frozen=True)
class Family:
  """One architecture. `read` and `write` translate config.json; `fixed` is what its definition leaves no choice in."""

  name: str
  architectures: tuple[str, ...]
  model_types: tuple[str, ...]
  namings: tuple[Naming, ...]  # the first is what export writes
  left_behind: Mapping[str, str]  # {regular expression: what those tensors are}, which import does not need
  fixed: Mapping[str, Any]  # {'attention.qk_norm': 'full_width'}: fields of our model
  layers: tuple[Layer, ...]  # the kinds it has
  read: Callable[['Fields'], dict[str, Any]]  # overrides of our model, less `fixed`
  write: Callable[[ModelConfig], dict[str, Any]]

  def require(self, model: ModelConfig) -> None:
    """Raises ConfigError if the model has something that this family lacks."""
    for path, needed in self.fixed.items():
      if (found := attrgetter(path)(model)) != needed:
        raise ConfigError(f'model.{path} = {found!r}: {self.name} has {needed!r} only')
    for _, _, layer in layer_places(model.pattern):
      if layer not in self.layers:
        kinds = ', '.join(f'{kind.mixer}/{kind.ffn}' for kind in self.layers)
        raise ConfigError(f'model.pattern = {model.pattern!r}: {self.name} has layers {kinds} only')


class Fields:
  """config.json, or a group inside it, that says what it lacks and what it may not hold. null counts as absent."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self.values = {name: value for name, value in values.items() if value is not None}
    self.where = where

  def __contains__(self, name: str) -> bool:
    return name in self.values

  def __getitem__(self, name: str) -> Any:
    if name not in self.values:
      raise ConfigError(f'{self.where}: lacks {name}')
    return self.values[name]

  def get(self, name: str, default: Any) -> Any:
    return self.values.get(name, default)

  def number(self, name: str, *default: float) -> float:
    """A positive number; `default` where it is absent, if one is given."""
    value = self.get(name, *default) if default else self[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
      raise ConfigError(f'{self.where}: {name} = {value!r}: expected a positive number')
    return value

  def group(self, name: str) -> 'Fields':
    """An object inside, empty if absent."""
    values = self.get(name, {})
    if not isinstance(values, dict):
      raise ConfigError(f'{self.where}: {name} = {values!r}: expected an object')
    return Fields(values, f'{self.where}: {name}')

  def only(self, **allowed: Any) -> None:
    """Each field, where present, must have this value, the only one that is implemented."""
    for name, value in allowed.items():
      if self.get(name, value) != value:
        raise ConfigError(f'{self.where}: {name} = {self.values[name]!r}: only {value!r} is implemented')

  def per_layer(self, name: str, meaning: Mapping[Any, str]) -> list[str]:
    """A list with an entry for each layer, translated."""
    values, count = self[name], self.number('num_hidden_layers')
    if not isinstance(values, list) or len(values) != count:
      raise ConfigError(f'{self.where}: {name}: expected a list of {count} entries, one for each layer')
    if strange := [value for value in values if value not in meaning]:
      raise ConfigError(f'{self.where}: {name}: {strange[0]!r} is unknown; known are {list(meaning)}')
    return [meaning[value] for value in values]


def read_common(fields: Fields) -> dict[str, Any]:
  """Overrides that every family reads alike, rotary_dim aside."""
  rope, scaling = fields.group('rope_parameters'), fields.group('rope_scaling')
  rope.only(rope_type='default')
  scaling.only(rope_type='default', type='default')
  dtype = fields.get('dtype', fields.get('torch_dtype', 'float32'))
  return {
      'vocab_size': fields['vocab_size'],
      'd_model': fields['hidden_size'],
      'norm_eps': fields['rms_norm_eps'],
      'tie_embeddings': fields.get('tie_word_embeddings', False),
      'compute_dtype': 'bfloat16' if dtype == 'bfloat16' else 'float32',
      'attention.num_heads': fields['num_attention_heads'],
      'attention.num_kv_heads': fields['num_key_value_heads'],
      'attention.head_dim': head_dim(fields),
      'attention.rope_theta': rope['rope_theta'] if 'rope_theta' in rope else fields['rope_theta'],
      'moe.num_experts': fields['num_local_experts'],
      'moe.top_k': fields['num_experts_per_tok'],
  }


def head_dim(fields: Fields) -> int:
  """Given, or the width split over the heads."""
  if 'head_dim' in fields:
    return fields.number('head_dim')
  return fields.number('hidden_size') // fields.number('num_attention_heads')


def pattern_of(mixers: list[str], ffns: list[str]) -> str:
  """The layer pattern of mixers and feed-forwards by layer."""
  return shortest_pattern([Layer(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)])


def write_common(model: ModelConfig) -> dict[str, Any]:
  """The same fields the other way round, those of RoPE as released files have them and as transformers writes them."""
  a = model.attention
  return {
      'vocab_size': model.vocab_size, 'hidden_size': model.d_model, 'rms_norm_eps': model.norm_eps,
      'num_hidden_layers': num_layers(model.pattern), 'num_attention_heads': a.num_heads,
      'num_key_value_heads': a.num_kv_heads, 'head_dim': a.head_dim, 'rotary_dim': a.rotary_dim,
      'rope_theta': a.rope_theta,
      'rope_parameters': {
          'rope_type': 'default', 'rope_theta': a.rope_theta, 'partial_rotary_factor': a.rotary_dim / a.head_dim,
      },
      'hidden_act': 'silu', 'tie_word_embeddings': model.tie_embeddings,
      'num_local_experts': model.moe.num_experts, 'num_experts_per_tok': model.moe.top_k,
  }


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """An object of a JSON file. Raises ConfigError."""
  try:
    values = json.loads(file.read_text())
  except OSError as error:
    raise ConfigError(f'{file}: {error.strerror}') from None
  except ValueError as error:
    raise ConfigError(f'{file}: no JSON: {error}') from None
  if not isinstance(values, dict):
    raise ConfigError(f'{file}: expected an object, found {type(values).__name__}')
  return values
