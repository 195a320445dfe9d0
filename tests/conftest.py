"""What holds for every test."""

import signal

import pytest


@pytest.fixture(autouse=True)
def usual_signals() -> None:
    """Ctrl-C and a hangup have their usual effects, here and in every command that a test starts.

    A shell script starts its background jobs with SIGINT ignored, and nohup ignores SIGHUP; children inherit that, and
    Python then leaves it so. Ray Tune leaves handlers of its own behind in a process where it has run.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
