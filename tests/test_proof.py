"""What is made of a compiled program's instructions."""

import pytest

from mmx import hlo, proof

ELSEWHERE = hlo.Work('', kernel=False, flops=30, bytes=1)
EXPERTS = hlo.Work('', kernel=True, flops=100, bytes=1)
SILENT = hlo.Work('', kernel=True, flops=0, bytes=1)


@pytest.mark.parametrize('work, model_flops, each', [
    ([ELSEWHERE, EXPERTS, SILENT, SILENT], 90, 5),  # 30 + 100 / 2 are stated: the two share what attention needs
    ([ELSEWHERE, SILENT, SILENT], 90, 30),  # as on GPU: what the model needs is done by somebody
])
def test_kernels_that_state_no_work_do_what_attention_needs_and_what_the_model_has_left(work, model_flops, each):
  done = proof.executed(work, fill=0.5, mixing_flops=10, model_flops=model_flops)
  assert [w.flops for w in done if w.bytes and w.kernel][-2:] == [each, each]
  assert sum(w.flops for w in done) >= model_flops
