"""Which tensor of a Hugging Face checkpoint holds what of our parameters, on one line each, for both directions.

  'self_attn.q_proj.weight': ('mixer/w_q', 'd h e -> (h e) d')

reads: our leaf has axes d, h, e; theirs merges h and e and has d behind. On our side a capital letter stands for one
tensor for each place, with its number in the name. Several leaves are stacked in front, as axis s:

  'experts.{E}.w3.weight': ('ffn/w_up', 'E d f -> f d')
  'self_attn.qkv_proj.weight': ('mixer/w_q mixer/w_k mixer/w_v', 's d h e -> (h s e) d')

Rules of a layer leave out our first axis, which stacks the repeats of a segment.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmx.config import Layer, ModelConfig, parse_pattern

Rules = Mapping[str, tuple[str, str]]  # {their name: (our leaf or leaves, how axes correspond)}


@dataclass(frozen=True)
class Tensor:
  """One of their tensors and the parts of our leaves that it holds."""

  name: str
  shape: tuple[int, ...]
  leaves: tuple[str, ...]  # 'params/segment_0/layer_0/mixer/w_q'
  at: tuple[int | slice, ...]  # the part of each leaf, the same in all
  split: tuple[int, ...]  # their shape with merged axes apart
  order: tuple[int, ...]  # transposes the split array into the stacked parts

  def to_ours(self, theirs: np.ndarray) -> list[np.ndarray]:
    """The part of each leaf; views."""
    parts = theirs.reshape(self.split).transpose(self.order)
    return list(parts) if len(self.leaves) > 1 else [parts]

  def from_ours(self, parts: list[np.ndarray]) -> np.ndarray:
    """Their tensor, from the part of each leaf."""
    stacked = np.stack(parts) if len(parts) > 1 else np.asarray(parts[0])
    return stacked.transpose(np.argsort(self.order)).reshape(self.shape)

  def piece(self) -> tuple[int, ...]:
    """Shape of one part with the fixed axes kept, as 1."""
    sizes = iter(self.split[i] for i in (self.order[1:] if len(self.leaves) > 1 else self.order))
    return tuple(1 if isinstance(place, int) else next(sizes) for place in self.at)


@dataclass(frozen=True)
class Naming:
  """One way to name and cut the tensors of a family; the released files and transformers' own may differ."""

  mixers: Mapping[str, Rules]  # by mixer of the pattern
  ffns: Mapping[str, Rules]
  prefix: str = 'model.'  # before embed_tokens, norm and layers
  head: str = 'lm_head.weight'


NORMS: Rules = {
    'input_layernorm.weight': ('mixer_norm/scale', 'd -> d'),
    'post_attention_layernorm.weight': ('ffn_norm/scale', 'd -> d'),
}
ATTENTION: Rules = {
    **{f'self_attn.{x}_proj.weight': (f'mixer/w_{x}', 'd h e -> (h e) d') for x in 'qkv'},
    'self_attn.o_proj.weight': ('mixer/w_o', 'h e d -> d (h e)'),
    'self_attn.q_norm.weight': ('mixer/q_norm', 'n -> n'),
    'self_attn.k_norm.weight': ('mixer/k_norm', 'n -> n'),
}
EXPERTS: Rules = {
    'block_sparse_moe.gate.weight': ('ffn/w_router', 'd e -> e d'),
    'block_sparse_moe.experts.{E}.w1.weight': ('ffn/w_gate', 'E d f -> f d'),
    'block_sparse_moe.experts.{E}.w2.weight': ('ffn/w_down', 'E f d -> d f'),
    'block_sparse_moe.experts.{E}.w3.weight': ('ffn/w_up', 'E d f -> f d'),
}
EXPERT_BIAS: Rules = {'block_sparse_moe.e_score_correction_bias': ('ffn/bias', 'e -> e')}
FUSED_EXPERTS: Rules = {  # as transformers holds them in memory
    'mlp.gate.weight': ('ffn/w_router', 'd e -> e d'),
    'mlp.experts.gate_up_proj': ('ffn/w_gate ffn/w_up', 's e d f -> e (s f) d'),
    'mlp.experts.down_proj': ('ffn/w_down', 'e f d -> e d f'),
}


def tensors(model: ModelConfig, naming: Naming, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
  """Every tensor of a model in the order of its layers.

  shapes: of our leaves, {'params/final_norm/scale': (3072,), ...}. A rule whose leaf the model lacks, such as a norm
    it does without, is passed over.
  """
  top = {
      f'{naming.prefix}embed_tokens.weight': ('params/embedding/table', 'v d -> v d'),
      f'{naming.prefix}norm.weight': ('params/final_norm/scale', 'd -> d'),
      naming.head: ('params/embedding/head', 'd v -> v d'),
  }
  for name, (leaf, axes) in top.items():
    if leaf in shapes:
      yield from _expand(name, (leaf,), axes, shapes[leaf], ())
  for number, (place, repeat, layer) in enumerate(layer_places(model.pattern)):
    for name, (leaves, axes) in (NORMS | naming.mixers[layer.mixer] | naming.ffns[layer.ffn]).items():
      paths = tuple(f'{"router" if leaf == "ffn/bias" else "params"}/{place}/{leaf}' for leaf in leaves.split())
      if paths[0] in shapes:
        yield from _expand(f'{naming.prefix}layers.{number}.{name}', paths, axes, shapes[paths[0]][1:], (repeat,))


def _expand(name: str, leaves: tuple[str, ...], axes: str, shape, repeat: tuple[int, ...]) -> Iterator[Tensor]:
  """The tensors of one rule: one, or one for each expert."""
  ours, theirs = (side.split() for side in axes.replace('(', ' ( ').replace(')', ' ) ').split('->'))
  stacked = ['s'] if len(leaves) > 1 else []
  ours = ours[len(stacked) :]
  size = dict(zip(ours, shape, strict=True)) | {'s': len(leaves)}
  flat = [axis for axis in theirs if axis not in '()']
  merged, inside = [], False
  for axis in theirs:
    if axis in '()':
      inside = axis == '('
      merged += [1] * inside
    elif inside:
      merged[-1] *= size[axis]
    else:
      merged.append(size[axis])
  order = tuple(flat.index(axis) for axis in stacked + [axis for axis in ours if axis.islower()])
  numbered = [axis for axis in ours if axis.isupper()]
  for numbers in itertools.product(*(range(size[axis]) for axis in numbered)):
    number = dict(zip(numbered, numbers, strict=True))
    at = tuple(number.get(axis, slice(None)) for axis in ours)
    split = tuple(size[axis] for axis in flat)
    yield Tensor(name.format(**number), tuple(merged), leaves, repeat + at, split, order)


def layer_places(pattern: str) -> Iterator[tuple[str, int, Layer]]:
  """('segment_0/layer_0', row of the stack, layer) of every layer from first to last."""
  for s, segment in enumerate(parse_pattern(pattern)):
    for repeat in range(segment.repeats):
      for i, layer in enumerate(segment.unit):
        yield f'segment_{s}/layer_{i}', repeat, layer


def to_theirs(model: ModelConfig, naming: Naming, variables: Any) -> dict[str, np.ndarray]:
  """Their tensors of our variables {'params': ..., 'router': ...}, or of gradients; a collection may be left out."""
  from mmx import checkpoint  # here, as it brings Orbax

  leaves = checkpoint.named_leaves(variables)[0]
  shapes = {name: leaf.shape for name, leaf in leaves.items()}
  part = lambda leaf, at: np.asarray(leaves[leaf][at])
  return {
      tensor.name: np.ascontiguousarray(tensor.from_ours([part(leaf, tensor.at) for leaf in tensor.leaves]))
      for tensor in tensors(model, naming, shapes)
  }


def shortest_pattern(layers: list[Layer]) -> str:
  """A pattern of these layers with few segments: each begins with the unit whose repeats reach furthest.

  62 x full -> 'full*62'; 3 dense, then 57 -> 'full/dense*3 msa*57'; 7 of 8 lightning -> '(lightning*7 full)*10'.
  """
  items = []
  while layers:
    unit, repeats = layers[:1], 1
    for length in range(1, len(layers) // 2 + 1):
      count = 1
      while layers[count * length : (count + 1) * length] == layers[:length]:
        count += 1
      if count > 1 and count * length > repeats * len(unit):
        unit, repeats = layers[:length], count
    runs = [(layer, len(list(run))) for layer, run in itertools.groupby(unit)]
    names = [(layer.mixer + ('/dense' if layer.ffn == 'dense' else ''), count) for layer, count in runs]
    words = ' '.join(name + (f'*{count}' if count > 1 else '') for name, count in names)
    items.append((f'({words})' if len(unit) > 1 else words) + (f'*{repeats}' if repeats > 1 else ''))
    layers = layers[repeats * len(unit) :]
  return ' '.join(items)
