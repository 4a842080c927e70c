"""``python -m fusedopt env``: what a bug report needs."""

import argparse
import json

from fusedopt._env import env


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedopt")
    parser.add_argument("command", choices=["env"], help="print versions, backends and hardware")
    parser.parse_args()
    print(json.dumps(env(), indent=2))


if __name__ == "__main__":
    main()
