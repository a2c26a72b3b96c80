"""Grouped products with true group sizes for Hopper, in Pallas for its Triton backend: forward and both gradients.

Rows stand sorted by expert. Each group is cut into blocks of rows from its own first row on, and a program makes one
tile of the output, so that an empty group has no program that works, weights are read where they lie, transposed or
not, and nothing is padded or gathered:

  rows        y_RC[block] = x_RA[block] w_EAC[expert]               one program per block and tile of C
  transposed  dx_RA[block] = dy_RC[block] w_EAC[expert]^T           the same, tiles of w read along their rows
  weights     dw_EAC[expert] = x_RA[group]^T dy_RC[group]           one program per expert and tile [A, C]

The grid is static, as a GPU's must be, with programs for the most blocks that there can be; those past the last one end
at once. Products take the operands' dtype and add up in float32.

Backend: Triton, named by its compiler parameters. The kernels of jax for Mosaic cannot serve: `ragged_dot_mgpu` unrolls
a loop over all groups in every tile and multiplies the rows behind the last group too, `transposed_ragged_dot_mgpu`
asks the host's first device how many cores it has. Proved without a GPU: values and gradients in interpret mode, and
sm_90a code whose matrix units (wgmma) read shared memory while asynchronous copies fill it four steps ahead, without
spilled registers and without temporaries but the table of blocks. Speed is not.

Letters as in `grouped`: R rows, E experts, A and C the two sides of a weight, b rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mmx.kernels_pallas.grouped import Kernels, Product, experts_sorted, product_by, schedule

STEP = 64  # of the summed side at once: 128 bytes of bfloat16, a line of shared memory as the matrix units read it
BLOCK = 128  # rows of a block, and side A of a tile of weights
TILE = 256  # most of side C: 128 x 256 float32 sums fill half the registers of 8 warps
STAGES = 4  # steps of operands in shared memory: 48 KiB each of 227 KiB


def unsupported(x_ND, w_gate_EDF) -> str:
  """'' where `experts_hopper` compiles for Hopper, else one reason. Takes anything with shape and dtype."""
  D, F = w_gate_EDF.shape[1:]
  if x_ND.dtype != jnp.bfloat16 or w_gate_EDF.dtype != jnp.bfloat16:
    return f'dtypes {x_ND.dtype} and {w_gate_EDF.dtype}; bfloat16 is supported'
  if D % BLOCK or F % BLOCK:
    return f'd_model {D} and d_ff {F}; multiples of {BLOCK} are supported'
  return ''


def hopper(interpret=False) -> Product:
  """See `grouped`. `interpret` runs the kernels on CPU, for tests."""
  kernels = Kernels(*(functools.partial(kernel, interpret=interpret) for kernel in (_rows, _transposed, _weights)))
  return Product(functools.partial(product_by, kernels))


def experts_hopper(
    x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation='swiglu', most=0, interpret=False
):
  """See `grouped`."""
  product = hopper(interpret)
  return experts_sorted(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, activation, most, product)


def _rows(x_RA, w_EAC, group_sizes_E, interpret):
  """[R, C]; rows behind the last group are not written."""
  return _blocks(x_RA, w_EAC, group_sizes_E, w_EAC.shape[2], False, interpret)


def _transposed(dy_RC, w_EAC, group_sizes_E, interpret):
  """[R, A]; rows behind the last group are not written."""
  return _blocks(dy_RC, w_EAC, group_sizes_E, w_EAC.shape[1], True, interpret)


def _tile(side):
  return next(tile for tile in (TILE, BLOCK) if side % tile == 0)


def _call(kernel, grid, out_shape, tile, flops, arrays, interpret):
  """Every array whole in memory: a program finds its part by itself."""
  return pl.pallas_call(
      kernel,
      grid=grid,
      out_shape=out_shape,
      interpret=interpret,
      compiler_params=triton.CompilerParams(num_warps=tile // 32, num_stages=STAGES),
      cost_estimate=pl.CostEstimate(
          flops=flops, transcendentals=0, bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, out_shape))
      ),
      name=kernel.func.__name__.strip('_'),
  )(*arrays)


# ----------------------------------------------------------------------------------------------------------------------
# blocks of rows times weights


def _blocks(x_RA, w, group_sizes_E, C, transposed, interpret):
  R, A = x_RA.shape
  blocks = schedule(group_sizes_E, R, BLOCK)
  c = _tile(C)
  kernel = functools.partial(_grouped_rows, A=A, c=c, transposed=transposed)
  # The first axis runs fastest: tiles of one block are neighbours, then blocks of one expert, and share the cache.
  grid = C // c, blocks.expert.shape[0]
  out_shape = jax.ShapeDtypeStruct((R, C), x_RA.dtype)
  return _call(kernel, grid, out_shape, c, 2 * R * A * C, (*blocks[:3], blocks.count[None], x_RA, w), interpret)


def _grouped_rows(expert_M, row_M, end_M, count_1, x_RA, w, y_RC, *, A, c, transposed):
  column, m = pl.program_id(0) * c, pl.program_id(1)

  @pl.when(m < count_1[0])
  def _():
    expert, row = expert_M[m], row_M[m]
    inside_b1 = (row + jnp.arange(BLOCK, dtype=jnp.int32) < end_M[m])[:, None]
    block = pl.ds(row, BLOCK)

    def step(i, sum_bc):
      part = pl.ds(i * STEP, STEP)
      x_bs = triton.load(x_RA.at[block, part], mask=inside_b1, other=0)
      if transposed:
        return sum_bc + triton.dot(x_bs, w[expert, pl.ds(column, c), part].T)
      return sum_bc + triton.dot(x_bs, w[expert, part, pl.ds(column, c)])

    y_bc = lax.fori_loop(0, A // STEP, step, jnp.zeros((BLOCK, c), jnp.float32))
    triton.store(y_RC.at[block, pl.ds(column, c)], y_bc.astype(y_RC.dtype), mask=inside_b1)


# ----------------------------------------------------------------------------------------------------------------------
# the gradient of the weights


def _weights(x_RA, dy_RC, group_sizes_E, interpret):
  """[E, A, C] in x's dtype; zeros for an empty group."""
  (R, A), C, E = x_RA.shape, dy_RC.shape[1], group_sizes_E.shape[0]
  end_E = jnp.cumsum(group_sizes_E)
  c = _tile(C)
  kernel = functools.partial(_grouped_weights, c=c)
  out_shape = jax.ShapeDtypeStruct((E, A, C), x_RA.dtype)
  arrays = end_E - group_sizes_E, end_E, x_RA, dy_RC
  return _call(kernel, (C // c, A // BLOCK, E), out_shape, c, 2 * R * A * C, arrays, interpret)


def _grouped_weights(start_E, end_E, x_RA, dy_RC, dw_EAC, *, c):
  c_part, a_part = pl.ds(pl.program_id(0) * c, c), pl.ds(pl.program_id(1) * BLOCK, BLOCK)
  expert = pl.program_id(2)
  start, end = start_E[expert], end_E[expert]

  def step(i, sum_ac):
    row = start + i * STEP
    inside_s1 = (row + jnp.arange(STEP, dtype=jnp.int32) < end)[:, None]
    # Both sides are masked: what lies behind the last group may be NaN.
    x_sa = triton.load(x_RA.at[pl.ds(row, STEP), a_part], mask=inside_s1, other=0)
    dy_sc = triton.load(dy_RC.at[pl.ds(row, STEP), c_part], mask=inside_s1, other=0)
    return sum_ac + triton.dot(x_sa.T, dy_sc)

  steps = (end - start + STEP - 1) // STEP
  dw_ac = lax.fori_loop(0, steps, step, jnp.zeros((BLOCK, c), jnp.float32))
  dw_EAC[expert, a_part, c_part] = dw_ac.astype(dw_EAC.dtype)
