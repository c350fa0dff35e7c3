"""`whimbrel` and `python -m whimbrel`: the one place that may know both the agent and the controller."""

from __future__ import annotations

import sys

from whimbrel import __version__
from whimbrel.terminal import CommandError, ExitCode, missing_extra


def main() -> None:
    """Runs the command line of `sys.argv`; always ends in SystemExit with a code of `ExitCode`."""
    if sys.argv[1:] in (["--version"], ["-V"]):  # must work without any extra
        print(f"whimbrel {__version__}")
        return
    try:
        from whimbrel.agent.cli import app as agent_app
        from whimbrel.agent.doctor.cleaning import more_finders
        from whimbrel.controller.cli.app import app
        from whimbrel.controller.demo.abandoned import find_abandoned

        more_finders.append(find_abandoned)
        app.add_typer(agent_app)
        app()
    except CommandError as error:
        error.report(as_json=_json_wanted())
        sys.exit(error.code)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("whimbrel"):
            raise
        absent = missing_extra(error.name or str(error))
        absent.report(as_json=_json_wanted())
        sys.exit(absent.code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `whimbrel events | head`
        sys.stderr.close()
        sys.exit(ExitCode.OK)


def _json_wanted() -> bool:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return "--json" in own


if __name__ == "__main__":
    main()
