"""What training asks of glibc's heap, in processes of their own."""

import subprocess
import sys

import pytest

LINUX = pytest.mark.skipif(not sys.platform.startswith('linux'), reason="glibc's heap and /proc are Linux's")
KEPT = r"""
import ctypes, re, resource
from mmx import host

libc = host.glibc()
host.keep_memory()

def use():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(2**27)
  ctypes.memset(block, 1, 2**27)
  libc.free(block)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, block

_, block = use()
faults, _ = use()
flags = {}
for mapping in re.split(r'\n(?=[0-9a-f]+-[0-9a-f]+ )', open('/proc/self/smaps').read()):
  first, last = (int(address, 16) for address in mapping.split()[0].split('-'))
  if first <= block + 2**26 < last:
    flags = re.search('VmFlags:(.*)', mapping)[1].split()
print(faults, 'hg' in flags)
"""
HOLES = r"""
import random
from mmx import host

libc = host.glibc()
host.keep_memory()
sizes = [random.Random(i).randrange(200, 200_000) for i in range(20_000)]
blocks = [libc.malloc(size) for size in sizes]
for hole in blocks[::2]:
  libc.free(hole)
host.leave_holes()
print(max(blocks), *(libc.malloc(size) for size in sizes[::100]))
"""


def run(program):
  said = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout
  return said.split()


@LINUX
def test_what_a_step_frees_is_kept_in_pages_that_may_be_huge():
  faults, huge = run(KEPT)
  assert int(faults) < 100, 'page faults of 128 MiB used a second time; 32,768 pages would be new'
  assert huge == 'True'


@LINUX
def test_holes_that_a_compilation_left_serve_no_step():
  last, *served = map(int, run(HOLES))
  assert len(served) == 200 and min(served) > last
