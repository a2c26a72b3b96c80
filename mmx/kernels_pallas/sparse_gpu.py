"""Attention over selected blocks as Mosaic GPU kernels for Hopper; `sparse_pairs` sorts and cuts what they are given.

The rows of all tiles, in strips of 64, are cut into equal shares, one for each multiprocessor, which walks its share
page by page: keys and values stay in shared memory while the strips of a page last. One warpgroup copies in bulk, one
page and one strip of each other warpgroup ahead; the others compute; barriers say what is full and what is free.

Forward, two warpgroups take strips in turn: scores stand as [64, b], queries in rows. Backward, each has 64 keys of a
page and all strips: scores stand as [keys, queries], so that the gradients of its keys and values grow in registers;
those of queries need all keys, whose part passes through shared memory.

A page whose strips lie in several shares is summed in each: the first adds to what there is, the others write theirs
apart, and a small kernel adds them in order. So a page that all queries chose is shared out like any other, nothing is
added by atomics, and equal inputs give equal bits. None of it has run on a GPU.

Blocks of fewer than 64 keys, the least rows of a product, are held in 64 (`widened`): 16 keys cost the products, copies
and gradients in memory of 64.

Letters as in `sparse_pairs`; C shares, h = rows / 64 strips of a tile, s a strip, s // h its tile. A run is the strips
of one page within a share.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmx.kernels_pallas import hopper, sparse_pairs
from mmx.kernels_pallas.sparse import MASKED

TILE_ROWS = 128  # most r*G: two strips, eight queries of M3's 16 heads
STRIP = 64  # rows of one warpgroup's product
SHARES = 132  # multiprocessors of an H100 or H200: each has room for one block of threads
STAGES = 4  # strips in shared memory: two of each warpgroup, the one at work and the next
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a product
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
BLOCKS = 16, 32, 64, 128  # keys of a block


def unsupported(q_BTHDh, k_BSKDh, block_size, top_k) -> str:
  """'' where `attend_blocks` compiles for Hopper, else one reason. Takes anything with shape and dtype."""
  if block_size not in BLOCKS:
    return f'block_size {block_size}; {", ".join(map(str, BLOCKS))} are supported'
  if q_BTHDh.dtype != jnp.bfloat16:
    return f'dtype {q_BTHDh.dtype}; bfloat16 is supported'
  if q_BTHDh.shape[3] > 128:
    return f'head dim {q_BTHDh.shape[3]}; at most 128 is supported'
  return sparse_pairs.unsupported(q_BTHDh, k_BSKDh, block_size, top_k, TILE_ROWS)


def attend_blocks(q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments, block_size, interpret=False):
  """`sparse_pairs.attend_in_tiles` by the kernels below: (out, logsumexp).

  `interpret` is False for the card, `hopper.simulator()` for tests.
  """
  both = (functools.partial(function, interpret=interpret) for function in (forward, _backward))
  kernels = sparse_pairs.TileKernels(*both, TILE_ROWS, STRIP)
  (k_BSKDh, v_BSKDh), slots_BT, segments, block_size = widened((k_BSKDh, v_BSKDh), slots_BT, segments, block_size)
  inputs = q_BTHDh, k_BSKDh, v_BSKDh, ids_BTKk, slots_BT, segments
  return sparse_pairs.attend_in_tiles(*inputs, block_size, kernels)


def widened(keys, slots_BT, segments, b):
  """(keys, slots, segments, block size) of the same blocks, none of fewer than 64 slots: zeros of segment -1 behind those
  of each; numbers of blocks stay. `keys`: arrays [B, S, ...]; slots and segments as `attend_in_tiles` takes them.
  """
  if b >= STRIP:
    return keys, slots_BT, segments, b
  B, S = keys[0].shape[:2]
  query_segments, key_segments = segments or (jnp.zeros(slots_BT.shape, jnp.int32), jnp.zeros((B, S), jnp.int32))

  def wide(x_BS, fill):
    x_pbX = jnp.pad(sparse_pairs.in_blocks(x_BS, b), ((0, 0), (0, STRIP - b), (0, 0)), constant_values=fill)
    return x_pbX.reshape(B, -1, *x_BS.shape[2:])

  slots_BT = jnp.where(slots_BT < 0, -1, slots_BT // b * STRIP + slots_BT % b)
  return [wide(x, 0) for x in keys], slots_BT, (query_segments, wide(key_segments, -1)), STRIP


def narrowed(x_BS, b, S):
  """[B, P*64, ...] of what `widened` blocks of b -> [B, S, ...]."""
  if b >= STRIP:
    return x_BS
  B, _, *rest = x_BS.shape
  return x_BS.reshape(B, -1, STRIP, *rest)[:, :, :b].reshape(B, -1, *rest)[:, :S]


def forward(tiles, keys, q_MrD, who, K, scale, interpret):
  """The forward kernel of `sparse_pairs.TileKernels`."""
  rows, D, b = *q_MrD.shape[1:], keys.k_pbX.shape[1]
  q_MrD, who = whole_strips(q_MrD, 1, 0), whole_strips(who, 2, -1)
  walk = Walk(keys.k_pbX.shape[0] // keys.last_B.shape[0], K, b, D, q_MrD.shape[1] // STRIP)
  dtype = q_MrD.dtype
  scratch = [
      plgpu.SMEM((STAGES, STRIP, D), dtype, transforms=hopper.tiled(dtype)), plgpu.SMEM((STAGES, 2, STRIP), jnp.int32),
      *key_memory(b, D, dtype), plgpu.SMEM((2, 2, STRIP), jnp.float32),
      plgpu.Barrier(num_arrivals=2, num_barriers=STAGES), plgpu.Barrier(num_barriers=STAGES),
      plgpu.Barrier(num_arrivals=3, num_barriers=2), plgpu.Barrier(num_arrivals=2, num_barriers=2),
  ]
  out, stats = launch(
      functools.partial(_forward_kernel, walk=walk, scale=scale, interpret=interpret), threads=3, scratch=scratch,
      out_type=[jax.ShapeDtypeStruct(q_MrD.shape, dtype), jax.ShapeDtypeStruct(who.shape, jnp.float32)],
      cost=_cost(q_MrD, b, products=2, tensors=2), interpret=interpret, name='msa_attend_blocks',
  )(*runs(tiles), q_MrD, who, keys.k_pbX, keys.v_pbX, keys.segment_p1b)
  return out[:, :rows], stats[:, :, :rows]


def _backward(tiles, keys, q_MrD, dout_MrD, who, stats, dkeys, K, scale, interpret):
  rows, D, b = *q_MrD.shape[1:], keys.k_pbX.shape[1]
  q_MrD, dout_MrD = (whole_strips(x, 1, 0) for x in (q_MrD, dout_MrD))
  who, stats = whole_strips(who, 2, -1), whole_strips(stats, 2, 0)
  walk = Walk(keys.k_pbX.shape[0] // keys.last_B.shape[0], K, b, D, q_MrD.shape[1] // STRIP)
  dtype, groups = q_MrD.dtype, b // STRIP
  transforms = hopper.tiled(dtype)
  scratch = [
      *(plgpu.SMEM((2, STRIP, D), dtype, transforms=transforms),) * 2,
      plgpu.SMEM((2, 2, STRIP), jnp.int32), plgpu.SMEM((2, 2, STRIP), jnp.float32),
      *key_memory(b, D, dtype),
      plgpu.SMEM((1, b, STRIP), dtype, transforms=transforms),
      plgpu.Barrier(num_arrivals=4, num_barriers=2), plgpu.Barrier(num_arrivals=groups, num_barriers=2),
      plgpu.Barrier(num_arrivals=3, num_barriers=2), plgpu.Barrier(num_arrivals=groups, num_barriers=2),
      plgpu.Barrier(num_arrivals=groups), plgpu.Barrier(num_arrivals=groups),
  ]
  dk_ref, dv_ref = (jax.new_ref(x, memory_space=plgpu.GMEM) for x in dkeys)  # written in place, where a query chose
  part = part_of_sums(b, D)
  dq, dk_part, dv_part = launch(
      functools.partial(_backward_kernel, walk=walk, scale=scale, interpret=interpret), threads=groups + 1,
      scratch=scratch, out_type=[jax.ShapeDtypeStruct(q_MrD.shape, dtype), part, part],
      cost=_cost(q_MrD, b, products=5, tensors=3), interpret=interpret, name='msa_attend_blocks_backward',
  )(*runs(tiles), q_MrD, dout_MrD, who, stats, keys.k_pbX, keys.v_pbX, keys.segment_p1b, dk_ref, dv_ref)
  add_parts(tiles, walk, (dk_part, dv_part), (dk_ref, dv_ref), interpret)
  return dq[:, :rows], dk_ref[...], dv_ref[...]


def add_parts(tiles, walk, parts, sum_refs, interpret):
  """Adds what `Walk.add` left apart, arrays [C, b, D], to the sums that it belongs to."""
  launch(
      functools.partial(_add_kernel, walk=walk, interpret=interpret), threads=1, scratch=[],
      out_type=[], cost=None, interpret=interpret, name='msa_add_parts',
  )(*chains(tiles, walk.strips), *parts, *sum_refs)


# ----------------------------------------------------------------------------------------------------------------------
# shares and runs


def share(index, total):
  """First strip and end of a share of so many strips; the last shares may be empty."""
  each = (total + SHARES - 1) // SHARES
  return jnp.minimum(index * each, total), jnp.minimum((index + 1) * each, total)


class Walk(NamedTuple):
  """How a block of threads goes through the strips of its share, run by run."""

  P: int
  K: int
  b: int
  D: int
  strips: int  # h

  def share(self, count_ref):
    """First strip and end of this block of threads' share."""
    return share(lax.axis_index('share'), count_ref[0] * self.strips)

  def runs(self, share, page_ref, end_ref, one_run):
    """one_run(page, first strip, end, turn) for each run; turn counts them."""
    first, end = share

    def body(state):
      s, turn = state
      tile = s // self.strips
      last = jnp.minimum(end_ref[tile] * self.strips, end)
      one_run(page_ref[tile], s, last, turn)
      return last, turn + 1

    lax.while_loop(lambda state: state[0] < end, body, (first, jnp.int32(0)))

  def rows(self, s):
    """Where strip s stands: its tile, and its rows there."""
    return s // self.strips, pl.ds(s % self.strips * STRIP, STRIP)

  def place(self, page):
    """Where the page's keys stand: block of [B*P, b, K*D], and the columns of its head."""
    return page // (self.P * self.K) * self.P + page % self.P, pl.ds(page // self.P % self.K * self.D, self.D)


  def add(self, page_ref, page, first, mine, sums, interpret):
    """Adds to a page's sums what a share has found from strip `first` on, or leaves it apart where another share began.

    sums: (float32 [STRIP, D] of the page's keys `mine`, where the sums stand [B*P, b, K*D], where they stand apart).
    """
    place, head = self.place(page)
    amid = (first > 0) & (page_ref[jnp.maximum(first - 1, 0) // self.strips] == page)

    @pl.when(amid)
    def _():
      for value, _, part_ref in sums:
        part_ref[lax.axis_index('share'), mine] = value

    @pl.when(jnp.logical_not(amid))
    def _():
      for value, sum_ref, _ in sums:
        here = sum_ref.at[place, mine, head]
        here[...] = hopper.read(here, plgpu.Layout.WGMMA, interpret) + value


def part_of_sums(b, D):
  """Where the shares leave what `Walk.add` does not add."""
  return jax.ShapeDtypeStruct((SHARES, b, D), jnp.float32)


def runs(tiles):
  """What `Walk` reads: pages of tiles, where the run of each tile's page ends among them, and how many there are."""
  M = tiles.page_M.shape[0]
  index_M = jnp.arange(1, M + 1, dtype=jnp.int32)
  last_M = jnp.concatenate([tiles.page_M[1:] != tiles.page_M[:-1], jnp.ones(1, bool)]) | (index_M == tiles.count)
  return tiles.page_M, lax.cummin(jnp.where(last_M, index_M, M), reverse=True), tiles.count[None]


def chains(tiles, strips):
  """Shares that begin amid a page and so have a part of its sum: int32 [C] their pages, and, where a page's first part
  is, how many parts follow on one another, else 0.
  """
  first_C, end_C = share(jnp.arange(SHARES, dtype=jnp.int32), tiles.count * strips)
  page_before_C, page_C = (tiles.page_M[jnp.maximum(s_C, 0) // strips] for s_C in (first_C - 1, first_C))
  amid_C = (first_C > 0) & (first_C < end_C) & (page_before_C == page_C)
  same_CC = amid_C[None] & (page_C[:, None] == page_C[None])
  leads_C = amid_C & (jnp.argmax(same_CC, axis=1) == jnp.arange(SHARES))
  return page_C, jnp.where(leads_C, jnp.sum(same_CC, axis=1, dtype=jnp.int32), 0)


def whole_strips(x, axis, fill):
  pads = [(0, -x.shape[i] % STRIP if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, pads, constant_values=fill) if any(map(sum, pads)) else x


def launch(kernel, threads, scratch, out_type, cost, interpret, name):
  """The kernel on every multiprocessor, in so many warpgroups."""
  def body(*refs):
    pl.run_scoped(functools.partial(kernel, *refs), *scratch, collective_axes='group')

  mesh = plgpu.Mesh(grid=(SHARES,), grid_names=('share',), num_threads=threads, thread_name='group')
  return pl.kernel(
      body, out_type=out_type, mesh=mesh, compiler_params=hopper.parameters(approx_math=True), interpret=interpret,
      cost_estimate=cost, name=name,
  )


def key_memory(b, D, dtype):
  """Keys, values and segments of two pages: the one at work and the next."""
  block = plgpu.SMEM((2, b, D), dtype, transforms=hopper.tiled(dtype))
  return block, block, plgpu.SMEM((2, b), jnp.int32)


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def _forward_kernel(
    page_ref, end_ref, count_ref, q_ref, who_ref, k_ref, v_ref, segment_ref, out_ref, stats_ref,
    q_smem, who_smem, k_smem, v_smem, segment_smem, stats_smem, q_full, q_free, keys_full, keys_free,
    *, walk, scale, interpret):
  group = lax.axis_index('group')
  share = walk.share(count_ref)
  shape = STRIP, walk.b
  over_keys = lambda x: lax.broadcast_in_dim(x, shape, [0])

  @pl.when(group == 2)
  def _():
    plgpu.set_max_registers(40, action='decrease')

    def one_run(page, first, end, turn):
      copy_keys(walk, page, turn % 2, (k_ref, v_ref, segment_ref), (k_smem, v_smem, segment_smem), keys_full, keys_free)

      @pl.loop(first, end)
      def _(s):
        stage = s % STAGES
        tile, rows = walk.rows(s)
        plgpu.barrier_wait(q_free.at[stage])
        plgpu.copy_gmem_to_smem(q_ref.at[tile, rows], q_smem.at[stage], q_full.at[stage])
        plgpu.copy_gmem_to_smem(who_ref.at[tile, :, rows], who_smem.at[stage], q_full.at[stage])

    walk.runs(share, page_ref, end_ref, one_run)
    for barrier in [keys_free.at[i] for i in range(2)] + [q_free.at[i] for i in range(STAGES)]:
      plgpu.barrier_wait(barrier)

  @pl.when(group < 2)
  def _():
    plgpu.set_max_registers(232, action='increase')
    stats = stats_smem.at[group]
    for barrier in [keys_free.at[i] for i in range(2)] + [q_free.at[i + group] for i in range(0, STAGES, 2)]:
      plgpu.barrier_arrive(barrier)

    def one_run(page, first, end, turn):
      buffer = turn % 2
      plgpu.barrier_wait(keys_full.at[buffer])
      slot = page % walk.P * walk.b + hopper.iota(shape, 1, plgpu.Layout.WGMMA, interpret)

      @pl.loop(first + (first + group) % 2, end, step=2)
      def _(s):
        stage = s % STAGES
        plgpu.barrier_wait(q_full.at[stage])
        scores = hopper.product(q_smem.at[stage], k_smem.at[buffer], interpret, transpose_b=True) * scale

        @pl.when(s - 2 >= share[0])
        def _():
          plgpu.wait_smem_to_gmem(0)  # outputs leave from where their queries stood: only now may others stand there
          plgpu.barrier_arrive(q_free.at[(s - 2) % STAGES])

        query_slot, query_segment = (hopper.cast(who_smem[stage, i], ROWS, interpret) for i in (0, 1))
        segment = lax.broadcast_in_dim(hopper.cast(segment_smem[buffer], COLUMNS, interpret), shape, [1])
        visible = (slot <= over_keys(query_slot)) & (segment == over_keys(query_segment))
        scores = jnp.where(visible, scores, MASKED)
        top = jnp.max(scores, axis=1)
        weights = jnp.where(visible, jnp.exp(scores - over_keys(top)), 0)
        stats[0] = top
        stats[1] = jnp.sum(weights, axis=1)
        out = hopper.product(weights.astype(v_smem.dtype), v_smem.at[buffer], interpret)
        q_smem[stage] = out.astype(q_smem.dtype)
        plgpu.commit_smem()
        tile, rows = walk.rows(s)
        plgpu.copy_smem_to_gmem(q_smem.at[stage], out_ref.at[tile, rows])
        plgpu.copy_smem_to_gmem(stats, stats_ref.at[tile, :, rows])

      plgpu.barrier_arrive(keys_free.at[buffer])

    walk.runs(share, page_ref, end_ref, one_run)
    plgpu.wait_smem_to_gmem(0)
    last = share[1] - 1 - (share[1] - 1 - group) % 2

    @pl.when(last >= share[0])
    def _():
      plgpu.barrier_arrive(q_free.at[last % STAGES])


def copy_keys(walk, page, buffer, sources, memories, full, free):
  """A page's keys, values and segments into shared memory, as soon as there is room for them."""
  place, columns = walk.place(page)
  (k_ref, v_ref, segment_ref), (k_smem, v_smem, segment_smem) = sources, memories
  plgpu.barrier_wait(free.at[buffer])
  plgpu.copy_gmem_to_smem(k_ref.at[place, :, columns], k_smem.at[buffer], full.at[buffer])
  plgpu.copy_gmem_to_smem(v_ref.at[place, :, columns], v_smem.at[buffer], full.at[buffer])
  plgpu.copy_gmem_to_smem(segment_ref.at[place, 0], segment_smem.at[buffer], full.at[buffer])


def _cost(q_MrD, b, products, tensors):
  M, rows, D = q_MrD.shape
  return pl.CostEstimate(
      flops=2 * products * M * rows * b * D, transcendentals=M * rows * b,
      bytes_accessed=(tensors * q_MrD.size + 2 * M * b * D) * q_MrD.dtype.itemsize,
  )


def _backward_kernel(
    page_ref, end_ref, count_ref, q_ref, dout_ref, who_ref, stats_ref, k_ref, v_ref, segment_ref, dk_ref, dv_ref,
    dq_ref, dk_part_ref, dv_part_ref,
    q_smem, dout_smem, who_smem, stats_smem, k_smem, v_smem, segment_smem, dscores_smem,
    q_full, q_free, keys_full, keys_free, dscores_full, dscores_free, *, walk, scale, interpret):
  group, groups = lax.axis_index('group'), walk.b // STRIP
  share = walk.share(count_ref)
  free = [barrier.at[i] for barrier in (keys_free, q_free) for i in range(2)] + [dscores_free]

  @pl.when(group == groups)
  def _():
    plgpu.set_max_registers(40, action='decrease')

    def one_run(page, first, end, turn):
      copy_keys(walk, page, turn % 2, (k_ref, v_ref, segment_ref), (k_smem, v_smem, segment_smem), keys_full, keys_free)

      @pl.loop(first, end)
      def _(s):
        stage = s % 2
        tile, rows = walk.rows(s)
        plgpu.barrier_wait(q_free.at[stage])
        for source, memory in (q_ref, q_smem), (dout_ref, dout_smem):
          plgpu.copy_gmem_to_smem(source.at[tile, rows], memory.at[stage], q_full.at[stage])
        for source, memory in (who_ref, who_smem), (stats_ref, stats_smem):
          plgpu.copy_gmem_to_smem(source.at[tile, :, rows], memory.at[stage], q_full.at[stage])

    walk.runs(share, page_ref, end_ref, one_run)
    for barrier in free[:4]:
      plgpu.barrier_wait(barrier)

  @pl.when(group < groups)
  def _():
    plgpu.set_max_registers(232, action='increase')
    mine = pl.ds(group * STRIP, STRIP)  # of a block's keys
    columns = pl.ds(group * (walk.D // groups), walk.D // groups)  # of the queries' gradient
    over_rows = lambda x: lax.broadcast_in_dim(hopper.cast(x, COLUMNS, interpret), (STRIP, STRIP), [1])
    for barrier in free:
      plgpu.barrier_arrive(barrier)

    def one_run(page, first, end, turn):
      buffer = turn % 2
      plgpu.barrier_wait(keys_full.at[buffer])
      slot = page % walk.P * walk.b + group * STRIP + hopper.iota((STRIP, STRIP), 0, plgpu.Layout.WGMMA, interpret)
      segment = lax.broadcast_in_dim(hopper.cast(segment_smem[buffer, mine], ROWS, interpret), (STRIP, STRIP), [0])

      def strip(s, sums):
        dk, dv = sums
        stage = s % 2
        # Strips are never negative, but the compiler does not know: it would keep, all run long, 80 registers of where
        # the parts of what is fixed stand, and spill others.
        zero = jnp.minimum(s, 0)
        buffer, dscores_block = (turn + zero) % 2, dscores_smem.at[zero]
        plgpu.barrier_wait(q_full.at[stage])
        q, dout = q_smem.at[stage], dout_smem.at[stage]
        scores = hopper.product(k_smem.at[buffer, mine], q, interpret, transpose_b=True) * scale
        delta = over_rows(stats_smem[stage, 1])
        dweights = hopper.product(v_smem.at[buffer, mine], dout, interpret, transpose_b=True, start=-delta)
        visible = (slot <= over_rows(who_smem[stage, 0])) & (segment == over_rows(who_smem[stage, 1]))
        weights = jnp.where(visible, jnp.exp(scores - over_rows(stats_smem[stage, 0])), 0)
        dscores = (weights * dweights * scale).astype(q.dtype)
        plgpu.barrier_wait(dscores_free)
        dscores_block[mine] = dscores
        plgpu.commit_smem()
        plgpu.barrier_arrive(dscores_full)
        dv = hopper.product(weights.astype(q.dtype), dout, interpret, start=dv)
        dk = hopper.product(dscores, q, interpret, start=dk)
        plgpu.barrier_arrive(q_free.at[stage])
        plgpu.barrier_wait(dscores_full)
        dq = hopper.product(dscores_block, k_smem.at[buffer, :, columns], interpret, transpose_a=True)
        plgpu.barrier_arrive(dscores_free)
        tile, rows = walk.rows(s)
        # 16 bytes of a row at a time: shared memory has no room for a tile.
        hopper.write(dq_ref.at[tile, rows, columns], dq.astype(dq_ref.dtype), interpret)
        return dk, dv

      zeros = hopper.cast(jnp.zeros((STRIP, walk.D), jnp.float32), plgpu.Layout.WGMMA, interpret)
      dk, dv = lax.fori_loop(first, end, strip, (zeros, zeros))
      plgpu.barrier_arrive(keys_free.at[buffer])
      walk.add(page_ref, page, first, mine, [(dk, dk_ref, dk_part_ref), (dv, dv_ref, dv_part_ref)], interpret)

    walk.runs(share, page_ref, end_ref, one_run)
    plgpu.barrier_wait(dscores_free)


def _add_kernel(page_ref, length_ref, *refs, walk, interpret):
  index = lax.axis_index('share')

  @pl.when(length_ref[index] > 0)
  def _():
    place, head = walk.place(page_ref[index])
    for part_ref, sum_ref in zip(refs[: len(refs) // 2], refs[len(refs) // 2 :]):
      for first in range(0, walk.b, STRIP):
        slots = pl.ds(first, STRIP)
        here = sum_ref.at[place, slots, head]
        add = lambda i, total: total + hopper.read(part_ref.at[i, slots], plgpu.Layout.WGMMA, interpret)
        before = hopper.read(here, plgpu.Layout.WGMMA, interpret)
        here[...] = lax.fori_loop(index, index + length_ref[index], add, before)
