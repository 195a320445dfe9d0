"""Outcomes and latency tokens on disk: one SQLite file a node, shared by all processes on it.

The key of an entry is a content hash of all it depends on (see `keys`). The first writer of a key is canonical: a later
result under the same key is dropped, and counted where it differs. Writes are transactions in write-ahead mode, so a
killed process leaves the entries of finished transactions and nothing else.
"""

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from envs.errors import UserError
from envs.files import atomic_file

FORMAT_VERSION: Final = 1
BUSY_SECONDS: Final = 60.0
DEFAULT_MAX_BYTES: Final = 4 * 2**30
# The day an entry was last used decides what is pruned; finer times would turn every read into a write.
_DAY: Final = 86_400
_BATCH: Final = 500
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settings (hash TEXT PRIMARY KEY, setting TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcomes (
  key BLOB PRIMARY KEY, setting TEXT NOT NULL, prompt TEXT NOT NULL, top_k TEXT NOT NULL,
  token_ids TEXT NOT NULL, finished INTEGER NOT NULL, seconds REAL NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS latency_tokens (
  key BLOB PRIMARY KEY, setting TEXT NOT NULL, prompt TEXT NOT NULL, encoder TEXT NOT NULL,
  states BLOB NOT NULL, seconds REAL NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS outcomes_used ON outcomes (used, key, seconds);
CREATE INDEX IF NOT EXISTS latency_tokens_used ON latency_tokens (used, key, seconds);
"""
# The indices contain all that pruning and counting read: in the tables it comes after gigabytes of states.
TABLES: Final = ("outcomes", "latency_tokens")
# What goes first when space runs out: a latency token takes a thousand times the bytes and a tenth of the computing.
_PRUNED: Final = ("latency_tokens", "outcomes")

# By SQLite error code. None of these says that the file is damaged, so it must not be thrown away.
_ADVICE: Final = {
    "SQLITE_BUSY": "another process is writing to it: wait until that is done, or name another file with store.path",
    "SQLITE_LOCKED": "another process is writing to it: wait until that is done, or name another file with store.path",
    "SQLITE_FULL": "free some space on its disk, or set store.path to a file on a larger one",
    "SQLITE_IOERR": "see that its disk works and has space, or set store.path to a file on another one",
    "SQLITE_READONLY": "make the file and its folder writable, or set store.path to one that is",
    "SQLITE_CANTOPEN": "make the file and its folder readable and writable, or set store.path to one that is",
}


@dataclass(frozen=True)
class StoredOutcome:
    """Answer ids, whether the answer ended by itself, and the seconds it took to compute."""

    token_ids: tuple[int, ...]
    finished: bool
    seconds: float


@dataclass(frozen=True)
class StoredStates:
    """Latency tokens of one prompt as raw numbers, and the seconds they took to compute."""

    states: bytes
    seconds: float


class OutcomeStore:
    """A store file. Safe to use from several processes and threads; each process opens its own connection.

    Args:
        path: the file, made with its folder where missing.
        max_bytes: bound of the file; latency tokens go before outcomes, those unused longest first. None for no bound.

    Raises:
        UserError: the file is not such a store, is of a later format, or cannot be opened.
    """

    def __init__(self, path: str | Path, max_bytes: int | None = DEFAULT_MAX_BYTES) -> None:
        if max_bytes is not None and max_bytes < 2**20:
            raise UserError(f"store bound of {max_bytes} bytes is not allowed: give at least {2**20} (1 MiB)")
        self.path = Path(path).expanduser()
        self.max_bytes = max_bytes
        self.disagreements = 0
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._lock = threading.RLock()
        with self._lock:
            self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return OutcomeStore, (self.path, self.max_bytes)

    def get_outcomes(self, keys: Sequence[bytes]) -> dict[bytes, StoredOutcome]:
        """Stored outcomes among `keys`."""
        rows = self._select("key, token_ids, finished, seconds", "outcomes", keys)
        return {row[0]: StoredOutcome(tuple(json.loads(row[1])), bool(row[2]), row[3]) for row in rows}

    def put_outcomes(
        self, fingerprint: str, entries: Mapping[bytes, tuple[str, str, StoredOutcome]]
    ) -> dict[bytes, StoredOutcome]:
        """Store outcomes by key, each with prompt and top-k as JSON; returns what the store now contains."""
        rows = [
            (key, prompt, top_k, json.dumps(value.token_ids), int(value.finished), value.seconds)
            for key, (prompt, top_k, value) in entries.items()
        ]
        self._insert("outcomes", "key, prompt, top_k, token_ids, finished, seconds", fingerprint, rows)
        canonical = self.get_outcomes(list(entries))
        self.disagreements += sum(
            key in canonical and canonical[key].token_ids != value.token_ids for key, (_, _, value) in entries.items()
        )
        return canonical

    def get_states(self, keys: Sequence[bytes]) -> dict[bytes, StoredStates]:
        """Stored latency tokens among `keys`."""
        rows = self._select("key, states, seconds", "latency_tokens", keys)
        return {row[0]: StoredStates(row[1], row[2]) for row in rows}

    def put_states(
        self, fingerprint: str, entries: Mapping[bytes, tuple[str, str, StoredStates]]
    ) -> dict[bytes, StoredStates]:
        """Store latency tokens by key, each with prompt and encoder as JSON; returns what the store now contains."""
        rows = [
            (key, prompt, encoder, value.states, value.seconds) for key, (prompt, encoder, value) in entries.items()
        ]
        self._insert("latency_tokens", "key, prompt, encoder, states, seconds", fingerprint, rows)
        return self.get_states(list(entries))

    def inspect(self) -> dict[str, Any]:
        """Counts, bytes, seconds of computing stored, and the engines the entries were computed under."""
        with self._read() as db:
            found: dict[str, Any] = {"path": str(self.path), "bytes": self._bytes(db), "max_bytes": self.max_bytes}
            for table in TABLES:
                count, seconds = db.execute(f"SELECT COUNT(*), COALESCE(SUM(seconds), 0) FROM {table}").fetchone()
                found[table], found[f"{table}_seconds"] = count, seconds
            rows = db.execute(
                "SELECT setting, (SELECT COUNT(*) FROM outcomes WHERE outcomes.setting = settings.hash) FROM settings"
            )
            found["settings"] = [{**json.loads(text), "outcomes": count} for text, count in rows]
        return found

    def prune(self, max_bytes: int | None = None, *, unused_days: float | None = None) -> int:
        """Delete entries unused for `unused_days`, then those unused longest until under `max_bytes`; how many went."""
        gone = 0
        with self._write() as db:
            for table in TABLES:
                if unused_days is not None:
                    oldest = int(time.time() - unused_days * _DAY)
                    gone += db.execute(f"DELETE FROM {table} WHERE used < ?", (oldest,)).rowcount
        limit = self.max_bytes if max_bytes is None else max_bytes
        if limit is not None:
            gone += self._shrink(limit)
        with self._write() as db:
            db.execute(
                "DELETE FROM settings WHERE hash NOT IN "
                "(SELECT setting FROM outcomes UNION SELECT setting FROM latency_tokens)"
            )
        self._compact()
        return gone

    def rows(self, table: str = "outcomes") -> Iterator[dict[str, Any]]:
        """Every entry of a table as a plain dict (engine, prompt and plan or encoder decoded), for export."""
        if table not in TABLES:
            raise UserError(f"store table {table!r} does not exist: choose one of {', '.join(TABLES)}")
        with self._read() as db:
            cursor = db.execute(
                f"SELECT t.*, s.setting FROM {table} t JOIN settings s ON s.hash = t.setting ORDER BY key"
            )
            names = [column[0] for column in cursor.description]
            for row in cursor:
                entry = dict(zip(names[:-1], row[:-1], strict=True))
                entry["key"] = entry["key"].hex()
                for name in ("prompt", "top_k", "token_ids", "encoder"):
                    if name in entry:
                        entry[name] = json.loads(entry[name])
                entry.update(entry.pop("prompt"))
                entry.update(json.loads(row[-1]))
                yield entry

    def close(self) -> None:
        """Close this process's connection; the next use opens another."""
        with self._lock:
            if self._connection is not None and self._owner == os.getpid():
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._owner == os.getpid():
            return self._connection
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            with _transaction(db):
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT OR IGNORE INTO facts VALUES ('format_version', ?)", (str(FORMAT_VERSION),))
            version = db.execute("SELECT value FROM facts WHERE name = 'format_version'").fetchone()[0]
        except (sqlite3.Error, OSError) as error:
            raise self._broken(error) from None
        if version != str(FORMAT_VERSION):
            raise UserError(f"store {self.path} has format {version}, this program reads {FORMAT_VERSION}: use another")
        self._connection, self._owner = db, os.getpid()
        return db

    def _broken(self, error: Exception) -> UserError:
        name = getattr(error, "sqlite_errorname", "") or ""
        advice = next((advice for code, advice in _ADVICE.items() if name.startswith(code)), None)
        if advice is None:
            damaged = name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
            advice = "move it away, or name another file" if damaged else "name another file with store.path"
        return UserError(f"cannot use store {self.path}: {error}; {advice}")

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._open()
            except sqlite3.Error as error:
                raise self._broken(error) from None

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            db = self._open()
            try:
                with _transaction(db):
                    yield db
            except sqlite3.Error as error:
                raise self._broken(error) from None

    def _select(self, columns: str, table: str, keys: Sequence[bytes]) -> list[Any]:
        rows: list[Any] = []
        now = int(time.time())
        stale: list[bytes] = []
        with self._read() as db:
            for start in range(0, len(keys), _BATCH):
                batch = list(keys[start : start + _BATCH])
                marks = ",".join("?" * len(batch))
                for row in db.execute(f"SELECT used, {columns} FROM {table} WHERE key IN ({marks})", batch):
                    rows.append(row[1:])
                    if row[0] < now - _DAY:
                        stale.append(row[1])
        if stale:
            with self._write() as db:
                db.executemany(f"UPDATE {table} SET used = ? WHERE key = ?", [(now, key) for key in stale])
        return rows

    def _insert(self, table: str, columns: str, fingerprint: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if not rows:
            return
        name = hashlib.sha256(fingerprint.encode()).hexdigest()
        marks = ",".join("?" * (len(rows[0]) + 2))
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, fingerprint))
            db.executemany(
                f"INSERT OR IGNORE INTO {table} ({columns}, setting, used) VALUES ({marks})",
                [(*row, name, int(time.time())) for row in rows],
            )
        self._bound()

    def _bytes(self, db: sqlite3.Connection) -> int:
        pages = db.execute("PRAGMA page_count").fetchone()[0] - db.execute("PRAGMA freelist_count").fetchone()[0]
        return int(pages * db.execute("PRAGMA page_size").fetchone()[0])

    def _bound(self) -> None:
        if self.max_bytes is not None:
            with self._read() as db:
                used = self._bytes(db)
            if used > self.max_bytes:
                # Below the bound by a tenth, so that not every later write prunes again.
                self._shrink(int(self.max_bytes * 0.9))
                self._compact()

    def _shrink(self, limit: int) -> int:
        """Delete latency tokens, then outcomes, those unused longest first, until the used pages fit."""
        gone = 0
        while True:
            with self._write() as db:
                used = self._bytes(db)
                counts = {table: db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in _PRUNED}
                table = next((table for table in _PRUNED if counts[table]), None)
                if used <= limit or table is None:
                    return gone
                # As if the file were this table alone: too few rather than too many, and then again.
                share = -(-counts[table] * max(used - limit, used // 50) // used)
                gone += db.execute(
                    f"DELETE FROM {table} WHERE key IN (SELECT key FROM {table} ORDER BY used, key LIMIT ?)", (share,)
                ).rowcount

    def _compact(self) -> None:
        """Give freed pages back to the file system."""
        with self._read() as db:
            # As a script, since a single execute() would free one page and stop.
            db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")


def export_parquet(store: OutcomeStore, path: str | Path, table: str = "outcomes") -> int:
    """Write a table of the store to a Parquet file; how many rows."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    target = Path(path)
    if target.exists():
        raise UserError(f"{target} exists already: choose another file")
    rows = list(store.rows(table))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as temporary:
            parquet.write_table(arrow.Table.from_pylist(rows), temporary)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    return len(rows)


def open_existing(path: str | Path, max_bytes: int | None = None) -> OutcomeStore:
    """A store that must already be there.

    Raises:
        UserError: there is no such file.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise UserError(f"no store at {found}: give the path of an existing store file")
    return OutcomeStore(found, max_bytes)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        # A full disk has rolled back already; a second time would be an error that hides the first.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
