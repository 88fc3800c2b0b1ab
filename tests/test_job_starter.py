"""A job that is a fork is as good as one in a fresh interpreter: the tests rely on it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.once


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
@pytest.mark.parametrize(("end", "status"), [("none", 0), ("number", 3), ("text", 1), ("raise", 1)])
def test_a_fork_is_told_and_ends_as_a_fresh_interpreter(application, end, status):
    """Its words, folder and environment; the processes that it starts; its threads, exit functions and destructors."""
    program = application("interpreter")
    fork = program(end, outputs=False, status=status)
    fresh = program(end, outputs=False, status=status, python=sys.executable)
    assert sorted(fork.out.splitlines()) == sorted(fresh.out.splitlines())
    assert {"THREAD", "AT EXIT", "DESTRUCTOR", "PROCESS __mp_main__"} < set(fork.out.splitlines())
    assert fork.err.splitlines()[-1:] == fresh.err.splitlines()[-1:]


def test_the_log_of_a_fork(application):
    """The policy's lines and the job's config, of a job that runs and of one that stops."""
    train = application("train")
    for words, status in ((["+precision_policy=on"], 0), (["+precision_policy=strict", "model.torch_dtype=bfloat16"], 1)):
        fork, fresh = train(*words, status=status), train(*words, status=status, python=sys.executable)
        assert fork.log
        assert (fork.log, fork.configs, fork.err) == (fresh.log, fresh.configs, fresh.err)


def test_a_job_that_hangs(application):
    """It is killed, and the next one runs."""
    program = application("interpreter")
    with pytest.raises(subprocess.TimeoutExpired):
        program("wait", outputs=False, timeout=5)
    assert "TOLD" in program("none", outputs=False).out
