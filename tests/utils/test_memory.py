"""What glibc does with freed memory, seen from outside: by page faults."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from nvit.utils.memory import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory({keep})
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # glibc puts some blocks aside before it uses one again
    torch.ones(12 * 2**20)
before = faults()
for _ in range(10):
    torch.ones(12 * 2**20)
print((faults() - before) * resource.getpagesize() / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc")
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept_is_not_faulted_in_again_however_large(keep):
    """Ten times 48 MiB, more than what glibc takes as a threshold for mapping blocks on their own."""
    ran = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    again = float(ran.stdout)
    assert again < 48 if keep else (again > 240 or _huge_pages())


def _huge_pages() -> bool:
    """Whether one fault brings in more than a page."""
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as said:
        return "[always]" in said.read()
