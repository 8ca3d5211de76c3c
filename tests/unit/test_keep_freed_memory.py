"""glibc keeps what tensors free: a step that repeats causes few page faults."""

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
import torch
from distill.resources import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
scores = torch.randn(9, 1024, 1024, dtype=torch.bfloat16).requires_grad_()

def step():
    scores.softmax(-1, dtype=torch.float32).square().sum().backward()

for _ in range(6):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(setting: str) -> int:
    command = [sys.executable, "-c", CHILD, setting]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_repeated_step_causes_few_page_faults() -> None:
    assert faults("keep") < 0.2 * faults("leave")
