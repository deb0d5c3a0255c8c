"""TensorBoard's files, written at once and by the process itself: PyTorch's own writer has a thread for it, in which a
full disk is a traceback that nobody waits for.
"""

import itertools
import os
import socket
import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from fbn_plugin.engine.files.disk import AppendedFile

__all__ = ["Board"]

_number = itertools.count()


class Board(SummaryWriter):
    """PyTorch's, of which each event is in the file, as a whole, when it has been added.

    Args:
        log_dir: folder of the file.
        purge_step: what TensorBoard is to forget from this step on; None is nothing.

    Raises:
        WriteError: the file cannot be written, in all that writes.
    """

    def __init__(self, log_dir: str, purge_step: int | None = None):
        super().__init__(log_dir, purge_step=purge_step)

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = _Files(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(session_log=start), self.purge_step)
        return self.file_writer


class _Files(FileWriter):
    """PyTorch's, onto a file of ours."""

    def __init__(self, log_dir: str):
        self.event_writer = _Events(log_dir)


class _Events:
    """In the place of TensorBoard's ``EventFileWriter``."""

    def __init__(self, folder: str):
        self._folder = folder
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._file = AppendedFile(os.path.join(folder, name))
        self._records = RecordWriter(self._file)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return self._folder

    def add_event(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self._file.close()
