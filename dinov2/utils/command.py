"""The end of a command after a mistake of its user: one line with the reason, and an exit code."""

import logging
from collections.abc import Callable

logger = logging.getLogger("dinov2")

USER_ERRORS = (FileNotFoundError, KeyError, ValueError, PermissionError, NotADirectoryError, ConnectionError)

# Exit code of a run that was asked to stop and wrote a checkpoint: the same command resumes it (EX_TEMPFAIL)
REQUEUE_EXIT_CODE = 75


def text_of(error: BaseException) -> str:
    """Return an error's message; KeyError would put it in quotes."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`; 0, or 2 after a mistake that its message explains."""
    try:
        command()
    except USER_ERRORS as error:
        logger.error("%s", text_of(error))
        logger.debug("where it was noticed", exc_info=True)
        return 2
    return 0
