"""Choice of implementation: 'auto' takes the first that supports the platform and shape, and says so once in the log;
a named one is used or raises. The platform is the mesh's, never the host's default backend.

'hopper' names our kernels for GPUs of that generation. 'auto' does not take them: a GPU may be of another one, and they
have run in the simulator only. For that reason too full attention and windows are splash's on TPU before they are ours,
'pallas', which take 0.50 to 0.61 of its cycles in the compiler's schedule (`scripts/tpu_schedule.py`).
"""

import functools

import jax
from absl import logging

from mmx.kernels_pallas import attention as _attention
from mmx.kernels_pallas import attention_tpu as _attention_tpu
from mmx.kernels_pallas import grouped as _grouped
from mmx.kernels_pallas import lightning as _lightning
from mmx.kernels_pallas import lightning_tpu as _lightning_tpu
from mmx.kernels_pallas import msa_tpu as _msa_tpu
from mmx.kernels_pallas import reference
from mmx.kernels_pallas import sliding as _sliding
from mmx.kernels_pallas import sparse as _sparse
from mmx.kernels_pallas import warmup_tpu as _warmup_tpu


class UnsupportedError(ValueError):
  """A named implementation cannot serve this platform or shape; the message is one line that says why."""


@functools.cache
def _log_once(message):
  logging.info(message)


def _hopper(what, platform, refusal):
  """The module of kernels for `what` on Hopper; refusal(module) is '' or why it cannot serve.

  Mosaic GPU takes a while to import: only where it is asked for.
  """
  from mmx.kernels_pallas import attention_gpu, grouped_gpu, lightning_gpu, msa_gpu

  modules = {
      'attention': attention_gpu, 'sliding': attention_gpu, 'experts': grouped_gpu, 'lightning': lightning_gpu,
  }
  module = modules.get(what, msa_gpu)
  if reason := refusal(module) if platform == 'gpu' else f'not for {platform}':
    raise UnsupportedError(f"{what} implementation 'hopper' cannot be used here: {reason}")
  return module


def _choose(what, table, implementation, platform):
  """The first entry of `table` [(name, platforms, reason it cannot serve or '')] that serves."""
  reasons = []
  for name, platforms, reason in table:
    if platform not in platforms:
      reason = reason or f'not for {platform}'
    if implementation == name:
      if reason:
        raise UnsupportedError(f'{what} implementation {name!r} cannot be used here: {reason}')
      return name
    if implementation == 'auto' and not reason:
      _log_once(f'{what}: {name} on {platform}' + ''.join(f'; {r}' for r in reasons))
      return name
    if platform in platforms and reason:
      reasons.append(f'not {name}: {reason}')
  raise UnsupportedError(f'{what} implementation {implementation!r} is unknown; one of {[name for name, *_ in table]}')


def _whole(part):
  return '' if part is None else 'serves whole rows only, not a part of their queries (mesh.context)'


def attend(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, *, implementation, platform, mesh=None, part=None):
  """Causal grouped-query attention within segments; see `reference.attention`.

  part: None, or `chunks.Part`: which of their rows' queries these are, where keys and values are of whole rows.

  Raises:
    UnsupportedError: a named implementation does not support the platform or shape.
  """
  T, _, Dh = q_BTHDh.shape[1:]
  run = T if part is None else T // 2  # of slots one after the other
  everywhere = ('cpu', 'gpu', 'tpu')
  whole = Dh % 128 == 0 and run % 128 == 0
  lanes = '' if whole else f'needs head_dim and length in multiples of 128, got {Dh} and {run}'
  half = '' if q_BTHDh.dtype.itemsize == 2 else f'needs bfloat16, got {q_BTHDh.dtype}'
  narrow = '' if Dh % 8 == 0 and Dh <= 128 else f'needs head_dim of at most 128, got {Dh}'
  table = [
      ('splash', ('tpu',), lanes),
      ('pallas', ('tpu',), _attention_tpu.unsupported(q_BTHDh, k_BTKDh)),
      ('cudnn', ('gpu',), _whole(part) or half or narrow),
      ('hopper', (), ''),
      ('chunked', everywhere, ''),
      ('reference', everywhere, _whole(part)),
  ]
  if implementation == 'hopper':
    kernels = _hopper('attention', platform, lambda gpu: gpu.unsupported(q_BTHDh, k_BTKDh))
    return kernels.attention_hopper(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, mesh, part)
  name = _choose('attention', table, implementation, platform)
  if name in ('splash', 'pallas'):
    kernels = _attention.attention_splash if name == 'splash' else _attention_tpu.attention_pallas
    return kernels(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, mesh, part)
  if part is not None:
    return _attention.attention_part(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, part)
  function = {
      'cudnn': _attention.attention_cudnn,
      'chunked': _attention.attention_chunked,
      'reference': reference.attention,
  }[name]
  return function(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT)


def attend_cached(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT, *, implementation='auto', platform='cpu', mesh=None):
  """Causal grouped-query attention of T new tokens against a cache of S slots; see `attention.attention_cached`.

  'hopper' and, on TPU, 'pallas' have forms of their own for caches of whole tiles; 'auto' and 'splash' take the latter.
  All others, and what is left of caches, go over spans of the cache.

  Raises:
    UnsupportedError: 'hopper' or 'pallas' does not support the platform, dtype or heads.
  """
  arguments = q_BTHDh, k_BKSDh, v_BKSDh, positions_BT
  tokens_first = jax.eval_shape(lambda k_BKSDh: k_BKSDh.swapaxes(1, 2), k_BKSDh)
  if implementation == 'hopper':
    kernels = _hopper('attention', platform, lambda gpu: gpu.unsupported(q_BTHDh, tokens_first))
    function, tile = kernels.attention_cached_hopper, kernels.KEYS
  else:
    table = [
        ('pallas', ('tpu',), _attention_tpu.unsupported(q_BTHDh, tokens_first)),
        ('chunked', ('cpu', 'gpu', 'tpu'), ''),
    ]
    name = {'splash': 'auto', 'cudnn': 'chunked', 'reference': 'chunked'}.get(implementation, implementation)
    if _choose('attention against a cache', table, name, platform) == 'chunked':
      return _attention.attention_cached(*arguments)
    function, tile = _attention_tpu.attention_cached_pallas, _attention_tpu.SLOTS
  if k_BKSDh.shape[2] % tile:
    _log_once(f'attention: spans of a cache of {k_BKSDh.shape[2]} slots, which are no multiple of {tile}')
    return _attention.attention_cached(*arguments)
  return function(*arguments, mesh)


def experts(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, *, implementation, platform,
            activation='swiglu', most=0):
  """Weighted sum of the chosen experts' outputs; see `reference.experts`. Runs on one shard's rows.

  most: assignments that can be here (ids below E) at most, where that is known to be less than all; 0 is all.

  Raises:
    UnsupportedError: a named implementation does not support the platform.
  """
  arguments = x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation
  name, gpu = _experts_form(x_ND, w_gate_EDF, implementation, platform)
  if name == 'hopper':
    return gpu.experts_hopper(*arguments, most)
  if name == 'reference':
    return reference.experts(*arguments)
  function = {
      'megablox': _grouped.experts_megablox,
      'loop': _grouped.experts_loop,
      'blocks': _grouped.experts_blocks,
  }[name]
  return function(*arguments, most)


def experts_on_rows(x_RD, weight_R1, group_sizes_E, w_gate_EDF, w_up_EDF, w_down_EFD, *, implementation, platform,
                    activation='swiglu'):
  """Each row's expert on it, times its weight, [R, D]; rows stand sorted by expert in groups of those sizes (int32 [E]).

  Rows behind the groups hold anything, before and after. 'reference' has no form of its own and loops.

  Raises:
    UnsupportedError: a named implementation does not support the platform.
  """
  arguments = x_RD, weight_R1, group_sizes_E, w_gate_EDF, w_up_EDF, w_down_EFD, activation
  name, gpu = _experts_form(x_RD, w_gate_EDF, implementation, platform)
  if name in ('loop', 'reference'):
    return _grouped.loop_on_rows(*arguments)
  if name == 'megablox':
    return _grouped.products(*arguments, _grouped.megablox(x_RD.shape[0], group_sizes_E.shape[0]))
  return _grouped.products(*arguments, gpu.hopper() if name == 'hopper' else _grouped.BLOCKS)


def _experts_form(x_ND, w_gate_EDF, implementation, platform):
  """(name of the form, the module of Hopper's or None)."""
  everywhere = ('cpu', 'gpu', 'tpu')
  D, F = w_gate_EDF.shape[1:]
  lanes = '' if D % 128 == 0 and F % 128 == 0 else f'needs d_model and d_ff in multiples of 128, got {D} and {F}'
  table = [
      ('megablox', ('tpu',), lanes),
      ('loop', ('cpu',), ''),
      ('hopper', (), ''),
      ('blocks', everywhere, ''),
      ('reference', everywhere, ''),
  ]
  if implementation == 'hopper':
    return implementation, _hopper('experts', platform, lambda gpu: gpu.unsupported(x_ND, w_gate_EDF))
  return _choose('experts', table, implementation, platform), None


def sliding(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT, *, window, sink_tokens, implementation, platform,
            mesh=None, past=None, start=None):
  """Causal attention within a window, to sink tokens, and within segments; see `reference.sliding`.

  start: None, or an int, traced or not: all but q are of more tokens, of which the queries are those from there on.
  past: None, or keys, values and positions of a cache; kernels have no form for it and 'chunked' serves in their place.

  Raises:
    UnsupportedError: a named implementation does not support the platform or shape, or not what is asked of it.
  """
  everywhere = ('cpu', 'gpu', 'tpu')
  table = [
      ('splash', ('tpu',), _sliding.splash_unsupported(q_BTHDh, sink_tokens, start)),
      ('pallas', ('tpu',), _attention_tpu.sliding_unsupported(q_BTHDh, k_BTKDh, sink_tokens)),
      ('hopper', (), ''),
      ('chunked', everywhere, ''),
      ('reference', everywhere, _whole(start)),
  ]
  arguments = q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT, window, sink_tokens, past
  within = q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, window, mesh, start
  if implementation == 'hopper':
    kernels = _hopper('sliding', platform, lambda gpu: gpu.sliding_unsupported(q_BTHDh, k_BTKDh, sink_tokens))
    return _sliding.sliding_chunked(*arguments) if past else kernels.sliding_hopper(*within)
  name = _choose('sliding', table, implementation, platform)
  if name in ('splash', 'pallas') and not past:
    return (_sliding.sliding_splash if name == 'splash' else _attention_tpu.sliding_pallas)(*within)
  return reference.sliding(*arguments) if name == 'reference' else _sliding.sliding_chunked(*arguments, start)


def sliding_slots(q_BTHDh, k_BSKDh, v_BSKDh, slot_positions_BS, positions_BT, *, window, sink_tokens):
  """Decoding against a cache of window and sinks; one form for every platform yet."""
  return _sliding.sliding_slots(q_BTHDh, k_BSKDh, v_BSKDh, slot_positions_BS, positions_BT, window, sink_tokens)


def lightning(q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, state_BHDhDh=None, *, chunk, implementation,
              platform):
  """Linear attention with a decay per head: (o [B, T, H, Dh], state [B, H, Dh, Dh]); see `reference.lightning`.

  Raises:
    UnsupportedError: a named implementation does not support the platform or shape.
  """
  everywhere = ('cpu', 'gpu', 'tpu')
  table = [
      ('pallas', ('tpu',), _lightning_tpu.unsupported(q_BTHDh, chunk)),
      ('hopper', (), ''),
      ('chunked', everywhere, ''),
      ('reference', everywhere, ''),
  ]
  arguments = q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, state_BHDhDh
  if implementation == 'hopper':
    kernels = _hopper('lightning', platform, lambda gpu: gpu.unsupported(q_BTHDh, chunk))
    return kernels.lightning_hopper(*arguments, chunk=chunk)
  name = _choose('lightning', table, implementation, platform)
  function = {
      'pallas': functools.partial(_lightning_tpu.lightning_pallas, chunk=chunk),
      'chunked': functools.partial(_lightning.lightning_chunked, chunk=chunk),
      'reference': reference.lightning,
  }[name]
  return function(*arguments)


def msa(q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, *, block_size, top_k, implementation,
        platform, part=None, index_dtype=None):
  """Attention over blocks that the index branch selects, and its divergence: (out, kl [B]); see `reference.msa`.

  part: None, or `chunks.Part`: which of their rows' queries these are, where all keys are of whole rows.
  index_dtype: None, or a narrower dtype that index queries and keys are values of; a matrix unit that has it selects by
    it, sooner and alike. The divergence and its gradients are of the inputs' dtype in any case.

  Raises:
    UnsupportedError: a named implementation does not support the platform or shape.
  """
  arguments = q_BTHDh, k_BTKDh, v_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k
  everywhere = ('cpu', 'gpu', 'tpu')
  shapes = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, block_size, top_k
  table = [
      ('pallas', ('tpu',), _msa_tpu.unsupported(*shapes)),
      ('hopper', (), ''),
      ('gather', everywhere, ''),
      ('reference', everywhere, _whole(part)),
  ]
  if implementation == 'hopper':
    kernels = _hopper('msa', platform, lambda gpu: gpu.unsupported(*shapes, index_dtype))
    return kernels.msa_hopper(*arguments, part=part, index_dtype=index_dtype)
  name = _choose('msa', table, implementation, platform)
  if name == 'reference':
    return reference.msa(*arguments)
  return {'pallas': _msa_tpu.msa_pallas, 'gather': _sparse.msa_gather}[name](*arguments, part=part)


def msa_prefix_kl(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, *, implementation, platform='cpu',
                  part=None):
  """The divergence of MSA's dense warm-up, kl [B]; see `reference.msa_prefix_kl`.

  A kernel has it on TPU; 'hopper', and a shape that the kernel does not take, are served by 'gather'.
  """
  arguments = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT
  everywhere = ('cpu', 'gpu', 'tpu')
  table = [
      ('pallas', ('tpu',), _warmup_tpu.unsupported(q_BTHDh, k_BTKDh, index_q_BTKDi)),
      ('gather', everywhere, ''),
      ('reference', everywhere, _whole(part)),
  ]
  name = {'pallas': 'auto', 'hopper': 'gather'}.get(implementation, implementation)
  name = _choose("msa's warm-up", table, 'gather' if name == 'reference' and part is not None else name, platform)
  if name == 'reference':
    return reference.msa_prefix_kl(*arguments)
  return (_warmup_tpu.msa_prefix_kl_pallas if name == 'pallas' else _sparse.msa_prefix_kl_gather)(*arguments, part)


def msa_cached(q_BTHDh, k_BKSDh, v_BKSDh, index_q_BTKDi, index_k_BSDi, slots_BT, *, block_size, top_k, implementation,
               platform):
  """T new tokens against a cache of S slots, a multiple of block_size; 'reference' has no form for it and gathers.

  A query at slot i sees the slots up to i; at slot -1 it is padding and gets zeros. Returns [B, T, H, Dh].

  Raises:
    UnsupportedError: a named implementation does not support the platform or shape.
  """
  arguments = q_BTHDh, k_BKSDh, v_BKSDh, index_q_BTKDi, index_k_BSDi, slots_BT, block_size, top_k
  everywhere = ('cpu', 'gpu', 'tpu')
  unsupported = _msa_tpu.unsupported_cached(q_BTHDh, k_BKSDh, index_q_BTKDi, index_k_BSDi, block_size, top_k)
  table = [
      ('pallas', ('tpu',), unsupported),
      ('hopper', (), ''),
      ('gather', everywhere, ''),
      ('reference', everywhere, ''),
  ]
  what = 'msa against a cache'
  if implementation == 'hopper':
    refusal = lambda gpu: gpu.unsupported_cached(q_BTHDh, k_BKSDh, index_q_BTKDi, index_k_BSDi, block_size)
    return _hopper(what, platform, refusal).msa_cached_hopper(*arguments)
  name = _choose(what, table, implementation, platform)
  return (_msa_tpu.msa_cached_pallas if name == 'pallas' else _sparse.msa_cached_gather)(*arguments)


def msa_recall(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, *, block_size, top_k):
  """(block recall, score recall) of a sample of queries: scalars that say how well selection meets full attention."""
  return _sparse.msa_recall_sample(
      q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, segment_ids_BT, block_size, top_k
  )
