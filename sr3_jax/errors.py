"""The exception for all errors that the user can fix."""


class UserError(ValueError):
    """Invalid input: one sentence that names the field or file, its value and the fix.

    The command line prints the sentence without a traceback and exits with `exit_code`.
    """

    exit_code = 2
