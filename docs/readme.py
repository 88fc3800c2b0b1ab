"""Check that every transcript in README.md is what its command prints today, or write it anew with ``--write``.

Each stands in a code block after ``<!-- transcript: NAME -->``. Times, sizes in bytes and losses may differ.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/finetune"
WORK = ROOT / ".demo"
INSIST = ["+precision_policy=on", "model.dtype=bfloat16"]


def output(*command: str) -> str:
    """What a command of the example prints."""
    finished = subprocess.run([sys.executable, *command], cwd=EXAMPLE, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.stdout + finished.stderr)
    return finished.stdout


def records(log: str) -> list[str]:
    """The policy's log records, with their further lines."""
    found: list[str] = []
    ours = False
    for line in log.splitlines():
        ours = "[precision_policy][" in line or (ours and line.startswith("  ") and not line.startswith("  ["))
        if ours and "[precision_policy][" in line:
            found.append(line.strip())
        elif ours:
            found[-1] += "\n" + line
    return found


def transcripts() -> dict[str, str]:
    """The blocks by name."""
    demo = output("demo.py", str(WORK))
    table = demo[demo.rindex("\n\n") + 2 :].rstrip()
    mixed = records(demo)[-2:]
    arguments = [f"checkpoint={WORK}/checkpoint", f"save_to={WORK}/insists", "steps=2", f"hydra.run.dir={WORK}/insists-job"]
    warning = [record for record in records(output("train.py", *INSIST, *arguments)) if "][WARNING]" in record]
    commands = [
        "$ pip install hydra-precision-policy       # from a checkout: pip install .",
        "$ python train.py +precision_policy=mixed  # any Hydra application, unchanged",
    ]
    return {
        "mixed": "\n".join([*commands, *mixed]),
        "demo": table,
        "insists": "\n".join([f"$ python train.py {' '.join(INSIST)}", *warning]),
    }


def without_what_may_differ(text: str) -> str:
    """The text with its times, sizes and losses replaced by words."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME", text)
    text = re.sub(r"[\d.]+ [KMG]?i?B\b", "SIZE", text)
    return re.sub(r"\b\d\.\d{4}\b", "LOSS", text)


def main() -> None:
    """Check, or write."""
    readme = (ROOT / "README.md").read_text()
    stale = []
    for name, text in transcripts().items():
        block = re.compile(rf"(<!-- transcript: {name} -->\n```\w+\n)(.*?)(\n```)", re.DOTALL)
        found = block.search(readme)
        if found is None:
            sys.exit(f"README.md has no block for the transcript {name}")
        if without_what_may_differ(found[2]) != without_what_may_differ(text):
            stale.append(f"--- README.md, {name}\n{found[2]}\n--- today\n{text}")
        readme = readme[: found.start(2)] + text + readme[found.end(2) :]
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(readme)
    elif stale:
        sys.exit("\n".join([*stale, "stale: make readme-write"]))
    print("README.md: every transcript is what its command prints")


if __name__ == "__main__":
    main()
