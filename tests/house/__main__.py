"""`python -m tests.house`: the rooms, their floors and imports, and what is wrong with them."""

import sys

from tests.house import rooms

if __name__ == "__main__":
    print(rooms.table())
    wrong = [text for module in rooms.MODULES for text in rooms.violations(module)]
    wrong += ["a circle: " + " → ".join(circle) for circle in rooms.circles()]
    print("\n".join(["", *wrong, f"{len(wrong)} violations"]))
    sys.exit(bool(wrong))
