"""How tokens reach the shards that hold their experts, and how the results come back.

Everything here runs inside `jax.shard_map` except `expert_parallel`, which opens it. Routing is already done: each
shard holds N tokens with the ids of their k distinct experts and the weights of the sum. A transport has one signature,

  transport(x_ND, ids_Nk, weights_Nk, matrices, *, axis_name, num_experts, capacity_factor, experts) -> (y_ND, dropped)

with the matrices of this shard's experts only, and knows nothing of what an expert computes: that is `Experts`. Those
that send rows of any number take the platform's `ragged_journey` too.

  ring     gathers every shard's tokens, keeps what its own experts add, and reduce-scatters. Most bytes on the wire, no
           bookkeeping; best for few shards or many experts per token.
  padded   one copy of a token to each shard it visits, in buffers of a fixed size: `all_to_all`.
  ragged   the same copies without the padding: `ragged_all_to_all`. TPU and GPU only; CPU has an emulation for tests.
  direct   one copy of a token for each of its experts, straight to its place among that expert's rows: nothing is sorted
           or gathered where it arrives. Best for many shards, where two experts of a token seldom share one: among 64,
           4% more rows travel than visits, among 8, half as many again (k=8).

All are dropless unless `capacity_factor` is positive, which then means the same for all of them, and all have static
shapes: no collective depends on data. Tokens are moved by gathers, forward and backward: the transposed gather, a
scatter-add, is many times slower on CPU and TPU, and the plan of a journey already holds both directions. Rows that no
token stands in hold anything, NaN too: who reads asks for those that hold something.

Letters: N tokens of one shard, k experts per token, E experts, D model, F expert hidden, C capacity,
n shards on the expert axis, v = min(k, n) most shards one token visits, R rows kept for each pair of shards,
Q rows of a buffer.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.config import ConfigError
from mmx.kernels_pallas.anything import anything
from mmx.kernels_pallas.grouped import LANES, sort_by_expert
from mmx.sharding import AXES, BATCH_AXES, batch_spec, gathered, on_shards, platform_of, spec_of

# Logical axes of the experts' matrices. Where each shard has a part, it is one of experts or of rows: the last axis stays
# in whole tiles, and parts lie one behind the other when they are gathered.
GATE_AXES = UP_AXES = 'experts', 'embed', 'hidden'
DOWN_AXES = 'experts', 'hidden_rows', None
FULL_TILES = 512  # rows: what kernels take comes in multiples of theirs, which divide this


class Experts(NamedTuple):
  """What a shard computes with the matrices of its own experts, which count from 0."""

  # (x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, most=) -> y_ND. An id equal to their number means 'not
  # here' and adds nothing; at most `most` ids are another.
  of_tokens: Callable
  # (x_QD, weight_Q1, group_sizes_E, w_gate_EDF, w_up_EDF, w_down_EFD) -> y_QD. Rows stand sorted by expert; behind
  # them, anything.
  of_rows: Callable | None = None


# ---- capacity --------------------------------------------------------------------------------------------------------


def apply_capacity(ids_Nk, num_experts, capacity):
  """Keeps the first `capacity` assignments of every expert in token order.

  Weights are not renormalised over what is left (neither do Switch, arXiv:2101.03961, nor GShard, arXiv:2006.16668):
  a token that loses an expert keeps its other experts at the size the gate gave them and the residual carries the rest,
  so its output does not grow because of its neighbours' choices.

  Args:
    ids_Nk: int32 [N, k], distinct within a row.
    num_experts: E.
    capacity: C, assignments one expert may have.

  Returns:
    (ids_Nk with E where dropped, kept_Nk bool, dropped: float32 fraction of the N * k assignments).
  """
  chosen_NE = jax.nn.one_hot(ids_Nk, num_experts, dtype=jnp.bool_).any(axis=1)
  place_NE = jnp.cumsum(chosen_NE, axis=0, dtype=jnp.int32)  # 1 for the first token of an expert
  kept_Nk = jnp.take_along_axis(place_NE, ids_Nk, axis=1) <= capacity
  return jnp.where(kept_Nk, ids_Nk, num_experts), kept_Nk, (~kept_Nk).mean(dtype=jnp.float32)


def capacity_of(N, k, num_experts, capacity_factor):
  """Assignments that an expert may have of one shard's N tokens: all where it is dropless."""
  return min(N, math.ceil(capacity_factor * N * k / num_experts)) if capacity_factor else N


def limit(ids_Nk, num_experts, capacity_factor):
  """Applies `capacity_factor` to one shard's tokens: (ids_Nk, dropped, capacity)."""
  capacity = capacity_of(*ids_Nk.shape, num_experts, capacity_factor)
  if not capacity_factor:
    return ids_Nk, jnp.zeros((), jnp.float32), capacity
  ids_Nk, _, dropped = apply_capacity(ids_Nk, num_experts, capacity)
  return ids_Nk, dropped, capacity


def rows_kept(N, k, num_experts, num_shards, capacity):
  """Rows that a shard must keep for its experts, as many as may come; N * k come where loads are even."""
  return min(num_shards * N * min(k, num_experts // num_shards), num_experts * capacity)


# ---- rows ------------------------------------------------------------------------------------------------------------
# A journey is two tables that are each other's inverse: the token of each row, and the rows of each token. With both at
# hand, each of the two functions below is the other's gradient.


def as_tiles(x_ND):
  """[N, D] -> [N, D / 128, 128]: on TPU each row in tiles of its own, so that it is fetched and sent as it lies. A row
  of a matrix shares its tiles with seven others or more, and the compiler would lay all of them out anew on the way out,
  in tiles of two by 128, which take about three times as long to pass over (its own estimate on v5p)."""
  D = x_ND.shape[1]
  return x_ND.reshape(x_ND.shape[0], -1, LANES if D % LANES == 0 else D)


@jax.custom_vjp
def spread(x_ND, token_Q, row_Nv):
  """Copies tokens, [N, ...], into rows, [Q, ...]; a row whose token is N holds anything."""
  del row_Nv
  return jnp.take(x_ND, token_Q, axis=0, mode='clip')


@jax.custom_vjp
def collect(rows_QD, token_Q, row_Nv):
  """Sums the rows of each token, in float32, to [N, ...]; a row number of Q stands for none.

  One gather for each of the v <= k visits: they fuse into the sum, where a single gather of [N, v, D] is written out
  first (15 times slower on CPU at N=4096, v=8, D=256).
  """
  del token_Q
  visit = lambda row_N: jnp.take(rows_QD, row_N, axis=0, mode='fill', fill_value=0).astype(jnp.float32)
  return sum(map(visit, row_Nv.T)).astype(rows_QD.dtype)


spread.defvjp(lambda x_ND, *tables: (spread(x_ND, *tables), tables),
              lambda tables, rows_QD: (collect(rows_QD, *tables), None, None))
collect.defvjp(lambda rows_QD, *tables: (collect(rows_QD, *tables), tables),
               lambda tables, x_ND: (spread(x_ND, *tables), None, None))


class Visits(NamedTuple):
  """Which shards each token visits: once each, however many of its experts live there."""

  shard_Nv: jax.Array  # n where the token visits fewer than v
  place_Nv: jax.Array  # how many earlier tokens visit that shard
  token_Q: jax.Array  # tokens by shard visited, then by number; N behind the last; Q = N * v
  size_n: jax.Array  # tokens that visit each shard
  start_n: jax.Array  # where they begin in token_Q


def plan_visits(ids_Nk, num_experts, num_shards):
  """Reads the visits off the experts' ids; an id of `num_experts` asks for none. The one sort is of N * v numbers."""
  N, k = ids_Nk.shape
  goes_Nn = jax.nn.one_hot(ids_Nk // (num_experts // num_shards), num_shards, dtype=jnp.bool_).any(axis=1)
  count_Nn = jnp.cumsum(goes_Nn, axis=0, dtype=jnp.int32)
  size_n = count_Nn[-1]
  shard_Nv = jnp.where(goes_Nn, jnp.arange(num_shards)[None], num_shards)
  if k < num_shards:
    shard_Nv = jnp.sort(shard_Nv, axis=1)[:, :k]
  place_Nv = jnp.take_along_axis(count_Nn, jnp.minimum(shard_Nv, num_shards - 1), axis=1) - 1
  key_Q = jnp.sort((shard_Nv * N + jnp.arange(N)[:, None]).reshape(-1))
  token_Q = jnp.where(key_Q < num_shards * N, key_Q % N, N)
  return Visits(shard_Nv, place_Nv, token_Q, size_n, jnp.cumsum(size_n) - size_n)


def localise(ids_Qk, weights_Qk, first_expert, num_local):
  """Numbers the experts of this shard from 0 and calls all others `num_local`.

  A row has at most `num_local` experts here, so where that is less than k the assignments shrink to one column per
  expert, and with them everything that the grouped product sorts and gathers.
  """
  local_Qk = ids_Qk - first_expert
  if ids_Qk.shape[1] > num_local:
    here_QkE = jax.nn.one_hot(local_Qk, num_local, dtype=jnp.bool_)
    ids_QE = jnp.where(here_QkE.any(axis=1), jnp.arange(num_local)[None], num_local)
    return ids_QE, jnp.where(here_QkE, weights_Qk[:, :, None], 0).sum(axis=1)
  here_Qk = (local_Qk >= 0) & (local_Qk < num_local)
  return jnp.where(here_Qk, local_Qk, num_local), jnp.where(here_Qk, weights_Qk, 0)


# ---- transports ------------------------------------------------------------------------------------------------------


def stay(x_ND, ids_Nk, weights_Nk, matrices, *, num_experts, capacity_factor, experts):
  """No exchange: every expert is here. What all transports must equal."""
  ids_Nk, dropped, capacity = limit(ids_Nk, num_experts, capacity_factor)
  most = num_experts * capacity
  return experts.of_tokens(x_ND, ids_Nk, weights_Nk, *matrices, most=most), dropped


def ring(x_ND, ids_Nk, weights_Nk, matrices, *, axis_name, num_experts, capacity_factor, experts):
  """All tokens to all shards, and the sum of what each shard adds back to the token's own."""
  ids_Nk, dropped, capacity = limit(ids_Nk, num_experts, capacity_factor)
  x_QD, ids_Qk, weights_Qk = (jax.lax.all_gather(a, axis_name, tiled=True) for a in (x_ND, ids_Nk, weights_Nk))
  num_local = matrices[0].shape[0]
  ids_Qk, weights_Qk = localise(ids_Qk, weights_Qk, jax.lax.axis_index(axis_name) * num_local, num_local)
  most = num_experts * capacity
  y_QD = experts.of_tokens(x_QD, ids_Qk, weights_Qk, *matrices, most=most)
  return jax.lax.psum_scatter(y_QD, axis_name, tiled=True), dropped


def padded(x_ND, ids_Nk, weights_Nk, matrices, *, axis_name, num_experts, capacity_factor, experts):
  """R rows from each shard to each shard, filled or not. R is the worst case, so nothing is lost on the way."""
  N = x_ND.shape[0]
  num_local, num_shards = matrices[0].shape[0], jax.lax.axis_size(axis_name)
  ids_Nk, dropped, capacity = limit(ids_Nk, num_experts, capacity_factor)
  visits = plan_visits(ids_Nk, num_experts, num_shards)

  R = min(N, num_local * capacity)
  offset_R = jnp.arange(R)[None]
  token_nR = jnp.take(visits.token_Q, visits.start_n[:, None] + offset_R, mode='clip')
  token_Q = jnp.where(offset_R < visits.size_n[:, None], token_nR, N).reshape(-1)
  row_Nv = jnp.where(visits.shard_Nv < num_shards, visits.shard_Nv * R + visits.place_Nv, num_shards * R)
  exchange = functools.partial(jax.lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True)

  x_QD = exchange(spread(x_ND, token_Q, row_Nv))
  weights_Qk = exchange(spread(weights_Nk, token_Q, row_Nv))
  ids_Qk = exchange(jnp.take(ids_Nk, token_Q, axis=0, mode='fill', fill_value=num_experts))
  ids_Qk, weights_Qk = localise(ids_Qk, weights_Qk, jax.lax.axis_index(axis_name) * num_local, num_local)
  y_QD = experts.of_tokens(x_QD, ids_Qk, weights_Qk, *matrices, most=num_experts * capacity)
  return collect(exchange(y_QD), token_Q, row_Nv), dropped


def ragged(x_ND, ids_Nk, weights_Nk, matrices, *, axis_name, num_experts, capacity_factor, experts, journey):
  """Only the rows that are there travel, packed on the way out and R rows apart, the worst case, where they arrive.

  Because the places of arrival are fixed, a shard needs to be told two numbers by each other one: how many rows come,
  and where their answers belong.
  """
  num_local, num_shards = matrices[0].shape[0], jax.lax.axis_size(axis_name)
  ids_Nk, dropped, capacity = limit(ids_Nk, num_experts, capacity_factor)
  visits = plan_visits(ids_Nk, num_experts, num_shards)

  N, k = ids_Nk.shape
  R = min(N, num_local * capacity)
  me = jax.lax.axis_index(axis_name)
  told_n2 = jax.lax.all_to_all(jnp.stack([visits.size_n, visits.start_n], axis=1), axis_name, 0, 0, tiled=True)
  arriving_n, answer_n = told_n2[:, 0], told_n2[:, 1]
  there = (visits.start_n, visits.size_n, jnp.full_like(visits.size_n, me * R), arriving_n)
  back = (jnp.arange(num_shards, dtype=jnp.int32) * R, arriving_n, answer_n, visits.size_n)
  send = functools.partial(journey, axis_name=axis_name)

  token_Q = visits.token_Q
  start_Nv = jnp.take(visits.start_n, visits.shard_Nv, mode='clip')
  row_Nv = jnp.where(visits.shard_Nv < num_shards, start_Nv + visits.place_Nv, token_Q.size)
  arrivals = num_shards * R

  x_QD = travel(send, arrivals, token_Q.size, spread(as_tiles(x_ND), token_Q, row_Nv), there, back)
  x_QD = x_QD.reshape(arrivals, -1)
  weights_Qk = travel(send, arrivals, token_Q.size, spread(weights_Nk, token_Q, row_Nv), there, back)
  ids_Qk = send(spread(ids_Nk, token_Q, row_Nv), arrivals, *there, fill=num_experts)
  ids_Qk, weights_Qk = localise(ids_Qk, weights_Qk, me * num_local, num_local)
  y_QD = experts.of_tokens(x_QD, ids_Qk, weights_Qk, *matrices, most=num_experts * capacity)
  y_QD = travel(send, token_Q.size, arrivals, as_tiles(y_QD), back, there)
  return collect(y_QD, token_Q, row_Nv).reshape(x_ND.shape), dropped


def direct(x_ND, ids_Nk, weights_Nk, matrices, *, axis_name, num_experts, capacity_factor, experts, journey):
  """Every shard is told how many rows each other has for each expert: n * E numbers, from which all places follow."""
  num_local, num_shards = matrices[0].shape[0], jax.lax.axis_size(axis_name)
  ids_Nk, dropped, capacity = limit(ids_Nk, num_experts, capacity_factor)
  N, k = ids_Nk.shape
  rows, Q = sort_by_expert(ids_Nk, num_experts), N * k
  token_Q = jnp.where(jnp.arange(Q) < rows.group_sizes_E.sum(), rows.token_R, N)
  row_Nk = jnp.where(ids_Nk < num_experts, rows.slot_Nk, Q)
  me = jax.lax.axis_index(axis_name)

  # [s, n, e]: of the rows from shard s to shard n's expert e, how many there are, where they begin on s and where on n.
  size_nE = jax.lax.all_gather(rows.group_sizes_E, axis_name)
  size_sne, leave_sne = (a.reshape(num_shards, num_shards, num_local)
                         for a in (size_nE, jnp.cumsum(size_nE, axis=1) - size_nE))
  by_expert_nR = size_sne.transpose(1, 2, 0).reshape(num_shards, -1)
  arrive_nes = (jnp.cumsum(by_expert_nR, axis=1) - by_expert_nR).reshape(num_shards, num_local, num_shards)
  arrive_sne = arrive_nes.transpose(2, 0, 1)
  there = leave_sne[me], size_sne[me], arrive_sne[me], size_sne[:, me]
  back = arrive_sne[:, me], size_sne[:, me], leave_sne[:, me], size_sne[me]
  there, back = (tuple(a.reshape(-1) for a in way) for way in (there, back))

  send = functools.partial(journey, axis_name=axis_name)
  arrivals = -(-rows_kept(N, k, num_experts, num_shards, capacity) // FULL_TILES) * FULL_TILES
  x_QD = travel(send, arrivals, Q, spread(as_tiles(x_ND), token_Q, row_Nk), there, back).reshape(arrivals, -1)
  weight_Q1 = spread(weights_Nk.reshape(-1, 1), jnp.where(token_Q < N, rows.source_R, Q), row_Nk.reshape(-1, 1))
  weight_Q1 = travel(send, arrivals, Q, weight_Q1, there, back)
  y_QD = experts.of_rows(x_QD, weight_Q1, size_sne[:, me].sum(axis=0), *matrices)
  y_QD = travel(send, Q, arrivals, as_tiles(y_QD), back, there)
  return collect(y_QD, token_Q, row_Nk).reshape(x_ND.shape), dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def travel(send, num_out, num_in, rows_QD, there, back):
  """Sends `num_in` rows among `num_out`; the gradient travels `back`, by the same offsets.

  jax's own derivative of `ragged_all_to_all` finds the way back with two more collectives per use, and differentiates
  what the rows are written over too. `there` and `back` are (input_offsets, send_sizes, output_offsets, recv_sizes),
  int32 [n] each.
  """
  del num_in, back
  return send(rows_QD, num_out, *there)


travel.defvjp(
    lambda send, num_out, num_in, rows_QD, there, back: (travel(send, num_out, num_in, rows_QD, there, back),
                                                         (there, back)),
    lambda send, num_out, num_in, ways, rows_QD: (travel(send, num_in, num_out, rows_QD, *reversed(ways)), None, None))


def ragged_journey(rows_QD, num_out, *way, axis_name, platform, fill=None):
  """Rows to where `way` says, among `num_out` that hold `fill`, or anything."""
  shape, dtype = (num_out, *rows_QD.shape[1:]), rows_QD.dtype
  among = anything(shape, dtype, rows_QD, platform) if fill is None else jnp.full(shape, fill, dtype)
  send = emulated_ragged_all_to_all if platform == 'cpu' else jax.lax.ragged_all_to_all
  return send(rows_QD, among, *way, axis_name=axis_name)


def emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """`jax.lax.ragged_all_to_all` for CPU, which lacks it (jax issue 34755): all to everyone. S slices from n shards."""
  del recv_sizes
  me, n = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
  operands_nQD = jax.lax.all_gather(operand, axis_name)
  to_me = lambda a: jax.lax.all_gather(a, axis_name).reshape(n, n, -1)[:, me].reshape(-1, 1)
  start_S1, size_S1, place_S1 = map(to_me, (input_offsets, send_sizes, output_offsets))
  row_1Q = jnp.arange(output.shape[0])[None]
  sent_SQ = (row_1Q >= place_S1) & (row_1Q < place_S1 + size_S1)
  slice_Q = sent_SQ.argmax(axis=0)
  from_Q = jnp.take_along_axis(row_1Q - place_S1 + start_S1, slice_Q[None], axis=0)[0]
  sender_Q = slice_Q // (start_S1.size // n)
  sent_Q = sent_SQ.any(axis=0).reshape(-1, *(1,) * (output.ndim - 1))
  return jnp.where(sent_Q, operands_nQD[sender_Q, from_Q], output)


TRANSPORTS = {'ring': ring, 'ragged': ragged, 'padded': padded, 'direct': direct}

# ---- the layer's door ------------------------------------------------------------------------------------------------


def expert_parallel(x_BTD, ids_BTk, weights_BTk, w_gate_EDF, w_up_EDF, w_down_EFD, *, mesh, transport, capacity_factor,
                    experts, platform=None):
  """Runs routed experts on a mesh of axes replica, fsdp, expert, tensor (all of type Auto).

  Rows of the batch are split over (replica, fsdp, expert) and their tokens over context, experts over expert, and F over
  tensor; a matrix of which each shard has a part of its experts or rows is gathered on the way in. A mesh of one device
  calls `experts.of_tokens` directly.

  Args:
    x_BTD: tokens, any floating dtype.
    ids_BTk: int32, distinct experts of each token.
    weights_BTk: float32, factor of each expert's output.
    w_gate_EDF, w_up_EDF, w_down_EFD: [E, D, F] twice and [E, F, D]. Gate and up are apart, as the two rows of a stack
      [D, 2, F] lie in tiles of two by 128 on TPU, and all that touches them takes three times as long (the compiler's
      estimate), and as splitting F keeps each gate with its up.
    mesh: `jax.sharding.Mesh`; None is one device.
    transport: a name in TRANSPORTS; without effect where mesh.expert is 1.
    capacity_factor: 0 is dropless; otherwise, of each batch shard's N tokens, each expert keeps the first
      ceil(capacity_factor * N * k / E).
    experts: what a shard computes with its own matrices; `of_rows` is for 'direct' alone.
    platform: 'cpu', 'gpu' or 'tpu', when lowering for another platform than that of the mesh's devices.

  Returns:
    (y_BTD in the dtype of x, dropped: float32 fraction of all assignments).

  Raises:
    ConfigError: rows, experts or F do not divide over the mesh.
  """
  num_experts, F, _ = w_down_EFD.shape
  matrices = w_gate_EDF, w_up_EDF, w_down_EFD
  parts = mesh.shape if mesh else dict.fromkeys(AXES, 1)
  batch_shards = math.prod(parts[axis] for axis in BATCH_AXES)
  for what, size, axes, shards in (('rows of the batch', x_BTD.shape[0], 'replica * fsdp * expert', batch_shards),
                                   ('tokens of a row', x_BTD.shape[1], 'context', parts['context']),
                                   ('moe.num_experts', num_experts, 'expert', parts['expert']),
                                   ('moe.d_ff', F, 'tensor', parts['tensor'])):
    if size % shards:
      raise ConfigError(f'{what}: {size} does not divide over mesh {axes} = {shards}')

  move = functools.partial(stay if parts['expert'] == 1 else TRANSPORTS[transport], num_experts=num_experts,
                           capacity_factor=capacity_factor, experts=experts)
  if parts['expert'] > 1:
    move = functools.partial(move, axis_name='expert')
    if transport in ('ragged', 'direct'):
      journey = functools.partial(ragged_journey, platform=platform or platform_of(mesh))
      move = functools.partial(move, journey=journey)

  def on_shard(x_BTD, ids_BTk, weights_BTk, *matrices):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTk, weights_BTk))
    y_ND, dropped = move(*flat, matrices)
    return y_ND.reshape(x_BTD.shape), dropped

  if math.prod(parts.values()) == 1:
    return on_shard(x_BTD, ids_BTk, weights_BTk, *matrices)

  # Matrices are gathered here, so that their gradients are scattered as they are summed: the partitioner would give the
  # whole sum to every chip.
  specs = [spec_of(axes, w.shape, mesh) for axes, w in zip((GATE_AXES, UP_AXES, DOWN_AXES), matrices)]
  whole = functools.partial(gathered, held=('expert', 'tensor'))

  def on_mesh(x_BTD, ids_BTk, weights_BTk, *matrices):
    y_BTD, dropped = on_shard(x_BTD, ids_BTk, weights_BTk, *map(whole, matrices, specs))
    return y_BTD[None], jax.lax.pmean(dropped, (*BATCH_AXES, 'context'))

  batch = batch_spec()
  # Without varying axes a psum over tensor inside would pay an all-reduce in the backward pass too. Stacking the partial
  # sums and adding them outside costs one, in the forward pass.
  y_XBTD, dropped = on_shards(on_mesh, mesh, (batch, batch, batch, *specs), (P('tensor', *batch), P()))(
      x_BTD, ids_BTk, weights_BTk, *matrices)
  return jax.lax.reduce_sum(y_XBTD, (0,)), dropped
