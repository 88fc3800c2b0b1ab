"""Starts applications as processes of their own, without importing torch and Hydra anew for each: 5 seconds become half a one.

Run as a program with the names of modules, it imports them, then forks for each job that a line on its standard input asks for.
A fork is as good as a fresh interpreter for what is tested: nothing of this project is imported before it, Hydra has not
discovered its plugins by then, torch has computed nothing, and there is no thread that a fork would lose.
"""

import atexit
import gc
import importlib
import importlib.util
import json
import multiprocessing.process
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path


class JobStarter:
    """The other end of this program's pipes; the program starts with the first job.

    Args:
        imports: the names of the modules that the program imports for its jobs; those that are not installed are left out.
        environment: of the program; each job brings its own.
    """

    def __init__(self, imports, environment):
        self._imports = imports
        self._environment = environment
        self._program = None

    def run(self, program, arguments, folder, environments, timeout):
        """Run a program in a folder, one process for each environment, all at once.

        Their exit statuses, as ``subprocess`` gives them. What process N wrote is in ``.stdout.N`` and ``.stderr.N``.
        """
        if self._program is None:
            command = [sys.executable, __file__, *self._imports]
            pipe = subprocess.PIPE
            self._program = subprocess.Popen(command, env=self._environment, stdin=pipe, stdout=pipe, text=True)
        job = {
            "program": str(program),
            "arguments": arguments,
            "folder": str(folder),
            "environments": environments,
            "timeout": timeout,
        }
        self._program.stdin.write(json.dumps(job) + "\n")
        self._program.stdin.flush()
        statuses = json.loads(self._program.stdout.readline())
        if None in statuses:
            raise subprocess.TimeoutExpired([program, *arguments], timeout)
        return statuses

    def close(self):
        """End the program."""
        if self._program is not None:
            self._program.stdin.close()
            self._program.wait()


def wait_for(child, end):
    """The exit status of a child, or None where it had to be killed because the time had come."""
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_as_main(path):
    """Run a file as the module ``__main__``, so that processes which the job starts find it as well."""
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()
    main_module = types.ModuleType("__main__")
    main_module.__file__ = str(path)
    sys.modules["__main__"] = main_module
    exec(compile(path.read_bytes(), path, "exec"), main_module.__dict__)


def become(job, number):
    """Be one process of the job: what an interpreter does that was started with the program's name."""
    environment = job["environments"][number]
    os.setsid()
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(environment)
    written = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(f".stdout.{number}", written, 0o644), 1)
    os.dup2(os.open(f".stderr.{number}", written, 0o644), 2)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = [job["program"], *job["arguments"]]
    sys.path[0] = str(Path(job["folder"], job["program"]).parent)
    sys.path[1:1] = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    status = 0
    try:
        run_as_main(Path(job["folder"], job["program"]))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    return status


def finish(status):
    """End this process as an interpreter ends, but for taking down all other modules: that costs more than most jobs."""
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    del sys.modules["__main__"]
    gc.collect()  # what the application has made goes now, by its destructors
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def fork(job):
    """Start the processes of a job; their numbers in the system."""
    children = []
    for number in range(len(job["environments"])):
        child = os.fork()
        if child == 0:
            finish(become(job, number))
        children.append(child)
    return children


def main():
    for name in sys.argv[1:]:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    threads = Path("/proc/self/task")
    if threads.exists():  # on Linux
        assert len(list(threads.iterdir())) == 1, "a fork would lose the threads that an import has started"
    gc.freeze()  # a job that collects garbage goes over its own objects alone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        children = fork(job)
        end = time.monotonic() + job["timeout"]
        statuses = [wait_for(child, end) for child in children]
        answers.write(json.dumps(statuses) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
