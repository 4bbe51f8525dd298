"""The hall: model + data + options -> plan -> blocks -> file. The only place where the rooms meet."""

from typing import Any

Document = dict[str, Any]
"""What `--json` prints."""
