"""The divergence of MSA's index branch as a Mosaic GPU kernel for Hopper; `divergence_pairs` says what it makes.

The first sweep, of index scores, is `sparse_gpu.forward` with index keys in place of keys and values; only what it says
of the scores is used. The second is the kernel below. Like attention's backward pass it walks shares of the tiles page
by page; each of its warpgroups has 64 keys of a page, beside one that copies.

A tile's rows come in strips of 64, each with the G heads of some queries; then its index queries in one more. Of a strip
scores stand as [keys, rows], so that the teacher, the mean over a query's heads, is a sum of neighbouring columns of
registers; it waits in shared memory, a row for each query. Index scores stand as [queries, keys], where the teacher is
read as it was written and each query's divergence is a sum over columns, of a warpgroup's keys; XLA adds those sums. The
gradients of index keys grow in registers; those of index queries need all keys, whose part passes through shared memory.

None of it has run on a GPU. Letters as in `divergence_pairs` and `sparse_gpu`; G is padded to whole groups of 8 columns
by heads without probability, R = r*G rows of a tile in h strips.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmx.kernels_pallas import hopper, sparse_gpu
from mmx.kernels_pallas.divergence_pairs import DivergenceKernels, divergence, in_tiles
from mmx.kernels_pallas.sparse_gpu import COLUMNS, ROWS, STRIP, Walk

WIDTH = 8  # columns of registers that stay together
NEVER = 1e30  # a logsumexp against which nothing has probability
WGMMA = plgpu.Layout.WGMMA


def unsupported(q_BTHDh, k_BSKDh, index_q_BTKDi) -> str:
  """'' where `selected_divergence_hopper` compiles, for shapes that attention and index kernels take; else one reason."""
  G = q_BTHDh.shape[2] // k_BSKDh.shape[2]
  if G > 16:
    return f'{G} query heads per kv head; at most 16 are supported'
  return '' if index_q_BTKDi.shape[3] <= 128 else f'index dim {index_q_BTKDi.shape[3]}; at most 128 is supported'


def selected_divergence_hopper(q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, logsumexp_BTKG, segment_ids_BT,
                               block_size, interpret=False, part=None):
  """`divergence_pairs.divergence` by the kernels below: kl [B] float32.

  `interpret` is False for the card, `hopper.simulator()` for tests.
  """
  stats, diverge = (functools.partial(function, interpret=interpret) for function in (_stats, _diverge))
  arguments = q_BTHDh, k_BTKDh, index_q_BTKDi, index_k_BTDi, ids_BTKk, (logsumexp_BTKG,), segment_ids_BT
  kernels = DivergenceKernels(stats, diverge, lambda G: STRIP)
  return divergence(*arguments, block_size, functools.partial(_in_wide_tiles, kernels=kernels), part)


def _in_wide_tiles(q_BTHDh, k_BSKDh, index_q_BTKDi, index_k_BSDi, ids_BTKk, logsumexp_BTKG, slots_BT, segments, b,
                   kernels):
  keys, slots_BT, segments, wide = sparse_gpu.widened((k_BSKDh, index_k_BSDi), slots_BT, segments, b)
  arguments = q_BTHDh, keys[0], index_q_BTKDi, keys[1], ids_BTKk, logsumexp_BTKG, slots_BT, segments
  kl_B, dindex_q_BTKDi, dindex_k = in_tiles(*arguments, wide, kernels)
  return kl_B, dindex_q_BTKDi, sparse_gpu.narrowed(dindex_k, b, index_k_BSDi.shape[1])


def _stats(tiles, keys, index_k_pbD, index_q_MrD, who, K, scale, interpret):
  P = index_k_pbD.shape[0] // keys.last_B.shape[0]
  tiles = tiles._replace(page_M=tiles.page_M // (P * K) * P + tiles.page_M % P)  # all heads share an index key
  keys = keys._replace(k_pbX=index_k_pbD, v_pbX=index_k_pbD)
  return sparse_gpu.forward(tiles, keys, index_q_MrD, who, 1, scale, interpret)[1]


def _diverge(tiles, keys, index_k_pbD, q_MrD, index_q_MrD, who, logsumexps, dindex_k, K, scales, interpret):
  (M, r, D), b = index_q_MrD.shape, index_k_pbD.shape[1]
  G = q_MrD.shape[1] // r
  width = -(-G // WIDTH) * WIDTH
  by_head = lambda x, fill: jnp.pad(
      x.reshape(M, r, G, -1), ((0, 0), (0, 0), (0, width - G), (0, 0)), constant_values=fill
  ).reshape(M, r * width, -1)
  q_MrD = sparse_gpu.whole_strips(by_head(q_MrD, 0), 1, 0)
  attention_Mr = sparse_gpu.whole_strips(by_head(logsumexps[0], NEVER)[..., 0], 1, NEVER)
  index_q_MrD = sparse_gpu.whole_strips(index_q_MrD, 1, 0)
  who, index_Mr = sparse_gpu.whole_strips(who, 2, -1), sparse_gpu.whole_strips(logsumexps[1], 1, 0)

  walk = Walk(index_k_pbD.shape[0] // keys.last_B.shape[0], K, b, D, 1)
  dtype, groups, h = q_MrD.dtype, b // STRIP, q_MrD.shape[1] // STRIP
  tiled = lambda *shape: plgpu.SMEM(shape, dtype, transforms=hopper.tiled(dtype))
  numbers = lambda dtype, *shape: plgpu.SMEM((*shape, STRIP), dtype)
  scratch = [
      tiled(2, STRIP, D), numbers(jnp.float32, 2), numbers(jnp.int32, 2), numbers(jnp.float32),
      tiled(2, b, D), tiled(2, b, D), plgpu.SMEM((2, b), jnp.int32),
      numbers(jnp.float32, groups, STRIP), tiled(1, STRIP, b), numbers(jnp.float32, groups),
      plgpu.Barrier(num_arrivals=2, num_barriers=2), plgpu.Barrier(num_arrivals=3),
      plgpu.Barrier(num_arrivals=groups, num_barriers=2),
      plgpu.Barrier(num_arrivals=3, num_barriers=2), plgpu.Barrier(num_arrivals=groups, num_barriers=2),
      plgpu.Barrier(num_arrivals=groups), plgpu.Barrier(num_arrivals=groups),
  ]
  dindex_k_ref = jax.new_ref(dindex_k, memory_space=plgpu.GMEM)  # written in place, where a query chose
  kernel = functools.partial(_kernel, walk=walk, h=h, G=G, width=width, scales=scales, interpret=interpret)
  kl, dindex_q, dindex_k_part = sparse_gpu.launch(
      kernel, threads=groups + 1, scratch=scratch, out_type=[
          jax.ShapeDtypeStruct((M, groups, STRIP), jnp.float32), jax.ShapeDtypeStruct((M, STRIP, D), dtype),
          sparse_gpu.part_of_sums(b, D),
      ], cost=_cost(q_MrD, b), interpret=interpret, name='msa_divergence',
  )(
      *sparse_gpu.runs(tiles), q_MrD, attention_Mr, index_q_MrD, who, index_Mr, keys.k_pbX, index_k_pbD,
      keys.segment_p1b, dindex_k_ref,
  )
  sparse_gpu.add_parts(tiles, walk, (dindex_k_part,), (dindex_k_ref,), interpret)
  return jnp.sum(kl, axis=1)[:, :r], dindex_q[:, :r], dindex_k_ref[...]


def _cost(q_MrD, b):
  M, rows, D = q_MrD.shape
  return pl.CostEstimate(
      flops=2 * M * b * D * (rows + 3 * STRIP), transcendentals=M * b * (rows + 2 * STRIP),
      bytes_accessed=(q_MrD.size + 3 * M * STRIP * D + 2 * M * b * D) * q_MrD.dtype.itemsize,
  )


# ----------------------------------------------------------------------------------------------------------------------
# the kernel


def _kernel(
    page_ref, end_ref, count_ref, q_ref, attention_ref, index_q_ref, who_ref, index_ref, k_ref, index_k_ref, segment_ref,
    dindex_k_ref, kl_ref, dindex_q_ref, part_ref,
    q_smem, attention_smem, who_smem, index_smem, k_smem, index_k_smem, segment_smem, teacher_smem, dscores_smem, kl_smem,
    full, asked, free, keys_full, keys_free, dscores_full, dscores_free, *, walk, h, G, width, scales, interpret):
  group, groups = lax.axis_index('group'), walk.b // STRIP
  share = walk.share(count_ref)
  stage_of = lambda tile, strip: (tile * (h + 1) + strip) % 2  # the index queries are strip h

  @pl.when(group == groups)
  def _():
    plgpu.set_max_registers(40, action='decrease')

    def one_run(page, first, end, turn):
      buffer = turn % 2
      place, columns = walk.place(page)
      plgpu.barrier_wait(keys_free.at[buffer])
      plgpu.copy_gmem_to_smem(k_ref.at[place, :, columns], k_smem.at[buffer], keys_full.at[buffer])
      plgpu.copy_gmem_to_smem(index_k_ref.at[place], index_k_smem.at[buffer], keys_full.at[buffer])
      plgpu.copy_gmem_to_smem(segment_ref.at[place, 0], segment_smem.at[buffer], keys_full.at[buffer])

      @pl.loop(first, end)
      def _(tile):
        @pl.loop(0, h)
        def _(strip):
          stage, rows = stage_of(tile, strip), pl.ds(strip * STRIP, STRIP)
          plgpu.barrier_wait(free.at[stage])
          plgpu.copy_gmem_to_smem(q_ref.at[tile, rows], q_smem.at[stage], full.at[stage])
          plgpu.copy_gmem_to_smem(attention_ref.at[tile, rows], attention_smem.at[stage], full.at[stage])

        stage = stage_of(tile, h)
        plgpu.barrier_wait(free.at[stage])  # and so the tile before is done with who asked
        plgpu.copy_gmem_to_smem(index_q_ref.at[tile], q_smem.at[stage], asked)
        plgpu.copy_gmem_to_smem(who_ref.at[tile], who_smem, asked)
        plgpu.copy_gmem_to_smem(index_ref.at[tile], index_smem, asked)

    walk.runs(share, page_ref, end_ref, one_run)
    for barrier in (free, keys_free):
      plgpu.barrier_wait(barrier.at[0])
      plgpu.barrier_wait(barrier.at[1])

  @pl.when(group < groups)
  def _():
    plgpu.set_max_registers(232, action='increase')
    mine, shape = pl.ds(group * STRIP, STRIP), (STRIP, STRIP)
    over_columns = lambda x: lax.broadcast_in_dim(x, shape, [0])
    over_rows = lambda x: lax.broadcast_in_dim(hopper.cast(x, COLUMNS, interpret), shape, [1])
    columns = pl.ds(group * (walk.D // groups), walk.D // groups)  # of the index queries' gradient
    for barrier in (free, keys_free):
      plgpu.barrier_arrive(barrier.at[0])
      plgpu.barrier_arrive(barrier.at[1])
    plgpu.barrier_arrive(dscores_free)

    def one_run(page, first, end, turn):
      buffer = turn % 2
      plgpu.barrier_wait(keys_full.at[buffer])

      # Numbers of tiles are never negative, but the compiler does not know: see `sparse_gpu`. Else it spills registers.
      def one_tile(tile, dindex_k):
        teacher_mine, kl_mine = teacher_smem.at[group], kl_smem.at[group]

        @pl.loop(0, h)
        def _(strip):
          stage, here = stage_of(tile, strip), (turn + jnp.minimum(tile + strip, 0)) % 2
          plgpu.barrier_wait(full.at[stage])
          scores = hopper.product(k_smem.at[here, mine], q_smem.at[stage], interpret, transpose_b=True) * scales[0]
          # Keys that a query does not see may score above what it sees, where infinity would be no number in sums.
          probability = jnp.exp(jnp.minimum(scores - over_rows(attention_smem[stage]), 0)) / G
          plgpu.commit_smem()  # numbers that were read: a copy in bulk may now write there
          plgpu.barrier_arrive(free.at[stage])
          for i in range(STRIP // width):
            heads = probability[:, i * width : (i + 1) * width]
            teacher_mine[strip * (STRIP // width) + i] = jnp.sum(heads, axis=1)

        stage, zero = stage_of(tile, h), jnp.minimum(tile, 0)
        here, dscores_block, index_q = (turn + zero) % 2, dscores_smem.at[zero], q_smem.at[stage]
        plgpu.barrier_wait(asked)
        scores = hopper.product(index_q, index_k_smem.at[here, mine], interpret, transpose_b=True) * scales[1]
        slot = page % walk.P * walk.b + group * STRIP + hopper.iota(shape, 1, WGMMA, interpret)
        segment = over_rows(segment_smem[buffer, mine])
        query_slot, query_segment = (hopper.cast(who_smem[i], ROWS, interpret) for i in (0, 1))
        logsumexp = hopper.cast(index_smem[...], ROWS, interpret)
        visible = (slot <= over_columns(query_slot)) & (segment == over_columns(query_segment))
        log_student = jnp.where(visible, scores - over_columns(logsumexp), -NEVER)
        # Rows behind the tile's queries hold anything, and are not visible.
        teacher = jnp.where(log_student > -NEVER, hopper.read(teacher_mine, WGMMA, interpret), 0)
        log_teacher = jnp.log(jnp.maximum(teacher, jnp.finfo(jnp.float32).tiny))  # where P is 0, its share is 0
        kl = jnp.sum(teacher * (log_teacher - log_student), axis=1)
        dscores = ((jnp.exp(log_student) - teacher) * scales[1]).astype(q_smem.dtype)
        plgpu.wait_smem_to_gmem(0)  # for the tile before to have left kl_mine
        kl_mine[...] = kl
        plgpu.barrier_wait(dscores_free)
        dscores_block[:, mine] = dscores
        plgpu.commit_smem()
        plgpu.barrier_arrive(dscores_full)
        plgpu.copy_smem_to_gmem(kl_mine, kl_ref.at[tile, group])
        dindex_k = hopper.product(dscores_block.at[:, mine], index_q, interpret, transpose_a=True, start=dindex_k)
        plgpu.barrier_arrive(free.at[stage])
        plgpu.barrier_wait(dscores_full)
        dindex_q = hopper.product(dscores_block, index_k_smem.at[here, :, columns], interpret)
        plgpu.barrier_arrive(dscores_free)
        hopper.write(dindex_q_ref.at[tile, :, columns], dindex_q.astype(dindex_q_ref.dtype), interpret)
        return dindex_k

      zeros = hopper.cast(jnp.zeros((STRIP, walk.D), jnp.float32), WGMMA, interpret)
      dindex_k = lax.fori_loop(first, end, one_tile, zeros)
      plgpu.barrier_arrive(keys_free.at[buffer])
      walk.add(page_ref, page, first, mine, [(dindex_k, dindex_k_ref, part_ref)], interpret)

    walk.runs(share, page_ref, end_ref, one_run)
    plgpu.barrier_wait(dscores_free)
    plgpu.wait_smem_to_gmem(0)
