"""What a training process asks of its machine before jax starts: devices, memory, programs that are kept."""

import ctypes
import mmap
import os
import sys


def use_every_core():
  """On CPU: a device per core, so that experts and rows are split over cores, and memory that is kept between steps.

  XLA runs a loop over experts on one thread; two devices of one core each took 0.75 of the time of one device of two.
  Leaves the devices alone where XLA_FLAGS or JAX_NUM_CPU_DEVICES speak of them already.
  """
  keep_memory()
  import jax

  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  chosen = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if not chosen and jax.config.jax_num_cpu_devices < 1:
    jax.config.update('jax_num_cpu_devices', min(8, 1 << cores.bit_length() - 1))  # a power of two divides experts


def glibc():
  """The C library with the types of what is called here; None on machines that have another."""
  if sys.platform != 'linux' or not hasattr(libc := ctypes.CDLL(None), 'mallopt'):
    return None
  libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
  libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
  if hasattr(libc, 'mallinfo2'):  # since 2.33
    libc.mallinfo2.restype = HeapInfo
  return libc


class HeapInfo(ctypes.Structure):
  """glibc's struct mallinfo2."""

  _fields_ = [(name, ctypes.c_size_t) for name in (*(f'field_{i}' for i in range(9)), 'free_at_end')]


def keep_memory():
  """Has glibc keep what a step frees for the next, in huge pages.

  XLA allocates a step's temporaries anew each time, and glibc would return them to the system: 68,000 page faults, 0.1 s
  a step. Where the system gives huge pages on request only, the heap is grown once and asked for in them, as nothing
  else tells glibc to: 0.68 to 0.92 of the time of a step of the arms of `experiments/moe_ablation.py`.
  """
  if (libc := glibc()) is None:
    return
  ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -8, -4, -1, -2  # malloc.h
  for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**24)):
    libc.mallopt(parameter, value)
  grow_heap(libc)


def grow_heap(libc):
  """Has the end of the heap, from which a step's temporaries are taken, lie in huge pages."""
  MADV_HUGEPAGE, size, page = 14, 3 * 2**29, mmap.PAGESIZE  # 1.5 GiB of addresses, not of memory, until touched
  if heap := libc.malloc(size):
    start = -(-heap // page) * page
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size - page), MADV_HUGEPAGE)
    libc.free(heap)


def leave_holes():
  """Takes from glibc what a compilation left free in between, so that what runs then is served from the heap's end.

  The ablation's 128 experts leave 60,000 holes. Every allocation of a step passes by some, holding a lock that its
  threads wait for: a step took 1.4 times as long as that of a program which came out of the cache of compilations. The
  memory of the holes goes back to the system; 350 MB of addresses are lost.
  """
  libc = glibc()
  if not hasattr(libc, 'mallinfo2'):
    return
  libc.malloc_trim(0)
  end = libc.sbrk(0) - libc.mallinfo2().free_at_end
  size = 2**30
  while size > 128:  # what is smaller is found without a search
    while (hole := libc.malloc(size)) and hole < end:
      pass
    libc.free(hole)
    size = size * 7 // 8
  grow_heap(libc)


def cache_compilations():
  """Keeps compiled programs between runs in ~/.cache/mmx, or where JAX_COMPILATION_CACHE_DIR says."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/mmx/compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
