"""Print the lowest version that setup.cfg allows of each requirement, as constraints for pip."""

import configparser
import re
from pathlib import Path

SETUP = Path(__file__).parents[2] / "setup.cfg"


def requirements() -> list[str]:
    """List the requirements of the package and of all its extras."""
    config = configparser.ConfigParser()
    config.read(SETUP)
    extras = config["options.extras_require"].values()
    lines = "\n".join([config["options"]["install_requires"], *extras]).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def floor(requirement: str) -> str:
    """Turn `name>=1.2,<3` into `name==1.2`."""
    return re.sub(r">=([^,]+).*", r"==\1", requirement)


if __name__ == "__main__":
    print("\n".join(map(floor, requirements())))
