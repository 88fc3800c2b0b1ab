"""Run the commands of README.md and check that they print what it shows, or write that anew with ``--write``.

A transcript is a code block after ``<!-- transcript: FOLDER, PART -->``. Its lines that begin with "$ " are run in that folder
of the checkout, as they stand; below each stands a part of what it prints: ``all`` of it, the ``log`` records of the policy, or
the ``last`` paragraph. Times, sizes, losses and speeds may differ, and percentages by two points.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- transcript: (?P<folder>[\w/.]+), (?P<part>\w+) -->\n```\w*\n(?P<text>.*?)\n```", re.DOTALL)
PERCENTAGE = re.compile(r"\d+(?:\.\d+)?(?= ?%)")
POINTS = 2.0
MAY_DIFFER = [
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"), "TIME"),
    (re.compile(r"\d+(?:\.\d+)? [KMG]?i?B\b"), "SIZE"),
    (re.compile(r"\b\d\.\d{4}\b"), "LOSS"),
    (re.compile(r" +"), " "),
]


def run(command: str, folder: str) -> str:
    """What a command prints, by the interpreter that runs this script."""
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    finished = subprocess.run(
        command, shell=True, cwd=ROOT / folder, env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        sys.exit(f"$ {command}\n{finished.stdout}{finished.stderr}")
    return finished.stdout


def records_of_the_policy(output: str) -> str:
    """The policy's log records, each with its further lines; a record begins with a bracket."""
    kept: list[str] = []
    ours = False
    for line in output.splitlines():
        if line.startswith("["):
            ours = "[precision_policy][" in line
        if ours:
            kept.append(line)
    return "\n".join(kept)


def choose(part: str, output: str) -> str:
    """The part of an output that README shows."""
    if part == "log":
        return records_of_the_policy(output)
    if part == "last":
        return output.rstrip().rpartition("\n\n")[2]
    return output.rstrip()


def transcript(text: str, folder: str, part: str) -> str:
    """The block as it would be written today."""
    parts: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            printed = choose(part, run(line.removeprefix("$ "), folder))
            parts.append(f"{line}\n{printed}")
    return "\n".join(parts)


def without_what_may_differ(text: str) -> str:
    """The text with times, sizes, losses and percentages replaced by words, and single spaces."""
    for pattern, word in MAY_DIFFER:
        text = pattern.sub(word, text)
    return PERCENTAGE.sub("PERCENTAGE", text)


def is_alike(shown: str, today: str) -> bool:
    """Whether two transcripts say the same, on two machines."""
    if without_what_may_differ(shown) != without_what_may_differ(today):
        return False
    pairs = zip(PERCENTAGE.findall(shown), PERCENTAGE.findall(today), strict=True)
    return all(abs(float(before) - float(now)) <= POINTS for before, now in pairs)


def main() -> None:
    """Check, or write."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(readme))
    if not blocks or len(blocks) != readme.count("<!-- transcript:"):
        sys.exit("README.md: a transcript is not followed by a code block")
    stale = []
    for block in reversed(blocks):  # from the last to the first: what is written moves only what lies behind it
        shown = block["text"]
        today = transcript(shown, block["folder"], block["part"])
        if not is_alike(shown, today):
            stale.append(f"--- README.md\n{shown}\n--- today\n{today}")
        readme = readme[: block.start("text")] + today + readme[block.end("text") :]
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(readme, encoding="utf-8")
    elif stale:
        sys.exit("\n".join([*stale, "stale: make readme-write"]))
    print(f"README.md: {len(blocks)} transcripts are what their commands print")


if __name__ == "__main__":
    main()
