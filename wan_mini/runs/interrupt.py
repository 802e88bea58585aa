"""Ctrl-C while a program's imports take their second: an end without a traceback. Imports nothing that takes long."""

import signal


def end_quietly() -> None:
    """Let Ctrl-C end this process at once, until cli.run takes the signal over; one that is ignored stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
