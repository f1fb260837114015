"""`python -m launch.recipes --write`: writes every recipe's run.json from the table."""

from __future__ import annotations

import sys

from launch.recipes import RECIPES, path
from limoe_dist.config.parse import save_run


def main(argv: list[str]) -> int:
    if argv != ["--write"]:
        print("usage: python -m launch.recipes --write", file=sys.stderr)
        return 2
    for name, recipe in RECIPES.items():
        save_run(recipe.run(), path(name))
        print(path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
