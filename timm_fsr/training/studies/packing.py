"""An archive of results, in parts that can be carried one by one."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from timm_fsr.training.studies.study import say
from timm_fsr.utils.files import write_text

NOT_PACKED = ("checkpoints", "last", "pack", "run.lock")


class SplitFile:
    """A file to write to that is a row of files of at most `size` bytes each."""

    def __init__(self, folder: Path, stem: str, size: int) -> None:
        self.folder, self.stem, self.size = folder, stem, size
        self.digests: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._left = 0

    def write(self, data: bytes) -> int:
        """Write all of `data`, beginning new files where one is full."""
        view = memoryview(data)
        while view:
            if self._left == 0:
                self.close()
                self._file, self._left = (self.folder / f"{self.stem}.{len(self.digests):04d}").open("wb"), self.size
                self.digests[Path(self._file.name).name] = ""
            assert self._file is not None
            taken = view[: self._left]
            self._file.write(taken)
            self._left -= len(taken)
            view = view[len(taken) :]
        return len(data)

    def close(self) -> None:
        """Finish the file that is written to, and note its checksum."""
        if self._file is not None:
            self._file.close()
            path = Path(self._file.name)
            self.digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            self._file = None


def pack(output: Path, size: float) -> None:
    """Put everything but what runs resume from into an archive, in parts, with their checksums.

    Args:
        output: folder of the results; its folder "pack" is made again.
        size: of a part at most, in MiB.
    """
    folder = output / "pack"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        name = Path(info.name).name
        return None if name in NOT_PACKED or name.startswith(".writing-") else info

    parts: Any = SplitFile(folder, "results.tar", int(size * 2**20))
    with tarfile.open(fileobj=parts, mode="w|") as archive:
        archive.add(output, arcname="results", filter=wanted)
    parts.close()
    write_text(folder / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in parts.digests.items()))
    say(f"{len(parts.digests)} part(s) in {folder}")
