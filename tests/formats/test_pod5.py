from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pod5
import pytest

from tasks.core.errors import InputError, SettingsError
from tasks.core.reads import Read
from tasks.formats.pod5 import find_pod5, format_read_id, read_rows, scan_pod5
from tasks.formats.replay import ReplaySettings, bundled_source, replay
from tests.data import SHARED, shared
from tests.making import write_pod5

REAL = sorted(str(path.relative_to(SHARED)) for path in SHARED.glob("data/*/*.pod5")) or ["none"]


@pytest.mark.parametrize("name", REAL)
def test_real_files_read_as_the_library_reads_them(name: str) -> None:
    path = shared(*name.split("/"))
    index = scan_pod5(path)
    ours = list(read_rows(str(path), 0, len(index.read_ids)))
    with pod5.Reader(path) as reader:
        theirs = list(reader.reads())
        assert [format_read_id(row.tobytes()) for row in index.read_ids] == [str(r.read_id) for r in theirs]
        assert index.num_samples.tolist() == [r.num_samples for r in theirs]
        for mine, read in zip(ours, theirs, strict=True):
            assert isinstance(mine, Read)
            assert np.array_equal(mine.signal, read.signal)
            assert np.array_equal(mine.picoamperes(), read.signal_pa)
            assert (mine.channel, mine.mux, mine.read_number, mine.start_sample) == (
                read.pore.channel,
                read.pore.well,
                read.read_number,
                read.start_sample,
            )
            assert (mine.end_reason, mine.minknow_events) == (read.end_reason.name, read.num_minknow_events)
            assert mine.run.acquisition_id == read.run_info.acquisition_id
            assert (mine.run.sample_rate, mine.run.sequencing_kit) == (
                read.run_info.sample_rate,
                read.run_info.sequencing_kit,
            )


def test_rows_are_a_slice(tmp_path: Path) -> None:
    path = write_pod5(tmp_path / "a.pod5", [100] * 2500)  # several record batches
    whole = [read.read_id for read in read_rows(str(path), 0, 2500)]
    part = list(read_rows(str(path), 990, 1010, position=7))
    assert [read.read_id for read in part] == whole[990:1010]
    assert [read.position for read in part] == list(range(7, 27))


def made(kind: str, folder: Path) -> Path:
    """Make a file that can't be used."""
    path = write_pod5(folder / "good.pod5", [100, 200])
    whole = path.read_bytes()
    bad = folder / "bad.pod5"
    if kind == "dangling_link":
        bad.symlink_to(folder / "gone.pod5")
    elif kind == "no_reads":
        with pod5.Writer(bad):
            pass
    elif kind == "fifo":
        os.mkfifo(bad)
    else:
        contents = {
            "empty": b"",
            "text": b"these are no reads",
            "cut": whole[:-7],
            "half": whole[: len(whole) // 2],
            "footer": whole[:-40] + bytes(16) + whole[-24:],
            "table": whole[:600] + bytes(len(whole) - 1200) + whole[-600:],
        }
        bad.write_bytes(contents[kind])
    return bad


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty"),
        ("text", "not_pod5"),
        ("cut", "unfinished"),
        ("half", "unfinished"),
        ("footer", "corrupt"),
        ("table", "corrupt"),
        ("dangling_link", "dangling_link"),
        ("no_reads", "no_reads"),
        ("fifo", "not_pod5"),
    ],
)
def test_bad_files_are_named_with_their_reason(kind: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bad\.pod5") as caught:
        scan_pod5(made(kind, tmp_path))
    assert caught.value.reason == reason


def test_flipped_bits_in_the_tables_are_named_or_harmless(tmp_path: Path) -> None:
    """Arrow raises a dozen kinds of errors over them, and would end the process over some."""
    whole = write_pod5(tmp_path / "whole.pod5", [300] * 20).read_bytes()
    tables = whole.index(b"ARROW1", whole.index(b"ARROW1") + 1)  # run info and reads come after signal
    bad = tmp_path / "bad.pod5"
    random = Random(1)
    reasons = Counter[str]()
    for _ in range(300):
        content = bytearray(whole)
        content[random.randrange(tables, len(whole) - 400)] ^= 1 << random.randrange(8)
        bad.write_bytes(content)
        try:
            index = scan_pod5(bad)
            reasons.update(["ok"])
            list(read_rows(str(bad), 0, len(index.read_ids)))
        except InputError as error:
            reasons[error.reason] += 1
        else:
            assert len(index.read_ids) == len(index.num_samples) == len(index.run_of_read)
    assert reasons.keys() <= {"ok", "corrupt", "old_version", "no_reads"}
    assert min(reasons["ok"], reasons["corrupt"]) > 50


def test_a_length_that_no_run_gives(tmp_path: Path) -> None:
    path = write_pod5(tmp_path / "a.pod5", [100, 30_007, 100])
    path.write_bytes(path.read_bytes().replace((30_007).to_bytes(8, "little"), (1 << 60).to_bytes(8, "little")))
    with pytest.raises(InputError, match="a read of 1152921504606846976 samples") as caught:
        scan_pod5(path)
    assert caught.value.reason == "corrupt"


def test_a_file_that_changed_since_it_was_planned(tmp_path: Path) -> None:
    path = write_pod5(tmp_path / "a.pod5", [100] * 3)
    with pytest.raises(InputError, match="plan again"):
        list(read_rows(str(path), 0, 4))


def test_find_lists_each_file_once_and_follows_links(tmp_path: Path) -> None:
    first = write_pod5(tmp_path / "in" / "b" / "one.pod5", [100])
    second = write_pod5(tmp_path / "in" / "a.pod5", [100], seed=2)
    (tmp_path / "in" / "notes.txt").touch()
    (tmp_path / "in" / "b" / "up").symlink_to(tmp_path / "in")  # a circle
    lost = tmp_path / "in" / "lost.pod5"
    lost.symlink_to(tmp_path / "nowhere")
    assert find_pod5((tmp_path / "in", second)) == [second, lost, first]


def test_lists_may_name_lists_and_not_themselves(tmp_path: Path) -> None:
    one = write_pod5(tmp_path / "a.pod5", [100])
    outer, twice, inner = (tmp_path / name for name in ("outer.txt", "twice.txt", "inner.txt"))
    outer.write_text("inner.txt\ntwice.txt\n")
    twice.write_text("inner.txt\n")
    inner.write_text("a.pod5\n")
    assert find_pod5((outer,)) == [one]
    inner.write_text("./outer.txt\n")
    with pytest.raises(SettingsError, match=r"the list .*outer\.txt names itself"):
        find_pod5((outer,))
    inner.write_bytes(b"a.po\0d5\n")
    with pytest.raises(SettingsError, match=r"inner\.txt is no list of paths"):
        find_pod5((inner,))


def test_replay_gives_the_same_run_again(tmp_path: Path) -> None:
    settings = ReplaySettings(reads=12, reads_per_file=5, mean_samples=2000, distinct=3)
    runs = [list(replay([bundled_source()], tmp_path / name, settings)) for name in ("a", "b")]
    assert [len(files) for files in runs] == [3, 3]
    rows = [
        [(r.read_id, r.signal.tobytes(), r.start_sample) for f in files for r in read_rows(str(f), 0, count)]
        for files, count in ((runs[0], 2), (runs[1], 2))
    ]
    assert rows[0] == rows[1]
    assert len({str(name) for name, _, _ in rows[0]}) == 6
    other = next(replay([bundled_source()], tmp_path / "c", ReplaySettings(reads=12, seed=2)))
    assert set(map(bytes, scan_pod5(other).read_ids)).isdisjoint(map(bytes, scan_pod5(runs[0][0]).read_ids))


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "no_reads"])
def test_replay_names_what_it_cannot_read(tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "bad.pod5" if kind == "missing" else made(kind, tmp_path)
    with pytest.raises(InputError, match=r"/bad\.pod5: (no such file|is empty|is not a POD5 file|holds no reads)"):
        list(replay([bad], tmp_path / "out", ReplaySettings(reads=1)))
    assert not (tmp_path / "out").exists()


def test_replay_takes_folders_and_refuses_a_seed_below_0(tmp_path: Path) -> None:
    write_pod5(tmp_path / "in" / "a.pod5", [4000])
    assert len(list(replay([tmp_path / "in"], tmp_path / "out", ReplaySettings(reads=1)))) == 1
    (tmp_path / "none").mkdir()
    with pytest.raises(SettingsError, match=r"no read with signal to replay in .*/none"):
        list(replay([tmp_path / "none"], tmp_path / "out", ReplaySettings(reads=1)))
    with pytest.raises(SettingsError, match=r"replay\.seed: -1 must be at least 0"):
        ReplaySettings(seed=-1)
