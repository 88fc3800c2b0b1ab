"""Prints what an interpreter tells a program; as its word says, it then ends in one of several ways."""

import atexit
import json
import multiprocessing
import os
import sys
import threading
import time


def work():
    print("PROCESS", __name__, flush=True)


class Made:
    def __del__(self):
        print("DESTRUCTOR", flush=True)


if __name__ == "__main__":
    told = {
        "file": __file__,
        "main": sys.modules["__main__"].__file__,
        "arguments": sys.argv,
        "path": sys.path[0],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "input": sys.stdin.read(),
        "threads": len(os.listdir("/proc/self/task")),
    }
    print("TOLD", json.dumps(told))
    atexit.register(lambda: print("AT EXIT"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("THREAD"))).start()
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
    made = Made()
    made.itself = made
    if sys.argv[1] == "raise":
        raise ValueError("the application's own")
    if sys.argv[1] == "wait":
        time.sleep(60)
    sys.exit({"none": None, "number": 3, "text": "a reason"}[sys.argv[1]])
