"""Experts on the tokens routed to them: dropless grouped products, one form per platform.

All forms share one signature and mean the same as `reference.experts`:

  experts(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation, most=0) -> y_ND

Assignments (token, expert) are sorted by expert into R rows; `group_sizes_E` are the true counts. An id equal to E means
'not here': its rows sort last, behind every group, cost nothing and add zero. R is N*k, or `most` where the caller knows
that no more are here: what stands between the products (gathers, activation) passes over R rows, whatever is in them.
Rows behind the groups hold anything, and whoever sums a token's rows leaves them out. Dispatch and combine are gathers in
both directions (the inverse permutation is at hand), since a scatter-add of rows is slow on CPU and TPU.

  loop      CPU. Loops over experts and blocks of their rows, with trip counts known at run time: work follows
            the true loads and weights are read once. `lax.ragged_dot` multiplies every row by every expert on CPU (32
            times the work at E=32); a batched product over blocks copies [blocks, D, F] of weights.
  blocks    Any platform, for shapes that kernels refuse. Groups padded to blocks of 256 rows, one batched product with
            gathered weights.
  megablox  TPU. The Pallas grouped product of jax with true group sizes.
  hopper    GPUs of that generation, in `grouped_gpu`: the same by kernels of ours.

Letters: N tokens, k experts per token, R rows, E experts, D model, F expert hidden, b block rows.
"""

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx.kernels_pallas.gated import ACTIVATIONS

BATCH_BLOCK = 256  # rows
LAST_BLOCK = 64  # rows
LANES = 128  # of a TPU's vector
WEIGHT_TILE = 3 * 2**20  # bytes of weights that a TPU's kernel holds, twice: one in use, one on its way


class Sorted(NamedTuple):
  """Assignments sorted by expert."""

  token_R: jax.Array  # int32, the token of each row
  source_R: jax.Array  # int32, the flat assignment (token * k + choice) of each row
  slot_Nk: jax.Array  # int32, the row of each assignment that is here, some row for the others
  group_sizes_E: jax.Array  # int32


def sort_by_expert(ids_Nk, num_experts, most=0) -> Sorted:
  """Stable counting order of the N*k assignments, ids in [0, E], E last; of these the first `most` unless that is 0."""
  N, k = ids_Nk.shape
  flat_R = ids_Nk.reshape(-1)
  R = flat_R.shape[0]
  if (num_experts + 1) * R < 2**31:  # one 32-bit key holds expert and position: half the time of a two-operand sort
    source_R = lax.sort(flat_R * R + jnp.arange(R, dtype=jnp.int32)) % R
  else:
    source_R = jnp.argsort(flat_R, stable=True).astype(jnp.int32)
  slot_R = jnp.zeros(R, jnp.int32).at[source_R].set(jnp.arange(R, dtype=jnp.int32), unique_indices=True)
  sizes = jnp.zeros(num_experts, jnp.int32).at[flat_R].add(1, mode='drop')
  if most and most < R:
    source_R, slot_R = source_R[:most], jnp.minimum(slot_R, most - 1)
  return Sorted(source_R // k, source_R, slot_R.reshape(N, k), sizes)


class Blocks(NamedTuple):
  """Which rows of which expert each block takes; blocks past `count` are meaningless."""

  expert: jax.Array  # int32 [max blocks]
  row: jax.Array  # first row
  end: jax.Array  # first row of the next group
  count: jax.Array  # int32 scalar


def schedule(group_sizes_E, rows, block) -> Blocks:
  """Cuts each group into blocks of `block` rows; the last of a group hangs over into the next group's rows."""
  E = group_sizes_E.shape[0]
  per_group = -(-group_sizes_E // block)
  last_E = jnp.cumsum(per_group)
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
  index = jnp.arange(rows // block + E, dtype=jnp.int32)
  expert = jnp.minimum(jnp.searchsorted(last_E, index, side='right'), E - 1).astype(jnp.int32)
  row = start_E[expert] + (index - (last_E - per_group)[expert]) * block
  return Blocks(expert, row, (start_E + group_sizes_E)[expert], last_E[-1])


def weighted_sum(y_RD, slot_Nk, weights_Nk, here_Nk):
  """[N, D]: each token's weighted sum over those of its k rows that are here, whatever the others hold; one gather per
  choice, so that [N, k, D] is never held."""

  def part(slot_N, weight_N, here_N):
    return jnp.where(here_N[:, None], weight_N[:, None].astype(y_RD.dtype) * y_RD[slot_N], 0)

  return functools.reduce(jnp.add, map(part, slot_Nk.T, weights_Nk.T, here_Nk.T))


# ----------------------------------------------------------------------------------------------------------------------
# loop


def _rows_times_transposed(a, b):
  return lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def _transposed_times_rows(a, b):
  # The barrier keeps XLA from folding the transpose back: its CPU product is a tenth faster on plain operands.
  return lax.optimization_barrier(a.T) @ b


def _take(array, index):
  return lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _put(array, update, row):
  return lax.dynamic_update_slice_in_dim(array, update, row, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def experts_loop(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation='swiglu', most=0):
  """See the module docstring. Keeps nothing of the rows: the backward pass makes gate and up again, which takes less
  than writing and reading them (twice [R, F]: 0.7 times the time of a layer with its gradient at D=128)."""
  return _loop_forward(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation, most)[0]


def _loop_block(rows, num_experts):
  """Rows per block: long for the rate of the products, no longer than the mean group for the sake of padding."""
  return next((block for block in (256, 128) if rows >= block * num_experts), LAST_BLOCK)


def _over_blocks(group_sizes_E, block, expert_body, start):
  """Carries `start` through the experts in order: expert_body(expert, blocks, carry), where blocks(step, carry) runs
  step(row, inside_b, carry) on each block of the expert's rows; inside_b is false on rows that hang over the group.

  Blocks have `block` rows, but the last one has the least multiple of LAST_BLOCK that holds what is left: at 256 rows
  per expert 3,800 rows would hang over 8,200 otherwise (0.92 of a training step's time with 32 experts top-2).
  """
  first_E = jnp.cumsum(group_sizes_E) - group_sizes_E
  parts_E = -(-group_sizes_E // LAST_BLOCK)
  whole_E, last_E = jnp.divmod(parts_E, block // LAST_BLOCK)

  def one_expert(expert, carry):
    first, size, whole = first_E[expert], group_sizes_E[expert], whole_E[expert]

    def blocks(step, inner):
      def one_block(i, inner, b=block):
        offset = i * block
        return step(first + offset, offset + jnp.arange(b, dtype=jnp.int32) < size, inner)

      inner = lax.fori_loop(0, whole, one_block, inner)
      for parts in range(1, block // LAST_BLOCK):
        # A loop of one round or none, as lax.cond would copy the carry; from `whole`, so that the work stays inside.
        end = whole + (last_E[expert] == parts)
        inner = lax.fori_loop(whole, end, functools.partial(one_block, b=parts * LAST_BLOCK), inner)
      return inner

    return expert_body(expert, blocks, carry)

  return lax.fori_loop(0, group_sizes_E.shape[0], one_expert, start)


def _loop_forward(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation, most):
  E, F, D = w_down_EFD.shape
  rows, here_Nk = sort_by_expert(ids_Nk, E, most), ids_Nk < E
  R = rows.token_R.shape[0]
  block = _loop_block(R, E)
  token = jnp.pad(rows.token_R, (0, block))

  def expert_body(expert, blocks, y):
    w_gate, w_up, w_down = (_take(w, expert) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))

    def step(row, inside_b, y):
      x_bD = x_ND[lax.dynamic_slice_in_dim(token, row, inside_b.size)]
      # Rows past the group's end are garbage until the next group, which comes later, writes them.
      return _put(y, ACTIVATIONS[activation](x_bD @ w_gate, x_bD @ w_up) @ w_down, row)

    return blocks(step, y)

  y_RD = _over_blocks(rows.group_sizes_E, block, expert_body, jnp.zeros((R + block, D), x_ND.dtype))
  y_ND = weighted_sum(y_RD, rows.slot_Nk, weights_Nk, here_Nk)
  return y_ND, (x_ND, weights_Nk, here_Nk, rows, w_gate_EDF, w_up_EDF, w_down_EFD)


def _loop_backward(activation, most, residuals, dout_ND):
  del most
  x_ND, weights_Nk, here_Nk, rows, *matrices = residuals
  E, F, D = matrices[-1].shape
  R = rows.token_R.shape[0]
  block = _loop_block(R, E)
  token = jnp.pad(rows.token_R, (0, block))
  weight = jnp.pad(weights_Nk.reshape(-1)[rows.source_R], (0, block)).astype(x_ND.dtype)

  def expert_body(expert, blocks, carry):
    dx, dweight, *dmatrices = carry
    w_gate, w_up, w_down = (_take(w, expert) for w in matrices)

    def step(row, inside_b, carry):
      b = inside_b.size
      dx, dweight, dw_gate, dw_up, dw_down = carry
      rows_of = lambda array: lax.dynamic_slice_in_dim(array, row, b)
      token_b = rows_of(token)
      x_bD, dout_bD = x_ND[token_b], dout_ND[token_b]
      weight_b1 = jnp.where(inside_b, rows_of(weight), 0)[:, None]
      act_bF, activation_vjp = jax.vjp(ACTIVATIONS[activation], x_bD @ w_gate, x_bD @ w_up)
      back_bF = _rows_times_transposed(dout_bD, w_down)  # d out / d act, before the router's weight
      dgate_bF, dup_bF = activation_vjp(back_bF * weight_b1)
      dx_bD = _rows_times_transposed(dgate_bF, w_gate) + _rows_times_transposed(dup_bF, w_up)
      dx = _put(dx, dx_bD, row)
      # <dout, y> = <dout W_down^T, act>: the router's gradient without y.
      dweight = _put(dweight, jnp.sum((act_bF * back_bF).astype(jnp.float32), axis=1), row)
      dw_gate += _transposed_times_rows(x_bD, dgate_bF).astype(jnp.float32)
      dw_up += _transposed_times_rows(x_bD, dup_bF).astype(jnp.float32)
      dw_down += _transposed_times_rows(act_bF * weight_b1, dout_bD).astype(jnp.float32)
      return dx, dweight, dw_gate, dw_up, dw_down

    sums = (jnp.zeros(w.shape[1:], jnp.float32) for w in matrices)
    dx, dweight, *sums = blocks(step, (dx, dweight, *sums))
    store = lambda array, update: lax.dynamic_update_index_in_dim(array, update.astype(array.dtype), expert, 0)
    return dx, dweight, *map(store, dmatrices, sums)

  start = (
      jnp.zeros((R + block, D), x_ND.dtype),
      jnp.zeros(R + block, jnp.float32),
      *map(jnp.zeros_like, matrices),
  )
  dx_RD, dweight_R, *dmatrices = _over_blocks(rows.group_sizes_E, block, expert_body, start)
  dweights_Nk = jnp.where(here_Nk, dweight_R[rows.slot_Nk], 0).astype(weights_Nk.dtype)
  return weighted_sum(dx_RD, rows.slot_Nk, here_Nk, here_Nk), None, dweights_Nk, *dmatrices


experts_loop.defvjp(_loop_forward, _loop_backward)


def loop_on_rows(x_RD, weight_R1, group_sizes_E, w_gate_EDF, w_up_EDF, w_down_EFD, activation):
  """`experts_loop` on rows that stand sorted by expert, one assignment each."""
  end_E, row_R = jnp.cumsum(group_sizes_E), jnp.arange(x_RD.shape[0], dtype=jnp.int32)
  ids_R1 = jnp.searchsorted(end_E, row_R, side='right').astype(jnp.int32)[:, None]
  x_RD = jnp.where(ids_R1 < end_E.size, x_RD, 0)  # blocks hang over into rows that hold anything
  return experts_loop(x_RD, ids_R1, weight_R1, w_gate_EDF, w_up_EDF, w_down_EFD, activation)


# ----------------------------------------------------------------------------------------------------------------------
# blocks and megablox: rows in expert order, then grouped products; dispatch and combine are permutations both ways


@jax.custom_vjp
def _dispatch(x_ND, token_R, slot_Nk, here_Nk):
  """x[token] in row order, [R, D]; its transpose is `_collect`."""
  del slot_Nk, here_Nk
  return x_ND[token_R]


@jax.custom_vjp
def _collect(y_RD, token_R, slot_Nk, here_Nk):
  """Sums each token's rows, [N, D]; its transpose is `_dispatch`, and rows behind the groups get anything."""
  del token_R
  return weighted_sum(y_RD, slot_Nk, here_Nk, here_Nk)


_dispatch.defvjp(lambda x_ND, *tables: (_dispatch(x_ND, *tables), tables),
                 lambda tables, dx_RD: (_collect(dx_RD, *tables), None, None, None))
_collect.defvjp(lambda y_RD, *tables: (_collect(y_RD, *tables), tables),
                lambda tables, dy_ND: (_dispatch(dy_ND, *tables), None, None, None))


class Product(NamedTuple):
  """A grouped product on a platform."""

  of: Callable  # (x_RA, w_EAC, group_sizes_E) -> y_RC; rows behind the groups hold anything
  multiple: int = 1  # of R


def experts_sorted(
    x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation, most, product: Product
):
  """Rows in expert order, `products`, and back, each way by gathers. Rows behind the groups fill R up to what the product
  asks for."""
  rows = sort_by_expert(ids_Nk, w_down_EFD.shape[0], most)
  fill = lambda index_R: jnp.pad(index_R, (0, -index_R.shape[0] % product.multiple))
  here_Nk, single = ids_Nk < w_down_EFD.shape[0], lambda a: a.reshape(-1, 1)
  tables = fill(rows.token_R), rows.slot_Nk, here_Nk
  weight_R1 = _dispatch(single(weights_Nk), fill(rows.source_R), single(rows.slot_Nk), single(here_Nk))
  x_RD = _dispatch(x_ND, *tables)
  return _collect(
      products(x_RD, weight_R1, rows.group_sizes_E, w_gate_EDF, w_up_EDF, w_down_EFD, activation, product), *tables
  )


def products(x_RD, weight_R1, group_sizes_E, w_gate_EDF, w_up_EDF, w_down_EFD, activation, product: Product):
  """Experts on rows that stand sorted by expert, times weights: three grouped products."""
  R = x_RD.shape[0]
  fill = lambda rows: jnp.pad(rows, ((0, -R % product.multiple), (0, 0)))
  x_RD, of_each = fill(x_RD), functools.partial(product.of, group_sizes_E=group_sizes_E)
  inner_RF = _gated(activation, of_each(x_RD, w_gate_EDF), of_each(x_RD, w_up_EDF), fill(weight_R1))
  return of_each(inner_RF, w_down_EFD)[:R]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation, gate_RF, up_RF, weight_R1):
  """act(gate, up) * weight, [R, F]. Weighed here, not behind the last product, so that the backward pass needs no
  output of that product: a layer that is made again leaves it out."""
  return (ACTIVATIONS[activation](gate_RF, up_RF) * weight_R1).astype(gate_RF.dtype)


def _gated_backward(activation, residuals, dout_RF):
  gate_RF, up_RF, weight_R1 = residuals
  act_RF, back = jax.vjp(ACTIVATIONS[activation], gate_RF, up_RF)
  dweight_R1 = jnp.sum((act_RF * dout_RF).astype(jnp.float32), axis=1, keepdims=True)
  return *back((dout_RF * weight_R1).astype(act_RF.dtype)), dweight_R1.astype(weight_R1.dtype)


_gated.defvjp(lambda activation, *arguments: (_gated(activation, *arguments), arguments), _gated_backward)


class Kernels(NamedTuple):
  """A grouped product and its gradients; they may leave anything in rows behind the groups and must not read it."""

  rows: Callable  # (x_RA, w_EAC, group_sizes_E) -> y_RC
  transposed: Callable  # (dy_RC, w_EAC, group_sizes_E) -> dx_RA
  weights: Callable  # (x_RA, dy_RC, group_sizes_E) -> dw_EAC, zeros for an empty group


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product_by(kernels, x_RA, w_EAC, group_sizes_E):
  """x_RA w_EAC of each row's expert, [R, C], through Pallas kernels; rows behind the groups hold anything."""
  return kernels.rows(x_RA, w_EAC, group_sizes_E)


def _product_forward(kernels, x_RA, w_EAC, group_sizes_E):
  return product_by(kernels, x_RA, w_EAC, group_sizes_E), (x_RA, w_EAC, group_sizes_E)


def _product_backward(kernels, residuals, dy_RC):
  x_RA, w_EAC, group_sizes_E = residuals
  return kernels.transposed(dy_RC, w_EAC, group_sizes_E), kernels.weights(x_RA, dy_RC, group_sizes_E), None


product_by.defvjp(_product_forward, _product_backward)


def _block_product(x_RA, w_EAC, group_sizes_E):
  """Rows gathered into blocks of one expert each, one batched product, gathered back; rows behind the groups are 0."""
  R, b = x_RA.shape[0], BATCH_BLOCK
  blocks = schedule(group_sizes_E, R, b)
  row_Mb = blocks.row[:, None] + jnp.arange(b, dtype=jnp.int32)[None, :]
  real_Mb = (row_Mb < blocks.end[:, None]) & (jnp.arange(row_Mb.shape[0]) < blocks.count)[:, None]
  x_MbA = jnp.where(real_Mb[..., None], x_RA[jnp.minimum(row_Mb, R - 1)], 0)
  y_MbC = jnp.einsum('mba,mac->mbc', x_MbA, w_EAC[blocks.expert])
  first_E = jnp.cumsum(-(-group_sizes_E // b)) + group_sizes_E // -b
  start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
  row_R = jnp.arange(R, dtype=jnp.int32)
  expert_R = jnp.searchsorted(start_E + group_sizes_E, row_R, side='right')
  inside_R = expert_R < group_sizes_E.shape[0]
  expert_R = jnp.minimum(expert_R, group_sizes_E.shape[0] - 1)
  place_R = first_E[expert_R] * b + row_R - start_E[expert_R]
  y_RC = y_MbC.reshape(-1, y_MbC.shape[-1])[jnp.where(inside_R, place_R, 0)]
  return jnp.where(inside_R[:, None], y_RC, 0)


BLOCKS = Product(_block_product)


def experts_blocks(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation='swiglu', most=0):
  """See the module docstring."""
  return experts_sorted(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation, most, BLOCKS)


def megablox(rows, groups, interpret=False) -> Product:
  """The Pallas TPU grouped product of jax for that many rows at most. `interpret` runs it on CPU, for tests."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

  tall = _tall_tile(rows, groups)

  def by_rows(x_RA, w_EAC, group_sizes_E, transposed=False):
    tile = _rows_tile(x_RA.shape[1], w_EAC.shape[1 if transposed else 2], x_RA.dtype.itemsize)
    return gmm(x_RA, w_EAC, group_sizes_E, x_RA.dtype, tile, transpose_rhs=transposed, interpret=interpret)

  def weights(x_RA, dy_RC, group_sizes_E):
    side = 2048 // x_RA.dtype.itemsize
    tile = tall, _part(x_RA.shape[1], side), _part(dy_RC.shape[1], side)
    return tgmm(x_RA.T, dy_RC, group_sizes_E, x_RA.dtype, tile, interpret=interpret)

  kernels = Kernels(by_rows, functools.partial(by_rows, transposed=True), weights)
  return Product(functools.partial(product_by, kernels), tall)


def experts_megablox(
    x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation='swiglu', most=0, interpret=False
):
  """See the module docstring."""
  product = megablox(min(ids_Nk.size, most or ids_Nk.size), w_down_EFD.shape[0], interpret)
  return experts_sorted(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation, most, product)


def _part(side, most):
  """The largest multiple of 128 up to `most` that divides a side."""
  return max(part for part in range(LANES, most + 1, LANES) if side % part == 0)


def _rows_tile(summed, columns, itemsize):
  """(rows, summed, columns) of a tile of y and dx, in 8 MiB of the 16 MiB of VMEM that a kernel has on v5e and v5p.

  The whole summed side, so that consecutive tiles of one expert find its weights in VMEM: each weight is read once. 128
  rows, as the rest of a tile at the end of a group is computed in vain.
  """
  summed = min(summed, 2**14 // itemsize)
  return LANES, summed, _part(columns, max(LANES, min(1024, WEIGHT_TILE // (summed * itemsize))))


def _tall_tile(rows, groups):
  """Rows of a tile of dw. The more, the less often its sums are read and written, and the more are computed in vain at
  the ends of groups."""
  return 512 if rows >= 1024 * groups else 256
