"""A Hugging Face folder into a run folder, or straight onto a mesh, a tensor at a time.

Everything is compared before anything is written: a folder that lacks a tensor, holds one we do not know, or one of
another shape, is refused with the full list.
"""

import dataclasses
import math
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mmx import checkpoint, checkpoint_params, config
from mmx.config import ConfigError, Experiment, ModelConfig
from mmx.convert import families, safetensors_io
from mmx.convert.family import Family, read_json
from mmx.convert.mapping import Tensor, tensors
from mmx.convert.safetensors_io import QUANTISED, READABLE, SCALE_SUFFIX, Stored

BESIDE = (  # what belongs to a model besides its weights, copied as it is
    'config.json', 'generation_config.json', 'tokenizer*', 'vocab.json', 'merges.txt', 'special_tokens_map.json',
    'added_tokens.json', 'chat_template*',
)
# Tensors of any family that follow from the config.
COMPUTED = {r'\.rotary_emb\.inv_freq$': 'rotary frequencies, which follow from the config'}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where each part of our leaves is found."""

  parts: Mapping[str, list[tuple[Tensor, int]]]  # {our leaf: (tensor, which of its leaves this one is)}
  stored: Mapping[str, Stored]
  block: tuple[int, int]  # of the scales of quantised tensors
  skipped: Mapping[str, int]  # {what they are: how many tensors were left behind}

  def tensors(self) -> list[Tensor]:
    """Each once, in the order of the files."""
    whole = {tensor.name: tensor for parts in self.parts.values() for tensor, _ in parts}
    return [whole[name] for name in sorted(whole, key=lambda name: (self.stored[name].file, self.stored[name].offset))]

  def read(self, tensor: Tensor) -> np.ndarray:
    """In float32."""
    return safetensors_io.read(self.stored, tensor.name, self.block)

  def slice(self, leaf: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """`leaf[index]` in float32; only tensors that reach into it are read."""
    wanted = [range(size)[one] for size, one in zip(shape, index, strict=True)]
    out = np.zeros([len(places) for places in wanted], np.float32)
    for tensor, which in self.parts.get(leaf, ()):
      fixed = [(places, at) for places, at in zip(wanted, tensor.at, strict=True) if isinstance(at, int)]
      if all(at in places for places, at in fixed):
        to = tuple(at - places.start if isinstance(at, int) else slice(None) for places, at in zip(wanted, tensor.at))
        of = tuple(slice(places.start, places.stop) for places, at in zip(wanted, tensor.at) if isinstance(at, slice))
        out[to] = tensor.to_ours(self.read(tensor))[which][of]
    return out


def read_experiment(folder: pathlib.Path, overrides: Mapping[str, object]) -> tuple[Family, Experiment]:
  """(family, experiment) that config.json describes, everything but the model at its default, then overridden."""
  family, fields = families.read_config(folder)
  name = re.sub(r'[^\w.+=-]', '_', folder.resolve().name)
  experiment = config.override(Experiment(name=name), fields)
  if (folder / 'tokenizer.json').exists():
    experiment = config.override(experiment, {'data.tokenizer': str((folder / 'tokenizer.json').absolute())})
  experiment = config.validate(config.override(experiment, overrides))
  family.require(experiment.model)
  return family, experiment


def make_plan(folder: pathlib.Path, family: Family, model: ModelConfig) -> Plan:
  """Compares a folder with the model.

  Raises:
    ConfigError: one line with every tensor that is missing, unknown, misshapen, or cannot be read.
  """
  quantisation = read_json(folder / 'config.json').get('quantization_config') or {}
  block = tuple(quantisation.get('weight_block_size') or (128, 128))
  return compare(folder, family, model, safetensors_io.read_index(folder), block)


def compare(folder, family: Family, model: ModelConfig, stored: Mapping[str, Stored], block=(128, 128)) -> Plan:
  """`make_plan` by the headers alone, under the naming of the family that fits best."""
  leaves = checkpoint.named_leaves(checkpoint_params.abstract_variables(model))[0]
  shapes = {name: leaf.shape for name, leaf in leaves.items()}
  namings = [{tensor.name: tensor for tensor in tensors(model, naming, shapes)} for naming in family.namings]
  chosen = max(namings, key=lambda expected: len(expected.keys() & stored.keys()))
  found = {name: stored[name] for name in chosen if name in stored}
  scale_of = {
      name + SCALE_SUFFIX: name for name, one in found.items() if one.code == QUANTISED and len(one.shape) == 2
  }

  missing = [name for name in chosen if name not in stored]
  misshapen = [
      f'{name} is {list(one.shape)}, not {list(chosen[name].shape)}'
      for name, one in found.items() if one.shape != chosen[name].shape
  ]
  plain = found | {scale: stored[scale] for scale in scale_of if scale in stored}
  unreadable = [
      f'{name} is {one.code}' for name, one in plain.items()
      if one.code not in READABLE and not (one.code == QUANTISED and name + SCALE_SUFFIX in scale_of)
  ]
  bare = [name for scale, name in scale_of.items() if scale not in stored]
  for scale, name in scale_of.items():
    if scale in stored and (shape := safetensors_io.scale_shape(found[name].shape, block)) != stored[scale].shape:
      misshapen.append(f'{scale} is {list(stored[scale].shape)}, not {list(shape)}')

  skipped, unknown = Counter(), []
  for name in stored.keys() - chosen.keys() - scale_of.keys():
    kinds = [kind for pattern, kind in (COMPUTED | family.left_behind).items() if re.search(pattern, name)]
    skipped.update(kinds[:1])
    unknown += [] if kinds else [name]
  problems = {
      'missing': missing, 'unknown': sorted(unknown), 'of another shape': misshapen,
      'of a dtype that is not read': unreadable, f'{QUANTISED} without {SCALE_SUFFIX}': bare,
  }
  told = [f'{len(names):,} {what}: {", ".join(names)}' for what, names in problems.items() if names]
  if told:
    raise ConfigError(f'{folder}: its tensors are not those of its config.json: {"; ".join(told)}')

  parts: dict[str, list[tuple[Tensor, int]]] = {}
  for tensor in chosen.values():
    for which, leaf in enumerate(tensor.leaves):
      parts.setdefault(leaf, []).append((tensor, which))
  without = [name for name in leaves if name not in parts and not name.startswith('router/')]
  if without:
    raise ConfigError(f'{family.name} has nothing for {", ".join(without)} of this model')
  return Plan(parts, stored, block, dict(skipped))


def load(plan: Plan, abstract_variables):
  """Variables in the placement that `abstract_variables` asks for, each shard read by the host that holds it.

  No stacked parameter is ever whole in memory but on a single device. A tensor that several shards cut is read for
  each.
  """
  leaves, treedef = checkpoint.named_leaves(abstract_variables)

  def place(name, leaf):
    read = lambda index: plan.slice(name, leaf.shape, index)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

  return jax.tree.unflatten(treedef, [place(name, leaf) for name, leaf in leaves.items()])


def import_checkpoint(
    folder: pathlib.Path, run: pathlib.Path, overrides: Mapping[str, object] = {}, say: Callable[[str], None] = print
) -> None:
  """Writes config.gin, the checkpoint and the tokenizer's files of a Hugging Face folder into a run folder.

  Memory is that of the largest single tensor and its copy on the way to the disk. Chunks on disk are cut for the mesh
  of the config, so that `--set mesh.fsdp=64` here lets each of 64 devices read its own part alone.

  Raises:
    ConfigError: see `make_plan`; or the config is not valid. CheckpointError: the run folder holds a checkpoint.
  """
  family, experiment = read_experiment(folder, overrides)
  plan = make_plan(folder, family, experiment.model)
  sizes = [size for axis in config.MESH_AXES if (size := getattr(experiment.mesh, axis)) > 0]
  resolved = config.resolve_mesh(experiment.mesh, math.prod(sizes))
  mesh = jax.sharding.AbstractMesh(tuple(resolved.values()), tuple(resolved))
  abstract = checkpoint_params.abstract_variables(experiment.model, mesh)
  pieces = {leaf: parts[0][0].piece() for leaf, parts in plan.parts.items()}
  for what, count in plan.skipped.items():
    say(f'left behind: {count:,} tensors ({what})')
  with checkpoint_params.ParametersWriter(run, abstract, pieces) as writer:
    for tensor in plan.tensors():
      for leaf, part in zip(tensor.leaves, tensor.to_ours(plan.read(tensor)), strict=True):
        writer.write(leaf, tensor.at, part)
    copied = copy_beside(folder, run)
    if 'tokenizer.json' in copied:
      experiment = config.override(experiment, {'data.tokenizer': str((run / 'tokenizer.json').absolute())})
    (run / 'config.gin').write_text(config.dump(experiment))
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract['params']))
  say(f'{family.name}: {len(plan.tensors()):,} tensors, {total:,} parameters -> {run}')


def copy_beside(source: pathlib.Path, target: pathlib.Path, names=BESIDE) -> list[str]:
  """Copies the files of a model that are not weights; returns their names."""
  found = sorted({file for pattern in names for file in source.glob(pattern) if file.is_file()})
  for file in found:
    shutil.copyfile(file, target / file.name)
  return [file.name for file in found]
