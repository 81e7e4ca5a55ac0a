"""``isthmus doctor``."""

from __future__ import annotations

import typer

from isthmus.commands.shell import USAGE, show, state


def doctor() -> None:
    """Check what this machine has, and say how to mend what is missing.

    Examples:
      $ isthmus doctor
      $ isthmus doctor --json
    """
    from isthmus.doctor import examine, print_checks

    checks = examine()
    show_as_table = not state.json
    if show_as_table:
        print_checks(checks)
    else:
        show({"ok": all(c.level != "fault" for c in checks), "checks": checks})
    if any(c.level == "fault" for c in checks):
        raise typer.Exit(USAGE)
