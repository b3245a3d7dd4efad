"""Known vulnerabilities of the pinned packages, by pip-audit, as a report: `make audit`. Always exits with 0.

pip-audit asks the package index's database. What it does not tell of (no network, a mirror without it) is counted.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
#: `pip-audit` with nothing installed or resolved: the pins are what is asked for.
OPTIONS = ["--requirement", str(PINS), "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]


def report(answer: str) -> list[str]:
    """Lines on the JSON that pip-audit prints."""
    packages = json.loads(answer)["dependencies"]
    known = [package for package in packages if "vulns" in package]
    lines = [f"pip-audit: {len(known)} of {len(packages)} pinned packages are in the database that was asked"]
    for package in known:
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version yet"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    return lines


if __name__ == "__main__":
    try:
        done = subprocess.run([sys.argv[1], *OPTIONS], capture_output=True, text=True, timeout=300)
        print(*report(done.stdout), sep="\n")
    except (OSError, ValueError, subprocess.TimeoutExpired) as problem:
        print(f"pip-audit gave no report: {problem}")
