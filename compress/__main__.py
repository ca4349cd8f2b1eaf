"""The way into the command line: it watches for signals before anything else is imported."""

TYPE_CHECKING = False  # typing takes a while to import
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> "NoReturn":
    """Run the command line (`compress.cli.main`). A signal is answered by one sentence, whenever it comes."""
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # they wait for `watch`
    from compress.system.interrupts import end_interrupted, received, watch

    try:
        watch()
        from compress.cli import main as run

        run()
    except SystemExit:
        raise
    except BaseException:
        if received() is None:
            raise
        end_interrupted()


if __name__ == "__main__":
    main()
