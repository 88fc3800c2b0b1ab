"""Imports no torch, and starts processes that do not either."""

import multiprocessing
import sys

import hydra


def work(method):
    print(method, "torch" in sys.modules, flush=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print("job", "torch" in sys.modules, flush=True)
    for method in ("spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=work, args=(method,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
