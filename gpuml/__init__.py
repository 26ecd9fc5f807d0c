"Train in JupyterLab, run the same notebook on the GPU cluster: `%load_ext gpuml`"

__version__ = "0.1.0"


def load_ipython_extension(shell):
    "Register the magics; everything heavy waits for its first use"
    from gpuml.ui.magics import load

    load(shell)


def unload_ipython_extension(shell):
    "Take the magics and their completion away again"
    from gpuml.ui.magics import unload

    unload(shell)


def panel(notebook=None):
    "Train, submit, follow jobs and compare runs by mouse; `%gpuml` in a notebook"
    from gpuml.ui.magics import panel

    return panel(notebook)


def job(*words, resume=False, data=True):
    "A training of your own as a block that loses no work: `with gpuml.job() as job: …`; see the page ui/job"
    from gpuml.ui.job import job

    return job(*words, resume=resume, data=data)


def command():
    "The `gpuml` command; a signal while it still loads ends it at once: nothing has begun, and no import shows a traceback"
    import os
    import signal

    from gpuml.base.errors import Exit

    def stop(number, _):
        words = "interrupted" if number == signal.SIGINT else "stopped before anything was done"
        os.write(2, f"gpuml: {words}\n".encode())
        os._exit(Exit.INTERRUPTED)

    signal.signal(signal.SIGTERM, stop)  # first of all: Linux drops it where process 1 of a container has no handler
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in the background of a script
        signal.signal(signal.SIGINT, stop)
    from gpuml.ui.cli import main

    signal.signal(signal.SIGINT, before)
    code = main()
    if signal.getsignal(signal.SIGTERM) is stop:  # `gpuml run` ignores it by now: it has said how it ended
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code
