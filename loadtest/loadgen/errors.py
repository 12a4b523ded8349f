"""What is wrong with what a load test was given. All are ValueErrors whose message is meant for the one who typed it.

LoadTestError
├── ProfileError     a profile's field
├── TraceError       a trace's line and field
├── ThresholdError   a --fail-if
└── TargetError      the server: none answers, or it does not serve what is to be asked
"""

from __future__ import annotations


class LoadTestError(ValueError):
    """Nothing was measured."""


class ProfileError(LoadTestError):
    pass


class TraceError(LoadTestError):
    pass


class ThresholdError(LoadTestError):
    pass


class TargetError(LoadTestError):
    pass
