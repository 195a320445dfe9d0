"""What holds for every test."""

import signal


def pytest_configure() -> None:
    """Gives Ctrl-C and a hangup their usual effects, here and in every command that a test starts.

    A shell script starts its background jobs with SIGINT ignored, and nohup ignores SIGHUP; children inherit that, and
    Python then leaves it so: no test could interrupt anything.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
