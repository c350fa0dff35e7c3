"""The shell around the core: everything of the controller that touches the bus, the clock and the KV."""

from whimbrel.controller.runtime.controller import run_controller

__all__ = ["run_controller"]
