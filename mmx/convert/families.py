"""Which family a folder or a model belongs to. A new family is one file plus one line here."""

import pathlib
from typing import Any

from mmx.config import ConfigError, ModelConfig
from mmx.convert import m2, m3, text01
from mmx.convert.family import Family, Fields, read_json
from mmx.convert.mapping import layer_places

FAMILIES = (m2.FAMILY, text01.FAMILY, m3.FAMILY)


def read_config(folder: pathlib.Path) -> tuple[Family, dict[str, Any]]:
  """(family, overrides such as {'model.d_model': 3072}) of a Hugging Face folder, from its config.json.

  Raises:
    ConfigError: another architecture, a field that is missing, or a value that is not implemented.
  """
  file = folder / 'config.json'
  values = read_json(file)
  names = [*(values.get('architectures') or []), values.get('model_type')]
  for family in FAMILIES:
    if set(names) & {*family.architectures, *family.model_types}:
      overrides = family.fixed | family.read(Fields(values, str(file)))
      return family, {f'model.{path}': value for path, value in overrides.items()}
  known = ', '.join(name for family in FAMILIES for name in family.architectures)
  raise ConfigError(f'{file}: architecture {" ".join(filter(None, names)) or "not given"} is not one of {known}')


def of_model(model: ModelConfig) -> Family:
  """The family that a model belongs to.

  Raises:
    ConfigError: none has all that this model has; names what the nearest lacks.
  """
  mixers = {layer.mixer for _, _, layer in layer_places(model.pattern)}
  if model.norm == 'gemma' or 'msa' in mixers:
    family = m3.FAMILY
  elif model.residual == 'post_norm' or 'lightning' in mixers:
    family = text01.FAMILY
  else:
    family = m2.FAMILY
  family.require(model)
  return family
