"""Where the actors live: a Ray of the training's own on this machine, or the cluster that ``RAY_ADDRESS`` names.

Ray by itself listens on every interface and lets in whoever comes. Here it listens on the loopback interface alone, and
asks for a token in any case. A cluster on other interfaces is joined only if it asks for one as well.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from quadric.files import new_file
from quadric.parallel.engine import check_mode, forget_token, ray, stay_on_loopback

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch for nodes that stay on the loopback interface, named after the systems where that is the default."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_VARIABLES = (*LOOPBACK, *QUIET, "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
TOKEN_SECONDS, START_SECONDS, IDLE_SECONDS = 30.0, 120.0, 900.0
_ABOUT, _TOKEN, _ALIVE = "ray.json", "token", "alive"


class Cluster:
    """Joined for the time of a training.

    Args:
        folder: of the training: a driver that was killed finds there the Ray that it has left behind.
        cpus: of a Ray that is started here.
        memory: bytes of its object store, where the data and all that is on its way lies; None: Ray's own measure, 30 %
            of the machine's, of which only what is used is taken.

    Attributes:
        own: whether it is a Ray that was started for this training.

    Raises:
        ValueError: ``RAY_ADDRESS`` is that of a cluster without tokens, or there is none for it here; this process has
            imported ray before, to be without.
        RuntimeError: Ray does not start, or cannot be reached.
    """

    def __init__(self, folder: Path, *, cpus: int, memory: int | None = None) -> None:
        check_mode()
        self._folder = folder.resolve()
        self._before = dict(os.environ)
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        address = os.environ.get("RAY_ADDRESS")
        self.own = address in (None, "local")
        self._left = threading.Event()
        try:
            if self.own:
                os.environ.pop("RAY_ADDRESS", None)
                stay_on_loopback()
                address = _start(self._folder, cpus, memory)
            else:
                _check_token(str(address))
            _join(str(address))
        except BaseException:
            self._end()
            raise
        if self.own:
            threading.Thread(target=self._keep, daemon=True).start()

    @property
    def there(self) -> bool:
        """Not where the Ray that was started here has died: a question to it waits long, and then ends the process."""
        return not self.own or _running(self._folder) is not None

    def check(self) -> None:
        """Raises ``RuntimeError`` where the Ray that was started here has died, before Ray gives up without a word."""
        if not self.there:
            raise RuntimeError(
                f"the Ray of this training has ended ({self._folder / 'ray.log'} may say why): the same command starts "
                "another, and goes on from the last checkpoints"
            )

    def leave(self) -> None:
        """Leaves the cluster, and ends the Ray that was started here."""
        ray.shutdown()
        self._end()

    def _end(self) -> None:
        self._left.set()
        if self.own:
            _end(self._folder)
        stay_on_loopback(False)
        for name in _VARIABLES:  # those that joining has changed, as they were
            os.environ.pop(name, None)
            if name in self._before:
                os.environ[name] = self._before[name]

    def _keep(self) -> None:
        """Says that somebody still wants the Ray that was started here, which ends without that."""
        while not self._left.wait(IDLE_SECONDS / 30):
            with suppress(FileNotFoundError):
                (self._folder / _ALIVE).touch()


_NAMESPACE = "quadric"


def _join(address: str) -> None:
    forget_token()  # of the cluster before, if this process has been in one
    try:
        ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise RuntimeError(f"RAY_ADDRESS={address}: cannot be joined ({error}): is the cluster up?") from error


def _start(folder: Path, cpus: int, memory: int | None) -> str:
    """The address of the Ray of ``folder``, started if it is not running."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / _TOKEN
    if (about := _running(folder)) is None:
        with new_file(token) as temporary:
            temporary.chmod(0o600)
            temporary.write_text(secrets.token_hex(32))
        _clear(folder)
        (folder / _ALIVE).touch()
        environment = {**os.environ, **_environment(token), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with (folder / "ray.log").open("ab") as log:
            command = [sys.executable, "-m", "quadric.parallel.cluster", str(folder), str(cpus), str(memory or 0)]
            head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            about = _awaited(folder, head)
        except BaseException:
            _kill_session(head.pid)
            raise
    os.environ.update(_environment(token))
    return str(about["address"])


def _awaited(folder: Path, head: subprocess.Popen[bytes]) -> Mapping[str, Any]:
    deadline = time.monotonic() + START_SECONDS
    while (about := _running(folder)) is None or about["pid"] != head.pid:  # one that nobody waits for may come first
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start: {folder / 'ray.log'} says why")
        time.sleep(0.05)
    return about


def _environment(token: Path) -> dict[str, str]:
    return {**LOOPBACK, **QUIET, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token.resolve())}


def _running(folder: Path) -> Mapping[str, Any] | None:
    """What is known of the Ray of ``folder``, where it is running."""
    with suppress(FileNotFoundError, ValueError):
        about = json.loads((folder / _ABOUT).read_text())
        with suppress(OSError):
            arguments = Path(f"/proc/{about['pid']}/cmdline").read_text().split("\0")
            if _ARGUMENT in arguments and str(folder) in arguments:
                return dict(about)
    return None


_ARGUMENT = "quadric.parallel.cluster"
_PREFIX = "quadric-"


def _end(folder: Path) -> None:
    if (about := _running(folder)) is not None:
        with suppress(ProcessLookupError):
            os.kill(about["pid"], signal.SIGTERM)
        deadline = time.monotonic() + 20
        while _running(folder) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        _kill_session(about["pid"], about["place"])
    _clear(folder)
    for name in (_TOKEN, _ALIVE):
        (folder / name).unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Removes what is known of a Ray, and what one that was killed has left, processes included."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        about = json.loads((folder / _ABOUT).read_text())
        _kill_session(about["pid"], about["place"])
        place = Path(about["place"])
        if place.name.startswith(_PREFIX):
            shutil.rmtree(place, ignore_errors=True)
    (folder / _ABOUT).unlink(missing_ok=True)


def _kill_session(leader: int, place: str | None = None) -> None:
    """Ends what a Ray has left, such as a worker that is stopped: all are in the session of its first process.

    Its number may since be another's: only those are ended that have files open in ``place``, where Ray's logs are.
    None: it is a child of this process.
    """
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, OSError):
            if os.getsid(int(entry.name)) == leader and (place is None or _writes_in(entry, place)):
                os.kill(int(entry.name), signal.SIGKILL)


def _writes_in(process: Path, place: str) -> bool:
    return any(os.readlink(link).startswith(place) for link in (process / "fd").iterdir())


def _check_token(address: str) -> None:
    """Refuses a cluster that other machines reach and that lets in whoever comes."""
    if not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"RAY_ADDRESS={address}: give HOST:PORT, as `ray start --head` has told it")
    host = address.removeprefix("ray://").rsplit(":", 1)[0].strip("[]")
    if host == "localhost" or _is_loopback(host):
        os.environ.update({name: value for name, value in LOOPBACK.items() if name not in os.environ})
        stay_on_loopback()
    known = [os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")]
    if os.environ.get("RAY_AUTH_MODE") != "token" or not (any(known) or (Path.home() / ".ray/auth_token").is_file()):
        raise ValueError(
            f"RAY_ADDRESS={address}: no token for it: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, to those that the cluster was started with"
        )
    refusals: dict[Welcome, str] = {
        "refused": "the cluster refuses the token: give the one that it was started with",
        "silent": f"the cluster is not there, or does not answer within {TOKEN_SECONDS:.0f} s",
    }
    if (welcome := welcomes(address, dict(os.environ))) != "let in":
        raise ValueError(f"RAY_ADDRESS={address}: {refusals[welcome]}")
    match welcomes(address, {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        case "let in":
            raise ValueError(
                f"RAY_ADDRESS={address}: the cluster lets in strangers: start all its nodes with RAY_AUTH_MODE=token"
            )
        case "silent":
            raise ValueError(f"RAY_ADDRESS={address}: whether the cluster refuses strangers cannot be told: try again")


Welcome = Literal["let in", "refused", "silent"]


def welcomes(address: str, environment: dict[str, str]) -> Welcome:
    """What becomes of a process with this environment that asks the cluster whether it is there."""
    code = "import sys\nfrom ray._raylet import GcsClient\nGcsClient(address=sys.argv[1]).check_alive([], timeout=5)"
    command = [sys.executable, "-c", code, address.removeprefix("ray://")]
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TOKEN_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "silent"
    if ended.returncode == 0:
        return "let in"
    return "refused" if "auth" in ended.stderr.lower() else "silent"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _serve(folder: Path, cpus: int, memory: int) -> None:
    """A Ray for ``folder`` until SIGTERM, or until nobody has wanted it for long."""
    place = Path(tempfile.mkdtemp(prefix=_PREFIX))  # sockets want a short path
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=None,
            include_dashboard=False,
            object_store_memory=memory or None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(place / "r"),  # which Ray opens to everybody, as it does its sockets
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with new_file(folder / _ABOUT) as temporary:
            about = {"address": ray.get_runtime_context().gcs_address, "pid": os.getpid(), "place": str(place)}
            temporary.write_text(json.dumps(about))
        while time.time() - (folder / _ALIVE).stat().st_mtime < IDLE_SECONDS:
            time.sleep(2)
    except FileNotFoundError:
        pass  # the training has been deleted
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
