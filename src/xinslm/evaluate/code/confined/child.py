"""Runs one program and reports how it ended: the text that the sandbox gives to `python -c`.

Arguments: two pipe descriptors and the program's file. The report's first line is "started". The
second is what the first pipe contains if the program ran to its end, else a class and a message.
That text is read only after the program's last statement, so it is not in memory before.
"""

import os
import sys

_MESSAGE_CHARACTERS = 300


def _describe(error: BaseException, path: str, source: bytes) -> str:
    """Name the exception, its text, and the program's last line that it passed."""
    text = type(error).__name__
    number = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            number = trace.tb_lineno
        trace = trace.tb_next
    try:
        text += f": {str(error)[:_MESSAGE_CHARACTERS]}" if str(error) else ""
        lines = source.decode("utf-8", "replace").splitlines()
        if number and number <= len(lines):
            text += f" (line {number}: {lines[number - 1].strip()[:_MESSAGE_CHARACTERS]})"
    except BaseException:  # a program's own exception may fail to describe itself
        return text
    return text


def _run(token: int, report: int, path: str) -> None:
    read, write, leave, identify = os.read, os.write, os._exit, os.getpid
    this_process = identify()
    with open(path, "rb") as file:
        source = file.read()
    main = type(sys)("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    sys.argv[:] = [path]
    write(report, b"started\n")
    memory = b"memory\nMemoryError"
    try:
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)
        message = None
    except SystemExit as stop:
        message = f"exited\nSystemExit with code {stop.code!r}"[:_MESSAGE_CHARACTERS].encode()
    except MemoryError:
        message = memory
    except BaseException as error:
        message = f"failed\n{_describe(error, path, source)}".encode("utf-8", "replace")
    if identify() != this_process:  # a copy made by os.fork does not speak for the program
        leave(0)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # closed or replaced by the program
        pass
    write(report, read(token, 64) if message is None else message)
    leave(0)


_run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
