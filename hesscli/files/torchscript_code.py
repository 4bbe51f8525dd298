"""Whether a TorchScript file would touch other files.

TorchScript's interpreter knows no Python modules. But of PyTorch's operators some open files by name, for reading or
writing, and a model can call them when it is loaded or run.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from hesscli.errors import FileError
from hesscli.files.zip_files import read

# Every operator that takes the name of a file. As words anywhere, for there is more than one way to name an operator.
_FILES = re.compile(rb"\b(from_file|save|load_tensor)\b")


def refuse_files(path: Path, hint: str) -> None:
    """Looks at all the code in the archive before any of it is run.

    Raises:
        FileError: there is an operator that opens files.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".py"):
                continue
            if found := _FILES.search(read(archive, member)):
                raise FileError(
                    f"{path}: TorchScript that opens other files ({found[1].decode()})", hint
                )
