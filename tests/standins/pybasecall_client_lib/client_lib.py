"""`BasecallClient` with the published names and codes, talking to the stand-in server over a Unix socket."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from contextlib import suppress
from enum import IntEnum
from multiprocessing.connection import Client
from typing import Any

import numpy as np

SOFTWARE, PROTOCOL = (7, 13, 6), (26, 0, 0)
_RESULTS = (
    "success no_connection already_connected not_ready timed_out invalid_response basecall_config_unavailable "
    "barcode_kit_unavailable align_index_unavailable bed_file_unavailable file_load_timeout failed bad_request "
    "bad_reply invalid_aligner_options"
)
_PASSED = "read_accepted not_accepting_reads queue_full bad_read"
_STATES = (
    "disconnected preparing_connection loading_config loading_alignment_index loading_bed_file connecting connected "
    "error_state"
)
_PARAMETERS = {
    str: "client_name align_ref bed_file poly_a_config",
    int: "query_timeout server_file_load_timeout pass_read_timeout connection_timeout reconnect_timeout "
    "max_message_size max_reads_queued max_server_read_failures chunk_size",
    bool: "move_enabled require_barcodes_both_ends enable_trim_barcodes trim_adapters trim_primers pair_by_channel "
    "estimate_poly_a",
    list: "barcode_kits barcode_list",
}


def _codes(name: str, members: str) -> Any:
    return IntEnum(name, [(member, number) for number, member in enumerate(members.split())])


def _ask(address: str, milliseconds: int, *question: Any) -> tuple[Any, Any]:
    """Ask the server on a connection of its own; as often as the real library does."""
    for _ in range(4):
        answer, code = _ask_once(address, milliseconds, *question)
        if code == BasecallClient.success:
            break
    return answer, code


def _ask_once(address: str, milliseconds: int, *question: Any) -> tuple[Any, Any]:
    answer: queue.Queue[Any] = queue.Queue()

    def talk() -> None:
        try:
            with Client(address.removeprefix("ipc://"), "AF_UNIX") as link:
                link.send(question)
                answer.put(link.recv())
        except (OSError, EOFError, ValueError):
            pass  # nobody there: the asker's time runs out, as with the real library

    threading.Thread(target=talk, daemon=True).start()
    try:
        return answer.get(timeout=milliseconds / 1000), BasecallClient.success
    except queue.Empty:
        return None, BasecallClient.timed_out


class BasecallClient:
    """The client, as the published documentation of ont-pybasecall-client-lib describes it."""

    result = _codes("result", _RESULTS)
    pass_read_result = _codes("pass_read_result", _PASSED)
    status = _codes("status", _STATES)
    read_priority = _codes("read_priority", "high_priority medium_priority low_priority")

    def __init__(self, address: str, config: str, num_threads: int = 1) -> None:
        self._address, self._config = address, config
        self._parameters: dict[str, Any] = {"max_reads_queued": 20, "connection_timeout": 15_000}
        self._state = "disconnected"
        self._message = ""
        self._link: Any = None
        self._details: dict[str, Any] = {}

    @staticmethod
    def get_software_version() -> tuple[int, ...]:
        return SOFTWARE

    @staticmethod
    def get_protocol_version() -> tuple[int, ...]:
        return PROTOCOL

    @staticmethod
    def get_server_information(address: str, timeout: int) -> tuple[Any, Any]:
        answer, code = _ask(address, timeout, "information")
        return (answer, code) if code == BasecallClient.success else ("No information available", code)

    @staticmethod
    def get_server_stats(address: str, timeout: int) -> tuple[Any, Any]:
        return _ask(address, timeout, "statistics")

    @staticmethod
    def get_server_internal_state(address: str, timeout: int) -> tuple[Any, Any]:
        return _ask(address, timeout, "state")

    @staticmethod
    def get_barcode_kits(address: str, timeout: int) -> tuple[Any, Any]:
        return _ask(address, timeout, "kits")

    def set_params(self, params: dict[str, Any]) -> Any:
        if self._state == "connected":
            return self.already_connected
        for name, value in params.items():
            wanted = next((kind for kind, names in _PARAMETERS.items() if name in names.split()), None)
            if name == "priority":
                wanted = self.read_priority
            if wanted is None or not isinstance(value, wanted):
                return self.failed
        self._parameters.update(params)
        return self.success

    def connect(self) -> Any:
        if self._state == "connected":
            return self.already_connected
        try:
            link = Client(self._address.removeprefix("ipc://"), "AF_UNIX")
            link.send(("connect", self._config, {**self._parameters, "priority": None}))
            if not link.poll(self._parameters["connection_timeout"] / 1000):
                raise OSError("Failed to establish connection")
            code, self._details = link.recv()
        except (OSError, EOFError, ValueError) as error:
            self._state, self._message = "error_state", f"[timed_out] {error}"
            return self.timed_out
        if code != "success":
            self._state, self._message = "error_state", f"[{code}] refused"
            link.close()
            return self.result[code]
        self._link, self._state, self._message = link, "connected", ""
        self._waiting: queue.Queue[Any] = queue.Queue(self._parameters["max_reads_queued"])
        self._done: list[Any] = []
        threading.Thread(target=self._send, args=(link, self._waiting), daemon=True).start()
        threading.Thread(target=self._receive, args=(link, self._done), daemon=True).start()
        return self.success

    def _send(self, link: Any, waiting: queue.Queue[Any]) -> None:
        while (reads := waiting.get()) is not None:
            try:
                link.send(("reads", reads))
            except (OSError, ValueError):
                return

    def _receive(self, link: Any, done: list[Any]) -> None:
        try:
            while True:
                done.append(link.recv())
        except (OSError, EOFError, TypeError, ValueError) as error:
            if self._link is link:
                self._state, self._message = "error_state", f"[no_connection] {error!r}"

    def disconnect(self) -> Any:
        before, self._state, self._message = self._state, "disconnected", ""
        if self._link is not None:
            link, self._link = self._link, None
            hang_up(link)
            with suppress(queue.Full):  # then the sender ends at its next send
                self._waiting.put_nowait(None)
        return self.no_connection if before == "disconnected" else self.success

    def pass_read(self, read: dict[str, Any], wait_duration_ms: int = 0) -> Any:
        return self.pass_reads([read], wait_duration_ms)

    def pass_reads(self, reads: list[dict[str, Any]], wait_duration_ms: int = 0) -> Any:
        if not all(map(_good, reads)):
            return self.bad_read
        if self._state != "connected":
            return self.not_accepting_reads
        try:
            self._waiting.put([dict(read) for read in reads], timeout=max(wait_duration_ms, 1) / 1000)
        except queue.Full:
            return self.queue_full
        return self.read_accepted

    def get_completed_reads(self) -> list[list[dict[str, Any]]]:
        if self._link is None:
            return []
        taken = len(self._done)  # the receiving thread may append meanwhile
        sent = self._done[:taken]
        del self._done[:taken]
        return [group for groups in sent for group in groups]

    def finish(self, timeout: int = 0) -> Any:
        time.sleep(min(timeout, 0.1))
        return self.not_ready if self._state == "connected" else self.no_connection

    def get_status(self) -> Any:
        return self.status[self._state]

    def get_address(self) -> str:
        return self._address

    def get_error_message(self) -> str:
        return self._message

    def get_internal_state(self) -> str:
        return self._state

    def get_basecalling_config(self) -> tuple[dict[str, Any], Any]:
        return self._details, self.success if self._state == "connected" else self.no_connection

    def get_alignment_sam_header(self) -> tuple[str, Any]:
        return "", self.success if self._state == "connected" else self.no_connection


for _kind in ("result", "pass_read_result", "status", "read_priority"):
    for _member in getattr(BasecallClient, _kind):
        setattr(BasecallClient, _member.name, _member)


def hang_up(link: Any) -> None:
    """Close a connection that another thread may be reading from."""
    with suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def _good(read: dict[str, Any]) -> bool:
    """Say whether a read has what the documentation asks for."""
    try:
        return (
            0 <= read["read_tag"] < 2**32
            and isinstance(read["raw_data"], np.ndarray)
            and read["raw_data"].dtype == np.int16
            and read["raw_data"].ndim == 1
            and bool(read["read_id"])
            and all(isinstance(read[key], float) for key in ("daq_offset", "daq_scaling", "sampling_rate"))
            and 0 <= read["start_time"] < 2**64
            and all(read.get(key, "x") for key in ("run_id", "sequencing_kit", "end_reason"))
        )
    except (KeyError, TypeError):
        return False
