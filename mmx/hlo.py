"""What a compiled program does, read off its text: collectives, products and memory traffic, loops multiplied out.

XLA's own cost analysis counts the body of a loop once, and a model's layers are a loop. Here every computation counts as
often as its callers run it: a loop's body as often as its condition allows, each branch of a conditional once.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict

BYTES = {
    'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
    'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16,
}
COLLECTIVES = (
    'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
    'collective-broadcast',
)
KERNELS = re.compile(r'custom_call_target="[^"]*(tpu_custom_call|mosaic|triton|cudnn|fmha)')
DOES_NOTHING = '"cost_estimate":{"flops":"0","transcendentals":"0","bytes_accessed":"0"'  # a kernel, so it says
MOVES_NOTHING = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
    'partition-id', 'replica-id', 'opt-barrier', 'iota', 'reshape',
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  bytes: float  # of the result, all elements of a tuple
  elements: float  # of the result
  operands: tuple[str, ...]
  rest: str  # everything behind the opcode


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective among groups of one size, summed over a run of the program."""

  kind: str
  group: int  # devices of a group
  count: int
  bytes: float  # that a device sends, in the best algorithm on a ring


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Optimised HLO text -> ({computation: instructions}, the entry computation's name)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if line.startswith(('%', 'ENTRY')) and line.rstrip().endswith('{'):
      name = re.search(r'%([\w.\-]+)', line)[1]
      entry = name if line.startswith('ENTRY') else entry
      current = computations[name] = []
    elif current is not None and (found := re.match(r'\s+(?:ROOT )?%([\w.\-]+) = (.*)', line)):
      current.append(_instruction(*found.groups()))
  if entry is None:
    raise ValueError('no ENTRY computation in the text of the program')
  return computations, entry


def _instruction(name, told):
  end = _closing(told, 0) if told.startswith('(') else told.index(' ')
  shape, behind = told[:end], told[end:].lstrip()
  opcode, _, rest = behind.partition('(')
  arguments = rest[: _closing('(' + rest, 0) - 2]
  return Instruction(name, opcode, bytes_of(shape), elements_of(shape), tuple(re.findall(r'%([\w.\-]+)', arguments)), rest)


def _closing(text, start):
  """Behind the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if depth == 0:
      return i + 1
  return len(text)


def bytes_of(shape: str) -> float:
  """'(bf16[2,3]{1,0}, f32[])' -> 16."""
  return sum(BYTES.get(dtype, 1 if dtype.startswith('f8') else 0) * count for dtype, count in _arrays(shape))


def elements_of(shape: str) -> int:
  """'(bf16[2,3]{1,0}, f32[])' -> 7."""
  return sum(count for _, count in _arrays(shape))


def _arrays(shape):
  found = re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', shape)
  return [(dtype, math.prod(map(int, dims.split(',') if dims else ()))) for dtype, dims in found]


def runs(computations, entry) -> Counter:
  """How often each computation runs, those inside fusions apart: a fusion is one pass over its operands."""
  times = Counter()

  def visit(name, factor):
    times[name] += factor
    for i in computations[name]:
      if i.opcode == 'while':
        visit(re.search(r'body=%([\w.\-]+)', i.rest)[1], factor * _trips(i.rest, computations))
      elif i.opcode == 'conditional':
        listed = re.search(r'branch_computations=\{([^}]*)\}', i.rest)
        branches = re.findall(r'%([\w.\-]+)', listed[1]) if listed else re.findall(
            r'(?:true|false)_computation=%([\w.\-]+)', i.rest)
        for branch in branches:
          visit(branch, factor)
      elif i.opcode in ('call', 'async-start'):
        for callee in re.findall(r'(?:to_apply|calls)=%([\w.\-]+)', i.rest):
          visit(callee, factor)

  visit(entry, 1)
  return times


def _trips(loop, computations) -> int:
  """Of a loop that counts up from 0, as jax's scans do: what XLA noted, else what its condition compares with.

  1 where the bound is known at run time only.
  """
  if noted := re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop):
    return int(noted[1])
  condition = computations[re.search(r'condition=%([\w.\-]+)', loop)[1]]
  bounds = [int(found[1]) for i in condition
            if i.opcode == 'constant' and (found := re.match(r'(\d+)\)', i.rest))]
  return bounds[0] if len(bounds) == 1 else 1


def collectives(computations, times) -> list[Collective]:
  """Of one run of the program, by kind and size of group; a collective of one device is none."""
  count, sent = defaultdict(int), defaultdict(float)
  for name, factor in times.items():
    found = list(_sent(computations[name]))
    for i in computations[name]:
      if i.opcode == 'fusion':  # of a sum within it each device slices its part
        found += [('reduce-scatter', group, wire / 2) if kind == 'all-reduce' else (kind, group, wire)
                  for kind, group, wire in _sent(_inside(i, computations))]
    for kind, group, wire in found:
      count[kind, group] += factor
      sent[kind, group] += factor * wire
  return sorted((Collective(*key, count[key], sent[key]) for key in count), key=lambda c: -c.bytes)


def _sent(instructions):
  """(kind, devices of a group, bytes that a device sends) of a computation's collectives."""
  size_of = {i.name: i.bytes for i in instructions}
  for i in instructions:
    kind = i.opcode.removesuffix('-start')
    group = _group(i.rest) if kind in COLLECTIVES else 0
    if group < 2:
      continue
    given = sum(size_of.get(operand, 0) for operand in i.operands)
    # A start's result may hold its operand as well; the operand, times the group where it grows, is unambiguous.
    yield kind, group, {
        'all-gather': given * (group - 1), 'reduce-scatter': given * (group - 1) / group,
        'all-reduce': 2 * given * (group - 1) / group, 'all-to-all': given * (group - 1) / group,
        'ragged-all-to-all': size_of.get(i.operands[0], 0) * (group - 1) / group,
    }.get(kind, given)


def _group(rest) -> int:
  """Devices of a group: {{0,1},{2,3}}, [groups,size]<=[...], axes of a mesh, or pairs of a permutation (2)."""
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest):
    size_of = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    return math.prod(size_of[axis] for axis in re.findall(r"'(\w+)'", found[2]))
  if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', rest):
    return int(found[2])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
    return len(found[1].split(','))
  return 2 if 'source_target_pairs' in rest else 0


@dataclasses.dataclass(frozen=True)
class Work:
  """What one instruction does in a run of the program, all its turns together."""

  name: str  # where in the model it comes from: 'jit(train_step)/.../layer_0/mixer/dot_general'; '' if unknown
  kernel: bool  # of Pallas or a library; its FLOPs are those that it states, if any
  flops: float  # of its products
  bytes: float  # read from and written to memory


def work(computations, times) -> list[Work]:
  """Of whatever is no mere name for another.

  Bytes are operands and results; of an operand that is only sliced, the slices count, also within a fusion; of an array
  that is updated in place, the update. An upper bound: a result may stay in a faster memory.
  """
  done = []
  for name, factor in times.items():
    of_name = {i.name: i for i in computations[name]}
    size_of = {i.name: i.bytes for i in computations[name]}
    for i in computations[name]:
      if i.opcode in MOVES_NOTHING or i.opcode.endswith('-done') or i.opcode in ('async-start', 'async-update'):
        continue
      if DOES_NOTHING in i.rest:
        continue
      if i.opcode == 'fusion':
        moved = _fusion_traffic(i, size_of, computations)
      else:
        moved = _read(i, size_of) + _written(i, size_of)
      source = re.search(r'op_name="([^"]*)"', i.rest)
      done.append(Work(
          source[1] if source else '', bool(KERNELS.search(i.rest)), factor * _flops(i, of_name, computations),
          factor * moved,
      ))
  return done


def traffic(computations, times) -> float:
  """Bytes that one run reads from and writes to memory, at most."""
  return sum(done.bytes for done in work(computations, times))


def _flops(i, of_name, computations) -> float:
  """[m, k] times [k, n] takes 2 mkn, which is twice the root of the product of the three sizes."""
  if i.opcode == 'fusion':
    inside = _inside(i, computations)
    named = {j.name: j for j in inside}
    return sum(_flops(j, named, computations) for j in inside)
  if i.opcode in ('dot', 'convolution') or re.search(r'custom_call_target="[^"]*(gemm|matmul)', i.rest):
    left, right = (of_name[operand].elements if operand in of_name else 0 for operand in i.operands[:2])
    return 2 * math.sqrt(left * right * i.elements)
  stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.rest)
  return float(stated[1]) if stated else 0.0


def _read(i, size_of) -> float:
  if i.opcode in ('dynamic-slice', 'gather', 'slice'):
    return i.bytes
  if i.opcode == 'dynamic-update-slice':
    return size_of.get(i.operands[1], 0)
  return sum(size_of.get(operand, 0) for operand in dict.fromkeys(i.operands))  # several windows on an array


def _written(i, size_of) -> float:
  return size_of.get(i.operands[1], 0) if i.opcode == 'dynamic-update-slice' else i.bytes


def _fusion_traffic(fusion, size_of, computations) -> float:
  """Of each operand what its users inside read; of the result what the last instructions write."""
  inside = _inside(fusion, computations)
  if not inside:
    return sum(size_of.get(operand, 0) for operand in fusion.operands) + fusion.bytes
  inner = {i.name: i.bytes for i in inside}
  updates = [i for i in inside if i.opcode == 'dynamic-update-slice' and i.bytes >= 0.5 * fusion.bytes]
  written = sum(inner.get(i.operands[1], 0) for i in updates) if updates else fusion.bytes
  return sum(_part_read(i, inside, computations) for i in inside if i.opcode == 'parameter') + written


def _inside(fusion, computations):
  return computations.get((re.search(r'calls=%([\w.\-]+)', fusion.rest) or [None, None])[1], [])


def _part_read(array, inside, computations) -> float:
  """Bytes of a fusion's parameter, or of another name for it, that the instructions inside read: all of it, or slices,
  also within fusions of their own; none where it is only updated in place."""
  parts = 0.0
  for user in inside:
    for place, operand in enumerate(user.operands):
      if operand != array.name:
        continue
      if user.opcode in ('bitcast', 'reshape'):
        parts += _part_read(user, inside, computations)
      elif user.opcode == 'fusion':
        nested = _inside(user, computations)
        parts += sum(_part_read(i, nested, computations) for i in nested
                     if i.opcode == 'parameter' and int(i.rest.partition(')')[0]) == place)
      elif place == 0 and user.opcode in ('dynamic-slice', 'gather', 'slice'):
        parts += user.bytes
      elif place or user.opcode != 'dynamic-update-slice':
        return array.bytes
  return min(parts, array.bytes)
