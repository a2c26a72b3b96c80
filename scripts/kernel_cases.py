"""What `bench_kernels.py` measures: of each kernel its arguments, forms, peers, oracle, FLOPs and bytes.

A case is one kernel at one shape. Its arguments are a dictionary that every side takes whole, so that ours and a peer
read the same memory. Letters as in mmx.kernels_pallas.sparse; N tokens of context.

FLOPs are those that the algorithm asks for, wherever a kernel computes less cleverly: of attention 4*Dh for each query
head and key that it sees, of the index branch 2*Di for each index head and key, of Lightning the recurrence, of experts
three products. A backward pass takes twice the forward, and of attention 2.5 times, as the scores are made again
(FlashAttention, arXiv:2205.14135). Bytes are inputs and results once, and of keys those that selection leaves.
"""

import functools
import importlib.util
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmx import config, flops
from mmx.kernels_pallas import api, index_gpu, index_tpu, reference, sparse
from mmx.kernels_pallas.gated import ACTIVATIONS
from mmx.layers import lightning

GROUPS = {
    'attention': config.AttentionConfig, 'experts': config.MoEConfig, 'lightning': config.LightningConfig,
    'msa': config.MSAConfig,
}  # fmt: skip
INDEX = {  # which has no function of the api's own
    'tpu': ('pallas', index_tpu.select_blocks_pallas, index_tpu.unsupported),
    'gpu': ('hopper', index_gpu.select_blocks_gpu, index_gpu.unsupported),
}  # fmt: skip
EVERYWHERE = 'blocks', 'chunked', 'gather'  # implementations in XLA alone
LIBRARY = 'splash', 'cudnn', 'megablox'  # somebody else's kernels


class Options(NamedTuple):
  """What holds for all cases of a run."""

  platform: str  # of the device: cpu, gpu, tpu
  dtype: Any
  heads: tuple[int, int, int, int]  # H, K, Dh, Di
  block: int
  top_k: int
  experts: tuple[int, int, int, int]  # D, F, E, k
  index_dtype: Any = None  # of index queries and keys; None is `dtype`. Training has them in `dtype`


class Shape(NamedTuple):
  """`queries` tokens at the end of `context`; all of it if they are equal."""

  context: int
  queries: int


class Drawn(NamedTuple):
  """An argument of normally distributed numbers."""

  shape: tuple[int, ...]
  scale: float = 1.0
  dtype: Any = None  # None is `Options.dtype`


class Side(NamedTuple):
  """One way to compute; `function` takes the case's arguments and returns arrays."""

  name: str
  function: Callable
  flops: float
  bytes: float


class Case(NamedTuple):
  """One kernel at one shape."""

  arguments: dict[str, Any]  # name -> Drawn, or an array of integers or constants
  ours: Callable[[str], Side]  # by the name of an implementation
  peers: list[Side]
  oracle: Callable  # of the arguments in float32
  dense_oracle: Callable | None = None  # of peers, where they compute something else
  derived: Callable = lambda arguments: {}  # further arguments, made once: layouts that peers prefer


# ----------------------------------------------------------------------------------------------------------------------
# work


def keys_seen(shape: Shape, block: int = 0, top_k: int = 0) -> int:
  """Sum over queries of the keys that one sees: its causal prefix, or of that its k blocks, the own one among them."""
  slots = np.arange(shape.context - shape.queries, shape.context, dtype=np.int64)
  return int(np.sum(np.minimum(slots, (top_k - 1) * block + slots % block) + 1 if top_k else slots + 1))


def attention_work(o: Options, shape: Shape) -> tuple[float, float]:
  """(FLOPs, bytes) of full attention, forward."""
  H, K, Dh, _ = o.heads
  item = jnp.dtype(o.dtype).itemsize
  return 4 * H * Dh * keys_seen(shape), item * (2 * shape.queries * H * Dh + 2 * shape.context * K * Dh)


def index_bytes(o: Options, shape: Shape) -> float:
  """Of index queries and keys."""
  _, K, _, Di = o.heads
  return jnp.dtype(o.index_dtype or o.dtype).itemsize * (shape.queries * K * Di + shape.context * Di)


def index_work(o: Options, shape: Shape) -> tuple[float, float]:
  """(FLOPs, bytes) of scores and selection; block ids are written as int32."""
  _, K, _, Di = o.heads
  return 2 * K * Di * keys_seen(shape), index_bytes(o, shape) + 4 * shape.queries * K * o.top_k


def msa_work(o: Options, shape: Shape) -> tuple[float, float]:
  """(FLOPs, bytes) of the index branch and of attention to the selected blocks, forward."""
  H, K, Dh, _ = o.heads
  item = jnp.dtype(o.dtype).itemsize
  index_flops, _ = index_work(o, shape)
  chosen = min(shape.context, shape.queries * o.top_k * o.block)  # keys of one head that are read at all, at most
  moved = item * (2 * chosen * K * Dh + 2 * shape.queries * H * Dh) + index_bytes(o, shape)
  return index_flops + 4 * H * Dh * keys_seen(shape, o.block, o.top_k), moved


def msa_train_flops(o: Options, shape: Shape) -> float:
  """Both passes: of the index branch all scores once, then on the selected keys scores and two products backward."""
  _, K, _, Di = o.heads
  forward, _ = msa_work(o, shape)
  index, _ = index_work(o, shape)
  return 3.5 * (forward - index) + index + 6 * K * Di * keys_seen(shape, o.block, o.top_k)


# ----------------------------------------------------------------------------------------------------------------------
# helpers


def implementations(kernel: str, o: Options) -> list[str]:
  """Names: our kernels, those of a library, those that serve everywhere; the oracle is not among what is measured."""
  if kernel == 'index':
    return [*INDEX.get(o.platform, ())[:1], 'gather']
  group = GROUPS[kernel.partition('_')[0]]
  names = typing.get_args(group.__dataclass_fields__['implementation'].type)
  measured = (name for name in names if name not in ('auto', 'reference'))
  return sorted(measured, key=lambda name: (name in EVERYWHERE, name in LIBRARY))


def gradient(function, names):
  """The gradient of `function` by the arguments of these names, against the cotangent in argument 'dout'.

  What a function returns beside its output, such as a divergence, is weighed by 1.
  """

  def backward(a):
    out, pull = jax.vjp(lambda *chosen: function(a | dict(zip(names, chosen))), *(a[name] for name in names))
    first, *others = out if isinstance(out, tuple) else (out,)
    cotangents = (a['dout'].astype(first.dtype), *(jnp.ones_like(other) for other in others))
    return pull(cotangents if isinstance(out, tuple) else cotangents[0])

  return backward


def documents(tokens, count):
  """Segment ids [1, T] of so many documents of unequal length."""
  edges = np.arange(1, count) * tokens // (count + 1)
  return (1 + np.sum(np.arange(tokens)[:, None] >= edges, axis=1, dtype=np.int32))[None]


# ----------------------------------------------------------------------------------------------------------------------
# full attention, and peers of MSA


def dense_prompt(o: Options, shape: Shape) -> list[Side]:
  """The dense kernels of the platform that may be its best, over a whole prompt of one document.

  cuDNN without the mask that tells documents apart, as it would cost time and N*N bytes.
  """
  work = attention_work(o, shape)

  def named(name):
    choice = {'implementation': name, 'platform': o.platform}
    return Side(name, lambda a: api.attend(a['q'], a['k'], a['v'], a['segments'], **choice), *work)

  if o.platform == 'gpu' and o.dtype == jnp.bfloat16:
    cudnn = lambda a: jax.nn.dot_product_attention(a['q'], a['k'], a['v'], is_causal=True, implementation='cudnn')
    return [Side('cudnn without segments', cudnn, *work), named('hopper')]
  if o.platform == 'tpu' and o.heads[2] % 128 == 0:
    return [named('splash'), named('pallas')]
  return [named('chunked')]


def prompt(o: Options, shape: Shape, count: int):
  H, K, Dh, _ = o.heads
  N = shape.context
  return {'q': Drawn((1, N, H, Dh)), 'k': Drawn((1, N, K, Dh)), 'v': Drawn((1, N, K, Dh)),
          'segments': documents(N, count)}  # fmt: skip


def trained(side: Side, names, factor) -> Side:
  """The same forward and backward: twice the bytes."""
  return Side(side.name, gradient(side.function, names), factor * side.flops, 2 * side.bytes)


def attention(o: Options, shape: Shape, count=1, train=False) -> Case:
  names, finish = 'qkv', lambda side: trained(side, 'qkv', 3.5) if train else side
  arguments = prompt(o, shape, count)
  arguments |= {'dout': arguments['q']} if train else {}

  def ours(name):
    function = lambda a: api.attend(
        a['q'], a['k'], a['v'], a['segments'], implementation=name, platform=o.platform
    )
    return finish(Side(name, function, *attention_work(o, shape)))

  oracle = lambda a: reference.attention(a['q'], a['k'], a['v'], a['segments'])
  oracle = gradient(oracle, names) if train else oracle
  return Case(arguments, ours, [finish(side) for side in dense_prompt(o, shape)], oracle, oracle)


# ----------------------------------------------------------------------------------------------------------------------
# MSA


def index_heads(o: Options, T: int, S: int):
  _, K, _, Di = o.heads
  return {'index_q': Drawn((1, T, K, Di), dtype=o.index_dtype), 'index_k': Drawn((1, S, Di), dtype=o.index_dtype)}


def msa_prompt(o: Options, shape: Shape, count=1, train=False) -> Case:
  """A whole prompt: attention's output alone, or the gradients of output and divergence."""
  if train:
    o = o._replace(index_dtype=None)
  arguments = prompt(o, shape, count) | index_heads(o, shape.context, shape.context)
  arguments |= {'dout': arguments['q']} if train else {}
  order = 'q', 'k', 'v', 'index_q', 'index_k', 'segments'
  names = order[:5]

  def ours(name):
    choice = {'implementation': name, 'platform': o.platform, 'index_dtype': o.index_dtype}
    in_dtype = lambda x: x.astype(o.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    both = lambda a: api.msa(*(in_dtype(a[key]) for key in order), block_size=o.block, top_k=o.top_k, **choice)
    work, moved = msa_work(o, shape)
    if train:
      return Side(name, gradient(both, names), msa_train_flops(o, shape), 2 * moved)
    return Side(name, lambda a: both(a)[0], work, moved)

  oracle = lambda a: reference.msa(*(a[key] for key in order), o.block, o.top_k)
  dense = lambda a: reference.attention(a['q'], a['k'], a['v'], a['segments'])
  peers = dense_prompt(o, shape)
  if train:
    peers = [trained(side, 'qkv', 3.5) for side in peers]
    return Case(arguments, ours, peers, gradient(oracle, names), gradient(dense, 'qkv'))
  return Case(arguments, ours, peers, lambda a: oracle(a)[0], dense)


def msa_cached(o: Options, shape: Shape, count=1) -> Case:
  """The last queries against a cache that holds them already: a decoded token, drafts, or the end of a prompt."""
  H, K, Dh, _ = o.heads
  N, T = shape
  S = -(-N // o.block) * o.block
  arguments = {
      'q': Drawn((1, T, H, Dh)), 'k': Drawn((1, K, S, Dh)), 'v': Drawn((1, K, S, Dh)),
      'slots': np.arange(N - T, N, dtype=np.int32)[None],
  } | index_heads(o, T, S)  # fmt: skip

  def ours(name):
    function = lambda a: api.msa_cached(
        a['q'], a['k'], a['v'], a['index_q'], a['index_k'], a['slots'], block_size=o.block, top_k=o.top_k,
        implementation=name, platform=o.platform,
    )
    return Side(name, function, *msa_work(o, shape))

  work = attention_work(o, shape)
  dense = lambda **choice: lambda a: api.attend_cached(a['q'], a['k'], a['v'], a['slots'], **choice)
  peers, derived = [], lambda a: {}
  if o.platform == 'gpu' and o.dtype == jnp.bfloat16:
    if T == 1:
      derived = lambda a: {f'{key}_BSKDh': jnp.swapaxes(a[key], 1, 2)[:, :N] for key in 'kv'}
      cudnn = lambda a: jax.nn.dot_product_attention(a['q'], a['k_BSKDh'], a['v_BSKDh'], implementation='cudnn')
      peers.append(Side('cudnn', cudnn, *work))
    peers.append(Side('hopper, dense', dense(implementation='hopper', platform='gpu'), *work))
  if o.platform == 'tpu' and Dh % 128 == 0:
    if T == 1:
      peers.append(Side('paged_attention', functools.partial(paged_attention, N), *work))
    peers.append(Side('pallas, dense', dense(platform='tpu'), *work))
  peers.append(Side('spans', dense(), *work))

  def as_prompt(a):
    """As if the queries before had been zeros, of which no later one knows."""
    first = lambda x: jnp.pad(x, ((0, 0), (N - T, 0), (0, 0), (0, 0)))
    rows = lambda x: jnp.swapaxes(x, 1, 2)[:, :N]
    return first(a['q']), rows(a['k']), rows(a['v']), first(a['index_q']), a['index_k'][:, :N], jnp.ones((1, N), int)

  def dense_oracle(a):
    q, k, v, _, _, segments = as_prompt(a)
    return reference.attention(q, k, v, segments)[:, N - T :]

  oracle = lambda a: reference.msa(*as_prompt(a), o.block, o.top_k)[0][:, N - T :]
  return Case(arguments, ours, peers, oracle, dense_oracle, derived)


def paged_attention(N, a):
  """jax's TPU kernel for decoding, with the cache as pages in their order."""
  from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

  _, K, S, Dh = a['k'].shape
  page = math.gcd(S, 512)
  pages = S // page
  q_BHDh = a['q'][:, 0] * jnp.asarray(Dh**-0.5, a['q'].dtype)  # the kernel does not scale
  k, v = (a[key].reshape(K, pages, page, Dh) for key in 'kv')
  order = jnp.arange(pages, dtype=jnp.int32)[None]
  return kernel(q_BHDh, k, v, jnp.array([N], jnp.int32), order, pages_per_compute_block=math.gcd(pages, 8))[:, None]


def msa(o: Options, shape: Shape, count=1) -> Case:
  return msa_prompt(o, shape, count) if shape.queries == shape.context else msa_cached(o, shape)


def index(o: Options, shape: Shape, count=1) -> Case:
  """Scores, pooling and top-k. The oracle and every side give, for what they chose, the oracle's scores in order."""
  N, T = shape
  arguments = index_heads(o, T, N) | {'slots': np.arange(N - T, N, dtype=np.int32)[None]}

  def side(name):
    if name not in implementations('index', o):
      raise api.UnsupportedError(f'implementation {name!r} is unknown; one of {implementations("index", o)}')

    def function(a):
      _, select, unsupported = INDEX[o.platform] if name != 'gather' else (name, sparse.select_blocks, None)
      if reason := unsupported and unsupported(a['index_q'], a['index_k'], o.block):
        raise api.UnsupportedError(f'implementation {name!r} cannot be used here: {reason}')
      return select(a['index_q'], a['index_k'], a['slots'], None, o.block, o.top_k)

    return Side(name, function, *index_work(o, shape))

  def oracle(a):
    q = jnp.pad(a['index_q'], ((0, 0), (N - T, 0), (0, 0), (0, 0)))
    return reference.msa_select(q, a['index_k'], jnp.ones((1, N), jnp.int32), o.block, o.top_k)[:, N - T :]

  return Case(arguments, side, [side('gather')], oracle, oracle)


# ----------------------------------------------------------------------------------------------------------------------
# Lightning and experts


def lightning_both(o: Options, shape: Shape, count=1) -> Case:
  """Forward and backward over a whole row."""
  H, _, Dh, _ = o.heads
  N = shape.context
  chunk = {'cpu': 64, 'gpu': 128, 'tpu': 256}[o.platform]  # Hopper's and TPU's longest in either dtype
  array = Drawn((1, N, H, Dh))
  arguments = {'q': array, 'k': array, 'v': array, 'dout': array, 'segments': documents(N, count),
               'slopes': np.asarray(lightning.slopes(H, 0, 2))}  # fmt: skip
  inputs = lambda a: (a['q'], a['k'], a['v'], a['slopes'], a['segments'])
  model = config.override(config.Experiment(), {'model.lightning.num_heads': H, 'model.lightning.head_dim': Dh}).model
  item = jnp.dtype(o.dtype).itemsize
  work = 3 * N * flops.mixing_flops(model, 'lightning', N), item * 8 * N * H * Dh  # q, k, v, o and their gradients

  def ours(name):
    function = lambda a: api.lightning(*inputs(a), chunk=chunk, implementation=name, platform=o.platform)[0]
    return Side(name, gradient(function, 'qkv'), *work)

  peers = []
  if o.platform == 'gpu' and all(map(importlib.util.find_spec, ('torch', 'fla'))):
    peers = [Side('fla', flash_linear_attention, *work)]
  oracle = gradient(lambda a: reference.lightning(*inputs(a))[0], 'qkv')
  return Case(arguments, ours, peers, oracle, oracle)


class Torch(NamedTuple):
  """A side that computes in torch on the same GPU: `step()` queues one call, `wait()` waits for all, `read()` gives the
  results as numpy arrays."""

  step: Callable
  wait: Callable
  read: Callable


def flash_linear_attention(arguments) -> Torch:
  """Forward and backward of flash-linear-attention's Triton kernels on the same numbers."""
  import torch
  from fla.ops.simple_gla import chunk_simple_gla

  dtype = {'bfloat16': torch.bfloat16, 'float32': torch.float32}[str(arguments['q'].dtype)]
  tensor = lambda x, dtype: torch.tensor(np.asarray(x.astype(jnp.float32)), dtype=dtype, device='cuda')
  q, k, v, dout = (tensor(arguments[name], dtype) for name in ('q', 'k', 'v', 'dout'))
  decay = -tensor(arguments['slopes'], torch.float32)
  leaves = [x.requires_grad_() for x in (q, k, v)]
  found = []

  def step():
    out, _ = chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0)
    found[:] = torch.autograd.grad(out, leaves, dout)

  return Torch(step, torch.cuda.synchronize, lambda: tuple(x.float().cpu().numpy() for x in found))


def experts(o: Options, shape: Shape, count=1, train=False) -> Case:
  """One layer's experts on N tokens with balanced loads, beside a dense product of equal FLOPs."""
  D, F, E, k = o.experts
  N = shape.context
  ids = np.argsort(np.random.default_rng(0).random((N, E), np.float32), axis=1)[:, :k].astype(np.int32)
  arguments = {
      'x': Drawn((N, D)), 'gate': Drawn((E, D, F), D**-0.5), 'up': Drawn((E, D, F), D**-0.5),
      'down': Drawn((E, F, D), F**-0.5),
      'ids': ids, 'weights': np.full((N, k), 1 / k, np.float32),
      'dense_x': Drawn((N * k, D)), 'dense_up': Drawn((D, 2 * F), D**-0.5), 'dense_down': Drawn((F, D), F**-0.5),
  } | ({'dout': Drawn((N, D)), 'dense_dout': Drawn((N * k, D))} if train else {})  # fmt: skip
  item = jnp.dtype(o.dtype).itemsize
  work = 6 * N * k * D * F
  finish = lambda side, names: trained(side, names, 3) if train else side

  def ours(name):
    function = lambda a: api.experts(
        a['x'], a['ids'], a['weights'], a['gate'], a['up'], a['down'], implementation=name, platform=o.platform
    )
    moved = item * (3 * min(E, N * k) * D * F + 2 * N * D)
    return finish(Side(name, function, work, moved), ('x', 'gate', 'up', 'down'))

  def dense(a):
    gate, up = jnp.split(a['dense_x'] @ a['dense_up'], 2, axis=1)
    return ACTIVATIONS['swiglu'](gate, up) @ a['dense_down']

  names = 'dense_x', 'dense_up', 'dense_down'
  dense_train = lambda a: gradient(dense, names)(a | {'dout': a['dense_dout']})
  moved = item * (3 * D * F + 2 * N * k * D)
  peer = Side('dense product', dense_train if train else dense, (3 if train else 1) * work, (2 if train else 1) * moved)
  oracle = lambda a: reference.experts(a['x'], a['ids'], a['weights'], a['gate'], a['up'], a['down'])
  return Case(arguments, ours, [peer], gradient(oracle, ('x', 'gate', 'up', 'down')) if train else oracle, peer.function)


KERNELS = {
    'attention': attention,
    'attention_train': functools.partial(attention, train=True),
    'msa_prefill': msa,
    'msa_decode': msa_cached,
    'msa_train': functools.partial(msa_prompt, train=True),
    'index': index,
    'lightning': lightning_both,
    'experts': experts,
    'experts_train': functools.partial(experts, train=True),
}
