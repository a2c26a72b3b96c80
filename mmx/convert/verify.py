"""Logits of a checkpoint against those of another implementation."""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mmx import checkpoint_params, config, sharding
from mmx.config import ConfigError
from mmx.convert import importer
from mmx.model import Decoder

TOLERANCE = 2e-5  # float32 on CPU, relative to the largest logit


@dataclass(frozen=True)
class Difference:
  """How far logits are from the reference."""

  absolute: float  # largest |ours - theirs|
  relative: float  # the same over the largest |theirs|
  same_argmax: float  # share of positions

  def __str__(self) -> str:
    return (
        f'maximum absolute difference {self.absolute:.3e}, relative to the largest logit {self.relative:.3e}, '
        f'equal argmax at {self.same_argmax:.4%} of positions'
    )


def verify(folder: pathlib.Path, reference: pathlib.Path, overrides: Mapping[str, object] = {}) -> Difference:
  """Computes the logits of a Hugging Face folder, or of a run folder, in float32 and compares them.

  reference: .npz with tokens [B, T] and logits [B, T, V]; each row is one document.

  Raises:
    ConfigError: the folder does not convert, or the reference is not one of this model.
  """
  tokens, theirs = read_reference(reference)
  imported = not (folder / 'config.gin').exists()
  if imported:
    family, experiment = importer.read_experiment(folder, overrides)
  else:
    experiment = config.validate(config.override(config.load(folder / 'config.gin'), overrides))
  experiment = config.override(experiment, {'model.compute_dtype': 'float32', 'model.mtp.depth': 0})
  model, mesh = experiment.model, sharding.build_mesh(experiment.mesh)
  if theirs.shape[-1] != model.vocab_size or tokens.max() >= model.vocab_size:
    raise ConfigError(f'{reference}: logits of {theirs.shape[-1]} tokens; the model has {model.vocab_size}')
  abstract = checkpoint_params.abstract_variables(model, mesh)
  if imported:
    variables = importer.load(importer.make_plan(folder, family, model), abstract)
  else:
    variables, _ = checkpoint_params.restore_params(folder, abstract)
  return difference(logits(model, mesh, variables, tokens), theirs)


def logits(model: config.ModelConfig, mesh, variables, tokens: np.ndarray) -> np.ndarray:
  """[B, T, V] float32 for tokens [B, T], each row one document."""
  rows = -len(tokens) % (mesh.size // mesh.shape['tensor'])  # rows of a batch are split over the other axes
  tokens_BT = jnp.asarray(np.pad(tokens, ((0, rows), (0, 0))), jnp.int32)
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)

  @jax.jit
  def apply(variables, tokens_BT):
    out = Decoder(model, mesh).apply(variables, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    return out.hidden.astype(jnp.float32) @ out.head

  with jax.default_matmul_precision('float32'):
    return np.asarray(apply(variables, tokens_BT))[: len(tokens)]


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
  """Of two arrays [B, T, V]."""
  absolute = float(np.abs(ours.astype(np.float64) - theirs).max())
  same = np.mean(ours.argmax(-1) == theirs.argmax(-1))
  return Difference(absolute, absolute / float(np.abs(theirs).max()), float(same))


def read_reference(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """(tokens [B, T] int, logits [B, T, V]) of an .npz file. Raises ConfigError."""
  try:
    with np.load(file) as opened:
      arrays = {name: opened[name] for name in opened.files}
  except OSError as error:
    raise ConfigError(f'{file}: {error.strerror or "not an .npz file"}') from None
  except (ValueError, AttributeError, TypeError):  # a pickle, one array, text
    raise ConfigError(f'{file}: not an .npz file of arrays') from None
  if absent := {'tokens', 'logits'} - arrays.keys():
    raise ConfigError(f'{file}: lacks {" and ".join(sorted(absent))}; it has {", ".join(arrays) or "nothing"}')
  tokens, logits = arrays['tokens'], arrays['logits']
  whole = np.issubdtype(tokens.dtype, np.integer)
  if not whole or tokens.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
    shapes = f'{tokens.dtype} {list(tokens.shape)} and {list(logits.shape)}'
    raise ConfigError(f'{file}: expected integer tokens [B, T] and logits [B, T, V], found {shapes}')
  return tokens, logits
