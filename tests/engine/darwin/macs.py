"""A Mac that says what a test tells it to."""

from __future__ import annotations

from openvmnet.engine.darwin.mac import Mac

IFCONFIG = """lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\toptions=1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 ::1 prefixlen 128
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether a4:83:e7:00:00:01
\tinet6 fe80::1c3b%en0 prefixlen 64 secured scopeid 0xe
\tinet 192.168.1.23 netmask 0xffffff00 broadcast 192.168.1.255
\tstatus: active
"""
BRIDGE = """bridge100: flags=8a63<UP,BROADCAST,SMART,RUNNING,ALLMULTI,SIMPLEX,MULTICAST> mtu 1500
\tether a6:83:e7:00:00:64
\tinet 192.168.64.1 netmask 0xffffff00 broadcast 192.168.64.255
\tConfiguration:
\t\tid 0:0:0:0:0:0 priority 0 hellotime 0 fwddelay 0
"""
MEMBER = "\tmember: vmenet0 flags=3<LEARNING,DISCOVER>\n"
TUNNEL = """utun4: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 1380
\tinet 10.99.0.2 --> 10.99.0.2 netmask 0xffffffff
"""
SHARING_ON = b"""<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0"><dict><key>NAT</key><dict><key>Enabled</key><integer>1</integer></dict></dict></plist>"""
ENTITLED = """Executable=/tmp/python
<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict>
<key>com.apple.security.virtualization</key><true/></dict></plist>"""
NAT = "/Library/Preferences/SystemConfiguration/com.apple.nat.plist"


class FakeMac(Mac):
    """`said` maps a command's words, joined, or its beginning, to its output; `files` a path to its content."""

    def __init__(
        self,
        version: tuple[int, ...] = (26, 1),
        *,
        root: bool = False,
        said: dict[str, str] | None = None,
        files: dict[str, bytes] | None = None,
        ifconfig: str = IFCONFIG,
    ) -> None:
        self._version, self._root = version, root
        self.said = {"/sbin/ifconfig": ifconfig} | (said or {})
        self.files = files or {}
        self.asked: list[str] = []

    def run(self, *argv: str) -> str:
        command = " ".join(argv)
        self.asked.append(command)
        fitting = [key for key in self.said if command.startswith(key)]
        return self.said[max(fitting, key=len)] if fitting else ""

    def read(self, path: str) -> bytes | None:
        return self.files.get(path)

    @property
    def version(self) -> tuple[int, ...]:
        return self._version

    @property
    def root(self) -> bool:
        return self._root

    @property
    def program(self) -> str:
        return "/usr/bin/python3"
