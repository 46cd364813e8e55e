"""The command line: one subcommand, one file. A command's own imports are made when it is called."""

import sys

from veneer.cli.lines import speaks
from veneer.core.errors import AdapterError


def main() -> None:
    """`veneer …`: exit code 0 on success, 2 for the user's mistakes (without a traceback), 130 on Ctrl-C."""
    try:
        from veneer.cli.app import app
    except ImportError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"error: the command line needs: pip install 'veneer[train]' ({error})")
    debug = "--debug" in sys.argv
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except AdapterError as error:
        if debug:
            raise
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug:
            raise
        print(f"error: {error.filename or sys.argv[1]}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            print("interrupted; what is there is whole", file=sys.stderr)
        raise
