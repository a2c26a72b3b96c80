"""What the Hopper kernels share: Pallas's Mosaic GPU backend (`plgpu`), on the card and in its simulator on CPU.

The simulator runs a kernel's copies, barriers and arithmetic with threads on the host and can watch for races. It has no
rules for layouts of registers and for the matrix unit, so `cast`, `iota` and `product` say both what the card does and
what the simulator does instead; a kernel uses them and has one body. What only the card's form knows (layouts,
transposed operands, swizzles) is checked by compiling for sm_90a.

Kernels take `interpret`: False for the card, `simulator()` for tests.
"""

import inspect

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SHARED_BYTES = 232448  # of one block of threads on Hopper


def simulator(**options):
  """Parameters of the simulator, such as detect_races=True. jax 0.10 has it at a private place only."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams(**options)
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

  return InterpretGPUParams(**options)


def parameters(**options):
  """Parameters of the compiler: layouts are those that a kernel names. From jax 0.12 on the default is to infer them."""
  return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, **options)


def cast(x, layout, interpret):
  """x in the registers' `layout`, such as plgpu.Layout.WGMMA."""
  return x if interpret else plgpu.layout_cast(x, layout)


def iota(shape, axis, layout, interpret):
  """int32 positions along `axis`, in the registers' `layout`."""
  if interpret:
    return lax.broadcasted_iota(jnp.int32, shape, axis)
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def read(ref, layout, interpret):
  """What stands in shared or global memory, into registers of the `layout`; slow from global memory."""
  if interpret:
    return ref[...]
  all_of_it = ((),) if 'idx' in inspect.signature(plgpu.load).parameters else ()  # before jax 0.12
  return plgpu.load(ref, *all_of_it, layout=layout, optimized=False)


def write(ref, value, interpret):
  """Into global memory, where a warp's share of a row may be less than the 32 bytes that jax 0.12 asks for elsewhere."""
  if interpret or not hasattr(plgpu, 'store'):  # before jax 0.12
    ref[...] = value
  else:
    plgpu.store(ref, value, optimized=False)


def product(a, b_ref, interpret, transpose_a=False, transpose_b=False, start=None):
  """a @ b on the matrix unit, float32, done when it returns: [m, k] x [k, n] -> [m, n] in the layout WGMMA.

  a is shared memory or registers (then not transposed), b shared memory; m is a multiple of 64. The product is added to
  `start`, [m, n] in the layout WGMMA, where it is given.
  """
  if interpret:
    a, b = a[...], b_ref[...]
    plgpu.commit_smem()  # the matrix unit reads as bulk copies do; these reads, as watched since jax 0.12, do not
    result = jnp.dot(a.T if transpose_a else a, b.T if transpose_b else b, preferred_element_type=jnp.float32)
    return result if start is None else start + result
  a = plgpu.transpose_ref(a, (1, 0)) if transpose_a else a
  b_ref = plgpu.transpose_ref(b_ref, (1, 0)) if transpose_b else b_ref
  if start is not None:
    return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b_ref))(plgpu.ACC.init(start))

  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, a, b_ref)
    return sum_ref[...]

  return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b_ref.shape[1]), jnp.float32))


def tiled(dtype):
  """Transforms of shared memory that copies in bulk and the matrix unit both read: rows of 128 bytes, swizzled."""
  return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
