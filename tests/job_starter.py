"""Starts applications as processes of their own, without importing torch and Hydra anew for each: 2 seconds become 0.1.

Run as a program, it imports what nearly every test needs, then forks for each job that a line on its standard input asks for.
Nothing of this project is imported before the fork, and Hydra has not discovered its plugins by then.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback


class JobStarter:
    """The other end of this program's pipes.

    Args:
        environment: of the program; each job brings its own.
    """

    def __init__(self, environment):
        self._program = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, program, arguments, folder, environment, timeout):
        """Run a program in a folder; its exit status, as ``subprocess`` gives it."""
        job = {
            "program": program,
            "arguments": arguments,
            "folder": str(folder),
            "environment": environment,
            "timeout": timeout,
        }
        self._program.stdin.write(json.dumps(job) + "\n")
        self._program.stdin.flush()
        status = json.loads(self._program.stdout.readline())
        if status is None:
            raise subprocess.TimeoutExpired([program, *arguments], timeout)
        return status

    def close(self):
        """End the program."""
        self._program.stdin.close()
        self._program.wait()


def wait_for(child, timeout):
    """The exit status of a child, or None where it had to be killed."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def become(job):
    """Be the job: what an interpreter does that was started with the program's name."""
    os.setsid()
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, name in ((0, os.devnull), (1, ".stdout"), (2, ".stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags, 0o644), number)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = [job["program"], *job["arguments"]]
    sys.path[0] = job["folder"]
    sys.path[1:1] = [part for part in job["environment"].get("PYTHONPATH", "").split(os.pathsep) if part]
    status = 0
    try:
        runpy.run_path(job["program"], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    return status


def main():
    import hydra  # noqa: F401 - imported for the jobs
    import torch  # noqa: F401 - as above

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.exit(become(job))
        answers.write(json.dumps(wait_for(child, job["timeout"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
