"""A plugin of pytest that tells of a failure when it happens: a run that is cut off has told of all until then."""

from __future__ import annotations

import sys

LINES = 15
"""Of a failure, from its end: where it came from, and what it says."""


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        end = "\n".join(report.longreprtext.splitlines()[-LINES:])
        print(f"\nFAILED {report.nodeid} ({report.when})\n{end}", file=sys.stderr, flush=True)
