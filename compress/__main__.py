"""The way into the command line: it watches for signals before anything heavy is imported."""

from typing import NoReturn

from compress.system.interrupts import end_interrupted, received, watch


def main() -> NoReturn:
    """Run the command line (`compress.cli.main`). A signal is answered by one sentence, whenever it comes."""
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
