"""Prints the lowest versions that setup.cfg allows, as pip's requirements: numpy==2.0 for numpy>=2.0.

Linters and the type checker are left out: they judge the code, and nobody runs qrun with them.
"""

import configparser
import re
from pathlib import Path

NOT_RUN = ("ruff", "mypy")


def lowest(text: str) -> list[str]:
    """The requirements of an install and of its tests, each at its lower bound."""
    config = configparser.ConfigParser()
    config.read_string(text)
    lines = config["options"]["install_requires"] + "\n" + config["options.extras_require"]["test"]
    found = {}
    for line in lines.splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement:
            continue
        match = re.fullmatch(r"([\w-]+)>=([\w.]+)((?:\s*;.*)?)", requirement)
        if match is None:
            raise SystemExit(f"setup.cfg: {requirement} has no lower bound")
        if match[1] not in NOT_RUN:
            found[match[1]] = f"{match[1]}=={match[2]}{match[3]}"
    return list(found.values())


if __name__ == "__main__":
    print("\n".join(lowest((Path(__file__).parents[1] / "setup.cfg").read_text("utf-8"))))
