"""Who may use vmnet: root up to macOS 15, a signature from macOS 26 on.

How it works. Up to macOS 15 vmnet asks for root, or for an entitlement that Apple gives to few, and whose use in a
signature of one's own gets the program killed. From macOS 26 on a signature that anybody can make, with
`com.apple.security.virtualization`, will do for every mode. No Python has that entitlement as it comes. `vmnet setup`
makes a copy of the interpreter in the user's own directory and signs the copy.

The interpreter is not what its name says. A framework build's `bin/python3` is a launcher that starts
`Python.framework/.../Resources/Python.app/Contents/MacOS/Python`, and its signature has no effect on what it starts;
a virtual environment's is a link to the launcher. So the copy is of the file that the kernel says is running. It finds
its library by where the original's load command says, its modules by PYTHONHOME, and ours by PYTHONPATH. A framework
build names its library by the whole path; one of python-build-standalone, which uv installs, by a path from the
program's own, `../lib`: there the copy has a link to the original's.

    HOME/python3.13-1f2e3d4c/bin/python3.13-vmnet      one for each Python, by its version and where it lies
    HOME/python3.13-1f2e3d4c/lib                       its library's directory

As root, `sudo vmnet run` needs the rights for the start only: read, write and stop go on without them. So they are
dropped for good right after it, to the user that sudo(8) says it was, and before anything of the user's runs.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from openvmnet.errors import HostError, MissingFeature

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openvmnet.engine.darwin.mac import Mac

ENTITLEMENT = "com.apple.security.virtualization"
FIRST_SIGNED = (26,)
PROGRAM = "vmnet setup -- program.py"  # how a program of the user's own comes to its rights, under sudo before macOS 26
_CODESIGN = "/usr/bin/codesign"
_TRIAL = 30.0  # s: macOS looks at a program before it is run for the first time
_PLIST = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n'
    f'<plist version="1.0"><dict><key>{ENTITLEMENT}</key><true/></dict></plist>\n'
)


def signed_counts(mac: Mac) -> bool:
    """Whether on this macOS a signature is enough."""
    return mac.version >= FIRST_SIGNED


def entitled(mac: Mac, program: str | None = None) -> bool:
    """Whether `program` (None: what runs) has the entitlement, as codesign(1) reads its signature."""
    said = mac.run(_CODESIGN, "--display", "--entitlements", "-", "--xml", program or mac.program)
    return f"<key>{ENTITLEMENT}</key><true/>" in "".join(said.split())


def permitted(mac: Mac) -> bool:
    """Whether this process may use vmnet."""
    return mac.root or (signed_counts(mac) and entitled(mac))


def refusal(mac: Mac, command: str = "vmnet run ...") -> MissingFeature:
    """The error of a process that may not use vmnet: which of the two ways applies, and the command."""
    if signed_counts(mac):
        return MissingFeature(
            f"vmnet needs a program signed with {ENTITLEMENT}, and {mac.program} is not",
            hint="vmnet setup",
        )
    version = ".".join(map(str, mac.version)) or "this macOS"
    return MissingFeature(
        f"macOS {version} lets only root use vmnet (from 26 on a signature is enough)", hint=f"sudo {command}"
    )


# The signed copy.


def home() -> Path:
    """Where the signed copy is kept."""
    return Path.home() / "Library" / "Application Support" / "openvmnet"


def copy_path() -> Path:
    """The signed copy's place: each Python has its own, since none starts with another's modules."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    which = hashlib.sha256(os.fsencode(sys.base_prefix)).hexdigest()[:8]
    return home() / f"{version}-{which}" / "bin" / f"{version}-vmnet"


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the copy needs to be the same Python: its modules' home, and the path of ours."""
    kept = dict(os.environ if base is None else base)
    path = [part for part in sys.path if part]
    return kept | {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": os.pathsep.join(path)}


def make_copy(mac: Mac, target: Path | None = None) -> Path:
    """Make the signed copy anew, and try it. Raises MissingFeature before macOS 26, HostError where signing fails."""
    if not signed_counts(mac):
        raise refusal(mac)
    target = target or copy_path()
    base = target.parent.parent
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as directory:
            link = Path(directory) / "lib"
            link.symlink_to(Path(sys.base_prefix) / "lib")
            link.replace(base / "lib")
            made = Path(directory) / target.name  # as far from base/lib as the target
            _sign(mac, made)
            reason = fault(made)
            if reason is not None:
                raise HostError(f"the signed copy of {sys.executable} does not run: {reason}")
            made.replace(target)
    except OSError as error:
        raise HostError(f"{target} cannot be made: {error.strerror}", hint=f"ls -ld '{base}'") from error
    return target


def _sign(mac: Mac, made: Path) -> None:
    plist = made.with_name("entitlements.plist")
    shutil.copyfile(Path(mac.program).resolve(), made)
    made.chmod(0o755)
    plist.write_text(_PLIST)
    said = mac.run(_CODESIGN, "--force", "--sign", "-", "--entitlements", str(plist), str(made))
    if not entitled(mac, str(made)):
        raise HostError(f"codesign did not sign {made.name}: {said.strip() or 'it said nothing'}")


def run_signed(mac: Mac, argv: Sequence[str]) -> NoReturn:
    """Become the signed interpreter, with `argv` as its arguments; as root the one that runs. Raises as `make_copy`."""
    if not (mac.root or signed_counts(mac)):
        raise refusal(mac, PROGRAM)
    if mac.root or entitled(mac):
        program, chosen = mac.program, environment()
    else:
        target = copy_path()
        good = entitled(mac, str(target)) and fault(target) is None
        program = str(target if good else make_copy(mac))
        chosen = environment()
    sys.stdout.flush()
    try:
        os.execve(program, [program, *argv], chosen)  # noqa: S606 - the argument list that the user gave, by no shell
    except OSError as error:
        raise HostError(f"'{program}' cannot be started: {error.strerror}") from error


def fault(program: Path) -> str | None:
    """Why a copy does not run: it has to start, and to find its modules and ours. None where it does.

    One that did run may not any more: Homebrew removes a Python's library when it has a newer one.
    """
    command = [str(program), "-c", "import ctypes, openvmnet"]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, errors="replace", timeout=_TRIAL, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it was not ready in {_TRIAL:g} s"
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode == 0:
        return None
    return done.stderr.strip() or f"it ended with {done.returncode}"


def interpreter(mac: Mac) -> tuple[str, dict[str, str]]:
    """What starts a Python that may use vmnet, and its environment. Raises MissingFeature where there is none yet."""
    if mac.root:
        return sys.executable, dict(os.environ)
    if not signed_counts(mac):
        raise refusal(mac)
    if entitled(mac):
        return mac.program, environment()
    target = copy_path()
    if not target.exists():
        raise refusal(mac)
    return str(target), environment()


# Root's rights.


def sudo_user(environ: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """uid and gid of who called sudo(8); None without sudo, or where root did."""
    environ = os.environ if environ is None else environ
    uid, gid = environ.get("SUDO_UID", ""), environ.get("SUDO_GID", "")
    if not (uid.isdecimal() and gid.isdecimal()) or int(uid) == 0:
        return None
    return int(uid), int(gid)


def drop(uid: int, gid: int) -> None:
    """Become `uid` for good. Raises HostError where root's rights could be had again."""
    try:
        name = pwd.getpwuid(uid).pw_name
        os.initgroups(name, gid)
    except KeyError:
        os.setgroups([gid])
    os.setgid(gid)
    os.setuid(uid)
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise HostError("root's rights were not given up")


def user_environment(uid: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a program that the user is to run: home and name are the user's, nothing says sudo."""
    kept = {name: value for name, value in (os.environ if base is None else base).items() if name[:5] != "SUDO_"}
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return kept
    return kept | {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
