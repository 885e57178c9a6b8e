"""`python -m tests.golden [--accept]`: see the package."""

from __future__ import annotations

import json
import sys

from tests import golden


def main() -> None:
    runs = {name: golden.computed(name) for name in golden.NAMES}
    if "--accept" in sys.argv:
        golden.FILE.write_text(json.dumps({"machine": golden.machine(), "runs": runs}, indent=1) + "\n")
        return
    record = golden.recorded()
    same = record["machine"] == golden.machine()
    lines = [line for name in runs for line in golden.differences(name, runs[name], record["runs"][name], same)]
    sys.exit("\n".join(lines) or 0)


if __name__ == "__main__":
    main()
