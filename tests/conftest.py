"""What holds for every test."""

import signal


def pytest_configure() -> None:
    """Gives Ctrl-C its usual effect, here and in every command that a test starts.

    A shell script starts its background jobs with SIGINT ignored, children inherit that, and Python then leaves it so:
    under such a script no test could interrupt anything.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
