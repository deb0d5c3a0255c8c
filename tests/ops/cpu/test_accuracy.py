"""The C++ kernels on inputs that cost sums their digits: never worse than twice plain PyTorch in the same precision."""

import pytest
from hypothesis import given, settings
from oracle import check_as_exact_as_plain, examples, hard_inputs

from fbn_plugin.ops import cpu

pytestmark = pytest.mark.skipif(isinstance(cpu.library(), str), reason=f"no C++ kernels here: {cpu.library()}")


@settings(max_examples=examples(200), deadline=None, derandomize=True)
@given(hard_inputs())
def test_never_worse_than_twice_plain_pytorch(hard):
    check_as_exact_as_plain(cpu, hard)
