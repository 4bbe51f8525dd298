"""`python -m tests.benchmarks.job DEVICE NAME '{"key": value}'`: its last line is a JSON document."""

import json
import sys
from typing import Any

from tests.benchmarks import files


def main(device: str, name: str, arguments: dict[str, Any]) -> None:
    if name in ("compare", "write"):
        result = getattr(files, name)(**arguments)
    else:
        from tests.benchmarks import worker

        result = worker.perform(name, arguments, device)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
