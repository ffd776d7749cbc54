"""What holds for all tests."""

import signal

# a shell starts background jobs with SIGINT ignored, and that is inherited: tests send it as a terminal does
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
