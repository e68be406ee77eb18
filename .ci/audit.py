"""Known vulnerabilities of the installed packages, by pip-audit.

Exit code 1 where there are any. A database that cannot be reached, or does not know a package, is said and is
no failure: the machine that runs this may have no way there.
"""

import json
import subprocess
import sys

_SECONDS = 180


def main() -> int:
    """Prints what was found."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--format",
        "json",
        "--skip-editable",
        "--progress-spinner",
        "off",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"audit: not made, the database did not answer in {_SECONDS} seconds")
        return 0
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        print(f"audit: not made, the database could not be reached: {done.stderr.strip()[-300:]}")
        return 0
    looked_up = [package for package in packages if "skip_reason" not in package]
    print(f"audit: {len(looked_up)} of {len(packages)} packages could be looked up")
    faults = [(package, fault) for package in looked_up for fault in package["vulns"]]
    for package, fault in faults:
        mended = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"  {package['name']} {package['version']}: {fault['id']}, mended in {mended}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
