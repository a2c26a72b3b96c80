"""What training asks of glibc's heap, in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = r"""
import ctypes, re, resource
from mmx import host

libc = ctypes.CDLL(None)
host.keep_memory(libc)

def use():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(2**27)
  ctypes.memset(block, 1, 2**27)
  libc.free(ctypes.c_void_p(block))
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


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="glibc's heap and /proc are Linux's")
def test_what_a_step_frees_is_kept_in_pages_that_may_be_huge():
  said = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, check=True).stdout.split()
  assert int(said[0]) < 100, 'page faults of 128 MiB used a second time; 32,768 pages would be new'
  assert said[1] == 'True'
