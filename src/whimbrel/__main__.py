"""`whimbrel` and `python -m whimbrel`: the one place that may know both the agent and the controller."""

from __future__ import annotations


def main() -> None:
    from whimbrel.agent.cli import app as agent_app
    from whimbrel.controller.cli.app import app

    app.add_typer(agent_app)
    app()


if __name__ == "__main__":
    main()
